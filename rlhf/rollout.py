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

from ppo_kernels import kl_estimate
from rlhf import distributed
from rlhf.config.fields import ResponseOptions
from rlhf.config.ppo import PPOConfig
from rlhf.data.padding import pad
from rlhf.data.seam import decode_completions
from rlhf.models.generation import Decoding, Stopping, generate
from rlhf.models.heads import ActorCritic, TokenLogits, TokenStates
from rlhf.models.passes import autocast
from rlhf.models.truncation import KeptIds, KeptTokenLogits, make_filters


class Draws(NamedTuple):
    """All random numbers of B responses: `uniforms` (B, T), one for each token, and the longest
    lengths `max_lengths` (B,). They are drawn on the CPU, row after row, so that any device samples
    the same and a further row changes nothing of those before it."""

    uniforms: Tensor
    max_lengths: Tensor

    @classmethod
    def of(cls, count: int, config: ResponseOptions, generator: torch.Generator) -> "Draws":
        length = config.response_length
        numbers = torch.rand(count, length + 1, dtype=torch.float64, generator=generator)
        max_lengths = torch.full((count,), length)
        if config.sample_response_length:
            shortest = max(config.min_response_length, 1)
            max_lengths = shortest + (numbers[:, 0] * (length - shortest + 1)).long()
        return cls(numbers[:, 1:], max_lengths)

    def rows(self, index: slice) -> "Draws":
        return Draws(*(x[index] for x in self))


class Responses(NamedTuple):
    """Prompts (B, P), padded on the left, and their responses (B, T), padded on the right.

    The masks are True at real tokens; that of the responses counts every sampled token, whatever
    its id. `ended` (B,) tells responses that ended by themselves (EOS, stop token, stop string)
    from those that were cut. `kept` has what each was drawn from, None for all of the vocabulary.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    ended: Tensor
    kept: list[KeptIds] | None = None

    def rows(self, index: Tensor | slice) -> "Responses":
        return Responses(*(x[index] for x in self[:5]), self._kept_of(index))

    def _kept_of(self, index: Tensor | slice) -> list[KeptIds] | None:
        if self.kept is None or isinstance(index, slice):
            return self.kept and self.kept[index]
        return [self.kept[row] for row in index.tolist()]

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
            tokens, mask = (x[rows, :width] for x in self[2:4])
            ended, kept = self.ended[rows], self._kept_of(rows)
            yield rows, Responses(prompt_ids, prompt_mask, tokens, mask, ended, kept)

    def drawn_from(
        self, view: TokenLogits | TokenStates
    ) -> TokenLogits | TokenStates | KeptTokenLogits:
        """The policy's view of these responses, over the ids that they were drawn from."""
        if self.kept is None:
            return view
        return KeptTokenLogits.of(view.logits, self.mask, self.kept)

    @property
    def unpadded(self) -> tuple[list[list[int]], list[list[int]]]:
        """The ids of the prompts and of the responses."""
        return _unpad(self.prompt_ids, self.prompt_mask), _unpad(self.tokens, self.mask)

    @property
    def input_ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.tokens], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.mask], dim=1)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, int]:
        """Ids, mask and T of a pass of which the last T positions score the response tokens."""
        return self.input_ids[:, :-1], self.attention_mask[:, :-1], self.tokens.shape[1]


def _unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    return [[x for x, real in zip(*row, strict=True) if real] for row in rows]


class Experience(NamedTuple):
    """What policy, reference and critic say of the responses, each (B, T), 0 where masked out."""

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor

    def rows(self, index: slice) -> "Experience":
        return Experience(*(x[index] for x in self))


def sample_responses(
    policy: PreTrainedModel,
    stopping: Stopping,
    decoding: Decoding,
    prompts: list[list[int]],
    draws: Draws,
    config: ResponseOptions,
    *,
    keeps_ids: bool = False,
) -> Responses:
    """Responses to tokenized prompts, padded to config.response_length; if asked to it keeps what
    filters left to draw from."""
    filters = make_filters(config)
    kept = [] if keeps_ids and filters else None
    device, pad_token_id = policy.device, stopping.tokenizer.pad_token_id
    prompt_ids, prompt_mask = (x.to(device) for x in pad(prompts, pad_token_id, "left"))
    uniforms, max_lengths = (x.to(device) for x in draws)
    tokens = prompt_ids.new_full((len(prompts), config.response_length), pad_token_id)
    lengths = torch.empty_like(max_lengths)
    ended = torch.empty_like(max_lengths, dtype=torch.bool)
    for rows in torch.arange(len(prompts), device=device).split(config.per_device_eval_batch_size):
        with autocast(config.bf16):
            generated = generate(
                policy,
                prompt_ids[rows],
                prompt_mask[rows],
                uniforms=uniforms[rows],
                max_lengths=max_lengths[rows],
                stopping=stopping,
                decoding=decoding,
                temperature=config.temperature,
                pad_token_id=pad_token_id,
                filters=filters,
                keeps_ids=kept is not None,
            )
        tokens[rows, : generated.tokens.shape[1]] = generated.tokens
        lengths[rows] = generated.lengths
        ended[rows] = generated.ended
        if kept is not None:
            kept += generated.kept
    mask = torch.arange(config.response_length, device=device) < lengths[:, None]
    return Responses(prompt_ids, prompt_mask, tokens, mask, ended, kept)


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: Responses) -> list[str]:
    """The responses as texts, without special tokens: what each adds to its prompt's text."""
    return decode_completions(tokenizer, *responses.unpadded)


@torch.no_grad()
def evaluate_responses(
    model: ActorCritic,
    reference: PreTrainedModel,
    responses: Responses,
    config: PPOConfig,
) -> Experience:
    """One pass of each model over the responses, divided among the processes.

    The micro-batches are those of training, the same for any number of processes, because the
    rounding of a forward pass depends on what is in it.
    """
    shape, device = responses.tokens.shape, responses.tokens.device
    experience = Experience(*torch.zeros(4, *shape, device=device).unbind())
    rows = torch.arange(shape[0], device=device)
    parts = responses.by_length(rows, config.per_device_train_batch_size)
    for index, part in distributed.my_share(parts):
        with autocast(config.bf16):
            policy, values = model(*part.inputs)
            policy = part.drawn_from(policy)
            logprobs, entropy = policy.logprobs_and_entropy(
                part.tokens, temperature=config.temperature
            )
            ref, _ = model.head(reference, *part.inputs)
            ref_logprobs = part.drawn_from(ref).logprobs(
                part.tokens, temperature=config.temperature
            )
        results = Experience(logprobs, ref_logprobs, entropy, values)
        for whole, result in zip(experience, results, strict=True):
            whole[index, : part.tokens.shape[1]] = result.masked_fill(~part.mask, 0)
    return Experience(*map(distributed.sum_of, experience))


def shaped_scores(scores: Tensor, ended: Tensor, config: PPOConfig) -> Tensor:
    """Scaled scores (B,) as they enter the reward: clipped, and then, where a response did not end
    by itself, less the penalty or replaced."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    missing = scores - config.missing_eos_penalty
    if config.missing_eos_score is not None:
        missing = torch.full_like(scores, config.missing_eos_score)
    return torch.where(ended, scores, missing)


def token_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor,
    kl_coef: float,
    kl_estimator: str = "k1",
) -> Tensor:
    """r_t = -kl_coef * KL_t, plus the score (B,) at the last token; (B, T).

    KL_t is `kl_estimate` of log π and log π_ref; k1 is their difference (Ziegler et al., 2019,
    arXiv:1909.08593).
    """
    rewards = -kl_coef * kl_estimate(logprobs, ref_logprobs, estimator=kl_estimator)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.masked_fill(~mask, 0).scatter_add(1, last, scores[:, None])
