"""One process, or several that `torchrun` started and that work as one.

Every rank takes the same steps. What is small, such as the tokens, log-probs and rewards of a whole
iteration, every rank holds; only the passes through the models are divided.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.errors import UserError
from rlhf.run.processes import is_main, rank, world_size

Result = TypeVar("Result")


@contextmanager
def session() -> Iterator[None]:
    """Connects the processes of `torchrun` (nccl on GPUs, gloo otherwise) until the block ends."""
    if world_size() == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {world_size()} but there is no MASTER_ADDR: start the processes with "
            "torchrun, or unset WORLD_SIZE",
            on_all_ranks=True,
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    yield
    # Not after an error: the others may be waiting in a collective, and torchrun ends them. What
    # still refers to the group, in cycles, goes first, and nobody leaves while others need him.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def together(function: Callable[[], Result]) -> Result:
    """The function's result; a UserError on one rank is raised on all, that of the first."""
    result, error = None, None
    try:
        result = function()
    except UserError as raised:
        error = raised
    error = next((found for found in gather_objects(error) if found is not None), None)
    if error is not None:
        error.on_all_ranks = True
        raise error
    return result


def from_main(function: Callable[[], Result]) -> Result:
    """The function's result on the main rank, handed to all; the others do not call it."""
    outcome = [together(lambda: function() if is_main() else None)]
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def gather_objects(value: Result) -> list[Result]:
    """The value of every rank, in order of rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def my_share(parts: Iterable[Result]) -> Iterator[Result]:
    """Every world_size-th of the parts, from the rank's own number on."""
    return islice(parts, rank(), None, world_size())


def sum_of(values: Tensor) -> Tensor:
    """The sum over the ranks, of which each has filled in its share of zeros."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def my_rows(count: int) -> slice:
    """This rank's share of `count` rows that are laid out rank after rank."""
    share = count // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, rank after rank; all ranks must have equally many."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the ranks of each value; all must have one shape."""
    return _reduced(values, dist.ReduceOp.SUM, world_size())


def maximum_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maximum over the ranks of each value; all must have one shape."""
    return _reduced(values, dist.ReduceOp.MAX, 1)


def _reduced(values: dict[str, Tensor], operation, divisor: int) -> dict[str, Tensor]:
    if world_size() == 1:
        return dict(values)
    packed = torch.stack(list(values.values()))
    dist.all_reduce(packed, operation)
    return dict(zip(values, packed / divisor, strict=True))
