"""Sampling from a part of the vocabulary: top-k, top-p and min-p.

The log-probs of such a policy are those over the ids that it kept when it sampled, of the policy
that learns and of the reference alike: with others the first ratio would not be 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ppo_kernels import (
    PPOLoss,
    clipped_policy_loss,
    kept_from_mask,
    kept_token_logprobs_and_entropy,
    masked_mean,
)
from rlhf.config.fields import ResponseOptions

Filter = Callable[[Tensor, Tensor], Tensor]


def make_filters(config: ResponseOptions) -> list[Filter]:
    """transformers' filters of logits (B, V), in its order: each sets what it drops to -inf."""
    filters = []
    if config.top_k:
        filters.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        filters.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        filters.append(MinPLogitsWarper(config.min_p))
    return filters


class KeptIds(NamedTuple):
    """The ids from which the tokens of a response were drawn: how many for each of its t tokens,
    `counts` (t,), and one token's after the other's, `ids`."""

    counts: Tensor
    ids: Tensor


class KeptLog:
    """Collects, token by token, what responses were drawn from."""

    def __init__(self):
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, rows: Tensor, logits: Tensor) -> None:
        """Notes the next token of the responses `rows` (R,): what the filtered logits (R, V) have
        left."""
        ids, offsets = kept_from_mask(logits > -torch.inf)
        self.steps.append((rows, offsets.diff(), ids.int()))

    def responses(self, count: int) -> list[KeptIds]:
        """Collects, for each of `count` responses, what all its tokens were drawn from."""
        rows, counts, ids = (torch.cat(part) for part in zip(*self.steps, strict=True))
        order = rows.repeat_interleave(counts).argsort(stable=True)
        per_row = counts[rows.argsort(stable=True)].split(rows.bincount(minlength=count).tolist())
        totals = [int(row.sum()) for row in per_row]
        return [KeptIds(*pair) for pair in zip(per_row, ids[order].split(totals), strict=True)]


class KeptTokenLogits(NamedTuple):
    """`TokenLogits` of tokens that were drawn from a part of the vocabulary: K `ids`, of which
    token i, row after row, has those from offsets[i] to offsets[i + 1]. The mask (B, T) is True at
    the tokens of a response."""

    logits: Tensor
    ids: Tensor
    offsets: Tensor
    mask: Tensor

    @classmethod
    def of(cls, logits: Tensor, mask: Tensor, kept: list[KeptIds]) -> "KeptTokenLogits":
        counts = pad_sequence([row.counts for row in kept], batch_first=True)
        missing = mask.shape[1] - counts.shape[1]
        counts = torch.nn.functional.pad(counts, (0, missing)).reshape(-1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(logits, torch.cat([row.ids for row in kept]), offsets, mask)

    def logprobs_and_entropy(self, tokens: Tensor, **options) -> tuple[Tensor, Tensor]:
        return kept_token_logprobs_and_entropy(
            self.logits, tokens, self.ids, self.offsets, self.mask, **options
        )

    def logprobs(self, tokens: Tensor, **options) -> Tensor:
        return self.logprobs_and_entropy(tokens, **options)[0]

    def ppo_loss(
        self,
        tokens: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        entropy_coef: float,
        temperature: float,
        denominator: Tensor,
        **clipping,
    ) -> PPOLoss:
        logprobs, token_entropy = self.logprobs_and_entropy(tokens, temperature=temperature)
        policy = clipped_policy_loss(
            logprobs, old_logprobs, advantages, mask, denominator=denominator, **clipping
        )
        entropy = masked_mean(token_entropy, mask, denominator)
        return PPOLoss(
            loss=policy.loss - entropy_coef * entropy,
            policy_loss=policy.loss.detach(),
            entropy=entropy.detach(),
            kl=torch.zeros_like(entropy.detach()),
            approx_kl=policy.approx_kl,
            clip_fraction=policy.clip_fraction,
            logprobs=logprobs.detach(),
            token_entropy=token_entropy.detach(),
        )
