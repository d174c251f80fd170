"""What is read from a run's folder is taken on no trust: odd checkpoints are skipped, or told in
one line, however well they are hashed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rlhf.config.training import SFTConfig
from rlhf.errors import UserError
from rlhf.report.page import write_report
from rlhf.run import manifest as module
from rlhf.run.checkpoints import open_run
from rlhf.run.manifest import checkpoint_damage, metrics_line
from rlhf.run.metrics import read_metrics, write_csv
from rlhf.sft import train_sft
from tests.rlhf.helpers.checkpoints import save, write_parts

BEST = {"metric": "loss", "greater_is_better": False, "checkpoint": None, "value": None}
DEEP = "[" * 100_000


def start(tmp_path: Path, **changes):
    config = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": str(tmp_path / "run")}
    return open_run(SFTConfig(**config | changes), "sft")


def write_manifest(checkpoint: Path, **changes) -> None:
    """With other values, and the right hash; None leaves a value out."""
    values = json.loads((checkpoint / "manifest.json").read_text())
    del values["sha256"]
    values = {name: x for name, x in (values | changes).items() if x is not None}
    values["sha256"] = module._hash(values)
    (checkpoint / "manifest.json").write_text(json.dumps(values))


def rehash(checkpoint: Path) -> None:
    """Makes a checkpoint that was tampered with whole again."""
    old = module.read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    module.write_manifest(checkpoint, old.step, old.best)


@pytest.fixture
def odd(tmp_path) -> Path:
    """The newer of two checkpoints, to be made odd."""
    run = start(tmp_path)
    save(run, 2)
    return save(run, 4)


def is_skipped(odd: Path, tmp_path: Path, capsys) -> str:
    """Has 'auto' go on from the older checkpoint; returns what it says of the newer one, which is
    also why its path is refused."""
    damage = checkpoint_damage(odd)
    assert damage is not None and "\n" not in damage
    assert start(tmp_path, resume_from_checkpoint="auto").checkpoint.name == "checkpoint-2"
    assert f"skipping {odd}: {damage}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot go on from") as error:
        start(tmp_path, resume_from_checkpoint=str(odd))
    assert damage in str(error.value)
    return damage


FILE = {"bytes": 6, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        *(({"step": x}, "step must be") for x in ("9/../../victim", "4", 4.0, True, -4, [4])),
        ({"step": None}, "it must hold step, best and files"),
        ({"step": 5}, "manifest.json is of another checkpoint, of step 5"),
        ({"more": 1}, "it must hold step, best and files"),
        *(
            ({"best": BEST | {"checkpoint": x}}, "best.checkpoint must be")
            for x in ("../victim2", "checkpoint-2/", "checkpoint-٣", "checkpoint-02", "a", 3)
        ),
        ({"best": {"metric": "loss"}}, "best must hold"),
        ({"best": []}, "best must hold"),
        ({"best": BEST | {"metric": 1}}, "best.metric must be a str"),
        ({"best": BEST | {"greater_is_better": 1}}, "best.greater_is_better must be a bool"),
        *(
            ({"best": BEST | {"value": x}}, "best.value must be a number")
            for x in ("1", True, float("nan"), float("inf"), 10**400)
        ),
        ({"files": {}}, "files must name the files"),
        ({"files": []}, "files must name the files"),
        *(
            ({"files": {x: FILE}}, "it names a file outside the folder")
            for x in ("../secret", "/etc/hostname", "a/../../b", "", ".", "a//b", "./a", "a/")
        ),
        *(
            ({"files": {x: FILE}}, "it names a file outside the folder")
            for x in ("a\0b", "a\nb", "..\\a", "\ud800")
        ),
        ({"files": {"a": None}}, "'a' must have bytes and sha256"),
        ({"files": {"a": {"bytes": "6", "sha256": ""}}}, "'a' must have bytes and sha256"),
        ({"files": {"a": FILE | {"x": 1}}}, "'a' must have bytes and sha256"),
    ],
)
def test_a_well_hashed_manifest_must_be_one_that_a_run_writes(odd, changes, fault):
    write_manifest(odd, **changes)
    assert fault in checkpoint_damage(odd)
    assert "\n" not in checkpoint_damage(odd)


def test_auto_skips_a_manifest_that_leads_outside(odd, tmp_path, capsys):
    victim = tmp_path / "victim"
    shutil.copytree(odd, victim)
    write_manifest(odd, step="9/../../victim", best=BEST | {"checkpoint": "../victim"})
    assert "step must be a number of steps" in is_skipped(odd, tmp_path, capsys)
    assert victim.exists()


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 50_000, "9" * 5000, "{}", "null", "\x00"])
def test_auto_skips_what_is_no_manifest(odd, tmp_path, capsys, content):
    (odd / "manifest.json").write_text(content)
    assert is_skipped(odd, tmp_path, capsys) == "manifest.json is damaged"


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "metrics.jsonl"])
def test_auto_waits_for_no_pipe(odd, tmp_path, capsys, name):
    (odd / name).unlink()
    os.mkfifo(odd / name)
    is_skipped(odd, tmp_path, capsys)


def test_auto_reads_no_device(odd, tmp_path, capsys):
    (odd / "model.safetensors").unlink()
    (odd / "model.safetensors").symlink_to("/dev/zero")
    assert is_skipped(odd, tmp_path, capsys) == "model.safetensors is missing"


@pytest.mark.parametrize("name", ["model.safetensors", "critic"])
def test_auto_follows_no_link_out_of_the_checkpoint(odd, tmp_path, capsys, name):
    shutil.move(odd / name, tmp_path / "elsewhere")
    (odd / name).symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads outside the folder" in is_skipped(odd, tmp_path, capsys)


@pytest.mark.parametrize("target", ["nowhere", "checkpoint-4"])
def test_auto_skips_a_checkpoint_that_is_a_link_to_nothing(odd, tmp_path, capsys, target):
    """Or to itself; a run that comes to its step puts its own there."""
    shutil.rmtree(odd)
    odd.symlink_to(target)
    assert is_skipped(odd, tmp_path, capsys) == "there is no such folder"
    run = start(tmp_path, resume_from_checkpoint="auto")
    assert checkpoint_damage(save(run, 4)) is None


def test_auto_skips_a_checkpoint_that_is_a_file(odd, tmp_path, capsys):
    shutil.rmtree(odd)
    odd.write_text("")
    is_skipped(odd, tmp_path, capsys)


@pytest.mark.parametrize(
    "line", [DEEP, "3", "{}", '{"step": "1"}', '{"step": 1, "loss": "x"}', '{"step": 1, "a": {}}']
)
def test_auto_skips_metrics_that_are_none(odd, tmp_path, capsys, line):
    with (odd / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    rehash(odd)
    assert is_skipped(odd, tmp_path, capsys) == "metrics.jsonl has no metrics in line 5"


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    lines = ['{"step": 1, "loss": 0.5}', DEEP, "x", '{"loss": 1}', '{"step": 2, "loss": null}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3']))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    write_csv(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,\n"


def test_a_line_of_metrics_holds_numbers():
    assert metrics_line(b'{"step": 3, "loss": 1e-3, "kl": null}') == {
        **{"step": 3, "loss": 1e-3, "kl": None}
    }
    for line in (b'{"step": true}', b'{"step": 1, "a": NaN}', b'{"step": 1, "a": %d}' % 10**400):
        assert metrics_line(line) is None


BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(3))


@pytest.mark.parametrize(
    "content", [DEEP, "a: [", "3", "seed: {a: 1}", "seed: 2024-01-01", "dataset_name: [[x]]", BOMB]
)
def test_an_odd_configuration_is_told_in_one_line(tmp_path, content):
    run = start(tmp_path)
    (run.output_dir / "sft.yaml").write_text(content)
    with pytest.raises(UserError, match="cannot read the configuration") as error:
        start(tmp_path, resume_from_checkpoint="auto")
    assert "\n" not in str(error.value)
    os.unlink(run.output_dir / "sft.yaml")
    os.mkfifo(run.output_dir / "sft.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        start(tmp_path, resume_from_checkpoint="auto")


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "summary.json"])
def test_a_report_waits_for_no_pipe(tmp_path, name):
    run = start(tmp_path)
    shutil.copyfile(run.output_dir / "sft.yaml", run.output_dir / "ppo.yaml")
    os.mkfifo(run.output_dir / name)
    with pytest.raises(OSError, match="not a regular file"):
        write_report(run.output_dir)


# State


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> SFTConfig:
    """The configuration of a run with checkpoints of steps 1 and 2."""
    config = SFTConfig(
        model_name_or_path=str(world / "gpt2"),
        dataset_name=str(world / "texts.jsonl"),
        output_dir=str(tmp_path_factory.mktemp("trained") / "run"),
        max_steps=2,
        save_steps=1,
        report_to="none",
    )
    train_sft(config)
    return config


def resume(config: SFTConfig, output_dir: Path) -> None:
    changes = {"output_dir": str(output_dir), "resume_from_checkpoint": "auto"}
    train_sft(SFTConfig(**vars(config) | changes))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda state: [], "state.pt holds no state"),
        (lambda state: {**state, "random": {}}, "state.pt has no random as this version saves it"),
        (lambda state: {**state, "unlogged": None}, "state.pt has no unlogged"),
        (
            lambda state: {k: v for k, v in state.items() if k != "batches"},
            "state.pt has no batches",
        ),
        (None, "state.pt cannot be read"),
    ],
)
def test_auto_skips_a_state_that_is_none(trained, tmp_path, capsys, state, message):
    shutil.copytree(trained.output_dir, tmp_path / "run")
    odd = tmp_path / "run" / "checkpoint-2"
    if state is None:
        (odd / "state.pt").write_bytes(b"PK\x03\x04")
    else:
        torch.save(state(torch.load(odd / "state.pt", weights_only=True)), odd / "state.pt")
    rehash(odd)
    resume(trained, tmp_path / "run")
    out = capsys.readouterr().out
    assert f"skipping {odd}: {message}" in out and "going on from" in out


def test_auto_skips_a_checkpoint_whose_state_is_not_in_its_manifest(trained, tmp_path, capsys):
    """A pipe in its place is not read either."""
    shutil.copytree(trained.output_dir, tmp_path / "run")
    odd = tmp_path / "run" / "checkpoint-2"
    (odd / "state.pt").unlink()
    rehash(odd)
    os.mkfifo(odd / "state.pt")
    resume(trained, tmp_path / "run")
    assert f"skipping {odd}: state.pt is missing" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "batches"])
def test_a_state_that_fits_nothing_is_told_in_one_line(trained, tmp_path, part):
    shutil.copytree(trained.output_dir, tmp_path / "run")
    odd = tmp_path / "run" / "checkpoint-2"
    state = torch.load(odd / "state.pt", weights_only=True)
    torch.save(state | {part: {"x": 1}}, odd / "state.pt")
    rehash(odd)
    with pytest.raises(UserError, match=r"state\.pt is not of this run \(KeyError") as error:
        resume(trained, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_configuration_of_a_run_is_plain(tmp_path):
    """So that what is refused above is never what a run wrote."""
    run = start(tmp_path, dataset_name="d: [x]")
    values = yaml.safe_load((run.output_dir / "sft.yaml").read_text())
    assert all(isinstance(value, str | int | float | None) for value in values.values())
    write_parts(tmp_path)
