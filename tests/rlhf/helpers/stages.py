"""Runs of a stage that can be stopped, and what they leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf.config.training import TrainConfig


def records(path) -> list[dict]:
    """The metrics of a run, without those that are times."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not name.startswith("time/") and name != "tokens_per_second"
        }
        for line in lines
    ]


REWARD = """
import random

def noise(completions):
    return [random.random() for _ in completions]
"""


class Stopped(Exception):
    pass


class Stage(NamedTuple):
    """A stage, a configuration of ten steps for it, and what takes one of these."""

    train: Callable[[TrainConfig], dict[str, float]]
    config: TrainConfig
    step: tuple[type, str]

    def run(self, output_dir: Path, **changes) -> dict[str, float]:
        return self.train(self.change(output_dir=str(output_dir), **changes))

    def change(self, **changes) -> TrainConfig:
        return type(self.config)(**vars(self.config) | changes)

    def run_until(self, stop: int, output_dir: Path, **changes) -> None:
        """Runs until step `stop` + 1 fails."""
        owner, name = self.step
        take_step, left = getattr(owner, name), [stop]

        def stopping(*args):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return take_step(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, stopping)
            with pytest.raises(Stopped):
                self.run(output_dir, **changes)


def weights(folder: Path) -> dict[str, bytes]:
    """Of the model in the folder, and of the critic beside it."""
    names = ("model.safetensors", "critic/model.safetensors")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}
