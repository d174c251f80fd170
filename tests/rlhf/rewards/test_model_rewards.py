"""Reward models: their tokens, templates and lengths, and the critic that starts from one."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.config.training import RewardConfig
from rlhf.data.loaders import load_rankings
from rlhf.demo.base import train_tokenizer, write_jsonl
from rlhf.rewards.loading import check_rewards, critic_path, load_rewards
from rlhf.rewards.scoring import Samples, score_samples
from rlhf.rollout import Responses, decode_responses
from tests.rlhf.helpers.rewards import MESSAGES, PROMPTS, RESPONSES, assert_user_error, data, length
from tests.rlhf.helpers.world import EOS

WORDS = ("film", "plot", "is", "good", "fine", "great", "bad")


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
