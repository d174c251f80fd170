"""A run that is stopped and resumed ends as if it had never stopped, bit for bit."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import distributed
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError
from rlhf.ppo import train as ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.run import checkpoints as checkpoint
from rlhf.supervised import SupervisedTrainer
from tests.rlhf.helpers.stages import checkpoints, records, weights


@pytest.fixture(scope="module")
def unbroken(stage, tmp_path_factory) -> Path:
    """The folder of the stage's run that nobody stopped."""
    path = tmp_path_factory.mktemp("unbroken")
    stage.run(path)
    return path


# The same run


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_is_bitwise_the_unbroken_one(stage, unbroken, tmp_path, stop):
    """Stopped before there is a checkpoint, before the next line of metrics, and after it: the line
    is then written again. What it sums up begins before the checkpoint."""
    stage.run_until(stop, tmp_path)
    assert checkpoints(tmp_path) == ({"checkpoint-4"} if stop >= 4 else set())
    random.seed(stop)
    torch.manual_seed(stop)
    stage.run(tmp_path, resume_from_checkpoint="auto")
    assert records(tmp_path) == records(unbroken)
    assert weights(tmp_path) == weights(unbroken)
    assert checkpoints(tmp_path) == checkpoints(unbroken) == {"checkpoint-8", "checkpoint-10"}


def test_a_run_may_go_on_in_another_folder(stage, unbroken, tmp_path):
    stage.run(tmp_path, resume_from_checkpoint=str(unbroken / "checkpoint-8"))
    assert records(tmp_path) == records(unbroken)
    assert weights(tmp_path) == weights(unbroken)
    assert checkpoints(tmp_path) == {"checkpoint-8", "checkpoint-10"}


def test_a_run_that_was_stopped_in_another_folder_goes_on_there(stages, tmp_path):
    """Even before it saved anything there, and with an earlier checkpoint than the newest."""
    stage, first, second = stages["sft"], tmp_path / "first", tmp_path / "second"
    stage.run(first)
    earlier = {"resume_from_checkpoint": str(first / "checkpoint-8")}
    stage.run_until(1, second, **earlier)
    shutil.rmtree(first / "checkpoint-8")
    stage.run(second, resume_from_checkpoint="auto")
    assert records(second) == records(first)
    assert weights(second) == weights(first)


def test_a_run_that_was_stopped_when_its_checkpoint_was_copied_goes_on(stages, tmp_path):
    """The folder's own configuration was not there yet."""
    stage, first, second = stages["sft"], tmp_path / "first", tmp_path / "second"
    stage.run(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(checkpoint, "write_file")
        with pytest.raises(NameError):
            stage.run(second, resume_from_checkpoint=str(first / "checkpoint-8"))
    assert checkpoints(second) == {"checkpoint-8"} and not (second / "sft.yaml").exists()
    stage.run(second, resume_from_checkpoint="auto")
    assert records(second) == records(first)
    assert weights(second) == weights(first)


def test_auto_goes_on_from_the_earlier_checkpoint_that_was_resumed(stages, tmp_path):
    """And not from a later one, of what would have come of it before."""
    stage = stages["sft"]
    stage.run(tmp_path)
    before = weights(tmp_path)
    stage.run_until(1, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert checkpoints(tmp_path) == {"checkpoint-8"}
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        take_step = SupervisedTrainer.take_step
        patch.setattr(
            SupervisedTrainer, "take_step", lambda self: taken.append(self.step) or take_step(self)
        )
        stage.run(tmp_path, resume_from_checkpoint="auto")
    assert taken == [8, 9]
    assert weights(tmp_path) == before


def test_a_finished_run_stays_as_it_is(stage, unbroken, tmp_path, monkeypatch):
    shutil.copytree(unbroken, tmp_path / "run")
    monkeypatch.delattr(*stage.step)
    metrics = stage.run(tmp_path / "run", resume_from_checkpoint="auto")
    assert records(tmp_path / "run") == records(unbroken)
    assert weights(tmp_path / "run") == weights(unbroken)
    for name, value in records(unbroken)[-1].items():
        assert name == "step" or metrics[name] == value


# What PPO restores besides


@pytest.fixture(scope="module")
def trainers(stages, tmp_path_factory) -> list[PPOTrainer]:
    """Of a run at its end, of the same run resumed there, and of one that has not begun."""
    path, stage, made = tmp_path_factory.mktemp("trainers"), stages["ppo"], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "PPOTrainer", lambda *args: made.append(PPOTrainer(*args)) or made[-1])
        stage.run(path, total_episodes=16 * 3)
        stage.run(path, total_episodes=16 * 3, resume_from_checkpoint="auto")
    return [*made, PPOTrainer(made[0].config)]


def test_critic_is_saved_and_restored(trainers):
    saved, restored, new = (trainer.model.critic.state_dict() for trainer in trainers)
    for name, weight in saved.items():
        assert torch.equal(restored[name], weight), name
        assert not torch.equal(new[name], weight), name


def test_optimizer_of_policy_and_critic_is_restored(trainers):
    saved, restored, new = (trainer.optimizer.state_dict()["state"] for trainer in trainers)
    assert not new and len(saved) == len(restored) == len(list(trainers[0].model.parameters()))
    for number, moments in saved.items():
        for name, value in moments.items():
            assert torch.equal(restored[number][name], value), (number, name)


def test_kl_coefficient_is_restored(trainers):
    saved, restored, new = (trainer.kl_controller.kl_coef for trainer in trainers)
    assert saved == restored != new


def test_running_score_moments_are_restored(trainers):
    saved, restored, new = (trainer.score_scaler.state_dict() for trainer in trainers)
    assert saved == restored
    assert saved["count"] == 16 * 3 and new["count"] == 0


# What does not go on


def test_another_configuration_is_refused(stage, unbroken):
    before = records(unbroken)
    with pytest.raises(UserError, match=r"learning_rate is 0\.001 there and 0\.1 here"):
        stage.run(unbroken, resume_from_checkpoint="auto", learning_rate=0.1)
    assert records(unbroken) == before


def test_other_data_is_refused(stage, tmp_path):
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    rows = Path(stage.config.dataset_name).read_text().splitlines()
    data.write_text("\n".join(rows))
    stage.run_until(4, run, dataset_name=str(data))
    data.write_text("\n".join(reversed(rows)))
    changed = rf"^dataset_name {data} holds something else than when .*checkpoint-4 was saved: rest"
    with pytest.raises(UserError, match=changed):
        stage.run(run, dataset_name=str(data), resume_from_checkpoint="auto")


def test_a_refused_checkpoint_leaves_the_folder_as_it_is(stages, tmp_path):
    """Checkpoints of more steps are still the run's, though an earlier one was asked for."""
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    rows = Path(stages["sft"].config.dataset_name).read_text().splitlines()
    data.write_text("\n".join(rows))
    stages["sft"].run(run, dataset_name=str(data))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    data.write_text("\n".join(reversed(rows)))
    earlier = {"dataset_name": str(data), "resume_from_checkpoint": str(run / "checkpoint-8")}
    with pytest.raises(UserError, match=r"^dataset_name .* holds something else"):
        stages["sft"].run(run, **earlier)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_other_held_out_data_is_refused(stage, tmp_path):
    data, changes = tmp_path / "data.jsonl", {"eval_dataset_name": str(tmp_path / "data.jsonl")}
    rows = Path(stage.config.dataset_name).read_text().splitlines()
    data.write_text("\n".join(rows))
    stage.run_until(4, tmp_path / "run", **changes)
    data.write_text("\n".join(rows[1:]))
    with pytest.raises(UserError, match=r"^eval_dataset_name .*data\.jsonl holds something else"):
        stage.run(tmp_path / "run", **changes, resume_from_checkpoint="auto")


def test_other_columns_are_refused(stages, world, tmp_path):
    """Rewards see them."""
    data, changes = tmp_path / "data.jsonl", {"dataset_name": str(tmp_path / "data.jsonl")}
    write_jsonl(data, [{"prompt": "film", "answer": "good"}, {"prompt": "plot", "answer": "bad"}])
    stages["ppo"].run_until(4, tmp_path / "run", **changes)
    write_jsonl(data, [{"prompt": "film", "answer": "good"}, {"prompt": "plot", "answer": "dull"}])
    with pytest.raises(UserError, match=r"^dataset_name .* holds something else"):
        stages["ppo"].run(tmp_path / "run", **changes, resume_from_checkpoint="auto")


@pytest.mark.parametrize("option", ["model_name_or_path", "reward_funcs"])
def test_another_reference_or_reward_model_is_refused(stages, world, tmp_path, option):
    model, run = tmp_path / "model", tmp_path / "run"
    name = {"model_name_or_path": "llama", "reward_funcs": "llama-reward"}[option]
    shutil.copytree(world / name, model)
    changes = {option: [str(model)] if option == "reward_funcs" else str(model)}
    changes["reward_weights"] = None
    if option == "model_name_or_path":
        changes["critic_model_path"] = str(world / "llama-reward")
    stages["ppo"].run_until(4, run, **changes)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 0] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"^{option} .*model.* holds something else than when"):
        stages["ppo"].run(run, **changes, resume_from_checkpoint="auto")


def test_another_number_of_processes_is_refused(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, value])
    stage.run_until(4, tmp_path)
    with pytest.raises(UserError, match="was written by 2 processes, and here are 1"):
        stage.run(tmp_path, resume_from_checkpoint="auto")
