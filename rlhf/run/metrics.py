"""Metrics of a run: metrics.jsonl and .csv, TensorBoard, the live display, and plots."""

import csv
import io
import json
import math
import time
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rlhf.distributed import is_main
from rlhf.errors import UserError
from rlhf.run.files import GO_ON, disk_errors, open_to_append, read_file, write_file
from rlhf.run.folder import METRICS_FILE
from rlhf.run.manifest import metrics_line
from rlhf.run.progress import Display
from rlhf.run.terminal import say


class MetricsLog(Display):
    """Writes a run's metrics and shows its progress; use it as a context manager.

    On a terminal: bars with the time left, and a live table of the metrics named in `shown`, at
    first and now. Elsewhere: one plain line for each call of `write`. Of several processes only the
    main one writes and shows anything. When it ends, also by an error, all that metrics.jsonl holds
    is in metrics.csv too.
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
        super().__init__(title, total_steps, completed=step)
        self.output_dir = output_dir
        self.title = title
        self.total_steps = total_steps
        self.shown = shown
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.first_step = step
        self.file = self.writer = None
        if is_main():
            with disk_errors(f"write metrics to {output_dir}", GO_ON):
                if step == 0:
                    write_file(output_dir / METRICS_FILE, b"")
                self.file = open_to_append(output_dir / METRICS_FILE)
                if report_to == "tensorboard":
                    # What an unfinished run reported of later steps is hidden.
                    # By its whole path, for another thread opens it, wherever a reward has moved.
                    folder = str((output_dir / "tensorboard").absolute())
                    self.writer = SummaryWriter(folder, purge_step=step + 1)
        self.start = time.perf_counter()

    def __exit__(self, error_type, error, traceback) -> None:
        super().__exit__(error_type, error, traceback)
        if self.file is None:
            return
        # On a full disk closing fails too; the error that ends the run is the one to tell.
        with (
            suppress(UserError) if error is not None else nullcontext(),
            disk_errors(f"write metrics to {self.output_dir}", GO_ON),
        ):
            for output in (self.file, self.writer):
                if output is not None:
                    output.close()
            write_csv(self.output_dir)

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
            self.first = shown | self.first
            self.last |= shown
            self.show(self._table())
        else:
            left = self.seconds_left(step)
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            say(f"{self.title} {step}/{self.total_steps}  {values}  eta {left:.0f}s")

    def _table(self) -> Table:
        table = Table("metric", header_style="dim", border_style="dim")
        table.add_column("at first", justify="right", style="dim")
        table.add_column("now", justify="right", min_width=9)
        for name in filter(self.last.__contains__, self.shown):
            table.add_row(name, f"{self.first[name]:.4g}", f"{self.last[name]:.4g}")
        return table

    def seconds_left(self, step: int) -> float:
        """The time that the steps after `step` will take, at the pace of this session."""
        elapsed = time.perf_counter() - self.start
        return elapsed * (self.total_steps - step) / max(step - self.first_step, 1)


def read_metrics(output_dir: Path) -> list[dict[str, float | None]]:
    """The lines of a folder's metrics.jsonl; one that a full disk cut off, or that somebody else
    wrote, is left out."""
    lines = read_file(output_dir / METRICS_FILE).split(b"\n")[:-1]
    return [values for values in map(metrics_line, lines) if values is not None]


def write_csv(output_dir: Path) -> None:
    """Writes metrics.csv from the folder's metrics.jsonl: one row for each step, one column for
    each metric, and nothing in a cell without a finite value."""
    rows = {}
    for record in read_metrics(output_dir):
        rows.setdefault(record["step"], {}).update(record)
    text = io.StringIO()
    names = dict.fromkeys(["step", *chain.from_iterable(rows.values())])
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows.values())
    write_file((output_dir / METRICS_FILE).with_suffix(".csv"), text.getvalue().encode())


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as plain numbers; waits for the device once."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def plot_metrics(output_dir: Path, plots: dict[str, tuple[str, ...]]) -> None:
    """Draws `<name>.png` in `output_dir` for each entry `name: metrics` of `plots`, from the
    folder's metrics.jsonl. Metrics without a finite value are left out."""
    records = read_metrics(output_dir)
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
            image = io.BytesIO()
            figure.savefig(image, dpi=120)
            write_file(output_dir / f"{plot}.png", image.getvalue())
