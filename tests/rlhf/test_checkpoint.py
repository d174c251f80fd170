"""A checkpoint is complete or absent, and a run goes on only as what it was."""

import copy
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import SFTConfig
from rlhf.errors import UserError
from rlhf.run import checkpoints as module
from rlhf.run import files
from rlhf.run.checkpoints import Run, open_run, rotate_checkpoints, save_checkpoint
from rlhf.run.folder import MARKER
from rlhf.run.generators import random_state, set_random_state
from rlhf.run.manifest import Best, checkpoint_damage, read_manifest
from rlhf.run.state import hash_data, hash_weights, load_state, load_weights, save_model, save_state

WEIGHTS = "model.safetensors"
SMALL = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture
def make_config(tmp_path):
    def make(**changes) -> PPOConfig:
        defaults = {
            "model_name_or_path": "model",
            "dataset_name": "data.jsonl",
            "reward_funcs": ["reward"],
            "output_dir": str(tmp_path / "run"),
        }
        return PPOConfig(**defaults | changes)

    return make


@pytest.fixture
def run(make_config) -> Run:
    run = open_run(make_config(), "ppo")
    (run.output_dir / "metrics.jsonl").write_text("")
    return run


def write_parts(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "critic").mkdir()
    (folder / "critic" / "model.safetensors").write_bytes(b"critic")


def save(run: Run, step: int, write=write_parts, best: int | None = None) -> Path:
    """A checkpoint as a run saves it: with a line of metrics for every step so far."""
    lines = [json.dumps({"step": s}) + "\n" for s in range(1, step + 1)]
    (run.output_dir / "metrics.jsonl").write_text("".join(lines))
    name = None if best is None else f"checkpoint-{best}"
    return save_checkpoint(run, step, write, Best("loss", False, name))


def step_of(run: Run) -> int:
    """Steps that the checkpoint has behind it from which the run goes on."""
    return read_manifest(run.checkpoint).step


def unlock() -> None:
    """As the end of the process does it."""
    while files._locks:
        os.close(files._locks.popitem()[1])


def names(folder: Path) -> set[str]:
    """Without the marker, which every claimed folder holds."""
    return {path.name for path in folder.iterdir()} - {MARKER}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


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


def kill_at(call: int) -> None:
    """From here on, kills this process at its `call`-th change of the file system or fsync; what it
    would write then is written by half."""
    left = [call]

    def watched(function, writes=False):
        def call_or_die(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if writes:
                    path, content = args
                    function(path, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call_or_die

    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    files.create = watched(files.create, writes=True)
    Path.write_text = watched(Path.write_text, writes=True)
    shutil.copyfile = watched(shutil.copyfile)


def killed(action, call: int) -> bool:
    """Whether `action` in a child process came to its `call`-th change, where it was killed."""
    pid = os.fork()
    if pid == 0:
        kill_at(call)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


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


class Vocabulary:
    """A tokenizer for tests that do not tokenize."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


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


# Opening a run


def test_a_new_run_writes_its_configuration(make_config):
    config = make_config(learning_rate=1e-5, stop_strings=["é", "\n"])
    run = open_run(config, "ppo")
    assert run.checkpoint is None
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text(encoding="utf-8"))
    assert stored == asdict(config)
    with pytest.raises(UserError, match=r"not empty: go on .*--resume_from_checkpoint auto"):
        open_run(config, "ppo")
    overwriting = make_config(overwrite_output_dir=True)
    save(run, 1)
    open_run(overwriting, "ppo")
    assert names(run.output_dir) == {"ppo.yaml"}
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text())
    assert not stored["overwrite_output_dir"]


def test_only_a_run_of_the_same_kind_is_overwritten(run, make_config):
    with pytest.raises(UserError, match="it holds a run of ppo, not of sft"):
        open_run(make_config(overwrite_output_dir=True), "sft")
    assert names(run.output_dir) == {"ppo.yaml", "metrics.jsonl"}


def test_a_run_that_is_refused_touches_nothing(run, make_config):
    """It may be running still."""
    leftover = ".saving-checkpoint-2-0123456789abcdef"
    (run.output_dir / leftover).mkdir()
    with pytest.raises(UserError, match="not empty"):
        open_run(make_config(), "ppo")
    with pytest.raises(UserError, match="another configuration"):
        open_run(make_config(resume_from_checkpoint="auto", seed=1), "ppo")
    assert leftover in names(run.output_dir)


def test_auto_begins_a_run_where_there_is_none(make_config, tmp_path):
    config = make_config(resume_from_checkpoint="auto")
    assert open_run(config, "ppo").checkpoint is None
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".saving-{MARKER}-0123456789abcdef").write_text("{")
    assert open_run(config, "ppo").checkpoint is None
    assert names(tmp_path / "run") == {"ppo.yaml"}
    (tmp_path / "run" / "ppo.yaml").rename(tmp_path / "run" / "sft.yaml")
    with pytest.raises(UserError, match="not empty"):
        open_run(config, "ppo")


def test_auto_takes_the_newest_whole_checkpoint_and_names_the_others(run, make_config, capsys):
    for step in (2, 10, 9):
        save(run, step)
    (run.output_dir / "checkpoint-12").mkdir()
    (run.output_dir / "checkpoint-old").mkdir()
    leftovers = {f"{name}-0123456789abcdef" for name in (".saving-checkpoint-14", ".deleting-x")}
    for name in leftovers:
        (run.output_dir / name).mkdir()
    (run.output_dir / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    with (run.output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11}\n{"st')
    run = open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    assert run.checkpoint == run.output_dir / "checkpoint-9"
    assert step_of(run) == 9
    assert capsys.readouterr().out.splitlines() == [
        f"skipping {run.output_dir}/checkpoint-12: manifest.json is missing",
        f"skipping {run.output_dir}/checkpoint-10: {WEIGHTS} has 0 bytes, it was saved with 256",
        f"going on from {run.output_dir}/checkpoint-9",
    ]
    assert not leftovers & names(run.output_dir)
    lines = (run.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 10)]


def test_auto_without_a_whole_checkpoint_starts_from_the_beginning(run, make_config, capsys):
    os.truncate(save(run, 2) / "manifest.json", 0)
    run = open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    assert run.checkpoint is None
    assert "starting from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [False, True])
def test_auto_does_not_begin_a_finished_run_again(run, make_config, damaged):
    (run.output_dir / "config.json").write_text("{}")
    if damaged:
        (save(run, 2) / "model.safetensors").unlink()
    before = names(run.output_dir)
    with pytest.raises(UserError, match=r"a finished run, and no whole .*overwrite") as e:
        open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    one_line(e)
    assert names(run.output_dir) == before


def test_a_path_resumes_in_the_run_s_folder_or_in_a_new_one(run, make_config, tmp_path):
    for step in (2, 4):
        path = save(run, step)
    shutil.copytree(path, tmp_path / "copy")
    path = tmp_path / "copy"
    first = run.output_dir / "checkpoint-2"
    resumed = open_run(make_config(resume_from_checkpoint=str(first)), "ppo")
    assert resumed == Run(run.output_dir, "ppo", first)
    assert (run.output_dir / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'

    new = tmp_path / "new"
    config = make_config(resume_from_checkpoint=str(path), output_dir=str(new))
    resumed = open_run(config, "ppo")
    assert resumed == Run(new, "ppo", new / "checkpoint-4")
    assert names(new) == {"ppo.yaml", "metrics.jsonl", "checkpoint-4"}
    assert checkpoint_damage(new / "checkpoint-4") is None
    assert len((new / "metrics.jsonl").read_text().splitlines()) == 4
    with pytest.raises(UserError, match="not empty"):
        open_run(config, "ppo")


def test_later_checkpoints_are_set_aside_when_an_earlier_one_is_resumed(run, make_config, capsys):
    """'auto' goes on from what the earlier one has led to."""
    for step in (2, 4, 6):
        save(run, step)
    out = run.output_dir
    (out / "stale-checkpoint-6").mkdir()
    config = make_config(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert open_run(config, "ppo").checkpoint == out / "checkpoint-2"
    kept = {"ppo.yaml", "metrics.jsonl", "checkpoint-2"}
    assert names(out) == kept | {"stale-checkpoint-4", "stale-checkpoint-6"}
    assert checkpoint_damage(out / "stale-checkpoint-6") is None
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/checkpoint-{step} is no longer of this run: it is renamed stale-checkpoint-{step}"
        for step in (6, 4)
    ]
    auto = make_config(resume_from_checkpoint="auto")
    assert open_run(auto, "ppo").checkpoint == out / "checkpoint-2"
    rotate_checkpoints(save(run, 3), 1)
    assert names(out) >= {"checkpoint-3", "stale-checkpoint-4", "stale-checkpoint-6"}
    # And back.
    save(run, 4)
    back = make_config(resume_from_checkpoint=str(out / "stale-checkpoint-4"))
    assert open_run(back, "ppo").checkpoint == out / "checkpoint-4"
    assert open_run(auto, "ppo").checkpoint == out / "checkpoint-4"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_in_a_new_folder_takes_the_best_checkpoint_along(run, make_config, tmp_path, capsys):
    for step in (2, 4, 6):
        path = save(run, step, best=2)
    changes = {"resume_from_checkpoint": str(path)}
    for metric, found in (
        ("loss", {"checkpoint-2", "checkpoint-6"}),
        ("entropy", {"checkpoint-6"}),
        (None, {"checkpoint-6"}),
    ):
        config = make_config(
            output_dir=str(tmp_path / str(metric)), metric_for_best_model=metric, **changes
        )
        new = open_run(config, "ppo").output_dir
        assert names(new) == {"ppo.yaml", "metrics.jsonl"} | found
        for name in found:
            assert checkpoint_damage(new / name) is None
    (run.output_dir / "checkpoint-2" / "model.safetensors").unlink()
    capsys.readouterr()
    config = make_config(output_dir=str(tmp_path / "new"), metric_for_best_model="loss", **changes)
    assert open_run(config, "ppo").checkpoint == tmp_path / "new" / "checkpoint-6"
    assert "checkpoint-2, cannot be kept: model.safetensors is missing" in capsys.readouterr().out


def test_a_link_to_a_checkpoint_is_the_run_s_own(run, make_config, tmp_path):
    path, latest = save(run, 2), tmp_path / "latest"
    latest.symlink_to(path)
    config = make_config(resume_from_checkpoint=str(latest))
    assert open_run(config, "ppo").checkpoint == path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    config = make_config(resume_from_checkpoint=str(path))
    assert open_run(config, "ppo").checkpoint == path
    assert path.is_symlink()
    (tmp_path / "link").symlink_to(run.output_dir)
    config = make_config(output_dir=str(tmp_path / "link"), resume_from_checkpoint=str(path))
    assert open_run(config, "ppo").checkpoint == tmp_path / "link" / "checkpoint-2"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_anywhere_while_a_checkpoint_is_taken_over(run, make_config, tmp_path):
    """The new folder can be used again; a run never starts anew in it unasked."""
    path, out = save(run, 2), tmp_path / "new"
    config = make_config(output_dir=str(out), resume_from_checkpoint=str(path))
    for call in range(1, 200):
        shutil.rmtree(out, ignore_errors=True)
        was_killed = killed(lambda: open_run(config, "ppo"), call)
        if out.exists() and "checkpoint-2" in names(out):
            auto = make_config(output_dir=str(out), resume_from_checkpoint="auto")
            assert step_of(open_run(auto, "ppo")) == 2
        else:
            assert step_of(open_run(config, "ppo")) == 2
        unlock()
        if not was_killed:
            break
    assert 10 < call < 199


# One run in a folder


IN_ANOTHER_PROCESS = """
import sys
from rlhf.run.checkpoints import open_run
from rlhf.config.ppo import PPOConfig

config = PPOConfig(
    model_name_or_path="model",
    dataset_name="data.jsonl",
    reward_funcs=["reward"],
    output_dir=sys.argv[1],
    resume_from_checkpoint="auto",
)
open_run(config, "ppo")
print("open", flush=True)
sys.stdin.read()
"""


def unread(path: Path) -> tuple[int, ...]:
    """What changes of a file when it is written, though not when it is read."""
    stat = path.stat()
    return stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def test_two_processes_cannot_run_in_one_folder(make_config, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    (out / ".saving-checkpoint-2-0123456789abcdef").mkdir()
    before = {path: unread(path) for path in out.iterdir()}
    for changes in ({}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}):
        with pytest.raises(UserError, match=r"is in use by another run.*: wait until") as error:
            open_run(make_config(**changes), "ppo")
        one_line(error)
    assert {path: unread(path) for path in out.iterdir()} == before
    process.communicate()
    assert open_run(make_config(resume_from_checkpoint="auto"), "ppo").output_dir == out


def test_a_process_may_open_its_run_again(make_config):
    for changes in ({}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}):
        open_run(make_config(**changes), "ppo")
    assert len(files._locks) == len(set(files._locks.values()))


def test_a_folder_that_cannot_be_locked_is_used_without(make_config, monkeypatch):
    def fail(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(files.fcntl, "flock", fail)
    open_run(make_config(), "ppo")


def test_a_damaged_checkpoint_is_refused_by_name(run, make_config, tmp_path):
    path = save(run, 2)
    (path / "model.safetensors").unlink()
    for config in (
        make_config(resume_from_checkpoint=str(path)),
        make_config(resume_from_checkpoint=str(path), output_dir=str(tmp_path / "new")),
    ):
        with pytest.raises(UserError) as error:
            open_run(config, "ppo")
        assert one_line(error) == (
            f"cannot go on from {path}: model.safetensors is missing: give a whole checkpoint, or "
            "--resume_from_checkpoint auto, which skips damaged ones"
        )
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="there is no such folder"):
        open_run(make_config(resume_from_checkpoint="nowhere"), "ppo")


def test_a_checkpoint_of_another_configuration_is_refused(run, make_config, tmp_path):
    path = save(run, 2)
    for changes, folder in (
        ({"resume_from_checkpoint": "auto"}, path),
        ({"resume_from_checkpoint": str(path)}, path),
        ({"resume_from_checkpoint": str(path), "output_dir": str(tmp_path / "new")}, path),
    ):
        with pytest.raises(UserError) as error:
            open_run(make_config(**changes, kl_coef=0.2, seed=1), "ppo")
        assert one_line(error) == (
            f"{folder} belongs to another configuration: seed is 0 there and 1 here (also: "
            "kl_coef): give the same values, or start anew in another output_dir"
        )
    with pytest.raises(UserError, match=r"kl_coef is 0\.05 there and 0\.2 here: give"):
        open_run(make_config(resume_from_checkpoint="auto", kl_coef=0.2), "ppo")


def test_options_that_change_no_number_may_change(run, make_config):
    path = save(run, 2)
    config = make_config(
        resume_from_checkpoint="auto",
        save_steps=7,
        save_total_limit=9,
        report_to="none",
        metric_for_best_model="loss",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    assert open_run(config, "ppo").checkpoint == path


def test_options_that_this_version_added_count_as_their_default(run, make_config):
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text())
    del stored["kl_coef"], stored["cliprange_high"]  # the latter's default is cliprange's value
    (run.output_dir / "ppo.yaml").write_text(yaml.safe_dump(stored))
    save(run, 2)
    assert step_of(open_run(make_config(resume_from_checkpoint="auto"), "ppo")) == 2
    with pytest.raises(UserError, match=r"cliprange_high is 0\.2 there and 0.3 here"):
        open_run(make_config(resume_from_checkpoint="auto", cliprange_high=0.3), "ppo")
    (run.output_dir / "ppo.yaml").write_text(yaml.safe_dump(stored | {"magic": 2}))
    save(run, 3)
    another = "written by another version, which had the option magic: go on with that version"
    with pytest.raises(UserError, match=another):
        open_run(make_config(resume_from_checkpoint="auto"), "ppo")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rlhf.tasks.reviews:gold", "rlhf.demo.reviews:gold"),
        ("rlhf.recipes.sentiment:me/it", "examples/imdb/sentiment.py:me/it"),
    ],
)
def test_a_run_goes_on_whose_reward_function_has_moved(run, make_config, old, new):
    """Under the name that stands in its configuration, and under the new one."""
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text())
    (run.output_dir / "ppo.yaml").write_text(yaml.safe_dump(stored | {"reward_funcs": [old]}))
    save(run, 2)
    for name in (old, new, new.replace("examples/imdb", "elsewhere")):
        config = make_config(resume_from_checkpoint="auto", reward_funcs=[name])
        assert step_of(open_run(config, "ppo")) == 2
    assert make_config(reward_funcs=[old]).reward_funcs == [new]
    with pytest.raises(UserError, match="belongs to another configuration: reward_funcs is"):
        open_run(make_config(resume_from_checkpoint="auto", reward_funcs=["mine:gold"]), "ppo")


@pytest.mark.parametrize(
    "text", ["é", "\x85", "\ud800", "\x00", "\u2028", "🙂", "no", "1e3", "null", "~", "", "a: b #c"]
)
def test_every_text_comes_back_from_the_configuration(make_config, text):
    # Not a path, of which some are expanded or refused.
    changes = {"metric_for_best_model": text}
    run = open_run(make_config(**changes), "ppo")
    assert (
        save(run, 1)
        == open_run(make_config(**changes, resume_from_checkpoint="auto"), "ppo").checkpoint
    )
    stored = yaml.safe_load((run.output_dir / "ppo.yaml").read_text())
    assert stored["metric_for_best_model"] == text


def test_a_path_object_is_as_good_as_its_text(make_config, tmp_path):
    config = make_config(
        output_dir=tmp_path / "run", dataset_name=Path("data.jsonl"), reward_funcs=[Path("reward")]
    )
    assert config == make_config()
    open_run(config, "ppo")


def test_options_that_cannot_be_written_touch_nothing(make_config, tmp_path):
    with pytest.raises(UserError, match="cannot be written as YAML") as error:
        open_run(make_config(dataset_name=object()), "ppo")
    one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "a: [", "3", "seed: 1"])
def test_a_configuration_that_cannot_be_read(run, make_config, content):
    (run.output_dir / "ppo.yaml").write_text(content)
    with pytest.raises(UserError, match="cannot read the configuration") as error:
        open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    one_line(error)


def test_a_checkpoint_of_another_stage_is_refused(run, tmp_path):
    path = save(run, 2)
    config = SFTConfig(
        model_name_or_path="model",
        dataset_name="data.jsonl",
        output_dir=str(tmp_path / "sft"),
        resume_from_checkpoint=str(path),
    )
    with pytest.raises(UserError, match=r"holds no sft\.yaml.*`rlhf sft`") as error:
        open_run(config, "sft")
    one_line(error)


def test_to_overwrite_and_to_go_on_are_two_things(make_config):
    config = make_config(resume_from_checkpoint="auto", overwrite_output_dir=True)
    with pytest.raises(UserError, match="give one of them"):
        open_run(config, "ppo")


# State


def draw() -> list[float]:
    numbers = [random.gauss(0, 1), np.random.normal(), torch.randn(()).item()]
    if torch.cuda.is_available():
        numbers.append(torch.randn((), device="cuda").item())
    return numbers


def test_random_generators_go_on_where_they_were(tmp_path):
    # gauss and normal make numbers in pairs; the second of a pair is state as well.
    for generate in (random.seed, np.random.seed, torch.manual_seed):
        generate(0)
    draw()
    save_state(tmp_path / "random.pt", random_state())
    expected = [draw() for _ in range(700)]  # beyond one block of the Mersenne twister
    for generate in (random.seed, np.random.seed, torch.manual_seed):
        generate(1)
    assert draw() != expected[0]
    set_random_state(load_state(tmp_path / "random.pt"))
    assert [draw() for _ in range(700)] == expected


def test_optimizer_and_scheduler_state_come_back_bitwise(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return model, optimizer, scheduler

    def step(model, optimizer, scheduler):
        model(torch.ones(3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    unbroken = make()
    step(*unbroken)
    state = [part.state_dict() for part in unbroken]
    save_state(tmp_path / "state.pt", {"parts": state})
    resumed = make()
    for part, values in zip(resumed, load_state(tmp_path / "state.pt")["parts"], strict=True):
        part.load_state_dict(values)
    for parts in (unbroken, resumed):
        step(*parts)
    for old, new in zip(unbroken[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(old, new)


def test_state_that_could_run_code_is_not_loaded(tmp_path):
    torch.save({"config": Path("x")}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="weights_only"):
        load_state(tmp_path / "state.pt")


def test_the_hash_of_data_sees_every_row():
    rows = [[1, 2], "film", {"answer": [1.5, None]}]
    assert hash_data(rows) == hash_data(iter(rows))
    for other in (
        [[1, 3], *rows[1:]],
        [[1], [2], *rows[1:]],
        rows[::-1],
        rows[:2],
        [*rows[:2], {"answer": [1.5, 0]}],
    ):
        assert hash_data(other) != hash_data(rows)
    first, second = ([{"image": {1, 2}, "object": object()}] for _ in range(2))
    assert hash_data(first) == hash_data(second)  # though at another address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_hash_of_weights_sees_every_bit(dtype):
    models = [torch.nn.Linear(3, 2).to(dtype), torch.nn.BatchNorm1d(2)]
    before = hash_weights(models)
    assert hash_weights(copy.deepcopy(models)) == before
    assert hash_weights(models[::-1]) != before
    weight = models[0].weight.data
    bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for bit in range(8 * dtype.itemsize - 1):
        bits[1, 2] ^= 1 << bit
        assert hash_weights(models) != before
        bits[1, 2] ^= 1 << bit
    assert hash_weights(models) == before
    models[1].running_mean += 1
    assert hash_weights(models) != before


def test_the_hash_of_weights_sees_complex_buffers():
    """Some models keep rotary frequencies so."""
    model = torch.nn.Module()
    model.register_buffer("frequencies", torch.randn(4, dtype=torch.complex128))
    before = hash_weights([model])
    model.frequencies[2] += 1e-6j
    assert hash_weights([model]) != before


# Models


def make_model(kind: str):
    torch.manual_seed(0)
    if kind == "tied":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16)
        )
    if kind == "experts":  # saved under other names and in other shapes than they have in memory
        config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
        return MixtralForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def scramble(model) -> dict[str, torch.Tensor]:
    """Other weights; the copy of the ones before."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return before


def equal(model, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in found)


@pytest.mark.parametrize("shards", ["50GB", "2KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("kind", ["untied", "tied", "experts"])
def test_weights_are_loaded_bitwise_into_the_same_tensors(tmp_path, kind, shards):
    model = make_model(kind)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shards == "2KB")
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    saved = scramble(model)
    assert not equal(model, saved)
    load_weights(model, tmp_path)
    assert equal(model, saved)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    if kind == "tied":
        assert model.lm_head.weight is model.transformer.wte.weight


def test_loading_weights_draws_no_random_numbers(tmp_path):
    model = make_model("untied")
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    load_weights(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "lm_head|model.layers.2.* which the model lacks and 8 more"),
        ({"num_hidden_layers": 1}, "they hold no model.layers.1"),
        ({"vocab_size": 12}, r"shape \(12, 8\), where the model's is \(11, 8\) and 1 more"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, changes, message):
    LlamaForCausalLM(LlamaConfig(**SMALL | changes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_weights(make_model("untied"), tmp_path)
    one_line(error)


def test_weights_that_cannot_be_read(tmp_path):
    model = make_model("untied")
    model.save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(UserError, match="cannot load the weights") as error:
        load_weights(model, tmp_path)
    one_line(error)


class Sharded:
    """A model that is saved in shards."""

    def __init__(self, model):
        self.model = model

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder, max_shard_size="2KB")


def test_a_model_is_saved_over_an_earlier_one(tmp_path):
    """In shards over one file, and back: no weights of the earlier one are read, and those of
    others stay."""
    model = make_model("untied")
    others = [tmp_path / f"{name}_model.safetensors" for name in ("adapter", "reward")]
    others.append(tmp_path / "model-best.safetensors")
    for other in others:
        other.write_text(other.name)
    for wrapped in (model, Sharded(model), model, Sharded(model)):
        scramble(model)
        save_model(tmp_path, wrapped, Vocabulary())
        assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), model.state_dict())
        assert ("model.safetensors" in names(tmp_path)) == (wrapped is model)
        assert not any(map(files.is_leftover, tmp_path.iterdir()))
    assert [other.read_text() for other in others] == [other.name for other in others]


class Copied:
    """A model whose files are copied from a folder: no threads in a forked process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save_pretrained(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_while_a_model_is_saved_leaves_one_model_or_none(tmp_path):
    """The earlier model, the new one, or a folder that is not opened; never a mixture."""
    model, seen = make_model("untied"), set()
    model.save_pretrained(tmp_path / "new", max_shard_size="5KB")
    after = scramble(model)
    model.save_pretrained(tmp_path / "earlier")
    before = scramble(model)
    for call in range(1, 300):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "earlier", out)
        new = Copied(tmp_path / "new")
        was_killed = killed(lambda out=out, new=new: save_model(out, new, Vocabulary()), call)
        if (out / "config.json").exists():
            found = AutoModelForCausalLM.from_pretrained(out)
            seen.add("before" if equal(found, before) else "after")
            assert equal(found, before) or equal(found, after)
        else:
            seen.add("none")
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(out)
        if not was_killed:
            break
    assert 20 < call < 299
    assert seen == {"before", "none", "after"}


def test_a_model_that_cannot_be_saved_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = make_model("untied")
    save_model(tmp_path, model, Vocabulary())

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = scramble(model)
    with pytest.raises(UserError) as error:
        save_model(tmp_path, model, Broken())
    assert one_line(error).startswith(f"cannot save the model in {tmp_path}: No space left on dev")
    assert not any(map(files.is_leftover, tmp_path.iterdir()))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), before)


def test_a_folder_that_cannot_be_made(tmp_path, make_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to output_dir .* Not a directory: choose"):
        open_run(make_config(output_dir=str(tmp_path / "file" / "run")), "ppo")
    with pytest.raises(UserError, match="is a file"):
        open_run(make_config(output_dir=str(tmp_path / "file")), "ppo")
    with pytest.raises(UserError, match=r"cannot write to output_dir .* too long: choose"):
        open_run(make_config(output_dir=str(tmp_path / ("a" * 300))), "ppo")
    with pytest.raises(UserError, match="it cannot be read: File name too long: give a whole"):
        open_run(make_config(resume_from_checkpoint="a" * 300), "ppo")


def test_a_full_disk_names_the_remedy(run, make_config, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = save(run, 2)
    monkeypatch.setattr(module, "write_file", full)
    start = "cannot write to output_dir .*: No space left on device: "
    with pytest.raises(UserError, match=f"{start}free some space .* go on with --resume"):
        open_run(make_config(resume_from_checkpoint="auto"), "ppo")
    new = str(tmp_path / "new")
    with pytest.raises(UserError, match=f"{start}choose another folder"):
        open_run(make_config(output_dir=new), "ppo")
    with pytest.raises(UserError, match=f"{start}choose another folder"):
        open_run(make_config(output_dir=new + "er", resume_from_checkpoint=str(path)), "ppo")
