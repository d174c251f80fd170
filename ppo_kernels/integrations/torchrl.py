r"""Functions of torchrl 0.14.1's `torchrl.objectives.value.functional`.

torchrl has a next value of its own for each step, which at a truncated one is not the value of the
step that follows, and two ends: `terminated` cuts the value, `done` cuts the advantage::

    δ_t = r_t + γ ¬terminated_t V'_t - V_t        A_t = δ_t + γ λ ¬done_t A_{t+1}

The second is a discounted sum of δ, as in `ppo_kernels.gae`, whatever V' is. Cuts are made by
selection, so that nothing non-finite crosses them (in torchrl 0·NaN does).
"""

import math

import torch
from torch import Tensor

from ppo_kernels import checks
from ppo_kernels.dispatch import resolve
from ppo_kernels.gae import discounted_sums


class _Advantages(torch.autograd.Function):
    """(N, T) δ and γλ -> A. Its transpose is the same scan forwards, each factor a step later."""

    @staticmethod
    def forward(ctx, delta, decays, done):
        advantages = discounted_sums(resolve("auto", delta), delta, decays, dones=done)
        ctx.save_for_backward(decays, done, advantages)
        return advantages

    @staticmethod
    def backward(ctx, grad):
        decays, done, advantages = ctx.saved_tensors
        later = (x.roll(1, 1).flip(1) for x in (decays, done))
        grad_delta = _Advantages.apply(grad.flip(1), *later).flip(1)
        grad_decays = None
        if ctx.needs_input_grad[1]:
            following = torch.nn.functional.pad(advantages[:, 1:], (0, 1))
            grad_decays = grad_delta * following.masked_fill(done, 0)
        return grad_delta, grad_decays, None


def vec_generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets by the module's formula. torchrl's `GAE` calls this one.

    Args:
        gamma, lmbda: numbers, or tensors that broadcast to (..., T, F), such as one of each step.
        state_value, next_state_value, reward: (..., T, F) floating, each feature a trajectory.
        done, terminated: (..., T, F) bool; terminated is done when None.
        time_dim: where T stands.

    Returns:
        advantage, value_target = advantage + state_value: (..., T, F), of the common dtype of
        values, rewards and fp32; differentiable, also twice, but not under `torch.func`.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    terminated = done if terminated is None else terminated
    for name, x in (("state_value", state_value), ("next_state_value", next_state_value)):
        checks.per_token(name, x, "reward", reward)
    checks.boolean("done", done, "reward", reward)
    checks.boolean("terminated", terminated, "reward", reward)
    dtype = torch.promote_types(next_state_value.dtype, torch.float32)
    bootstrap = next_state_value.masked_fill(terminated, 0).to(dtype)
    delta = reward + gamma * bootstrap - state_value
    decays = gamma * lmbda
    if not isinstance(decays, torch.Tensor):
        decays = delta.new_full((), decays)
    decays = decays.to(delta.dtype)
    rows = [x.movedim(time_dim, -1) for x in (delta, decays.expand(delta.shape), done)]
    shape = rows[0].shape
    batch = math.prod(shape[:-1]), shape[-1]
    advantage = _Advantages.apply(*(x.reshape(batch) for x in rows))
    advantage = advantage.reshape(shape).movedim(-1, time_dim)
    return advantage, advantage + state_value


def generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """`vec_generalized_advantage_estimate`, with the advantage in next_state_value's dtype."""
    advantage, _ = vec_generalized_advantage_estimate(
        gamma,
        lmbda,
        state_value,
        next_state_value,
        reward,
        done,
        terminated,
        time_dim=time_dim,
    )
    advantage = advantage.to(next_state_value.dtype)
    return advantage, advantage + state_value


REPLACES = {
    "torchrl.objectives.value.functional": (
        generalized_advantage_estimate,
        vec_generalized_advantage_estimate,
    )
}
