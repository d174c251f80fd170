"""Responses of the policy, and what PPO needs of them. Alignment happens here and only here.

A row is a left-padded prompt followed by a right-padded response. The logits (and the value) at
one position belong to the token at the next, so those of response token t are at P + t - 1: the
last T positions of a pass over all but the last token. From here on index t means response token t.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels import kl_estimate, token_logprobs, token_logprobs_and_entropy
from rlhf.config import PPOConfig
from rlhf.data import pad
from rlhf.generation import generate, suppress_eos_
from rlhf.models import (
    autocast,
    normalise_scores,
    positions,
    sequence_scores,
    token_values,
)


class Responses(NamedTuple):
    """Prompts (B, P), padded on the left, and their responses (B, T), padded on the right.

    The masks are True at real tokens; that of the responses counts every sampled token, whatever
    its id.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor

    def by_length(self, index: Tensor, size: int) -> Iterator[tuple[Tensor, "Responses"]]:
        """`index` cut into parts of `size` rows, rows of similar length together; with each part
        its responses, without the columns in which all of them are padded.

        Waits for the device once, for all widths: the parts can then be queued without a pause.
        """
        lengths = torch.stack([self.prompt_mask[index].sum(1), self.mask[index].sum(1)])
        order = lengths.sum(0).argsort(descending=True, stable=True)
        parts = order.split(size)
        widths = torch.stack([lengths[:, part].amax(1) for part in parts]).tolist()
        for part, (prompt_width, width) in zip(parts, widths, strict=True):
            rows = index[part]
            prompt_ids, prompt_mask = (x[rows, -prompt_width:] for x in self[:2])
            tokens, mask = (x[rows, :width] for x in self[2:])
            yield rows, Responses(prompt_ids, prompt_mask, tokens, mask)

    @property
    def input_ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.tokens], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.mask], dim=1)


class Experience(NamedTuple):
    """What the four models say of the responses: `scores` (B,), normalised; the rest (B, T)."""

    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor


def sample_responses(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: PPOConfig,
    generator: torch.Generator,
) -> Responses:
    """Responses to tokenized prompts."""
    device = policy.device
    prompt_ids, prompt_mask = (x.to(device) for x in pad(prompts, tokenizer.pad_token_id, "left"))
    max_lengths = torch.full((len(prompts),), config.response_length, device=device)
    if config.sample_response_length:
        shortest = max(config.min_response_length, 1)
        max_lengths.random_(shortest, config.response_length + 1, generator=generator)
    tokens = prompt_ids.new_full((len(prompts), config.response_length), tokenizer.pad_token_id)
    lengths = torch.empty_like(max_lengths)
    for rows in torch.arange(len(prompts), device=device).split(config.per_device_eval_batch_size):
        with autocast(config.bf16):
            generated = generate(
                policy,
                prompt_ids[rows],
                prompt_mask[rows],
                max_lengths=max_lengths[rows],
                min_length=config.min_response_length,
                temperature=config.temperature,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                generator=generator,
            )
        tokens[rows, : generated.tokens.shape[1]] = generated.tokens
        lengths[rows] = generated.lengths
    mask = torch.arange(config.response_length, device=device) < lengths[:, None]
    return Responses(prompt_ids, prompt_mask, tokens, mask)


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: Responses) -> list[str]:
    """The responses as texts, without special tokens."""
    rows = [row[mask].tolist() for row, mask in zip(responses.tokens, responses.mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def ended_with_eos(responses: Responses, eos_token_id: int) -> Tensor:
    """Whether the last sampled token is EOS, (B,)."""
    last = responses.mask.sum(1, keepdim=True) - 1
    return responses.tokens.gather(1, last)[:, 0] == eos_token_id


def response_logits(
    model: PreTrainedModel, responses: Responses, eos_token_id: int, min_length: int
) -> Tensor:
    """Logits (B, T, V) that score the response tokens, with EOS suppressed as in sampling."""
    mask = responses.attention_mask[:, :-1]
    logits = model(
        input_ids=responses.input_ids[:, :-1],
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=responses.tokens.shape[1],
    ).logits
    return suppress_eos_(logits, eos_token_id, min_length)


def response_values(critic: PreTrainedModel, responses: Responses) -> Tensor:
    """Values (B, T) of the states in which the response tokens were chosen."""
    values = token_values(critic, responses.input_ids[:, :-1], responses.attention_mask[:, :-1])
    return values[:, -responses.tokens.shape[1] :]


@torch.no_grad()
def evaluate_responses(
    responses: Responses,
    *,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: PreTrainedModel,
    reward_model: PreTrainedModel,
    eos_token_id: int,
    config: PPOConfig,
) -> Experience:
    """One pass of each model over the responses; per-token results are 0 where masked out."""
    shape, device = responses.tokens.shape, responses.tokens.device
    scores = torch.zeros(shape[0], device=device)
    logprobs, ref_logprobs, entropy, values = torch.zeros(4, *shape, device=device).unbind()
    rows = torch.arange(shape[0], device=device)
    for index, part in responses.by_length(rows, config.per_device_eval_batch_size):
        width = part.tokens.shape[1]
        with autocast(config.bf16):
            logits = response_logits(policy, part, eos_token_id, config.min_response_length)
            policy_part = token_logprobs_and_entropy(
                logits, part.tokens, temperature=config.temperature
            )
            logits = response_logits(reference, part, eos_token_id, config.min_response_length)
            ref_part = token_logprobs(logits, part.tokens, temperature=config.temperature)
            values_part = response_values(critic, part)
            scores[index] = sequence_scores(reward_model, part.input_ids, part.attention_mask)
        logprobs[index, :width] = policy_part.logprobs.masked_fill(~part.mask, 0)
        entropy[index, :width] = policy_part.entropy.masked_fill(~part.mask, 0)
        ref_logprobs[index, :width] = ref_part.masked_fill(~part.mask, 0)
        values[index, :width] = values_part.masked_fill(~part.mask, 0)
    scores = normalise_scores(reward_model, scores)
    return Experience(scores, logprobs, ref_logprobs, entropy, values)


def shaped_scores(scores: Tensor, ended: Tensor, config: PPOConfig) -> Tensor:
    """Scores (B,) as they enter the reward: clipped, less the penalty where EOS is missing."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    return torch.where(ended, scores, scores - config.missing_eos_penalty)


def token_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """r_t = -kl_coef * (log π - log π_ref), plus the score at the last token; (B, T).

    (Ziegler et al., 2019, arXiv:1909.08593; the k1 estimate of the KL divergence.)
    """
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, estimator="k1")
    last = mask.sum(1, keepdim=True) - 1
    return rewards.masked_fill(~mask, 0).scatter_add(1, last, scores[:, None])
