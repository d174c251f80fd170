"""Sampling of responses: left-padded prompts, a KV cache, pure sampling at a temperature."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.models import positions


class Generated(NamedTuple):
    """Sampled `tokens` (B, T), and how many of them each row holds, `lengths` (B,), EOS included.

    Only `lengths` says where a response ends: pad may be sampled, and pad may be EOS.
    """

    tokens: Tensor
    lengths: Tensor


def suppress_eos_(logits: Tensor, eos_token_id: int, min_length: int) -> Tensor:
    """Sets the logit of EOS to -inf at the first `min_length` positions of (B, T, V), where it
    cannot be sampled. No gradient is recorded, because that of a -inf logit is 0."""
    logits.detach()[:, :min_length, eos_token_id] = -torch.inf
    return logits


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_lengths: Tensor,
    min_length: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    generator: torch.Generator,
) -> Generated:
    """Samples a response to each left-padded prompt.

    Args:
        prompt_ids, prompt_mask: (B, P); the mask is True at real tokens, the last column is real.
        max_lengths: (B,) most tokens of each response, at least 1.
        min_length: EOS is not sampled before this many tokens.
        generator: on the model's device; the same state gives the same responses.

    Rows that have ended leave the batch once half of it has, and sampling stops with the last one.
    """
    batch_size = prompt_ids.shape[0]
    longest = int(max_lengths.max())
    tokens = prompt_ids.new_full((batch_size, longest), pad_token_id)
    lengths = max_lengths.clone()
    rows = torch.arange(batch_size, device=prompt_ids.device)
    cache = DynamicCache(config=model.config)
    inputs, mask, position_ids = prompt_ids, prompt_mask, positions(prompt_mask)
    for step in range(longest):
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        if step < min_length:
            suppress_eos_(logits, eos_token_id, 1)
        probabilities = torch.softmax(logits[:, -1].float() / temperature, dim=-1)
        sampled = torch.multinomial(probabilities, 1, generator=generator)
        tokens[rows, step] = sampled[:, 0]
        ended = (sampled[:, 0] == eos_token_id) & (step < lengths[rows])
        lengths[rows] = torch.where(ended, step + 1, lengths[rows])
        alive = step + 1 < lengths[rows]
        num_alive = int(alive.sum())
        if num_alive == 0:
            break
        if num_alive <= len(rows) // 2:
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, sampled, mask, position_ids = (
                rows[keep],
                sampled[keep],
                mask[keep],
                position_ids[keep],
            )
        inputs = sampled
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    width = int(lengths.max())
    tokens = tokens[:, :width]
    beyond = torch.arange(width, device=tokens.device) >= lengths[:, None]
    return Generated(tokens.masked_fill(beyond, pad_token_id), lengths)
