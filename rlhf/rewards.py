"""What scores the responses: reward models, modules and Python functions, weighted and summed.

A function is called once for all samples, with the arguments among these that its signature names
(`**kwargs` takes them all)::

    def brevity(prompts, completions, completion_ids, label, **columns):
        return [-len(ids) / 10 for ids in completion_ids]

`prompts` are texts, or lists of messages where the data is conversational, in which case each of
`completions` is a list with one assistant message; `completion_ids` holds the sampled token ids,
EOS among them; and there is an argument for each other column of the data. A score is a number, or
a list with a number for each token of the completion, or None: the reward says nothing of it.
"""

import copy
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.batches import pad
from rlhf.config import PPOConfig
from rlhf.data import tokenize_prompts
from rlhf.errors import UserError, one_line
from rlhf.functions import call, load_function
from rlhf.models import (
    autocast,
    check_fits,
    default_device,
    load_reward_model,
    load_tokenizer,
    normalise_scores,
    sequence_scores,
)
from rlhf.rollout import Responses


class Samples(NamedTuple):
    """What rewards see; each list has one entry for each of the B responses."""

    prompts: list[str | list[dict]]
    completions: list[str]
    columns: dict[str, list]
    responses: Responses

    def describe(self, row: int) -> str:
        """One short line by which the user finds the sample."""
        prompt = self.prompts[row]
        text = prompt if isinstance(prompt, str) else prompt[-1].get("content")
        return f"prompt {_shorten(text)!r}, completion {_shorten(self.completions[row])!r}"


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
    def __call__(self, samples: Samples):
        """One score for each sample: a number, None, or a list with a number for each token."""


@dataclass
class ModelReward(Reward):
    """A reward model's normalised score, on the policy's token ids if it shares its vocabulary.

    Otherwise on the text, tokenized anew: prompt and completion, or the conversation in the chat
    template of the reward model's tokenizer; then EOS, if the response ended by itself and there is
    none yet; of all that the last tokens for which the model has positions. A chat template closes
    the assistant's turn even if the response was cut.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shares_vocabulary: bool
    path: str | None
    config: PPOConfig

    def __post_init__(self):
        if not hasattr(self.model, "score"):
            raise UserError(
                f"reward {self.name} is a {type(self.model).__name__}, whose score is not read at "
                "the last token: use a decoder's reward model, or call it in a function of yours"
            )

    def __call__(self, samples: Samples) -> list[float]:
        responses = samples.responses
        if not self.shares_vocabulary:
            responses = self._tokenize(samples)

        def score(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            scores = sequence_scores(self.model, input_ids, attention_mask)
            return normalise_scores(self.model, scores)

        return _score_in_parts(score, responses, self.config)

    def _tokenize(self, samples: Samples) -> Responses:
        """The samples in this model's tokens, as responses to empty prompts."""
        tokenizer, ended = self.tokenizer, samples.responses.ended
        if isinstance(samples.prompts[0], str):
            prompts = tokenize_prompts(tokenizer, samples.prompts, sys.maxsize)
            completions = tokenizer(samples.completions, add_special_tokens=False).input_ids
            ends = [[tokenizer.eos_token_id] if end else [] for end in ended.tolist()]
            rows = [[*a, *b, *c] for a, b, c in zip(prompts, completions, ends, strict=True)]
        else:
            rows = tokenizer(self._render(samples), add_special_tokens=False).input_ids
        longest = getattr(self.model.config, "max_position_embeddings", sys.maxsize)
        ids, mask = pad([row[-longest:] for row in rows], tokenizer.pad_token_id)
        ids, mask = ids.to(ended.device), mask.to(ended.device)
        return Responses(ids[:, :0], mask[:, :0], ids, mask, ended)

    def _render(self, samples: Samples) -> list[str]:
        """The conversations as texts."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"reward {self.name} has no chat template for a conversational data set: set its "
                "tokenizer's chat_template, or use plain prompts"
            )
        conversations = [
            [*prompt, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(samples.prompts, samples.completions, strict=True)
        ]
        eos, ended, texts = self.tokenizer.eos_token, samples.responses.ended.tolist(), []
        for row, messages in enumerate(conversations):
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception as error:  # a template raises what it likes
                raise UserError(
                    f"the chat template of reward {self.name} cannot take {samples.describe(row)}: "
                    f"{one_line(error)}"
                ) from error
            if ended[row] and not text.rstrip().endswith(eos):
                text += eos
            texts.append(text)
        return texts


@dataclass
class ModuleReward(Reward):
    """An nn.Module that is called with `input_ids` and `attention_mask` of prompts and responses,
    (n, L), padded on the left and on the right, and returns scores, or an object with `logits`, of
    shape (n,) or (n, 1). The number n of rows is at most `config.per_device_eval_batch_size`.
    """

    module: nn.Module
    config: PPOConfig

    def __call__(self, samples: Samples) -> list[float]:
        def score(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
            output = call(self.name, self.module, inputs)
            scores, rows = getattr(output, "logits", output), len(input_ids)
            if not isinstance(scores, Tensor) or scores.shape not in [(rows,), (rows, 1)]:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise UserError(
                    f"reward {self.name} must return a tensor ({rows},) for {rows} rows, or an "
                    f"object with logits ({rows}, 1), got {got}"
                )
            return scores.reshape(rows).float()

        return _score_in_parts(score, samples.responses, self.config)


@dataclass
class FunctionReward(Reward):
    """A Python function, called as the module's docstring says."""

    function: Callable

    def __call__(self, samples: Samples):
        tokens, lengths = samples.responses.tokens.tolist(), samples.responses.mask.sum(1).tolist()
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(samples.prompts, samples.completions, strict=True)
        ]
        arguments = {
            **samples.columns,
            "prompts": samples.prompts,
            "completions": completions,
            "completion_ids": [ids[:length] for ids, length in zip(tokens, lengths, strict=True)],
        }
        # Copies, for the function may change what it is given.
        return call(self.name, self.function, copy.deepcopy(self._accepted(arguments)))

    def _accepted(self, arguments: dict) -> dict:
        """Those of the arguments that the function's signature names."""
        signature = call(self.name, inspect.signature, {"obj": self.function})
        parameters = signature.parameters.values()
        for parameter in parameters:
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            required = parameter.default is parameter.empty and not variadic
            if required and parameter.name not in arguments:
                raise UserError(
                    f"reward {self.name} needs the argument {parameter.name!r}, but it can be "
                    f"given only {', '.join(arguments)}: name one of them, or add such a column"
                )
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return arguments
        return {name: arguments[name] for name in arguments if name in signature.parameters}


def load_rewards(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    reward_funcs: list[str | nn.Module | Callable] | None = None,
) -> list[Reward]:
    """The rewards of `config`, or those given instead, weighted by `config.reward_weights`.

    `tokenizer` is the policy's. A string is the folder or hub id of a reward model,
    `module:function` (the current folder counts) or `file.py:function`. A sequence classifier with
    one label is a reward model with the policy's tokenizer, any other nn.Module a ModuleReward.
    """
    sources = config.reward_funcs if reward_funcs is None else reward_funcs
    if not sources:
        raise UserError(
            "reward_funcs must name what scores a response: the folder of a reward model, "
            "module:function or file.py:function"
        )
    weights = [1.0] * len(sources) if config.reward_weights is None else config.reward_weights
    if len(sources) != len(weights):
        raise UserError(
            f"reward_weights must have one weight for each of {len(sources)} reward_funcs, got "
            f"{weights}"
        )
    found = [_find(source) for source in sources]
    names = _make_unique([_name(source) for source in found])
    return [
        _make_reward(*entry, tokenizer, config) for entry in zip(names, weights, found, strict=True)
    ]


def critic_path(rewards: list[Reward]) -> str | None:
    """Folder or hub id of the first reward model with the policy's vocabulary, if there is one."""
    models = [reward for reward in rewards if isinstance(reward, ModelReward)]
    return next((model.path for model in models if model.shares_vocabulary and model.path), None)


def check_rewards_fit(rewards: list[Reward], longest: int) -> None:
    """Raises UserError if a reward model cannot score prompt + response of `longest` tokens."""
    for reward in rewards:
        if isinstance(reward, ModelReward):
            length = longest if reward.shares_vocabulary else 1
            remedy = f"lower max_prompt_length or response_length (reward {reward.name})"
            check_fits(reward.model, reward.tokenizer, length, remedy)


@torch.no_grad()
def score_samples(rewards: list[Reward], samples: Samples) -> Scores:
    """All rewards of the samples. Raises UserError, which names the sample, where a score is not
    finite or every reward says nothing."""
    shape, device = samples.responses.tokens.shape, samples.responses.tokens.device
    scores, token_scores = torch.zeros(shape[0]), torch.zeros(shape)
    parts = {}
    for reward in rewards:
        sequence_part, token_part, silent = _checked(reward, samples)
        scores += reward.weight * sequence_part
        token_scores += reward.weight * token_part
        total = sequence_part + token_part.sum(1)
        parts[reward.name] = total.masked_fill(silent, torch.nan)
    unscored = torch.stack(list(parts.values())).isnan().all(0).nonzero().flatten().tolist()
    if unscored:
        raise UserError(
            f"every reward returned None for {samples.describe(unscored[0])}: one must score it"
        )
    return Scores(scores, token_scores, parts).apply(lambda x: x.to(device))


def _checked(reward: Reward, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    """The reward's scores of sequences (B,) and of tokens (B, T), and where it is silent (B,)."""
    lengths = samples.responses.mask.sum(1).tolist()
    scores = _plain(reward(samples))
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
    scores = [_plain(score) for score in scores]
    sequence_part = torch.zeros(len(lengths))
    token_part = torch.zeros(samples.responses.tokens.shape)
    for row, (score, length) in enumerate(zip(scores, lengths, strict=True)):
        if score is None:
            continue
        if isinstance(score, list | tuple):
            if len(score) != length:
                raise UserError(
                    f"reward {reward.name} returned {len(score)} token scores for {length} tokens "
                    f"({samples.describe(row)}): it must return one for each of completion_ids"
                )
            values = [_number(reward, value, samples, row) for value in map(_plain, score)]
            token_part[row, :length] = torch.tensor(values)
        else:
            sequence_part[row] = _number(reward, score, samples, row)
    return sequence_part, token_part, torch.tensor([score is None for score in scores])


def _number(reward: Reward, value, samples: Samples, row: int) -> float:
    if not isinstance(value, Real):
        rule = "a score must be a number, None, or a list with a number for each token"
    elif not abs(value) <= torch.finfo(torch.float32).max:  # so NaN too is refused
        rule = "a score must be finite (or None, to say nothing of the sample)"
    else:
        return float(value)
    raise UserError(
        f"reward {reward.name} gave {_shorten(repr(value))} for {samples.describe(row)}: {rule}"
    )


def _plain(value):
    """Arrays and tensors as the lists and numbers that they hold."""
    return value.tolist() if hasattr(value, "tolist") else value


def _score_in_parts(
    score: Callable[[Tensor, Tensor], Tensor], responses: Responses, config: PPOConfig
) -> list[float]:
    """`score` of the ids and masks of all rows, in parts of `config.per_device_eval_batch_size`."""
    rows = torch.arange(len(responses.tokens), device=responses.tokens.device)
    scores = torch.zeros(len(rows), device=rows.device)
    for index, part in responses.by_length(rows, config.per_device_eval_batch_size):
        with autocast(config.bf16):
            scores[index] = score(part.input_ids, part.attention_mask)
    return scores.tolist()


def _shorten(text: str, length: int = 60) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _find(source: str | nn.Module | Callable) -> str | nn.Module | Callable:
    """The function that the string names; a reward model's path, or an object, is left as is."""
    if isinstance(source, str) and ":" in source and not Path(source).is_dir():
        source = load_function(source)
    elif isinstance(source, str) and Path(source).is_file():
        raise UserError(
            f"reward {source} is a file: give a reward model's folder, or file.py:function"
        )
    if not isinstance(source, str) and (not callable(source) or isinstance(source, type)):
        raise UserError(
            f"a reward must be a function, an nn.Module or a reward model, got "
            f"{_shorten(repr(source))}"
        )
    return source


def _name(source: str | nn.Module | Callable) -> str:
    if isinstance(source, str):
        return Path(source).resolve().name
    return getattr(source, "__name__", type(source).__name__)


def _make_unique(names: list[str]) -> list[str]:
    """Names in which each that came before gets a number: score, score_2, score_3."""
    unique = []
    for name in names:
        candidates = chain([name], (f"{name}_{n}" for n in count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique


def _make_reward(
    name: str,
    weight: float,
    source: str | nn.Module | Callable,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
) -> Reward:
    if isinstance(source, str):
        own = load_tokenizer(source)
        model = load_reward_model(source, own).eval()
        same = own.get_vocab() == tokenizer.get_vocab()
        return ModelReward(name, weight, model, own, same, source, config)
    if not isinstance(source, nn.Module):
        return FunctionReward(name, weight, source)
    module = source.to(default_device()).eval()
    is_scorer = isinstance(module, PreTrainedModel) and hasattr(module, "score")
    if is_scorer and module.config.num_labels == 1:
        return ModelReward(name, weight, module, tokenizer, True, None, config)
    return ModuleReward(name, weight, module, config)
