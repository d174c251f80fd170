"""`python -m benchmarks.report FILE`: the table of a `pytest benchmarks --benchmark-json=FILE`, or
of a `--results FILE`.

Beside a figure that has a goal stands the goal, and whether it is reached. Plots are written beside
the file. Without FILE: every file in benchmarks/results.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from rich.text import Text

RESULTS = Path(__file__).with_name("results")


class Column(NamedTuple):
    """A figure: its title, its format, and whether a low one is good."""

    title: str
    format: str
    low_is_good: bool


COLUMNS = {
    "milliseconds": Column("ms", "{:,.4f}", True),
    "copies": Column("copies", "{:.2f}", True),
    "times_eager": Column("× eager", "{:.1f}", False),
    "times_compile": Column("× compile", "{:.1f}", False),
    "times_trl": Column("× TRL", "{:.2f}", False),
    "times_liger": Column("× Liger", "{:.2f}", False),
    "memory": Column("extra memory", "{:.5f}", True),
    "memory_eager": Column("of eager", "{:.2f}", True),
    "gb_per_s": Column("GB/s", "{:.1f}", False),
    "copy_gb_per_s": Column("of copy", "{:.1f}", False),
    "bandwidth_share": Column("share", "{:.0%}", False),
    "call_us": Column("call µs", "{:,.1f}", True),
    "tokens_per_second": Column("tokens/s", "{:,.0f}", False),
}

OPS = (
    "ppo_loss_",
    "ppo_loss",
    "token_logprobs_and_entropy",
    "token_logprobs_and_entropy backward",
    "token_statistics",
    "kl_divergence",
    "kl_divergence backward",
    "gae",
    "gae_packed",
    "token_logprobs",
    "PPO iteration",
)
# (op, shape) -> figure -> goal, on a CPU with two cores.
GOALS = {
    ("gae", (512, 2048)): {"copies": 3.0, "times_eager": 50},
    ("gae", (16, 131072)): {"copies": 2.0},
    ("token_logprobs", (1, 2)): {"milliseconds": 0.020},
}
for shape in ((512, 32000), (256, 128256)):
    GOALS |= {
        ("ppo_loss_", shape): {
            "copies": 2.0,
            "times_eager": 20,
            "times_compile": 6,
            "memory": 0.001,
        },
        ("ppo_loss", shape): {"copies": 2.2},
        ("token_logprobs_and_entropy", shape): {"copies": 1.2},
        ("kl_divergence", shape): {"copies": 1.6},
    }
# The same on a GPU.
GPU_GOALS = {("gae", shape): {"copies": 1.3} for shape in ((8192, 2048), (16, 131072))}
GPU_GOALS |= {("ppo_loss_", (133, V)): {"copies": 1.2} for V in (32000, 50257, 128256, 151936)}
GPU_GOALS |= {("token_logprobs", (1, 2)): {"call_us": 20}}
for shape in itertools.product((8192, 65537), (32000, 50257, 128256, 151936)):
    GPU_GOALS |= {
        ("ppo_loss_", shape): {"copies": 1.10, "memory": 0.001},
        ("ppo_loss", shape): {"copies": 1.65},
        ("token_logprobs_and_entropy", shape): {"copies": 0.58},
        ("kl_divergence", shape): {"copies": 1.15},
    }
CAPTION = (
    "copies: time / time of copying as many logits (gae: inputs) in the same run; "
    "× eager, × compile, × TRL, × Liger: times faster; "
    "extra memory: peak bytes beyond the inputs / bytes of the logits (gae: inputs); "
    "ms: on a GPU the device's, and call µs until the call returns to the host; "
    "share: of the copy's GB/s"
)
PLOTTED = ("copies", "times_eager", "times_compile")


class Figures(NamedTuple):
    """What was measured of one op at one size."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    values: dict[str, float]
    why_no_memory: str | None
    goals: dict[str, float]

    @property
    def size(self) -> str:
        dtype = {"float32": "fp32", "bfloat16": "bf16"}[self.dtype]
        return " × ".join(f"{n:,}" for n in self.shape) + f" {dtype}"

    def reaches(self, name: str) -> bool:
        value, goal = self.values[name], self.goals[name]
        return value <= goal if COLUMNS[name].low_is_good else value >= goal


def read(path: Path) -> tuple[dict, list[Figures], list[str]]:
    """The machine, the figures of each benchmark in the order of OPS, and what was left out."""
    run = json.loads(path.read_text(encoding="utf-8"))
    figures, goals = [], GOALS if run["machine_info"]["gpu"] is None else GPU_GOALS
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        values = {"milliseconds": benchmark["stats"]["median"] * 1e3}
        values |= {name: info[name] for name in COLUMNS if name in info}
        if "call_us" in values:
            values["bandwidth_share"] = values["gb_per_s"] / values["copy_gb_per_s"]
        op, shape = info["op"], tuple(info["shape"])
        why_no_memory = info.get("memory_not_measured")
        figures.append(
            Figures(op, shape, info["dtype"], values, why_no_memory, goals.get((op, shape), {}))
        )
    figures.sort(key=lambda f: OPS.index(f.op))
    left_out = [f"{each['name']}: {each['reason']}" for each in run.get("left_out", [])]
    for benchmark in run["benchmarks"]:
        if "peers_failed" in benchmark["extra_info"]:
            reason = benchmark["extra_info"]["peers_failed"]
            left_out.append(f"peers of {benchmark['name']}: {reason}")
    return run["machine_info"], figures, left_out


def cell(figures: Figures, name: str) -> Text:
    if name not in figures.values:
        return Text("")
    text = COLUMNS[name].format.format(figures.values[name])
    if name not in figures.goals:
        return Text(text)
    goal, sign = figures.goals[name], "≤" if COLUMNS[name].low_is_good else "≥"
    if figures.reaches(name):
        return Text(f"{text} {sign} {goal:g} ✓", "green")
    return Text(f"{text} {sign} {goal:g} ✗", "red")


def table(machine: dict, all_figures: list[Figures]) -> Table:
    title = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    result = Table("op", "size", title=title, caption=CAPTION)
    names = [name for name in COLUMNS if any(name in f.values for f in all_figures)]
    for column in result.columns:
        column.no_wrap = True
    for name in names:
        result.add_column(COLUMNS[name].title, justify="right", no_wrap=True)
    for previous, figures in zip([None, *all_figures], all_figures, strict=False):
        if previous is not None and previous.op != figures.op:
            result.add_section()
        result.add_row(figures.op, figures.size, *(cell(figures, name) for name in names))
    return result


def summary(all_figures: list[Figures]) -> str:
    """How many goals are reached, and a line for each that is not."""
    count, missed = 0, []
    for figures in all_figures:
        for name, goal in figures.goals.items():
            count += 1
            what = f"{figures.op} {figures.size}: {COLUMNS[name].title}"
            if name not in figures.values:
                missed.append(f"{what} not measured {figures.why_no_memory or ''}".rstrip())
            elif not figures.reaches(name):
                missed.append(f"{what} {figures.values[name]:.3g}, goal {goal:g}")
    return "\n".join([f"{count - len(missed)} of {count} goals reached", *missed])


def plot(all_figures: list[Figures], path: Path) -> None:
    """Bars of the plotted figures, with the goals as ticks across them."""
    measured = [f for f in all_figures if "copies" in f.values]
    size = 16, max(8, 0.25 * len(measured))
    fig, axes = plt.subplots(1, len(PLOTTED), figsize=size, sharey=True, layout="constrained")
    for ax, name in zip(axes, PLOTTED, strict=True):
        for row, figures in enumerate(measured):
            if name not in figures.values:
                continue
            bar = ax.barh(row, figures.values[name], color=f"C{OPS.index(figures.op)}")
            ax.bar_label(bar, fmt="%.1f", padding=3)
            if name in figures.goals:
                ax.vlines(figures.goals[name], row - 0.45, row + 0.45, "black")
        better = "lower" if COLUMNS[name].low_is_good else "higher"
        ax.margins(x=0.15)
        ax.set_title(f"{COLUMNS[name].title} ({better} is better, line: goal)")
    axes[0].set_yticks(range(len(measured)), [f"{f.op}  {f.size}" for f in measured])
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="written by --benchmark-json")
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    files = parser.parse_args().files or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no file given and none in {RESULTS}: run pytest benchmarks first")
    for path in files:
        machine, all_figures, left_out = read(path)
        console.print(table(machine, all_figures))
        for line in left_out:
            console.print(f"left out: {line}", markup=False)
        console.print(summary(all_figures))
        picture = path.with_suffix(".png")
        plot(all_figures, picture)
        console.print(f"plot: {picture}")


if __name__ == "__main__":
    main()
