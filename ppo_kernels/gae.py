r"""Advantages and value targets, scanned backwards over time; formulas stand at the functions.

With numbers for γ and λ the kernel of `gae` takes everything as it is. Otherwise, and for `vtrace`,
what is no recursion is plain PyTorch: the value of the next counted token, the temporal difference
of it; and the recursion is `discounted_sums`, of tensors x and c: S_t = x_t + c_t S_{t+1}.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels import checks, reference, reference_gae
from ppo_kernels.dispatch import kernels, resolve, scalars
from ppo_kernels.logprobs import within
from ppo_kernels.schemas import promoted, result_dtype


class AdvantagesAndReturns(NamedTuple):
    """Both of the shape of `rewards`, fp32 (fp64 where an input is), without gradient."""

    advantages: Tensor
    returns: Tensor


def _check(rewards, values, mask, gamma, lam, dones, bootstrap_values, rows):
    """(gamma, lam): numbers or tensors."""
    checks.per_token("values", values, "rewards", rewards)
    checks.boolean("mask", mask, "rewards", rewards)
    checks.boolean("dones", dones, "rewards", rewards)
    if bootstrap_values is not None:
        checks.floating("bootstrap_values", bootstrap_values)
        checks.same("bootstrap_values", bootstrap_values, "the rows", (rows,), rewards.device)
    return tuple(
        checks.decay(name, x, rewards, rows, mask) for name, x in (("gamma", gamma), ("lam", lam))
    )


def _of_tokens(x, shape, trajectory=None):
    """A number as it is; a tensor of one, or one per row, as one of each token."""
    if not isinstance(x, torch.Tensor) or x.shape == shape:
        return x
    if x.ndim == 0:
        return x.expand(shape)
    return x.unsqueeze(1).expand(shape) if trajectory is None else x[trajectory]


class _Next:
    """Successors of positions (..., T): the next that counts, the value beyond, or a done.

    last: (T,) where trajectories end that are laid end to end; None where only rows end.
    """

    def __init__(self, like, mask, dones, last):
        length = like.shape[-1]
        t = torch.arange(length, device=like.device)
        later = t if mask is None else _first_from(mask, t)
        self.at = torch.nn.functional.pad(later[..., 1:], (0, 1), value=length)
        ends = length if last is None else _first_from(last, t) + 1
        self.beyond = self.at >= ends
        self.cut = None if dones is None else _first_from(dones, t) < self.at.clamp(max=ends)
        self.at = self.at.clamp(max=length - 1).expand(like.shape)

    def of(self, values, beyond):
        """V of the successors, from values (..., T) and those beyond the last (..., 1 or T)."""
        following = torch.where(self.beyond, beyond, values.gather(-1, self.at))
        return following if self.cut is None else torch.where(self.cut, 0.0, following)


def _first_from(marked, t):
    """The first position marked (..., T) from each one on, T where there is none."""
    positions = torch.where(marked, t, t.shape[0])
    return positions.flip(-1).cummin(-1).values.flip(-1)


def discounted_sums(
    backend: str,
    x: Tensor,
    decays: Tensor,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """S_t = x_t + decay_t S_{t+1} over rows (B, T), or over trajectories (N,) laid end to end.

    A masked-out position gets 0 and hands S on, a done token starts from 0.
    """
    if backend == "reference":
        return reference_gae.discounted_sums(x, decays, mask, dones, cu_seqlens)
    return kernels(backend).discounted_sums(x, decays, mask, dones, cu_seqlens)


def _from_tensors(
    backend, rewards, values, mask, gamma, lam, dones, beyond, cu_seqlens=None, last=None
):
    following = _Next(rewards, mask, dones, last).of(values, beyond)
    delta = rewards + gamma * following - values
    decays = (gamma * lam).expand(delta.shape)
    advantages = discounted_sums(backend, delta, decays, mask, dones, cu_seqlens)
    return advantages, within(mask, advantages + values)


def _in_one_dtype(*tensors):
    """In fp64 where one of them is, else fp32, and without gradient; numbers and None stay."""
    dtype = result_dtype(*(x for x in tensors if isinstance(x, torch.Tensor)))
    return [x.detach().to(dtype) if isinstance(x, torch.Tensor) else x for x in tensors]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    backend: str = "auto",
) -> AdvantagesAndReturns:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438), backwards::

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γ λ A_{t+1}        return_t = A_t + V_t

    A done token starts from V_{t+1} = A_{t+1} = 0, chosen by selection, so that nothing non-finite
    crosses it, wherever it stands. Otherwise a masked-out position hands V_{t+1} and A_{t+1} on
    unchanged. It gets 0.

    Args:
        rewards, values: (B, T) floating.
        mask: (B, T) bool, True = counts; None counts all. Rewards elsewhere are dropped.
        gamma, lam: discount γ and decay λ, in [0, 1]: numbers, or tensors (B,) of one per row or
            (B, T) of one per token, the γ_t and λ_t of the formula.
        dones: (B, T) bool, True where a trajectory ends with this token, whether or not it counts.
        bootstrap_values: (B,) value after the last counted token of a row; 0 when None.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        AdvantagesAndReturns of (B, T).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value; what a tensor of gamma
            or lam holds is looked at on the CPU only.
    """
    checks.floating("rewards", rewards)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape (B, T), got {tuple(rewards.shape)}")
    rows = rewards.shape[0]
    gamma, lam = _check(rewards, values, mask, gamma, lam, dones, bootstrap_values, rows)
    rewards = promoted(rewards, bootstrap_values)
    backend = resolve(backend, rewards)
    of_tensors = isinstance(gamma, torch.Tensor) or isinstance(lam, torch.Tensor)
    if of_tensors:
        gamma, lam = (_of_tokens(x, rewards.shape) for x in (gamma, lam))
        rewards, values, gamma, lam, bootstrap_values = _in_one_dtype(
            rewards, values, gamma, lam, bootstrap_values
        )
    if backend == "reference":
        result = reference_gae.gae(
            rewards,
            values,
            mask,
            gamma=gamma,
            lam=lam,
            dones=dones,
            bootstrap_values=bootstrap_values,
        )
    elif of_tensors:
        beyond = 0.0 if bootstrap_values is None else bootstrap_values.unsqueeze(1)
        result = _from_tensors(backend, rewards, values, mask, gamma, lam, dones, beyond)
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
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    backend: str = "auto",
) -> AdvantagesAndReturns:
    """`gae` on trajectories laid end to end, without padding.

    Args:
        rewards, values: (N,) floating, B trajectories one after the other.
        cu_seqlens: (B + 1,) int32 or int64, 0 = first ≤ … ≤ last = N: trajectory i is
            [cu_seqlens[i], cu_seqlens[i + 1]); empty ones are allowed. On a GPU nobody looks: other
            values give undefined results, from within `rewards` and `values`.
        mask, dones: (N,) bool.
        gamma, lam: in [0, 1]: numbers, or tensors (N,) of one per token or (B,) of one per
            trajectory; of as many tokens as trajectories they are the tokens'.
        bootstrap_values: (B,) value after the last counted token; 0 when None.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        AdvantagesAndReturns of (N,).

    Raises:
        TypeError, ValueError: as `gae`.
    """
    checks.floating("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have shape (N,), got {tuple(rewards.shape)}")
    checks.boundaries("cu_seqlens", cu_seqlens, rewards)
    rows = cu_seqlens.shape[0] - 1
    gamma, lam = _check(rewards, values, mask, gamma, lam, dones, bootstrap_values, rows)
    rewards = promoted(rewards, bootstrap_values)
    backend = resolve(backend, rewards)
    of_tensors = isinstance(gamma, torch.Tensor) or isinstance(lam, torch.Tensor)
    if of_tensors:
        trajectory, last = reference_gae.trajectories(cu_seqlens, rewards.shape[0])
        gamma, lam = (_of_tokens(x, rewards.shape, trajectory) for x in (gamma, lam))
        rewards, values, gamma, lam, bootstrap_values = _in_one_dtype(
            rewards, values, gamma, lam, bootstrap_values
        )
    if backend == "reference":
        result = reference_gae.gae_packed(
            rewards,
            values,
            cu_seqlens,
            mask,
            gamma=gamma,
            lam=lam,
            dones=dones,
            bootstrap_values=bootstrap_values,
        )
    elif of_tensors:
        beyond = 0.0 if bootstrap_values is None else bootstrap_values[trajectory]
        result = _from_tensors(
            *(backend, rewards, values, mask, gamma, lam, dones, beyond, cu_seqlens, last)
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


def vtrace(
    log_rhos: Tensor,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor,
    lam: float | Tensor = 1.0,
    clip_rho_threshold: float = 1.0,
    clip_c_threshold: float = 1.0,
    clip_pg_rho_threshold: float = 1.0,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    backend: str = "auto",
) -> AdvantagesAndReturns:
    """V-trace, off-policy targets (Espeholt et al., 2018, IMPALA, arXiv:1802.01561), backwards::

        ρ_t = min(ρ̄, π/μ)      c_t = λ min(c̄, π/μ)      δ_t = ρ_t (r_t + γ V_{t+1} - V_t)
        v_t = V_t + δ_t + γ c_t (v_{t+1} - V_{t+1})
        A_t = min(ρ̄_pg, π/μ) (r_t + γ v_{t+1} - V_t)

    for actions of μ and their policy π. With π = μ and thresholds of 1 or more, v is the return of
    `gae`. Masks and dones are those of `gae`; after the last counted token V and v are the
    bootstrap value.

    Args:
        log_rhos: (B, T) log π - log μ of the actions taken.
        rewards, values, mask, dones, bootstrap_values, backend: as in `gae`.
        gamma, lam: γ and λ as in `gae`.
        clip_rho_threshold, clip_c_threshold, clip_pg_rho_threshold: ρ̄, c̄ and ρ̄_pg, > 0; may be inf.

    Returns:
        AdvantagesAndReturns of (B, T): A, for the policy's gradient, and the value targets v.

    Raises:
        TypeError, ValueError: as `gae`; on the CPU also a counted log_rho that is not finite. The
            ratio counts as e^80 beyond that.
    """
    checks.floating("rewards", rewards)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape (B, T), got {tuple(rewards.shape)}")
    checks.per_token("log_rhos", log_rhos, "rewards", rewards)
    rows = rewards.shape[0]
    gamma, lam = _check(rewards, values, mask, gamma, lam, dones, bootstrap_values, rows)
    thresholds = (
        checks.number(name, x, above=0, finite=False)
        for name, x in (
            ("clip_rho_threshold", clip_rho_threshold),
            ("clip_c_threshold", clip_c_threshold),
            ("clip_pg_rho_threshold", clip_pg_rho_threshold),
        )
    )
    backend = resolve(backend, rewards)
    gamma, lam = (_of_tokens(x, rewards.shape) for x in (gamma, lam))
    log_rhos, rewards, values, gamma, lam, bootstrap_values = _in_one_dtype(
        log_rhos, rewards, values, gamma, lam, bootstrap_values
    )
    log_rhos = within(mask, log_rhos)
    checks.refuse_infinite(mask, log_rhos=log_rhos)
    ratio = reference.bounded(log_rhos).exp()
    # Products: `clamp` would compile anew for each number.
    rho, c, pg_rho = (ratio.minimum(ratio.new_ones(()) * x) for x in thresholds)
    c = lam * c
    if backend == "reference":
        return AdvantagesAndReturns(
            *reference_gae.vtrace(
                rho, c, pg_rho, rewards, values, mask, gamma, dones, bootstrap_values
            )
        )
    beyond = 0.0 if bootstrap_values is None else bootstrap_values.unsqueeze(1)
    following = _Next(rewards, mask, dones, None)
    delta = rho * (rewards + gamma * following.of(values, beyond) - values)
    targets = values + discounted_sums(backend, delta, gamma * c, mask, dones)
    advantages = pg_rho * (rewards + gamma * following.of(targets, beyond) - values)
    return AdvantagesAndReturns(within(mask, advantages), within(mask, targets))
