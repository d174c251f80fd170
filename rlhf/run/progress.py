"""Progress on a terminal: a bar of a whole stage, and beneath it one of the phase it is in."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rlhf.distributed import is_main


class Display:
    """The bars, with the time each has taken and has left, and a table that may go with them; use
    it as a context manager. Nothing is shown elsewhere than on a terminal of the main process."""

    def __init__(self, title: str, total: int, completed: int = 0):
        self.console = Console(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]eta"),
            TimeRemainingColumn(),
            console=self.console,
            # Steps may be further apart than the 30 s that rich would look back.
            speed_estimate_period=math.inf,
        )
        self.stage = self.progress.add_task(f"[bold]{title}", total=total, completed=completed)
        self.part = self.progress.add_task("", visible=False)
        self.live = None
        if is_main() and is_live(self.console):
            self.live = Live(self.progress, console=self.console, refresh_per_second=4)

    def __enter__(self):
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.live is not None:
            if error is None:  # responses may have ended before their longest length
                self.progress.update(self.stage, completed=self.progress.tasks[0].total)
            self.progress.remove_task(self.part)
            self.live.stop()

    def advance(self) -> None:
        self.progress.advance(self.stage)

    @contextmanager
    def phase(self, name: str, total: int, register: Callable) -> Iterator[None]:
        """Shows how many of `total` calls of what `hooked` takes as `register` have been made
        within the block. Where nothing is shown nothing is hooked."""
        counted = nullcontext()
        if self.live is not None:
            self.progress.reset(self.part, description=f"  {name}", total=total, visible=True)
            counted = hooked(register, lambda: self.progress.advance(self.part))
        with counted:
            yield

    def show(self, table: Table) -> None:
        """Puts the table beneath the bars."""
        self.live.update(Group(self.progress, table))


def is_live(console: Console) -> bool:
    """Tells whether what it shows can be redrawn: on a terminal, but not on a dumb one, nor in a
    file, which is a terminal to rich with FORCE_COLOR."""
    return console.is_interactive and console.file.isatty()


@contextmanager
def hooked(register: Callable, function: Callable[[], None]) -> Iterator[None]:
    """Calls `function` after each call of what `register` belongs to, until the block ends: a
    module's `register_forward_hook`, or an optimizer's `register_step_post_hook`."""
    handle = register(lambda *_: function())
    try:
        yield
    finally:
        handle.remove()


def num_passes(count: int, size: int, num_processes: int) -> int:
    """Passes that each of the processes makes over its share of `count` rows, at most `size` at a
    time."""
    return math.ceil(math.ceil(count / size) / num_processes)
