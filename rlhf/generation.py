"""Sampling of responses: left-padded prompts, a KV cache, pure sampling at a temperature.

Every token is drawn with a number of its own, handed in from outside, so that a response depends
neither on the others of its batch nor on how a batch is divided.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.models import default_device, positions
from rlhf.options import ResponseOptions


class Generated(NamedTuple):
    """Sampled `tokens` (B, T), how many of them each row holds, `lengths` (B,), with the one that
    ended it, and whether it `ended` (B,) by itself rather than at its longest length.

    Only `lengths` says where a response ends: pad may be sampled, and pad may be EOS.
    """

    tokens: Tensor
    lengths: Tensor
    ended: Tensor


class Stopping:
    """What ends a response, EOS, the stop tokens and the stop strings of a configuration; and the
    token ids that a response may hold, those that the tokenizer knows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ResponseOptions):
        tokens = [_token_id(tokenizer, token) for token in config.stop_token or ()]
        self.ids = torch.tensor([tokenizer.eos_token_id, *tokens], device=default_device())
        self.min_length = config.min_response_length
        # Models often have more rows than their tokenizer has tokens.
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.strings = config.stop_strings or []
        self.tokenizer = tokenizer
        # A token that shows is a byte of text at least; those before set off the first one.
        self.window = 8 + max((len(text.encode()) for text in self.strings), default=0)

    def suppress_(self, logits: Tensor, first: int = 0) -> Tensor:
        """Sets to -inf the logits (B, T, V) of what cannot be sampled: of EOS and stop tokens at
        positions before min_response_length, and of ids that the tokenizer does not know. `first`
        is the position of logits[:, 0].

        No gradient is recorded, because that of a -inf logit is 0.
        """
        data = logits.detach()
        data[:, : max(self.min_length - first, 0), self.ids] = -torch.inf
        data[:, :, self.vocab_size :] = -torch.inf
        return logits

    def reached(self, tokens: Tensor) -> Tensor:
        """Whether the responses (B, t) end with their last token, (B,)."""
        reached = torch.isin(tokens[:, -1], self.ids)
        if self.strings and tokens.shape[1] > self.min_length:
            tail = tokens[:, -self.window :].tolist()
            texts = self.tokenizer.batch_decode(tail)
            before = self.tokenizer.batch_decode([ids[:-1] for ids in tail])
            complete = [
                any(text.rfind(stop) > earlier.rfind(stop) for stop in self.strings)
                for text, earlier in zip(texts, before, strict=True)
            ]
            reached |= torch.tensor(complete, device=tokens.device)
        return reached


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.decode(ids).strip() != token.strip():
        raise UserError(
            f"stop_token {token!r} is no token of the policy's tokenizer: put texts of several "
            "tokens into stop_strings"
        )
    return ids[0]


def sample_tokens(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Tokens (B,) of the distribution softmax(logits / temperature), logits (B, V).

    Each is where the cumulative distribution passes the row's number of `uniforms` (B,), fp64 in
    [0, 1). A token of probability 0 is never taken; V is returned where there is no distribution.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    uniforms: Tensor,
    max_lengths: Tensor,
    stopping: Stopping,
    temperature: float,
    pad_token_id: int,
) -> Generated:
    """Samples a response to each left-padded prompt.

    Args:
        prompt_ids, prompt_mask: (B, P); the mask is True at real tokens, the last column is real.
        uniforms: (B, T) fp64 in [0, 1), the numbers that draw each row's tokens.
        max_lengths: (B,) most tokens of each response, from 1 to T.

    Rows that have ended leave the batch once half of it has, and sampling stops with the last one.
    The results are inference tensors: no pass with a gradient takes them as they are.
    """
    longest = int(max_lengths.max())
    tokens = prompt_ids.new_full((len(prompt_ids), longest), pad_token_id)
    lengths = max_lengths.clone()
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    cache = DynamicCache(config=model.config)
    inputs, position_ids = prompt_ids, positions(prompt_mask)
    mask = None if prompt_mask.all() else prompt_mask
    for step in range(longest):
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        stopping.suppress_(logits, first=step)
        tokens[rows, step] = sample_tokens(logits[:, -1], temperature, uniforms[rows, step])
        ends = stopping.reached(tokens[rows, : step + 1]) & (step < lengths[rows])
        lengths[rows] = torch.where(ends, step + 1, lengths[rows])
        ended[rows] |= ends
        alive = step + 1 < lengths[rows]
        num_alive, highest = torch.stack([alive.sum(), tokens[rows, step].max()]).tolist()
        if highest == logits.shape[-1]:
            raise UserError(
                "the policy's logits are not finite, so that no token can be sampled: the model is "
                "damaged, or learning_rate too high"
            )
        if num_alive == 0:
            break
        if num_alive <= len(rows) // 2:
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, position_ids = rows[keep], position_ids[keep]
            mask = None if mask is None else mask[keep]
        inputs = tokens[rows, step : step + 1]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    width = int(lengths.max())
    tokens = tokens[:, :width]
    beyond = torch.arange(width, device=tokens.device) >= lengths[:, None]
    return Generated(tokens.masked_fill(beyond, pad_token_id), lengths, ended)
