"""Rows of token ids made into tensors, and the order in which a fixed data set is learnt."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf.config import SupervisedConfig
from rlhf.distributed import world_size


def pad(rows: list[list[int]], pad_token_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of token ids (or of flags) as [B, L], padded on `side` to the longest, and their bool
    mask."""
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
    """Rows of one optimizer step, over all processes."""
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return size * world_size()


def micro_batches(
    lengths: list[int], config: SupervisedConfig, generator: torch.Generator
) -> Iterator[list[list[int]]]:
    """For each optimizer step, without end, the micro-batches of indices of its whole batch.

    Every process gets the same ones, of at most per_device_train_batch_size indices each, and takes
    `batch[rank::world_size]`; after an epoch's last batch, which may be smaller, some get none.

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
