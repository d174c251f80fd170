r"""Functions of torchrl 0.14.1's `torchrl.objectives.value.functional`.

torchrl has a next value of its own for each step, which at a truncated one is not the value of the
step that follows, and two ends: `terminated` cuts the value, `done` cuts the advantage::

    δ_t = r_t + γ ¬terminated_t V'_t - V_t        A_t = δ_t + γ λ ¬done_t A_{t+1}

The second is `ppo_kernels.gae` with δ for rewards and values of zero, whatever V' is. Cuts are made
by selection, so that nothing non-finite crosses them (in torchrl 0·NaN does).
"""

import math

import torch

from ppo_kernels import checks
from ppo_kernels.gae import gae


class _Advantages(torch.autograd.Function):
    """(N, T) δ -> A. Its transpose is the same scan forwards, each cut one step later."""

    @staticmethod
    def forward(ctx, delta, done, gamma, lam):
        ctx.save_for_backward(done)
        ctx.factors = gamma, lam
        values = torch.zeros_like(delta)
        return gae(delta, values, dones=done, gamma=gamma, lam=lam).advantages

    @staticmethod
    def backward(ctx, grad):
        (done,) = ctx.saved_tensors
        cuts = done.roll(1, 1).flip(1)
        return _Advantages.apply(grad.flip(1), cuts, *ctx.factors).flip(1), None, None, None


def _number(name, x):
    if isinstance(x, torch.Tensor) and (x.numel() != 1 or x.requires_grad):
        kind = f"shape {tuple(x.shape)}, requires_grad={x.requires_grad}"
        raise ValueError(f"{name} must be one number without gradient, got a tensor of {kind}")
    return float(x)


def vec_generalized_advantage_estimate(
    gamma,
    lmbda,
    state_value,
    next_state_value,
    reward,
    done,
    terminated=None,
    *,
    time_dim=-2,
):
    """Advantages and value targets; see the module for the formula. torchrl's `GAE` calls this one.

    Args:
        gamma, lmbda: numbers in [0, 1], or tensors of one element (a GPU is waited for then).
            torchrl takes a gamma > 1, these functions do not.
        state_value, next_state_value, reward: (..., T, F) floating, each feature a trajectory.
        done, terminated: (..., T, F) bool; terminated is done when None.
        time_dim: where T stands.

    Returns:
        advantage, value_target = advantage + state_value: (..., T, F), of the common dtype of
        values, rewards and fp32; differentiable, also twice, but not under `torch.func`.

    Raises:
        ValueError: gamma or lmbda of a step each, which torchrl takes in its vectorised form.
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    gamma, lmbda = _number("gamma", gamma), _number("lmbda", lmbda)
    terminated = done if terminated is None else terminated
    for name, x in (("state_value", state_value), ("next_state_value", next_state_value)):
        checks.per_token(name, x, "reward", reward)
    checks.boolean("done", done, "reward", reward)
    checks.boolean("terminated", terminated, "reward", reward)
    dtype = torch.promote_types(next_state_value.dtype, torch.float32)
    bootstrap = next_state_value.masked_fill(terminated, 0).to(dtype)
    delta = reward + gamma * bootstrap - state_value
    rows, done = delta.movedim(time_dim, -1), done.movedim(time_dim, -1)
    batch = math.prod(rows.shape[:-1]), rows.shape[-1]
    advantage = _Advantages.apply(rows.reshape(batch), done.reshape(batch), gamma, lmbda)
    advantage = advantage.reshape(rows.shape).movedim(-1, time_dim)
    return advantage, advantage + state_value


def generalized_advantage_estimate(
    gamma,
    lmbda,
    state_value,
    next_state_value,
    reward,
    done,
    terminated=None,
    *,
    time_dim=-2,
):
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
