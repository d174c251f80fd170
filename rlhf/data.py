"""Reading data sets, tokenizing them, and cutting them into batches."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import SupervisedConfig
from rlhf.errors import UserError


class Text(NamedTuple):
    """A token sequence to learn by heart from position `start` (>= 1) on."""

    ids: list[int]
    start: int


def load_columns(path: str) -> dict[str, Sequence]:
    """The columns, by name, of a .jsonl file (one object a line), a .json file (a list of objects)
    or a saved data set. A key that a row lacks is None there; keys that the first lacks are left
    out."""
    source = Path(path)
    if source.is_dir():
        columns = _open_saved(path)
    elif source.is_file():
        columns = _read_json(source)
    else:
        raise UserError(f"data file {path} does not exist: give a .jsonl file")
    if not columns or len(next(iter(columns.values()))) == 0:
        raise UserError(f"data set {path} is empty: it must have at least one row")
    return columns


def _open_saved(path: str) -> dict[str, Sequence]:
    try:
        # Here, because JSON needs no such package.
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise UserError(f"{path} is a folder, to read it pip install datasets: {error}") from error
    try:
        dataset = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a saved data set: {error}") from error
    if not isinstance(dataset, Dataset):
        raise UserError(f"{path} holds the splits {list(dataset)}: name the folder of one")
    return {name: dataset[name] for name in dataset.column_names}


def _read_json(source: Path) -> dict[str, list]:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}") from error
    if source.suffix == ".json":
        rows = _parse(source, 1, text)
        if not isinstance(rows, list):
            raise UserError(f"{source} must hold a list of objects, got {text.strip():.60}")
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [_parse(source, number, line) for number, line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{source}, row {number}: must be an object, got {row!r:.60}")
    return {name: [row.get(name) for row in rows] for name in rows[0]} if rows else {}


def _parse(source: Path, first_line: int, text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{source}, line {line}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{source}, line {first_line}: JSON nested too deeply") from error


def _column(columns: dict[str, Sequence], path: str, name: str, kind: type = str) -> list:
    values = list(columns[name])
    for number, value in enumerate(values, 1):
        if not isinstance(value, kind):
            raise UserError(
                f"{path}, row {number}: {name} must be a {kind.__name__}, got {value!r:.60}"
            )
    return values


def _missing_columns(columns: dict[str, Sequence], path: str, wanted: str) -> UserError:
    return UserError(f"{path} must have the columns {wanted}, it has {list(columns)}")


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


def load_texts(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Text]:
    """SFT data: `text`, learnt whole, or `prompt` + `completion`, of which the latter is learnt.
    EOS is appended."""
    columns = load_columns(path)
    eos = [tokenizer.eos_token_id]
    if {"prompt", "completion"} <= columns.keys():
        prompts = tokenize_prompts(tokenizer, _column(columns, path, "prompt"), max_length)
        completions = tokenizer(_column(columns, path, "completion"), add_special_tokens=False)
        texts = [
            Text((prompt + completion + eos)[:max_length], len(prompt))
            for prompt, completion in zip(prompts, completions.input_ids, strict=True)
        ]
    elif "text" in columns:
        ids = tokenizer(_column(columns, path, "text")).input_ids
        texts = [Text((_without_eos(tokenizer, row) + eos)[:max_length], 1) for row in ids]
    else:
        raise _missing_columns(columns, path, "text, or prompt and completion")
    texts = [text for text in texts if len(text.ids) > text.start]
    if not texts:
        raise UserError(f"{path}: no text leaves anything to learn within max_length {max_length}")
    return texts


def load_rankings(
    path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, append_eos: bool
) -> list[list[list[int]]]:
    """Reward data: for each row the token ids of prompt + answer, best answer first.

    Columns `prompt` and `ranking` (a list of answers, best first), or `prompt`, `chosen`,
    `rejected`. A sequence longer than `max_length` keeps its last tokens.
    """
    columns = load_columns(path)
    if {"prompt", "ranking"} <= columns.keys():
        rankings = _column(columns, path, "ranking", list)
    elif {"prompt", "chosen", "rejected"} <= columns.keys():
        chosen, rejected = (_column(columns, path, name) for name in ("chosen", "rejected"))
        rankings = [list(pair) for pair in zip(chosen, rejected, strict=True)]
    else:
        raise _missing_columns(columns, path, "prompt and ranking, or prompt, chosen, rejected")
    for number, ranking in enumerate(rankings, 1):
        if len(ranking) < 2 or not all(isinstance(answer, str) for answer in ranking):
            raise UserError(
                f"{path}, row {number}: ranking must hold at least 2 strings, got {ranking!r:.60}"
            )
    prompts = tokenize_prompts(tokenizer, _column(columns, path, "prompt"), max_length)
    answers = tokenizer(
        [answer for ranking in rankings for answer in ranking], add_special_tokens=False
    ).input_ids
    eos = [tokenizer.eos_token_id] if append_eos else []
    answers = iter(answers)
    return [
        [(prompt + next(answers) + eos)[-max_length:] for _ in ranking]
        for prompt, ranking in zip(prompts, rankings, strict=True)
    ]


def load_prompts(path: str) -> list[str]:
    """PPO data: the column `prompt`."""
    columns = load_columns(path)
    if "prompt" not in columns:
        raise _missing_columns(columns, path, "prompt")
    return _column(columns, path, "prompt")


def pad(rows: list[list[int]], pad_token_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and their bool mask, padded on `side` to the longest row."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, span] = torch.tensor(row)
        mask[i, span] = True
    return ids, mask


def count_steps(num_examples: int, config: SupervisedConfig) -> int:
    """Optimizer steps of a run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(num_examples / _batch_size(config)))


def _batch_size(config: SupervisedConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def micro_batches(
    lengths: list[int], config: SupervisedConfig, generator: torch.Generator
) -> Iterator[list[list[int]]]:
    """For each optimizer step, without end, its micro-batches of indices.

    An epoch is a shuffle of the examples. Within a window of 32 batches they are sorted by length,
    so that a batch holds little padding, and the batches are shuffled again.
    """
    batch_size = _batch_size(config)
    size = config.per_device_train_batch_size
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), 32 * batch_size):
            window = sorted(order[start : start + 32 * batch_size], key=lengths.__getitem__)
            batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            batch = batches[index]
            yield [batch[i : i + size] for i in range(0, len(batch), size)]
