"""Text and token ids, and how they agree where a prompt ends and its completion begins.

A tokenizer may write a space in front of whatever it encodes, drop the one in front of whatever it
decodes, or have a token that covers the last letters of one text and the first of the next. So a
completion is never encoded or decoded by itself::

    ids  = encode(prompt + completion) after encode(prompt)
    text = decode(prompt + completion) after decode(prompt)

and a prompt has the same ids whatever follows it: those that a policy is prompted with.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

Rows = list[list[int]]
Encode = Callable[[PreTrainedTokenizerBase, list[str]], Rows]
# What to put before a completion so that no space is written there: the first after which its
# tokens begin anew and say the right text.
LEADS = ("", "\n", ".", "a", "0")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Pairs(NamedTuple):
    """Prompts and their completions as token ids, and in how many rows the tokenizer had no tokens
    for the completion that say just its text, as in the middle of a word of a word-level one."""

    prompts: Rows
    completions: Rows
    inexact: int


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer writes before a text: BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Rows:
    """Token ids as the tokenizer begins a text, without what it writes at the end. A text that
    begins with BOS itself gets no second one."""
    start = opening(tokenizer)
    rows = encode_chats(tokenizer, texts)
    return [row if row[: len(start)] == start else start + row for row in rows]


def encode_chats(tokenizer: PreTrainedTokenizerBase, chats: list[str]) -> Rows:
    """Token ids of what a chat template wrote, BOS and EOS with the rest."""
    return tokenizer(chats, add_special_tokens=False).input_ids if chats else []


def or_first(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids, or BOS (EOS for a tokenizer without) where there are none, so that there is a first
    position."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return ids or [first]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, encode: Encode, prompts: list[str], completions: list[str]
) -> Pairs:
    """Each prompt as `encode` gives it, and its completion as what continues it.

    Where encode(prompt + completion) begins with the prompt's ids, the rest is the completion.
    Where a token covers the seam, the completion is encoded after a neutral character instead,
    which is chosen so that both together are decoded to the same text.
    """
    starts = encode(tokenizer, prompts)
    wholes = encode(tokenizer, [a + b for a, b in zip(prompts, completions, strict=True)])
    ends = [whole[len(start) :] for start, whole in zip(starts, wholes, strict=True)]
    merged = [i for i, start in enumerate(starts) if wholes[i][: len(start)] != start]
    texts = dict(zip(merged, _spell(tokenizer, [wholes[i] for i in merged]), strict=True))
    for lead in LEADS if texts else ():
        found = encode_chats(tokenizer, [lead, *(lead + completions[i] for i in texts)])
        before, rows = found[0], dict(zip(texts, found[1:], strict=True))
        if lead == LEADS[0]:
            ends = [rows.get(i, end) for i, end in enumerate(ends)]
        rows = {i: row[len(before) :] for i, row in rows.items() if row[: len(before)] == before}
        spelt = _spell(tokenizer, [starts[i] + row for i, row in rows.items()])
        for (i, row), text in zip(rows.items(), spelt, strict=True):
            if text == texts[i]:
                ends[i] = row
                del texts[i]
    return Pairs(starts, ends, len(texts))


def _spell(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[str]:
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]


def with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids up to the EOS that only white space follows (chat templates write it after a turn, no
    response has it), or with EOS appended where there is none."""
    ids = until_eos(tokenizer, ids)
    eos = tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]


def until_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids up to the EOS that only white space follows, or all where there is none."""
    eos = tokenizer.eos_token_id
    if eos in ids:
        end = len(ids) - ids[::-1].index(eos)
        if not _spell(tokenizer, [ids[end:]])[0].strip():
            return ids[:end]
    return ids


def cut_left(tokenizer: PreTrainedTokenizerBase, rows: Rows, length: int) -> Rows:
    """The last `length` ids of each row, the first of them BOS if the row begins with it: models
    know no text without."""
    begins = {tokenizer.bos_token_id, *opening(tokenizer)}
    return [
        row[:1] + row[1 - length :] if len(row) > length > 1 and row[0] in begins else row[-length:]
        for row in rows
    ]


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[str]:
    """Texts without special tokens, spaces as they are."""
    exact = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(row, **exact) for row in rows]


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Rows, completions: Rows
) -> list[str]:
    """Each completion's text: what decode(prompt + completion) has after decode(prompt)."""
    texts = decode(tokenizer, prompts)
    wholes = decode(tokenizer, [a + b for a, b in zip(prompts, completions, strict=True)])
    return [
        whole.removeprefix(text)
        if whole.startswith(text)
        else _decode_over_seam(tokenizer, text, whole, completion)
        for text, whole, completion in zip(texts, wholes, completions, strict=True)
    ]


def _decode_over_seam(
    tokenizer: PreTrainedTokenizerBase, text: str, whole: str, completion: list[int]
) -> str:
    """The completion's text where its first tokens change that of the prompt: they complete a
    character that the prompt only began, or make one that was whole invalid."""
    begun = text.rstrip(REPLACEMENT)
    if begun != text and whole.startswith(begun):
        return whole.removeprefix(begun)
    neutral = encode_chats(tokenizer, ["a"])[0]
    before, both = decode(tokenizer, [neutral, neutral + completion])
    return both.removeprefix(before)
