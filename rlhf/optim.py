"""Optimizer, schedule and gradient clipping, the same in every stage."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from rlhf.config.training import TrainConfig
from rlhf.errors import UserError


def scale_epsilon(optimizer: torch.optim.AdamW, args: tuple, kwargs: dict) -> None:
    """Before a step of AdamW, gives each group the epsilon that makes it a step of TensorFlow's::

        θ ← θ - lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε̂)

    PyTorch adds its ε to √(v / (1 - β₂ᵗ)) rather than to √v, so ε = ε̂ / √(1 - β₂ᵗ). That is 32 ε̂
    at the first step if β₂ is 0.999, and falls to ε̂: gradients below it move their weights less
    (ε̂ of Kingma and Ba, 2015, arXiv:1412.6980, section 2; for PPO see Huang et al., 2023, "The N
    Implementation Details of RLHF with PPO").
    """
    for group in optimizer.param_groups:
        # As in the optimizer's own count of steps, one without a gradient is none.
        if any(parameter.grad is not None for parameter in group["params"]):
            group["steps"] = group.get("steps", 0) + 1
            correction = 1 - group["betas"][1] ** group["steps"]
            group["eps"] = optimizer.defaults["eps"] / math.sqrt(correction)


def make_optimizer(
    parts: list[tuple[list[nn.Parameter], float]], config: TrainConfig, num_steps: int
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW over `(parameters, learning rate)` pairs, and its schedule over `num_steps` steps."""
    groups = []
    for parameters, learning_rate in parts:
        by_decay = defaultdict(list)
        for parameter in parameters:
            if parameter.requires_grad:
                by_decay[config.weight_decay if parameter.ndim >= 2 else 0.0].append(parameter)
        groups += [
            {"params": same, "lr": learning_rate, "weight_decay": decay}
            for decay, same in by_decay.items()
        ]
    optimizer = torch.optim.AdamW(
        groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True
    )
    if config.optim == "adamw_tensorflow":
        optimizer.register_step_pre_hook(scale_epsilon)
    return optimizer, make_scheduler(optimizer, config, num_steps)


def make_scheduler(
    optimizer: torch.optim.AdamW, config: TrainConfig, num_steps: int
) -> LRScheduler:
    """The schedule of the optimizer's learning rates over `num_steps` steps."""
    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(config.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )


def resume_schedule(
    optimizer: torch.optim.AdamW, config: TrainConfig, num_steps: int, state: dict
) -> LRScheduler:
    """The schedule over `num_steps` steps from where a schedule of the state `state`, which may
    have been over another number of steps, had come to; `optimizer` goes on at its rates."""
    scheduler = make_scheduler(optimizer, config, num_steps)
    scheduler.load_state_dict(state)
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    return scheduler


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients down to `max_norm`; returns their norm before.

    A norm that is not finite ends the run, because one more step would spoil every weight.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if not norm.isfinite():
        raise UserError(
            f"training diverged, the gradient's norm is {norm.item()}: lower learning_rate",
            on_all_ranks=True,
        )
    return norm
