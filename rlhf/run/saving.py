"""What a run of any stage saves and goes on from: its models, its trainer's state, the random
generators of all processes, its metrics, and which checkpoint is the best."""

import math
from pathlib import Path, PurePath
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.config.training import TrainConfig
from rlhf.errors import UserError, one_line
from rlhf.run.checkpoints import open_run, record_settings, rotate_checkpoints, save_checkpoint
from rlhf.run.folder import STATE_FILE
from rlhf.run.generators import random_state, set_random_state
from rlhf.run.manifest import Best, checkpoint_damage, read_manifest
from rlhf.run.state import hash_config, load_state, load_weights, save_model, save_state

# The option that a model to be trained comes from, by its folder in a checkpoint.
MODEL_OPTIONS = {"": "model_name_or_path", "critic": "critic_model_path"}


def is_due(every: int, step: int, num_steps: int) -> bool:
    """Tells whether what happens `every` so many steps and after the last (0: only then) does."""
    return step == num_steps or (every > 0 and step % every == 0)


class Trainer(Protocol):
    """What changes in a stage during a run, besides the weights."""

    def inputs(self) -> dict[str, str]:
        """A hash of what each of these options names, by which a resumed run knows it: the data,
        and models that are used but not saved. The source code of functions is not watched."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


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
        self.best = Best(config.metric_for_best_model, config.greater_is_better)
        self.newest = 0  # step of the newest checkpoint; 0 stands for the beginning
        # The weights of what is trained are in the checkpoint, so that its kind alone counts.
        kinds = {MODEL_OPTIONS[name]: hash_config(model) for name, model in models.items()}
        self.inputs = kinds | trainer.inputs()
        self._check_processes()
        self.run = distributed.from_main(
            lambda: open_run(config, stage, self._fault, self._check_inputs)
        )

    def resume(self) -> dict[str, float]:
        """Puts everything back as it was at the checkpoint that the run goes on from, if there is
        one; returns the metrics then."""
        checkpoint = self.run.checkpoint
        if checkpoint is None:
            return {}
        metrics = distributed.together(lambda: self._restore(checkpoint))
        distributed.from_main(lambda: record_settings(self.run, self.config))
        return metrics

    def _restore(self, checkpoint: Path) -> dict[str, float]:
        """Puts the models, the trainer and the random generators back; returns the metrics."""
        self._load_models(checkpoint)
        state = load_state(checkpoint / STATE_FILE)
        try:
            self.trainer.load_state_dict(state)
            # Last, because loading a model may draw numbers. A process that was not there then goes
            # on with its own.
            if distributed.rank() < len(state["random"]):
                set_random_state(state["random"][distributed.rank()])
        except UserError:
            raise
        except Exception as error:  # torch raises what it likes of a state of another shape
            raise UserError(
                f"{checkpoint / STATE_FILE} is not of this run ({one_line(error)}): go on from "
                "another checkpoint, or start anew in another output_dir"
            ) from error
        manifest = read_manifest(checkpoint)
        self.newest, best = manifest.step, manifest.best
        if best[:2] == self.best[:2]:
            self.best = best
        return state["metrics"]

    def _check_processes(self) -> None:
        """Raises UserError unless all processes have the same inputs."""
        for rank, inputs in enumerate(distributed.gather_objects(self.inputs)):
            for name in inputs:
                if inputs[name] != self.inputs.get(name):
                    raise UserError(
                        f"{name} {getattr(self.config, name, '')} holds something else for process "
                        f"{rank} than for process {distributed.rank()}: give all of them the same",
                        on_all_ranks=True,
                    )

    def _check_inputs(self, checkpoint: Path) -> None:
        """Raises UserError unless the checkpoint is of the same inputs and, but with
        resume_loosely, of as many processes."""
        state = load_state(checkpoint / STATE_FILE, mmap=True)
        processes = len(state["random"])
        if processes != distributed.world_size() and not self.config.resume_loosely:
            raise UserError(
                f"{checkpoint} was written by {processes} processes, and here are "
                f"{distributed.world_size()}: start as many, or go on without the bitwise promise "
                "with --resume_loosely"
            )
        for name in state["inputs"] | self.inputs:
            if self.inputs.get(name) != state["inputs"].get(name):
                raise UserError(
                    f"{name} {getattr(self.config, name, '')} holds something else than when "
                    f"{checkpoint} was saved: restore it, or start anew in another output_dir"
                )

    def _fault(self, checkpoint: Path) -> str | None:
        """Says what is wrong with the state in a checkpoint that is whole: that a part of it is
        missing or of another type than the trainer's."""
        models = (PurePath(name, "config.json").as_posix() for name in self.models)
        for name in (STATE_FILE, *models):
            if name not in read_manifest(checkpoint).files:
                return f"{name} is missing"
        try:
            state = load_state(checkpoint / STATE_FILE, mmap=True)
        except Exception as error:  # torch raises what it likes
            return f"{STATE_FILE} cannot be read, {one_line(error)}"
        expected = self.trainer.state_dict() | {"inputs": {}, "metrics": {}, "random": []}
        if not isinstance(state, dict):
            return f"{STATE_FILE} holds no state"
        for name, value in expected.items():
            if type(state.get(name)) is not type(value):
                return f"{STATE_FILE} has no {name} as this version saves it"
        return None

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Saves the run after `step` steps with the last value of each of its metrics, and deletes
        the checkpoints beyond save_total_limit. Raises UserError, when all is saved, if
        metric_for_best_model is not among the metrics."""
        self.best = distributed.from_main(lambda: self._best_with(f"checkpoint-{step}", metrics))
        self.save_at(step, metrics, self.trainer.state_dict(), random_state())
        metric = self.config.metric_for_best_model
        if metric is not None and metric not in metrics:
            raise UserError(
                f"metric_for_best_model {metric} is not measured: give one of "
                f"{', '.join(sorted(metrics))}, and go on with --resume_from_checkpoint auto",
                on_all_ranks=True,
            )

    def save_at(self, step: int, metrics: dict[str, float], state: dict, random: dict) -> None:
        """Saves the run as it was after `step` steps, unless it is, with the state of its trainer
        and of this process's random generators then; the models must be what they were."""
        if step == self.newest:
            return
        state = state | {
            "inputs": self.inputs,
            "metrics": metrics,
            "random": distributed.gather_objects(random),
        }

        def write(folder: Path) -> None:
            self.save_models(folder)
            save_state(folder / STATE_FILE, state)

        def write_and_rotate() -> None:
            newest = save_checkpoint(self.run, step, write, self.best)
            keep = self.best.checkpoint and self.run.output_dir / self.best.checkpoint
            rotate_checkpoints(newest, self.config.save_total_limit, keep)

        distributed.from_main(write_and_rotate)
        self.newest = step

    def _best_with(self, checkpoint: str, metrics: dict[str, float]) -> Best:
        """The best checkpoint when this one, with these metrics, is among them."""
        best = self.best
        if best.metric not in metrics:
            return best
        value = metrics[best.metric] if math.isfinite(metrics[best.metric]) else None
        sign = 1 if best.greater_is_better else -1
        is_first = best.checkpoint is None or best.value is None
        if is_first or (value is not None and sign * value > sign * best.value):
            return best._replace(checkpoint=checkpoint, value=value)
        return best

    def load_best(self) -> None:
        """Puts the best checkpoint's weights into the models. Raises UserError if that is damaged
        or gone, and leaves the models as they are."""
        distributed.from_main(self._check_best)
        self._load_models(self.run.output_dir / self.best.checkpoint)

    def _check_best(self) -> None:
        output_dir, name = self.run.output_dir, self.best.checkpoint
        last = f"output_dir {output_dir} holds the last model instead"
        if name is None:
            raise UserError(
                f"no checkpoint was saved with metric_for_best_model {self.best.metric}: {last}"
            )
        damage = checkpoint_damage(output_dir / name)
        if damage is not None:
            raise UserError(
                f"cannot load the best checkpoint, {output_dir / name}: {damage}: {last}"
            )

    def _load_models(self, checkpoint: Path) -> None:
        for name, model in self.models.items():
            load_weights(model, checkpoint / name)

    def save_models(self, folder: Path) -> None:
        """Saves the models in `folder`, each under its name; of the main process only."""
        for name, model in self.models.items():
            save_model(folder / name, model, self.tokenizer)
