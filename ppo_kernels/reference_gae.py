"""Scans over time in plain PyTorch: that part of the specification, see reference.py."""

import torch

from ppo_kernels.checks import value_checks_run
from ppo_kernels.reference import accumulate


def trajectories(cu_seqlens, length):
    """(trajectory, last) of positions (N,) of trajectories laid end to end: the index of the one
    that a position is in, and True where it is its last."""
    if value_checks_run(cu_seqlens) or cu_seqlens.shape[0] == 1 < length:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens must rise from 0 to {length}, the length of rewards, got {bounds}"
            )
    bounds, t = cu_seqlens.long(), torch.arange(length, device=cu_seqlens.device)
    trajectory = torch.searchsorted(bounds, t, right=True) - 1
    trajectory = trajectory.clamp(0, max(0, cu_seqlens.shape[0] - 2))
    return trajectory, bounds[trajectory + 1] - 1 == t


def _as_row(x):
    """(N,) -> (1, N); numbers, and what is not there, stay."""
    return x.unsqueeze(0) if isinstance(x, torch.Tensor) else x


@torch.no_grad()
def gae(rewards, values, mask=None, *, gamma, lam, dones=None, bootstrap_values=None):
    return _gae(rewards, values, mask, gamma, lam, dones, bootstrap_values)


@torch.no_grad()
def gae_packed(
    rewards, values, cu_seqlens, mask=None, *, gamma, lam, dones=None, bootstrap_values=None
):
    """Tensors for gamma and lam are of each token."""
    trajectory, last = trajectories(cu_seqlens, rewards.shape[0])
    if bootstrap_values is not None:
        bootstrap_values = bootstrap_values[trajectory]
    rows = map(_as_row, (rewards, values, mask, gamma, lam, dones))
    return tuple(x.squeeze(0) for x in _gae(*rows, bootstrap_values, last))


def _at(x, t):
    """Column t of a tensor (B, T); a number as it is."""
    return x[:, t] if isinstance(x, torch.Tensor) else x


def _gae(rewards, values, mask, gamma, lam, dones, bootstrap_values, last=None):
    """Backwards over (B, T), from bootstrap_values (B,); or over a row of several trajectories, of
    which each position has a value of `bootstrap_values`, and some are the `last` of theirs."""
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    rewards, values = (accumulate(x.to(dtype)) for x in (rewards, values))
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    if bootstrap_values is not None:
        bootstrap_values = bootstrap_values.to(rewards.dtype)
        if last is None:
            next_value = bootstrap_values
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        if last is not None:
            beyond = 0.0 if bootstrap_values is None else bootstrap_values[t]
            next_value = torch.where(last[t], beyond, next_value)
            next_advantage = torch.where(last[t], 0.0, next_advantage)
        if dones is not None:
            next_value = torch.where(dones[:, t], 0.0, next_value)
            next_advantage = torch.where(dones[:, t], 0.0, next_advantage)
        delta = rewards[:, t] + _at(gamma, t) * next_value - values[:, t]
        advantage = delta + _at(gamma, t) * _at(lam, t) * next_advantage
        if mask is None:
            next_value, next_advantage = values[:, t], advantage
        else:
            counted = mask[:, t]
            next_value = torch.where(counted, values[:, t], next_value)
            next_advantage = torch.where(counted, advantage, next_advantage)
            advantage = torch.where(counted, advantage, 0.0)
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], 1) if advantages else torch.zeros_like(rewards)
    returns = advantages + values
    return advantages, returns if mask is None else torch.where(mask, returns, 0.0)


@torch.no_grad()
def discounted_sums(x, decays, mask=None, dones=None, cu_seqlens=None):
    """S_t = x_t + decay_t S_(t+1) over rows, or trajectories laid end to end."""
    zeros = torch.zeros_like(x)
    if cu_seqlens is not None:
        return gae_packed(x, zeros, cu_seqlens, mask, gamma=1.0, lam=decays, dones=dones)[0]
    return gae(x, zeros, mask, gamma=1.0, lam=decays, dones=dones)[0]


@torch.no_grad()
def vtrace(rho, c, pg_rho, rewards, values, mask, gamma, dones, bootstrap_values):
    """From clipped ratios (B, T), all of one dtype."""
    next_value = rewards.new_zeros(rewards.shape[0])
    if bootstrap_values is not None:
        next_value = bootstrap_values
    next_target, advantages, targets = next_value, [], []
    for t in reversed(range(rewards.shape[1])):
        if dones is not None:
            next_value = torch.where(dones[:, t], 0.0, next_value)
            next_target = torch.where(dones[:, t], 0.0, next_target)
        reward, value, discount = rewards[:, t], values[:, t], _at(gamma, t)
        correction = rho[:, t] * (reward + discount * next_value - value)
        target = value + correction + discount * c[:, t] * (next_target - next_value)
        advantages.append(pg_rho[:, t] * (reward + discount * next_target - value))
        targets.append(target)
        if mask is not None:
            value, target = (
                torch.where(mask[:, t], x, carried)
                for x, carried in ((value, next_value), (target, next_target))
            )
        next_value, next_target = value, target
    if not advantages:
        return torch.zeros_like(rewards), torch.zeros_like(rewards)
    results = (torch.stack(x[::-1], 1) for x in (advantages, targets))
    return tuple(x if mask is None else torch.where(mask, x, 0.0) for x in results)
