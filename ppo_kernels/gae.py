r"""Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438), scanned backwards::

    δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γ λ A_{t+1}        return_t = A_t + V_t

A done token starts from V_{t+1} = A_{t+1} = 0, chosen by selection, so that nothing non-finite
crosses it; it cuts also where it is masked out. Otherwise a masked-out position hands V_{t+1} and
A_{t+1} on unchanged. It gets 0, and a reward there is dropped.
"""

from typing import NamedTuple

import torch

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import kernels, resolve, scalars
from ppo_kernels.schemas import promoted


class AdvantagesAndReturns(NamedTuple):
    """Both of the shape of `rewards`, fp32 (fp64 where an input is), without gradient."""

    advantages: torch.Tensor
    returns: torch.Tensor


def _check(rewards, values, mask, gamma, lam, dones, bootstrap_values, rows):
    checks.per_token("values", values, "rewards", rewards)
    checks.boolean("mask", mask, "rewards", rewards)
    checks.boolean("dones", dones, "rewards", rewards)
    checks.number("gamma", gamma, at_least=0, at_most=1)
    checks.number("lam", lam, at_least=0, at_most=1)
    if bootstrap_values is not None:
        checks.floating("bootstrap_values", bootstrap_values)
        checks.same("bootstrap_values", bootstrap_values, "the rows", (rows,), rewards.device)


def gae(
    rewards,
    values,
    mask=None,
    *,
    gamma,
    lam,
    dones=None,
    bootstrap_values=None,
    backend="auto",
):
    """Advantages and returns of a batch of trajectories; see the module for the formula.

    Args:
        rewards, values: (B, T) floating.
        mask: (B, T) bool, True = counts; None counts all. Rewards elsewhere are dropped.
        gamma, lam: discount γ and decay λ, in [0, 1].
        dones: (B, T) bool, True where a trajectory ends with this token, whether or not it counts.
        bootstrap_values: (B,) value after the last counted token of a row; 0 when None.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        AdvantagesAndReturns of (B, T).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("rewards", rewards)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape (B, T), got {tuple(rewards.shape)}")
    _check(rewards, values, mask, gamma, lam, dones, bootstrap_values, rewards.shape[0])
    rewards = promoted(rewards, bootstrap_values)
    backend = resolve(backend, rewards)
    if backend == "reference":
        result = reference.gae(
            rewards,
            values,
            mask,
            gamma=gamma,
            lam=lam,
            dones=dones,
            bootstrap_values=bootstrap_values,
        )
    else:
        result = kernels(backend).gae(
            rewards.detach(),
            values.detach(),
            mask,
            dones,
            _detach(bootstrap_values),
            scalars(gamma, lam),
        )
    return AdvantagesAndReturns(*result)


def gae_packed(
    rewards,
    values,
    cu_seqlens,
    mask=None,
    *,
    gamma,
    lam,
    dones=None,
    bootstrap_values=None,
    backend="auto",
):
    """`gae` on trajectories laid end to end, without padding.

    Args:
        rewards, values: (N,) floating, B trajectories one after the other.
        cu_seqlens: (B + 1,) int32 or int64, 0 = first ≤ … ≤ last = N: trajectory i is
            [cu_seqlens[i], cu_seqlens[i + 1]); empty ones are allowed. On a GPU nobody looks: other
            values give undefined results, from within `rewards` and `values`.
        mask, dones: (N,) bool.
        gamma, lam: in [0, 1].
        bootstrap_values: (B,) value after the last counted token; 0 when None.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        AdvantagesAndReturns of (N,).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have shape (N,), got {tuple(rewards.shape)}")
    checks.boundaries("cu_seqlens", cu_seqlens, rewards)
    rows = cu_seqlens.shape[0] - 1
    _check(rewards, values, mask, gamma, lam, dones, bootstrap_values, rows)
    rewards = promoted(rewards, bootstrap_values)
    backend = resolve(backend, rewards)
    if backend == "reference":
        result = reference.gae_packed(
            rewards,
            values,
            cu_seqlens,
            mask,
            gamma=gamma,
            lam=lam,
            dones=dones,
            bootstrap_values=bootstrap_values,
        )
    else:
        result = kernels(backend).gae_packed(
            rewards.detach(),
            values.detach(),
            cu_seqlens,
            mask,
            dones,
            _detach(bootstrap_values),
            scalars(gamma, lam),
        )
    return AdvantagesAndReturns(*result)


def _detach(x):
    return None if x is None else x.detach()
