"""Folders of runs, and the page of one."""

import html
import json
import re
from pathlib import Path

import yaml

from rlhf.report.page import write_report
from tests.rlhf.helpers.world import GOOD


def gold(prompts, completions, **columns) -> list[float]:
    return [float(sum(word in GOOD for word in text.split())) for text in completions]


def make_stage(folder: Path, name: str, records: list[dict], **settings) -> Path:
    """A stage's folder as it is while the run goes on."""
    folder.mkdir(exist_ok=True)
    settings = {"model_name_or_path": "m", "dataset_name": "d", "seed": 7} | settings
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    return folder


def answer(text: str, score: float | None, tokens: int = 5, ended: bool = True) -> dict:
    return {"completion": text, "score": score, "tokens": tokens, "ended": ended}


def write_completions(folder: Path, rows: list[tuple[str, dict, dict]], end: str = "") -> None:
    lines = [json.dumps(dict(zip(("prompt", "before", "after"), row, strict=True))) for row in rows]
    (folder / "completions.jsonl").write_text("\n".join(lines) + "\n" + end)


def words(page: str) -> str:
    """The page as one reads it, charts aside."""
    body = re.sub(r"<svg.*?</svg>", "", page.split("<body>")[1], flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def report(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")
