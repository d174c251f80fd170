"""PPO on CartPole-v1."""

import pytest
import torch

from rlhf.demo import cartpole
from rlhf.demo.cartpole import GAMMA, LAM, advantages_and_returns, run_cartpole

pytest.importorskip("gymnasium", reason='gymnasium is missing: pip install "ppo-kernels[gym]"')


def test_where_time_was_up_the_last_value_counts_and_where_the_pole_fell_it_does_not():
    """By hand, with γ = 0.99 and γλ = 0.9405, values (2, 3, 10, 4) and rewards of 1: a step that
    goes on has δ = (1.97, 7.9, -5.04)."""
    assert (GAMMA, LAM) == (0.99, 0.95)
    rows = {
        "goes on": ("...", (4.9418671, 3.15988, -5.04)),
        "time is up, then a new episode starts": (".T|", (9.39995, 7.9, 0.0)),
        "falls, then a new episode starts": (".F|", (0.089, -2.0, 0.0)),
        "falls, and the new episode goes on": ("F|.", (-1.0, 0.0, -5.04)),
        "time is up, and the new episode goes on": ("T|.", (1.97, 0.0, -5.04)),
        "falls as time is up, then a new episode starts": (".B|", (0.089, -2.0, 0.0)),
        "time is up at the last step": ("..T", (4.9418671, 3.15988, -5.04)),
        "falls at the last step": ("..F", (1.4390878, -0.5645, -9.0)),
    }
    ends, expected = zip(*rows.values(), strict=True)
    terminated, truncated, between = (
        torch.tensor([[step in kinds for step in row] for row in ends])
        for kinds in ("FB", "TB", "|")
    )
    values = torch.tensor([[2.0, 3.0, 10.0, 4.0]]).expand(len(rows), -1)
    result = advantages_and_returns(
        (~between).float(), values, terminated, truncated, counted=~between
    )
    expected = torch.tensor(expected)
    torch.testing.assert_close(result.advantages, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        result.returns[~between], (expected + values[:, :-1])[~between], rtol=0, atol=1e-5
    )


def test_environments_start_the_next_episode_in_a_step_of_its_own():
    envs = cartpole.make_environments()
    envs.reset(seed=0)
    actions = torch.ones(cartpole.NUM_ENVS, dtype=torch.long).numpy()
    for _ in range(30):  # always to the right: the pole falls soon
        observation, _, terminated, _, _ = envs.step(actions)
        if terminated.any():
            break
    assert (abs(observation[terminated, 2]) > 0.2).all()  # radians: this is where the pole fell
    observation, reward, again, _, _ = envs.step(actions)
    assert (reward == ~terminated).all() and not again[terminated].any()
    assert (abs(observation[terminated]) <= 0.05).all()


def test_a_short_training_is_far_better_than_chance():
    """Random actions return 22 on average."""
    assert run_cartpole(0, total_steps=49_152)["return"] > 120


def test_the_seed_decides_everything():
    first, again, other = (run_cartpole(seed, total_steps=5120)["return"] for seed in (1, 1, 2))
    assert first == again != other
