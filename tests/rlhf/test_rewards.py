"""Each kind of reward by its values, their weighted sum, and what is said of wrong ones."""

import copy
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig
from rlhf.data.loaders import Prompts, load_rankings
from rlhf.data.padding import pad
from rlhf.demo.base import train_tokenizer, write_jsonl
from rlhf.errors import UserError
from rlhf.ppo.trainer import PPOTrainer
from rlhf.rewards.kinds import ModelReward
from rlhf.rewards.loading import check_rewards, critic_path, load_rewards
from rlhf.rewards.scoring import Samples, score_samples
from rlhf.rollout import Responses, decode_responses

EOS = 2
WORDS = ("film", "plot", "is", "good", "fine", "great", "bad")
PROMPTS = ("film is", "plot", "film is good", "plot is")
# "good .", "bad", "fine great .", "dull .", of which the second and the last were cut.
RESPONSES = ([7, 6, EOS], [10], [8, 9, 6, EOS], [11, 6])
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


@pytest.fixture(scope="session")
def samples(tokenizer) -> Samples:
    prompt_ids, prompt_mask = pad(tokenizer(list(PROMPTS)).input_ids, 0, "left")
    tokens, mask = pad([*RESPONSES], 0)
    responses = Responses(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        tokens=tokens,
        mask=mask,
        ended=torch.tensor([True, False, True, False]),
    )
    completions = decode_responses(tokenizer, responses)
    return Samples(list(PROMPTS), completions, {"label": [1, 0, 1, 0]}, responses)


@pytest.fixture(scope="session")
def config(world):
    def make(*reward_funcs, **changes) -> PPOConfig:
        defaults = {
            "model_name_or_path": str(world / "llama"),
            "dataset_name": str(world / "prompts.jsonl"),
            "output_dir": "unused",
            "reward_funcs": [str(source) for source in reward_funcs],
            "per_device_eval_batch_size": 3,
        }
        return PPOConfig(**defaults | changes)

    return make


@pytest.fixture
def score(config, tokenizer, samples):
    """Scores of rewards from Python; any other samples and configuration by keyword."""

    def score(*reward_funcs, samples=samples, **changes):
        settings = config(*range(len(reward_funcs)), **changes)
        rewards = load_rewards(settings, tokenizer, list(reward_funcs))
        return score_samples(rewards, samples)

    return score


@pytest.fixture(scope="session")
def other_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ("<end>", "<unk>", "<start>", "<user>", "<assistant>", ".", "dull", *WORDS)
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $0", special_tokens=[("<start>", vocabulary.index("<start>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", bos_token="<start>")


@pytest.fixture(scope="session")
def other_model(other_tokenizer, tmp_path_factory):
    """A reward model with six positions and a vocabulary of its own, whose pad token is EOS."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(other_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=6,
            num_labels=1,
            pad_token_id=0,
        )
    )
    path = tmp_path_factory.mktemp("other") / "reward"
    model.save_pretrained(path)
    other_tokenizer.save_pretrained(path)
    return path


def alone(model, ids: list[int]) -> float:
    """The head's output at the last of these tokens, in a pass without padding."""
    with torch.no_grad():
        return model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def assert_user_error(pattern: str, function, *args, **kwargs) -> UserError:
    """The whole of the message, which is one line, matches."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert re.fullmatch(pattern, message), message
    return caught.value


def length(completions):
    return [float(len(text.split())) for text in completions]


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


@pytest.mark.parametrize("name", ["llama-reward", "gpt2-reward"])
def test_reward_model_scores_the_token_ids_and_normalises(
    config, tokenizer, samples, world, tmp_path, name
):
    model = AutoModelForSequenceClassification.from_pretrained(world / name).eval()
    model.config.reward_mean, model.config.reward_std = 0.5, 4.0
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    rewards = load_rewards(config(tmp_path / name, reward_weights=[3]), tokenizer)
    scores = score_samples(rewards, samples)
    rows = zip(tokenizer(list(PROMPTS)).input_ids, RESPONSES, strict=True)
    expected = torch.tensor([(alone(model, prompt + ids) - 0.5) / 4 for prompt, ids in rows])
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores.parts[name], expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores.scores, 3 * expected, atol=1e-6, rtol=1e-4)


def test_reward_model_with_another_tokenizer_reads_the_text_in_its_own_tokens(
    config, tokenizer, samples, other_model, other_tokenizer
):
    rewards = load_rewards(config(other_model), tokenizer)
    scores = score_samples(rewards, samples).parts["reward"]
    model = AutoModelForSequenceClassification.from_pretrained(other_model).eval()
    # EOS where the response ended by itself; BOS and the last five tokens of the third.
    texts = [
        "<start> film is good . <end>",
        "<start> plot bad",
        "<start> good fine great . <end>",
        "<start> plot is dull .",
    ]
    ids = other_tokenizer(texts, add_special_tokens=False).input_ids
    assert len(ids[2]) == 6
    expected = torch.tensor([alone(model, before_end(row)) for row in ids])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def before_end(ids: list[int]) -> list[int]:
    """Where a model's EOS is its pad token transformers reads the score before it; so do we."""
    return ids[:-1] if ids[-1] == 0 else ids


# The second closes no turn, so that EOS follows only where the response ended by itself.
CLOSING = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end>\n' }}{% endfor %}"
OPEN = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (
            CLOSING,
            [
                "<user> film is <end> <assistant> good . <end>",
                "<user> plot <end> <assistant> bad <end>",
                "<user> film is good <end> <assistant> fine great . <end>",
                "<user> plot is <end> <assistant> dull . <end>",
            ],
        ),
        (
            OPEN,
            [
                "<user> film is <assistant> good . <end>",
                "<user> plot <assistant> bad",
                "<user> film is good <assistant> fine great . <end>",
                "<user> plot is <assistant> dull .",
            ],
        ),
    ],
)
def test_reward_model_with_another_tokenizer_reads_conversations_in_its_template(
    config, tokenizer, samples, other_model, other_tokenizer, template, texts
):
    [reward] = load_rewards(config(other_model), tokenizer)
    reward.tokenizer.chat_template = template
    scores = score_samples([reward], samples._replace(prompts=MESSAGES)).scores
    model = AutoModelForSequenceClassification.from_pretrained(other_model).eval()
    ids = other_tokenizer(texts, add_special_tokens=False).input_ids
    expected = torch.tensor([alone(model, before_end(row[-6:])) for row in ids])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("template", [CLOSING.replace("<end>", "<eos>"), "{{ messages }}"])
def test_tokenized_anew_an_ended_response_is_what_a_reward_model_is_trained_on(
    config, tokenizer, samples, tmp_path, conversational, template
):
    torch.manual_seed(2)
    own = train_tokenizer(PROMPTS, 280)
    own.chat_template = template
    path = tmp_path / "reward"
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(own),
            num_attention_heads=2,
            max_position_embeddings=512,
            num_labels=1,
            pad_token_id=0,
            **size,
        )
    ).save_pretrained(path)
    own.save_pretrained(path)

    prompts, answers = list(PROMPTS), samples.completions
    if conversational:
        prompts = MESSAGES
        answers = [[{"role": "assistant", "content": answer}] for answer in answers]
    rows = [
        {"prompt": prompt, "ranking": [answer, answer]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    settings = RewardConfig(model_name_or_path="", dataset_name="", output_dir="unused")
    trained_on = load_rankings(settings, str(tmp_path / "data.jsonl"), "train", own)
    assert {ranking.answers[0][-1] for ranking in trained_on} == {own.eos_token_id}
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = torch.tensor([alone(model, ranking.answers[0]) for ranking in trained_on])

    responses = samples.responses._replace(ended=torch.ones(4, dtype=torch.bool))
    rewards = load_rewards(config(path), tokenizer)
    scores = score_samples(rewards, samples._replace(prompts=prompts, responses=responses)).scores
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


@pytest.fixture
def same_words(world, tokenizer, tmp_path):
    """A reward model with the policy's vocabulary, and these changes of its tokenizer."""

    def make(**changes):
        path = tmp_path / "reward"
        model = AutoModelForSequenceClassification.from_pretrained(world / "llama-reward").eval()
        own = copy.deepcopy(tokenizer)
        for name, value in changes.items():
            setattr(own, name, value)
        model.save_pretrained(path)
        own.save_pretrained(path)
        return model, path

    return make


@pytest.mark.parametrize(
    ("changes", "prompt", "ids"),
    [
        ({}, "film", [3, *RESPONSES[0]]),
        ({"eos_token": "weak"}, "film", [3, *RESPONSES[0][:-1], 12]),
        ({"bos_token": "<pad>"}, "", [0, *RESPONSES[0]]),
    ],
)
def test_a_reward_model_with_the_policys_words_reads_its_own_eos_and_bos(
    config, tokenizer, same_words, changes, prompt, ids
):
    model, path = same_words(**changes)
    prompt_ids = torch.tensor([tokenizer(prompt).input_ids or [1]])
    tokens = torch.tensor([RESPONSES[0]])
    masks = [torch.ones_like(x, dtype=torch.bool) for x in (prompt_ids, tokens)]
    responses = Responses(prompt_ids, masks[0], tokens, masks[1], ended=torch.tensor([True]))
    samples = Samples([prompt], decode_responses(tokenizer, responses), {}, responses)
    rewards = load_rewards(config(path), tokenizer)
    scores = score_samples(rewards, samples).scores
    torch.testing.assert_close(scores, torch.tensor([alone(model, ids)]), atol=1e-6, rtol=1e-4)
    assert critic_path(rewards) == str(path)


@pytest.mark.parametrize(
    ("template", "reads_anew"),
    [(None, False), ("{{ 'film plot' }}", False), ("{{ 'weak weak' }}", True)],
)
def test_a_reward_model_with_another_chat_template_reads_conversations_in_it(
    config, tokenizer, samples, same_words, template, reads_anew
):
    policys = copy.deepcopy(tokenizer)
    policys.chat_template = "{{ 'film plot' }}"
    model, path = same_words(chat_template=template)
    rewards = load_rewards(config(path), policys)
    given = [
        prompt + ids
        for prompt, ids in zip(tokenizer(list(PROMPTS)).input_ids, RESPONSES, strict=True)
    ]
    weak = [[12, 12, EOS], [12, 12], [12, 12, EOS], [12, 12]]
    for prompts, rows in ((list(PROMPTS), given), (MESSAGES, weak if reads_anew else given)):
        scores = score_samples(rewards, samples._replace(prompts=prompts)).scores
        expected = torch.tensor([alone(model, row) for row in rows])
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def test_a_chat_template_that_refuses_is_an_error(config, tokenizer, samples, other_model):
    [reward] = load_rewards(config(other_model), tokenizer)
    reward.tokenizer.chat_template = "{{ raise_exception('no\nsuch role') }}"
    assert_user_error(
        "reward reward, prompt 'film is': the chat template does not take these messages: "
        "TemplateError: no such role",
        *(score_samples, [reward], samples._replace(prompts=MESSAGES)),
    )


def data(prompts=PROMPTS, /, **columns) -> Prompts:
    return Prompts([[3]] * len(prompts), list(prompts), columns)


def test_a_chat_template_that_is_missing_is_told_before_training(
    config, tokenizer, other_model, world
):
    # The second reads the policy's token ids, and so needs none.
    rewards = load_rewards(config(other_model, world / "llama-reward"), tokenizer)
    check_rewards(rewards, data(), 64)
    assert_user_error(
        "reward reward has no chat template for a conversational data set: set its tokenizer's "
        "chat_template, or use plain prompts",
        *(check_rewards, rewards, data(MESSAGES), 64),
    )
    check_rewards(rewards[1:], data(MESSAGES), 64)
    rewards[0].tokenizer.chat_template = CLOSING
    check_rewards(rewards, data(MESSAGES), 64)


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


def test_the_critic_starts_from_the_first_reward_model_with_the_policys_tokenizer(
    config, tokenizer, world, other_model
):
    paths = [f"{length.__module__}:length", other_model, world / "gpt2-reward"]
    rewards = load_rewards(config(*paths, world / "llama-reward"), tokenizer)
    assert [reward.name for reward in rewards] == [
        "length",
        "reward",
        "gpt2-reward",
        "llama-reward",
    ]
    assert critic_path(rewards) == str(world / "gpt2-reward")
    assert critic_path(rewards[:2]) is None


def test_a_reward_model_must_have_positions_for_the_longest_sequence(
    config, tokenizer, world, other_model
):
    rewards = load_rewards(config(other_model, world / "llama-reward"), tokenizer)
    check_rewards(rewards, data(), 64)
    assert_user_error(
        "sequences of up to 65 tokens do not fit the model's 64 positions: lower max_prompt_length "
        r"or response_length \(reward llama-reward\)",
        *(check_rewards, rewards, data(), 65),
    )


class Module(nn.Module):
    """Sums the ids of real tokens, in dropout if it trains."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape[0] <= 3 and not torch.is_grad_enabled()
        assert attention_mask.dtype == torch.long
        scores = self.dropout((input_ids * attention_mask).float()).sum(1) * self.scale
        return self.shape(scores)


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


def divide(completions):
    """A function that raises on purpose."""
    return [1 / (len(text) - 4) for text in completions]


SAMPLE = "prompt 'plot', completion 'bad'"
FINITE = r"a score must be finite \(or None, to say nothing of the sample\)"
COLUMN = (
    r"reward <lambda> returned scores of shape \(4, 1\): return one number for each completion "
    r"\(squeeze it\), or one number for each token"
)
NUMBER = "a score must be a number, None, or a list with a number for each token"


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (
            divide,
            r"reward divide raised ZeroDivisionError: .*division by zero \(test_rewards.py, "
            r"line \d+\)",
        ),
        (
            lambda **_: [1, 2, 3],
            r"reward <lambda> returned 3 scores for 4 completions: it must return one for each "
            r"\(None where it has none\)",
        ),
        (
            lambda **_: 1.0,
            "reward <lambda> must return a list with one score for each completion, got float",
        ),
        (
            lambda **_: {"a": 1},
            "reward <lambda> returned a dict without the key .*",
        ),
        (lambda **_: [1, "x", 3, 4], f"reward <lambda> gave 'x' for {SAMPLE}: {NUMBER}"),
        (lambda **_: [1, [[2]], 3, 4], rf"reward <lambda> gave \[2\] for {SAMPLE}: {NUMBER}"),
        (lambda **_: [1, math.nan, 3, 4], f"reward <lambda> gave nan for {SAMPLE}: {FINITE}"),
        (lambda **_: [1, -math.inf, 3, 4], f"reward <lambda> gave -inf for {SAMPLE}: {FINITE}"),
        (lambda **_: [1, 1e39, 3, 4], rf"reward <lambda> gave 1e\+39 for {SAMPLE}: {FINITE}"),
        (lambda **_: [1, [math.nan], 3, 4], f"reward <lambda> gave nan for {SAMPLE}: {FINITE}"),
        (
            lambda **_: [1, [2, 3], 3, 4],
            rf"reward <lambda> returned 2 token scores for 1 tokens \({SAMPLE}\): it must return "
            "one for each of completion_ids",
        ),
        (
            lambda **_: [[1], [2], [3], [4]],
            r"reward <lambda> returned 1 token scores for 3 tokens \(.*\): it must return one for "
            r"each of completion_ids, or a number in place of the list \(squeeze it\)",
        ),
        (lambda **_: torch.ones(4, 1), COLUMN),
        (lambda **_: np.ones((4, 1)), COLUMN),
        (
            lambda **_: sys.exit(3),
            r"reward <lambda> raised SystemExit: 3 \(test_rewards.py, line \d+\)",
        ),
        (
            Module(lambda x: x[:-1]),
            r"reward Module must return a tensor \(3,\) for 3 rows, or an object with logits "
            r"\(3, 1\), got \(2,\)",
        ),
        (Module(lambda x: None), r"reward Module must return a tensor \(3,\) .*, got NoneType"),
        (Module(lambda x: x / 0), f"reward Module gave inf for prompt .*: {FINITE}"),
        (
            Module(lambda x: x.nothing),
            r"reward Module raised AttributeError: .*no attribute 'nothing' .*",
        ),
    ],
)
def test_a_wrong_reward_is_named_in_one_line(score, function, pattern):
    error = assert_user_error(pattern, score, function)
    if function is divide:
        assert isinstance(error.__cause__, ZeroDivisionError)


def test_a_user_s_interrupt_is_no_error_of_the_reward(score):
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def test_a_reward_model_that_gives_nan_is_named_with_its_sample(score, world):
    model = AutoModelForSequenceClassification.from_pretrained(world / "gpt2-reward")
    model.score.weight.data.fill_(math.nan)
    assert_user_error(
        "reward GPT2ForSequenceClassification gave nan for prompt 'film is', completion 'good .': "
        + FINITE,
        *(score, model),
    )


def test_long_samples_are_shortened_to_one_line(score, samples):
    samples = samples._replace(
        prompts=[[{"role": "user", "content": "a\nb " * 50}]] * 4, completions=["c" * 61] * 4
    )
    assert_user_error(
        r"reward <lambda> gave nan for prompt '(a b ){14}a\.\.\.', completion 'c{57}\.\.\.': "
        + FINITE,
        *(score, lambda **_: [math.nan] * 4),
        samples=samples,
    )


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("{path}/none.py:score", "reward file .*none.py does not exist: give file.py:function"),
        (
            "no_such_module:score",
            "cannot import no_such_module for a reward: ModuleNotFoundError: "
            "No module named 'no_such_module': give a module of the current folder or an installed "
            "one, or file.py:function",
        ),
        (
            "math.nothing:score",
            "cannot import math.nothing .*: give a module of the current folder .*",
        ),
        (":", "a reward must be module:function or file.py:function, got ':'"),
        (":score", "a reward must be module:function or file.py:function, got ':score'"),
        ("{path}/good.py:", "a reward must be module:function or .*, got '.*good.py:'"),
        ("{path}/empty.py:score", ".*empty.py has no function 'score': it has none"),
        ("{path}/exits.py:score", r"cannot import .*exits.py .*: SystemExit: 3 \(.*, line 2\)"),
        (
            "{path}/lonely.py:score",
            r"cannot import .*lonely.py for a reward: ModuleNotFoundError: No module named "
            r"'no_such_module' \(lonely.py, line 1\)",
        ),
        (
            "{path}/relative.py:score",
            r"cannot import .*relative.py for a reward: ImportError: attempted relative import .* "
            r"\(relative.py, line 1\): give package.module:function, as seen from the folder that "
            "holds the package",
        ),
        ("{path}/good.py:scoer", r".*good.py has no function 'scoer': did you mean 'score'\?"),
        ("{path}/good.py:xyz", ".*good.py has no function 'xyz': it has score"),
        (
            "{path}/good.py:number",
            "a reward must be a function, an nn.Module or a reward model, got 3",
        ),
        ("builtins:int", "a reward must be a function, .*, got <class 'int'>"),
        ("{path}/good.py", "reward .*good.py is a file: give a reward model's folder, or .*"),
        (
            "{path}/broken.py:score",
            r"cannot import .*broken.py for a reward: NameError: .* \(broken.py, line 2\)",
        ),
        (
            "{path}/syntax.py:score",
            r"cannot import .*syntax.py for a reward: SyntaxError: .* \(syntax.py, line 1\)",
        ),
        ("{path}/nowhere", r"there is no folder .*nowhere.*"),
        ("{path}", "cannot open the folder .*"),
        ("{world}/llama", ".* is not a reward model, it has no scalar head: run rlhf reward"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_named_in_one_line(
    config, tokenizer, world, tmp_path, source, pattern
):
    write(tmp_path / "good.py", "number = 3\n\ndef score(prompts): return [0] * len(prompts)")
    write(tmp_path / "broken.py", "\nundefined")
    write(tmp_path / "syntax.py", "def")
    write(tmp_path / "empty.py", "")
    write(tmp_path / "exits.py", "import sys\nsys.exit(3)")
    write(tmp_path / "lonely.py", "import no_such_module")
    write(tmp_path / "relative.py", "from . import good")
    source = source.format(path=tmp_path, world=world)
    for _ in range(2):  # A module that failed is not known the second time.
        assert_user_error(pattern, load_rewards, config(source), tokenizer)


def test_an_encoder_s_folder_is_refused(config, tokenizer, tmp_path):
    size = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**size, intermediate_size=16, num_labels=1))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert_user_error(
        ".*bert is a BertForSequenceClassification, whose score is not read at the last token: "
        "give a decoder's, or call it in a reward function of yours",
        *(load_rewards, config(tmp_path / "bert"), tokenizer),
    )


def test_there_is_one_weight_for_each_reward_from_python(config, tokenizer):
    assert_user_error(
        r"reward_weights must have one weight for each of 2 reward_funcs, got \[1.0\]",
        *(load_rewards, config(reward_weights=[1.0]), tokenizer, [length, length]),
    )
