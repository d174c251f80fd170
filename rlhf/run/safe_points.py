"""Where a run can end at a signal: with a state saved from which it goes on bitwise as if it had
never ended."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch

from rlhf import distributed
from rlhf.errors import UserError, one_line
from rlhf.run import signals
from rlhf.run.generators import random_state
from rlhf.run.saving import Checkpoints
from rlhf.run.terminal import complain


class SafePoints:
    """Ends a run at SIGINT, SIGTERM or SIGUSR1: after a step, with the state then, or before a
    step has moved any weight, with the state after the last one, to which nothing that the step
    drew or computed belongs.

    Args:
        checkpoints: of the run, resumed.
        stage: sft, reward or ppo.
        step: the number of steps so far.
        metrics: the last value of each.
    """

    def __init__(self, checkpoints: Checkpoints, stage: str, step: int, metrics: dict[str, float]):
        signals.catch()
        self.checkpoints = checkpoints
        self.stage = stage
        self._note(step, metrics)

    def reached(self, step: int, metrics: dict[str, float]) -> None:
        """Ends the run after `step` steps if a signal has come to any of the processes."""
        self._note(step, metrics)
        self.agree()

    def check(self) -> None:
        """Ends the run with the state after the last step if a signal has come. Several processes,
        to which it may come at different points, do nothing until they `agree`."""
        if distributed.world_size() == 1:
            self._end_at(signals.received())

    def agree(self) -> None:
        """Does what `check` does, in all processes or in none."""
        self._end_at(signal_of_any())

    def _note(self, step: int, metrics: dict[str, float]) -> None:
        self.step, self.metrics = step, dict(metrics)
        self.state = self.checkpoints.trainer.state_dict()
        self.random = random_state()

    def _end_at(self, number: int) -> None:
        if number:
            self.checkpoints.save_at(self.step, self.metrics, self.state, self.random)
            distributed.from_main(lambda: complain(self._line(number)))
            raise signals.Stopped(number)

    def _line(self, number: int) -> str:
        run = self.checkpoints.run
        saved = f"checkpoint-{self.step} is saved" if self.step else "before the first step"
        return (
            f"rlhf {self.stage}: {signals.WORDS[number]}: {saved} in {run.output_dir}: go on with "
            f"rlhf {self.stage} --config {run.output_dir / run.run_file} "
            "--resume_from_checkpoint auto"
        )


def signal_of_any() -> int:
    """The signal that has come to one of the processes, the same in all; 0 if there is none."""
    number = torch.tensor(signals.received())
    return int(distributed.maximum_of({"signal": number})["signal"])


def stoppable(stage: str) -> Callable[[Callable], Callable]:
    """Decorates the function that trains a stage. A signal that comes when all is trained lets it
    write what it leaves, and ends it then."""

    def decorate(train: Callable) -> Callable:
        @wraps(train)
        def run(config, *args, **kwargs):
            try:
                metrics = train(config, *args, **kwargs)
                if number := signal_of_any():
                    where = Path(config.output_dir)
                    line = f"rlhf {stage}: {signals.WORDS[number]}: {where} holds the whole run"
                    distributed.from_main(lambda: complain(line))
                    raise signals.Stopped(number)
                return metrics
            except Exception as error:
                number = signals.received()
                if distributed.world_size() == 1 or not number or isinstance(error, UserError):
                    raise
                # torchrun, which sends it to all once one has failed, has told why.
                words = signals.WORDS[number]
                complain(f"rlhf {stage}: {words}, and without the others: {one_line(error)}")
                raise signals.Stopped(number) from error
            finally:
                signals.release()

        return run

    return decorate
