"""What rewards see, what they give, and what is checked of it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import answer_lead
from rlhf.data.loaders import Prompts
from rlhf.errors import UserError, quote
from rlhf.rollout import Responses, decode_responses


class Samples(NamedTuple):
    """What rewards see; each list has one entry for each of the B responses."""

    prompts: list[str | list[dict]]
    completions: list[str]
    columns: dict[str, list]
    responses: Responses

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, responses: Responses
    ) -> "Samples":
        """The responses of a policy to all these prompts, in the tokens of its tokenizer."""
        texts = decode_responses(tokenizer, responses)
        if isinstance(next(iter(prompts.prompts), None), list):
            lead = answer_lead(tokenizer)
            texts = [text.removeprefix(lead) for text in texts]
        return cls(prompts.prompts, texts, prompts.columns, responses)

    def describe(self, row: int) -> str:
        """One short line by which the user finds the sample."""
        prompt = self.prompts[row]
        text = prompt if isinstance(prompt, str) else prompt[-1].get("content")
        return f"prompt {shorten(text)!r}, completion {shorten(self.completions[row])!r}"

    def answers(self) -> list[dict[str, object]]:
        """Each completion, the number of its tokens, and whether it ended by itself, for a file."""
        lengths, ended = self.responses.mask.sum(1).tolist(), self.responses.ended.tolist()
        return [
            {"completion": text, "tokens": tokens, "ended": end}
            for text, tokens, end in zip(self.completions, lengths, ended, strict=True)
        ]


class Scores(NamedTuple):
    """The weighted sums of the sequence-level rewards, `scores` (B,), and of the token-level ones,
    `token_scores` (B, T), 0 beyond a response; and in `parts` each reward by name, unweighted and
    summed over tokens, (B,), NaN where it says nothing. All fp32."""

    scores: Tensor
    token_scores: Tensor
    parts: dict[str, Tensor]

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Scores":
        """The function's results on every tensor."""
        parts = {name: function(part) for name, part in self.parts.items()}
        return Scores(function(self.scores), function(self.token_scores), parts)


@dataclass
class Reward(ABC):
    name: str
    weight: float

    @abstractmethod
    def check(self, prompts: Prompts, longest: int) -> None:
        """Raises UserError if it cannot score responses to `prompts`, together up to `longest`
        tokens."""

    @abstractmethod
    def __call__(self, samples: Samples):
        """One score for each sample: a number, None, or a list with a number for each token."""


@torch.no_grad()
def score_samples(rewards: list[Reward], samples: Samples) -> Scores:
    """All rewards of the samples. Raises UserError, which names the sample, where a score is not
    finite or every reward says nothing."""
    shape, device = samples.responses.tokens.shape, samples.responses.tokens.device
    scores, token_scores = torch.zeros(shape[0]), torch.zeros(shape)
    parts = {}
    for reward in rewards:
        sequence_part, token_part, parts[reward.name] = _checked(reward, samples)
        scores += reward.weight * sequence_part
        token_scores += reward.weight * token_part
    unscored = torch.stack(list(parts.values())).isnan().all(0).nonzero().flatten().tolist()
    if unscored:
        raise UserError(
            f"every reward returned None for {samples.describe(unscored[0])}: one must score it"
        )
    return Scores(scores, token_scores, parts).apply(lambda x: x.to(device))


@torch.no_grad()
def score_apart(reward: Reward, samples: Samples) -> Tensor:
    """The reward's scores by itself, summed over tokens and without its weight, (B,); NaN where it
    says nothing."""
    return _checked(reward, samples)[2]


def _checked(reward: Reward, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    """The reward's scores of sequences (B,) and of tokens (B, T), and their total as in `parts`."""
    lengths = samples.responses.mask.sum(1).tolist()
    scores = _score_of(reward, reward(samples))
    shape = tuple(getattr(scores, "shape", ()))
    if shape[1:] == (1,):
        raise UserError(
            f"reward {reward.name} returned scores of shape {shape}: return one number for each "
            "completion (squeeze it), or one number for each token"
        )
    scores = _plain(scores)
    if not isinstance(scores, list | tuple):
        raise UserError(
            f"reward {reward.name} must return a list with one score for each completion, got "
            f"{type(scores).__name__}"
        )
    if len(scores) != len(lengths):
        raise UserError(
            f"reward {reward.name} returned {len(scores)} scores for {len(lengths)} completions: "
            "it must return one for each (None where it has none)"
        )
    scores = [_plain(_score_of(reward, score)) for score in scores]
    sequence_part = torch.zeros(len(lengths))
    token_part = torch.zeros(samples.responses.tokens.shape)
    for row, (score, length) in enumerate(zip(scores, lengths, strict=True)):
        if score is None:
            continue
        if isinstance(score, list | tuple):
            if len(score) != length:
                squeeze = ", or a number in place of the list (squeeze it)"
                raise UserError(
                    f"reward {reward.name} returned {len(score)} token scores for {length} tokens "
                    f"({samples.describe(row)}): it must return one for each of completion_ids"
                    f"{squeeze if len(score) == 1 else ''}"
                )
            values = [_number(reward, value, samples, row) for value in map(_plain, score)]
            token_part[row, :length] = torch.tensor(values)
        else:
            sequence_part[row] = _number(reward, score, samples, row)
    silent = torch.tensor([score is None for score in scores])
    return sequence_part, token_part, (sequence_part + token_part.sum(1)).masked_fill(silent, nan)


def _score_of(reward: Reward, value):
    """The `score` of a dict, anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if "score" not in value:
        raise UserError(
            f"reward {reward.name} returned a dict without the key 'score', it has "
            f"{quote(list(value))}: a dict must hold the score, or the scores of all, under it"
        )
    return value["score"]


def _number(reward: Reward, value, samples: Samples, row: int) -> float:
    if not isinstance(value, Real):
        rule = "a score must be a number, None, or a list with a number for each token"
    elif not abs(value) <= torch.finfo(torch.float32).max:  # so NaN too is refused
        rule = "a score must be finite (or None, to say nothing of the sample)"
    else:
        return float(value)
    raise UserError(f"reward {reward.name} gave {quote(value)} for {samples.describe(row)}: {rule}")


def to_jsonl(rows: list[dict]) -> bytes:
    """A line of JSON for each row. Numbers that are not finite become null, which JSON has a word
    for, dates and the like, which columns may hold, text."""
    lines = [
        json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=str) + "\n"
        for row in rows
    ]
    # Half a surrogate pair has no UTF-8, but an escape, which is JSON's too.
    return "".join(lines).encode("utf-8", "backslashreplace")


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _plain(value):
    """Arrays and tensors as the lists and numbers that they hold."""
    return value.tolist() if hasattr(value, "tolist") else value


def shorten(text: str, length: int = 60) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 3] + "..."
