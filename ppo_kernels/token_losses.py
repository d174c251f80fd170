r"""The losses of PPO when log-probabilities or values are at hand.

The formula of the policy's stands in `ppo_kernels.ppo_loss`, that of the critic at `value_loss`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import denominator_on, kernels, resolve, scalars
from ppo_kernels.schemas import promoted


class PolicyLoss(NamedTuple):
    """Scalars; only `loss` carries a gradient."""

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


class ValueLoss(NamedTuple):
    """Scalars; only `loss` carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor


class _ScalarLoss(torch.autograd.Function):
    """A loss whose op gives (loss, …, gradient in the first argument) at once."""

    @staticmethod
    def forward(ctx, op, x, *rest):
        *results, grad = op(x, *rest)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(grad)
        ctx.dtype, ctx.rest = x.dtype, len(rest)
        return tuple(results)

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        return None, reference.chained(grad_loss, grad).to(ctx.dtype), *(None,) * ctx.rest


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """The policy term of `ppo_loss` from log-probabilities at hand.

    Args:
        logprobs: (...) of the policy in training, in nats, differentiable.
        old_logprobs, advantages, mask, importance_weights, clip_low, clip_high, dual_clip,
            denominator, backend: as in `ppo_loss`.

    Returns:
        PolicyLoss (fp32, fp64 for fp64 input).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("logprobs", logprobs)
    checks.per_token("old_logprobs", old_logprobs, "logprobs", logprobs)
    mask = checks.boolean("mask", mask, "logprobs", logprobs)
    advantages = checks.advantages(advantages, importance_weights, mask, "logprobs", logprobs)
    clipping = checks.clip_range(clip_low, clip_high, dual_clip)
    tensors = checks.constant(old_logprobs.detach()), advantages, mask
    logprobs = promoted(logprobs, old_logprobs, advantages)
    denominator = checks.denominator(denominator, logprobs.device)
    backend = resolve(backend, logprobs)
    if backend == "reference":
        return PolicyLoss(
            *reference.clipped_policy_loss(logprobs, *tensors, *clipping, denominator)
        )
    op = kernels(backend).clipped_policy_loss
    rest = denominator_on(logprobs.device, denominator), scalars(*clipping)
    return PolicyLoss(*_ScalarLoss.apply(op, logprobs, *tensors, *rest))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = None,
    denominator: float | Tensor | None = None,
    backend: str = "auto",
) -> ValueLoss:
    """Half the squared error of the critic, pessimistic about moves beyond `clip`.

    Per counted token max((v - R)², (old + clamp(v - old, -clip, clip) - R)²) / 2, summed over the
    mask and divided by `denominator` (the clipped value loss of the OpenAI baselines).

    Args:
        values: (...) of the critic in training, differentiable.
        old_values, returns: (...) values at rollout and GAE returns.
        mask: (...) bool, True = counts; None counts all.
        clip: range of the value's move, at least 0; None for the plain squared error.
        denominator, backend: as in `ppo_loss`.

    Returns:
        ValueLoss (fp32, fp64 for fp64 input).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("values", values)
    checks.per_token("old_values", old_values, "values", values)
    checks.per_token("returns", returns, "values", values)
    mask = checks.boolean("mask", mask, "values", values)
    if clip is not None:
        clip = checks.number("clip", clip, at_least=0)
    tensors = checks.constant(old_values.detach()), checks.constant(returns.detach()), mask
    values = promoted(values, old_values, returns)
    denominator = checks.denominator(denominator, values.device)
    backend = resolve(backend, values)
    if backend == "reference":
        return ValueLoss(*reference.value_loss(values, *tensors, clip, denominator))
    rest = denominator_on(values.device, denominator), scalars(clip)
    return ValueLoss(*_ScalarLoss.apply(kernels(backend).value_loss, values, *tensors, *rest))
