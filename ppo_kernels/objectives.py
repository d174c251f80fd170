r"""Policy objectives on log-probs of sequences, and how they are averaged: plain PyTorch.

With r = exp(logprob - old_logprob) and advantage A, per counted token, to be minimised::

    ppo         max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))          arXiv:1707.06347
    dual_clip   that, and at most -A c where A < 0                          arXiv:1912.09729
    dapo        ppo with clip_high > clip_low                               arXiv:2503.14476
    gspo        ppo with r_t = sg(s) r'_t, where s = exp(mean of log r over the sequence) and
                r'_t = π / sg(π) = 1, which carries the gradient            arXiv:2507.18071
    cispo       -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprob         arXiv:2506.13585
    tis         ppo with A min(exp(old_logprob - rollout_logprob), cap)

where sg stops the gradient. They are averaged over the counted positions of x (B, T)::

    token_mean          Σ x / number of tokens                    DAPO, arXiv:2503.14476
    sequence_mean       Σ_b mean_t x / number of sequences        GRPO, arXiv:2402.03300
    fixed_length_mean   Σ x / (number of sequences · length)      Dr. GRPO, arXiv:2503.20783

A sequence in which nothing counts is none. Every objective takes::

    logprobs      (B, T) of the policy in training, in nats, differentiable
    old_logprobs  (B, T) of the policy before the update, a constant
    advantages    (B, T), or (B,) one per sequence, a constant
    mask          (B, T) bool, True = counts; None counts all; what else is there may be anything
    importance_weights
                  (B, T) or (B,), at least 0, a constant: factors of the policy's loss per token
    aggregate     a function of (x, mask): one of those above, or `functools.partial` of it with a
                  denominator, such as the global count for gradient accumulation; it is given
                  finite x also where the mask is False

and gives PolicyLoss, fp32 (fp64 for fp64 input): the loss, the k3 estimate of KL(old || new) per
token and the share of tokens where clipping acts, all three averaged by `aggregate`. Log-ratios are
bounded at ±80, beyond which their gradient is 0. Errors are TypeError or ValueError naming
argument, rule and value, on the CPU also for a counted token whose log-prob or advantage is not
finite.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ppo_kernels import checks, reference, schemas
from ppo_kernels.masked import masked_mean
from ppo_kernels.token_losses import PolicyLoss


def token_mean(
    x: Tensor, mask: Tensor | None = None, *, denominator: float | Tensor | None = None
) -> Tensor:
    """Sum over counted positions of x (B, T) / `denominator`, default the number of them."""
    return masked_mean(x, mask, denominator, backend="reference")


def sequence_mean(
    x: Tensor, mask: Tensor | None = None, *, denominator: float | Tensor | None = None
) -> Tensor:
    """Sum over sequences of the mean over their counted positions / `denominator`, default the
    number of sequences with any."""
    counts = _counted(x, mask).sum(1)
    means = _sums(x, mask) / counts.clamp(min=1)
    return masked_mean(means, counts > 0, denominator, backend="reference")


def fixed_length_mean(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    length: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Sum over counted positions of x (B, T) / (length · denominator), default the number of
    sequences with any; `length` is one for all batches, as the longest response allowed."""
    length = checks.number("length", length, above=0)
    sums, any_counted = _sums(x, mask), _counted(x, mask).any(1)
    return masked_mean(sums / length, any_counted, denominator, backend="reference")


def _counted(x, mask):
    checks.floating("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (B, T), got {tuple(x.shape)}")
    mask = checks.boolean("mask", mask, "x", x)
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask


def _sums(x, mask):
    dtype = schemas.result_dtype(x)
    return torch.where(_counted(x, mask), x, 0.0).sum(1, dtype=dtype)


def _checked(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    importance_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log r, A, mask), the first two (B, T) and 0 where masked out."""
    checks.floating("logprobs", logprobs)
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs must have shape (B, T), got {tuple(logprobs.shape)}")
    checks.per_token("old_logprobs", old_logprobs, "logprobs", logprobs)
    mask = checks.boolean("mask", mask, "logprobs", logprobs)
    advantages = checks.advantages(advantages, importance_weights, mask, "logprobs", logprobs)
    checks.refuse_infinite(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    logprobs = schemas.promoted(logprobs, old_logprobs, advantages)
    log_ratio = reference.log_ratio(logprobs, old_logprobs)
    advantages = advantages.to(log_ratio.dtype)
    if mask is not None:
        log_ratio, advantages = (x.masked_fill(~mask, 0.0) for x in (log_ratio, advantages))
    return reference.bounded(log_ratio), advantages, mask


def _clipped(log_ratio, advantages, mask, aggregate, clip_low, clip_high, dual_clip=None):
    clipping = checks.clip_range(clip_low, clip_high, dual_clip)
    terms = reference.policy_terms(log_ratio, advantages, None, *clipping)
    return PolicyLoss(*(aggregate(x, mask) for x in terms))


def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    aggregate: Callable[..., Tensor] = token_mean,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """The clipped surrogate (Schulman et al., 2017), as `clipped_policy_loss`; see the module."""
    inputs = _checked(logprobs, old_logprobs, advantages, mask, importance_weights)
    return _clipped(*inputs, aggregate, clip_low, clip_high)


def dual_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    aggregate: Callable[..., Tensor] = token_mean,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    bound: float = 3.0,
) -> PolicyLoss:
    """`ppo` whose loss is at most -A `bound`, > 1, where A < 0 (Ye et al., 2020)."""
    inputs = _checked(logprobs, old_logprobs, advantages, mask, importance_weights)
    return _clipped(*inputs, aggregate, clip_low, clip_high, bound)


def dapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    aggregate: Callable[..., Tensor] = token_mean,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> PolicyLoss:
    """`ppo` with the upper clip raised, clip-higher (Yu et al., 2025, DAPO)."""
    inputs = _checked(logprobs, old_logprobs, advantages, mask, importance_weights)
    return _clipped(*inputs, aggregate, clip_low, clip_high)


def _sequence_log_ratio(log_ratio, mask):
    """The mean over a sequence's counted tokens at each of them, with the gradient of its own."""
    with torch.no_grad():
        counts = _counted(log_ratio, mask).sum(1, keepdim=True)
        means = _sums(log_ratio, mask).unsqueeze(1) / counts.clamp(min=1)
    return means + (log_ratio - log_ratio.detach())


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    aggregate: Callable[..., Tensor] = sequence_mean,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """The ratio of whole sequences, to the power of 1 / length (Zheng et al., 2025, GSPO).

    This is the paper's GSPO-token: with one advantage per sequence its value and gradient are those
    of GSPO, and it allows for one per token.
    """
    log_ratio, advantages, mask = _checked(
        logprobs, old_logprobs, advantages, mask, importance_weights
    )
    of_sequence = _sequence_log_ratio(log_ratio, mask)
    loss = _clipped(of_sequence, advantages, mask, aggregate, clip_low, clip_high)
    return loss._replace(approx_kl=aggregate(_approx_kl(log_ratio), mask))


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    importance_weights: Tensor | None = None,
    aggregate: Callable[..., Tensor] = token_mean,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> PolicyLoss:
    """REINFORCE weighted by a clipped, constant ratio (MiniMax, 2025, CISPO): no token is dropped.

    The paper has no lower bound, which is clip_low=1, and leaves clip_high to tuning; a ratio of
    at most 5 is that of ScaleRL (Khatri et al., 2025, arXiv:2510.13786).
    """
    clip_low, clip_high, _ = checks.clip_range(clip_low, clip_high, None)
    log_ratio, advantages, mask = _checked(
        logprobs, old_logprobs, advantages, mask, importance_weights
    )
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if mask is not None:
        logprobs = logprobs.masked_fill(~mask, 0.0)
    terms = (
        -weight * advantages * logprobs,
        _approx_kl(log_ratio),
        (weight != ratio).to(ratio.dtype),
    )
    return PolicyLoss(*(aggregate(x, mask) for x in terms))


def tis(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    rollout_logprobs: Tensor,
    importance_weights: Tensor | None = None,
    aggregate: Callable[..., Tensor] = token_mean,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cap: float = 2.0,
) -> PolicyLoss:
    """`ppo` for tokens that another engine sampled: truncated importance sampling.

    `rollout_logprobs` (B, T) are those of the sampler, such as vLLM; `old_logprobs` those that the
    trainer gives the same weights. A token's loss is weighted by min(exp(old - rollout), cap)
    (Yao et al., 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training";
    the truncation is that of IMPALA, Espeholt et al., 2018, arXiv:1802.01561).
    """
    checks.floating("logprobs", logprobs)
    checks.per_token("rollout_logprobs", rollout_logprobs, "logprobs", logprobs)
    cap = checks.number("cap", cap, above=0)
    logprobs = schemas.promoted(logprobs, rollout_logprobs)
    log_ratio, advantages, mask = _checked(
        logprobs, old_logprobs, advantages, mask, importance_weights
    )
    checks.refuse_infinite(mask, rollout_logprobs=rollout_logprobs)
    log_weight = reference.log_ratio(old_logprobs.detach().to(log_ratio.dtype), rollout_logprobs)
    if mask is not None:
        log_weight = log_weight.masked_fill(~mask, 0.0)
    weight = reference.bounded(log_weight).clamp(max=math.log(cap)).exp()
    return _clipped(log_ratio, advantages * weight, mask, aggregate, clip_low, clip_high)


def _approx_kl(log_ratio):
    log_ratio = log_ratio.detach()
    return reference.kl_estimate(torch.zeros_like(log_ratio), log_ratio, estimator="k3")


AGGREGATIONS = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "fixed_length_mean": fixed_length_mean,
}
OBJECTIVES = {
    "ppo": ppo,
    "dual_clip": dual_clip,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "tis": tis,
}
