"""Rows of token ids made into tensors."""

import torch
from torch import Tensor


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
