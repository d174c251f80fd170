"""`rlhf report`: what a run did, on one HTML page that needs no network and no other file.

The page is made of what lies in the folder, so it can be had of a run that is still going or was
cut off: metrics.jsonl of each stage, PPO's completions.jsonl, and the demo's summary.json. The same
files give the same bytes.
"""

import json
import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined

from rlhf.config.fields import expand
from rlhf.config.yaml_files import PlainLoader
from rlhf.errors import UserError, one_line
from rlhf.report.charts import (
    draw_comparison,
    draw_curves,
    draw_frontier,
    find_judges,
    finite,
    points,
)
from rlhf.run.files import disk_errors, read_file, write_file
from rlhf.run.folder import COMPLETIONS_FILE, METRICS_FILE, REPORT_FILE, SUMMARY_FILE
from rlhf.run.terminal import say

TEMPLATE = Path(__file__).with_name(REPORT_FILE)
GENERATOR = b'<meta name="generator" content="rlhf report">'  # in every report, and nowhere else
TITLES = {"ppo": "PPO", "reward": "Reward model", "sft": "Supervised fine-tuning"}
# On top: title, metric, what it is of, and which of its values; of two with one title the first.
KEY_FIGURES = {
    "ppo": (
        ("Score in training", "objective/scores", "mean, first → last iteration", (0, -1)),
        ("KL to the reference", "objective/kl", "nats per response, last iteration", (-1,)),
    ),
    "reward": (
        ("Reward model accuracy", "eval/accuracy", "of held-out pairs", (-1,)),
        ("Reward model accuracy", "accuracy", "of training pairs", (-1,)),
    ),
    "sft": (("SFT loss", "loss", "nats per token, first → last", (0, -1)),),
}
MAX_CHARACTERS = 2000  # of a text on the page


class Stage(NamedTuple):
    """A stage's run as it lies in its folder. `total` steps are None where nothing tells them."""

    name: str
    folder: Path
    yaml: str
    settings: dict
    records: list[dict]
    step: int
    total: int | None
    finished: bool


def read_lines(path: Path, is_whole: Callable[[dict], bool], notes: list[str]) -> list[dict]:
    """The objects of a JSONL file, of which there may be none; of lines that are not whole, as a
    kill or a run at work leaves the last one, or of which `is_whole` is false, `notes` gets
    word."""
    rows, torn = [], 0
    for line in read_file(path).splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_whole(row):
            rows.append(row)
        else:
            torn += 1
    if torn:
        lines = "1 line is" if torn == 1 else f"{torn} lines are"
        notes.append(f"{path.parent.name}/{path.name}: {lines} not whole and left out.")
    return rows


def figures(values: object) -> dict[str, float | None]:
    """The values of an object, each a figure or None; what is no object has none."""
    items = values.items() if isinstance(values, dict) else ()
    return {name: finite(value) for name, value in items}


def has_step(record: dict) -> bool:
    return (finite(record.get("step")) or 0) > 0


def is_answered(row: dict) -> bool:
    """Tells whether a line of completions has its three texts."""
    sides = [row.get(side) for side in ("before", "after")]
    texts = [row.get("prompt")]
    texts += [side.get("completion") for side in sides if isinstance(side, dict)]
    return len(texts) == 3 and all(isinstance(text, str) for text in texts)


def read_stage(name: str, folder: Path, notes: list[str]) -> Stage:
    path = folder / f"{name}.yaml"
    try:
        text = read_file(path).decode("utf-8")
        settings = dict(yaml.load(text, PlainLoader))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}: restore the file") from error
    records = read_lines(folder / METRICS_FILE, has_step, notes)
    step = max((row["step"] for row in records), default=0)
    total = finite(settings.get("max_steps")) or 0
    steps, episodes = points(records, "step", "episodes")
    if episodes and episodes[-1] >= 1:
        all_episodes = finite(settings.get("total_episodes")) or 0
        total = math.ceil(all_episodes * steps[-1] / episodes[-1])
    total = total if total > 0 else None
    # The model is saved last of all, and lies there too when a finished run is taken up again.
    finished = (folder / "config.json").exists() and (total is None or step >= total)
    return Stage(name, folder, text, settings, records, step, total, finished)


def read_completions(folder: Path, notes: list[str]) -> list[dict]:
    """What the reference (`before`) and the policy (`after`) answered to the same prompts."""
    rows = read_lines(folder / COMPLETIONS_FILE, is_answered, notes)
    for row in rows:
        for side in (row["before"], row["after"]):
            side |= {name: finite(side.get(name)) for name in ("score", "tokens", "ended")}
            side["rewards"] = figures(side.get("rewards"))
        before, after = row["before"]["score"], row["after"]["score"]
        row["gain"] = None if None in (before, after) else after - before
    return rows


def read_summary(path: Path, notes: list[str]) -> dict:
    """The results of a demo; nothing before its end."""
    if not path.exists():
        return {}
    try:
        summary = json.loads(read_file(path))
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        notes.append(f"{path.name} is not whole and left out.")
        return {}
    return summary


def make_tiles(stages: list[Stage], rows: list[dict], summary: dict) -> list[tuple]:
    """The key figures: a title, a value or two (before and after), and what they are of."""
    tiles = []
    results = figures(summary.get("ppo"))
    for name in [key.removesuffix("_before") for key in results if key.endswith("_before")]:
        values = [results.get(f"{name}_{when}") for when in ("before", "after")]
        tiles.append((f"{name.capitalize()} score", values, "on fresh prompts, before → after PPO"))
    if rows:
        about = f"mean of {len(rows)} answers, before → after PPO"
        for title, name in (("Score", "score"), ("Response length", "tokens")):
            sides = [points([row[side] for row in rows], name)[0] for side in ("before", "after")]
            if all(sides):
                tiles.append((title, [fmean(values) for values in sides], about))
    for stage in stages:
        titles = set()
        for title, metric, about, ends in KEY_FIGURES[stage.name]:
            (values,) = points(stage.records, metric)
            if values and title not in titles:
                tiles.append((title, [values[end] for end in ends], about))
                titles.add(title)
    if (seconds := finite(summary.get("seconds"))) is not None:
        tiles.append(("Time", [seconds], "seconds, all stages"))
    return tiles


def find_stages(folder: Path, notes: list[str]) -> list[Stage]:
    """The stages of a demo's folder, or the one whose own folder this is, the last one first."""
    stages = []
    for name in TITLES:
        for place in (folder, folder / name):
            if (place / f"{name}.yaml").exists():
                stages.append(read_stage(name, place, notes))
                break
    if not stages:
        raise UserError(
            f"folder {folder} must hold a run, and there is none of ppo.yaml, reward.yaml and "
            "sft.yaml in it or in subfolders named ppo, reward and sft: give the output_dir of a "
            "stage, or the folder of a demo"
        )
    return stages


def last_change(folder: Path, stages: list[Stage]) -> str:
    """When the youngest of the files that the page is made of was written."""
    files = [folder / SUMMARY_FILE]
    for stage in stages:
        names = (f"{stage.name}.yaml", METRICS_FILE, COMPLETIONS_FILE)
        files += [stage.folder / name for name in names]
    seconds = max(file.stat().st_mtime for file in files if file.exists())
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%d %B %Y, %H:%M} UTC"


def numbers(values: Sequence[float | None]) -> list[str]:
    """Figures that belong together, with as many decimals each: three digits of the greatest."""
    greatest = max((abs(value) for value in values if value), default=0)
    form = ",.0f" if greatest >= 999.5 else ".2e"
    if 1e-3 <= greatest < 999.5:
        form = f".{2 - math.floor(math.log10(greatest))}f"
    if greatest == 0:
        form = ".0f"
    return ["–" if x is None else format(x, form).replace("-", "−") for x in values]


def last_part(path: object) -> str:
    return "–" if path is None else Path(str(path)).name


def clip(text: str) -> str:
    text = text.strip() or "(empty)"
    rest = len(text) - MAX_CHARACTERS
    return text if rest <= 0 else f"{text[:MAX_CHARACTERS]} … ({rest:,} more characters)"


def write_report(folder: Path) -> Path:
    """Writes `report.html` of a demo's folder, or of a stage's output folder, into it; returns its
    path. Raises UserError where there is no run."""
    notes = []
    stages = find_stages(folder, notes)
    summary = read_summary(folder / SUMMARY_FILE, notes)
    ppo = next((stage for stage in stages if stage.name == "ppo"), None)
    rows, judges = [], []
    if ppo is not None:
        rows = read_completions(ppo.folder, notes)
        weights = ppo.settings.get("reward_weights")
        judges = find_judges(chain.from_iterable(ppo.records), weights)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"numbers": numbers, "clip": clip, "last_part": last_part}
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=folder.resolve().name,
        date=last_change(folder, stages),
        titles=TITLES,
        stages=stages,
        seconds=figures(summary.get("stage_seconds")),
        notes=notes,
        tiles=make_tiles(stages, rows, summary),
        frontier=[] if ppo is None else draw_frontier(ppo.records),
        judges=judges,
        completions=rows,
        comparison=draw_comparison(rows) if rows else None,
        curves={stage.name: draw_curves(stage.name, stage.records, judges) for stage in stages},
    )
    path = folder / REPORT_FILE
    with disk_errors(f"write {path}", "free some space, or copy the run elsewhere"):
        if os.path.lexists(path) and GENERATOR not in read_file(path):
            raise UserError(
                f"{path} is not replaced, for it is no report of rlhf: move it elsewhere"
            )
        # A text may hold half a character, which UTF-8 has no bytes for.
        write_file(path, html.encode("utf-8", "replace"))
    return path


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="the demo's folder, or the output_dir of one stage"
    )


def main(args: Namespace) -> int:
    say(write_report(Path(expand("folder", str(args.folder)))))
    return 0
