"""Ratios beyond the range of fp32, numbers that are not finite, and exact ties, in every loss."""

import math

import pytest
import torch

import ppo_kernels
from ppo_kernels import clipped_policy_loss, kl_estimate, objectives, value_loss
from tests.conftest import waits_for_nothing

V = 4  # whose logarithm all backends give the same bits
# A token of probability 1/4 is e^100 times as likely as before, or e^-100 times.
RISEN, FALLEN = math.log(1 / V) - 100, math.log(1 / V) + 100
E80 = math.exp(80)
LOSSES = ("ppo_loss", "ppo_loss_", "linear_ppo_loss", "clipped_policy_loss", "vocab_parallel")


@pytest.fixture(params=LOSSES)
def loss_of(request, backend, group_of_one):
    """f(old_logprobs, advantages, …): the loss of tokens of probability 1/4 out of 4, summed up,
    and the gradient of each in its log-probability."""
    name = request.param

    def run(old_logprobs, advantages, dtype=torch.float32, **options):
        old_logprobs, advantages = (
            torch.tensor(x, dtype=dtype) for x in (old_logprobs, advantages)
        )
        n = old_logprobs.numel()
        rest = torch.ones(n, dtype=torch.int64), old_logprobs, advantages
        options = {"denominator": 1, "backend": backend} | options
        x = torch.zeros(n, V, dtype=dtype, requires_grad=True)
        if name == "clipped_policy_loss":
            logprobs = torch.full((n,), math.log(1 / V), dtype=dtype, requires_grad=True)
            loss = clipped_policy_loss(logprobs, *rest[1:], **options).loss
            return loss.item(), torch.autograd.grad(loss, logprobs)[0]
        if name == "linear_ppo_loss":
            loss = ppo_kernels.linear_ppo_loss(x, torch.eye(V, dtype=dtype), *rest, **options).loss
        elif name == "vocab_parallel":
            options |= {"group": group_of_one, "vocab_start": 0}
            loss = ppo_kernels.vocab_parallel_ppo_loss(x, *rest, **options).loss
        else:
            loss = getattr(ppo_kernels, name)(x, *rest, **options).loss
        (grad,) = torch.autograd.grad(loss, x)
        if loss.isfinite():
            # Of its own logit a token has the derivative 1 - 1/4, of another's -1/4.
            torch.testing.assert_close(grad[:, 0], -grad[:, 1] / (V - 1))
        return loss.item(), grad[:, 1] / (1 - 1 / V)

    run.raises = raises(name, backend)
    return run


def raises(name, backend):
    """Whether a loss looks at what tensors hold; that split over processes does in Python."""
    in_python = name == "vocab_parallel" and torch.get_default_device().type == "cpu"
    return in_python or not waits_for_nothing(backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize(
    ("old_logprobs", "advantages", "options", "loss"),
    [
        ([RISEN, RISEN, FALLEN, FALLEN], [0.0, 1.0, 0.0, -1.0], {}, 0 - 1.2 + 0 + 0.8),
        ([RISEN, FALLEN], [-1.0, 1.0], {"dual_clip": 3.0}, 3 - 1 / E80),
        ([RISEN], [-1.0], {}, E80),
    ],
    ids=("clipped", "dual clip", "unclipped"),
)
def test_log_ratios_beyond_80_count_as_80_with_no_gradient(
    loss_of, dtype, old_logprobs, advantages, options, loss
):
    value, grad = loss_of(old_logprobs, advantages, dtype, **options)
    assert value == pytest.approx(loss, rel=1e-5)
    assert (grad == 0).all()


def test_a_ratio_within_80_has_its_gradient(loss_of):
    value, grad = loss_of([math.log(1 / V) - 79], [-1.0], torch.float64)
    assert value == pytest.approx(math.exp(79))
    assert grad.item() == pytest.approx(math.exp(79))


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", ("old_logprobs", "advantages"))
def test_counted_numbers_that_are_not_finite_are_named(loss_of, name, bad):
    arguments = {"old_logprobs": [-1.6, -1.5, -1.4], "advantages": [1.0, 2.0, 0.0]}
    arguments[name][2] = bad
    mask = torch.tensor([True, True, False])
    assert math.isfinite(loss_of(**arguments, mask=mask)[0])
    if not loss_of.raises:
        assert not math.isfinite(loss_of(**arguments)[0])
        return
    with pytest.raises(ValueError, match=rf"{name} must be finite.* got {bad} at \[2\]"):
        loss_of(**arguments)


@pytest.mark.parametrize("name", ("ppo_loss", "ppo_loss_", "linear_ppo_loss", "vocab_parallel"))
def test_reference_log_probs_that_are_not_finite_are_named(backend, name, group_of_one):
    x, ref_logprobs = torch.zeros(3, V), torch.tensor([-1.6, -math.inf, -1.6])
    rest = torch.ones(3, dtype=torch.int64), torch.full((3,), -1.6), torch.ones(3)
    options = {"ref_logprobs": ref_logprobs, "kl_coef": 0.1, "backend": backend}
    op = getattr(ppo_kernels, "vocab_parallel_ppo_loss" if name == "vocab_parallel" else name)
    if name == "linear_ppo_loss":
        rest = torch.eye(V), *rest
    elif name == "vocab_parallel":
        options |= {"vocab_start": 0}
    mask = torch.tensor([True, False, True])
    assert op(x.clone(), *rest, mask, **options).loss.isfinite()
    if not raises(name, backend):
        assert op(x.clone(), *rest, **options).loss.isnan()
        return
    with pytest.raises(ValueError, match=r"ref_logprobs must be finite.* got -inf at \[1\]"):
        op(x, *rest, **options)
    assert (x == 0).all()


@pytest.mark.parametrize("bad", (math.nan, -math.inf))
def test_clipped_policy_loss_names_log_probs_that_are_not_finite(backend, bad):
    logprobs = torch.tensor([[-1.0, bad]])
    options = {"backend": backend}
    rest = torch.zeros(1, 2), torch.ones(1, 2)
    assert clipped_policy_loss(logprobs, *rest, torch.tensor([[True, False]])).loss.isfinite()
    if waits_for_nothing(backend):
        assert clipped_policy_loss(logprobs, *rest, **options).loss.isnan()
        return
    with pytest.raises(ValueError, match=rf"logprobs must be finite.* got {bad} at \[0, 1\]"):
        clipped_policy_loss(logprobs, *rest, **options)


@pytest.mark.parametrize(
    ("delta", "value", "derivative"),
    [(-300.0, E80 - 81, 0.0), (300.0, 79.0, 0.0), (-79.0, math.exp(79), -math.exp(79))],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_k3_beyond_80(backend, dtype, delta, value, derivative):
    logprobs = torch.tensor([delta], dtype=dtype, requires_grad=True)
    kl = kl_estimate(logprobs, torch.zeros(1, dtype=dtype), estimator="k3", backend=backend)
    kl.backward()
    assert kl.item() == pytest.approx(value, rel=2e-5)
    assert logprobs.grad.item() == pytest.approx(derivative, rel=2e-5)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
@pytest.mark.parametrize(("log_ratio", "advantage"), [(100.0, 0.0), (-100.0, 1.0), (100.0, 1.0)])
def test_objectives_bound_the_log_ratio_both_ways(name, log_ratio, advantage):
    logprobs = torch.full((1, 2), -0.5, requires_grad=True)
    old_logprobs = logprobs.detach() - log_ratio
    options = {"rollout_logprobs": old_logprobs} if name == "tis" else {}
    result = objectives.OBJECTIVES[name](
        logprobs, old_logprobs, torch.full((1, 2), advantage), **options
    )
    result.loss.backward()
    assert result.loss.isfinite()
    expected = math.expm1(math.copysign(80, log_ratio)) - math.copysign(80, log_ratio)
    assert result.approx_kl.item() == pytest.approx(expected, rel=2e-5)
    if name != "cispo":  # whose ratio is a constant
        assert (logprobs.grad == 0).all()


@pytest.mark.parametrize("name", ("logprobs", "old_logprobs", "advantages", "rollout_logprobs"))
def test_objectives_name_what_is_not_finite(name):
    arguments = {x: torch.zeros(2, 3) for x in ("logprobs", "old_logprobs", "advantages")}
    arguments["rollout_logprobs"] = torch.zeros(2, 3)
    arguments[name][1, 2] = math.inf
    with pytest.raises(ValueError, match=rf"{name} must be finite.* got inf at \[1, 2\]"):
        objectives.tis(**arguments)


def test_at_the_bounds_of_the_clip_nothing_is_clipped(loss_of):
    """Ratio 1 between the bounds 1 and 1: either side of the maximum is the loss."""
    for advantage in (2.0, -2.0):
        old_logprob = math.log(1 / V)
        value, grad = loss_of(
            [old_logprob], [advantage], torch.float64, clip_low=0.0, clip_high=0.0
        )
        assert value == pytest.approx(-advantage)
        assert grad.item() == pytest.approx(-advantage)


def test_at_the_bound_of_the_dual_clip_nothing_is_bounded(backend):
    """In fp64 exp(log 2) is 2 on all backends."""
    logprobs = torch.tensor([math.log(2)], dtype=torch.float64, requires_grad=True)
    rest = torch.zeros(1, dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    loss = clipped_policy_loss(logprobs, *rest, dual_clip=2.0, backend=backend).loss
    loss.backward()
    assert loss.item() == 2
    assert logprobs.grad.item() == 2


def test_at_equal_errors_the_value_is_not_clipped(backend):
    """From 3 to 4, held at 3.5, 0.25 to either side of the target."""
    values = torch.tensor([4.0], requires_grad=True)
    rest = torch.tensor([3.0]), torch.tensor([3.75])
    result = value_loss(values, *rest, clip=0.5, backend=backend)
    result.loss.backward()
    assert result.loss.item() == 0.5 * 0.25**2
    assert values.grad.item() == 0.25
    assert result.clip_fraction.item() == 0
