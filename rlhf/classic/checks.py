"""What `PPOTrainer` requires of what it is given; each raises UserError."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf.classic.model import AutoModelForCausalLMWithValueHead
from rlhf.errors import UserError


def token_rows(
    name: str, rows: list[Tensor], vocab_size: int, device: torch.device, size: int | None = None
) -> list[Tensor]:
    """A list of 1-D tensors of token ids, none empty, as int64 on `device`."""
    _tensors(name, rows, size)
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


def score_list(scores: list[Tensor], device: torch.device, size: int) -> Tensor:
    """A list of finite scores, each a tensor of one number with at most one dimension, as (B,)."""
    _tensors("scores", scores, size)
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
    _tensors("response_masks", masks, len(responses))
    for i, (mask, response) in enumerate(zip(masks, responses, strict=True)):
        _require(
            mask.shape == response.shape,
            f"response_masks[{i}] must have shape {tuple(response.shape)} like its response",
            f"shape {tuple(mask.shape)}",
        )
        _require(bool(mask.any()), f"response_masks[{i}] must count at least one token", "none")
    return [mask.to(responses[0].device).bool() for mask in masks]


def _tensors(name: str, values: list[Tensor], size: int | None) -> None:
    """A list of `size` tensors, or of at least one."""
    _require(isinstance(values, list), f"{name} must be a list of tensors", type(values).__name__)
    if size is not None:
        _require(len(values) == size, f"{name} must have batch_size = {size} elements", len(values))
    _require(len(values) > 0, f"{name} must have at least one tensor", "an empty list")
    for i, value in enumerate(values):
        _require(isinstance(value, Tensor), f"{name}[{i}] must be a tensor", type(value).__name__)


def positions(num_tokens: int, num_positions: int | None) -> None:
    """The model must have a position for each token of a query and its response."""
    _require(
        num_positions is None or num_tokens <= num_positions,
        f"queries with their responses must fit the model's {num_positions} positions",
        f"{num_tokens} tokens",
    )


def reference(ref_model: AutoModelForCausalLMWithValueHead, model: nn.Module) -> None:
    """The reference, which is frozen, must not be what is trained."""
    instance("ref_model", ref_model, AutoModelForCausalLMWithValueHead)
    if ref_model.pretrained_model is model.pretrained_model:
        raise UserError(
            "ref_model must be a model of its own, got that which is trained: leave it out for a "
            "frozen copy"
        )


def optimizer(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """It must hold some of the parameters."""
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    _require(
        any(id(parameter) in held for parameter in parameters),
        "optimizer must hold parameters of the model that require a gradient",
        "none",
    )


def instance(name: str, value: object, *classes: type) -> None:
    """`value` must be of one of the classes."""
    names = " or ".join(f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in classes)
    _require(isinstance(value, classes), f"{name} must be of type {names}", type(value).__name__)


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise UserError(f"{rule}, got {got}")
