"""The output folder of a run: its configuration, its checkpoints and the trained model.

A checkpoint is complete or absent: it is written beside, with a manifest of hashes, synced to the
disk and renamed. What a killed run leaves half done is named `.saving-*` or `.deleting-*`, and the
next run in the folder removes it. With several processes only the main one may write.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePath

import yaml

from rlhf.config import TrainConfig
from rlhf.errors import UserError
from rlhf.files import GO_ON, disk_error, disk_errors, remove, sync, sync_tree, write_file

MANIFEST = "manifest.json"
METRICS_FILE = "metrics.jsonl"
LEFTOVERS = (".saving-", ".deleting-")
# Options that a resumed run may change, because no number depends on them.
FREE_OPTIONS = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("report_to", "save_steps", "save_total_limit"),
}


@dataclass(frozen=True)
class Run:
    """A run's folder, the file in it that holds the configuration, and the checkpoint that the run
    goes on from (None: it starts from the beginning)."""

    output_dir: Path
    run_file: str
    checkpoint: Path | None = None

    @property
    def step(self) -> int:
        """Steps that the checkpoint has behind it; 0 without one."""
        if self.checkpoint is None:
            return 0
        return json.loads((self.checkpoint / MANIFEST).read_text(encoding="utf-8"))["step"]


def open_run(config: TrainConfig, stage: str) -> Run:
    """Makes the output folder ready for a new run, or for one that goes on.

    The folder holds the configuration as `<stage>.yaml`, which `rlhf <stage> --config` reads. A run
    goes on only under the configuration it was started with (FREE_OPTIONS aside), and with the
    metrics.jsonl of its checkpoint. With `resume_from_checkpoint` 'auto' damaged checkpoints are
    skipped, each with a message; a path may also be resumed into a new folder.
    """
    output_dir, run_file = Path(config.output_dir), f"{stage}.yaml"
    resume = config.resume_from_checkpoint
    if resume is not None and config.overwrite_output_dir:
        raise UserError(
            "overwrite_output_dir starts anew and resume_from_checkpoint goes on: give one of them"
        )
    checkpoint = None
    goes_on = resume == "auto" and (output_dir / run_file).exists()
    if goes_on:
        _check_same_configuration(config, output_dir, run_file)
        checkpoint = _newest_whole_checkpoint(output_dir)
    elif resume not in (None, "auto"):
        checkpoint = Path(resume)
        damage = checkpoint_damage(checkpoint)
        if damage is not None:
            raise UserError(
                f"cannot go on from {checkpoint}: {damage}: give a whole checkpoint, or "
                "--resume_from_checkpoint auto, which skips damaged ones"
            )
        _check_same_configuration(config, checkpoint, run_file)
        goes_on = checkpoint.resolve().parent == output_dir.resolve()

    if goes_on:
        with disk_errors(f"write to output_dir {output_dir}", "make it writable"):
            for entry in filter(_is_leftover, list(output_dir.iterdir())):
                remove(entry)
    else:
        claim_output_dir(output_dir, run_file=run_file, overwrite=config.overwrite_output_dir)
        run = {"overwrite_output_dir": False, "resume_from_checkpoint": None}
        write_run_file(output_dir / run_file, asdict(config) | run)
    if checkpoint is not None:
        metrics = checkpoint / METRICS_FILE
        with disk_errors(f"write to output_dir {output_dir}", "make it writable"):
            write_file(output_dir / METRICS_FILE, metrics.read_bytes() if metrics.exists() else b"")
    return Run(output_dir, run_file, checkpoint)


def claim_output_dir(path: str | Path, *, run_file: str, overwrite: bool) -> Path:
    """Makes `path` an empty folder for a new run.

    `run_file` is the file by which a run of this kind is known. A folder that holds more than what
    a kill left half done is refused; with `overwrite` it is emptied, if it holds such a run.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file: choose another folder")
    with disk_errors(f"write to output_dir {path}", "choose another folder"):
        entries = list(path.iterdir()) if path.exists() else []
        if not all(map(_is_leftover, entries)):
            if not overwrite:
                raise UserError(
                    f"output_dir {path} is not empty: choose another folder, or replace the run "
                    "in it with --overwrite_output_dir"
                )
            if not (path / run_file).exists():
                raise UserError(
                    f"output_dir {path} holds no {run_file}, so it is not an earlier run of this "
                    "kind and is not overwritten: choose another folder"
                )
        # The run file last, so that after a kill on the way the folder can still be overwritten.
        for entry in sorted(entries, key=lambda entry: entry.name == run_file):
            remove(entry)
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_run_file(path: Path, values: dict) -> None:
    """Writes the settings by which a run is known, as YAML."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with disk_errors(f"write to output_dir {path.parent}", "choose another folder"):
        write_file(path, text.encode())


def _check_same_configuration(config: TrainConfig, folder: Path, run_file: str) -> None:
    """Raises UserError where an option in `folder / run_file` has another value in `config`.

    Options that this version added count as their default there.
    """
    known = {field.name for field in fields(config)}
    try:
        stored = yaml.safe_load((folder / run_file).read_text(encoding="utf-8"))
        there = stored | asdict(type(config)(**{k: v for k, v in stored.items() if k in known}))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no {run_file}, so it does not belong to a run of this kind: give one "
            f"of `rlhf {PurePath(run_file).stem}`"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot read the configuration {folder / run_file}: {reason:.200}: start anew in "
            "another output_dir"
        ) from error
    here = yaml.safe_load(yaml.safe_dump(asdict(config)))
    changed = [k for k in there if k not in FREE_OPTIONS and there[k] != here.get(k)]
    if changed:
        name, *others = changed
        also = f" (also: {', '.join(others)})" if others else ""
        raise UserError(
            f"{folder} belongs to another configuration: {name} is {there[name]!r} there and "
            f"{here.get(name)!r} here{also}: give the same values, or start anew in another "
            "output_dir"
        )


def save_checkpoint(run: Run, step: int, write: Callable[[Path], None]) -> Path:
    """Saves the state after `step` steps as `checkpoint-<step>` in the run's folder; returns it.

    `write(folder)` fills the folder, to which the run's configuration and its metrics.jsonl are
    added. If anything fails the checkpoints that are there stay as they are.
    """
    checkpoint = run.output_dir / f"checkpoint-{step}"
    temporary = run.output_dir / f".saving-{checkpoint.name}"
    try:
        remove(temporary)
        temporary.mkdir()
        write(temporary)
        for name in (run.run_file, METRICS_FILE):
            if (run.output_dir / name).exists():
                shutil.copyfile(run.output_dir / name, temporary / name)
        _write_manifest(temporary, step)
        sync_tree(temporary)
        replaced = _set_aside(checkpoint) if checkpoint.exists() else None
        os.replace(temporary, checkpoint)
        sync(run.output_dir)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = disk_error(error)
        if reason is None:
            raise
        whole = [old.name for old in _checkpoints(run.output_dir) if checkpoint_damage(old) is None]
        stays = f"{whole[-1]} is whole" if whole else "there is no earlier one"
        raise UserError(f"cannot save {checkpoint.name}: {reason}: {GO_ON} ({stays})") from error
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return checkpoint


def rotate_checkpoints(newest: Path, limit: int, keep: Path | None = None) -> None:
    """Deletes the oldest checkpoints until `limit` are left, `newest` among them (0: all stay).

    `keep`, the best one, stays and is not counted; nor are those of more steps than `newest`.
    """
    if limit == 0:
        return
    checkpoints = _checkpoints(newest.parent)
    upto_newest = checkpoints[: [path.name for path in checkpoints].index(newest.name) + 1]
    counted = [path for path in upto_newest if keep is None or path.name != keep.name]
    with disk_errors(f"delete old checkpoints in {newest.parent}", GO_ON):
        for checkpoint in counted[:-limit]:
            shutil.rmtree(_set_aside(checkpoint), ignore_errors=True)


def checkpoint_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if it is whole."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} is damaged"
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _manifest_hash(manifest):
        return f"{MANIFEST} is damaged"
    for name, saved in manifest["files"].items():
        file = path / name
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            return f"{MANIFEST} names a file outside the folder, {name}"
        try:
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != saved["bytes"]:
                return f"{name} has {size} bytes, it was saved with {saved['bytes']}"
            if _sha256(file) != saved["sha256"]:
                return f"{name} is damaged, its hash is another than when it was saved"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _newest_whole_checkpoint(output_dir: Path) -> Path | None:
    for checkpoint in reversed(_checkpoints(output_dir)):
        damage = checkpoint_damage(checkpoint)
        if damage is None:
            print(f"going on from {checkpoint}", flush=True)
            return checkpoint
        print(f"skipping {checkpoint}: {damage}", flush=True)
    print(f"no whole checkpoint in {output_dir}: starting from the beginning", flush=True)
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folder's checkpoints, whole or not, in order of their steps."""
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _write_manifest(folder: Path, step: int) -> None:
    """Lists size and hash of every file in the folder, as read back, and a hash of the list."""
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {"step": step, "files": files}
    manifest["sha256"] = _manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _manifest_hash(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(LEFTOVERS)


def _set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that is to be deleted, so that it is never there in part."""
    aside = checkpoint.with_name(f".deleting-{checkpoint.name}")
    remove(aside)
    os.replace(checkpoint, aside)
    return aside
