"""SFT and the reward model: their losses, their metrics, and what they save."""

import errno
import json
import math
import os
from itertools import combinations
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaPreTrainedModel,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.data.loaders import Ranking, Text, load_rankings
from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm, load_scorer
from rlhf.optim import clip_gradients, make_optimizer
from rlhf.reward_model import Scorer, pair_indices, pair_metrics, score_answers, train_reward
from rlhf.run.state import save_model
from rlhf.sft import token_loss, train_sft
from rlhf.supervised import SupervisedTrainer
from tests.rlhf.helpers.stages import records

EOS = 2


def test_worked_example_of_the_ranking():
    better, worse = pair_indices([4])
    names = "BADC"
    pairs = [names[i] + names[j] for i, j in zip(better, worse, strict=True)]
    assert pairs == ["BA", "BD", "BC", "AD", "AC", "DC"]


def test_pairs_stay_within_their_ranking():
    better, worse = pair_indices([2, 3])
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [
        (0, 1),
        *combinations((2, 3, 4), 2),
    ]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_accumulation_does_not_change_the_result(sft_config, reward_config, tmp_path, stage):
    train, make = (train_sft, sft_config) if stage == "sft" else (train_reward, reward_config)
    curves = []
    for size, accumulation in ((12, 1), (4, 3)):
        config = make(
            output_dir=str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            logging_steps=1,
        )
        train(config)
        lines = (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines[:6]]
        curves.append([record[name] for record in records for name in ("loss", "grad_norm")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_learning_rate_warms_up_and_decays(sft_config):
    config = sft_config(output_dir="unused", warmup_ratio=0.4, weight_decay=0.1)
    parameters = list(torch.nn.Linear(2, 2).parameters())
    optimizer, scheduler = make_optimizer([(parameters, 1.0)], config, num_steps=5)
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 1 / 2, 1, 2 / 3, 1 / 3])
    decay = {
        len(group["params"][0].shape): group["weight_decay"] for group in optimizer.param_groups
    }
    assert decay == {2: 0.1, 1: 0.0}


def test_a_gradient_that_is_not_finite_ends_the_run():
    module = torch.nn.Linear(2, 1)
    module(torch.tensor([[torch.inf, 1.0]])).sum().backward()
    with pytest.raises(UserError, match="lower learning_rate"):
        clip_gradients(list(module.parameters()), 1.0)


def test_sft_learns_and_its_folder_opens(sft_config, world, tmp_path):
    path = tmp_path / "sft"
    metrics = train_sft(
        sft_config(output_dir=str(path), eval_dataset_name=str(world / "texts.jsonl"))
    )
    # The source's own entropy is 2.8 nats a text; the untrained model is at log 13 a token.
    assert metrics["eval/loss"] < 1.1
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer("film").input_ids])
    assert model(ids).logits[0, -1].argmax() == tokenizer("is").input_ids[0]
    assert (path / "loss.png").exists()


def test_reward_model_learns_and_its_folder_scores(reward_config, tokenizer, world, tmp_path):
    path = tmp_path / "reward"
    metrics = train_reward(reward_config(output_dir=str(path)))
    assert metrics["eval/accuracy"] > 0.95
    assert metrics["eval/margin"] > 1
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    good, bad = [1, 3, 5, 7, 7, 6, EOS], [1, 3, 5, 10, 6, EOS]
    good_score, bad_score = (model(torch.tensor([ids])).logits[0, 0] for ids in (good, bad))
    assert good_score > bad_score + 1
    scorer = Scorer(load_scorer(str(path), tokenizer).eval(), tokenizer)
    scores = score_answers(scorer, [good, bad], 0, bf16=False)
    torch.testing.assert_close(scores, torch.stack([good_score, bad_score]), atol=1e-5, rtol=1e-5)

    config = reward_config(output_dir="unused")
    rankings = load_rankings(config, str(world / "pairs.jsonl"), "train", tokenizer)
    answers = [answer for ranking in rankings for answer in ranking.answers]
    scores = score_answers(scorer, answers, 0, bf16=False)
    assert model.config.reward_mean == pytest.approx(scores.mean().item(), abs=1e-4)
    assert model.config.reward_std == pytest.approx(scores.std(correction=0).item(), abs=1e-4)


def test_a_checkpoint_has_no_score_normalisation_of_an_earlier_model(
    reward_config, trained_reward, tmp_path
):
    config = reward_config(
        model_name_or_path=str(trained_reward),
        output_dir=str(tmp_path),
        max_steps=1,
        save_steps=1,
        metric_for_best_model="loss",
        logging_steps=1,
    )
    train_reward(config)
    earlier, checkpoint, last = (
        json.loads((folder / "config.json").read_text())
        for folder in (trained_reward, tmp_path / "checkpoint-1", tmp_path)
    )
    for name in ("reward_mean", "reward_std"):
        assert name not in checkpoint
        assert last[name] != earlier[name]


def test_a_model_is_saved_whole_or_not_at_all(world, tokenizer, tmp_path, monkeypatch):
    model = load_causal_lm(str(world / "llama"))

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(UserError, match="No space left on device: free some space"):
        save_model(tmp_path / "out", model, tokenizer)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    save_model(tmp_path / "out", model, tokenizer)
    saved = load_causal_lm(str(tmp_path / "out"))
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_bf16_trains_too(sft_config, tmp_path):
    metrics = train_sft(sft_config(output_dir=str(tmp_path / "bf16"), bf16=True))
    assert metrics["loss"] < 1.2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.float32


def test_metrics_of_pairs():
    """σ(0) = 1/2, σ(log 3) = 3/4; a pair whose scores are equal is not accurate."""
    scores = torch.tensor([0.0, 0.0, math.log(3), 0.0, 0.0, math.log(3)])
    metrics = pair_metrics(scores, [Ranking([[], []], 0.0)] * 3, 0.0, 3)
    expected = {"loss": math.log(2 * 4 / 3 * 4) / 3, "accuracy": 1 / 3, "margin": 0.0}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_batches_of_unequal_parts_weigh_every_token_alike(world, sft_config):
    """A step's loss and gradient are those of one pass over its whole batch."""
    texts = [Text([1, 3, 5, 7, 2], [False] + [True] * 4), Text([1, 4], [False, True])]
    texts.append(Text([1, 4, 5, 9, 9, 6, 2], [False] * 5 + [True] * 2))
    config = sft_config(output_dir="unused", max_grad_norm=1e9)
    model = load_causal_lm(str(world / "llama"))
    trainer = SupervisedTrainer(config, model, texts, [5, 2, 7])
    for rows, weight in trainer.passes([[0, 1], [2]]):
        part = [texts[i] for i in rows]
        trainer.backward(weight, {"loss": token_loss(trainer.parallel, part, 0, 7)})
    gradient = [parameter.grad.clone() for parameter in model.parameters()]
    loss = trainer.sums["loss"]
    model.zero_grad()
    whole = token_loss(model, texts, 0, 7)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(gradient, [parameter.grad for parameter in model.parameters()])
    truth = [
        F.cross_entropy(
            model(torch.tensor([text.ids])).logits[0, :-1],
            torch.tensor(text.ids[1:]).masked_fill(~torch.tensor(text.learnt[1:]), -100),
            reduction="sum",
        )
        for text in texts
    ]
    torch.testing.assert_close(whole, sum(truth) / 7)


def test_a_line_of_metrics_is_the_mean_of_its_steps(sft_config, tmp_path):
    lines = {}
    for every in (1, 4):
        path = tmp_path / str(every)
        train_sft(sft_config(output_dir=str(path), logging_steps=every, max_steps=10))
        lines[every] = records(path)
    assert [line["step"] for line in lines[4]] == [4, 8, 10]
    for name in ("loss", "grad_norm"):
        singles = [line[name] for line in lines[1]]
        means = [fmean(singles[start : start + 4]) for start in (0, 4, 8)]
        assert [line[name] for line in lines[4]] == pytest.approx(means)
    assert [line["lr"] for line in lines[4]] == [lines[1][i]["lr"] for i in (3, 7, 9)]


@pytest.fixture(params=["sft", "reward"])
def train(request, world, tmp_path):
    """Trains an untrained model of the world for 5 steps in a new folder; returns its metrics."""
    train_stage, data, make_config = {
        "sft": (train_sft, "texts.jsonl", SFTConfig),
        "reward": (train_reward, "pairs.jsonl", RewardConfig),
    }[request.param]

    def run(model: str, **changes) -> list[dict]:
        path = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        defaults = {
            "model_name_or_path": str(world / model),
            "dataset_name": str(world / data),
            "output_dir": str(path),
            "learning_rate": 1e-2,
            "max_steps": 5,
            "logging_steps": 1,
            "save_steps": 0,
            "report_to": "none",
        }
        if changes.get("eval_steps"):
            defaults["eval_dataset_name"] = defaults["dataset_name"]
        train_stage(make_config(**defaults | changes))
        return records(path)

    return run


def test_evaluation_changes_nothing_of_the_training(train):
    """Of a model with dropout, which is off in the evaluation and on again afterwards."""
    lines = train("gpt2", eval_steps=2)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    assert [line for line in lines if "loss" in line] == train("gpt2")


def test_evaluation_does_not_depend_on_its_batch(train):
    """And is without dropout."""
    first, second = (
        train("gpt2", max_steps=1, eval_steps=1, per_device_eval_batch_size=size)[-1]
        for size in (64, 7)
    )
    assert "eval/loss" in first
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize(("name", "layer"), [("llama", LlamaMLP), ("gpt2", GPT2MLP)])
def test_gradient_checkpointing_changes_nothing_but_memory(train, monkeypatch, name, layer):
    """Not what the GPT-2 drops out either."""
    calls, forward = [], layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda *args: calls.append(torch.is_grad_enabled()) or forward(*args)
    )
    lines, counts = [], []
    for checkpointing in (False, True):
        calls.clear()
        lines.append(train(name, gradient_checkpointing=checkpointing))
        counts.append(sum(calls))
    assert counts == [5 * 2, 5 * 2 * 2]
    assert lines[0] == lines[1]


def test_a_model_that_cannot_checkpoint_says_so(train, monkeypatch):
    monkeypatch.setattr(LlamaPreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing: turn it off"):
        train("llama", gradient_checkpointing=True)
