"""The recipes, run on small folders of the layout that the hub has."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlhf.recipes
from rlhf.classic import AutoModelForCausalLMWithValueHead
from rlhf.cli import parse_config
from rlhf.columns import load_columns
from rlhf.errors import UserError
from rlhf.functions import load_function
from rlhf.ppo import train_ppo
from rlhf.recipes import sentiment_classic
from rlhf.recipes.make_local import make_local
from rlhf.tasks.base import write_jsonl
from rlhf.tasks.labelled import read_examples
from tests.rlhf.conftest import BAD, GOOD, review

YAML = Path(rlhf.recipes.__file__).parent / "gpt2-imdb.yaml"


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    rng = random.Random(0)
    # Openings longer than a prompt, so that the response alone decides.
    rows = [
        {"text": f"{opening} is {opening} is {review(rng, words)}", "label": label}
        for label, words in (("positive", GOOD), ("negative", BAD))
        for opening in ("film", "plot")
        for _ in range(150)
    ]
    write_jsonl(folder / "reviews.jsonl", rows)
    examples = read_examples(folder / "reviews.jsonl")
    random.Random(0).shuffle(examples)
    sizes = {"hidden_size": 32, "vocab_size": 290, "num_epochs": 20}
    accuracy = make_local(examples, folder, learning_rate=5e-3, **sizes)
    assert accuracy == 1.0
    return folder


def test_data_has_the_columns_of_imdb(local):
    columns = load_columns(str(local / "imdb"))
    assert set(columns) == {"text", "label"}
    for text, label in zip(columns["text"], columns["label"], strict=True):
        assert label == any(word in text.split() for word in GOOD)


def test_reward_is_the_raw_positive_score(local):
    path = local / "distilbert"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    texts = ["film is good .", "plot is bad ."]
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0, 1] for text in texts]
    reward = load_function(f"rlhf.recipes.sentiment:{path}")
    scores = reward(prompts=["film", "plot is"], completions=[" is good .", " bad ."])
    assert scores == pytest.approx(torch.stack(expected).tolist(), rel=1e-4)
    assert scores[0] > 1 > -1 > scores[1]


def test_classifier_that_cannot_serve_is_told(world):
    for name, message in (
        (str(world / "nothing"), "there is no folder '.*nothing': give that of a classifier, or"),
        (str(world / "llama-reward"), r"must have a label POSITIVE, it has \['LABEL_0'\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_function(f"rlhf.recipes.sentiment:{name}")
    with pytest.raises(UserError, match="cannot open the classifier"):
        (world / "empty").mkdir()
        load_function(f"rlhf.recipes.sentiment:{world / 'empty'}")


def test_classic_script_learns_to_please(local, tmp_path):
    means = sentiment_classic.main(
        [
            *("--model_name", str(local / "gpt2"), "--reward_model", str(local / "distilbert")),
            *("--query_dataset", str(local / "imdb"), "--output_dir", str(tmp_path)),
            *("--max_steps", "12", "--batch_size", "16", "--mini_batch_size", "16"),
            *("--learning_rate", "3e-3"),
        ]
    )
    assert len(means) == 12
    assert sum(means[-4:]) / 4 > sum(means[:2]) / 2 + 0.5
    assert list(tmp_path.glob("trl/events*"))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    start = AutoModelForCausalLMWithValueHead.from_pretrained(str(local / "gpt2"))
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(model(ids)[0], start(ids)[0])
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert torch.equal(model(ids)[2], again(ids)[2])


def test_yaml_runs_through_rlhf_ppo(local, tmp_path):
    """Only names and sizes are changed."""
    config = parse_config(
        "ppo",
        [
            *("--config", str(YAML), "--output_dir", str(tmp_path)),
            *("--model_name_or_path", str(local / "gpt2")),
            *("--dataset_name", str(local / "imdb")),
            *("--reward_funcs", f"rlhf.recipes.sentiment:{local / 'distilbert'}"),
            *("--total_episodes", "320", "--rollout_batch_size", "32"),
            *("--learning_rate", "3e-3"),
            *("--save_steps", "0", "--report_to", "none"),
        ],
    )
    train_ppo(config)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    scores = [record["objective/scores"] for record in records]
    assert len(scores) == 10
    assert sum(scores[-4:]) / 4 > sum(scores[:2]) / 2 + 0.3
    assert all(4 <= record["tokens/response_len"] <= 16 for record in records)
    before = AutoModelForCausalLM.from_pretrained(local / "gpt2").transformer.wte.weight
    after = AutoModelForCausalLM.from_pretrained(tmp_path).transformer.wte.weight
    assert before.shape == after.shape and not torch.equal(before, after)
