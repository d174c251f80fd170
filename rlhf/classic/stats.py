"""The statistics of a step, under TRL's keys.

Of a minibatch of an update, averaged over all of them as `ppo/...`: `loss/{policy,value,total}`,
`policy/{entropy,approxkl,policykl,clipfrac,advantages_mean}`, `returns/{mean,var}`,
`val/{vpred,error,clipfrac,mean,var}`; and `policy/{advantages,ratio}` of each token of each
minibatch, not averaged. approxkl is the mean of (log π - log π_old)² / 2, policykl that of
log π_old - log π; val/error is the unclipped squared error.

Of a step: `objective/{kl,kl_dist,kl_coef,entropy,logprobs,ref_logprobs}`, where kl is the mean over
responses of their sums kl_dist, and entropy that of -log π; `ppo/mean_non_score_reward`,
`ppo/{mean,std}_scores`, `ppo/learning_rate` and `ppo/val/var_explained`;
`tokens/{queries,responses}_{len_mean,len_std,dist}`; and `time/ppo/{forward_pass,compute_rewards,
compute_advantages,optimize_step,calc_stats,total}` in seconds. Deviations and variances are
unbiased.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from ppo_kernels import PPOLoss, ValueLoss, kl_estimate, masked_mean
from rlhf.classic.batch import Batch

# Of these each token of each minibatch is kept.
PER_TOKEN = ("policy/advantages", "policy/ratio")


def describe_minibatch(
    batch: Batch, policy: PPOLoss, critic: ValueLoss, values: Tensor, ratio: Tensor, vf_coef: float
) -> dict[str, Tensor]:
    """What the losses, the critic's new values and the ratio say of a minibatch."""
    mask, old, new = batch.mask, batch.logprobs, policy.logprobs
    policy_loss, critic_loss = policy.policy_loss, critic.loss.detach()
    return {
        "loss/policy": policy_loss,
        "loss/value": critic_loss,
        "loss/total": policy_loss + vf_coef * critic_loss,
        "policy/entropy": policy.entropy,
        "policy/approxkl": masked_mean(kl_estimate(new, old, estimator="k2"), mask),
        "policy/policykl": masked_mean(old - new, mask),
        "policy/clipfrac": policy.clip_fraction,
        "policy/advantages": batch.advantages.flatten(),
        "policy/advantages_mean": masked_mean(batch.advantages, mask),
        "policy/ratio": ratio.flatten(),
        "returns/mean": masked_mean(batch.returns, mask),
        "returns/var": _variance(batch.returns, mask),
        "val/vpred": masked_mean(values, mask),
        "val/error": masked_mean((values - batch.returns).square(), mask),
        "val/clipfrac": critic.clip_fraction,
        "val/mean": masked_mean(batch.values, mask),
        "val/var": _variance(batch.values, mask),
    }


def describe_step(
    batch: Batch,
    scores: Tensor,
    queries: list[Tensor],
    responses: list[Tensor],
    minibatches: list[dict[str, Tensor]],
    kl_coef: float,
) -> dict[str, float | np.ndarray]:
    """All but the learning rate and the times."""
    kl_dist = batch.kls.sum(1)
    stats = {
        "objective/kl": kl_dist.mean(),
        "objective/kl_dist": kl_dist,
        "objective/logprobs": batch.logprobs,
        "objective/ref_logprobs": batch.ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -batch.logprobs.masked_fill(~batch.mask, 0).sum(1).mean(),
        "ppo/mean_non_score_reward": -kl_coef * masked_mean(batch.kls, batch.mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": deviation(scores),
    }
    if stats["objective/kl"] < -1:
        warnings.warn(
            f"objective/kl is {stats['objective/kl']:.2f}, and a KL divergence is never below 0: "
            "sample from the whole distribution, at PPOConfig.temperature (top_k=0, top_p=1, "
            "min_length=-1)",
            stacklevel=3,
        )
    for name, rows in (("queries", queries), ("responses", responses)):
        lengths = torch.tensor([float(len(row)) for row in rows])
        stats[f"tokens/{name}_len_mean"] = lengths.mean()
        stats[f"tokens/{name}_len_std"] = deviation(lengths)
        stats[f"tokens/{name}_dist"] = lengths
    for name in minibatches[0]:
        values = [minibatch[name] for minibatch in minibatches]
        stats[f"ppo/{name}"] = (
            torch.cat(values) if name in PER_TOKEN else torch.stack(values).mean()
        )
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    return {name: _plain(value) for name, value in stats.items()}


def deviation(x: Tensor) -> Tensor:
    """The unbiased standard deviation of a vector; NaN of a single number."""
    return x.std() if len(x) > 1 else torch.full((), torch.nan)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    """The unbiased variance over the mask; 0 of a single token."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask, mask.sum() - 1)


def _plain(value: float | Tensor) -> float | np.ndarray:
    if not isinstance(value, Tensor):
        return value
    return value.float().cpu().numpy() if value.dim() else value.item()
