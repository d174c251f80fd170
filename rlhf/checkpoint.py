"""The output folder of a run: its configuration, its checkpoints and the trained model.

A checkpoint is complete or absent: it is written beside, with a manifest of hashes, synced to the
disk and renamed. What a killed run leaves half done is named `.saving-*` or `.deleting-*`, and the
next run in the folder removes it. With several processes only the main one may write, and of
several runs only the one that has locked the folder.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePath

import yaml

from rlhf.config import TrainConfig
from rlhf.errors import UserError, one_line
from rlhf.files import (
    GO_ON,
    disk_error,
    disk_errors,
    lock_folder,
    remove,
    sync,
    sync_tree,
    write_file,
)
from rlhf.terminal import say
from rlhf.yaml_files import PlainLoader

MANIFEST = "manifest.json"
METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
LEFTOVERS = (".saving-", ".deleting-")
# Options that a resumed run may change, because no number of the training depends on them.
FREE_OPTIONS = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("report_to", "save_steps", "save_total_limit"),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
}


@dataclass(frozen=True)
class Run:
    """A run's folder, the file in it that holds the configuration, and the checkpoint in it that
    the run goes on from (None: it starts from the beginning)."""

    output_dir: Path
    run_file: str
    checkpoint: Path | None = None


def open_run(config: TrainConfig, stage: str) -> Run:
    """Makes the output folder ready for a new run, or for one that goes on, and locks it.

    The folder holds the configuration as `<stage>.yaml`, which `rlhf <stage> --config` reads. A run
    goes on only under the configuration it was started with (FREE_OPTIONS aside), and with the
    metrics.jsonl of its checkpoint. With `resume_from_checkpoint` 'auto' damaged checkpoints are
    skipped, each with a message. A path may be resumed in its own folder or, as a copy, in a new
    one; from then on it is the folder's newest checkpoint.
    """
    output_dir, run_file = Path(config.output_dir), f"{stage}.yaml"
    resume = config.resume_from_checkpoint
    if resume is not None and config.overwrite_output_dir:
        raise UserError(
            "overwrite_output_dir starts anew and resume_from_checkpoint goes on: give one of them"
        )
    as_new = {"overwrite_output_dir": False, "resume_from_checkpoint": None}
    settings = _to_yaml(asdict(config) | as_new)
    given = None if resume in (None, "auto") else Path(resume)
    if given is None:
        goes_on = resume == "auto" and os.path.exists(output_dir / run_file)
    else:
        damage = checkpoint_damage(given)
        if damage is not None:
            raise UserError(
                f"cannot go on from {given}: {damage}: give a whole checkpoint, or "
                "--resume_from_checkpoint auto, which skips damaged ones"
            )
        _check_same_configuration(config, given, run_file)
        # Either the checkpoint or its folder may be a link.
        folders = (Path(os.path.abspath(given)).parent.resolve(), given.resolve().parent)
        goes_on = output_dir.resolve() in folders

    checkpoint, remedy = None, GO_ON if goes_on else "choose another folder"
    with disk_errors(f"write to output_dir {output_dir}", remedy):
        if goes_on:
            lock_folder(output_dir)
        else:
            claim_output_dir(
                output_dir,
                run_file=run_file,
                overwrite=config.overwrite_output_dir,
                go_on="go on with the run in it with --resume_from_checkpoint auto, ",
            )
        if given is not None:
            checkpoint = _adopt(given, output_dir, config.metric_for_best_model)
        elif goes_on:
            _check_same_configuration(config, output_dir, run_file)
            checkpoint = _newest_whole_checkpoint(output_dir)
        for entry in filter(_is_leftover, list(output_dir.iterdir())):
            remove(entry)
        # Once it is there the folder is one to go on in, so the checkpoint came before.
        if not (output_dir / run_file).exists():
            write_file(output_dir / run_file, settings)
        if checkpoint is not None:
            metrics = checkpoint / METRICS_FILE
            write_file(output_dir / METRICS_FILE, metrics.read_bytes() if metrics.exists() else b"")
    return Run(output_dir, run_file, checkpoint)


def claim_output_dir(path: str | Path, *, run_file: str, overwrite: bool, go_on: str = "") -> Path:
    """Makes `path` an empty folder for a new run, and locks it.

    `run_file` is the file by which a run of this kind is known. A folder that holds more than what
    a kill left half done is refused; with `overwrite` it is emptied, if it holds such a run.
    `go_on` tells how to go on with such a run, where that is possible: "go on with ..., ".
    """
    path = Path(path)
    with disk_errors(f"write to output_dir {path}", "choose another folder"):
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir {path} is a file: choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
        entries = list(path.iterdir())
        if not all(map(_is_leftover, entries)):
            holds_run = (path / run_file).exists()
            if not overwrite:
                raise UserError(
                    f"output_dir {path} is not empty: {go_on if holds_run else ''}choose another "
                    "folder, or replace the run in it with --overwrite_output_dir"
                )
            if not holds_run:
                raise UserError(
                    f"output_dir {path} holds no {run_file}, so it is not an earlier run of this "
                    "kind and is not overwritten: choose another folder"
                )
        # The run file last, so that after a kill on the way the folder can still be overwritten.
        for entry in sorted(entries, key=lambda entry: entry.name == run_file):
            remove(entry)
    return path


def write_run_file(path: Path, values: dict) -> None:
    """Writes the settings by which a run is known, as YAML."""
    with disk_errors(f"write to output_dir {path.parent}", "choose another folder"):
        write_file(path, _to_yaml(values))


def _to_yaml(values: dict) -> bytes:
    try:
        return yaml.safe_dump(values, sort_keys=False).encode()
    except yaml.YAMLError as error:
        raise UserError(
            f"an option cannot be written as YAML ({one_line(error)}): give text, numbers, True or "
            "False, or lists of them"
        ) from error


def _check_same_configuration(config: TrainConfig, folder: Path, run_file: str) -> None:
    """Raises UserError where an option in `folder / run_file` has another value in `config`.

    Options that this version added count as their default there.
    """
    known = {field.name for field in fields(config)}
    try:
        stored = yaml.load((folder / run_file).read_text(encoding="utf-8"), PlainLoader)
        gone = [name for name, value in stored.items() if name not in known and value is not None]
        there = asdict(type(config)(**{k: v for k, v in stored.items() if k in known}))
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
    if gone:
        raise UserError(
            f"{folder} was written by another version, which had the option {gone[0]}: go on with "
            "that version, or start anew in another output_dir"
        )
    here = asdict(config)
    there, here = (yaml.safe_load(_to_yaml(values)) for values in (there, here))
    changed = [k for k in there if k not in FREE_OPTIONS and there[k] != here[k]]
    if changed:
        name, *others = changed
        also = f" (also: {', '.join(others)})" if others else ""
        raise UserError(
            f"{folder} belongs to another configuration: {name} is {there[name]!r} there and "
            f"{here[name]!r} here{also}: give the same values, or start anew in another "
            "output_dir"
        )


def _adopt(given: Path, output_dir: Path, metric: str | None) -> Path:
    """Makes a whole checkpoint the newest of the folder; returns it there.

    If it is not there under its name it is copied, and with it the best one by `metric`. Those of
    more steps are set aside, so that neither 'auto' nor rotation takes them for its successors.
    """
    manifest = read_manifest(given)
    step, best = manifest["step"], manifest["best"]
    checkpoint = output_dir / f"checkpoint-{step}"
    if best["checkpoint"] not in (None, checkpoint.name) and best["metric"] == metric:
        kept = output_dir / best["checkpoint"]
        source = given.resolve().parent / kept.name
        damage = None if kept.exists() else checkpoint_damage(source)
        if damage is not None:
            say(f"the best checkpoint, {source}, cannot be kept: {damage}")
        elif not kept.exists():
            _copy(source, kept)
    if not (checkpoint.exists() and checkpoint.samefile(given)):
        _copy(given, checkpoint)
    for later in reversed(_checkpoints(output_dir)):
        if _number(later) > step:
            _set_stale(later)
    return checkpoint


def _copy(source: Path, checkpoint: Path) -> None:
    """Copies a whole checkpoint, complete or not at all; one that has the name is set aside."""
    temporary = checkpoint.with_name(f".saving-{checkpoint.name}")
    remove(temporary)
    for name in (*read_manifest(source)["files"], MANIFEST):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, temporary / name)
    sync_tree(temporary)
    if checkpoint.exists():
        _set_stale(checkpoint)
    os.replace(temporary, checkpoint)
    sync(checkpoint.parent)


def _set_stale(checkpoint: Path) -> None:
    """Renames a checkpoint so that it is none of the run's, in place of an earlier one set aside
    of the same number."""
    stale = checkpoint.with_name(f"stale-{checkpoint.name}")
    remove(stale)
    os.replace(checkpoint, stale)
    sync(stale.parent)
    say(f"{checkpoint} is no longer of this run: it is renamed {stale.name}")


def save_checkpoint(
    run: Run, step: int, write: Callable[[Path], None], best: dict[str, object]
) -> Path:
    """Saves the state after `step` steps as `checkpoint-<step>` in the run's folder; returns it.

    `write(folder)` fills the folder, to which the run's configuration and its metrics.jsonl are
    added; `best` tells in the manifest which is the best checkpoint so far: its name `checkpoint`,
    or None, and the `metric` it is the best by. If anything fails the checkpoints that are there
    stay as they are.
    """
    checkpoint = run.output_dir / f"checkpoint-{step}"
    temporary = run.output_dir / f".saving-{checkpoint.name}"
    replaces = checkpoint.exists()
    try:
        remove(temporary)
        temporary.mkdir()
        write(temporary)
        for name in (run.run_file, METRICS_FILE):
            if (run.output_dir / name).exists():
                shutil.copyfile(run.output_dir / name, temporary / name)
        _write_manifest(temporary, step, best)
        sync_tree(temporary)
        if replaces:
            _set_aside(checkpoint)
        os.replace(temporary, checkpoint)
    except BaseException as error:
        if replaces and not checkpoint.exists():
            with suppress(OSError):
                os.replace(_aside(checkpoint), checkpoint)
        shutil.rmtree(temporary, ignore_errors=True)
        reason = disk_error(error)
        if reason is None:
            raise
        whole = [old.name for old in _checkpoints(run.output_dir) if checkpoint_damage(old) is None]
        stays = f"{whole[-1]} is whole" if whole else "there is no earlier one"
        raise UserError(f"cannot save {checkpoint.name}: {reason}: {GO_ON} ({stays})") from error
    with disk_errors(f"be sure that {checkpoint.name}, which is whole, is on the disk", GO_ON):
        sync(run.output_dir)
    if replaces:
        shutil.rmtree(_aside(checkpoint), ignore_errors=True)
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


def read_manifest(checkpoint: Path) -> dict:
    """Of a whole checkpoint: its `step`, the `best` one up to there, and the hashes of `files`."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def checkpoint_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None if it is whole."""
    try:
        if not path.is_dir():
            return "there is no such folder"
        manifest = read_manifest(path)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except ValueError:
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
    """Raises UserError if there is none and the run is finished."""
    for checkpoint in reversed(_checkpoints(output_dir)):
        damage = checkpoint_damage(checkpoint)
        if damage is None:
            say(f"going on from {checkpoint}")
            return checkpoint
        say(f"skipping {checkpoint}: {damage}")
    if (output_dir / "config.json").exists():
        raise UserError(
            f"output_dir {output_dir} holds a finished run, and no whole checkpoint to go on from: "
            "replace it with --overwrite_output_dir, or choose another folder"
        )
    say(f"no whole checkpoint in {output_dir}: starting from the beginning")
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folder's checkpoints, whole or not, in order of their steps."""
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _write_manifest(folder: Path, step: int, best: dict[str, object]) -> None:
    """Lists size and hash of every file in the folder, as read back, and a hash of the list."""
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {"step": step, "best": best, "files": files}
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


def _aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".deleting-{checkpoint.name}")


def _set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that is to be deleted, so that it is never there in part."""
    aside = _aside(checkpoint)
    remove(aside)
    os.replace(checkpoint, aside)
    return aside
