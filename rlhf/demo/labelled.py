"""A world of real text: sentences that people have labelled positive or negative.

As in the classic experiment on film reviews (Ziegler et al., 2019, arXiv:1909.08593), the policy
continues the first words of a text and is rewarded for sounding positive. The labels reach PPO only
through the reward model; an independent judge, trained on texts that no stage has seen, measures
the result.
"""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.data.columns import load_columns
from rlhf.demo.base import EOS
from rlhf.errors import UserError

LABELS = ("negative", "positive")
MIN_TEXTS_PER_LABEL = 20
PROMPT_TOKENS = (2, 8)


class Example(NamedTuple):
    text: str
    positive: bool


class Split(NamedTuple):
    """Disjoint parts: for the SFT and reward stages, for the judge, and held out from both."""

    train: list[Example]
    judge: list[Example]
    heldout: list[Example]


def read_examples(path: str | Path) -> list[Example]:
    """The rows of a JSONL file with the columns `text` and `label` (positive or negative).

    Texts that occur twice are kept once, so that the parts of a split share none. Raises UserError
    for a file that is missing, empty or not JSONL, lacks a column, or holds another or too few
    labels.
    """
    columns = load_columns(str(path))
    missing = [name for name in ("text", "label") if name not in columns]
    if missing:
        raise UserError(
            f"{path} must have the columns text and label, it has {list(columns)}: "
            f"add {' and '.join(missing)}"
        )
    examples: dict[str, Example] = {}
    for number, (text, label) in enumerate(zip(columns["text"], columns["label"], strict=True), 1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}, row {number}: text must be a string of words, got {text!r}")
        if label not in LABELS:
            raise UserError(
                f"{path}, row {number}: label must be 'positive' or 'negative', got {label!r}"
            )
        examples.setdefault(text.strip(), Example(text.strip(), label == "positive"))
    for label in LABELS:
        count = sum(LABELS[example.positive] == label for example in examples.values())
        if count < MIN_TEXTS_PER_LABEL:
            raise UserError(
                f"{path} must have at least {MIN_TEXTS_PER_LABEL} different texts of each label, "
                f"it has {count} {label}: add some"
            )
    return list(examples.values())


def split(examples: Sequence[Example], rng: random.Random) -> Split:
    """A random half for training, 40 % for the judge, the rest held out; each label alike."""
    parts = Split([], [], [])
    for label in (False, True):
        of_label = [example for example in examples if example.positive == label]
        rng.shuffle(of_label)
        ends = (0, round(0.5 * len(of_label)), round(0.9 * len(of_label)), len(of_label))
        for part, (start, end) in zip(parts, pairwise(ends), strict=True):
            part.extend(of_label[start:end])
    for part in parts:
        rng.shuffle(part)
    return parts


def preference_pairs(
    examples: Sequence[Example], partners: int, rng: random.Random
) -> list[dict[str, str]]:
    """(positive, negative) pairs for the reward model; each positive text gets `partners` partners.

    The prompt is empty: two texts by different people share no beginning, and a made-up one would
    only take words from both. What they say, from their first word on, is the answer. Half of the
    pairs end with EOS and half do not, as the policy's responses do.
    """
    positive = [example.text for example in examples if example.positive]
    negative = [example.text for example in examples if not example.positive]
    pairs = []
    for _ in range(partners):
        rng.shuffle(negative)
        for i, chosen in enumerate(positive):
            end = rng.choice(("", EOS))
            rejected = negative[i % len(negative)]
            pairs.append({"prompt": "", "chosen": chosen + end, "rejected": rejected + end})
    return pairs


def prompts(
    examples: Sequence[Example],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
) -> list[str]:
    """The first 2 to 8 tokens of texts drawn from the examples, as text.

    A cut inside a character, or one after which the text would be tokenized otherwise, is redrawn.
    """
    drawn: list[str] = []
    while len(drawn) < count:
        ids = tokenizer(rng.choice(examples).text, add_special_tokens=False).input_ids
        ids = ids[: rng.randint(*PROMPT_TOKENS)]
        text = tokenizer.decode(ids)
        if tokenizer(text, add_special_tokens=False).input_ids == ids:
            drawn.append(text)
    return drawn
