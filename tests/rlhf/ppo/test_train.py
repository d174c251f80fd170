"""Whole runs of PPO: what they learn, save and report."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.ppo.metrics import iteration_metrics
from rlhf.ppo.train import train_ppo
from tests.rlhf.helpers.ppo import collect
from tests.rlhf.helpers.stages import records

METRICS = {
    *("objective/scores", "objective/kl", "objective/kl_per_token", "objective/entropy"),
    *("objective/rlhf_reward", "objective/non_score_reward", "policy/approxkl", "policy/clipfrac"),
    *("policy/ratio", "policy/ratio_max", "policy/entropy", "loss/policy", "loss/value"),
    *("val/explained_variance", "tokens/response_len", "tokens/eos_rate", "tokens_per_second"),
    *("time/generate", "time/evaluate", "time/update", "kl_coef", "lr"),
}


def test_training_raises_the_score_and_the_critic_is_saved(
    ppo_config, world, trained_sft, tmp_path
):
    path = tmp_path / "run"
    config = ppo_config(
        output_dir=str(path),
        per_device_train_batch_size=32,
        total_episodes=64 * 15,
        learning_rate=3e-3,
        report_to="tensorboard",
    )
    last = train_ppo(config)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert set(lines[0]) >= METRICS
    assert last["objective/scores"] > lines[0]["objective/scores"] + 0.5
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert last["objective/kl"] > 0.1
    assert last["objective/rlhf_reward"] == pytest.approx(
        last["objective/scores"] + last["objective/non_score_reward"], abs=1e-5
    )
    assert last["objective/non_score_reward"] == pytest.approx(
        -config.kl_coef * last["objective/kl"], abs=1e-5
    )

    policy = AutoModelForCausalLM.from_pretrained(path)
    start = AutoModelForCausalLM.from_pretrained(trained_sft)
    assert not torch.equal(policy.lm_head.weight, start.lm_head.weight)
    assert policy.generate(torch.tensor([[3]]), max_new_tokens=3).shape[1] > 1
    critic = AutoModelForSequenceClassification.from_pretrained(path / "critic")
    start = AutoModelForSequenceClassification.from_pretrained(config.reward_funcs[0])
    assert not torch.equal(critic.score.weight, start.score.weight)
    assert (path / "completions.md").read_text().count("- after [") == 3
    for plot in ("reward", "policy", "loss", "responses"):
        assert (path / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"
    assert list((path / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_run(ppo_config, tmp_path):
    runs = []
    for name in ("a", "b"):
        train_ppo(ppo_config(output_dir=str(tmp_path / name)))
        runs.append(records(tmp_path / name))
    assert runs[0] == runs[1]


def test_metrics_stand_in_the_same_order_in_every_run(make_trainer):
    """Names of strings in a set do not: their hashes differ from process to process."""
    trainer = make_trainer()
    batch = collect(trainer)
    steps = trainer.update(batch)
    means = [name for name in steps[0] if name not in ("policy/ratio_max", "policy/ratio_error")]
    assert len(means) > 5
    assert list(iteration_metrics(batch, steps))[-len(means) :] == means


def test_a_nan_reward_stops_with_the_sample_named(ppo_config, tmp_path):
    def reward(prompts, completions):
        return [math.nan if "bad" in completion else 1.0 for completion in completions]

    config = ppo_config(output_dir=str(tmp_path / "run"), total_episodes=64)
    with pytest.raises(UserError, match=r"reward.*nan.*prompt '.+', completion '.*bad") as error:
        train_ppo(config, [reward])
    assert "\n" not in str(error.value)
