"""kl_divergence (exact) and kl_estimate (from samples)."""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions.kl import kl_divergence as kl_of_distributions

from ppo_kernels import kl_divergence, kl_estimate
from tests.conftest import (
    DTYPES,
    assert_as_exact_as_eager,
    awkward_rows,
    emulates_a_gpu,
    log_softmax_truth,
    on_default_device,
    skip_if_emulated,
    thread_counts,
)


def eager(logits, ref_logits, temperature):
    z, ref = (x if x.dtype == torch.float64 else x.float() for x in (logits, ref_logits))
    log_p, log_q = torch.log_softmax(z / temperature, -1), torch.log_softmax(ref / temperature, -1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


def truth_of(logits, ref_logits, temperature):
    """KL (...) and its derivative in the logits (..., V), in fp64."""
    log_p = log_softmax_truth(logits, temperature)
    log_q = log_softmax_truth(ref_logits, temperature)
    p = log_p.exp()
    log_ratio = (log_p - log_q).masked_fill(p == 0, 0)
    kl = (p * log_ratio).sum(-1)
    return kl, p * (log_ratio - kl[..., None]) / temperature


def value_and_gradient(function, logits, upstream=1.0):
    leaf = logits.detach().clone().requires_grad_()
    kl = function(leaf)
    (kl * upstream).sum().backward()
    return kl.detach(), leaf.grad


def test_matches_a_hand_computed_row(backend):
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.25, 0.5]]).double()
    kl = kl_divergence(p.log() + 3, q.log() - 1, backend=backend)
    assert kl.item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-14)


def test_matches_torch_distributions(backend):
    logits, ref_logits = torch.randn(2, 4, 3, 300, dtype=torch.float64)
    expected = kl_of_distributions(
        Categorical(logits=logits / 1.7), Categorical(logits=ref_logits / 1.7)
    )
    kl = kl_divergence(logits, ref_logits, temperature=1.7, backend=backend)
    torch.testing.assert_close(kl, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (1, 2, 7, 1031, 4096, 16384, 16385, 50257, 151936, 262144))
def test_as_exact_as_eager(backend, vocabulary, dtype):
    rows = 2 if vocabulary > 10000 or emulates_a_gpu(backend) else 20
    logits, ref_logits = (2 * torch.randn(2, rows, vocabulary)).to(dtype)
    upstream = torch.randn(rows)
    result = value_and_gradient(
        lambda z: kl_divergence(z, ref_logits, temperature=0.8, backend=backend), logits, upstream
    )
    plain = value_and_gradient(lambda z: eager(z, ref_logits, 0.8), logits, upstream)
    kl, grad = truth_of(logits, ref_logits, 0.8)
    for ours, theirs, truth in zip(result, plain, (kl, grad * upstream[:, None]), strict=True):
        assert_as_exact_as_eager(ours, theirs, truth)
    assert result[1].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", (130, 40000))
def test_awkward_rows(backend, vocabulary, dtype):
    """Each against an ordinary reference, and each as the reference of an ordinary row."""
    rows = awkward_rows(vocabulary).to(dtype)
    for row in rows:
        for logits, ref_logits in ((row[None], rows[:1]), (rows[:1], row[None])):
            if not truth_of(logits, ref_logits, 1.0)[0].isfinite():
                continue
            result = value_and_gradient(
                lambda z, ref=ref_logits: kl_divergence(z, ref, backend=backend), logits
            )
            plain = value_and_gradient(lambda z, ref=ref_logits: eager(z, ref, 1.0), logits)
            truth = truth_of(logits, ref_logits, 1.0)
            for ours, theirs, true in zip(result, plain, truth, strict=True):
                # Gradients are differences of numbers as large as the divergence.
                assert_as_exact_as_eager(ours, theirs, true, scale=20 + truth[0].item(), slack=4)
            assert (result[1][logits == -torch.inf] == 0).all()


@pytest.mark.parametrize("vocabulary", (130, 40000))
def test_both_exclude_the_same_tokens(backend, vocabulary):
    excluded = torch.arange(vocabulary) < vocabulary - 40
    logits, ref_logits = torch.randn(2, 3, vocabulary).masked_fill(excluded, -torch.inf)
    kl, grad = value_and_gradient(lambda z: kl_divergence(z, ref_logits, backend=backend), logits)
    truth = truth_of(logits[:, -40:], ref_logits[:, -40:], 1.0)
    torch.testing.assert_close(kl.double(), truth[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(grad[:, -40:].double(), truth[1], atol=1e-6, rtol=0)
    assert (grad[:, :-40] == 0).all()


@pytest.mark.parametrize("vocabulary", (130, 40000))
def test_lowest_number_in_both_counts_as_excluded(backend, vocabulary):
    excluded = torch.arange(vocabulary) < vocabulary - 40
    logits, ref_logits = torch.randn(2, 3, vocabulary)
    results = [
        value_and_gradient(
            lambda z, f=fill: kl_divergence(
                z, ref_logits.masked_fill(excluded, f), backend=backend
            ),
            logits.masked_fill(excluded, fill),
        )
        for fill in (-torch.inf, torch.finfo(torch.float32).min)
    ]
    for with_inf, with_lowest in zip(*results, strict=True):
        torch.testing.assert_close(with_lowest, with_inf, atol=1e-6, rtol=0)


@pytest.mark.parametrize("position", (3, 25000))
def test_infinite_where_the_reference_excludes_what_the_policy_allows(backend, position):
    logits, ref_logits = torch.randn(2, 3, 40000)
    ref_logits[1, position] = -torch.inf
    kl = kl_divergence(logits, ref_logits, backend=backend)
    assert kl[1] == torch.inf
    assert kl[[0, 2]].isfinite().all()


@pytest.mark.parametrize("position", (3, 25000))
def test_reference_may_exclude_what_has_probability_zero(backend, position):
    """Whether the policy's logit there is -inf or only too low for a probability."""
    logits, ref_logits = torch.randn(2, 2, 40000)
    logits[:, position] = torch.tensor([-torch.inf, -1e4])
    ref_logits[:, position] = -torch.inf
    kl = kl_divergence(logits, ref_logits, backend=backend)
    kept = torch.arange(40000) != position
    truth = truth_of(logits[:, kept], ref_logits[:, kept], 1.0)[0]
    torch.testing.assert_close(kl.double(), truth, atol=1e-5, rtol=0)


def test_a_constant_added_to_logits_changes_nothing(backend):
    logits, ref_logits = (2 * torch.randn(2, 8, 40000) + 1e4) - 1e4
    plain = kl_divergence(logits, ref_logits, backend=backend)
    shifted = kl_divergence(logits + 1e4, ref_logits - 1e4, backend=backend)
    torch.testing.assert_close(shifted, plain, atol=1e-3, rtol=0)


def test_of_a_row_with_itself_is_zero(backend):
    logits = torch.randn(4, 40000).bfloat16()
    kl, grad = value_and_gradient(lambda z: kl_divergence(z, logits, backend=backend), logits)
    assert kl.abs().max() < 1e-6
    assert grad.abs().max() < 1e-8


@pytest.mark.parametrize("shape", ((0,), (3, 0), (), (1,), (65537,)))
def test_row_counts(backend, shape):
    if shape == (65537,):
        skip_if_emulated(backend)
    logits, ref_logits = torch.randn(2, *shape, 7, dtype=torch.float64)
    result = value_and_gradient(lambda z: kl_divergence(z, ref_logits, backend=backend), logits)
    for ours, truth in zip(result, truth_of(logits, ref_logits, 1.0), strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-13, rtol=0)


def test_views_and_stride_0_upstream(backend):
    logits = torch.randn(3, 5, 1200).requires_grad_()
    ref_logits = torch.randn(5, 3, 1200)
    z, ref = logits[:, :-1], ref_logits.transpose(0, 1)[:, 1:]
    kl = kl_divergence(z, ref, backend=backend)
    (grad,) = torch.autograd.grad(kl.sum() * 2, logits)
    copied, copied_grad = value_and_gradient(
        lambda z: kl_divergence(z, ref.contiguous(), backend=backend), z.contiguous(), 2.0
    )
    assert torch.equal(kl, copied)
    assert torch.equal(grad[:, :-1], copied_grad)
    assert (grad[:, -1] == 0).all()


def test_rows_without_upstream_get_exactly_zero(backend):
    logits, ref_logits = torch.randn(2, 3, 40000)
    upstream = torch.tensor([1.0, 0.0, 2.0])
    _, grad = value_and_gradient(
        lambda z: kl_divergence(z, ref_logits, backend=backend), logits, upstream
    )
    assert (grad[1] == 0).all()
    assert (grad[[0, 2]] != 0).any()


def test_a_row_is_bitwise_the_same_wherever_it_stands(fused, set_threads):
    row, ref_row = 2 * torch.randn(2, 1, 40009)
    filler, ref_filler = torch.randn(2, 20, 40009)
    seen = []
    for threads in thread_counts(fused):
        set_threads(threads)
        for before in (0, 1, 17):
            z = torch.cat((filler[:before], row, filler[:2]))
            ref = torch.cat((ref_filler[:before], ref_row, ref_filler[:2]))
            result = value_and_gradient(lambda z, r=ref: kl_divergence(z, r, backend=fused), z)
            seen.append([x[before] for x in result])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_no_gradient_flows_into_the_reference(backend):
    logits, ref_logits = (x.requires_grad_() for x in torch.randn(2, 3, 50))
    kl_divergence(logits, ref_logits, backend=backend).sum().backward()
    assert logits.grad.abs().max() > 0
    assert ref_logits.grad is None


def test_gradcheck(backend):
    logits = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    ref_logits = torch.randn(2, 1, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: kl_divergence(z, ref_logits, temperature=1.3, backend=backend), logits
    )


ESTIMATES = {
    # Δ = log 2: the ratio π / π_ref is 2.
    "k1": (math.log(2), 1.0),
    "k2": (math.log(2) ** 2 / 2, math.log(2)),
    "k3": (0.5 - 1 + math.log(2), 0.5),
    "abs": (math.log(2), 1.0),
}


@pytest.mark.parametrize("estimator", ESTIMATES)
def test_estimators_by_hand(backend, estimator):
    logprobs = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    ref_logprobs = (logprobs.detach() - math.log(2)).requires_grad_()
    kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator, backend=backend)
    kl.backward()
    value, derivative = ESTIMATES[estimator]
    assert kl.item() == pytest.approx(value, abs=1e-14)
    assert logprobs.grad.item() == pytest.approx(derivative, abs=1e-14)
    assert ref_logprobs.grad.item() == pytest.approx(-derivative, abs=1e-14)


@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_estimators_are_unbiased(backend, estimator):
    """The mean over π of an unbiased estimator is the exact divergence."""
    logits, ref_logits = torch.randn(2, 1, 40, dtype=torch.float64)
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    estimate = kl_estimate(log_p, log_q, estimator=estimator, backend=backend)
    exact = kl_divergence(logits, ref_logits, backend=backend)
    torch.testing.assert_close((log_p.exp() * estimate).sum(-1), exact, atol=1e-13, rtol=0)


@pytest.mark.parametrize("estimator", ESTIMATES)
def test_estimators_of_a_tiny_ratio_are_exact(backend, estimator):
    """exp(-Δ) - 1 + Δ in fp32 would be 0 or noise."""
    logprobs, ref_logprobs = torch.tensor([1e-4, -1e-4, 0.0]), torch.zeros(3)
    kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator, backend=backend)
    delta = logprobs.double()
    truth = {"k1": delta, "k2": delta**2 / 2, "k3": delta**2 / 2, "abs": delta.abs()}[estimator]
    torch.testing.assert_close(kl.double(), truth, rtol=1e-3, atol=2e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATES)
def test_estimator_dtypes_and_gradients(backend, estimator, dtype):
    logprobs, ref_logprobs = (x.to(dtype).requires_grad_() for x in torch.randn(2, 3, 5))
    kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator, backend=backend)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    kl.sum().backward()
    assert logprobs.grad.dtype == ref_logprobs.grad.dtype == dtype
    if dtype == torch.float64 and estimator != "abs":
        assert torch.autograd.gradcheck(
            lambda a, b: kl_estimate(a, b, estimator=estimator, backend=backend),
            (logprobs, ref_logprobs),
        )


def test_second_derivative_is_refused(fused):
    x = torch.randn(2, 5, requires_grad=True)
    for kl in (
        kl_divergence(x, torch.randn(2, 5), backend=fused),
        kl_estimate(x, torch.randn(2, 5), estimator="k3", backend=fused),
    ):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(kl.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.ones(2, 5).long()}, TypeError, "logits must be float32.*int64"),
        ({"ref_logits": None}, TypeError, "ref_logits must be a tensor, got NoneType"),
        ({"ref_logits": torch.ones(2, 6)}, ValueError, r"ref_logits must have shape \(2, 5\)"),
        ({"ref_logits": torch.ones(2, 5).double()}, TypeError, "ref_logits must have dtype"),
        (
            {"ref_logits": torch.ones(2, 5, device="meta")},
            ValueError,
            "ref_logits must be on .*got meta",
        ),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite, got nan"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_are_named(backend, arguments, error, message):
    good = {"logits": torch.ones(2, 5), "ref_logits": torch.ones(2, 5), "backend": backend}
    with pytest.raises(error, match=message):
        kl_divergence(**good | on_default_device(arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logprobs": torch.ones(3).int()}, TypeError, "logprobs must be float32.*int32"),
        ({"ref_logprobs": torch.ones(4)}, ValueError, r"ref_logprobs must have shape \(3,\)"),
        ({"estimator": "k4"}, ValueError, "estimator must be one of k1, k2, k3, abs, got 'k4'"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_of_the_estimators_are_named(backend, arguments, error, message):
    good = {"logprobs": torch.ones(3), "ref_logprobs": torch.ones(3), "estimator": "k1"}
    with pytest.raises(error, match=message):
        kl_estimate(**good | on_default_device(arguments), backend=backend)
