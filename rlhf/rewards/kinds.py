"""What scores the responses: reward models, modules and Python functions, weighted and summed.

A function is called once for all samples, with the arguments among these that its signature names
(`**kwargs` takes them all)::

    def brevity(prompts, completions, completion_ids, label, **columns):
        return [-len(ids) / 10 for ids in completion_ids]

`prompts` are texts, or lists of messages where the data is conversational, in which case each of
`completions` is a list with one assistant message; `completion_ids` holds the sampled token ids,
EOS among them; and there is an argument for each other column of the data. A score is a number, or
a list with a number for each token of the completion, or None: the reward says nothing of it. A
dict, for a completion or for all of them, is taken for its `score`. The function may be async.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config.fields import Options
from rlhf.data.chat import (
    Messages,
    encode_answers,
    encode_prompt_chats,
    known_options,
    template_options,
)
from rlhf.data.loaders import Prompts, prompt_ids
from rlhf.data.padding import pad
from rlhf.data.seam import cut_left, encode_pairs, encode_texts, or_first, with_eos
from rlhf.errors import UserError
from rlhf.models.loading import padding_in_text
from rlhf.models.passes import autocast, check_fits, normalise_scores, sequence_scores
from rlhf.rewards.functions import call
from rlhf.rewards.scoring import Reward, Samples, shorten
from rlhf.rollout import Responses
from rlhf.run.terminal import say

# What functions are given beside the columns of the data.
ARGUMENTS = ("prompts", "completions", "completion_ids")


@dataclass
class ModelReward(Reward):
    """A reward model's normalised score, on the policy's token ids where its tokenizer, with the
    same vocabulary and EOS, gives the same ids to the sample's prompt. Without a chat template it
    takes conversations as the policy's has them.

    Otherwise on the text, tokenized anew as `load_rankings` does: prompt and completion, or the
    conversation in the chat template of the reward model's tokenizer, with those of `tools` and
    `chat_template_kwargs` that it knows, up to EOS, which is appended if the response ended by
    itself and there is none; of all that BOS and the last tokens for which the model has positions.
    A chat template closes the assistant's turn even if the response was cut.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy_tokenizer: PreTrainedTokenizerBase
    path: str | None
    config: Options

    def __post_init__(self):
        self.skipped = padding_in_text(self.model, self.tokenizer)
        # It may have more, such as a pad token of its own.
        own, given = self.tokenizer.get_vocab(), self.policy_tokenizer.get_vocab()
        self.shares_vocabulary = given.items() <= own.items()
        self.shares_tokens = (
            self.shares_vocabulary
            and self.tokenizer.eos_token_id == self.policy_tokenizer.eos_token_id
        )
        if not hasattr(self.model, "score"):
            raise UserError(
                f"reward {self.name} is a {type(self.model).__name__}, whose score is not read at "
                "the last token: use a decoder's reward model, or call it in a function of yours"
            )

    def check(self, prompts: Prompts, longest: int) -> None:
        conversational = isinstance(prompts.prompts[0], list)
        if conversational and self.tokenizer.chat_template is None and not self.shares_tokens:
            raise UserError(
                f"reward {self.name} has no chat template for a conversational data set: set its "
                "tokenizer's chat_template, or use plain prompts"
            )
        anew = self._tokenized_anew(prompts.prompts, prompts.columns)
        if conversational and anew:
            self._tell_unknown_options(prompts)
        remedy = f"lower max_prompt_length or response_length (reward {self.name})"
        check_fits(
            self.model, self.tokenizer, 1 if len(anew) == len(prompts.ids) else longest, remedy
        )

    def __call__(self, samples: Samples) -> list[float]:
        responses = samples.responses
        if anew := self._tokenized_anew(samples.prompts, samples.columns):
            starts, ends = responses.unpadded
            rows = [start + end for start, end in zip(starts, ends, strict=True)]
            for i, row in zip(anew, self._tokenize(samples, anew), strict=True):
                rows[i] = row
            responses = self._as_responses(rows, responses)

        def score(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            scores = sequence_scores(self.model, input_ids, attention_mask, self.skipped)
            return normalise_scores(self.model, scores)

        return _score_in_parts(score, responses, self.config)

    def _tokenized_anew(self, prompts: list[str] | list[Messages], columns: dict) -> list[int]:
        """The rows whose prompts the model's own tokenizer does not encode as the policy's does."""
        if not self.shares_tokens:
            return list(range(len(prompts)))
        if isinstance(prompts[0], str):
            own, given = (prompt_ids(x, prompts) for x in (self.tokenizer, self.policy_tokenizer))
        elif self.tokenizer.chat_template is None:
            return []
        else:
            own, given = (
                encode_prompt_chats(tokenizer, prompts, *self._asides(tokenizer, prompts, columns))
                for tokenizer in (self.tokenizer, self.policy_tokenizer)
            )
        return [i for i, ids in enumerate(own) if ids != given[i]]

    def _tokenize(self, samples: Samples, rows: list[int]) -> list[list[int]]:
        """These samples in the model's own tokens."""
        tokenizer = self.tokenizer
        prompts = [samples.prompts[i] for i in rows]
        texts = [samples.completions[i] for i in rows]
        if isinstance(prompts[0], str):
            pairs = encode_pairs(tokenizer, encode_texts, prompts, texts)
            starts, ends = [or_first(tokenizer, row) for row in pairs.prompts], pairs.completions
        else:
            chats = [
                [*prompt, {"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            columns = {name: [values[i] for i in rows] for name, values in samples.columns.items()}
            starts, ends = encode_answers(
                tokenizer, chats, *self._asides(tokenizer, prompts, columns)
            )
        ended = samples.responses.ended.tolist()
        whole = [
            start + with_eos(tokenizer, end)[: None if ended[i] else len(end)]
            for i, start, end in zip(rows, starts, ends, strict=True)
        ]
        longest = getattr(self.model.config, "max_position_embeddings", sys.maxsize)
        return cut_left(tokenizer, whole, longest)

    def _asides(
        self, tokenizer: PreTrainedTokenizerBase, prompts: list[Messages], columns: dict
    ) -> tuple[list[str], list[dict]]:
        """How errors name each conversation, and what of its row its chat template knows."""
        wheres = [
            f"reward {self.name}, prompt {shorten(prompt[-1].get('content'))!r}"
            for prompt in prompts
        ]
        options = template_options(columns, "the data", len(prompts))
        return wheres, [known_options(tokenizer, row) for row in options]

    def _tell_unknown_options(self, prompts: Prompts) -> None:
        options = template_options(prompts.columns, "the data", len(prompts.prompts))
        names = set(chain.from_iterable(options))
        unknown = names - {name for row in options for name in known_options(self.tokenizer, row)}
        if unknown:
            say(
                f"reward {self.name}: its chat template does not know {', '.join(sorted(unknown))} "
                "of the data, and does without"
            )

    def _as_responses(self, rows: list[list[int]], given: Responses) -> Responses:
        """These ids as responses to empty prompts."""
        ids, mask = (x.to(given.ended.device) for x in pad(rows, self.tokenizer.pad_token_id))
        return Responses(ids[:, :0], mask[:, :0], ids, mask, given.ended)


@dataclass
class ModuleReward(Reward):
    """An nn.Module that is called with `input_ids` and `attention_mask` of prompts and responses,
    (n, L), padded on the left and on the right, and returns scores, or an object with `logits`, of
    shape (n,) or (n, 1). The number n of rows is at most `config.per_device_eval_batch_size`.
    """

    module: nn.Module
    config: Options

    def check(self, prompts: Prompts, longest: int) -> None:
        """Nothing is known of a module before it is called."""

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

    def check(self, prompts: Prompts, longest: int) -> None:
        for name in ARGUMENTS:
            if name in prompts.columns:
                raise UserError(
                    f"the data has a column {name!r}, but reward functions such as {self.name} get "
                    "something else by this name: rename it"
                )
        given = [*prompts.columns, *ARGUMENTS]
        for parameter in self._parameters().values():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            required = parameter.default is parameter.empty and not variadic
            if required and parameter.name not in given:
                raise UserError(
                    f"reward {self.name} needs the argument {parameter.name!r}, but it can be "
                    f"given only {', '.join(given)}: name one of them, or add such a column"
                )

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
        parameters = self._parameters()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            arguments = {name: arguments[name] for name in arguments if name in parameters}
        # Copies, for the function may change what it is given.
        return call(self.name, self.function, copy.deepcopy(arguments))

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return call(self.name, inspect.signature, {"obj": self.function}).parameters


def _score_in_parts(
    score: Callable[[Tensor, Tensor], Tensor], responses: Responses, config: Options
) -> list[float]:
    """`score` of the ids and masks of all rows, in parts of `config.per_device_eval_batch_size`."""
    rows = torch.arange(len(responses.tokens), device=responses.tokens.device)
    scores = torch.zeros(len(rows), device=rows.device)
    for index, part in responses.by_length(rows, config.per_device_eval_batch_size):
        with autocast(config.bf16):
            scores[index] = score(part.input_ids, part.attention_mask)
    return scores.tolist()
