"""`python -m benchmarks.report FILE...`: what runs of `pytest benchmarks --results FILE` (or
`--benchmark-json=FILE`) measured.

On the terminal stand tables of each file: beside a figure that has a goal the goal, and whether it
is reached. A page for each machine, FILE with the ending .md, has them too, and plots, which lie in
the folder FILE without ending; runs with several backends on one machine share it. Without FILE:
every file in benchmarks/results.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import page
from benchmarks.figures import CAPTION, COLUMNS, Figures, Run, columns_of, goals_of, read

RESULTS = Path(__file__).with_name("results")
# Runs that agree in these share a page.
SAME = ("processor", "gpu", "threads", "torch", "ppo_kernels")


def cell(figures: Figures, name: str) -> Text:
    if name not in figures.goals:
        return Text(figures.text(name))
    reached = name in figures.values and figures.reaches(name)
    return Text(figures.text(name), "green" if reached else "red")


def table(title: str, all_figures: list[Figures]) -> Table:
    result = Table("op", "size", title=title)
    for column in result.columns:
        column.no_wrap = True
    names = columns_of(all_figures)
    for name in names:
        result.add_column(COLUMNS[name].title, justify="right", no_wrap=True)
    for figures in all_figures:
        result.add_row(figures.label, figures.size, *(cell(figures, name) for name in names))
    return result


def summary(run: Run) -> str:
    """How many goals are reached, and a line for each that is not."""
    goals = goals_of(run)
    missed = [
        f"{each.what} {each.measured or f'not measured {each.reason}'.rstrip()}, goal {each.goal}"
        for each in goals
        if not each.reached
    ]
    return "\n".join([f"{len(goals) - len(missed)} of {len(goals)} goals reached", *missed])


def machines(runs: list[Run]) -> list[list[Run]]:
    """Groups of runs on one machine with the same versions, each with another backend."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            same = all(run.machine.get(key) == group[0].machine.get(key) for key in SAME)
            if same and run.backend not in [other.backend for other in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="written by --results")
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    files = parser.parse_args().files or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no file given and none in {RESULTS}: run pytest benchmarks first")
    try:
        runs = [read(path) for path in files]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for run in runs:
        console.print(f"{run.path}: {page.machine_text(run.machine)}", markup=False)
        for name, figures in run.families.items():
            console.print(table(name, figures))
        console.print(CAPTION)
        for line in run.left_out:
            console.print(f"left out: {line}", markup=False)
        console.print(summary(run), markup=False)
    for group in machines(runs):
        console.print(f"page: {page.write(group)}", markup=False)


if __name__ == "__main__":
    main()
