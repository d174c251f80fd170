"""token_logprobs and token_logprobs_and_entropy; numerics contract: DESIGN §5."""

import math

import pytest
import torch
from torch.distributions import Categorical

from ppo_kernels import check_logprobs, ppo_loss, token_logprobs, token_logprobs_and_entropy
from tests.conftest import (
    DTYPES,
    assert_as_exact_as_eager,
    awkward_rows,
    emulates_a_gpu,
    likeliest,
    on_default_device,
    skip_if_emulated,
    softmax_truth,
    thread_counts,
    waits_for_nothing,
)

VOCABULARIES = (1, 2, 7, 1031, 4096, 16384, 16385, 50257, 151936, 262144)


def eager(logits, tokens, temperature):
    """What people write, in fp32 (fp64 for fp64)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(z / temperature, -1)
    p_log_p = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)
    return log_p.gather(-1, tokens[..., None])[..., 0], -p_log_p.sum(-1)


def gradients(function, logits, upstream, upstream_entropy):
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = function(leaf)
    (logprobs * upstream + entropy * upstream_entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


def test_matches_a_hand_computed_row(backend):
    logits = torch.tensor([[math.log(1.0), math.log(3.0), math.log(4.0)]], dtype=torch.float64)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([1]), backend=backend)
    assert logprobs.item() == pytest.approx(math.log(3 / 8), abs=1e-14)
    by_hand = -(1 / 8 * math.log(1 / 8) + 3 / 8 * math.log(3 / 8) + 1 / 2 * math.log(1 / 2))
    assert entropy.item() == pytest.approx(by_hand, abs=1e-14)


def test_matches_torch_distributions(backend):
    logits, tokens = torch.randn(5, 3, 83, dtype=torch.float64), torch.randint(83, (5, 3))
    logprobs, entropy = token_logprobs_and_entropy(logits, tokens, temperature=0.7, backend=backend)
    oracle = Categorical(logits=logits / 0.7)
    torch.testing.assert_close(logprobs, oracle.log_prob(tokens), atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, oracle.entropy(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_as_exact_as_eager(backend, vocabulary, dtype):
    rows = 2 if vocabulary > 10000 or emulates_a_gpu(backend) else 40
    logits = (3 * torch.randn(rows, vocabulary)).to(dtype)
    tokens = torch.randint(vocabulary, (rows,))
    upstream, upstream_entropy = torch.randn(2, rows)
    result = gradients(
        lambda z: token_logprobs_and_entropy(z, tokens, temperature=0.8, backend=backend),
        logits,
        upstream,
        upstream_entropy,
    )
    plain = gradients(lambda z: eager(z, tokens, 0.8), logits, upstream, upstream_entropy)
    logprobs, entropy, grad_logprobs, grad_entropy = softmax_truth(logits, tokens, 0.8)
    grad = upstream[:, None] * grad_logprobs + upstream_entropy[:, None] * grad_entropy
    for ours, theirs, truth in zip(result, plain, (logprobs, entropy, grad), strict=True):
        assert_as_exact_as_eager(ours, theirs, truth)
    assert result[2].dtype == dtype
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert result[0].dtype == result[1].dtype == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (130, 40000))
def test_awkward_rows(backend, vocabulary, dtype):
    for row in awkward_rows(vocabulary).to(dtype):
        logits, tokens = row[None], likeliest(row[None])
        result = gradients(
            lambda z, t=tokens: token_logprobs_and_entropy(z, t, backend=backend), logits, 1.0, -0.5
        )
        plain = gradients(lambda z, t=tokens: eager(z, t, 1.0), logits, 1.0, -0.5)
        logprobs, entropy, grad_logprobs, grad_entropy = softmax_truth(logits, tokens, 1.0)
        for ours, theirs, truth in zip(
            result, plain, (logprobs, entropy, grad_logprobs - 0.5 * grad_entropy), strict=True
        ):
            assert_as_exact_as_eager(ours, theirs, truth)
        assert (result[2][logits == -torch.inf] == 0).all()


@pytest.mark.parametrize("vocabulary", (130, 40000))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_filled_with_the_lowest_number_count_as_excluded(backend, vocabulary, dtype):
    """Masks of `torch.finfo(dtype).min` are as common as those of -inf."""
    logits = torch.randn(2, vocabulary).to(dtype)
    tokens = torch.full((2,), vocabulary - 1)
    excluded = (torch.arange(vocabulary) < vocabulary - 40).expand(2, -1)
    leaves = []
    for fill in (-torch.inf, torch.finfo(dtype).min):
        leaf = logits.masked_fill(excluded, fill).requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(leaf, tokens, backend=backend)
        (logprobs + entropy).sum().backward()
        leaves.append((logprobs.detach(), entropy.detach(), leaf.grad))
    for with_inf, with_lowest in zip(*leaves, strict=True):
        assert with_inf.isfinite().all()
        torch.testing.assert_close(with_lowest, with_inf, atol=0, rtol=1e-6)


def test_a_constant_added_to_logits_changes_nothing(backend):
    logits, tokens = 3 * torch.randn(8, 40000), torch.randint(40000, (8,))
    # Representable exactly with and without the constant.
    logits = (logits + 1e4) - 1e4
    plain = token_logprobs_and_entropy(logits, tokens, backend=backend)
    shifted = token_logprobs_and_entropy(logits + 1e4, tokens, backend=backend)
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=0)


def test_sampled_token_of_minus_infinity(backend):
    logits = torch.randn(3, 40000)
    logits[1, 17] = -torch.inf
    logits.requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(
        logits, torch.tensor([4, 17, 9]), backend=backend
    )
    assert logprobs[1] == -torch.inf
    assert logprobs[[0, 2]].isfinite().all()
    assert entropy.isfinite().all()
    (logprobs.exp().sum() + entropy.sum()).backward()
    assert logits.grad[[0, 2]].isfinite().all()


def test_row_without_any_probability_is_nan_and_harms_no_other(backend):
    logits = torch.randn(3, 40000)
    logits[1] = -torch.inf
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.zeros(3).long(), backend=backend)
    assert logprobs[1].isnan()
    assert entropy[1].isnan()
    assert logprobs[[0, 2]].isfinite().all()
    assert entropy[[0, 2]].isfinite().all()


@pytest.mark.parametrize("position", (0, 70, 4999))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_nan_and_plus_infinity_are_not_hidden(backend, value, position):
    logits = torch.randn(2, 40000)
    logits[0, position] = value
    logprobs, _ = token_logprobs_and_entropy(logits, torch.tensor([3, 3]), backend=backend)
    assert logprobs[0].isnan()
    assert logprobs[1].isfinite()


def test_nan_among_excluded_logits_is_not_hidden(backend):
    """The rest of its chunk of the row is -inf, another chunk is ordinary."""
    logits = torch.randn(2, 40000)
    logits[0, :16384] = -torch.inf
    logits[0, 10] = torch.nan
    logprobs, entropy = token_logprobs_and_entropy(
        logits, torch.tensor([39998, 39998]), backend=backend
    )
    assert logprobs[0].isnan()
    assert entropy[0].isnan()
    assert logprobs[1].isfinite()


@pytest.mark.parametrize("shape", ((0,), (1,), (3, 0), (65537,), ()))
def test_row_counts(backend, shape):
    if shape == (65537,):
        skip_if_emulated(backend)
    logits = torch.randn(*shape, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, shape)
    logprobs, entropy = token_logprobs_and_entropy(logits, tokens, backend=backend)
    (logprobs + entropy).sum().backward()
    truth = softmax_truth(logits.detach(), tokens, 1.0)
    for ours, true in zip(
        (logprobs, entropy, logits.grad), (*truth[:2], truth[2] + truth[3]), strict=True
    ):
        torch.testing.assert_close(ours.detach(), true, atol=1e-13, rtol=0)


def _views():
    base = torch.randn(3, 5, 1200)
    return {
        "all but the last position": base[:, :-1],
        "last positions": base[:, -3:],
        "every other row": base[::2, 1::2],
        "transposed": base.transpose(0, 1),
        "part of the vocabulary": base[..., 100:1100],
        "expanded": base[:1, :2].expand(3, 2, 1200),
        "stride of the vocabulary is 2": base[..., ::2],
        "vocabulary first": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


@pytest.mark.parametrize("view", _views())
def test_views_give_what_their_copies_give(backend, view):
    logits = _views()[view]
    tokens = torch.randint(logits.shape[-1], logits.shape[:-1])
    results = []
    for z in (logits.detach().clone(memory_format=torch.contiguous_format), logits.detach()):
        z.requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(z, tokens, backend=backend)
        (grad,) = torch.autograd.grad((logprobs * 2 + entropy).sum(), z)
        results.append((logprobs, entropy, grad))
    for copied, viewed in zip(*results, strict=True):
        assert torch.equal(viewed, copied)


def test_strided_tokens_and_int32(backend):
    logits, tokens = torch.randn(4, 6, 11), torch.randint(11, (6, 4))
    expected = token_logprobs(logits, tokens.t().contiguous(), backend=backend)
    assert torch.equal(token_logprobs(logits, tokens.t(), backend=backend), expected)
    assert torch.equal(token_logprobs(logits, tokens.t().int(), backend=backend), expected)


def test_row_views_are_read_in_place(fused):
    """A copy of the view would show in the profiler as memory of the size of the logits."""
    logits = torch.randn(4, 3, 40000)[:, :-1]
    tokens = torch.randint(5000, (4, 2))
    with torch.profiler.profile(profile_memory=True) as profile:
        token_logprobs(logits, tokens, backend=fused)
    allocated = sum(
        max(0, event.self_cpu_memory_usage) + max(0, event.self_device_memory_usage)
        for event in profile.events()
    )
    assert allocated < logits.numel()


@pytest.mark.parametrize("used", ("logprobs", "entropy"))
def test_stride_0_upstream_and_one_output_used(backend, used):
    logits, tokens = torch.randn(4, 3, 600, dtype=torch.float64), torch.randint(600, (4, 3))
    logits.requires_grad_()
    output = getattr(token_logprobs_and_entropy(logits, tokens, backend=backend), used)
    (grad,) = torch.autograd.grad(output, logits, torch.tensor(2.5).double().expand(4, 3))
    truth = softmax_truth(logits.detach(), tokens, 1.0)[2 if used == "logprobs" else 3]
    torch.testing.assert_close(grad, 2.5 * truth, atol=1e-13, rtol=0)


def test_repeats_bitwise(backend):
    logits = torch.randn(6, 40001).bfloat16()
    tokens = torch.randint(40001, (6,))
    first, second = (
        gradients(
            lambda z: token_logprobs_and_entropy(z, tokens, backend=backend), logits, 1.0, 0.1
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_is_bitwise_the_same_wherever_it_stands(fused, dtype, set_threads):
    """One row is split over threads, many are not: the chunks merge in the same order."""
    row, token = (4 * torch.randn(40009)).to(dtype), 12345
    filler = torch.randn(40, 40009).to(dtype)
    seen = []
    for threads in thread_counts(fused):
        set_threads(threads)
        for before, after in ((0, 0), (1, 0), (0, 2), (17, 5), (3, 37)):
            logits = torch.cat((filler[:before], row[None], filler[:after]))
            tokens = torch.full((len(logits),), token)
            result = gradients(
                lambda z, t=tokens: token_logprobs_and_entropy(z, t, backend=fused),
                logits,
                1.0,
                0.1,
            )
            seen.append([x[before] for x in result])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(("vocabulary", "stride"), ((512, 513), (1024, 1028), (509, 509)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_row_of_a_view_is_bitwise_the_same_alone(fused, dtype, vocabulary, stride):
    """However its rows are aligned."""
    logits = (4 * torch.randn(5, stride)).to(dtype)[:, :vocabulary]
    tokens = torch.full((5,), 123)
    batch = token_logprobs_and_entropy(logits, tokens, backend=fused)
    for i in range(5):
        for row in (logits[i : i + 1], logits[i : i + 1].clone()):
            alone = token_logprobs_and_entropy(row, tokens[:1], backend=fused)
            assert all(torch.equal(x[i], y[0]) for x, y in zip(batch, alone, strict=True))


@pytest.mark.parametrize("bad", (-1, 11, 2**40))
def test_ids_out_of_range_are_named(backend, bad):
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    tokens[1, 2] = bad
    logits = torch.randn(2, 3, 11)
    if waits_for_nothing(backend):
        leaf = logits.requires_grad_()
        logprobs = token_logprobs(leaf, tokens, backend=backend)
        logprobs.sum().backward()
        assert leaf.grad[1, 2].isnan().all()
        assert leaf.grad.isfinite().all(-1).flatten().tolist() == [True] * 5 + [False]
        assert logprobs.isfinite().flatten().tolist() == [True] * 5 + [False]
        assert logprobs[1, 2].isnan()
        with pytest.raises(ValueError, match=rf"got nan for token {bad} at \[1, 2\]"):
            check_logprobs(logprobs.detach(), tokens)
        return
    with pytest.raises(ValueError, match=rf"tokens must be in \[0, 11\), got {bad} at \[1, 2\]"):
        token_logprobs(logits, tokens, backend=backend)


def test_gradcheck(backend):
    logits = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 1))
    for function in (token_logprobs, token_logprobs_and_entropy):
        assert torch.autograd.gradcheck(
            lambda z, f=function: f(z, tokens, temperature=1.3, backend=backend), logits
        )


def test_second_derivative_is_refused(fused):
    logits = torch.randn(2, 5, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([1, 2]), backend=fused)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(logprobs.sum(), logits, create_graph=True)


@pytest.mark.parametrize("function", (token_logprobs, token_logprobs_and_entropy))
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(logits=[1.0]), TypeError, "logits must be a tensor, got list"),
        (dict(logits=torch.ones(3, 5).int()), TypeError, "logits must be float32.*int32"),
        (dict(logits=torch.ones(())), ValueError, r"logits must have shape \(..., V\)"),
        (dict(logits=torch.ones(3, 0)), ValueError, r"V >= 1, got \(3, 0\)"),
        (dict(tokens=torch.ones(3)), TypeError, "tokens must be an int64 or int32.*float32"),
        (dict(tokens=torch.ones(4).long()), ValueError, r"tokens must have shape \(3,\).*\(4,\)"),
        (
            dict(tokens=torch.ones(3, device="meta").long()),
            ValueError,
            "tokens must be on .*got meta",
        ),
        (dict(temperature=0.0), ValueError, "temperature must be > 0, got 0"),
        (dict(temperature=-1.0), ValueError, "temperature must be > 0, got -1"),
        (dict(temperature=math.nan), ValueError, "temperature must be finite, got nan"),
        (dict(temperature=math.inf), ValueError, "temperature must be finite, got inf"),
        (dict(temperature="1"), TypeError, "temperature must be a Python number, got str"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(backend, function, arguments, error, message):
    good = dict(logits=torch.randn(3, 5), tokens=torch.tensor([0, 1, 4]), backend=backend)
    with pytest.raises(error, match=message):
        function(**good | on_default_device(arguments))


@pytest.mark.parametrize("vocabulary", (1031, 50257))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_element_of_the_gradient_is_exact(backend, vocabulary, dtype):
    """Relative to the element itself: most are millions of times smaller than the token's own."""
    logits = (3 * torch.randn(4, vocabulary)).to(dtype).requires_grad_()
    tokens = torch.randint(vocabulary, (4,))
    g, h = torch.randn(2, 4)
    logprobs, entropy = token_logprobs_and_entropy(logits, tokens, temperature=0.7, backend=backend)
    (g * logprobs + h * entropy).sum().backward()
    *_, grad_logprobs, grad_entropy = softmax_truth(logits.detach(), tokens, 0.7)
    truth = g[:, None].double() * grad_logprobs + h[:, None].double() * grad_entropy
    # The two terms may cancel: an element is as exact as the larger of them.
    size = (g[:, None] * grad_logprobs).abs() + (h[:, None] * grad_entropy).abs()
    size += (h[:, None] * grad_logprobs).abs()
    # Eager adds up a row in eight chains on AVX2: up to 184 roundings were measured there.
    roundings = 256 if backend == "reference" else 64
    unit = max(torch.finfo(dtype).eps, roundings * torch.finfo(torch.float32).eps)
    if dtype == torch.float64:
        unit = 1e-12
    tiny = torch.finfo(dtype).tiny if dtype != torch.float16 else 2.0**-24
    assert ((logits.grad.double() - truth).abs() <= unit * size + tiny).all()


def test_offsets_beyond_two_billion_elements(backend):
    """Rows after element 2**31 of bf16 logits whose other rows are masked out and never touched."""
    if backend == "reference":
        pytest.skip("reference makes fp32 copies of all rows, 8 GiB each")
    skip_if_emulated(backend)
    torch.use_deterministic_algorithms(False)  # or every page would be filled with NaN
    vocabulary, rows = 151_936, 14_140
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    logits[-2:] = torch.randn(2, vocabulary).bfloat16()
    tokens = torch.randint(vocabulary, (rows,))
    mask = torch.arange(rows) >= rows - 2
    expected = token_logprobs(logits[-2:].clone(), tokens[-2:], backend=backend)
    zeros = torch.zeros(rows)
    result = ppo_loss(logits, tokens, zeros, zeros, mask, backend=backend)
    assert torch.equal(result.logprobs[-2:], expected)
    assert (result.logprobs[:-2] == 0).all()
