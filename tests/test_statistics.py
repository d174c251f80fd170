"""token_statistics; numerics contract: DESIGN §5."""

import math

import pytest
import torch

from ppo_kernels import (
    TokenStatistics,
    check_logprobs,
    token_logprobs_and_entropy,
    token_statistics,
)
from tests.conftest import (
    DTYPES,
    assert_as_exact_as_eager,
    awkward_rows,
    emulates_a_gpu,
    likeliest,
    log_softmax_truth,
    on_default_device,
    softmax_truth,
    thread_counts,
    waits_for_nothing,
)

VOCABULARIES = (1, 2, 7, 1031, 16385, 50257)


def truth_of(logits, tokens, temperature=1.0):
    """In fp64, from the definitions."""
    tau = temperature[..., None].double() if isinstance(temperature, torch.Tensor) else temperature
    logprobs, entropy, *_ = softmax_truth(logits, tokens, tau)
    log_p = log_softmax_truth(logits, tau)
    p = log_p.exp()
    surprise = log_p.masked_fill(p == 0, 0) + entropy[..., None]
    chosen = logits.gather(-1, tokens.long()[..., None])
    return {
        "logprobs": logprobs,
        "entropy": entropy,
        "max_prob": p.max(-1).values,
        "sum_sq_probs": (p**2).sum(-1),
        "top1": (logits <= chosen).all(-1),
        "varentropy": (p * surprise**2).sum(-1),
    }


def eager(logits, tokens, temperature=1.0):
    """What people write, in fp32 (fp64 for fp64)."""
    z = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    log_p = torch.log_softmax(z, -1)
    p, finite = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0)
    entropy = -(p * finite).sum(-1)
    return {
        "logprobs": log_p.gather(-1, tokens[..., None])[..., 0],
        "entropy": entropy,
        "max_prob": p.amax(-1),
        "sum_sq_probs": p.square().sum(-1),
        "varentropy": (p * (finite + entropy[..., None]).square()).sum(-1),
    }


def assert_exact(result, plain, truth):
    """Each is as exact as eager's, give or take 32 roundings (of fp64 more): of 1 nat, of the
    largest probability, or of the second moment about the maximum, of which the varentropy is what
    the square of the first leaves; the maximum's own exponent is rounded too."""
    about_maximum = (truth["entropy"] + truth["max_prob"].log()).square() + truth["varentropy"]
    scales = {
        "logprobs": 1.0,
        "entropy": 1.0,
        "max_prob": 0.0,
        "sum_sq_probs": 0.0,
        "varentropy": about_maximum.max().item() + 1e-9,
    }
    for name, scale in scales.items():
        assert_as_exact_as_eager(getattr(result, name), plain[name], truth[name], scale=scale)
    assert torch.equal(result.top1, truth["top1"])


def test_matches_a_hand_computed_row(backend):
    logits = torch.tensor([[0.0, math.log(3.0), math.log(4.0)]] * 2, dtype=torch.float64)
    result = token_statistics(logits, torch.tensor([1, 2]), backend=backend)
    p, (a, b, c) = (1 / 8, 3 / 8, 1 / 2), (math.log(x) for x in (1 / 8, 3 / 8, 1 / 2))
    entropy = -(p[0] * a + p[1] * b + p[2] * c)
    squares = p[0] * a**2 + p[1] * b**2 + p[2] * c**2
    assert result.logprobs.tolist() == pytest.approx([b, c], abs=1e-14)
    assert result.entropy.tolist() == pytest.approx([entropy] * 2, abs=1e-14)
    assert result.max_prob.tolist() == pytest.approx([1 / 2] * 2, abs=1e-14)
    assert result.sum_sq_probs.tolist() == pytest.approx([26 / 64] * 2, abs=1e-14)
    assert result.varentropy.tolist() == pytest.approx([squares - entropy**2] * 2, abs=1e-14)
    assert result.top1.tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_as_exact_as_eager(backend, vocabulary, dtype):
    rows = 2 if vocabulary > 10000 or emulates_a_gpu(backend) else 40
    logits = (3 * torch.randn(rows, vocabulary)).to(dtype)
    tokens = torch.randint(vocabulary, (rows,))
    tokens[0] = likeliest(logits)[0]
    result = token_statistics(logits, tokens, temperature=0.8, backend=backend)
    assert_exact(result, eager(logits, tokens, 0.8), truth_of(logits, tokens, 0.8))
    assert {x.dtype for x in (*result[:4], result.varentropy)} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (130, 20001))
def test_awkward_rows(backend, vocabulary, dtype):
    logits = awkward_rows(2600 if vocabulary > 2600 and emulates_a_gpu(backend) else vocabulary)
    logits = logits.to(dtype)
    tokens = likeliest(logits)
    results = token_statistics(logits, tokens, backend=backend)
    for i in range(len(logits)):
        row = logits[i : i + 1], tokens[i : i + 1]
        result = TokenStatistics(*(x[i : i + 1] for x in results))
        assert_exact(result, eager(*row), truth_of(*row))


def test_equal_logits_vary_in_nothing(backend):
    """Exactly: with a common probability there is no rounding to be had."""
    logits = torch.full((2, 4096), -3.3)
    logits[1, ::2] = -torch.inf
    result = token_statistics(logits, torch.ones(2).long(), backend=backend)
    assert result.varentropy[0] == result.varentropy[1] == 0 or backend == "reference"
    assert result.sum_sq_probs.tolist() == pytest.approx([2**-12, 2**-11], rel=1e-5)


def test_a_constant_added_to_logits_changes_nothing(backend):
    logits, tokens = 3 * torch.randn(2, 20000), torch.randint(20000, (2,))
    # Representable exactly with and without the constant.
    logits = (logits + 1e4) - 1e4
    plain = token_statistics(logits, tokens, backend=backend)
    shifted = token_statistics(logits + 1e4, tokens, backend=backend)
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(b.double(), a.double(), atol=1e-3, rtol=0)


def test_ties_of_the_largest_logit_are_hits_and_its_neighbour_is_none(backend):
    """The neighbour in fp32 is below the maximum, though not by a rounding of its exponent."""
    logits = torch.randn(4, 20000)
    logits[:, [7, 19999]] = 1000.0
    logits[:, 11] = torch.nextafter(torch.tensor(1000.0), torch.tensor(0.0))
    result = token_statistics(
        logits, torch.tensor([7, 19999, 11, 0]), temperature=1.7, backend=backend
    )
    assert result.top1.tolist() == [True, True, False, False]


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_rows_without_a_distribution_are_nan_and_harm_no_other(backend, value):
    """A row of -inf throughout, or one with a NaN or +inf, be it the token's own logit."""
    logits = torch.randn(3, 17000)
    if value == -torch.inf:
        logits[1] = value
    else:
        logits[1, 16900] = value
    tokens = likeliest(logits)
    tokens[1] = 16900
    result = token_statistics(logits, tokens, backend=backend)
    for x in (*result[:4], result.varentropy):
        assert x.isnan().tolist() == [False, True, False]
    assert result.top1.tolist() == [True, False, True]


def test_sampled_token_of_minus_infinity(backend):
    logits = torch.randn(2, 17000)
    logits[:, 17] = -torch.inf
    tokens = torch.tensor([17, 4])
    result = token_statistics(logits, tokens, backend=backend)
    assert result.logprobs[0] == -torch.inf and not result.top1[0]
    truth = truth_of(logits, tokens)
    for name in ("entropy", "max_prob", "sum_sq_probs", "varentropy"):
        torch.testing.assert_close(getattr(result, name).double(), truth[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("vocabulary", (130, 4104, 20001))
def test_bits_of_the_log_probabilities_are_those_of_the_other_op(backend, vocabulary, dtype):
    logits = torch.cat([awkward_rows(vocabulary), 4 * torch.randn(3, vocabulary)]).to(dtype)
    if emulates_a_gpu(backend):
        logits = logits[::3]
    tokens = torch.randint(vocabulary, (len(logits),))
    expected = token_logprobs_and_entropy(logits, tokens, temperature=0.7, backend=backend)
    result = token_statistics(logits, tokens, temperature=0.7, backend=backend)
    for x, y in zip(result, expected, strict=False):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_is_bitwise_the_same_wherever_it_stands(fused, dtype, set_threads):
    """One row is split over threads, many are not: the chunks merge in the same order."""
    row, token = (4 * torch.randn(20009)).to(dtype), 12345
    filler = torch.randn(20, 20009).to(dtype)
    seen = []
    for threads in thread_counts(fused):
        set_threads(threads)
        for before, after in ((0, 0), (1, 0), (6, 1)):
            logits = torch.cat((filler[:before], row[None], filler[:after]))
            result = token_statistics(logits, torch.full((len(logits),), token), backend=fused)
            seen.append([x[before] for x in result])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_views_and_strided_tokens_give_what_their_copies_give(backend):
    base, tokens = torch.randn(2, 3, 260), torch.randint(260, (2, 2)).t()
    for view in (
        base[:, :-1],
        base[:, 1:, 100:201],
        base[:, :2, ::2],
        base[:1, :2].expand(2, 2, -1),
    ):
        ids = tokens % view.shape[-1]
        expected = token_statistics(view.contiguous(), ids.contiguous(), backend=backend)
        result = token_statistics(view, ids.int(), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.parametrize("shape", ((0,), (3, 0), (), (2, 1, 3)))
def test_shapes(backend, shape):
    logits, tokens = torch.randn(*shape, 7, dtype=torch.float64), torch.randint(7, shape)
    result = token_statistics(logits.requires_grad_(), tokens, backend=backend)
    truth = truth_of(logits.detach(), tokens)
    for x, y in zip(result, truth.values(), strict=True):
        assert not x.requires_grad
        torch.testing.assert_close(x, y, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_a_temperature_for_each_token(backend, dtype):
    logits, tokens = 3 * torch.randn(3, 2, 1000), torch.randint(1000, (2, 3)).t()
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    temperature = torch.tensor([[0.5, 1.0, 2.0], [0.25, 1.5, 4.0]]).to(dtype).t()
    result = token_statistics(
        logits, tokens, temperature=temperature.requires_grad_(), backend=backend
    )
    plain = eager(logits, tokens, temperature.detach()[..., None].to(logits.dtype))
    assert_exact(result, plain, truth_of(logits, tokens, temperature.detach()))
    assert not any(x.requires_grad for x in result)
    for i in range(3):
        for j in range(2):
            alone = token_statistics(
                logits[i, j], tokens[i, j], temperature=temperature[i, j].item(), backend=backend
            )
            assert all(torch.equal(x[i, j], y) for x, y in zip(result, alone, strict=True))


@pytest.mark.parametrize("bad", (0.0, -1.0, math.nan, math.inf))
def test_bad_temperatures_of_tokens_are_named(backend, bad):
    if waits_for_nothing(backend):
        pytest.skip("nothing is looked at on a GPU")
    temperature = torch.ones(2, 3)
    temperature[1, 2] = bad
    with pytest.raises(
        ValueError, match=rf"temperature must be finite and > 0, got {bad:g}.* at \[1, 2\]"
    ):
        token_statistics(
            torch.randn(2, 3, 5),
            torch.zeros(2, 3).long(),
            temperature=temperature,
            backend=backend,
        )


@pytest.mark.parametrize("bad", (-1, 11))
def test_ids_out_of_range_are_named(backend, bad):
    logits, tokens = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.int64)
    tokens[1, 2] = bad
    if waits_for_nothing(backend):
        result = token_statistics(logits, tokens, backend=backend)
        with pytest.raises(ValueError, match=rf"got nan for token {bad} at \[1, 2\]"):
            check_logprobs(result.logprobs, tokens)
        assert result.logprobs.isnan().sum() == 1 and not result.top1[1, 2]
        assert result.varentropy.isfinite().all()
        return
    with pytest.raises(ValueError, match=rf"tokens must be in \[0, 11\), got {bad} at \[1, 2\]"):
        token_statistics(logits, tokens, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(logits=torch.ones(3, 5).int()), TypeError, "logits must be float32.*int32"),
        (dict(tokens=torch.ones(4).long()), ValueError, r"tokens must have shape \(3,\).*\(4,\)"),
        (dict(temperature=0.0), ValueError, "temperature must be > 0, got 0"),
        (dict(temperature="1"), TypeError, "temperature must be a Python number, got str"),
        (dict(temperature=torch.ones(3).int()), TypeError, "temperature must be float32.*int32"),
        (
            dict(temperature=torch.ones(1)),
            ValueError,
            r"temperature must have shape \(3,\) to match tokens, got \(1,\)",
        ),
        (
            dict(temperature=torch.ones(3, device="meta")),
            ValueError,
            "temperature must be on .*got meta",
        ),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(backend, arguments, error, message):
    good = dict(logits=torch.randn(3, 5), tokens=torch.tensor([0, 1, 4]), backend=backend)
    with pytest.raises(error, match=message):
        token_statistics(**good | on_default_device(arguments))


@pytest.mark.parametrize("op", (token_statistics, token_logprobs_and_entropy))
def test_outliers_after_the_first_elements_are_no_nan(op):
    """However far above them: 2^t far beyond its range is anything, NaN too."""
    logits, tokens = torch.randn(400, 600), torch.full((400,), 599)
    logits[:, 599] = torch.logspace(0.5, 5, 400)
    logprobs, entropy, *_ = op(logits, tokens, temperature=0.7)
    truth = softmax_truth(logits, tokens, 0.7)
    torch.testing.assert_close(logprobs.double(), truth[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), truth[1], atol=1e-5, rtol=1e-5)
