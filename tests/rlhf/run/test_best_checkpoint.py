"""The best checkpoint by a metric: kept, loaded at the end, taken along."""

import math
import shutil

import pytest

from rlhf import reward_model as reward
from rlhf import sft
from rlhf.config.training import TrainConfig
from rlhf.errors import UserError
from rlhf.ppo import train as ppo
from tests.rlhf.helpers.stages import checkpoints, weights

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
