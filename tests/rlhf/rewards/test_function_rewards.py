"""Each kind of reward by its values, their weighted sum, and what is said of wrong ones."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from rlhf.demo.base import write_jsonl
from rlhf.ppo.trainer import PPOTrainer
from rlhf.rewards.kinds import ModelReward
from rlhf.rewards.loading import check_rewards, load_rewards
from rlhf.rewards.scoring import score_samples
from tests.rlhf.helpers.rewards import (
    MESSAGES,
    PROMPTS,
    RESPONSES,
    Module,
    assert_user_error,
    data,
    length,
    write,
)


def test_function_scores_are_what_it_returns(score):
    scores = score(length)
    assert scores.scores.tolist() == [2, 1, 3, 2]
    assert scores.token_scores.tolist() == [[0] * 4] * 4
    assert scores.parts["length"].tolist() == [2, 1, 3, 2]
    assert {x.dtype for x in (*scores[:2], scores.parts["length"])} == {torch.float32}


def test_rewards_are_weighted_and_summed_and_their_parts_are_not(score):
    def label(label, **others):
        return label

    scores = score(length, label, reward_weights=[0.5, -3])
    assert scores.scores.tolist() == [-2, 0.5, -1.5, 1]
    assert scores.parts["length"].tolist() == [2, 1, 3, 2]
    assert scores.parts["label"].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "make", [tuple, np.array, torch.tensor, lambda x: [np.float32(y) for y in x]]
)
def test_a_function_may_return_any_sequence_of_numbers(score, make):
    assert score(lambda **_: make([1.5, 2, 3, -4])).scores.tolist() == [1.5, 2, 3, -4]


def test_none_adds_nothing_and_is_nan_in_the_parts(score):
    scores = score(length, lambda **_: [None, 10, None, 0])
    assert scores.scores.tolist() == [2, 11, 3, 2]
    assert scores.parts["length"].tolist() == [2, 1, 3, 2]
    part = scores.parts["<lambda>"].tolist()
    assert (part[1], part[3]) == (10, 0)
    assert math.isnan(part[0]) and math.isnan(part[2])


def test_a_sample_without_any_score_is_an_error(score):
    assert_user_error(
        "every reward returned None for prompt 'film is good', completion 'fine great .': "
        "one must score it",
        score,
        *[lambda **_: [1, None, None, 2], lambda **_: [1, 2, None, None]],
    )


def test_token_scores_lie_on_the_tokens_of_the_response(score):
    def rising(completion_ids):
        return [[float(i) for i in range(1, len(ids) + 1)] for ids in completion_ids]

    scores = score(rising, length, reward_weights=[2, 1])
    assert scores.token_scores.tolist() == [[2, 4, 6, 0], [2, 0, 0, 0], [2, 4, 6, 8], [2, 4, 0, 0]]
    assert scores.scores.tolist() == [2, 1, 3, 2]
    assert scores.parts["rising"].tolist() == [6, 1, 10, 3]


def test_token_scores_may_be_none_or_one_number_for_some_samples(score):
    scores = score(lambda **_: [torch.ones(3), 5, None, (1, 2)], lambda **_: [0] * 4)
    assert scores.token_scores.tolist() == [[1, 1, 1, 0], [0] * 4, [0] * 4, [1, 2, 0, 0]]
    assert scores.scores.tolist() == [0, 5, 0, 0]


def test_a_function_is_given_what_its_signature_names(score):
    seen = {}

    def everything(**kwargs):
        seen["everything"] = kwargs
        return [0] * 4

    def some(completions, label, threshold=3):
        seen["some"] = (completions, label, threshold)
        return [0] * 4

    class Callable:
        def __call__(self, completion_ids):
            seen["instance"] = completion_ids
            return [0] * 4

    names = list(score(everything, some, Callable(), length, length).parts)
    assert names == ["everything", "some", "Callable", "length", "length_2"]
    completions = [" good .", " bad", " fine great .", " dull ."]
    assert seen["everything"] == {
        "prompts": list(PROMPTS),
        "completions": completions,
        "completion_ids": list(RESPONSES),
        "label": [1, 0, 1, 0],
    }
    assert seen["some"] == (completions, [1, 0, 1, 0], 3)
    assert seen["instance"] == list(RESPONSES)


def test_conversations_are_given_as_messages_that_a_function_may_change(score, samples):
    def spoil(prompts, completions):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt[0]["content"] += completion.pop()["content"]
        return [0] * 4

    def check(prompts, completions):
        assert prompts == MESSAGES
        assert completions[1] == [{"role": "assistant", "content": " bad"}]
        return [7] * 4

    scores = score(spoil, check, samples=samples._replace(prompts=MESSAGES))
    assert scores.scores.tolist() == [7] * 4


def test_functions_are_found_by_file_even_where_two_have_the_same_name(
    config, tokenizer, samples, tmp_path
):
    one = write(tmp_path / "one" / "score.py", "def score(prompts): return [1.0] * len(prompts)")
    two = write(tmp_path / "two" / "score.py", "def score(prompts): return [2.0] * len(prompts)")
    rewards = load_rewards(config(f"{one}:score", f"{two}:score"), tokenizer)
    parts = score_samples(rewards, samples).parts
    assert {name: part.tolist() for name, part in parts.items()} == {
        "score": [1] * 4,
        "score_2": [2] * 4,
    }


def test_functions_are_found_by_module_in_the_current_folder(
    config, tokenizer, samples, tmp_path, monkeypatch
):
    text = "from dataclasses import dataclass\n\n@dataclass\nclass Constant:\n    value: 'float'\n"
    text += (
        "    def __call__(self, prompts): return [self.value] * len(prompts)\n\nfive = Constant(5)"
    )
    write(tmp_path / "my_rewards.py", text)
    monkeypatch.chdir(tmp_path)
    for source in ("my_rewards:five", "my_rewards.py:five"):
        rewards = load_rewards(config(source), tokenizer)
        assert score_samples(rewards, samples).scores.tolist() == [5] * 4


def test_a_function_s_file_may_import_its_neighbours(config, tokenizer, samples, tmp_path):
    text = "from neighbour_of_rewards import five\n\ndef score(prompts): return [five] * 4"
    path = write(tmp_path / "folder" / "rewards.py", text)
    write(tmp_path / "folder" / "neighbour_of_rewards.py", "five = 5.0")
    rewards = load_rewards(config(f"{path}:score"), tokenizer)
    assert score_samples(rewards, samples).scores.tolist() == [5] * 4


def test_an_argument_that_the_data_lacks_is_told_before_training(config, tokenizer):
    def graded(completions, label, threshold=3, *args, **columns):
        return [0.0] * len(completions)

    rewards = load_rewards(config(0, 1), tokenizer, [length, graded])
    check_rewards(rewards, data(label=[1]), 64)
    assert_user_error(
        "reward graded needs the argument 'label', but it can be given only lable, prompts, "
        "completions, completion_ids: name one of them, or add such a column",
        *(check_rewards, rewards, data(lable=[1]), 64),
    )


def test_the_trainer_checks_rewards_against_training_and_evaluation_data(config, tmp_path):
    def graded(completions, label):
        return [0.0] * len(completions)

    train, evaluation = str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "film", "label": 1}])
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "film", "grade": 1}])
    PPOTrainer(config(0, dataset_name=train, response_length=8), [graded])
    pattern = "reward graded needs the argument 'label', but it can be given only grade, .*"
    for names in ({"dataset_name": evaluation}, {"eval_dataset_name": evaluation}):
        settings = config(0, **{"dataset_name": train, "response_length": 8} | names)
        assert_user_error(pattern, PPOTrainer, settings, [graded])


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_may_not_have_the_name_of_what_functions_are_given(config, tokenizer, world, name):
    rewards = load_rewards(config(0, 1), tokenizer, [str(world / "gpt2-reward"), length])
    assert_user_error(
        f"the data has a column '{name}', but reward functions such as length get something else "
        "by this name: rename it",
        *(check_rewards, rewards, data(**{name: [1]}), 64),
    )
    check_rewards(rewards[:1], data(**{name: [1]}), 64)


@pytest.mark.parametrize(
    "shape",
    [
        lambda x: x,
        lambda x: x[:, None],
        lambda x: SimpleNamespace(logits=x[:, None]),
        lambda x: x.bfloat16(),
    ],
)
def test_module_scores_prompt_and_response(score, shape):
    scores = score(Module(shape).train(), reward_weights=[10])
    assert scores.parts["Module"].tolist() == [23, 14, 40, 26]
    assert scores.scores.tolist() == [230, 140, 400, 260]


def test_a_sequence_classifier_from_python_is_a_reward_model(config, tokenizer, samples, world):
    model = AutoModelForSequenceClassification.from_pretrained(world / "gpt2-reward")
    settings = config(world / "gpt2-reward")
    [from_python] = load_rewards(settings, tokenizer, [model.train()])
    [from_folder] = load_rewards(settings, tokenizer)
    assert isinstance(from_python, ModelReward) and from_python.path is None
    expected = score_samples([from_folder], samples).scores
    assert torch.equal(score_samples([from_python], samples).scores, expected)


def test_an_encoder_from_python_is_a_module(score, samples):
    torch.manual_seed(0)
    size = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**size, intermediate_size=16, num_labels=1))
    with torch.no_grad():
        scores = score(model, per_device_eval_batch_size=4).scores
        x = samples.responses
        expected = model(input_ids=x.input_ids, attention_mask=x.attention_mask.long()).logits[:, 0]
    torch.testing.assert_close(scores, expected)
