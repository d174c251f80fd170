"""`rlhf demo`: all of RLHF in one command, on a world made on the spot or on labelled text; and the
tasks by whose curves implementations of PPO are known."""

import importlib
import json
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.config.fields import expand
from rlhf.demo import labelled
from rlhf.demo.labelled_run import LabelledSizes, run_labelled
from rlhf.demo.reviews_run import ReviewsSizes, run_reviews
from rlhf.errors import UserError
from rlhf.report.page import write_report
from rlhf.run.files import disk_errors, write_file
from rlhf.run.folder import SUMMARY_FILE, claim_output_dir, output_path
from rlhf.run.settings import to_yaml
from rlhf.run.terminal import say

RUN_FILE = "demo.yaml"
STAGED = ("reviews", "labelled")
# Task -> that of its figures which must reach the task's THRESHOLD.
CURVES = {"counting": "score", "cartpole": "return"}


def run_demo(
    output_dir: Path,
    seed: int,
    sizes: ReviewsSizes | LabelledSizes,
    *,
    data: Path | None = None,
    bf16: bool = False,
    overwrite_output_dir: bool = False,
) -> dict:
    """Runs all stages in `output_dir` and writes `summary.json` there; returns the summary.

    `data` names a file of labelled texts, and `sizes` are then LabelledSizes; without it the
    built-in reviews are used, and `sizes` are ReviewsSizes. `bf16` is that of every stage.
    """
    start = time.perf_counter()
    # Checked first, so that a mistake costs no earlier run.
    check_seeds(seed, 1)
    examples = None if data is None else labelled.read_examples(data)
    settings = {"seed": seed, "data": data and str(data), "bf16": bf16, **asdict(sizes)}
    inputs = [] if data is None else [("data", data)]
    begin(output_dir, settings, inputs, overwrite_output_dir)
    if examples is None:
        results = run_reviews(output_dir, seed, bf16, sizes)
    else:
        results = run_labelled(examples, output_dir, seed, bf16, sizes)
    summary = {"seed": seed, "seconds": round(time.perf_counter() - start, 1), **results}
    write_summary(output_dir, summary)
    return summary


def run_curves(
    task: str, output_dir: Path, seed: int, seeds: int, *, overwrite_output_dir: bool = False
) -> dict:
    """Runs a task of CURVES with the seeds `seed`, `seed + 1`, …, `seed + seeds - 1` and writes
    `summary.json` in `output_dir`: the threshold, and the figures of each seed; returns it."""
    check_seeds(seed, seeds)
    module = importlib.import_module(f"rlhf.demo.{task}")  # cartpole needs an extra
    run, runs = getattr(module, f"run_{task}"), []
    begin(output_dir, {"task": task, "seed": seed, "seeds": seeds}, [], overwrite_output_dir)
    start = time.perf_counter()
    for done in range(seeds):
        runs.append({"seed": seed + done, **run(seed + done)})
        left = (time.perf_counter() - start) / (done + 1) * (seeds - done - 1)
        figures = "  ".join(f"{name} {value:.4g}" for name, value in runs[-1].items())
        say(f"{task} {done + 1}/{seeds}  {figures}  eta {left:.0f}s")
    summary = {"task": task, "threshold": module.THRESHOLD, "runs": runs}
    write_summary(output_dir, summary)
    return summary


def check_seeds(seed: int, seeds: int) -> None:
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if not 0 <= seed <= 2**32 - seeds:
        raise UserError(f"seed must be in [0, 2**32), as the {seeds} seeds from it on, got {seed}")


def begin(
    output_dir: Path, settings: dict, inputs: list[tuple[str, Path]], overwrite_output_dir: bool
) -> None:
    """Makes the folder ready for a demo, and writes its settings there as `demo.yaml`."""
    claim_output_dir(output_dir, kind="demo", overwrite=overwrite_output_dir, inputs=inputs)
    write(output_dir / RUN_FILE, to_yaml(settings))


def write_summary(output_dir: Path, summary: dict) -> None:
    write(output_dir / SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    with disk_errors(f"write to output_dir {path.parent}", "choose another folder"):
        write_file(path, content)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        choices=[*STAGED, *CURVES],
        help="reviews: a built-in world of film reviews (default); labelled: the texts of --data; "
        "counting: a model with 36 words learns to repeat one; cartpole: CartPole-v1, which needs "
        'pip install "ppo-kernels[gym]"',
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="counting and cartpole: run so many seeds, from --seed on; the exit code is 0 if all "
        "reach the task's threshold, otherwise 1",
    )
    parser.add_argument(
        "--output_dir",
        help="folder of the run (default: runs/demo; of a task other than reviews runs/TASK)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="JSONL file of labelled texts: {'text': ..., 'label': 'positive' | 'negative'}; "
        "with it the task is labelled",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="reviews and labelled: run the models in bfloat16 autocast (the weights stay fp32)",
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace an earlier demo in output_dir"
    )


def choose_task(args: Namespace) -> str:
    """The task that the options name; raises UserError where they contradict each other."""
    task = args.task or ("reviews" if args.data is None else "labelled")
    if args.data is not None and task != "labelled":
        raise UserError(f"data is for task labelled, got task {task}: leave out --data or --task")
    if args.data is None and task == "labelled":
        raise UserError("task labelled must have labelled texts: give a file of them with --data")
    if task in CURVES and args.bf16:
        raise UserError(f"bf16 is for tasks {' and '.join(STAGED)}, got task {task}: leave it out")
    if task in STAGED and args.seeds != 1:
        raise UserError(
            f"seeds must be 1 for task {task}, got {args.seeds}: give each run its --seed and "
            "--output_dir"
        )
    return task


def show_stages(summary: dict, output_dir: Path) -> None:
    """Prints the final table."""
    results = {key: value for key, value in summary.items() if isinstance(value, dict)}
    seconds = results.pop("stage_seconds")
    table = Table("figure", "value", title="Result")
    for group, figures in results.items():
        for name, value in figures.items():
            table.add_row(f"{group}.{name}", f"{value:.3f}")
    table.add_section()
    for stage, value in seconds.items():
        table.add_row(f"{stage}, seconds", f"{value:.1f}")
    table.add_row("all, seconds", f"{summary['seconds']:.1f}")
    console = Console()
    console.print(table)
    say(f"Completions before and after: {output_dir / 'ppo' / 'completions.md'}")


def show_curves(summary: dict) -> bool:
    """Prints a row for each seed; returns whether all reach the threshold."""
    task, threshold, runs = summary["task"], summary["threshold"], summary["runs"]
    figure = CURVES[task]
    passed = [run[figure] >= threshold for run in runs]
    table = Table(*runs[0], f"{figure} >= {threshold:g}", title=task)
    for run, reached in zip(runs, passed, strict=True):
        seed, *figures = run.values()
        table.add_row(str(seed), *(f"{x:.2f}" for x in figures), "pass" if reached else "FAIL")
    console = Console(highlight=False)
    console.print(table)
    say(f"{sum(passed)} of {len(runs)} seeds reach {threshold:g}")
    return all(passed)


def main(args: Namespace) -> int:
    """Runs the demo; returns the exit code: 1 if a seed misses its task's threshold, else 0."""
    task = choose_task(args)
    output_dir = Path("runs", "demo" if task == "reviews" else task)
    if args.output_dir is not None:
        output_dir = output_path(expand("output_dir", str(args.output_dir)))
    data = args.data and Path(expand("data", str(args.data)))
    if task in CURVES:
        summary = run_curves(
            task, output_dir, args.seed, args.seeds, overwrite_output_dir=args.overwrite_output_dir
        )
        return 0 if show_curves(summary) else 1
    summary = run_demo(
        output_dir,
        args.seed,
        ReviewsSizes() if task == "reviews" else LabelledSizes(),
        data=data,
        bf16=args.bf16,
        overwrite_output_dir=args.overwrite_output_dir,
    )
    show_stages(summary, output_dir)
    say(f"Report: {write_report(output_dir)}")
    return 0
