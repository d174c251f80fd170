"""From the columns of a data set to token ids, and to batches of them.

What people and models say is a string (standard) or a list of messages, dicts with the strings
`role` and `content` (conversational). Strings begin as the tokenizer begins a text; messages go
through its chat template, which writes BOS and the ends of turns itself.
"""

import random
import re
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.columns import load_columns
from rlhf.config import InferenceConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.errors import UserError
from rlhf.options import is_unicode

Messages = list[dict[str, Any]]
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")


class Text(NamedTuple):
    """A token sequence, and of each token whether it is learnt; the first never is."""

    ids: list[int]
    learnt: list[bool]


class Prompts(NamedTuple):
    """Prompts as token ids and as rewards see them, and every column but `prompt`, row by row."""

    ids: list[list[int]]
    prompts: list[str] | list[Messages]
    columns: dict[str, list]

    def rows(self, index: Sequence[int]) -> "Prompts":
        """These rows, in this order."""
        columns = {name: [values[i] for i in index] for name, values in self.columns.items()}
        return Prompts([self.ids[i] for i in index], [self.prompts[i] for i in index], columns)


def load_texts(
    config: SFTConfig, name: str, split: str, tokenizer: PreTrainedTokenizerBase
) -> list[Text]:
    """SFT data: `prompt` + `completion`, of which the latter is learnt; `messages`, of which the
    assistant's are; or `text`, learnt whole.

    Each ends with EOS, unless its last message is not the assistant's. Of longer ones the first
    `config.max_length` tokens stay; those that leave nothing to learn are left out.
    """
    columns = load_columns(name, split=split, config_name=config.dataset_config_name)
    if {"prompt", "completion"} <= columns.keys():
        texts = _completions(columns, name, tokenizer, config.max_length)
    elif "messages" in columns:
        texts = [
            _assistant_text(tokenizer, messages, f"{name}, row {number}")
            for number, messages in enumerate(_column(columns, name, "messages", _messages), 1)
        ]
    elif "text" in columns:
        rows = tokenizer(_column(columns, name, "text", _string)).input_ids
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
    _tell_left_out(name, kept, texts, f"rows hold nothing to learn within max_length {length}")
    return kept


def _tell_left_out(name: str, kept: list, rows: list, what: str) -> None:
    if len(kept) < len(rows) and distributed.is_main():
        number = len(rows) - len(kept)
        print(f"{name}: {number} of {len(rows)} {what} and are left out", flush=True)


def _completions(
    columns: dict[str, Sequence], name: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Text]:
    read = _reader(columns["prompt"][0])
    prompts = _column(columns, name, "prompt", read)
    completions = _column(columns, name, "completion", read)
    if read is _messages:
        return [
            _chat_text(
                tokenizer,
                prompt + completion,
                [(len(prompt), len(prompt + completion))],
                f"{name}, row {number}",
            )
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1)
        ]
    starts = tokenize_prompts(tokenizer, prompts, max_length)
    ends = tokenizer(completions, add_special_tokens=False).input_ids
    return [
        _learn_from(len(start), start + with_eos(tokenizer, end))
        for start, end in zip(starts, ends, strict=True)
    ]


def _learn_from(start: int, ids: list[int]) -> Text:
    return Text(ids, [position >= start for position in range(len(ids))])


def load_rankings(
    config: RewardConfig, name: str, split: str, tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]]]:
    """Reward data: for each row the token ids of prompt + answer, best answer first.

    The columns are `prompt` and `ranking` (a list of answers, best first); or `prompt`, `chosen`
    and `rejected`; or `chosen` and `rejected`, each of which begins with its prompt. With
    `config.append_eos` each sequence ends with EOS; without, as its text or chat template does. Of
    longer ones the last `config.max_length` tokens stay.
    """
    columns = load_columns(name, split=split, config_name=config.dataset_config_name)
    if {"prompt", "ranking"} <= columns.keys():
        rankings = list(columns["ranking"])
    elif {"chosen", "rejected"} <= columns.keys():
        rankings = [list(pair) for pair in zip(columns["chosen"], columns["rejected"], strict=True)]
    else:
        raise _missing_columns(
            columns, name, "prompt and ranking, or chosen and rejected with or without prompt"
        )
    rows = [f"{name}, row {number}" for number in range(1, len(rankings) + 1)]
    for row, ranking in zip(rows, rankings, strict=True):
        if not isinstance(ranking, list) or len(ranking) < 2:
            raise UserError(
                f"{row}: ranking must be a list of at least 2 answers, best first, got "
                f"{ranking!r:.60}"
            )
    has_prompts = "prompt" in columns
    read = _reader(columns["prompt"][0] if has_prompts else rankings[0][0])
    prompts = _column(columns, name, "prompt", read) if has_prompts else [[] for _ in rankings]
    rankings = [
        [read(answer, f"{row}: an answer") for answer in ranking]
        for row, ranking in zip(rows, rankings, strict=True)
    ]
    # `answers` is all of them end to end; `starts` is what each row's answers still lack.
    starts = [[] for _ in rankings]
    if read is _messages:
        chats = [
            _render(tokenizer, prompt + answer, row)
            for row, prompt, ranking in zip(rows, prompts, rankings, strict=True)
            for answer in ranking
        ]
        answers = tokenizer(chats, add_special_tokens=False).input_ids
    else:
        texts = list(chain.from_iterable(rankings))
        answers = tokenizer(texts, add_special_tokens=not has_prompts).input_ids
        if has_prompts:
            starts = tokenize_prompts(tokenizer, prompts, config.max_length)
    if config.append_eos:
        answers = [with_eos(tokenizer, answer) for answer in answers]
    answers = iter(answers)
    return [
        [(start + next(answers))[-config.max_length :] for _ in ranking]
        for start, ranking in zip(starts, rankings, strict=True)
    ]


def load_prompts(
    config: PPOConfig | InferenceConfig,
    name: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompts:
    """PPO data: `prompt`; or `messages`, without the assistant's last; or the beginnings of `text`.

    A beginning is as many tokens as `random.Random(config.seed)` draws from the two bounds of
    `config.text_prompt_length`, or a few more where it would end inside a character; texts shorter
    than the lower bound are left out. Of longer prompts the last `config.max_prompt_length` tokens
    stay.
    """
    columns = load_columns(name, split=split, config_name=config.dataset_config_name)
    if "prompt" in columns:
        prompts = _column(columns, name, "prompt", _reader(columns["prompt"][0]))
    elif "messages" in columns:
        prompts = _column(columns, name, "messages", _messages)
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
        ids = tokenize_prompts(tokenizer, prompts, config.max_prompt_length)
    else:
        chats = [
            _render(tokenizer, messages, f"{name}, row {number}", add_generation_prompt=True)
            for number, messages in enumerate(prompts, 1)
        ]
        ids = tokenizer(chats, add_special_tokens=False).input_ids
        ids = [row[-config.max_prompt_length :] for row in ids]
    others = {column: list(values) for column, values in columns.items() if column != "prompt"}
    return Prompts(ids, prompts, others)


def _beginnings(
    config: PPOConfig | InferenceConfig,
    columns: dict[str, Sequence],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Prompts:
    least, most = config.text_prompt_length
    rng = random.Random(config.seed)
    columns = {column: list(values) for column, values in columns.items()}
    found = Prompts([], [], {column: [] for column in columns})
    rows = tokenizer(_column(columns, name, "text", _string)).input_ids
    for number, row in enumerate(rows):
        row = _without_eos(tokenizer, row)
        start = int(row[:1] == [tokenizer.bos_token_id])
        end = start + rng.randint(least, most)
        if len(row) < start + least:
            continue
        prompt = tokenizer.decode(row[start:end])
        while prompt.endswith("\N{REPLACEMENT CHARACTER}") and end < len(row):
            end += 1
            prompt = tokenizer.decode(row[start:end])
        found.ids.append(row[:end][-config.max_prompt_length :])
        found.prompts.append(prompt)
        for column, values in columns.items():
            found.columns[column].append(values[number])
    if not found.ids:
        raise UserError(
            f"{name}: no text has the {least} tokens of the shortest prompt: give longer texts, or "
            "lower text_prompt_length"
        )
    what = f"texts have less than the {least} tokens of the shortest prompt"
    _tell_left_out(name, found.ids, rows, what)
    return found


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int
) -> list[list[int]]:
    """Token ids as the tokenizer begins a text, without EOS at the end, the last `max_length`.

    An empty prompt becomes BOS (EOS for a tokenizer without), so that there is a first position.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [_without_eos(tokenizer, row) for row in tokenizer(prompts).input_ids]
    return [row[-max_length:] or [first] for row in ids]


def _without_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids up to the EOS that only white space follows (chat templates write it after a turn, no
    response has it), or with EOS appended where there is none."""
    eos = tokenizer.eos_token_id
    if eos in ids:
        end = len(ids) - ids[::-1].index(eos)
        if not tokenizer.decode(ids[end:]).strip():
            return ids[:end]
    return [*ids, eos]


def _assistant_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, row: str) -> Text:
    """A conversation of which what the assistant says is learnt."""
    if tokenizer.is_fast and GENERATION_BLOCK.search(str(tokenizer.chat_template)):
        encoded = _apply_template(
            tokenizer, messages, row, return_dict=True, return_assistant_tokens_mask=True
        )
        learnt = [bool(flag) for flag in encoded["assistant_masks"]]
        return _end_chat(tokenizer, messages, Text(encoded["input_ids"], learnt))
    if messages[0]["role"] == "assistant":
        raise UserError(f"{row}: messages must begin with a system or user message, to be answered")
    turns = [(i, i + 1) for i, message in enumerate(messages) if message["role"] == "assistant"]
    return _chat_text(tokenizer, messages, turns, row)


def _chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, turns: list[tuple[int, int]], row: str
) -> Text:
    """A conversation of which the messages start, ..., end - 1 of each turn (start, end) are
    learnt, from where a response would begin on."""
    chats = []
    for start, end in turns:
        chats += [
            _render(tokenizer, messages[:start], row, add_generation_prompt=True),
            _render(tokenizer, messages[:end], row),
        ]
    chats.append(_render(tokenizer, messages, row))
    if not all(longer.startswith(shorter) for shorter, longer in pairwise(chats)):
        raise UserError(
            f"{row}: the tokenizer's chat template writes a message otherwise once others follow, "
            "so that what to learn cannot be told: mark it in the template with {% generation %}, "
            "or give each answer its own row"
        )
    *parts, ids = tokenizer(chats, add_special_tokens=False).input_ids
    # Not the length of each part: its last token may have grown together with the next text.
    bounds = [_common_length(part, ids) for part in parts]
    learnt = [False] * len(ids)
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        learnt[start:end] = [True] * (end - start)
    return _end_chat(tokenizer, messages, Text(ids, learnt))


def _end_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: Text) -> Text:
    if messages[-1]["role"] != "assistant":
        return text
    ids = with_eos(tokenizer, text.ids)
    return Text(ids, [*text.learnt, True][: len(ids)])


def _common_length(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, row: str, **options) -> str:
    chat = _apply_template(tokenizer, messages, row, tokenize=False, **options)
    if not is_unicode(chat):
        raise UserError(f"{row}: the messages must be valid Unicode, got {chat!r:.60}")
    return chat


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Messages, row: str, **options):
    if tokenizer.chat_template is None:
        raise UserError(
            f"{row} holds messages, but the tokenizer has no chat template: use a model that has "
            "one, set tokenizer.chat_template and save the tokenizer, or give plain strings"
        )
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises whatever its expressions raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{row}: the chat template does not take these messages: {reason:.300}"
        ) from error


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
    return _messages if isinstance(first, list) else _string


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, got {value!r:.60}{_hint(value, list)}")
    if not is_unicode(value):
        raise UserError(f"{what} must be valid Unicode, got {value!r:.60}")
    return value


def _hint(value: Any, other: type) -> str:
    """What to say of a value that is of the `other` kind, messages or strings."""
    rule = " (messages must be in all rows and columns or in none, and never in text)"
    return rule if isinstance(value, other) and value else ""


def _messages(value: Any, what: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} must be a list of messages, got {value!r:.60}{_hint(value, str)}")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UserError(
                f"{what} must hold messages with the strings role and content, got {message!r:.60}"
            )
    # Arrow tables give every message the keys of all, None where it has none.
    return [{k: v for k, v in message.items() if v is not None} for message in value]
