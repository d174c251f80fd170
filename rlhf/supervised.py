"""What SFT and the reward model share: the order of a fixed data set, the passes of a step divided
over the processes, and the optimizer step."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf import distributed
from rlhf.config.training import SupervisedConfig
from rlhf.data.batches import Batches
from rlhf.errors import UserError
from rlhf.optim import clip_gradients, make_optimizer, resume_schedule
from rlhf.run.metrics import to_floats
from rlhf.run.state import hash_data


class SupervisedTrainer:
    """A model under training: its optimizer, its steps so far, and their metrics.

    Args:
        config: of the run.
        model: what is trained; `parallel`, which the passes go through, does so in all processes.
        rows: the training data.
        lengths: the number of tokens of each row, by which batches are sorted.
        eval_rows: the held-out data.
    """

    def __init__(
        self,
        config: SupervisedConfig,
        model: nn.Module,
        rows: Sequence,
        lengths: list[int],
        eval_rows: Sequence = (),
    ):
        self.config = config
        self.rows = rows
        self.eval_rows = eval_rows
        self.batches = Batches(lengths, config)
        self.parameters = list(model.parameters())
        self.optimizer, self.scheduler = make_optimizer(
            [(self.parameters, config.learning_rate)], config, self.num_steps
        )
        self.parallel = model.train()
        if distributed.world_size() > 1:
            self.parallel = DistributedDataParallel(model)
            # Each process drops out other activations.
            torch.manual_seed(config.seed + distributed.rank())
        self.sums = defaultdict(float)
        self.unlogged: list[dict[str, float]] = []

    @property
    def step(self) -> int:
        """Steps done."""
        return self.batches.taken

    @property
    def num_steps(self) -> int:
        return self.batches.total

    def passes(self, batch: list[list[int]]) -> Iterator[tuple[list[int], float]]:
        """This process's micro-batches of a batch, each with the weight of its loss.

        Losses must be sums divided by the count of the whole batch. DistributedDataParallel takes
        their mean over the processes, so their weight is the number of these. All must take part in
        the last backward pass: one that is left without a micro-batch gets the first with weight 0.
        """
        num_processes = distributed.world_size()
        mine = [(rows, float(num_processes)) for rows in distributed.my_share(batch)]
        mine = mine or [(batch[0], 0.0)]
        for number, (rows, weight) in enumerate(mine, 1):
            last = number == len(mine) or num_processes == 1
            with nullcontext() if last else self.parallel.no_sync():
                yield rows, weight

    def backward(self, weight: float, metrics: dict[str, Tensor]) -> None:
        """Adds the gradient of a pass's `loss`, and its share of all the step's metrics."""
        (weight * metrics["loss"]).backward()
        for name, value in metrics.items():
            self.sums[name] += weight * value.detach()

    def take_step(self) -> None:
        """An optimizer step along the gradient of the passes since the last."""
        metrics = distributed.mean_of(self.sums)
        metrics["grad_norm"] = clip_gradients(self.parameters, self.config.max_grad_norm)
        self.unlogged.append(to_floats(metrics) | {"lr": self.scheduler.get_last_lr()[0]})
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.sums.clear()
        self.batches.advance()

    def take_metrics(self) -> dict[str, float]:
        """The means of the steps' metrics since the last call; the learning rate is the last's."""
        steps, self.unlogged = self.unlogged, []
        means = {name: fmean(step[name] for step in steps) for name in steps[0]}
        return means | {"lr": steps[-1]["lr"]}

    def inputs(self) -> dict[str, str]:
        """The model that is trained is not among them: a checkpoint has its own."""
        return {
            "dataset_name": hash_data(self.rows),
            "eval_dataset_name": hash_data(self.eval_rows),
        }

    def state_dict(self) -> dict:
        return {
            "batches": self.batches.state_dict(),
            "unlogged": list(self.unlogged),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.batches.load_state_dict(state["batches"])
        if self.num_steps < self.step:
            raise UserError(
                f"max_steps {self.config.max_steps} or num_train_epochs "
                f"{self.config.num_train_epochs} ends before step {self.step}, which the "
                "checkpoint has behind it: give more"
            )
        self.unlogged = state["unlogged"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler = resume_schedule(
            self.optimizer, self.config, self.num_steps, state["scheduler"]
        )
