"""The output folder of a run: its configuration, its checkpoints and the trained model.

A checkpoint is complete or absent: it is written beside, with a manifest of hashes, synced to the
disk and renamed. What a killed run leaves half done the next run in the folder removes. With
several processes only the main one may write, and of several runs only the one that has locked the
folder.
"""

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.config.training import TrainConfig
from rlhf.errors import UserError
from rlhf.run.files import (
    GO_ON,
    deleting_name,
    disk_error,
    disk_errors,
    is_leftover,
    lock_folder,
    read_file,
    remove,
    saving_name,
    sync,
    sync_tree,
    write_file,
)
from rlhf.run.folder import (
    CHECKPOINT,
    CHECKPOINT_NAME,
    MANIFEST,
    METRICS_FILE,
    claim_output_dir,
    kind_of,
    local_inputs,
    output_path,
    own_paths,
    unknown_run,
)
from rlhf.run.manifest import Best, checkpoint_damage, read_manifest, write_manifest
from rlhf.run.settings import changed_options, settings
from rlhf.run.terminal import say


@dataclass(frozen=True)
class Run:
    """A run's folder, the stage in it, and the checkpoint in it that the run goes on from (None: it
    starts from the beginning)."""

    output_dir: Path
    stage: str
    checkpoint: Path | None = None

    @property
    def run_file(self) -> str:
        """The name of the file in the folder that holds the configuration."""
        return f"{self.stage}.yaml"


def open_run(
    config: TrainConfig,
    stage: str,
    fault: Callable[[Path], str | None] = lambda checkpoint: None,
    check: Callable[[Path], None] = lambda checkpoint: None,
) -> Run:
    """Makes the output folder ready for a new run, or for one that goes on, and locks it.

    The folder holds the configuration as `<stage>.yaml`, which `rlhf <stage> --config` reads. A run
    goes on only under the configuration it was started with, `changed_options` aside, and with the
    metrics.jsonl of its checkpoint. With `resume_from_checkpoint` 'auto' damaged checkpoints are
    skipped, each with a message; so are those in which `fault` finds something. A path may be
    resumed in its own folder or, as a copy, in a new one; from then on it is the folder's newest
    checkpoint. `check` raises UserError for a whole checkpoint from which this run may not go on,
    before anything is changed.
    """
    output_dir, run_file = output_path(config.output_dir), f"{stage}.yaml"
    resume = config.resume_from_checkpoint
    if resume is not None and config.overwrite_output_dir:
        raise UserError(
            "overwrite_output_dir starts anew and resume_from_checkpoint goes on: give one of them"
        )
    if resume is None and config.resume_loosely:
        raise UserError("resume_loosely needs resume_from_checkpoint: auto, or a checkpoint's path")
    written = settings(config)
    changed = []
    given = None if resume in (None, "auto") else Path(resume)
    if given is None:
        goes_on = (
            resume == "auto" and kind_of(output_dir) == stage and _is_begun(output_dir, run_file)
        )
    else:
        damage = checkpoint_damage(given) or fault(given)
        if damage is not None:
            raise UserError(
                f"cannot go on from {given}: {damage}: give a whole checkpoint, or "
                "--resume_from_checkpoint auto, which skips damaged ones"
            )
        changed = changed_options(config, given, run_file)
        check(given)
        # Either the checkpoint or its folder may be a link.
        folders = (Path(os.path.abspath(given)).parent.resolve(), given.resolve().parent)
        goes_on = output_dir.resolve() in folders
    if goes_on:
        _check_is_run(output_dir, stage)

    checkpoint, remedy = None, GO_ON if goes_on else "choose another folder"
    with disk_errors(f"write to output_dir {output_dir}", remedy):
        if goes_on:
            lock_folder(output_dir)
        else:
            claim_output_dir(
                output_dir,
                kind=stage,
                overwrite=config.overwrite_output_dir,
                inputs=local_inputs(asdict(config)),
                go_on="go on with the run in it with --resume_from_checkpoint auto, ",
            )
        if given is not None:
            checkpoint = _adopt(given, output_dir, config.metric_for_best_model)
        elif goes_on:
            checkpoint = _newest_whole_checkpoint(output_dir, fault)
            changed = changed_options(config, checkpoint or output_dir, run_file)
            if checkpoint is not None:
                check(checkpoint)
            say(
                f"no whole checkpoint in {output_dir}: starting from the beginning"
                if checkpoint is None
                else f"going on from {checkpoint}"
            )
        for entry in filter(is_leftover, list(output_dir.iterdir())):
            remove(entry)
        # Once it is there the folder is one to go on in, so the checkpoint came before.
        if checkpoint is None or not (output_dir / run_file).exists():
            write_file(output_dir / run_file, written)
        if checkpoint is not None:
            metrics = checkpoint / METRICS_FILE
            write_file(output_dir / METRICS_FILE, read_file(metrics) if metrics.exists() else b"")
    if checkpoint is not None and changed:
        say(
            f"going on loosely, with {', '.join(changed)}: weights and metrics are not, bit for "
            "bit, those of a run that never stopped"
        )
    return Run(output_dir, stage, checkpoint)


def record_settings(run: Run, config: TrainConfig) -> None:
    """Has the folder's configuration be that with which a run goes on, once it is found that the
    contents of what it names are those of before."""
    with disk_errors(f"write to output_dir {run.output_dir}", GO_ON):
        write_file(run.output_dir / run.run_file, settings(config))


def _is_begun(output_dir: Path, run_file: str) -> bool:
    """Tells whether there is a run to go on with.

    A checkpoint that was copied comes first, and then its configuration and metrics; what is being
    deleted loses its configuration first, and its checkpoints before its metrics.
    """
    if (output_dir / run_file).exists():
        return True
    return bool(_checkpoints(output_dir)) and not (output_dir / METRICS_FILE).exists()


def _check_is_run(output_dir: Path, stage: str) -> None:
    """Raises UserError where a run that goes on would write into what no run has claimed."""
    if kind_of(output_dir) != stage:
        raise UserError(
            f"output_dir {output_dir} is not known as the folder of a run of {stage}: choose "
            f"another folder{unknown_run(output_dir, stage)}"
        )
    for name in ("critic", "tensorboard"):
        if (output_dir / name).is_symlink():
            raise UserError(
                f"{output_dir / name} is a link, and the run would write to what it leads to: put "
                "the folder itself there"
            )


def _adopt(given: Path, output_dir: Path, metric: str | None) -> Path:
    """Makes a whole checkpoint the newest of the folder; returns it there.

    If it is not there under its name it is copied, and with it the best one by `metric`. Those of
    more steps are set aside, so that neither 'auto' nor rotation takes them for its successors.
    """
    manifest = read_manifest(given)
    step, best = manifest.step, manifest.best
    checkpoint = output_dir / f"checkpoint-{step}"
    if best.checkpoint not in (None, checkpoint.name) and best.metric == metric:
        kept = output_dir / best.checkpoint
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
    temporary = saving_name(checkpoint)
    temporary.mkdir()
    for name in (*read_manifest(source).files, MANIFEST):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, temporary / name)
    sync_tree(temporary)
    if os.path.lexists(checkpoint):
        _set_stale(checkpoint)
    os.replace(temporary, checkpoint)
    sync(checkpoint.parent)


def _set_stale(checkpoint: Path) -> None:
    """Renames a checkpoint so that it is none of the run's, in place of an earlier one set aside
    of the same number."""
    stale = checkpoint.with_name(f"stale-{checkpoint.name}")
    if os.path.lexists(stale):
        _discard(_set_aside(stale))
    os.replace(checkpoint, stale)
    sync(stale.parent)
    say(f"{checkpoint} is no longer of this run: it is renamed {stale.name}")


def save_checkpoint(run: Run, step: int, write: Callable[[Path], None], best: Best) -> Path:
    """Saves the state after `step` steps as `checkpoint-<step>` in the run's folder; returns it.

    `write(folder)` fills the folder, to which the run's configuration and its metrics.jsonl are
    added; `best` tells in the manifest which is the best checkpoint so far. If anything fails the
    checkpoints that are there stay as they are.
    """
    checkpoint = run.output_dir / f"checkpoint-{step}"
    temporary, earlier = saving_name(checkpoint), None
    try:
        temporary.mkdir()
        write(temporary)
        for name in (run.run_file, METRICS_FILE):
            if (run.output_dir / name).exists():
                shutil.copyfile(run.output_dir / name, temporary / name)
        write_manifest(temporary, step, best)
        sync_tree(temporary)
        if os.path.lexists(checkpoint):
            earlier = _set_aside(checkpoint)
        os.replace(temporary, checkpoint)
    except BaseException as error:
        if earlier is not None and not os.path.lexists(checkpoint):
            with suppress(OSError):
                os.replace(earlier, checkpoint)
        shutil.rmtree(temporary, ignore_errors=True)
        reason = disk_error(error)
        if reason is None:
            raise
        whole = [old.name for old in _checkpoints(run.output_dir) if checkpoint_damage(old) is None]
        stays = f"{whole[-1]} is whole" if whole else "there is no earlier one"
        raise UserError(f"cannot save {checkpoint.name}: {reason}: {GO_ON} ({stays})") from error
    with disk_errors(f"be sure that {checkpoint.name}, which is whole, is on the disk", GO_ON):
        sync(run.output_dir)
    if earlier is not None:
        _discard(earlier)
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
            _discard(_set_aside(checkpoint))


def _newest_whole_checkpoint(output_dir: Path, fault: Callable[[Path], str | None]) -> Path | None:
    """Raises UserError if there is none and the run is finished."""
    for checkpoint in reversed(_checkpoints(output_dir)):
        damage = checkpoint_damage(checkpoint) or fault(checkpoint)
        if damage is None:
            return checkpoint
        say(f"skipping {checkpoint}: {damage}")
    if (output_dir / "config.json").exists():
        raise UserError(
            f"output_dir {output_dir} holds a finished run, and no whole checkpoint to go on from: "
            "replace it with --overwrite_output_dir, or choose another folder"
        )
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folder's checkpoints, whole or not, in order of their steps."""
    found = [path for path in output_dir.iterdir() if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint that is to be deleted, so that it is never there in part; one that holds
    anything of the user's is renamed so that it stays. Returns it under the new name."""
    aside = deleting_name(checkpoint)
    try:
        if checkpoint.is_dir():
            own_paths(checkpoint, CHECKPOINT)
    except UserError as error:
        aside = checkpoint.with_name(f"kept-{checkpoint.name}-{secrets.token_hex(8)}")
        say(f"{checkpoint} is kept as {aside.name}: {error}")
    os.replace(checkpoint, aside)
    return aside


def _discard(aside: Path) -> None:
    """Deletes a checkpoint that `_set_aside` has renamed, unless it is to stay."""
    if is_leftover(aside):
        with suppress(OSError):
            remove(aside)
