"""The manifest of a checkpoint, and what is wrong with one: nothing that is read from a folder is
taken on trust, nor leads out of it."""

import hashlib
import json
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rlhf.run.files import open_to_read, read_file
from rlhf.run.folder import CHECKPOINT_NAME, MANIFEST, METRICS_FILE


class Best(NamedTuple):
    """The name of the best checkpoint so far, the metric it is the best by, whether more of this is
    better, and its value (None if that is not finite)."""

    metric: str | None
    greater_is_better: bool | None
    checkpoint: str | None = None
    value: float | None = None


class Manifest(NamedTuple):
    """Steps that a checkpoint has behind it, the best checkpoint up to there, and size and hash of
    each of its files: name -> {"bytes": ..., "sha256": ...}."""

    step: int
    best: Best
    files: dict[str, dict[str, object]]


def write_manifest(folder: Path, step: int, best: Best) -> None:
    """Lists size and hash of every file in the folder, as read back, and a hash of the list."""
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {"step": step, "best": best._asdict(), "files": files}
    manifest["sha256"] = _hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a whole checkpoint. Raises ValueError for one that no run wrote."""
    content = read_file(checkpoint / MANIFEST)
    try:
        values = json.loads(content)
        is_whole = isinstance(values, dict) and values.pop("sha256", None) == _hash(values)
    except (ValueError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{MANIFEST} is damaged")
    fault = _fault(values)
    if fault is not None:
        raise ValueError(f"{MANIFEST} is none that a run wrote: {fault}")
    return Manifest(values["step"], Best(**values["best"]), values["files"])


def _fault(values: dict) -> str | None:
    """What is wrong with the parts of a manifest."""
    if values.keys() != {"step", "best", "files"}:
        return "it must hold step, best and files"
    step, best, files = values["step"], values["best"], values["files"]
    if type(step) is not int or step < 0:
        return f"step must be a number of steps, got {_shown(step)}"
    if not isinstance(best, dict) or best.keys() != set(Best._fields):
        return f"best must hold {', '.join(Best._fields)}, got {_shown(best)}"
    kinds = (("metric", str), ("greater_is_better", bool), ("checkpoint", str))
    for name, kind in kinds:
        if not isinstance(best[name], kind | None):
            return f"best.{name} must be a {kind.__name__}, got {_shown(best[name])}"
    if best["checkpoint"] is not None and not CHECKPOINT_NAME.fullmatch(best["checkpoint"]):
        return f"best.checkpoint must be checkpoint-N, got {_shown(best['checkpoint'])}"
    if best["value"] is not None and not is_number(best["value"]):
        return f"best.value must be a number, got {_shown(best['value'])}"
    if not isinstance(files, dict) or not files:
        return f"files must name the files, got {_shown(files)}"
    for name, saved in files.items():
        if not _is_inside(name):
            return f"it names a file outside the folder, {_shown(name)}"
        if (
            not isinstance(saved, dict)
            or saved.keys() != {"bytes", "sha256"}
            or type(saved["bytes"]) is not int
            or not isinstance(saved["sha256"], str)
        ):
            return f"{_shown(name)} must have bytes and sha256, got {_shown(saved)}"
    return None


def _is_inside(name: str) -> bool:
    """Tells whether it is the plain relative path of a file."""
    path = PurePosixPath(name)
    plain = str(path) == name and name != "." and "\\" not in name and name.isprintable()
    return plain and not path.is_absolute() and ".." not in path.parts


def is_number(value: object) -> bool:
    """Tells whether it is a finite number, as JSON has them."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _shown(value: object) -> str:
    return f"{value!r:.80}"


def checkpoint_damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, by its manifest; None if it is whole."""
    try:
        if not path.is_dir():
            return "there is no such folder"
        manifest = read_manifest(path)
        named = CHECKPOINT_NAME.fullmatch(path.resolve().name.removeprefix("stale-"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    if named is not None and int(named[1]) != manifest.step:
        return f"{MANIFEST} is of another checkpoint, of step {manifest.step}"
    for name, saved in manifest.files.items():
        damage = _damage(path, name, saved)
        if damage is not None:
            return damage
    if METRICS_FILE in manifest.files:
        return _metrics_damage(path / METRICS_FILE)
    return None


def _damage(checkpoint: Path, name: str, saved: dict[str, object]) -> str | None:
    file = checkpoint / name
    try:
        if not file.is_file():
            return f"{name} is missing"
        if not file.resolve().is_relative_to(checkpoint.resolve()):
            return f"{name} is a link that leads outside the folder"
        size = file.stat().st_size
        if size != saved["bytes"]:
            return f"{name} has {size} bytes, it was saved with {saved['bytes']}"
        if _sha256(file) != saved["sha256"]:
            return f"{name} is damaged, its hash is another than when it was saved"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def _metrics_damage(file: Path) -> str | None:
    for number, line in enumerate(read_file(file).split(b"\n"), 1):
        if line and metrics_line(line) is None:
            return f"{METRICS_FILE} has no metrics in line {number}"
    return None


def metrics_line(line: bytes) -> dict[str, float | None] | None:
    """A line of metrics.jsonl: its step, and numbers, or None where one is not finite. None if the
    line is something else."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return values if all(x is None or is_number(x) for x in values.values()) else None


def _hash(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open_to_read(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
