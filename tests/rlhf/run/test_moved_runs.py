"""A moved project goes on, bit for bit; and with `resume_loosely` a run goes on under other batch
sizes or for longer, and keeps everything but that promise."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rlhf import distributed
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig, TrainConfig
from rlhf.data.batches import Batches
from rlhf.errors import UserError
from rlhf.optim import make_optimizer, resume_schedule
from rlhf.ppo.train import train_ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward_model import train_reward
from rlhf.run.state import load_state
from rlhf.sft import train_sft
from rlhf.supervised import SupervisedTrainer
from tests.rlhf.helpers.checkpoints import unlock
from tests.rlhf.helpers.rows import take
from tests.rlhf.helpers.stages import REWARD, Stage, records, weights

LOOSELY = {"resume_from_checkpoint": "auto", "resume_loosely": True}


@pytest.fixture
def project(world, tmp_path) -> Path:
    """A folder with the models, the data and the reward of a run."""
    path = tmp_path / "project"
    path.mkdir()
    for name in ("gpt2", "llama", "llama-reward"):
        shutil.copytree(world / name, path / name)
    for name in ("texts.jsonl", "pairs.jsonl", "prompts.jsonl"):
        shutil.copyfile(world / name, path / name)
    (path / "reward.py").write_text(REWARD)
    return path


def names(project: Path, stage: str) -> dict[str, object]:
    """The options that name something in the project."""
    data = {"sft": "texts", "reward": "pairs", "ppo": "prompts"}[stage]
    values = dict.fromkeys(("dataset_name", "eval_dataset_name"), str(project / f"{data}.jsonl"))
    values["model_name_or_path"] = str(project / ("llama" if stage == "ppo" else "gpt2"))
    if stage == "ppo":
        rewards = [str(project / "llama-reward"), f"{project / 'reward.py'}:noise"]
        values |= {"reward_funcs": rewards, "critic_model_path": rewards[0]}
    return values


def make_stage(project: Path, name: str) -> Stage:
    common = {
        **names(project, name),
        "output_dir": "",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.25,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
    }
    if name == "ppo":
        config = PPOConfig(**common, total_episodes=32, num_ppo_epochs=1, response_length=4)
        return Stage(train_ppo, config, (PPOTrainer, "update"))
    train, kind = (train_sft, SFTConfig) if name == "sft" else (train_reward, RewardConfig)
    return Stage(train, kind(**common, max_steps=4), (SupervisedTrainer, "take_step"))


@pytest.fixture(params=["sft", "reward", "ppo"])
def stage(request, project) -> Stage:
    return make_stage(project, request.param)


@pytest.fixture
def sft(project) -> Stage:
    return make_stage(project, "sft")


@pytest.fixture
def ppo(project) -> Stage:
    return make_stage(project, "ppo")


# Moved


def test_a_moved_project_goes_on_bitwise(stage, project, tmp_path):
    """Its folder has another name, and so have the run's, the models and the data."""
    stage.run(tmp_path / "unbroken")
    stage.run_until(3, project / "run")
    moved = project.rename(tmp_path / "moved")
    unlock()
    name = stage.train.__name__.removeprefix("train_")
    changes = names(moved, name)
    stage.run(moved / "run", **changes, resume_from_checkpoint="auto")
    assert records(moved / "run") == records(tmp_path / "unbroken")
    assert weights(moved / "run") == weights(tmp_path / "unbroken")
    stored = yaml.safe_load((moved / "run" / f"{name}.yaml").read_text())
    assert stored["dataset_name"] == changes["dataset_name"]


def test_other_contents_under_another_name_are_refused(sft, project, tmp_path):
    sft.run_until(2, tmp_path / "run")
    rows = (project / "texts.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(reversed(rows)))
    with pytest.raises(UserError, match=r"^dataset_name .*other\.jsonl holds something else than"):
        sft.run(tmp_path / "run", dataset_name=str(tmp_path / "other.jsonl"), **LOOSELY)


def test_another_kind_of_model_is_refused(sft, project, tmp_path):
    """Though its weights, which the checkpoint has, would fit."""
    sft.run_until(2, tmp_path / "run")
    config = json.loads((project / "gpt2" / "config.json").read_text())
    shutil.copytree(project / "gpt2", tmp_path / "same")
    (tmp_path / "same" / "config.json").write_text(json.dumps(config | {"_name_or_path": "x"}))
    (project / "gpt2" / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.5}))
    with pytest.raises(UserError, match=r"^model_name_or_path .*gpt2 holds something else than"):
        sft.run(tmp_path / "run", resume_from_checkpoint="auto")
    same = {"model_name_or_path": str(tmp_path / "same")}
    sft.run(tmp_path / "run", **same, resume_from_checkpoint="auto")


def test_another_reward_is_refused(ppo, project, tmp_path):
    """A model by its contents, its scale too; a function by its name."""
    ppo.run_until(2, tmp_path / "run")
    model = tmp_path / "other"
    shutil.copytree(project / "llama-reward", model)
    both = [str(model), f"{project / 'reward.py'}:noise"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"reward_mean": 1.0, "reward_std": 2.0}))
    with pytest.raises(UserError, match=r"^reward_funcs .* holds something else than"):
        ppo.run(tmp_path / "run", reward_funcs=both, resume_from_checkpoint="auto")
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    tensors["score.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^reward_funcs .* holds something else than"):
        ppo.run(tmp_path / "run", reward_funcs=both, resume_from_checkpoint="auto")
    (project / "other.py").write_text(REWARD)
    rewards = [str(project / "llama-reward"), f"{project / 'other.py'}:noise"]
    with pytest.raises(UserError, match="belongs to another configuration: reward_funcs is"):
        ppo.run(tmp_path / "run", reward_funcs=rewards, **LOOSELY)


# Loosely


def test_other_options_need_resume_loosely_and_it_says_so(sft, tmp_path, capsys):
    sft.run_until(2, tmp_path / "run")
    changes = {"per_device_train_batch_size": 4, "max_steps": 6}
    with pytest.raises(UserError) as error:
        sft.run(tmp_path / "run", resume_from_checkpoint="auto", **changes)
    assert str(error.value).endswith(
        "per_device_train_batch_size is 8 there and 4 here (also: max_steps): give the same "
        "values, go on without the bitwise promise with --resume_loosely, or start anew in another "
        "output_dir"
    )
    capsys.readouterr()
    sft.run(tmp_path / "run", **changes, **LOOSELY)
    out = capsys.readouterr().out
    assert "going on loosely, with " in out
    assert "per_device_train_batch_size 4 (there: 8)" in out and "max_steps 6 (there: 4)" in out
    assert "are not, bit for bit, those of a run that never stopped" in out
    losses = [row["step"] for row in records(tmp_path / "run") if "loss" in row]
    assert losses == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match=r"learning_rate is 0\.001 there and 0\.1 here"):
        sft.run(tmp_path / "run", learning_rate=0.1, **changes, **LOOSELY)


def test_with_the_same_options_it_is_still_bitwise(sft, tmp_path, capsys):
    sft.run(tmp_path / "unbroken")
    sft.run_until(2, tmp_path / "run")
    capsys.readouterr()
    sft.run(tmp_path / "run", **LOOSELY)
    assert "loosely" not in capsys.readouterr().out
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


def test_resume_loosely_needs_something_to_resume(sft, tmp_path):
    with pytest.raises(UserError, match="resume_loosely needs resume_from_checkpoint"):
        sft.run(tmp_path / "run", resume_loosely=True)
    assert not (tmp_path / "run").exists()


def start_schedule(config: TrainConfig, num_steps: int) -> tuple:
    """An optimizer of one number, and its schedule."""
    parameters = [torch.nn.Parameter(torch.ones(1))]
    return make_optimizer([(parameters, config.learning_rate)], config, num_steps)


def rates(optimizer, scheduler, count: int) -> list[float]:
    """The learning rates of so many steps."""
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_a_longer_run_goes_on_at_the_rates_of_its_own_schedule(stage, tmp_path):
    """From the first step on: those of a run that was as long from the start."""
    longer = {"total_episodes": 64} if stage.train is train_ppo else {"max_steps": 8}
    stage.run_until(2, tmp_path / "run")
    stage.run(tmp_path / "run", **longer, **LOOSELY)
    found = [row["lr"] for row in records(tmp_path / "run") if "lr" in row]
    expected = rates(*start_schedule(stage.config, 8), 8)
    assert len(found) == 8 and found[2:] == expected[2:] and found[:2] != expected[:2]


def test_a_finished_run_is_lengthened_and_keeps_its_optimizer(sft, tmp_path):
    sft.run(tmp_path / "run")
    sft.run(tmp_path / "run", max_steps=6, **LOOSELY)
    state = load_state(tmp_path / "run" / "checkpoint-6" / "state.pt")
    assert {x["step"].item() for x in state["optimizer"]["state"].values()} == {6}
    stored = yaml.safe_load((tmp_path / "run" / "sft.yaml").read_text())
    assert stored["max_steps"] == 6 and stored["resume_loosely"] is False


def test_a_run_may_be_shorter_but_not_than_what_is_done(stage, tmp_path):
    stage.run_until(3, tmp_path / "run", save_steps=1)
    name = "total_episodes" if stage.train is train_ppo else "max_steps"
    fewer, enough = (16, 24) if stage.train is train_ppo else (2, 3)
    with pytest.raises(UserError, match=f"{name} {fewer} .* the checkpoint has behind it: give"):
        stage.run(tmp_path / "run", save_steps=1, **{name: fewer}, **LOOSELY)
    stage.run(tmp_path / "run", save_steps=1, **{name: enough}, **LOOSELY)
    assert records(tmp_path / "run")[-1]["step"] == 3


def test_ppo_counts_episodes_and_keeps_its_prompts_with_another_batch_size(ppo, tmp_path):
    ppo.run_until(2, tmp_path / "run")
    before = load_state(tmp_path / "run" / "checkpoint-2" / "state.pt")
    ppo.run(tmp_path / "run", per_device_train_batch_size=4, **LOOSELY)
    episodes = [row["episodes"] for row in records(tmp_path / "run") if "episodes" in row]
    assert episodes == [8, 16, 20, 24, 28, 32]
    after = load_state(tmp_path / "run" / "checkpoint-4" / "state.pt")
    assert before["episodes"] == 16 and after["episodes"] == 24
    # Resumed strictly from there the run is the same again.
    last = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    changes = {"per_device_train_batch_size": 4, "resume_from_checkpoint": "auto"}
    ppo.run(tmp_path / "run", **changes)
    assert weights(tmp_path / "run") == last


def test_another_number_of_processes_is_possible(sft, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "gather_objects", lambda value: [value, value])
        sft.run_until(2, tmp_path / "run")
    with pytest.raises(UserError, match="by 2 processes, and here are 1: start as many, or go on"):
        sft.run(tmp_path / "run", resume_from_checkpoint="auto")
    sft.run(tmp_path / "run", **LOOSELY)
    assert records(tmp_path / "run")[-1]["step"] == 4


# The order of the data


UNUSED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


def make_batches(size: int, **changes) -> Batches:
    config = SFTConfig(**UNUSED, per_device_train_batch_size=size, **changes)
    return Batches([1 + i % 7 for i in range(23)], config)


def rows(steps: list[list[list[int]]]) -> list[int]:
    return [row for step in steps for micro in step for row in micro]


@pytest.mark.parametrize("epochs", [2, 1.5, 2.3, 0.4])
def test_batches_go_on_where_they_were(tmp_path, epochs):
    expected = take(make_batches(4, num_train_epochs=epochs))
    for stop in range(len(expected) + 1):
        first = make_batches(4, num_train_epochs=epochs)
        steps = take(first, stop)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = make_batches(4, num_train_epochs=epochs)
        second.load_state_dict(load_state(tmp_path / "state.pt"))
        assert (second.taken, second.total) == (stop, len(expected))
        assert [*steps, *take(second)] == expected


@pytest.mark.parametrize("size", [1, 3, 8, 40])
@pytest.mark.parametrize("stop", [1, 5, 6, 8])
def test_an_epoch_holds_every_row_once_with_another_batch_size_too(size, stop):
    first, second = make_batches(4, num_train_epochs=3), make_batches(size, num_train_epochs=3)
    seen = rows(take(first, stop))
    second.load_state_dict(first.state_dict())
    total = second.total
    steps = take(second)
    assert second.taken == total == stop + len(steps)
    seen += rows(steps)
    assert len(seen) == 3 * 23
    for epoch in range(3):
        assert sorted(seen[23 * epoch :][:23]) == list(range(23))
    assert max(len(rows([step])) for step in steps) == min(size, 23)


def test_more_epochs_after_the_last_are_as_many_as_are_asked_for():
    first, second = make_batches(4, num_train_epochs=1), make_batches(4, num_train_epochs=2.5)
    assert len(take(first)) == 6
    second.load_state_dict(first.state_dict())
    assert second.total == 15 and len(take(second)) == 9


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "constant_with_warmup"])
def test_a_schedule_goes_on_over_another_number_of_steps(kind):
    config = SFTConfig(**UNUSED, lr_scheduler_type=kind, warmup_ratio=0.25, learning_rate=1.0)

    expected = rates(*start_schedule(config, 40), 40)
    optimizer, scheduler = start_schedule(config, 12)
    rates(optimizer, scheduler, 7)
    states = optimizer.state_dict(), scheduler.state_dict()
    optimizer, _ = start_schedule(config, 12)
    optimizer.load_state_dict(states[0])
    scheduler = resume_schedule(optimizer, config, 40, states[1])
    assert scheduler.get_last_lr() == [expected[7]]
    assert rates(optimizer, scheduler, 33) == expected[7:]


def test_a_run_s_folder_may_be_copied_elsewhere(sft, tmp_path):
    """To another machine, say: nothing in it is absolute."""
    sft.run_until(2, tmp_path / "run")
    data = os.path.relpath(tmp_path / "project" / "texts.jsonl")
    for path in (tmp_path / "run" / "checkpoint-2").iterdir():
        if path.suffix == ".json":
            assert str(tmp_path) not in path.read_text()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    sft.run(tmp_path / "copy", dataset_name=data, resume_from_checkpoint="auto")
