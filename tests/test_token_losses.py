"""clipped_policy_loss and value_loss."""

import math

import pytest
import torch

from ppo_kernels import clipped_policy_loss, value_loss
from tests.conftest import (
    DTYPES,
    loss_inputs,
    on_default_device,
    ppo_loss_truth,
)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "clipped"),
    [(2, 1.1, -2.2, 0), (2, 1.5, -2.4, 1), (-2, 0.9, 1.8, 0), (-2, 0.5, 1.6, 1)],
)
def test_worked_examples_of_clipping(backend, advantage, ratio, loss, clipped):
    """And the gradient in the log-prob: -A r where the ratio is free, 0 where it is clipped."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old_logprobs = logprobs.detach() - math.log(ratio)
    advantages = torch.tensor([float(advantage)])
    result = clipped_policy_loss(logprobs, old_logprobs, advantages, backend=backend)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert result.clip_fraction.item() == clipped
    assert logprobs.grad.item() == pytest.approx(0 if clipped else -advantage * ratio, abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    # c = 3: the bound holds only where the advantage is negative and the ratio beyond c.
    [(-2, 4.0, 6.0, 0.0), (-2, 2.0, 4.0, 4.0), (2, 4.0, -2.4, 0.0), (-2, 0.5, 1.6, 0.0)],
)
def test_dual_clip_by_hand(backend, advantage, ratio, loss, gradient):
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    result = clipped_policy_loss(
        logprobs,
        logprobs.detach() - math.log(ratio),
        torch.tensor([float(advantage)]),
        dual_clip=3.0,
        backend=backend,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_loss_from_logprobs_is_that_from_logits(backend, dtype):
    """Value and gradient; fp64 to rounding, others to that of their type."""
    inputs = loss_inputs(3, 5, 40, torch.float64)
    del inputs["ref_logprobs"]
    truth, _ = ppo_loss_truth(**inputs, dual_clip=1.3, clip_high=0.3)
    logprobs = torch.log_softmax(inputs["logits"], -1).gather(-1, inputs["tokens"][..., None])
    exact = logprobs[..., 0].detach()
    leaf = exact.to(dtype).requires_grad_()
    arguments = [inputs[x] for x in ("old_logprobs", "advantages", "mask")]
    result = clipped_policy_loss(leaf, *arguments, dual_clip=1.3, clip_high=0.3, backend=backend)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.1)
    for name in ("approx_kl", "clip_fraction"):
        torch.testing.assert_close(
            getattr(result, name).double(), getattr(truth, name), atol=tolerance, rtol=0
        )
    torch.testing.assert_close(
        result.loss.detach().double(), truth.policy_loss, atol=tolerance, rtol=0
    )
    result.loss.backward()
    assert leaf.grad.dtype == dtype
    assert (leaf.grad[~inputs["mask"]] == 0).all()
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(
            lambda x: clipped_policy_loss(x, *arguments, dual_clip=1.3, backend=backend).loss,
            leaf,
            eps=1e-7,
        )


@pytest.mark.parametrize(
    ("value", "old_value", "target", "clip", "loss", "gradient", "clipped"),
    [
        (3.0, 3.0, 5.0, None, 2.0, -2.0, 0),
        (3.0, 2.9, 5.0, 0.2, 2.0, -2.0, 0),  # inside the range
        (4.0, 3.0, 5.0, 0.2, 0.5 * 1.8**2, 0.0, 1),  # moved to the target too far: held at 3.2
        (2.0, 3.0, 5.0, 0.2, 4.5, -3.0, 0),  # moved away: the plain error is the larger
    ],
)
def test_value_loss_by_hand(backend, value, old_value, target, clip, loss, gradient, clipped):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    result = value_loss(
        values, torch.tensor([old_value]), torch.tensor([target]), clip=clip, backend=backend
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert result.clip_fraction.item() == clipped


@pytest.mark.parametrize("clip", (None, 0.2, 0.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_loss_over_a_mask(backend, dtype, clip):
    values, old_values, returns = torch.randn(3, 4, 6).to(dtype)
    mask = torch.rand(4, 6) < 0.7
    kept = [x.double()[mask] for x in (values, old_values, returns)]
    errors = (kept[0] - kept[2]) ** 2
    if clip is not None:
        held = kept[1] + (kept[0] - kept[1]).clamp(-clip, clip)
        errors = torch.maximum(errors, (held - kept[2]) ** 2)
    dirty = [x.masked_fill(~mask, math.nan).requires_grad_() for x in (values, old_values, returns)]
    result = value_loss(*dirty, mask, clip=clip, denominator=10, backend=backend)
    torch.testing.assert_close(
        result.loss.detach().double(), errors.sum() / 20, atol=1e-6, rtol=1e-6
    )
    result.loss.backward()
    assert (dirty[0].grad[~mask] == 0).all()
    assert dirty[1].grad is None
    if dtype == torch.float64 and clip != 0:
        assert torch.autograd.gradcheck(
            lambda v: value_loss(v, old_values, returns, mask, clip=clip, backend=backend).loss,
            values.clone().requires_grad_(),
            eps=1e-7,
        )


@pytest.mark.parametrize("denominator", (3, 3.0, torch.tensor(3), torch.tensor([3.0])))
def test_losses_from_scalars_divide_by_the_denominator(backend, denominator):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    zero, one = torch.zeros(2), torch.ones(2)
    critic = value_loss(x, zero, zero, denominator=denominator, backend=backend)
    actor = clipped_policy_loss(x, x.detach(), one, denominator=denominator, backend=backend)
    assert critic.loss.item() == pytest.approx(2.5 / 3)
    assert actor.loss.item() == pytest.approx(-2 / 3)
    (critic.loss + actor.loss).backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1 / 3]))


def test_second_derivative_of_losses_from_scalars_is_refused(fused):
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    for loss in (
        value_loss(x, y, y, backend=fused).loss,
        clipped_policy_loss(x, y, y, backend=fused).loss,
    ):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": torch.ones(3).int()}, TypeError, "values must be float32.*int32"),
        ({"old_values": torch.ones(2)}, ValueError, r"old_values must have shape \(3,\)"),
        ({"returns": torch.ones(4)}, ValueError, r"returns must have shape \(3,\)"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor.*float32"),
        ({"clip": -0.1}, ValueError, "clip must be >= 0, got -0.1"),
        ({"clip": math.nan}, ValueError, "clip must be finite, got nan"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_of_value_loss_are_named(backend, arguments, error, message):
    good = {name: torch.ones(3) for name in ("values", "old_values", "returns")}
    with pytest.raises(error, match=message):
        value_loss(**good | on_default_device(arguments), backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logprobs": None}, TypeError, "logprobs must be a tensor, got NoneType"),
        ({"old_logprobs": torch.ones(2)}, ValueError, r"old_logprobs must have shape \(3,\)"),
        ({"advantages": torch.ones(4)}, ValueError, r"advantages must have shape \(3,\)"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor.*float32"),
        ({"clip_low": 2}, ValueError, "clip_low must be <= 1, got 2"),
        ({"dual_clip": 0.5}, ValueError, "dual_clip must be > 1, got 0.5"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments_of_clipped_policy_loss_are_named(backend, arguments, error, message):
    good = {name: torch.ones(3) for name in ("logprobs", "old_logprobs", "advantages")}
    with pytest.raises(error, match=message):
        clipped_policy_loss(**good | on_default_device(arguments), backend=backend)
