"""Reward functions as people write them: async, with dicts, and careless of the whole process."""

import asyncio
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf.data.padding import pad
from rlhf.errors import UserError
from rlhf.ppo.train import train_ppo
from rlhf.rewards.functions import call, load_function
from rlhf.rewards.kinds import FunctionReward
from rlhf.rewards.scoring import Samples, score_apart
from rlhf.rollout import Responses
from rlhf.run.generators import random_state, seed_all, set_random_state


@pytest.fixture
def score():
    """The scores that a function gives to two completions, of two tokens and of one."""
    ids, mask = pad([[3, 2], [4]], 0)
    responses = Responses(ids[:, :0], mask[:, :0], ids, mask, torch.tensor([True, False]))
    samples = Samples(["a", "b"], ["x y", "z"], {}, responses)

    def score(function) -> list[float]:
        return score_apart(FunctionReward("f", 1.0, function), samples).tolist()

    return score


# Async


async def doubled(completions):
    await asyncio.sleep(0)
    return [2.0 * len(text) for text in completions]


class Client:
    """Holds what belongs to one event loop, as clients with open connections do."""

    async def __call__(self, completions):
        loop = asyncio.get_running_loop()
        assert loop is self.__dict__.setdefault("loop", loop)
        return await asyncio.gather(*(doubled([text]) for text in completions))


def test_async_functions_are_awaited(score):
    client = Client()
    for _ in range(2):
        assert score(doubled) == [6, 2]
        assert call("client", client, {"completions": ["x"]}) == [[2.0]]


def test_async_functions_are_awaited_where_a_loop_runs_already(score):
    async def notebook():
        return score(doubled)

    assert asyncio.run(notebook()) == [6, 2]


def test_an_error_of_an_async_function_names_its_place(score):
    async def deeper():
        await asyncio.sleep(0)
        raise KeyError("ours")

    async def fails(completions):
        await asyncio.gather(deeper())

    line = deeper.__code__.co_firstlineno + 2
    with pytest.raises(
        UserError, match=rf"^reward f raised KeyError: 'ours' \(test_functions.py, line {line}\)$"
    ):
        score(fails)


# Dicts


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([{"score": 1, "reason": "short"}, {"score": 2.5}], [1, 2.5]),
        ([{"score": [1.0, 2.0]}, 4], [3, 4]),
        ([{"score": torch.tensor(1.5)}, {"score": np.float32(2)}], [1.5, 2]),
        ({"score": [1, 2], "length": [3, 4]}, [1, 2]),
        ({"score": torch.tensor([1.0, 2.0])}, [1, 2]),
        ({"score": [{"score": 1}, {"score": 2}]}, [1, 2]),
    ],
)
def test_a_dict_is_taken_for_its_score(score, returned, expected):
    assert score(lambda completions: returned) == expected


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([{"scores": 1}, {"score": 1}], r"without the key 'score', it has \['scores'\]"),
        ({"reward": [1, 2]}, r"without the key 'score', it has \['reward'\]"),
        ([{"score": {"a": 1}}, 1], "a score must be a number"),
        ([{"score": "x" * 999}, 1], "gave 'xxx.*\\.\\.\\. for prompt"),
        ([10**5000, 1], "gave <int: ValueError: Exceeds the limit"),
        ({"score": [1]}, "returned 1 scores for 2 completions"),
    ],
)
def test_a_dict_or_a_number_that_is_none_is_named(score, returned, message):
    with pytest.raises(UserError, match=message) as error:
        score(lambda completions: returned)
    assert len(str(error.value)) < 300


# What is the process's


def draw() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def test_a_function_draws_on_where_it_left_and_the_run_where_it_did():
    seed_all(3)
    expected = [draw() for _ in range(4)]
    seed_all(3)
    assert [call("f", draw, {}) for _ in range(2)] == expected[:2]
    state = random_state()
    assert draw() == expected[0]
    assert call("f", draw, {}) == expected[2]
    set_random_state(state)
    assert [call("f", draw, {}), draw()] == [expected[2], expected[0]]
    call("f", lambda: (random.seed(0), np.random.seed(0), torch.manual_seed(0)), {})
    assert draw() == expected[1]
    seed_all(3)
    assert call("f", draw, {}) == expected[0]


def test_a_function_keeps_its_folder_and_dtype_and_the_run_its_own(tmp_path, monkeypatch):
    for name in ("run", "functions", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "run")
    (tmp_path / "moves.py").write_text(
        "import os, torch\n"
        f"os.chdir({str(tmp_path / 'functions')!r})\n"
        "torch.set_default_dtype(torch.float64)\n"
        "def where(): return os.path.basename(os.getcwd()), torch.zeros(1).dtype\n"
        "def back(): os.chdir('../run'); torch.set_default_dtype(torch.float32)\n"
    )
    where = load_function(f"{tmp_path / 'moves.py'}:where")
    ours = ("run", torch.float32)
    for _ in range(2):
        assert where() == ours
        assert call("where", where, {}) == ("functions", torch.float64)
    with pytest.raises(UserError, match="raised ZeroDivisionError"):
        call("fails", lambda: os.chdir("../other") or 1 / 0, {})
    assert where() == ours and call("where", where, {}) == ("other", torch.float64)
    call("back", load_function(f"{tmp_path / 'moves.py'}:back"), {})
    # Who has not moved is where the run is, wherever that goes.
    monkeypatch.chdir(tmp_path)
    assert call("where", where, {})[0] == tmp_path.name


def test_a_careless_reward_does_not_change_the_run(world, ppo_config, tmp_path, monkeypatch):
    """It seeds, prints, and leaves the folder and the dtype changed, all paths being relative."""

    def careful(completions):
        return [float(len(text) % 5) for text in completions]

    def careless(completions):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        os.chdir("/")
        print("scoring \x1b[1m é")
        return careful(completions)

    monkeypatch.chdir(tmp_path)
    os.symlink(world, "world")
    for name, function in (("careful", careful), ("careless", careless)):
        config = ppo_config(
            model_name_or_path="world/llama",
            dataset_name="world/prompts.jsonl",
            reward_funcs=[],
            output_dir=name,
            report_to="tensorboard",
            save_steps=1,
            total_episodes=48,
        )
        train_ppo(config, [function])
        call("back", lambda: (os.chdir(tmp_path), torch.set_default_dtype(torch.float32)), {})
    one, other = (load_file(f"{name}/model.safetensors") for name in ("careful", "careless"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    files = [
        {path.name for path in (tmp_path / name).iterdir()} for name in ("careful", "careless")
    ]
    assert files[0] == files[1] and "report.html" in files[0]
