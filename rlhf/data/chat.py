"""Conversations to text and token ids, by the tokenizer's chat template.

A message is a dict with the strings `role` and `content`, or what else the template knows: a
content that is a list of text parts, `tool_calls` with or without content. The columns `tools` (a
list of JSON schemas) and `chat_template_kwargs` (a dict) are given to the template with each row.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.config.fields import is_unicode
from rlhf.data.seam import Rows, encode_chats, encode_pairs, until_eos, with_eos
from rlhf.errors import UserError, one_line

Messages = list[dict[str, Any]]
Options = dict[str, Any]
OPTION_COLUMNS = ("tools", "chat_template_kwargs")
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")
# What chat_template_kwargs cannot set, since the trainer does.
RESERVED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents"
}


class Text(NamedTuple):
    """A token sequence, and of each token whether it is learnt; the first never is."""

    ids: list[int]
    learnt: list[bool]


def read_messages(value: Any, what: str) -> Messages:
    """The messages, with a content in text parts as one string and without keys that are None,
    which Arrow tables give to every message that lacks what another has."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} must be a list of messages, got {value!r:.60}{hint(value, str)}")
    return [_read_message(message, what) for message in value]


def hint(value: Any, other: type) -> str:
    """What to say of a value that is of the `other` kind, messages or strings."""
    rule = " (messages must be in all rows and columns or in none, and never in text)"
    return rule if isinstance(value, other) and value else ""


def _read_message(value: Any, what: str) -> dict[str, Any]:
    message = _without_none(value)
    if isinstance(message, dict) and isinstance(message.get("content"), list):
        parts = message["content"]
        if not all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in parts
        ):
            raise UserError(
                f'{what} must have parts {{"type": "text", "text": ...}} where a content is a '
                f"list: only text is learnt here, got {parts!r:.60}"
            )
        message["content"] = "".join(part["text"] for part in parts)
    if (
        not isinstance(message, dict)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content", "" if message.get("tool_calls") else None), str)
    ):
        raise UserError(
            f"{what} must hold messages with the strings role and content, got {value!r:.60}"
        )
    return message


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def template_options(columns: Mapping[str, Sequence], name: str, count: int) -> list[Options]:
    """What each row's `tools` and `chat_template_kwargs` give to the chat template."""
    empty = [None] * count
    rows = zip(*(columns.get(column, empty) for column in OPTION_COLUMNS), strict=True)
    return [_options(*row, f"{name}, row {number}") for number, row in enumerate(rows, 1)]


def _options(tools: Any, kwargs: Any, where: str) -> Options:
    tools = _from_json(tools)
    if tools and not (isinstance(tools, list) and all(isinstance(x, dict) for x in tools)):
        raise UserError(
            f"{where}: tools must be a list of JSON schemas (or that as a JSON string), got "
            f"{tools!r:.60}"
        )
    kwargs = _from_json(kwargs)
    if kwargs and not isinstance(kwargs, dict):
        raise UserError(f"{where}: chat_template_kwargs must be a dict, got {kwargs!r:.60}")
    if taken := sorted(RESERVED & set(kwargs or {})):
        raise UserError(
            f"{where}: chat_template_kwargs cannot set {taken[0]!r}, which the trainer sets itself"
        )
    return ({"tools": tools} if tools else {}) | (kwargs or {})


def _from_json(value: Any) -> Any:
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return _without_none(value)


def refuse_options(columns: Mapping[str, Sequence], name: str) -> None:
    """Raises UserError if rows of strings, which go through no chat template, have options."""
    for column in OPTION_COLUMNS:
        if any(columns.get(column, ())):
            raise UserError(
                f"{name} has the column {column}, which goes into the chat template, but its rows "
                "are strings: give messages, or leave the column out"
            )


def known_options(tokenizer: PreTrainedTokenizerBase, options: Options) -> Options:
    """Keeps the options that the chat template mentions."""
    if not options:
        return options
    template = str(tokenizer.get_chat_template(tools=options.get("tools")))
    names = set(re.findall(r"\w+", template))
    return {name: value for name, value in options.items() if name in names}


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str,
    options: Options,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the chat template writes it; `where` says whose it is in errors."""
    chat = _apply_template(
        *(tokenizer, messages, where, options),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    if not is_unicode(chat):
        raise UserError(f"{where}: the messages must be valid Unicode, got {chat!r:.60}")
    return chat


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, options: Options, **how
):
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} holds messages, but the tokenizer has no chat template: use a model that has "
            "one, set tokenizer.chat_template and save the tokenizer, or give plain strings"
        )
    for name in options.keys() - known_options(tokenizer, options).keys():
        raise UserError(
            f"{where}: the chat template does not know {name!r}, which the row gives for it: use a "
            "model whose template does, or leave it out of the data"
        )
    try:
        return tokenizer.apply_chat_template(messages, **options, **how)
    except Exception as error:  # a template raises whatever its expressions raise
        raise UserError(
            f"{where}: the chat template does not take these messages: {one_line(error):.300}"
        ) from error


def encode_prompt_chats(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Messages],
    wheres: Sequence[str],
    options: Sequence[Options],
) -> Rows:
    """Each conversation as a policy is prompted with it, from where an answer would begin on."""
    rows = zip(chats, wheres, options, strict=True)
    return encode_chats(
        tokenizer, [render(tokenizer, *row, add_generation_prompt=True) for row in rows]
    )


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Messages],
    wheres: Sequence[str],
    options: Sequence[Options],
) -> tuple[Rows, Rows]:
    """Each conversation in two parts: as a policy is prompted for its last message, and this.

    The first part is empty where the last message is not the assistant's, or where the template
    does not write it as it prompts for it.
    """
    prompts, answers = [], []
    for chat, where, known in zip(chats, wheres, options, strict=True):
        whole, prompt = render(tokenizer, chat, where, known), ""
        if len(chat) > 1 and chat[-1]["role"] == "assistant":
            prompt = render(tokenizer, chat[:-1], where, known, add_generation_prompt=True)
        prompts.append(prompt if whole.startswith(prompt) else "")
        answers.append(whole.removeprefix(prompts[-1]))
    return encode_pairs(tokenizer, encode_chats, prompts, answers)[:2]


def learn_answers(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Messages],
    wheres: Sequence[str],
    options: Sequence[Options],
    firsts: Sequence[int],
) -> list[list[Text]]:
    """What the assistant says in each conversation from its message `first` on, learnt as it would
    be generated: after the very tokens that the template gives as the prompt for it, up to EOS.

    A turn stands in one row with those before it where the prompt for it begins with them. Where
    the template writes earlier turns otherwise (Qwen3 leaves out what they thought), it has a row
    of its own, of its prompt and itself.
    """
    prompts, answers, sizes = [], [], []
    for chat, where, known, first in zip(chats, wheres, options, firsts, strict=True):
        turns = [i for i in range(first, len(chat)) if chat[i]["role"] == "assistant"]
        sizes.append(len(turns))
        for turn in turns:
            prompt, answer = _turn(tokenizer, chat[: turn + 1], where, known)
            prompts.append(prompt)
            answers.append(answer)
    starts, ends, _ = encode_pairs(tokenizer, encode_chats, prompts, answers)
    pairs = zip(starts, ends, strict=True)
    return [_join_turns(tokenizer, list(islice(pairs, size))) for size in sizes]


def _turn(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, options: Options
) -> tuple[str, str]:
    """The prompt for the last message, and how the template goes on with it."""
    if len(messages) == 1:
        raise UserError(
            f"{where}: messages must begin with a system or user message, to be answered"
        )
    prompt = render(tokenizer, messages[:-1], where, options, add_generation_prompt=True)
    whole = render(tokenizer, messages, where, options)
    if not whole.startswith(prompt):
        raise UserError(
            f"{where}: the chat template ends the prompt for an answer with {prompt[-20:]!r}, but "
            "does not write the answer after that, so that what to learn cannot be told: mark it "
            "in the template with {% generation %}, or choose another prompt by "
            "chat_template_kwargs"
        )
    return prompt, whole.removeprefix(prompt)


def _join_turns(
    tokenizer: PreTrainedTokenizerBase, turns: list[tuple[list[int], list[int]]]
) -> list[Text]:
    """The turns of a conversation, each with its prompt, in as few rows as hold them."""
    texts = []
    for start, end in turns:
        end = until_eos(tokenizer, end)
        learnt = []
        if texts and start[: len(texts[-1].ids)] == texts[-1].ids:
            learnt = texts.pop().learnt
        gap = [False] * (len(start) - len(learnt))
        texts.append(Text(start + end, learnt + gap + [True] * len(end)))
    return [_end(tokenizer, text) for text in texts]


def learn_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, options: Options
) -> Text:
    """The conversation, of which is learnt what the template marks with {% generation %}."""
    encoded = _apply_template(
        *(tokenizer, messages, where, options), return_dict=True, return_assistant_tokens_mask=True
    )
    text = Text(encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]])
    return _end(tokenizer, text) if messages[-1]["role"] == "assistant" else text


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the template says what is to learn."""
    return tokenizer.is_fast and bool(GENERATION_BLOCK.search(str(tokenizer.chat_template)))


def _end(tokenizer: PreTrainedTokenizerBase, text: Text) -> Text:
    ids = with_eos(tokenizer, text.ids)
    return Text(ids, [*text.learnt, True][: len(ids)])


def answer_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space that the template writes between its prompt for an answer and the answer:
    no part of a message's content, though the policy samples it."""
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        prompt = render(tokenizer, [user], "", {}, add_generation_prompt=True)
        lead = render(tokenizer, [user, answer], "", {}).removeprefix(prompt).partition("b")[0]
    except UserError:  # it wants other messages than these
        return ""
    return "" if lead.strip() else lead
