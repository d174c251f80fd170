"""`examples/imdb`, run on small folders of the layout that the hub has."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.classic import AutoModelForCausalLMWithValueHead
from rlhf.cli import parse_config
from rlhf.data.columns import load_columns
from rlhf.demo.base import write_jsonl
from rlhf.demo.labelled import read_examples
from rlhf.errors import UserError
from rlhf.ppo.train import train_ppo
from rlhf.rewards.functions import load_function
from tests.rlhf.helpers.world import BAD, GOOD, review

EXAMPLE = Path(__file__).parents[2] / "examples" / "imdb"
SENTIMENT = EXAMPLE / "sentiment.py"
make_local = load_function(f"{EXAMPLE / 'make_local.py'}:make_local")
sentiment = sys.modules[load_function(f"{SENTIMENT}:positive_scorer").__module__]
sentiment_classic = sys.modules[
    load_function(f"{EXAMPLE / 'sentiment_classic.py'}:main").__module__
]


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
    reward = load_function(f"{SENTIMENT}:{path}")
    scores = reward(prompts=["film", "plot is"], completions=[" is good .", " bad ."])
    assert scores == pytest.approx(torch.stack(expected).tolist(), rel=1e-4)
    assert scores[0] > 1 > -1 > scores[1]


def test_classifier_that_cannot_serve_is_told(world):
    for name, message in (
        (str(world / "nothing"), "there is no folder '.*nothing': give that of a classifier, or"),
        (str(world / "llama-reward"), r"must have a label POSITIVE, it has \['LABEL_0'\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_function(f"{SENTIMENT}:{name}")
    with pytest.raises(UserError, match="cannot open the classifier"):
        (world / "empty").mkdir()
        load_function(f"{SENTIMENT}:{world / 'empty'}")


def test_classifier_is_opened_once_and_only_where_one_is_named(local, monkeypatch, tmp_path):
    """Stray names, as Python's tools ask for, and typing errors are not looked up on the hub."""
    opened = []

    def pipeline(*arguments, model, **options):
        opened.append(model)
        raise OSError("no hub here")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.pipeline", pipeline)
        for name in ("__wrapped__", "_ipython_display_", "load_tests", "positive"):
            assert not hasattr(sentiment, name)
        for name in ("positive", "pipeline"):
            with pytest.raises(UserError, match=f"sentiment.py has no function '{name}'"):
                load_function(f"{SENTIMENT}:{name}")
        assert not opened
        with pytest.raises(UserError, match="cannot open the classifier 'me/it': OSError: no hub"):
            load_function(f"{SENTIMENT}:me/it")
        monkeypatch.chdir(local)
        with pytest.raises(UserError, match="cannot open the classifier 'distilbert'"):
            load_function(f"{SENTIMENT}:distilbert")
        assert opened == ["me/it", "distilbert"]
    made = []
    monkeypatch.setattr(sentiment, "positive_scorer", made.append)
    load_function(f"{SENTIMENT}:{local / 'distilbert'}")
    assert made == [str(local / "distilbert")]


def test_local_folders_are_not_written_over(local, tmp_path):
    for name in ("gpt2-untrained", "gpt2", "distilbert", "imdb"):
        folder = tmp_path / name
        (folder / name).mkdir(parents=True)
        with pytest.raises(UserError, match=f"{name} is there already: remove it or choose anoth"):
            make_local([], folder)
        assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--max_steps", "0"], "max_steps must be >= 1, got 0"),
        (["--max_steps", "-1"], "max_steps must be >= 1, got -1"),
        (
            ["--model_name", "/nope"],
            "there is no folder '/nope': give that of a model, or a hub id",
        ),
        (["--output_dir", "{tmp}/file/run"], "cannot make output_dir .* Not a directory: choose"),
    ],
)
def test_arguments_of_the_classic_script_are_checked(changes, message, tmp_path, monkeypatch):
    """Before anything is loaded."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sentiment_classic, "load_columns", None)
    monkeypatch.setattr(sentiment_classic, "AutoModelForCausalLMWithValueHead", None)
    changes = [change.format(tmp=tmp_path) for change in changes]
    with pytest.raises(UserError, match=message) as error:
        sentiment_classic.main(["--output_dir", str(tmp_path / "run"), *changes])
    assert "\n" not in str(error.value)


def test_classic_script_learns_to_please(local, tmp_path):
    means = sentiment_classic.main(
        [
            *("--model_name", str(local / "gpt2"), "--reward_model", str(local / "distilbert")),
            *("--query_dataset", str(local / "imdb"), "--output_dir", str(tmp_path)),
            *("--max_steps", "12", "--batch_size", "16", "--mini_batch_size", "16"),
            *("--learning_rate", "3e-3", "--log_with", "tensorboard"),
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


def test_yaml_names_the_reward_beside_it():
    argv = ["--config", str(EXAMPLE / "gpt2-imdb.yaml"), "--output_dir", "unused"]
    (reward,) = parse_config("ppo", argv).reward_funcs
    assert (EXAMPLE.parents[1] / reward.partition(":")[0]).samefile(SENTIMENT)


def test_yaml_runs_through_rlhf_ppo(local, tmp_path):
    """Only names and sizes are changed."""
    config = parse_config(
        "ppo",
        [
            *("--config", str(EXAMPLE / "gpt2-imdb.yaml"), "--output_dir", str(tmp_path)),
            *("--model_name_or_path", str(local / "gpt2")),
            *("--dataset_name", str(local / "imdb")),
            *("--reward_funcs", f"{SENTIMENT}:{local / 'distilbert'}"),
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
