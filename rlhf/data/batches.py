"""The order in which a fixed data set is learnt, in batches of row numbers."""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain

import torch

from rlhf.config.training import SupervisedConfig
from rlhf.distributed import world_size


class Batches:
    """The whole batches of row numbers of a run, one for each optimizer step, and what is left.

    An epoch is a shuffle of the rows. Within a window of 32 batches they are sorted by length, so
    that a batch holds little padding, and the batches are shuffled again. The last batch of an
    epoch may be smaller.

    Args:
        lengths: the number of tokens of each row.
        config: of the run.
    """

    def __init__(self, lengths: list[int], config: SupervisedConfig):
        self.lengths = lengths
        self.config = config
        # Over all processes.
        self.size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.size *= world_size()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.taken = 0  # in all
        self.epochs = 0  # that have begun
        self.taken_of_epoch = 0
        self._begin_epoch([])

    @property
    def total(self) -> int:
        """Steps of the whole run, of which `taken` are done."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        epochs = Fraction(str(self.config.num_train_epochs))
        if epochs >= self.epochs:
            later = math.ceil((epochs - self.epochs) * math.ceil(len(self.lengths) / self.size))
            return self.taken + len(self.epoch) - self.taken_of_epoch + later
        last = math.ceil((epochs - self.epochs + 1) * len(self.epoch))
        return self.taken - self.taken_of_epoch + last

    def __iter__(self) -> Iterator[list[list[int]]]:
        """For each step that is left the micro-batches of its batch; `advance` ends a step.

        Every process gets the same ones, of at most per_device_train_batch_size rows each, and
        takes `batch[rank::world_size]`; after an epoch's last batch some get none.
        """
        size = self.config.per_device_train_batch_size
        while self.taken < self.total:
            if self.taken_of_epoch == len(self.epoch):
                rows = torch.randperm(len(self.lengths), generator=self.generator).tolist()
                self._begin_epoch(self._shuffled(rows))
                self.epochs, self.taken_of_epoch = self.epochs + 1, 0
            batch = self.epoch[self.taken_of_epoch]
            yield [batch[i : i + size] for i in range(0, len(batch), size)]

    def advance(self) -> None:
        """Counts the batch that came last among those taken."""
        self.taken += 1
        self.taken_of_epoch += 1

    def _shuffled(self, rows: list[int]) -> list[list[int]]:
        """The rows in batches."""
        batches = []
        for start in range(0, len(rows), 32 * self.size):
            window = sorted(rows[start : start + 32 * self.size], key=self.lengths.__getitem__)
            batches += [window[i : i + self.size] for i in range(0, len(window), self.size)]
        order = torch.randperm(len(batches), generator=self.generator).tolist()
        return [batches[index] for index in order]

    def _begin_epoch(self, batches: list[list[int]]) -> None:
        self.epoch = batches
        # Once an epoch, for a state is asked for at every step.
        self.rows = torch.tensor(list(chain.from_iterable(batches)), dtype=torch.int64)
        self.sizes = [len(batch) for batch in batches]

    def state_dict(self) -> dict:
        return {
            "generator": self.generator.get_state(),
            "taken": self.taken,
            "epochs": self.epochs,
            "taken_of_epoch": self.taken_of_epoch,
            "size": self.size,
            "rows": self.rows,
            "sizes": self.sizes,
        }

    def load_state_dict(self, state: dict) -> None:
        """With batches of another size the rows that are left of the epoch are put into new ones,
        so that it still holds every row once."""
        self.generator.set_state(state["generator"])
        self.taken, self.epochs = state["taken"], state["epochs"]
        self.taken_of_epoch = state["taken_of_epoch"]
        batches = [part.tolist() for part in state["rows"].split(state["sizes"])]
        if state["size"] != self.size:
            taken, left = batches[: self.taken_of_epoch], batches[self.taken_of_epoch :]
            batches = taken + self._shuffled(list(chain.from_iterable(left)))
        self._begin_epoch(batches)
