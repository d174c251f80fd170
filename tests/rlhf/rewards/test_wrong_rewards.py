"""A wrong reward is named, with its sample, in one line."""

import math
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from rlhf.rewards.loading import load_rewards
from tests.rlhf.helpers.rewards import Module, assert_user_error, length, write


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
            r"reward divide raised ZeroDivisionError: .*division by zero \(test_wrong_rewards.py, "
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
            r"reward <lambda> raised SystemExit: 3 \(test_wrong_rewards.py, line \d+\)",
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
