"""Metrics of a run: metrics.jsonl, TensorBoard, the live display, and plots."""

import json
import time
from pathlib import Path

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
from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Writes a run's metrics and shows its progress; use it as a context manager.

    On a terminal: a progress bar with the time left, and a live table of the metrics named in
    `shown`. Elsewhere: one plain line for each call of `write`.
    """

    def __init__(
        self, output_dir: Path, title: str, total_steps: int, report_to: str, shown: tuple[str, ...]
    ):
        self.title = title
        self.total_steps = total_steps
        self.shown = shown
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
        self.task = self.progress.add_task(title, total=total_steps)
        self.live = Live(self.progress, console=self.console, refresh_per_second=4)
        self.file = (output_dir / "metrics.jsonl").open("w", encoding="utf-8")
        self.writer = None
        if report_to == "tensorboard":
            self.writer = SummaryWriter(str(output_dir / "tensorboard"))
        self.start = time.perf_counter()

    def __enter__(self) -> "MetricsLog":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self.console.is_terminal:
            self.live.stop()
        self.file.close()
        if self.writer is not None:
            self.writer.close()

    def advance(self) -> None:
        self.progress.advance(self.task)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records `metrics` (plain floats) as the state after `step` steps."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        shown = {name: metrics[name] for name in self.shown if name in metrics}
        if self.console.is_terminal:
            table = Table("metric", "value")
            for name, value in shown.items():
                table.add_row(name, f"{value:.4g}")
            self.live.update(Group(self.progress, table))
        else:
            elapsed = time.perf_counter() - self.start
            left = elapsed * (self.total_steps - step) / max(step, 1)
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            print(f"{self.title} {step}/{self.total_steps}  {values}  eta {left:.0f}s", flush=True)


def plot_metrics(output_dir: Path, plots: dict[str, tuple[str, ...]]) -> None:
    """Draws `<name>.png` in `output_dir` for each entry `name: metrics` of `plots`, from the
    folder's metrics.jsonl."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for plot, names in plots.items():
        figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            points = [(record["step"], record[name]) for record in records if name in record]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "")
            axes.set(title=name, xlabel="step")
            axes.grid(alpha=0.3)
        figure.savefig(output_dir / f"{plot}.png", dpi=120)
