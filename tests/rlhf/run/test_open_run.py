"""Opening of a run's folder: anew, or to go on from a checkpoint."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
import yaml

from rlhf.errors import UserError
from rlhf.run.checkpoints import Run, open_run, rotate_checkpoints
from rlhf.run.folder import MARKER
from rlhf.run.manifest import checkpoint_damage
from tests.rlhf.helpers.checkpoints import WEIGHTS, killed, names, one_line, save, step_of, unlock


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
