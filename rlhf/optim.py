"""Optimizer, schedule and gradient clipping, the same in every stage."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from rlhf.config import TrainConfig
from rlhf.errors import UserError


def make_optimizer(
    parts: list[tuple[list[nn.Parameter], float]], config: TrainConfig, num_steps: int
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW over `(parameters, learning rate)` pairs, and its schedule over `num_steps` steps."""
    groups = []
    for parameters, learning_rate in parts:
        matrices = [p for p in parameters if p.requires_grad and p.ndim >= 2]
        others = [p for p in parameters if p.requires_grad and p.ndim < 2]
        groups.append(
            {"params": matrices, "lr": learning_rate, "weight_decay": config.weight_decay}
        )
        groups.append({"params": others, "lr": learning_rate, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(
        groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(config.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )
    return optimizer, scheduler


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients down to `max_norm`; returns their norm before.

    A norm that is not finite ends the run, because one more step would spoil every weight.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if not norm.isfinite():
        raise UserError(
            f"training diverged, the gradient's norm is {norm.item()}: lower learning_rate"
        )
    return norm
