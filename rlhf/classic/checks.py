"""What `PPOTrainer.generate` and `step` require of what they are given; each raises UserError."""

import torch
from torch import Tensor

from rlhf.errors import UserError


def token_rows(
    name: str, rows: list[Tensor], vocab_size: int, device: torch.device
) -> list[Tensor]:
    """A list of 1-D tensors of token ids, none empty, as int64 on `device`."""
    tensors(name, rows)
    for i, row in enumerate(rows):
        _require(row.dim() == 1, f"{name}[{i}] must be 1-D", f"shape {tuple(row.shape)}")
        _require(
            row.dtype in (torch.int64, torch.int32),
            f"{name}[{i}] must hold int64 or int32 token ids",
            row.dtype,
        )
        _require(len(row) > 0, f"{name}[{i}] must have at least one token", "none")
    rows = [row.to(device, torch.int64) for row in rows]
    lowest, highest = torch.stack(torch.cat(rows).aminmax()).tolist()
    _require(
        lowest >= 0 and highest < vocab_size,
        f"{name} must hold token ids in [0, {vocab_size}), the model's vocabulary",
        lowest if lowest < 0 else highest,
    )
    return rows


def score_list(scores: list[Tensor], device: torch.device) -> Tensor:
    """A list of finite scores, each a tensor of one number with at most one dimension, as (B,)."""
    tensors("scores", scores)
    for i, score in enumerate(scores):
        _require(
            score.shape in [(), (1,)],
            f"scores[{i}] must be a single number",
            f"shape {tuple(score.shape)}",
        )
    stacked = torch.stack([score.reshape(()).to(device, torch.float32) for score in scores])
    for i in (~stacked.isfinite()).nonzero()[:1].flatten().tolist():
        raise UserError(f"scores[{i}] must be finite, got {stacked[i].item()}")
    return stacked


def response_masks(masks: list[Tensor], responses: list[Tensor]) -> list[Tensor]:
    """For each response a tensor of its length, nonzero where a token counts, as bool."""
    tensors("response_masks", masks)
    for i, (mask, response) in enumerate(zip(masks, responses, strict=True)):
        _require(
            mask.shape == response.shape,
            f"response_masks[{i}] must have shape {tuple(response.shape)} like its response",
            f"shape {tuple(mask.shape)}",
        )
        _require(bool(mask.any()), f"response_masks[{i}] must count at least one token", "none")
    return [mask.to(responses[0].device).bool() for mask in masks]


def batch_size(size: int, **lists: list) -> None:
    """Each list must have `size` elements."""
    for name, values in lists.items():
        _require(
            isinstance(values, list), f"{name} must be a list of tensors", type(values).__name__
        )
        _require(len(values) == size, f"{name} must have batch_size = {size} elements", len(values))


def tensors(name: str, values: list[Tensor]) -> None:
    _require(
        isinstance(values, list) and len(values) > 0,
        f"{name} must be a list of at least one tensor",
        type(values).__name__,
    )
    for i, value in enumerate(values):
        _require(isinstance(value, Tensor), f"{name}[{i}] must be a tensor", type(value).__name__)


def lengths(queries: list[Tensor], responses: list[Tensor], num_positions: int | None) -> None:
    """The model must have a position for each token of a query and its response."""
    longest = max(len(query) + len(row) for query, row in zip(queries, responses, strict=True))
    _require(
        num_positions is None or longest <= num_positions,
        f"queries with their responses must fit the model's {num_positions} positions",
        f"{longest} tokens",
    )


def instance(name: str, value: object, *classes: type) -> None:
    """`value` must be of one of the classes."""
    names = " or ".join(f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in classes)
    _require(isinstance(value, classes), f"{name} must be of type {names}", type(value).__name__)


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"{rule}, got {got}")
