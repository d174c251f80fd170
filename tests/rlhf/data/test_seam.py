"""Where a prompt ends and its completion begins: the same text and tokens for every tokenizer."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.config.inference import GenerateConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.data.loaders import Prompts, load_prompts, load_rankings, load_texts
from rlhf.data.padding import pad
from rlhf.inference.generate import run as generate
from rlhf.inference.policy import text_prompts
from rlhf.rewards.loading import load_rewards
from rlhf.rewards.scoring import Samples
from rlhf.rollout import Responses, decode_responses
from tests.rlhf.helpers.tokenizer_kinds import KINDS, LOSSY, byte_level, sentencepiece

UNUSED = {"model_name_or_path": "unused", "dataset_name": "unused", "output_dir": "unused"}
PAIRS = [
    ("the film", " was good"),
    ("the film ", "was good"),
    ("the fil", "m was"),
    ("the film", "\n\nwas"),
    ("the end\n", "\nthe"),
    ("[INST] the film [/INST]", " was"),
    ("it is", " ."),
    ('he said "', " the"),
    ("it", "isn't"),
    ("a☃", "☃ b"),
    ("<s>the film", " was"),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind):
    return KINDS[kind]()


def ppo_config(**changes) -> PPOConfig:
    return PPOConfig(**UNUSED | {"reward_funcs": ["unused"]} | changes)


def exact(tokenizer, ids: list[int]) -> str:
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids, **options)


def answered(prompts: list[list[int]], tokens: list[list[int]], ended=True) -> Responses:
    prompt_ids, prompt_mask = pad(prompts, 2, "left")
    ids, mask = pad(tokens, 2)
    return Responses(prompt_ids, prompt_mask, ids, mask, torch.tensor([ended] * len(tokens)))


def test_the_film_was_is_no_filmwas(tokenizer):
    """Whatever the tokenizer: a response's text is what it adds to that of its prompt."""
    prompt = encode(tokenizer, "the film")
    whole = encode(tokenizer, "the film was good")
    assert whole[: len(prompt)] == prompt
    responses = answered([prompt], [[*whole[len(prompt) :], tokenizer.eos_token_id]])
    assert decode_responses(tokenizer, responses) == [" was good"]


def encode(tokenizer, text: str) -> list[int]:
    return text_prompts(ppo_config(), [text], tokenizer).ids[0]


def test_a_completion_continues_the_prompt_that_is_sampled_from(kind, tokenizer, save):
    """What is learnt follows the ids of the prompt alone, says the completion's text with no space
    more or less, and ends with one EOS."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    path = save(*rows)
    texts = load_texts(SFTConfig(**UNUSED), path, "train", tokenizer)
    prompts = load_prompts(ppo_config(), path, "train", tokenizer)
    assert len(texts) == len(PAIRS)
    eos = tokenizer.eos_token_id
    for text, start, (prompt, completion) in zip(texts, prompts.ids, PAIRS, strict=True):
        assert text.ids[: len(start)] == start
        assert text.learnt == [False] * len(start) + [True] * (len(text.ids) - len(start))
        end = text.ids[len(start) :]
        assert end.count(eos) == 1 and end[-1] == eos
        whole = tokenizer(prompt + completion).input_ids
        assert exact(tokenizer, text.ids) == exact(tokenizer, whole)
        if kind not in LOSSY and "☃" not in prompt:
            said = decode_responses(tokenizer, answered([start], [end]))
            assert said == [completion]


def test_where_no_token_covers_the_seam_the_ids_are_those_of_the_whole(tokenizer, save):
    path = save({"prompt": "the film", "completion": " was good"})
    (text,) = load_texts(SFTConfig(**UNUSED), path, "train", tokenizer)
    whole = tokenizer("the film was good").input_ids
    assert text.ids == whole + [tokenizer.eos_token_id] * (whole[-1] != tokenizer.eos_token_id)


def test_rankings_hold_what_a_reward_model_reads_of_a_policy(tokenizer, save):
    path = save(*({"prompt": a, "chosen": b, "rejected": b} for a, b in PAIRS))
    rankings = load_rankings(RewardConfig(**UNUSED), path, "train", tokenizer)
    rows = [{"prompt": a, "completion": b} for a, b in PAIRS]
    taught = load_texts(SFTConfig(**UNUSED), save(*rows), "train", tokenizer)
    assert [ranking.answers for ranking in rankings] == [[text.ids] * 2 for text in taught]


def test_bos_that_a_text_holds_is_not_written_twice(tokenizer, save):
    bos = tokenizer.bos_token_id
    prompts = load_prompts(ppo_config(), save({"prompt": "<s>the"}), "train", tokenizer)
    (text,) = load_texts(SFTConfig(**UNUSED), save({"text": "<s>the"}), "train", tokenizer)
    path = save({"chosen": "<s>the", "rejected": "<s>the"})
    (ranking,) = load_rankings(RewardConfig(**UNUSED), path, "train", tokenizer)
    for ids in (prompts.ids[0], text.ids, *ranking.answers):
        assert ids.count(bos) == 1 and ids[0] == bos


def test_eos_that_a_text_holds_stays_and_the_tokenizers_own_does_not(tokenizer, save):
    eos = tokenizer.eos_token_id
    rows = {"chosen": "the film</s>", "rejected": "the film"}
    config = RewardConfig(**UNUSED, append_eos=False)
    for row in (rows, {"prompt": "", **rows}):
        (ranking,) = load_rankings(config, save(row), "train", tokenizer)
        assert [answer.count(eos) for answer in ranking.answers] == [1, 0]


def test_an_empty_prompt_begins_a_text(kind, tokenizer, save):
    path = save({"prompt": "", "completion": "the film"})
    (text,) = load_texts(SFTConfig(**UNUSED), path, "train", tokenizer)
    assert text.ids[0] == tokenizer.bos_token_id
    bare = tokenizer("the film", add_special_tokens=False).input_ids
    assert text.ids[1:] == [*bare, tokenizer.eos_token_id]
    said = decode_responses(tokenizer, answered([text.ids[:1]], [text.ids[1:]]))
    # Only RoBERTa's decoder says the space that its encoder adds.
    assert said == [" the film" if kind == "roberta" else "the film"]


# Characters that are cut


def test_a_character_that_the_prompt_began_is_the_responses():
    for tokenizer in (byte_level(), sentencepiece(bos=False)):
        whole = tokenizer("a☃b").input_ids
        first = [len(exact(tokenizer, whole[:n])) for n in range(len(whole) + 1)].index(2)
        responses = answered([whole[:first]], [whole[first:]])
        assert decode_responses(tokenizer, responses) == ["☃b"]


def test_a_replacement_character_of_the_prompt_stays_there():
    for tokenizer in (byte_level(), sentencepiece()):
        prompt = tokenizer("the \N{REPLACEMENT CHARACTER}").input_ids
        whole = tokenizer("the \N{REPLACEMENT CHARACTER} film").input_ids
        responses = answered([prompt], [whole[len(prompt) :]])
        assert decode_responses(tokenizer, responses) == [" film"]


def test_a_stray_byte_spoils_no_character_of_the_prompt():
    """SentencePiece's decoder takes bytes in a row together, and gives none if one is wrong."""
    tokenizer = sentencepiece()
    prompt = tokenizer("the ☃").input_ids
    stray = tokenizer.convert_tokens_to_ids("<0xE2>")
    film = tokenizer("the film").input_ids[-1]
    said = decode_responses(tokenizer, answered([prompt], [[stray, film]]))
    assert said == ["\N{REPLACEMENT CHARACTER} film"]


# Cut prompts


def test_cut_prompts_keep_bos_and_are_counted(save, capsys):
    tokenizer = sentencepiece()
    path = save({"prompt": "the film was good"}, {"prompt": "the"}, {"prompt": "the plot was weak"})
    whole = load_prompts(ppo_config(), path, "train", tokenizer).ids
    assert capsys.readouterr().out == ""
    cut = load_prompts(ppo_config(max_prompt_length=3), path, "train", tokenizer).ids
    assert cut == [[1, *row[-2:]] if len(row) > 3 else row for row in whole]
    line = (
        f"{path}: 2 of 3 prompts have more than the 3 tokens of max_prompt_length and lose their "
        "beginning, a system prompt first\n"
    )
    assert capsys.readouterr().out == line
    assert load_prompts(ppo_config(max_prompt_length=1), path, "train", tokenizer).ids[0] == [
        whole[0][-1]
    ]
    capsys.readouterr()
    (ids,) = text_prompts(ppo_config(max_prompt_length=3), ["the film was"], tokenizer).ids
    assert ids[0] == 1 and len(ids) == 3
    assert capsys.readouterr().out.startswith("prompt: 1 of 1 prompts have more than the 3 tokens")


def test_rankings_cut_from_the_left_keep_bos_and_are_counted(save, capsys):
    tokenizer = sentencepiece()
    path = save({"prompt": "the film was", "chosen": " good", "rejected": ""})
    ((chosen, rejected), _), *_ = load_rankings(
        RewardConfig(**UNUSED, max_length=4), path, "train", tokenizer
    )
    assert (len(chosen), chosen[0], chosen[-1]) == (4, 1, 2)
    assert capsys.readouterr().out == (
        f"{path}: 2 of 2 answers have more than the 4 tokens of max_length and lose their "
        "beginning, a system prompt first\n"
    )
    assert (len(rejected), rejected[0], rejected[-1]) == (4, 1, 2)


def test_a_seam_in_the_middle_of_a_word_is_told_where_a_tokenizer_cannot_write_it(save, capsys):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "film": 2, "</s>": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    path = save({"prompt": "the", "completion": "film"}, {"prompt": "the", "completion": " film"})
    texts = load_texts(SFTConfig(**UNUSED), path, "train", tokenizer)
    assert [text.ids for text in texts] == [[1, 2, 3]] * 2
    assert capsys.readouterr().out == (
        f"{path}: 1 of 2 answers gain a space where the prompt ends, for the tokenizer cannot go "
        "on there, in the middle of a word\n"
    )


# Files and reward models


def tiny(cls, tokenizer, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    return cls(config)


def test_generate_writes_prompt_and_completion_that_belong_together(tmp_path, monkeypatch):
    tokenizer = sentencepiece()
    tiny(LlamaForCausalLM, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ids = tokenizer("the film was good").input_ids
    prompt = tokenizer("the film").input_ids
    given = answered([prompt], [ids[len(prompt) :]])
    monkeypatch.setattr("rlhf.inference.policy.sample_responses", lambda *_: given)
    config = GenerateConfig(
        model_name_or_path=str(tmp_path / "model"),
        prompt=["the film"],
        output_file=str(tmp_path / "out.jsonl"),
    )
    generate(config)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["prompt"] + row["completion"] == "the film was good"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The ids that a reward model with this tokenizer reads of a policy's responses."""

    def read(own, policy, samples: Samples) -> list[list[int]]:
        tiny(LlamaForSequenceClassification, own, num_labels=1).save_pretrained(tmp_path / "reward")
        own.save_pretrained(tmp_path / "reward")
        seen = []
        take = lambda score, responses, config: seen.append(responses.unpadded)  # noqa: E731
        monkeypatch.setattr("rlhf.rewards.kinds._score_in_parts", take)
        [reward] = load_rewards(ppo_config(reward_funcs=[str(tmp_path / "reward")]), policy)
        ids, _ = samples.responses.unpadded
        reward.check(Prompts(ids, samples.prompts, samples.columns), 99)
        reward(samples)
        return [start + end for start, end in zip(*seen[0], strict=True)]

    return read


def test_a_reward_model_with_other_tokens_reads_what_it_is_trained_on(tokenizer, save, read):
    policy = byte_level()
    texts = [a for a, _ in PAIRS]
    prompts = text_prompts(ppo_config(), texts, policy).ids
    ends = [[*policy(b).input_ids, policy.eos_token_id] for _, b in PAIRS]
    samples = Samples.of(policy, Prompts(prompts, texts, {}), answered(prompts, ends))
    assert samples.completions == [b for _, b in PAIRS]
    path = save(*({"prompt": a, "chosen": b, "rejected": b} for a, b in PAIRS))
    rankings = load_rankings(RewardConfig(**UNUSED), path, "train", tokenizer)
    assert read(tokenizer, policy, samples) == [ranking.answers[0] for ranking in rankings]


@pytest.mark.parametrize("bos", [True, False])
def test_a_reward_model_gets_bos_if_its_own_tokenizer_writes_it(read, bos):
    """It has the policy's vocabulary, EOS and BOS, and still another habit."""
    policy, own = byte_level(bos=not bos), byte_level(bos=bos)
    prompts = policy(["the film", "the"]).input_ids
    ends = [[*byte_level()(text).input_ids, 2] for text in (" was", " end")]
    samples = Samples.of(policy, Prompts(prompts, ["the film", "the"], {}), answered(prompts, ends))
    expected = own(["the film was", "the end"]).input_ids
    assert read(own, policy, samples) == [[*row, 2] for row in expected]


def test_only_rows_of_which_the_tokenizers_think_otherwise_are_tokenized_anew(read):
    """The policy's own ids stay where a tokenizer would choose others for the same text."""
    policy, own = byte_level(), byte_level()
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    texts = [" the film", "the film"]
    prompts = policy(texts).input_ids
    spelt = [[policy.convert_tokens_to_ids(x) for x in ("Ġ", "w", "a", "s")]] * 2
    samples = Samples.of(policy, Prompts(prompts, texts, {}), answered(prompts, spelt, False))
    assert samples.completions == [" was"] * 2
    anew = own("the film was").input_ids
    assert read(own, policy, samples) == [prompts[0] + spelt[0], anew]


def test_a_reward_model_with_a_pad_token_more_reads_the_policys_ids(read):
    """Such a token a reward model gets where the policy's EOS pads."""
    policy, own = byte_level(), byte_level()
    own.add_special_tokens({"pad_token": "<|pad|>"})
    prompts = policy(["the film"]).input_ids
    spelt = [[policy.convert_tokens_to_ids(x) for x in ("Ġ", "w", "a", "s")]]
    samples = Samples.of(
        policy, Prompts(prompts, ["the film"], {}), answered(prompts, spelt, False)
    )
    assert read(own, policy, samples) == [prompts[0] + spelt[0]]
