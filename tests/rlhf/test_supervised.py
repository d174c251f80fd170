"""SFT and the reward model: their data, their losses, and what they save."""

import json
import sys
from collections import Counter
from itertools import chain, combinations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.checkpoint import save_model
from rlhf.data import (
    Text,
    count_steps,
    load_prompts,
    load_rankings,
    load_texts,
    micro_batches,
    tokenize_prompts,
)
from rlhf.errors import UserError
from rlhf.models import load_causal_lm, load_scorer
from rlhf.optim import clip_gradients, make_optimizer
from rlhf.reward import pair_indices, score_answers, train_reward
from rlhf.sft import token_loss, train_sft
from rlhf.tasks.base import write_jsonl

BOS, EOS = 1, 2


def test_text_is_learnt_whole_and_ends_with_eos(tokenizer, tmp_path):
    path = str(tmp_path / "data.jsonl")
    write_jsonl(tmp_path / "data.jsonl", [{"text": "film is good"}, {"text": "plot"}])
    assert load_texts(path, tokenizer, 64) == [Text([3, 5, 7, EOS], 1), Text([4, EOS], 1)]
    assert load_texts(path, tokenizer, 3) == [Text([3, 5, 7], 1), Text([4, EOS], 1)]


def test_of_prompt_and_completion_the_completion_is_learnt(tokenizer, tmp_path):
    rows = [{"prompt": "film is", "completion": "good ."}, {"prompt": "", "completion": "plot"}]
    write_jsonl(tmp_path / "data.jsonl", rows)
    texts = load_texts(str(tmp_path / "data.jsonl"), tokenizer, 64)
    assert texts == [Text([3, 5, 7, 6, EOS], 2), Text([BOS, 4, EOS], 1)]


def test_prompts_keep_their_last_tokens(tokenizer):
    assert tokenize_prompts(tokenizer, ["film is good", ""], 2) == [[5, 7], [BOS]]


def test_saved_data_sets_and_json_lists_are_read(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": "film"}, {"prompt": "plot"}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert load_prompts(str(tmp_path / "saved")) == ["film", "plot"]
    assert load_prompts(str(tmp_path / "data.json")) == ["film", "plot"]


def test_only_saved_data_sets_need_the_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "film"}])
    assert load_prompts(str(tmp_path / "data.jsonl")) == ["film"]
    with pytest.raises(UserError, match="pip install datasets"):
        load_prompts(str(tmp_path))


def test_chosen_and_rejected_are_a_ranking_of_two(tokenizer, tmp_path):
    rows = [{"prompt": "film", "chosen": "good", "rejected": "bad"}]
    path = str(tmp_path / "pairs.jsonl")
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert load_rankings(path, tokenizer, 64, True) == [[[3, 7, EOS], [3, 10, EOS]]]
    assert load_rankings(path, tokenizer, 2, False) == [[[3, 7], [3, 10]]]


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


def test_every_epoch_holds_every_example_once(sft_config):
    config = sft_config(
        output_dir="unused", per_device_train_batch_size=3, gradient_accumulation_steps=2
    )
    lengths = [1 + i % 7 for i in range(20)]
    batches = micro_batches(lengths, config, torch.Generator().manual_seed(0))
    assert count_steps(20, config) == 4 * 4
    for _ in range(2):
        epoch = [next(batches) for _ in range(4)]
        assert Counter(i for batch in epoch for micro in batch for i in micro) == Counter(range(20))
        assert sorted(sum(map(len, batch)) for batch in epoch) == [2, 6, 6, 6]
        assert all(len(micro) <= 3 for batch in epoch for micro in batch)


def test_token_loss_is_the_cross_entropy_of_the_learnt_tokens(world):
    model = load_causal_lm(str(world / "gpt2")).eval()
    texts = [Text([3, 5, 7, 6, EOS], 2), Text([4, 5, EOS], 1)]
    total = sum(
        F.cross_entropy(
            model(torch.tensor([text.ids])).logits[0, text.start - 1 : -1],
            torch.tensor(text.ids[text.start :]),
            reduction="sum",
        )
        for text in texts
    )
    torch.testing.assert_close(token_loss(model, texts, 0, 5), total / 5)


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
    module = torch.nn.Linear(2, 2)
    optimizer, scheduler = make_optimizer([(module, 1.0)], config, num_steps=5)
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
        clip_gradients(module, 1.0)


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
    assert not (path / ".saving").exists()


def test_reward_model_learns_and_its_folder_scores(reward_config, tokenizer, world, tmp_path):
    path = tmp_path / "reward"
    metrics = train_reward(reward_config(output_dir=str(path)))
    assert metrics["eval/accuracy"] > 0.95
    assert metrics["eval/margin"] > 1
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    good, bad = [1, 3, 5, 7, 7, 6, EOS], [1, 3, 5, 10, 6, EOS]
    good_score, bad_score = (model(torch.tensor([ids])).logits[0, 0] for ids in (good, bad))
    assert good_score > bad_score + 1
    scores = score_answers(load_scorer(str(path), tokenizer), [good, bad], 0, bf16=False)
    torch.testing.assert_close(scores, torch.stack([good_score, bad_score]), atol=1e-5, rtol=1e-5)

    answers = [*chain(*load_rankings(str(world / "pairs.jsonl"), tokenizer, 64, True))]
    scores = score_answers(model, answers, 0, bf16=False)
    assert model.config.reward_mean == pytest.approx(scores.mean().item(), abs=1e-4)
    assert model.config.reward_std == pytest.approx(scores.std(correction=0).item(), abs=1e-4)


def test_a_model_is_saved_whole_or_not_at_all(world, tokenizer, tmp_path, monkeypatch):
    model = load_causal_lm(str(world / "llama"))

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "out", model, tokenizer)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".saving"]
    (tmp_path / "out" / ".saving" / "left-over").write_text("")
    monkeypatch.undo()
    save_model(tmp_path / "out", model, tokenizer)
    saved = load_causal_lm(str(tmp_path / "out"))
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), atol=0, rtol=0)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not names & {".saving", "left-over"}


def test_bf16_trains_too(sft_config, tmp_path):
    metrics = train_sft(sft_config(output_dir=str(tmp_path / "bf16"), bf16=True))
    assert metrics["loss"] < 1.2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.float32
