"""A run that is stopped and resumed ends as if it had never stopped, bit for bit."""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import distributed, sft
from rlhf import reward_model as reward
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig, TrainConfig
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError
from rlhf.ppo import train as ppo
from rlhf.ppo.train import train_ppo
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward_model import train_reward
from rlhf.run import checkpoints as checkpoint
from rlhf.sft import train_sft
from rlhf.supervised import SupervisedTrainer
from tests.rlhf.test_ppo import records

REWARD = """
import random

def noise(completions):
    return [random.random() for _ in completions]
"""


class Stopped(Exception):
    pass


class Stage(NamedTuple):
    """A stage, a configuration of ten steps for it, and what takes one of these."""

    train: Callable[[TrainConfig], dict[str, float]]
    config: TrainConfig
    step: tuple[type, str]

    def run(self, output_dir: Path, **changes) -> dict[str, float]:
        return self.train(self.change(output_dir=str(output_dir), **changes))

    def change(self, **changes) -> TrainConfig:
        return type(self.config)(**vars(self.config) | changes)

    def run_until(self, stop: int, output_dir: Path, **changes) -> None:
        """Runs until step `stop` + 1 fails."""
        owner, name = self.step
        take_step, left = getattr(owner, name), [stop]

        def stopping(*args):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return take_step(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, stopping)
            with pytest.raises(Stopped):
                self.run(output_dir, **changes)


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory) -> dict[str, Stage]:
    """SFT and the reward model with dropout (of the GPT-2), PPO with all that adapts."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "reward.py").write_text(REWARD)
    common = {
        "output_dir": "",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.2,
        "eval_steps": 5,
        "save_steps": 4,
        "report_to": "none",
    }
    supervised = common | {
        "max_steps": 10,
        "logging_steps": 3,
        "gradient_accumulation_steps": 2,
    }

    def data(name: str) -> dict[str, str]:
        return dict.fromkeys(("dataset_name", "eval_dataset_name"), str(world / name))

    sft_config = SFTConfig(
        model_name_or_path=str(world / "gpt2"), **data("texts.jsonl"), **supervised
    )
    reward_config = RewardConfig(
        model_name_or_path=str(world / "gpt2"), **data("pairs.jsonl"), **supervised
    )
    ppo_config = PPOConfig(
        model_name_or_path=str(world / "llama"),
        **data("prompts.jsonl"),
        **common,
        reward_funcs=[str(world / "llama-reward"), f"{folder / 'reward.py'}:noise"],
        reward_weights=[1.0, 0.3],
        num_mini_batches=2,
        num_ppo_epochs=1,
        total_episodes=16 * 10,
        logging_steps=3,
        response_length=6,
        sample_response_length=True,
        score_scaling="running",
        adaptive_kl="sequence",
        target_kl=0.1,
        kl_horizon=200,
    )
    return {
        "sft": Stage(train_sft, sft_config, (SupervisedTrainer, "take_step")),
        "reward": Stage(train_reward, reward_config, (SupervisedTrainer, "take_step")),
        "ppo": Stage(train_ppo, ppo_config, (PPOTrainer, "update")),
    }


@pytest.fixture(scope="module", params=["sft", "reward", "ppo"])
def stage(request, stages) -> Stage:
    return stages[request.param]


@pytest.fixture(scope="module")
def unbroken(stage, tmp_path_factory) -> Path:
    """The folder of the stage's run that nobody stopped."""
    path = tmp_path_factory.mktemp("unbroken")
    stage.run(path)
    return path


def weights(folder: Path) -> dict[str, bytes]:
    """Of the model in the folder, and of the critic beside it."""
    names = ("model.safetensors", "critic/model.safetensors")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


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


# The best checkpoint


@pytest.fixture
def script(monkeypatch):
    """Makes every evaluation measure an `eval/loss` of the script, in turn."""

    def make(*values: float) -> None:
        values = iter(values)
        score = reward.evaluate

        def evaluate_reward(*args):
            return {"eval/loss": next(values, 0.0)}, score(*args)[1]

        monkeypatch.setattr(sft, "evaluate", lambda *args: {"eval/loss": next(values)})
        monkeypatch.setattr(ppo, "evaluate_policy", lambda *args: {"eval/loss": next(values)})
        monkeypatch.setattr(reward, "evaluate", evaluate_reward)

    return make


BEST = {
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 1,
    "metric_for_best_model": "eval/loss",
    "load_best_model_at_end": True,
}


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(stage, script, tmp_path):
    """Kept beyond save_total_limit, across a stop too; what is not a number is never the best."""
    script(math.nan, 1, 5, 2, 4)
    stage.run_until(9, tmp_path, **BEST)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-8"}
    stage.run(tmp_path, resume_from_checkpoint="auto", **BEST)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-10"}
    assert weights(tmp_path) == weights(tmp_path / "checkpoint-4")
    assert weights(tmp_path) != weights(tmp_path / "checkpoint-10")


def test_greater_is_better(stages, script, tmp_path):
    script(math.nan, 1, 5, 2, 4)
    stages["sft"].run(tmp_path, **BEST, greater_is_better=True)
    assert checkpoints(tmp_path) == {"checkpoint-6", "checkpoint-10"}
    assert weights(tmp_path) == weights(tmp_path / "checkpoint-6")


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        *(("eval/loss", False), ("loss", False), ("eval/perplexity", False), ("eval/kl", False)),
        *(("objective/kl", False), ("accuracy", True), ("objective/scores", True)),
    ],
)
def test_whether_greater_is_better_follows_from_the_metric_s_name(stages, metric, greater):
    def make(**changes) -> TrainConfig:
        changes |= {"metric_for_best_model": metric, "eval_steps": 2, "logging_steps": 1}
        return stages["sft"].change(**changes)

    assert make().greater_is_better is greater
    assert make(greater_is_better=not greater).greater_is_better is not greater


def test_without_load_best_model_at_end_the_last_model_is_left(stages, script, tmp_path):
    script(3, 1, 5, 2, 4)
    stages["sft"].run(tmp_path, **BEST | {"load_best_model_at_end": False})
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-10"}
    assert weights(tmp_path) == weights(tmp_path / "checkpoint-10")


def test_the_best_checkpoint_goes_along_into_another_folder(stages, script, tmp_path):
    script(3, 1, 5, 2, 4)
    first, second, stage = tmp_path / "first", tmp_path / "second", stages["sft"]
    stage.run_until(7, first, **BEST)
    stage.run(second, resume_from_checkpoint=str(first / "checkpoint-6"), **BEST)
    assert checkpoints(second) == {"checkpoint-4", "checkpoint-10"}
    assert weights(second) == weights(first / "checkpoint-4")


def test_another_metric_may_be_asked_for_on_resume(stages, script, tmp_path):
    """The best checkpoint by the first one counts no more."""
    script(3, 1, 5, 2, 4)
    stage, other = stages["sft"], {"metric_for_best_model": "lr", "logging_steps": 2}
    stage.run_until(7, tmp_path, **BEST, logging_steps=2)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    stage.run(tmp_path, resume_from_checkpoint="auto", **BEST | other)
    assert checkpoints(tmp_path) == {"checkpoint-8", "checkpoint-10"}
    assert weights(tmp_path) == weights(tmp_path / "checkpoint-8")


def test_the_other_direction_may_be_asked_for_on_resume(stages, script, tmp_path):
    script(3, 1, 5, 0.5, 0.2)
    stages["sft"].run_until(7, tmp_path, **BEST)
    stages["sft"].run(tmp_path, resume_from_checkpoint="auto", **BEST, greater_is_better=True)
    assert checkpoints(tmp_path) == {"checkpoint-8", "checkpoint-10"}
    assert weights(tmp_path) == weights(tmp_path / "checkpoint-8")


def test_a_best_checkpoint_that_was_never_measured_is_not_loaded(stages, tmp_path):
    stages["sft"].run(tmp_path, logging_steps=2)
    last = weights(tmp_path)
    changes = BEST | {"eval_steps": 5, "metric_for_best_model": "loss", "logging_steps": 2}
    with pytest.raises(UserError, match="no checkpoint was saved with metric_for_best_model loss"):
        stages["sft"].run(tmp_path, resume_from_checkpoint="auto", **changes)
    assert weights(tmp_path) == last


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("gone", [False, True], ids=["damaged", "gone"])
def test_a_damaged_best_checkpoint_costs_nothing_but_itself(stages, script, tmp_path, name, gone):
    """The last model is left, whole, and the error says why it is not the best one."""
    script(3, 1, 5, 2, 4)
    stage = stages[name]
    stage.run_until(9, tmp_path, **BEST)
    best = tmp_path / "checkpoint-4"
    if gone:
        shutil.rmtree(best)
        reason = "there is no such folder"
    else:
        content = bytearray((best / "model.safetensors").read_bytes())
        content[-5] ^= 0x40
        (best / "model.safetensors").write_bytes(content)
        reason = "model.safetensors is damaged, its hash is another than when it was saved"
    with pytest.raises(UserError) as error:
        stage.run(tmp_path, resume_from_checkpoint="auto", **BEST)
    assert str(error.value) == (
        f"cannot load the best checkpoint, {best}: {reason}: output_dir {tmp_path} holds the last "
        "model instead"
    )
    assert weights(tmp_path) == weights(tmp_path / "checkpoint-10")
    plot = {"sft": "loss.png", "reward": "reward.png", "ppo": "reward.png"}[name]
    assert (tmp_path / plot).exists()
    assert ("reward_mean" in (tmp_path / "config.json").read_text()) == (name == "reward")


def test_a_metric_that_is_not_measured_costs_no_step(stages, tmp_path):
    """The checkpoint is saved, and the run goes on with a metric that there is."""
    changes = {"logging_steps": 2, "metric_for_best_model": "los"}
    with pytest.raises(UserError) as error:
        stages["sft"].run(tmp_path, **changes)
    assert str(error.value) == (
        "metric_for_best_model los is not measured: give one of grad_norm, loss, lr, "
        "tokens_per_second, and go on with --resume_from_checkpoint auto"
    )
    assert checkpoints(tmp_path) == {"checkpoint-4"}
    changes["metric_for_best_model"] = "loss"
    stages["sft"].run(tmp_path, resume_from_checkpoint="auto", **changes)
    assert len(checkpoints(tmp_path)) in (2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_for_best_model": "eval/loss", "eval_steps": 3}, "save_steps 4 .* eval_steps 3,"),
        ({"metric_for_best_model": "loss"}, "save_steps 4 must be a multiple of logging_steps 3,"),
        (
            {"metric_for_best_model": "eval/loss", "eval_steps": 0},
            "metric_for_best_model eval/loss needs eval_dataset_name and eval_steps > 0",
        ),
        (
            {"metric_for_best_model": "eval/loss", "eval_steps": 2, "eval_dataset_name": None},
            "metric_for_best_model eval/loss needs eval_dataset_name and eval_steps > 0",
        ),
    ],
)
def test_a_checkpoint_is_judged_by_a_metric_of_its_own_step(stage, changes, message):
    with pytest.raises(UserError, match=message) as error:
        stage.change(**changes)
    assert "\n" not in str(error.value)


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
