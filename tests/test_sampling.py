"""sample_tokens without filters; numerics contract: DESIGN §5."""

import math

import pytest
import torch

from ppo_kernels import sample_tokens
from tests.conftest import (
    DTYPES,
    assert_as_exact_as_eager,
    awkward_rows,
    emulates_a_gpu,
    on_default_device,
    softmax_truth,
    thread_counts,
    waits_for_nothing,
)
from tests.sampling import SLACK, assert_drawn

VOCABULARIES = (1, 2, 7, 1031, 16385, 50257)
# The largest number below 1 that a draw can be.
LARGEST = 1 - 2**-53


def test_matches_a_hand_computed_row(backend):
    logits = torch.tensor([0.0, math.log(3.0), math.log(4.0)], dtype=torch.float64).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.124, 0.126, 0.499, 0.501, LARGEST], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms, backend=backend)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    expected = [math.log(p) for p in (1 / 8, 1 / 8, 3 / 8, 3 / 8, 1 / 2, 1 / 2)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_draws_where_the_cumulative_distribution_passes(backend, vocabulary, dtype):
    rows = 2 if vocabulary > 10000 or emulates_a_gpu(backend) else 40
    logits = (3 * torch.randn(rows, vocabulary)).to(dtype)
    uniforms = torch.rand(rows, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, LARGEST], dtype=torch.float64)
    result = sample_tokens(logits, uniforms, temperature=0.8, backend=backend)
    assert_drawn(result, logits.double() / 0.8, uniforms)
    assert result.tokens.dtype == torch.int64
    z = logits if dtype == torch.float64 else logits.float()
    eager = torch.log_softmax(z / 0.8, -1).gather(-1, result.tokens[:, None])[:, 0]
    truth = softmax_truth(logits, result.tokens, 0.8)[0]
    assert result.logprobs.dtype == z.dtype
    assert_as_exact_as_eager(result.logprobs, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (130, 20001))
def test_awkward_rows(backend, vocabulary, dtype):
    logits = awkward_rows(1300 if vocabulary > 1300 and emulates_a_gpu(backend) else vocabulary)
    logits = logits.to(dtype)
    for u in (0.37,) if emulates_a_gpu(backend) else (0.0, 0.37, 0.99, LARGEST):
        uniforms = torch.full((len(logits),), u, dtype=torch.float64)
        assert_drawn(sample_tokens(logits, uniforms, backend=backend), logits, uniforms)


def test_even_numbers_draw_each_token_as_often_as_it_is_likely(backend):
    row = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.0, 1.1, -4.0])
    count = 32 if emulates_a_gpu(backend) else 4096
    uniforms = (torch.arange(count) + 0.5) / count
    tokens = sample_tokens(row.expand(count, -1), uniforms, temperature=1.3, backend=backend).tokens
    expected = count * torch.softmax(row.double() / 1.3, -1)
    assert ((torch.bincount(tokens, minlength=7) - expected).abs() <= 1).all()


def test_a_likely_token_drowns_no_unlikely_ones(backend):
    """Each adds 2.5e-8 to a sum of nearly 1, less than half a unit of fp32."""
    vocabulary = 20_001
    logits = torch.zeros(3, vocabulary)
    logits[:, 0] = math.log(0.9995 / 2.5e-8)
    expected = torch.tensor([1_000, 10_000, 19_000])
    uniforms = 0.9995 + 2.5e-8 * (expected.double() - 0.5)
    uniforms = uniforms / (0.9995 + 2.5e-8 * 20_000)
    tokens = sample_tokens(logits, uniforms, backend=backend).tokens
    assert ((tokens - expected).abs() <= 40).all()


def test_excluded_tokens_are_never_drawn(backend):
    count = 8 if emulates_a_gpu(backend) else 300
    logits = torch.randn(count, 3000)
    logits[:, ::3] = -torch.inf
    logits[:, :1100] = -torch.inf
    logits[:, 2900:] = -torch.inf
    uniforms = torch.rand(count, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, LARGEST], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms, temperature=5.0, backend=backend)
    assert logits.gather(-1, tokens[:, None]).isfinite().all()
    assert logprobs.isfinite().all()
    assert tokens[:2].tolist() == [1100, 2899]


@pytest.mark.parametrize("low", (-3.4e38, 3.4e38))
def test_rows_at_the_ends_of_fp32_are_drawn_from(backend, low):
    """All of `finfo.min`, as some masks leave a row: any token is as likely as another."""
    logits = torch.full((4, 1000), low)
    uniforms = torch.tensor([0.0, 0.2505, 0.5005, 0.9999])
    tokens, logprobs = sample_tokens(logits, uniforms, backend=backend)
    assert tokens.tolist() == [0, 250, 500, 999]
    assert logprobs.tolist() == pytest.approx([-math.log(1000)] * 4, rel=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_temperature_zero_takes_the_first_of_the_largest(backend, dtype):
    logits = torch.randn(3, 5000).to(dtype)
    logits[0, [1500, 4999]] = 9
    logits[1, [0, 7]] = 9
    uniforms = torch.tensor([0.9, 0.9, 0.4])
    filters = {"top_p": 0.3, "min_p": 1.0}
    for options in ({}, filters):
        tokens, logprobs = sample_tokens(
            logits, uniforms, temperature=0, **options, backend=backend
        )
        assert tokens.tolist() == [1500, 0, logits[2].argmax().item()]
        assert logprobs.tolist() == [0.0] * 3
    mixed = torch.tensor([0.0, 0.5, 0.0])
    tokens, logprobs = sample_tokens(logits, uniforms, temperature=mixed, backend=backend)
    alone = sample_tokens(logits[1], uniforms[1], temperature=0.5, backend=backend)
    assert tokens[::2].tolist() == [1500, logits[2].argmax().item()]
    assert (tokens[1], logprobs[1]) == alone and logprobs[::2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("options", ({}, {"top_p": 0.9}, {"temperature": 0.0}), ids=str)
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_rows_without_a_distribution_are_named_and_harm_no_other(backend, value, options):
    logits = torch.randn(2, 3, 1700)
    if value == -torch.inf:
        logits[1, 2] = value
    else:
        logits[1, 2, 1690] = value
    uniforms = torch.rand(2, 3)
    if not waits_for_nothing(backend):
        with pytest.raises(
            ValueError, match=rf"logits .* finite maximum .*, got {value} at \[1, 2\]"
        ):
            sample_tokens(logits, uniforms, **options, backend=backend)
        return
    tokens, logprobs = sample_tokens(logits, uniforms, **options, backend=backend)
    assert (tokens == 1700).nonzero().tolist() == [[1, 2]]
    assert logprobs.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("uniforms", 1.0, r"uniforms must be in \[0, 1\), got 1.*at \[1\]"),
        ("uniforms", -0.25, r"uniforms must be in \[0, 1\), got -0.25 at \[1\]"),
        ("uniforms", math.nan, r"uniforms must be in \[0, 1\), got nan at \[1\]"),
        ("temperature", -0.5, r"temperature must be finite and >= 0, got -0.5 at \[1\]"),
        ("temperature", math.inf, r"temperature must be finite and >= 0, got inf at \[1\]"),
        ("temperature", math.nan, r"temperature must be finite and >= 0, got nan at \[1\]"),
    ],
)
def test_numbers_out_of_range_are_named(backend, name, bad, message):
    arguments = {"uniforms": torch.rand(3), "temperature": torch.ones(3)}
    arguments[name][1] = bad
    logits = torch.randn(3, 11)
    if waits_for_nothing(backend):
        tokens, logprobs = sample_tokens(logits, **arguments, backend=backend)
        assert (tokens == 11).tolist() == logprobs.isnan().tolist() == [False, True, False]
        return
    with pytest.raises(ValueError, match=message):
        sample_tokens(logits, **arguments, backend=backend)


@pytest.mark.parametrize("options", ({}, {"top_k": 40, "min_p": 0.01}), ids=str)
def test_masked_rows_are_not_looked_at(backend, options):
    logits, uniforms, temperature = torch.randn(2, 3, 1300), torch.rand(2, 3), torch.ones(2, 3)
    plain = sample_tokens(logits, uniforms, **options, backend=backend)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    logits[0, 1], uniforms[0, 1], temperature[0, 1] = torch.nan, torch.nan, -1.0
    logits[1, 0] = -torch.inf
    tokens, logprobs = sample_tokens(
        logits, uniforms, temperature=temperature, mask=mask, **options, backend=backend
    )
    assert torch.equal(tokens, plain.tokens.masked_fill(~mask, 0))
    assert torch.equal(logprobs, plain.logprobs.masked_fill(~mask, 0))


@pytest.mark.parametrize(
    "options", ({}, {"top_k": 300, "top_p": 0.8, "min_p": 1e-3}, {"temperature": 0.0}), ids=str
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_is_bitwise_the_same_wherever_it_stands(fused, dtype, options, set_threads):
    vocabulary = 2009 if emulates_a_gpu(fused) else 40009
    row, u = (4 * torch.randn(vocabulary)).to(dtype), torch.rand(())
    filler = torch.randn(9, vocabulary).to(dtype)
    seen = []
    for threads in thread_counts(fused):
        set_threads(threads)
        for before, after in (
            ((0, 0), (1, 0)) if emulates_a_gpu(fused) else ((0, 0), (1, 0), (6, 1))
        ):
            logits = torch.cat((filler[:before], row[None], filler[:after]))
            result = sample_tokens(logits, u.expand(len(logits)), **options, backend=fused)
            seen.append([x[before] for x in result])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_views_and_strided_numbers_give_what_their_copies_give(backend):
    base, uniforms = torch.randn(2, 3, 260), torch.rand(2, 2).t()
    for view in (
        base[:, :-1],
        base[:, 1:, 100:201],
        base[:, :2, ::2],
        base[:1, :2].expand(2, 2, -1),
    ):
        expected = sample_tokens(view.contiguous(), uniforms.contiguous(), backend=backend)
        result = sample_tokens(view, uniforms.double(), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("shape", ((0,), (3, 0), (), (2, 1, 3)))
def test_shapes(backend, shape):
    logits, uniforms = torch.randn(*shape, 7, dtype=torch.float64), torch.rand(shape)
    result = sample_tokens(logits.requires_grad_(), uniforms, backend=backend)
    assert [x.shape for x in result] == [shape, shape]
    assert not result.logprobs.requires_grad
    assert_drawn(result, logits.detach(), uniforms.double())


@pytest.mark.parametrize("options", ({}, {"top_p": 0.9}), ids=str)
def test_a_temperature_for_each_token(backend, options):
    logits, uniforms = 3 * torch.randn(2, 3, 1000), torch.rand(2, 3)
    temperature = torch.tensor([[0.5, 1.0, 2.0], [0.25, 0.0, 4.0]])
    result = sample_tokens(logits, uniforms, temperature=temperature, **options, backend=backend)
    for i in range(2):
        for j in range(3):
            alone = sample_tokens(
                logits[i, j],
                uniforms[i, j],
                temperature=temperature[i, j].item(),
                **options,
                backend=backend,
            )
            assert all(torch.equal(x[i, j], y) for x, y in zip(result, alone, strict=True))


def test_agrees_with_the_reference(fused):
    """Away from the sums' boundaries by more than rounding every backend draws the same token."""
    logits, uniforms = 2 * torch.randn(6, 1001), torch.rand(6, dtype=torch.float64)
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    apart = ((cumulative - uniforms[:, None]).abs() > SLACK).all(-1)
    assert apart.sum() > 3
    expected = sample_tokens(logits, uniforms, backend="reference")
    result = sample_tokens(logits, uniforms, backend=fused)
    assert torch.equal(result.tokens[apart], expected.tokens[apart])
    torch.testing.assert_close(result.logprobs[apart], expected.logprobs[apart])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(logits=torch.ones(3, 5).int()), TypeError, "logits must be float32.*int32"),
        (dict(uniforms=torch.rand(4)), ValueError, r"uniforms must have shape \(3,\).*\(4,\)"),
        (dict(uniforms=torch.rand(3).bfloat16()), TypeError, "uniforms must be.*got.*bfloat16"),
        (dict(uniforms=0.5), TypeError, "uniforms must be a tensor, got float"),
        (dict(temperature=-1.0), ValueError, "temperature must be >= 0, got -1"),
        (dict(temperature=math.inf), ValueError, "temperature must be finite, got inf"),
        (dict(temperature=torch.ones(2)), ValueError, r"temperature must have shape \(3,\)"),
        (dict(top_k=0), ValueError, "top_k must be >= 1, got 0"),
        (dict(top_k=2.5), TypeError, "top_k must be a whole number, got 2.5"),
        (dict(top_p=1.5), ValueError, "top_p must be <= 1, got 1.5"),
        (dict(top_p=-0.1), ValueError, "top_p must be >= 0, got -0.1"),
        (dict(min_p=math.nan), ValueError, "min_p must be finite, got nan"),
        (dict(min_p=2), ValueError, "min_p must be <= 1, got 2"),
        (dict(mask=torch.ones(3)), TypeError, "mask must be a bool tensor"),
        (dict(mask=torch.ones(4).bool()), ValueError, r"mask must have shape \(3,\)"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(backend, arguments, error, message):
    good = dict(logits=torch.randn(3, 5), uniforms=torch.rand(3), backend=backend)
    with pytest.raises(error, match=message):
        sample_tokens(**good | on_default_device(arguments))
