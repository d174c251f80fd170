"""Sampling of responses: left-padded prompts, a KV cache, sampling at a temperature.

Every token is drawn with a number of its own, handed in from outside, so that a response depends
neither on the others of its batch nor on how a batch is divided.
"""

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import ppo_kernels
from rlhf.config.fields import ResponseOptions
from rlhf.errors import UserError
from rlhf.models.passes import default_device, positions
from rlhf.models.truncation import Filter, KeptIds, KeptLog

# The names of a cache in the signatures of models, the newest first.
CACHES = ("cache", "past_key_values", "cache_params")


class Decoding(NamedTuple):
    """Way of sampling from a model: the keyword of its cache, None if each step reads the whole
    sequence; whether a step with a cache takes the mask of all tokens so far (state-space models
    take none); and whether rows that have ended can leave a batch."""

    cache: str | None
    masks_steps: bool = True
    drops_rows: bool = True


class Generated(NamedTuple):
    """Sampled `tokens` (B, T), how many of them each row holds, `lengths` (B,), with the one that
    ended it, and whether it `ended` (B,) by itself rather than at its longest length.

    Only `lengths` says where a response ends: pad may be sampled, and pad may be EOS. `kept`, if
    asked for, has what each row was drawn from.
    """

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    kept: list[KeptIds] | None = None


class Stopping:
    """What ends a response, EOS, the stop tokens and the stop strings of a configuration; and the
    token ids that a response may hold, those that the tokenizer knows.

    EOS is the tokenizer's, and those of the model's generation_config, of which chat models often
    have several.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ResponseOptions,
        generation_config: GenerationConfig | None = None,
    ):
        # Models often have more rows than their tokenizer has tokens.
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        ends = getattr(generation_config, "eos_token_id", None)
        ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
        # A default of the model's kind may be no token of this tokenizer.
        ends = [token for token in ends if token < self.vocab_size]
        tokens = [_token_id(tokenizer, token) for token in config.stop_token or ()]
        ids = dict.fromkeys([tokenizer.eos_token_id, *ends, *tokens])
        self.ids = torch.tensor(list(ids), device=default_device())
        self.min_length = config.min_response_length
        self.strings = config.stop_strings or []
        self.tokenizer = tokenizer
        # A token that shows is a byte of text at least; those before set off the first one.
        self.window = 8 + max((len(text.encode()) for text in self.strings), default=0)

    def describe(self) -> str:
        names = self.tokenizer.convert_ids_to_tokens(self.ids.tolist())
        return f"a response ends with {', '.join(map(repr, [*names, *self.strings]))}"

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
        """Tells whether the responses (B, t) end with their last token, (B,)."""
        reached = torch.isin(tokens[:, -1], self.ids)
        if self.strings and tokens.shape[1] > self.min_length:
            tail = tokens[:, -self.window :].tolist()
            texts, before = (
                self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
                for rows in (tail, [ids[:-1] for ids in tail])
            )
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


NOT_FINITE = (
    "the policy's logits are not finite, so that no token can be sampled: the model is damaged, or "
    "learning_rate too high"
)


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B,) of the distribution softmax(logits), logits (B, V), drawn by `uniforms` (B,).

    Where there is no distribution: V on a GPU, UserError on a CPU.
    """
    try:
        return ppo_kernels.sample_tokens(logits, uniforms).tokens
    except ValueError as error:
        if logits.amax(-1).isfinite().all():
            raise
        raise UserError(NOT_FINITE) from error


def cache_keyword(model: PreTrainedModel) -> str | None:
    """The name by which the model's forward takes its cache, None if it takes none: a model
    swallows what is not in its signature without a word."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in parameters), None)


def next_logits(
    model: PreTrainedModel,
    decoding: Decoding,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache | None,
) -> tuple[Tensor, Cache | None]:
    """Logits (B, 1, V) after the last of `input_ids`, which follow what is in `cache` (None: they
    are all), and the cache then. The mask has a column for each token so far."""
    name = decoding.cache
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask if cache is None or decoding.masks_steps else None,
        position_ids=position_ids,
        use_cache=name is not None,
        logits_to_keep=1,
        **({} if cache is None else {name: cache}),
    )
    return outputs.logits[:, -1:], None if name is None else getattr(outputs, name)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    uniforms: Tensor,
    max_lengths: Tensor,
    stopping: Stopping,
    decoding: Decoding,
    temperature: float,
    pad_token_id: int,
    filters: Sequence[Filter] = (),
    keeps_ids: bool = False,
) -> Generated:
    """Samples a response to each left-padded prompt.

    Args:
        prompt_ids, prompt_mask: (B, P); the mask is True at real tokens, the last column is real.
        uniforms: (B, T) fp64 in [0, 1), the numbers that draw each row's tokens.
        max_lengths: (B,) most tokens of each response, from 1 to T.
        temperature: divides the logits; 0 takes the most probable token.
        filters: set to -inf those of the logits (B, V), divided by it, that are not drawn from.
        keeps_ids: return what was drawn from.

    Rows that have ended leave the batch once half of it has, if the model's cache allows it, and
    sampling stops with the last one.
    The results are inference tensors: no pass with a gradient takes them as they are.
    """
    longest = int(max_lengths.max())
    tokens = prompt_ids.new_full((len(prompt_ids), longest), pad_token_id)
    lengths = max_lengths.clone()
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    rows, kept = torch.arange(len(prompt_ids), device=prompt_ids.device), KeptLog()
    cache, inputs, position_ids = None, prompt_ids, positions(prompt_mask)
    mask = None if prompt_mask.all() else prompt_mask
    for step in range(longest):
        logits, cache = next_logits(model, decoding, inputs, mask, position_ids, cache)
        stopping.suppress_(logits, first=step)
        scores = logits[:, -1].float()
        if temperature == 0:
            scores = scores.masked_fill(scores != scores.amax(-1, keepdim=True), -torch.inf)
        else:
            scores = scores / temperature
        for function in filters:
            scores = function(tokens, scores)
        tokens[rows, step] = sample_tokens(scores, uniforms[rows, step])
        if keeps_ids:
            going = step < lengths[rows]
            kept.add(rows[going], scores[going])
        ends = stopping.reached(tokens[rows, : step + 1]) & (step < lengths[rows])
        lengths[rows] = torch.where(ends, step + 1, lengths[rows])
        ended[rows] |= ends
        alive = step + 1 < lengths[rows]
        num_alive, highest = torch.stack([alive.sum(), tokens[rows, step].max()]).tolist()
        if highest == logits.shape[-1]:
            raise UserError(NOT_FINITE)
        if num_alive == 0:
            break
        if decoding.drops_rows and num_alive <= len(rows) // 2:
            keep = alive.nonzero()[:, 0]
            rows, inputs, position_ids = rows[keep], inputs[keep], position_ids[keep]
            mask = None if mask is None else mask[keep]
            if cache is not None:
                cache.reorder_cache(keep)
        new, after = tokens[rows, step : step + 1], position_ids[:, -1:] + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if cache is None:
            inputs = torch.cat([inputs, new], dim=1)
            position_ids = torch.cat([position_ids, after], dim=1)
        else:
            inputs, position_ids = new, after
    width = int(lengths.max())
    tokens = tokens[:, :width]
    beyond = torch.arange(width, device=tokens.device) >= lengths[:, None]
    responses = Generated(tokens.masked_fill(beyond, pad_token_id), lengths, ended)
    return responses._replace(kept=kept.responses(len(tokens))) if keeps_ids else responses
