"""A machine's figures as a Markdown page, with its plots."""

from benchmarks import plots
from benchmarks.figures import CAPTION, COLUMNS, Figures, Goal, Run, columns_of, goals_of


def machine_text(machine: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)


def _table(header: list[str], rows: list[list[str]], right_from: int = 2) -> list[str]:
    rule = ["---"] * right_from + ["---:"] * (len(header) - right_from)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    cells.insert(1, rule)
    return ["| " + " | ".join(row) + " |" for row in cells]


def _goal_row(goal: Goal) -> list[str]:
    if goal.measured is None:
        return [goal.what, goal.goal, "not measured", goal.reason or "–"]
    return [goal.what, goal.goal, goal.measured, "met" if goal.reached else "**not met**"]


def _goals(goals: list[Goal]) -> list[str]:
    met, open_ = sum(g.reached for g in goals), sum(g.measured is None for g in goals)
    counts = f"{met} of {len(goals)} goals met, {len(goals) - met - open_} not met"
    lines = [f"{counts}, {open_} not measured.", ""]
    return lines + _table(["figure", "goal", "measured", ""], [_goal_row(g) for g in goals], 1)


def _figures(figures: list[Figures]) -> list[str]:
    names = columns_of(figures)
    header = ["op", "size", *(COLUMNS[name].title for name in names)]
    return _table(header, [[f"`{f.label}`", f.size, *map(f.text, names)] for f in figures])


def text(runs: list[Run], pictures: dict[str, str]) -> str:
    """The page of runs with different backends on one machine; `pictures` maps titles to paths."""
    gpu = runs[0].machine.get("gpu")
    lines = [f"# Speed and memory on {gpu or runs[0].machine.get('processor', 'this machine')}"]
    lines += ["", f"Made by `make {'bench' if gpu is None else 'gpu'}`. {CAPTION}."]
    for title, path in pictures.items():
        lines += ["", f"![{title}]({path})"]
    for run in runs:
        if len(runs) > 1:
            lines += ["", f"# Backend {run.backend}"]
        lines += ["", machine_text(run.machine) + "."]
        lines += ["", "## Goals", "", *_goals(goals_of(run))]
        if not run.figures:
            lines += ["", "Nothing was measured."]
        for name, figures in run.families.items():
            lines += ["", f"## {name}", "", *_figures(figures)]
        if run.left_out:
            lines += ["", "## Left out", "", *(f"- {line}" for line in run.left_out)]
    return "\n".join(lines) + "\n"


def write(runs: list[Run]):
    """Writes page and plots beside the first of the runs' files; returns the page's path."""
    path = min((run.path for run in runs), key=lambda p: len(p.name)).with_suffix(".md")
    folder = path.with_suffix("")
    pictures = {}
    for name, draw in plots.PLOTS.items():
        if draw(runs, folder / f"{name}.png"):
            pictures[draw.__doc__.partition(".")[0]] = f"{folder.name}/{name}.png"
    path.write_text(text(runs, pictures), encoding="utf-8")
    return path
