"""What a run of any stage saves and goes on from: its models, its trainer's state, the random
generators of all processes, its metrics, and which checkpoint is the best."""

import math
from pathlib import Path
from typing import NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.checkpoint import open_run, rotate_checkpoints, save_checkpoint
from rlhf.config import TrainConfig
from rlhf.errors import UserError
from rlhf.state import (
    load_state,
    load_weights,
    random_state,
    save_model,
    save_state,
    set_random_state,
)

STATE_FILE = "state.pt"


def is_due(every: int, step: int, num_steps: int) -> bool:
    """Whether what happens `every` so many steps, and after the last (0: only then), does now."""
    return step == num_steps or (every > 0 and step % every == 0)


class Trainer(Protocol):
    """What changes in a stage during a run, besides the weights."""

    def data_hash(self) -> str:
        """By which a resumed run knows its data."""

    def state_dict(self) -> dict:
        """The state; its entry `data` is the data_hash."""

    def load_state_dict(self, state: dict) -> None: ...


class Best(NamedTuple):
    """The best checkpoint so far and its value of metric_for_best_model. The checkpoint is a name
    in output_dir, or a path where the run was resumed from another folder."""

    checkpoint: str | None = None
    value: float | None = None


class Checkpoints:
    """The checkpoints of a run, whose output folder it opens.

    Args:
        config: of the run.
        stage: sft, reward or ppo.
        trainer: whose state is saved.
        models: each under the name of its folder in a checkpoint, "" for the checkpoint itself.
        tokenizer: saved with every model.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: str,
        trainer: Trainer,
        models: dict[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.config = config
        self.trainer = trainer
        self.models = models
        self.tokenizer = tokenizer
        self.best = Best()
        self.run = distributed.from_main(lambda: open_run(config, stage))

    def resume(self) -> dict[str, float]:
        """Puts everything back as it was at the checkpoint that the run goes on from, if there is
        one; returns the metrics then."""
        checkpoint = self.run.checkpoint
        if checkpoint is None:
            return {}
        state = load_state(checkpoint / STATE_FILE)
        processes = len(state["random"])
        if processes != distributed.world_size():
            raise UserError(
                f"{checkpoint} was written by {processes} processes, and here are "
                f"{distributed.world_size()}: start as many"
            )
        if state["data"] != self.trainer.data_hash():
            raise UserError(
                f"{self.config.dataset_name} does not hold the data from which {checkpoint} was "
                "trained: restore it, or start anew in another output_dir"
            )
        self._load_models(checkpoint)
        self.trainer.load_state_dict(state)
        self.best = Best(*state["best"])
        if checkpoint.resolve().parent != self.run.output_dir.resolve() and self.best.checkpoint:
            self.best = self.best._replace(
                checkpoint=str(checkpoint.resolve().parent / self.best.checkpoint)
            )
        # Last, because loading a model may draw numbers.
        set_random_state(state["random"][distributed.rank()])
        return state["metrics"]

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Saves the run after `step` steps with the last value of each of its metrics, and deletes
        the checkpoints beyond save_total_limit."""
        self.best = distributed.from_main(lambda: self._best_with(f"checkpoint-{step}", metrics))
        state = self.trainer.state_dict() | {
            "metrics": metrics,
            "best": tuple(self.best),
            "random": distributed.gather_objects(random_state()),
        }

        def write(folder: Path) -> None:
            self.save_models(folder)
            save_state(folder / STATE_FILE, state)

        def write_and_rotate() -> None:
            newest = save_checkpoint(self.run, step, write)
            keep = self.best.checkpoint and self.run.output_dir / self.best.checkpoint
            rotate_checkpoints(newest, self.config.save_total_limit, keep)

        distributed.from_main(write_and_rotate)

    def _best_with(self, checkpoint: str, metrics: dict[str, float]) -> Best:
        """The best checkpoint when this one, with these metrics, is among them."""
        metric = self.config.metric_for_best_model
        if metric is None:
            return self.best
        if metric not in metrics:
            raise UserError(
                f"metric_for_best_model {metric} was not measured before {checkpoint}: give one of "
                f"{', '.join(sorted(metrics))}, or measure it no later (eval_steps)"
            )
        value, best = metrics[metric], self.best.value
        sign = 1 if self.config.greater_is_better else -1
        if best is None or math.isnan(best) or sign * value > sign * best:
            return Best(checkpoint, value)
        return self.best

    def load_best(self) -> None:
        """Puts the best checkpoint's weights into the models."""
        self._load_models(self.run.output_dir / self.best.checkpoint)

    def _load_models(self, checkpoint: Path) -> None:
        for name, model in self.models.items():
            load_weights(model, checkpoint / name)

    def save_models(self, folder: Path) -> None:
        """Saves the models in `folder`, each under its name; of the main process only."""
        for name, model in self.models.items():
            save_model(folder / name, model, self.tokenizer)
