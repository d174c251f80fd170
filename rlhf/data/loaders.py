"""From the columns of a data set to token ids, and to batches of them.

What people and models say is a string (standard) or a list of messages (conversational, see
`chat.py`). Strings begin as the tokenizer begins a text; messages go through its chat template,
which writes BOS and the ends of turns itself. A completion has the tokens that continue its prompt,
see `seam.py`.
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.config.fields import is_unicode
from rlhf.config.inference import InferenceConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.data.chat import (
    Messages,
    Text,
    encode_answers,
    encode_prompt_chats,
    hint,
    learn_answers,
    learn_marked,
    marks_answers,
    read_messages,
    refuse_options,
    template_options,
)
from rlhf.data.columns import load_columns
from rlhf.data.seam import (
    REPLACEMENT,
    Pairs,
    Rows,
    cut_left,
    decode,
    encode_pairs,
    encode_texts,
    opening,
    or_first,
    with_eos,
)
from rlhf.errors import UserError
from rlhf.run.terminal import say


class Prompts(NamedTuple):
    """Prompts as token ids and as rewards see them, and every column but `prompt`, row by row."""

    ids: list[list[int]]
    prompts: list[str] | list[Messages]
    columns: dict[str, list]

    def rows(self, index: Sequence[int]) -> "Prompts":
        """These rows, in this order."""
        columns = {name: [values[i] for i in index] for name, values in self.columns.items()}
        return Prompts([self.ids[i] for i in index], [self.prompts[i] for i in index], columns)


class Ranking(NamedTuple):
    """The token ids of prompt + answer, best answer first, and by how much a better answer's score
    shall exceed a worse one's: the data's `margin`, or 0."""

    answers: Rows
    margin: float


def load_texts(
    config: SFTConfig, name: str, split: str, tokenizer: PreTrainedTokenizerBase
) -> list[Text]:
    """SFT data: `prompt` + `completion`, of which the latter is learnt; `messages`, of which the
    assistant's are; or `text`, learnt whole.

    Each ends with EOS. Of conversations is learnt what `learn_answers` says, and in a template that
    marks it with {% generation %} what that marks. Of longer texts the first `config.max_length`
    tokens stay; those that leave nothing to learn are left out.
    """
    columns = load_columns(name, split=split, config_name=config.dataset_config_name)
    if {"prompt", "completion"} <= columns.keys():
        texts = _completions(columns, name, tokenizer)
    elif "messages" in columns:
        chats = _column(columns, name, "messages", read_messages)
        texts = _answers(chats, [0] * len(chats), columns, name, tokenizer)
    elif "text" in columns:
        refuse_options(columns, name)
        rows = encode_texts(tokenizer, _column(columns, name, "text", _string))
        texts = [_learn_from(0, with_eos(tokenizer, row)) for row in rows]
    else:
        raise _missing_columns(columns, name, "prompt and completion, or messages, or text")
    length = config.max_length
    texts = [Text(ids[:length], [False, *learnt[1:length]]) for ids, learnt in texts]
    kept = [text for text in texts if any(text.learnt)]
    if not kept:
        raise UserError(
            f"{name}: no row holds anything to learn within max_length {length}: raise it, or give "
            "rows with more text, a completion or an answer of the assistant"
        )
    _tell(
        name,
        len(texts) - len(kept),
        len(texts),
        f"rows hold nothing to learn within max_length {length} and are left out",
    )
    return kept


def _tell(name: str, number: int, total: int, what: str) -> None:
    """Prints of how many rows this is so, if of any."""
    if number:
        say(f"{name}: {number} of {total} {what}")


def _completions(
    columns: dict[str, Sequence], name: str, tokenizer: PreTrainedTokenizerBase
) -> list[Text]:
    read = _reader(columns["prompt"][0])
    prompts = _column(columns, name, "prompt", read)
    completions = _column(columns, name, "completion", read)
    if read is read_messages:
        chats = [a + b for a, b in zip(prompts, completions, strict=True)]
        return _answers(chats, list(map(len, prompts)), columns, name, tokenizer)
    refuse_options(columns, name)
    pairs = encode_pairs(tokenizer, encode_texts, prompts, completions)
    _tell_inexact(name, pairs)
    starts = [or_first(tokenizer, row) for row in pairs.prompts]
    return [
        _learn_from(len(start), start + with_eos(tokenizer, end))
        for start, end in zip(starts, pairs.completions, strict=True)
    ]


def _answers(
    chats: list[Messages],
    firsts: list[int],
    columns: dict[str, Sequence],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Text]:
    """What the assistant says in each conversation from its `first` message on."""
    options = template_options(columns, name, len(chats))
    rows = chats, _wheres(name, len(chats)), options
    if marks_answers(tokenizer) and not any(firsts):
        return [learn_marked(tokenizer, *row) for row in zip(*rows, strict=True)]
    texts = learn_answers(tokenizer, *rows, firsts)
    split = [len(row) for row in texts if len(row) > 1]
    _tell(
        *(name, len(split), len(texts)),
        f"conversations become {sum(split)} rows, one for each answer, before which the chat "
        "template writes earlier turns otherwise",
    )
    return [text for row in texts for text in row or [Text([], [])]]


def _tell_inexact(name: str, pairs: Pairs) -> None:
    _tell(
        *(name, pairs.inexact, len(pairs.prompts)),
        "answers gain a space where the prompt ends, for the tokenizer cannot go on there, in the "
        "middle of a word",
    )


def _learn_from(start: int, ids: list[int]) -> Text:
    return Text(ids, [position >= start for position in range(len(ids))])


def load_rankings(
    config: RewardConfig, name: str, split: str, tokenizer: PreTrainedTokenizerBase
) -> list[Ranking]:
    """Reward data, row by row.

    The columns are `prompt` and `ranking` (a list of answers, best first); or `prompt`, `chosen`
    and `rejected`; or `chosen` and `rejected`, each of which begins with its prompt; with the
    latter two there may be a `margin`. With `config.append_eos` each sequence ends with EOS;
    without, as its text or chat template does. Of longer ones BOS and the last tokens stay,
    `config.max_length` in all.
    """
    columns = load_columns(name, split=split, config_name=config.dataset_config_name)
    if {"prompt", "ranking"} <= columns.keys():
        rankings = list(columns["ranking"])
        if "margin" in columns:
            raise UserError(
                f"{name} has the columns ranking and margin, but a margin is between two answers: "
                "give chosen and rejected, or leave margin out"
            )
    elif {"chosen", "rejected"} <= columns.keys():
        rankings = [list(pair) for pair in zip(columns["chosen"], columns["rejected"], strict=True)]
    else:
        raise _missing_columns(
            columns, name, "prompt and ranking, or chosen and rejected with or without prompt"
        )
    rows = _wheres(name, len(rankings))
    for row, ranking in zip(rows, rankings, strict=True):
        if not isinstance(ranking, list) or len(ranking) < 2:
            raise UserError(
                f"{row}: ranking must be a list of at least 2 answers, best first, got "
                f"{ranking!r:.60}"
            )
    has_prompts = "prompt" in columns
    read = _reader(columns["prompt"][0] if has_prompts else rankings[0][0])
    prompts = _column(columns, name, "prompt", read) if has_prompts else [[] for _ in rankings]
    answers = [
        [read(answer, f"{row}: an answer") for answer in ranking]
        for row, ranking in zip(rows, rankings, strict=True)
    ]
    # End to end, each answer with what is its row's.
    sizes = list(map(len, answers))
    flat = list(chain.from_iterable(answers))
    prompts, rows, options = (
        [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]
        for values in (prompts, rows, template_options(columns, name, len(answers)))
    )
    if read is read_messages:
        chats = [prompt + answer for prompt, answer in zip(prompts, flat, strict=True)]
        starts, ends = encode_answers(tokenizer, chats, rows, options)
    else:
        refuse_options(columns, name)
        if has_prompts:
            pairs = encode_pairs(tokenizer, encode_texts, prompts, flat)
            _tell_inexact(name, pairs)
            starts, ends = [or_first(tokenizer, row) for row in pairs.prompts], pairs.completions
        else:
            starts, ends = [[] for _ in flat], encode_texts(tokenizer, flat)
    if config.append_eos:
        ends = [with_eos(tokenizer, end) for end in ends]
    ids = [start + end for start, end in zip(starts, ends, strict=True)]
    ids = iter(_cut(tokenizer, ids, config.max_length, name, "answers", "max_length"))
    margins = (
        _column(columns, name, "margin", _number) if "margin" in columns else [0.0] * len(sizes)
    )
    return [
        Ranking([next(ids) for _ in range(size)], margin)
        for size, margin in zip(sizes, margins, strict=True)
    ]


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # every CSV cell is a string
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{what} must be a finite number, got {value!r:.60}")
    return number


def load_prompts(
    config: PPOConfig | InferenceConfig,
    name: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompts:
    """PPO data: `prompt`; or `messages`, without the assistant's last; or the beginnings of `text`.

    A conversation becomes the prompt for the assistant's answer. A beginning is as many tokens as
    `random.Random(config.seed)` draws from the two bounds of `config.text_prompt_length`, or a few
    more where it would end inside a character; texts shorter than the lower bound are
    left out. Of longer prompts BOS and the last tokens stay, `config.max_prompt_length` in all.
    """
    columns = load_columns(name, split=split, config_name=config.dataset_config_name)
    if "prompt" in columns:
        prompts = _column(columns, name, "prompt", _reader(columns["prompt"][0]))
    elif "messages" in columns:
        prompts = _column(columns, name, "messages", read_messages)
        prompts = [
            messages[:-1] if messages[-1]["role"] == "assistant" else messages
            for messages in prompts
        ]
        if not all(prompts):
            row = prompts.index([]) + 1
            raise UserError(
                f"{name}, row {row}: messages must hold more than the assistant's answer"
            )
    elif "text" in columns:
        return _beginnings(config, columns, name, tokenizer)
    else:
        raise _missing_columns(columns, name, "prompt, or messages, or text")
    if isinstance(prompts[0], str):
        refuse_options(columns, name)
        ids = prompt_ids(tokenizer, prompts)
    else:
        options = template_options(columns, name, len(prompts))
        ids = encode_prompt_chats(tokenizer, prompts, _wheres(name, len(prompts)), options)
    ids = cut_prompts(tokenizer, ids, config, name)
    others = {column: list(values) for column, values in columns.items() if column != "prompt"}
    return Prompts(ids, prompts, others)


def _beginnings(
    config: PPOConfig | InferenceConfig,
    columns: dict[str, Sequence],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompts:
    refuse_options(columns, name)
    least, most = config.text_prompt_length
    rng = random.Random(config.seed)
    columns = {column: list(values) for column, values in columns.items()}
    found = Prompts([], [], {column: [] for column in columns})
    begins = {tokenizer.bos_token_id, *opening(tokenizer)}
    rows = encode_texts(tokenizer, _column(columns, name, "text", _string))
    for number, row in enumerate(rows):
        start = int(row[0] in begins) if row else 0
        end = start + rng.randint(least, most)
        if len(row) < start + least:
            continue
        (prompt,) = decode(tokenizer, [row[start:end]])
        while prompt.endswith(REPLACEMENT) and end < len(row):
            end += 1
            (prompt,) = decode(tokenizer, [row[start:end]])
        found.ids.append(row[:end])
        found.prompts.append(prompt)
        for column, values in columns.items():
            found.columns[column].append(values[number])
    if not found.ids:
        raise UserError(
            f"{name}: no text has the {least} tokens of the shortest prompt: give longer texts, or "
            "lower text_prompt_length"
        )
    _tell(
        *(name, len(rows) - len(found.ids), len(rows)),
        f"texts have less than the {least} tokens of the shortest prompt and are left out",
    )
    return found._replace(ids=cut_prompts(tokenizer, found.ids, config, name))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Rows:
    """Token ids as the tokenizer begins a text, without EOS at the end. An empty prompt becomes BOS
    (EOS for a tokenizer without)."""
    return [or_first(tokenizer, row) for row in encode_texts(tokenizer, prompts)]


def cut_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    config: PPOConfig | InferenceConfig,
    name: str,
) -> Rows:
    """The prompts, BOS and the last tokens of longer ones; tells how many these are."""
    length = config.max_prompt_length
    return _cut(tokenizer, rows, length, name, "prompts", "max_prompt_length")


def _cut(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, length: int, name: str, what: str, option: str
) -> Rows:
    number = sum(len(row) > length for row in rows)
    _tell(
        *(name, number, len(rows)),
        f"{what} have more than the {length} tokens of {option} and lose their beginning, a system "
        "prompt first",
    )
    return cut_left(tokenizer, rows, length) if number else rows


def _wheres(name: str, count: int) -> list[str]:
    return [f"{name}, row {number}" for number in range(1, count + 1)]


def _missing_columns(columns: dict[str, Sequence], name: str, wanted: str) -> UserError:
    return UserError(
        f"{name} must have the columns {wanted}; it has {list(columns)}: rename or add some"
    )


def _column(
    columns: dict[str, Sequence], name: str, column: str, read: Callable[[Any, str], Any]
) -> list:
    return [
        read(value, f"{name}, row {number}: {column}")
        for number, value in enumerate(columns[column], 1)
    ]


def _reader(first: Any) -> Callable[[Any, str], Any]:
    """What reads the values that must be of the same kind as the first."""
    return read_messages if isinstance(first, list) else _string


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, got {value!r:.60}{hint(value, list)}")
    if not is_unicode(value):
        raise UserError(f"{what} must be valid Unicode, got {value!r:.60}")
    return value
