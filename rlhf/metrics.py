"""Metrics of a run: metrics.jsonl, TensorBoard, the live display, and plots."""

import json
import math
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from matplotlib.figure import Figure
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
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rlhf.checkpoint import METRICS_FILE
from rlhf.distributed import is_main
from rlhf.errors import UserError
from rlhf.files import GO_ON, disk_errors


class MetricsLog:
    """Writes a run's metrics and shows its progress; use it as a context manager.

    On a terminal: a progress bar with the time left, and a live table of the metrics named in
    `shown`. Elsewhere: one plain line for each call of `write`. Of several processes only the main
    one writes and shows anything.
    """

    def __init__(
        self,
        output_dir: Path,
        title: str,
        total_steps: int,
        report_to: str,
        shown: tuple[str, ...],
        step: int = 0,
    ):
        """A run that goes on after `step` steps adds to the metrics.jsonl that `open_run`
        has put back; at 0 the file is begun anew."""
        self.output_dir = output_dir
        self.title = title
        self.total_steps = total_steps
        self.shown = shown
        self.first_step = step
        self.console = Console(highlight=False)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task(title, total=total_steps, completed=step)
        self.live = self.file = self.writer = None
        if is_main():
            if self.console.is_terminal:
                self.live = Live(self.progress, console=self.console, refresh_per_second=4)
            mode = "a" if step else "w"
            with disk_errors(f"write metrics to {output_dir}", GO_ON):
                self.file = (output_dir / METRICS_FILE).open(mode, encoding="utf-8")
                if report_to == "tensorboard":
                    # What an unfinished run reported of later steps is hidden.
                    folder = str(output_dir / "tensorboard")
                    self.writer = SummaryWriter(folder, purge_step=step + 1)
        self.start = time.perf_counter()

    def __enter__(self) -> "MetricsLog":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.live is not None:
            self.live.stop()
        # On a full disk closing fails too; the error that ends the run is the one to tell.
        with (
            suppress(UserError) if error is not None else nullcontext(),
            disk_errors(f"write metrics to {self.output_dir}", GO_ON),
        ):
            for output in (self.file, self.writer):
                if output is not None:
                    output.close()

    def advance(self) -> None:
        self.progress.advance(self.task)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records `metrics` (plain floats) as the state after `step` steps.

        In metrics.jsonl a value that is not finite is null, which JSON has a word for.
        """
        if self.file is None:
            return
        values = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        with disk_errors(f"write metrics to {self.output_dir}", GO_ON):
            self.file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self.file.flush()
            if self.writer is not None:
                for name, value in metrics.items():
                    self.writer.add_scalar(name, value, step)
        shown = {name: metrics[name] for name in self.shown if name in metrics}
        if self.live is not None:
            table = Table("metric", "value")
            for name, value in shown.items():
                table.add_row(name, f"{value:.4g}")
            self.live.update(Group(self.progress, table))
        else:
            left = self.seconds_left(step)
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"{self.title} {step}/{self.total_steps}  {values}  eta {left:.0f}s", flush=True)

    def seconds_left(self, step: int) -> float:
        """The time that the steps after `step` will take, at the pace of this session."""
        elapsed = time.perf_counter() - self.start
        return elapsed * (self.total_steps - step) / max(step - self.first_step, 1)


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as plain numbers; waits for the device once."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def plot_metrics(output_dir: Path, plots: dict[str, tuple[str, ...]]) -> None:
    """Draws `<name>.png` in `output_dir` for each entry `name: metrics` of `plots`, from the
    folder's metrics.jsonl. Metrics without a finite value are left out."""
    lines = (output_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for plot, names in plots.items():
        curves = {}
        for name in names:
            points = [(record["step"], record.get(name)) for record in records]
            if points := [(step, value) for step, value in points if value is not None]:
                curves[name] = points
        if not curves:
            continue
        figure = Figure(figsize=(5 * len(curves), 3.5), layout="constrained")
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (name, points) in zip(panels, curves.items(), strict=True):
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
            axes.set(title=name, xlabel="step")
            axes.grid(alpha=0.3)
        with disk_errors(f"draw {output_dir / f'{plot}.png'}", GO_ON):
            figure.savefig(output_dir / f"{plot}.png", dpi=120)
