"""Where `log_stats` writes."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from rlhf.classic.config import PPOConfig

# Takes the values by name, the table to show, its rows without their names, and the step.
Tracker = Callable[[dict[str, float | np.ndarray], dict[str, Sequence], int], None]


def make_tracker(config: PPOConfig) -> Tracker | None:
    """What writes to config.log_with; None where that is None."""
    arguments = config.tracker_kwargs.get(config.log_with, {})
    if config.log_with == "tensorboard":
        folder = config.project_kwargs.get("logging_dir") or config.project_kwargs.get(
            "project_dir", "runs"
        )
        return _tensorboard(Path(folder) / config.tracker_project_name, arguments)
    if config.log_with == "wandb":
        return _wandb(config, arguments)
    return None


def _tensorboard(folder: Path, arguments: dict) -> Tracker:
    writer = SummaryWriter(str(folder), **arguments)

    def write(values: dict, table: dict, step: int) -> None:
        for name, value in values.items():
            if not isinstance(value, np.ndarray):
                writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(config: PPOConfig, arguments: dict) -> Tracker:
    wandb = importlib.import_module("wandb")
    wandb.init(project=config.tracker_project_name, config=config.to_dict(), **arguments)

    def write(values: dict, table: dict, step: int) -> None:
        rows = [list(row) for row in zip(*table.values(), strict=True)]
        game_log = wandb.Table(columns=list(table), rows=rows)
        # Without a step: wandb drops what comes with one below its own, which scripts' own calls
        # of wandb.log move on.
        wandb.log({**values, "game_log": game_log})

    return write
