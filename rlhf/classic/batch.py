"""The rows of a step as tensors."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_kernels import masked_whiten


class Batch(NamedTuple):
    """A step's rows, padded on the right. Position t of (B, L - 1) stands for token t + 1.

    Where `mask` is False, `logprobs` and `ref_logprobs` are those of queries and padding; `kls`,
    `values`, `advantages` and `returns` are 0.
    """

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    mask: Tensor  # (B, L - 1) bool, True at the tokens of responses that count
    logprobs: Tensor
    ref_logprobs: Tensor
    kls: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def tokens(self) -> Tensor:
        return self.input_ids[:, 1:]

    def rows(self, index: Tensor) -> "Batch":
        return Batch(*(x[index] for x in self))


def padded(
    queries: list[Tensor], responses: list[Tensor], response_masks: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and mask of a Batch."""
    ids = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
    masks = [
        torch.cat([torch.zeros_like(query[1:], dtype=torch.bool), counts])
        for query, counts in zip(queries, response_masks, strict=True)
    ]
    rows = ids, [torch.ones_like(row) for row in ids], masks
    return tuple(pad_sequence(x, batch_first=True) for x in rows)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Centred and scaled by the unbiased deviation, as TRL's; `masked_whiten` takes the biased."""
    return masked_whiten(x, mask) * (1 - 1 / mask.sum()).sqrt()
