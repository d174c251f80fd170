"""`rlhf evaluate`: win rates and intervals by hand, their coverage by simulation, and real runs."""

import io
import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.cli import main
from rlhf.config.inference import EvaluateConfig
from rlhf.demo.base import write_jsonl
from rlhf.errors import UserError
from rlhf.inference.evaluate import judge_figures, run, show
from rlhf.rewards.scoring import Samples
from rlhf.rollout import Responses
from tests.rlhf.helpers.world import GOOD, WORDS

NAN = math.nan


def samples(completions: list[str], ended: list[bool] | None = None) -> Samples:
    count = len(completions)
    flags = torch.tensor(ended or [True] * count)
    blank = torch.zeros(count, 1, dtype=torch.long)
    responses = Responses(blank, blank.bool(), blank, blank.bool(), flags)
    return Samples(["p"] * count, completions, {}, responses)


# Figures


def test_figures_of_a_judge_by_hand():
    a, b = samples(["x"] * 6), samples(["xx", "yyyy", "y", "yyy", "yy", "y"])
    scores_a, scores_b = [1.0, 2.0, 3.0, NAN, 0.0, 1.0], [2.0, 4.0, 3.0, 9.0, NAN, 0.5]
    figures = judge_figures("judge", a, b, scores_a, scores_b)
    assert (figures["pairs"], figures["left_out"]) == (4, 2)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 1, 1)
    assert figures["win_rate"] == 2.5 / 4
    assert (figures["mean_a"], figures["mean_b"]) == (1.75, 2.375)
    assert figures["difference"] == 0.625
    # Longer by (1, 3, 0, 0), better by (1, 2, 0, -1/2): 4.5 / sqrt(6 * 3.6875).
    assert figures["length_correlation"] == pytest.approx(4.5 / math.sqrt(6 * 3.6875))
    assert figures["difference_interval"] is None  # of 4 pairs


def test_equal_answers_are_a_tie_whatever_the_rounding():
    a = samples(["same", "same", "x"], [True, True, True])
    b = samples(["same", "same", "y"], [True, False, True])
    figures = judge_figures("judge", a, b, [1.0, 1.0, 1.0], [1.0 + 1e-7, 2.0, 0.0])
    assert (figures["wins"], figures["ties"], figures["losses"]) == (1, 1, 1)


def test_swapped_policies_give_the_mirror_image():
    rng = random.Random(0)
    texts = [["w" * rng.randint(1, 9) for _ in range(40)] for _ in range(2)]
    scores = [[float(rng.randint(0, 3)) for _ in range(40)] for _ in range(2)]
    there = judge_figures("judge", *map(samples, texts), *scores)
    back = judge_figures("judge", *map(samples, texts[::-1]), *scores[::-1])
    assert back["win_rate"] == pytest.approx(1 - there["win_rate"])
    low, high = there["win_rate_interval"]
    assert back["win_rate_interval"] == pytest.approx((1 - high, 1 - low))
    low, high = there["difference_interval"]
    assert back["difference_interval"] == pytest.approx((-high, -low))
    assert back["length_correlation"] == pytest.approx(there["length_correlation"])


def test_a_judge_that_scores_no_pair_is_named():
    with pytest.raises(UserError, match="judge shy scored no pair"):
        judge_figures("shy", samples(["x"]), samples(["y"]), [1.0], [NAN])


# Runs

JUDGES = f"""
def good(completions):
    return [sum(text.split().count(word) for word in {GOOD}) for text in completions]

def review(completions):
    return [text.find(".") == len(text) - 1 for text in completions]

def silent(completions):
    return [None] * len(completions)

def bad(completions):
    raise RuntimeError("quota")

def shy(completions):
    return [None if row % 2 else 1.0 for row in range(len(completions))]
"""


@pytest.fixture
def config(world, tmp_path):
    (tmp_path / "judges.py").write_text(JUDGES)

    def make(**changes) -> EvaluateConfig:
        defaults = {
            "policies": [str(world / "llama"), str(world / "gpt2")],
            "reward_funcs": [f"{tmp_path / 'judges.py'}:good"],
            "dataset_name": str(world / "texts.jsonl"),
            "output_file": str(tmp_path / "evaluation.json"),
            "num_prompts": 60,
            "response_length": 8,
            "overwrite": True,
        }
        return EvaluateConfig(**defaults | changes)

    return make


@pytest.fixture
def renumbered(world, tmp_path) -> str:
    """The world's Llama with other ids for the same words."""
    model = AutoModelForCausalLM.from_pretrained(world / "llama")
    words = [*WORDS[3:], *WORDS[:3]]
    order = torch.tensor([WORDS.index(word) for word in words])
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data = layer.weight.data[order]
    count = len(words)
    ids = {"pad_token_id": count - 3, "bos_token_id": count - 2, "eos_token_id": count - 1}
    model.config.update(ids)
    model.generation_config.update(**ids)
    model.save_pretrained(tmp_path / "renumbered")
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(tmp_path / "renumbered")
    return str(tmp_path / "renumbered")


def test_equal_policies_tie_on_every_prompt(config, world, capsys):
    same = [str(world / "llama")] * 2
    rewards = [str(world / "llama-reward"), *config().reward_funcs]
    figures = run(config(policies=same, reward_funcs=rewards))
    assert list(figures["judges"]) == ["llama-reward", "good"]
    for judge in figures["judges"].values():
        assert (judge["pairs"], judge["ties"], judge["win_rate"]) == (60, 60, 0.5)
        assert judge["difference_interval"] == (0.0, 0.0)
    assert figures["kl_b_a"] == 0
    assert figures["answers"]["a"] == figures["answers"]["b"]
    out = capsys.readouterr().out
    assert (
        "judge good  A " in out
        and "B wins 0.500 [0.470, 0.530]  with length -  pairs 60  ties 60" in out
    )


def test_a_policy_that_was_trained_wins(config, world, trained_sft):
    """The judge asks for what the data has: a full stop at the end, and nowhere else."""
    judge = f"{config().reward_funcs[0].rpartition(':')[0]}:review"
    policies = [str(world / "llama"), str(trained_sft)]
    there = run(config(policies=policies, reward_funcs=[judge]))
    figures = there["judges"]["review"]
    assert figures["win_rate_interval"][0] > 0.6
    assert figures["difference_interval"][0] > 0.3
    assert there["kl_b_a"] > 1
    assert there["answers"]["b"]["ended"] > there["answers"]["a"]["ended"]
    back = run(config(policies=policies[::-1], reward_funcs=[judge]))["judges"]["review"]
    assert back["win_rate"] == pytest.approx(1 - figures["win_rate"])
    assert (back["wins"], back["losses"]) == (figures["losses"], figures["wins"])


def test_the_files_hold_what_the_figures_come_from(config, tmp_path):
    judges = [*config().reward_funcs, f"{tmp_path / 'judges.py'}:shy"]
    figures = run(config(reward_funcs=judges))
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(figures))
    lines = (tmp_path / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) == figures["prompts"] == 60
    for side in ("a", "b"):
        answers = [pair[side] for pair in pairs]
        good = [sum(map(answer["completion"].split().count, GOOD)) for answer in answers]
        assert [answer["scores"]["good"] for answer in answers] == good
        assert figures["judges"]["good"][f"mean_{side}"] == pytest.approx(fmean(good))
        assert figures["answers"][side]["tokens"] == pytest.approx(
            fmean(answer["tokens"] for answer in answers)
        )
        assert figures["answers"][side]["ended"] == pytest.approx(
            fmean(answer["ended"] for answer in answers)
        )
    better = [p["b"]["scores"]["good"] - p["a"]["scores"]["good"] for p in pairs]
    assert figures["judges"]["good"]["wins"] == sum(d > 0 for d in better) > 0
    assert pairs[1]["a"]["scores"]["shy"] is None
    assert figures["judges"]["shy"]["left_out"] == 30


@pytest.mark.parametrize(
    ("names", "scored", "error"),
    [
        (["bad", "good"], [], "raised RuntimeError"),
        (["good", "bad"], ["good"], "raised RuntimeError"),
        (["good", "silent"], ["good", "silent"], "judge silent scored no pair"),
    ],
)
def test_a_judge_that_fails_costs_neither_answers_nor_other_scores(
    config, tmp_path, capsys, names, scored, error
):
    def answers() -> list[dict]:
        text = (tmp_path / "evaluation.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    (tmp_path / "evaluation.json").write_text("the figures of other answers")
    with pytest.raises(UserError, match=error):
        run(config(reward_funcs=[f"{tmp_path / 'judges.py'}:{name}" for name in names]))
    assert not (tmp_path / "evaluation.json").exists()
    assert capsys.readouterr().out.endswith(f"\nanswers: {tmp_path / 'evaluation.jsonl'}\n")
    kept = answers()
    run(config())
    for pair, expected in zip(kept, answers(), strict=True):
        for side in ("a", "b"):
            good = expected[side]["scores"]["good"]
            all_scores = {"good": good, "silent": None}
            expected[side]["scores"] = {name: all_scores[name] for name in scored}
        assert pair == expected


@pytest.mark.parametrize("name", ["evaluation.jsonl", "evaluation.json"])
def test_the_data_set_is_never_replaced(config, tmp_path, name):
    data = tmp_path / name
    write_jsonl(data, [{"prompt": "film"}])
    with pytest.raises(UserError, match=rf"output_file .*{name} must not be dataset_name"):
        run(config(dataset_name=str(data)))
    assert json.loads(data.read_text()) == {"prompt": "film"}


@pytest.fixture
def printed(monkeypatch):
    """What `show` prints of a judge of this name, by way of rich, to such a file."""

    def printed(name: str, isatty: bool, **environment: str) -> tuple[str, str]:
        both = samples(["x"] * 5), samples(["y"] * 5)
        file = io.StringIO()
        file.isatty = lambda: isatty
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(
            "rlhf.inference.evaluate.Console",
            lambda **options: Console(file=file, width=99, _environ=environment, **options),
        )
        answers = {"tokens": 1.0, "characters": 1.0, "ended": 1.0}
        show(
            {
                "judges": {name: judge_figures(name, *both, [0.0] * 5, [1.0] * 5)},
                "answers": {"a": answers, "b": answers},
                "policies": {"a": "A", "b": "B"},
                "kl_b_a": None,
            }
        )
        return file.getvalue()

    return printed


def test_a_judges_name_is_no_markup(printed):
    assert "rm[v2]" in printed("rm[v2]", isatty=True, TERM="xterm")


def test_a_table_is_for_a_terminal_only(printed, capsys):
    assert printed("good", isatty=False, TERM="xterm", FORCE_COLOR="1") == ""
    assert "judge good  A 0.000" in capsys.readouterr().out


def test_judges_read_text_where_vocabularies_differ(config, world, renumbered):
    """Nearly greedy answers of the same model are the same words, so a reward model that knows
    only one numbering of them gives the same scores."""
    figures = run(
        config(
            policies=[str(world / "llama"), renumbered],
            reward_funcs=[str(world / "llama-reward")],
            temperature=1e-3,
        )
    )
    judge = figures["judges"]["llama-reward"]
    assert judge["ties"] > 55
    assert judge["mean_b"] == pytest.approx(judge["mean_a"], abs=0.02)
    assert judge["mean_a"] != 0
    assert figures["kl_b_a"] is None


def test_policies_with_other_tokens_get_the_prompts_of_the_first(config, world, tmp_path):
    """Of data with texts the prompts are their first tokens: here words, and there letters."""
    letters = ["<pad>", "<bos>", "<eos>", "<unk>", *"abdefgiklmnoprstuw. "]
    whole = Tokenizer(models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    whole.decoder = decoders.Fuse()
    spelling = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(letters), num_attention_heads=1, **small)
    ).save_pretrained(tmp_path / "speller")
    spelling.save_pretrained(tmp_path / "speller")
    there = [str(world / "llama"), str(tmp_path / "speller")]
    first, second = (
        prompts_of(config(policies=policies, num_prompts=9)) for policies in (there, there[::-1])
    )
    texts = [json.loads(line)["text"] for line in (world / "texts.jsonl").open()][:9]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, first, strict=True))
    assert all(text.startswith(prompt) for text, prompt in zip(texts, second, strict=True))
    assert all(len(prompt.split()) >= 2 for prompt in first)
    assert all(2 <= len(prompt) <= 8 for prompt in second)


def prompts_of(config: EvaluateConfig) -> list[str]:
    run(config)
    lines = Path(config.output_file + "l").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--policies", "x"], ["policies must name two policies, got ['x']"]),
        (["--policies", "nowhere/at/all", "nowhere/at/all"], ["no folder 'nowhere/at/all'"]),
        (["--reward_funcs", "judges.py:none"], ["judges.py has no function 'none'"]),
        (["--reward_funcs", "judges.py:silent"], ["judge silent scored no pair"]),
        (["--output_file=x.jsonl"], ["output_file must end in .json, got 'x.jsonl'"]),
        (["--output_file=there.json"], ["output_file there.jsonl exists", "--overwrite"]),
        (["--policies", "reward", "reward"], ["reward is a Llama", "a reward model or a critic"]),
        (["--num_prompts=0"], ["num_prompts must be >= 1, got 0"]),
        (["--response_length=64"], ["64 positions", "lower max_prompt_length or response_length"]),
    ],
)
def test_wrong_options(world, tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges.py").write_text(JUDGES)
    (tmp_path / "reward").symlink_to(world / "llama-reward")
    write_jsonl(tmp_path / "there.jsonl", [{}])
    argv = ["evaluate", "--policies", str(world / "llama"), str(world / "gpt2")]
    argv += ["--output_file=out.json", f"--dataset_name={world / 'prompts.jsonl'}"]
    argv += ["--response_length=4", "--reward_funcs=judges.py:good"]
    named = {option.partition("=")[0] for option in options}
    argv = [option for option in argv if option.partition("=")[0] not in named - {"--policies"}]
    if "--policies" in named:
        del argv[1:4]
    assert main([*argv, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rlhf evaluate: error: ")
    assert all(part in error for part in expected), error
    assert not (tmp_path / "out.json").exists()


def test_a_judge_is_needed(config, capsys):
    argv = ["evaluate", "--dataset_name=prompts.jsonl", "--output_file=x.json"]
    assert main([*argv, "--policies", "no/folder", "no/folder"]) == 2
    assert "error: missing --reward_funcs: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"reward_funcs must name a judge, got \[\]"):
        config(reward_funcs=[])
