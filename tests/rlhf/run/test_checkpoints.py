"""A checkpoint is complete or absent, whatever ends its saving; the oldest go."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.run import checkpoints as module
from rlhf.run import files
from rlhf.run.checkpoints import open_run, rotate_checkpoints
from rlhf.run.manifest import checkpoint_damage
from rlhf.run.state import save_model, save_state
from tests.rlhf.helpers.checkpoints import (
    SMALL,
    WEIGHTS,
    Vocabulary,
    killed,
    names,
    one_line,
    save,
    step_of,
    unlock,
    write_parts,
)

# What a checkpoint holds


def test_a_checkpoint_holds_what_was_written_the_configuration_and_the_metrics(run):
    path = save(run, 3)
    assert path == run.output_dir / "checkpoint-3"
    assert checkpoint_damage(path) is None
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["files"]["critic/model.safetensors"] == {
        "bytes": 6,
        "sha256": hashlib.sha256(b"critic").hexdigest(),
    }
    assert set(manifest["files"]) == {WEIGHTS, f"critic/{WEIGHTS}", "ppo.yaml", "metrics.jsonl"}
    assert (path / "ppo.yaml").read_bytes() == (run.output_dir / "ppo.yaml").read_bytes()
    assert names(run.output_dir) == {"ppo.yaml", "metrics.jsonl", "checkpoint-3"}


@pytest.mark.parametrize("name", [WEIGHTS, f"critic/{WEIGHTS}", "ppo.yaml", "manifest.json"])
def test_every_bit_of_a_checkpoint_is_checked(run, name):
    path = save(run, 1)
    content = (path / name).read_bytes()
    parsed = json.loads(content) if name == "manifest.json" else None
    rng = random.Random(0)
    for position in rng.sample(range(len(content)), min(len(content), 150)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(flipped)
        if checkpoint_damage(path) is None:  # only where the flip changed nothing that is read
            assert parsed is not None and json.loads(flipped) == parsed
    (path / name).write_bytes(content)
    assert checkpoint_damage(path) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "there is no such folder"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: shutil.rmtree(path / "critic"), "critic/model.safetensors is missing"),
        (
            lambda path: os.truncate(path / "model.safetensors", 255),
            "model.safetensors has 255 bytes, it was saved with 256",
        ),
        (
            lambda path: (path / "critic/model.safetensors").write_bytes(b"cricit"),
            "critic/model.safetensors is damaged",
        ),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: os.truncate(path / "manifest.json", 30), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff"), "manifest.json is damaged"),
    ],
)
def test_damage_is_named(run, damage, message):
    path = save(run, 1)
    damage(path)
    assert checkpoint_damage(path).startswith(message)


# Saving


def test_everything_is_on_the_disk_before_the_checkpoint_has_its_name(run, monkeypatch):
    """Synced: every file after its last change, every folder, and the folder they stand in."""
    synced, fsync, replace = set(), os.fsync, os.replace

    def record(descriptor):
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def check(source, target):
        contents = {source, *source.rglob("*")}
        assert contents <= synced, contents - synced
        replace(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", check)
    save(run, 1)
    assert synced == {run.output_dir}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True], ids=["new", "replaced"])
def test_a_kill_anywhere_in_a_save_leaves_whole_checkpoints(make_config, tmp_path, again):
    resumed = make_config(resume_from_checkpoint="auto")
    for call in range(1, 200):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = open_run(make_config(), "ppo")
        save(run, 2)
        if again:
            save(run, 4)
        was_killed = killed(lambda run=run: save(run, 4), call)
        for path in run.output_dir.glob("checkpoint-*"):
            assert checkpoint_damage(path) is None
        run = open_run(resumed, "ppo")
        assert step_of(run) in (2, 4)
        lines = (run.output_dir / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, step_of(run) + 1)]
        assert names(run.output_dir) <= {
            *("ppo.yaml", "metrics.jsonl", "checkpoint-2", "checkpoint-4")
        }
        save(run, 4)
        if not was_killed:
            break
    assert 15 < call < 199


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_anywhere_at_the_start_leaves_a_folder_that_can_be_used(make_config, tmp_path):
    for overwrite in (False, True):
        for call in range(1, 200):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            if overwrite:
                save(open_run(make_config(), "ppo"), 1)
            unlock()
            config = make_config(overwrite_output_dir=overwrite)
            was_killed = killed(lambda config=config: open_run(config, "ppo"), call)
            if (tmp_path / "run" / "ppo.yaml").exists():
                yaml.safe_load((tmp_path / "run" / "ppo.yaml").read_text())["kl_coef"]
            auto = make_config(resume_from_checkpoint="auto")
            if overwrite and names(tmp_path / "run"):
                left = {x for x in names(tmp_path / "run") if not files.is_leftover(Path(x))}
                if left and "ppo.yaml" not in left:
                    with pytest.raises(UserError, match="not empty"):
                        open_run(auto, "ppo")
                assert open_run(config, "ppo").checkpoint is None
            else:
                open_run(auto, "ppo")
            if not was_killed:
                break
        assert 3 < call < 199


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_save_that_fails_leaves_nothing_and_says_what_is_whole(run, monkeypatch, function):
    save(run, 2)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(UserError) as error:
        save(run, 4)
    monkeypatch.undo()
    assert one_line(error) == (
        "cannot save checkpoint-4: No space left on device: free some space or mend the folder, "
        "then go on with --resume_from_checkpoint auto (checkpoint-2 is whole)"
    )
    assert names(run.output_dir) == {"ppo.yaml", "metrics.jsonl", "checkpoint-2"}
    assert checkpoint_damage(run.output_dir / "checkpoint-2") is None


@pytest.mark.parametrize("error", [KeyError("bug"), KeyboardInterrupt()])
def test_what_is_not_the_disk_s_fault_is_raised_as_it_is(run, error):
    def fail(folder):
        write_parts(folder)
        raise error

    with pytest.raises(type(error)):
        save(run, 1, fail)
    assert names(run.output_dir) == {"ppo.yaml", "metrics.jsonl"}


def fill_with_state(folder: Path) -> None:
    save_state(folder / "state.pt", {"moments": torch.zeros(500_000)})


def fill_with_model(folder: Path) -> None:
    save_model(folder, LlamaForCausalLM(LlamaConfig(**SMALL | {"hidden_size": 256})), Vocabulary())


def fill_with_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(100_000)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


FILLS = [fill_with_state, fill_with_model, fill_with_tokenizer]


@pytest.mark.parametrize("fill", FILLS)
def test_a_file_that_cannot_grow_ends_the_save(run, fill):
    """Python, torch, safetensors and tokenizers each report it in a way of their own."""
    save(run, 2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError) as error:
            save(run, 4, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert one_line(error).startswith("cannot save checkpoint-4: File too large: free some space")
    assert names(run.output_dir) == {"ppo.yaml", "metrics.jsonl", "checkpoint-2"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    path = tmp_path / "run"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("fill", FILLS)
def test_a_full_disk_ends_the_save_and_the_run_can_go_on(small_disk, make_config, fill):
    run = open_run(make_config(), "ppo")
    save(run, 2)
    with pytest.raises(UserError) as error:
        save(run, 4, fill)
    assert one_line(error).startswith("cannot save checkpoint-4: No space left on device: ")
    assert one_line(error).endswith("(checkpoint-2 is whole)")
    run = open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    assert step_of(run) == 2
    assert checkpoint_damage(save(run, 4)) is None


def test_a_full_disk_before_the_first_checkpoint(run, monkeypatch):
    with pytest.raises(UserError, match=r"\(there is no earlier one\)$"):
        save(run, 4, lambda folder: Path("/dev/full").write_bytes(b"x"))


def test_a_checkpoint_that_cannot_be_replaced_stays(run, monkeypatch):
    """Not even its own successor's failure to take its name removes it."""
    path, replace = save(run, 4), os.replace

    def fail(source, target):
        if Path(source).name.startswith(".saving-checkpoint-4-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"Input/output error: .* \(checkpoint-4 is whole\)"):
        save(run, 4)
    assert checkpoint_damage(path) is None
    assert names(run.output_dir) == {"ppo.yaml", "metrics.jsonl", "checkpoint-4"}


def test_a_save_that_may_not_be_on_the_disk_says_so(run, monkeypatch):
    sync = module.sync

    def fail(path):
        if path == run.output_dir:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    monkeypatch.setattr(module, "sync", fail)
    with pytest.raises(UserError) as error:
        save(run, 4)
    assert one_line(error).startswith(
        "cannot be sure that checkpoint-4, which is whole, is on the disk: Input/output error: "
    )
    assert checkpoint_damage(run.output_dir / "checkpoint-4") is None


# Rotation


def test_the_oldest_checkpoints_go_first(run):
    for step in (2, 10, 9):
        save(run, step)
    newest = run.output_dir / "checkpoint-10"
    rotate_checkpoints(newest, 0)
    rotate_checkpoints(newest, 3)
    assert len([*run.output_dir.glob("checkpoint-*")]) == 3
    rotate_checkpoints(newest, 2)
    assert {path.name for path in run.output_dir.glob("*point-*")} == {
        *("checkpoint-9", "checkpoint-10")
    }
    rotate_checkpoints(newest, 1)
    assert [path.name for path in run.output_dir.glob("*point-*")] == ["checkpoint-10"]


def test_the_best_checkpoint_stays_and_is_not_counted(run):
    for step in (1, 2, 3, 4):
        save(run, step)
    rotate_checkpoints(run.output_dir / "checkpoint-4", 2, keep=run.output_dir / "checkpoint-1")
    assert {path.name for path in run.output_dir.glob("checkpoint-*")} == {
        *("checkpoint-1", "checkpoint-3", "checkpoint-4")
    }
    rotate_checkpoints(run.output_dir / "checkpoint-4", 1, keep=run.output_dir / "checkpoint-4")
    assert {path.name for path in run.output_dir.glob("checkpoint-*")} == {
        *("checkpoint-3", "checkpoint-4")
    }


def test_a_damaged_checkpoint_of_more_steps_does_not_crowd_out_the_newest(run):
    for step in (4, 6, 5):
        save(run, step)
    rotate_checkpoints(run.output_dir / "checkpoint-5", 1)
    assert {path.name for path in run.output_dir.glob("checkpoint-*")} == {
        *("checkpoint-5", "checkpoint-6")
    }
