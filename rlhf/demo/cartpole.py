"""CartPole-v1 of gymnasium: PPO on an environment instead of text, on one page.

A pole on a cart is kept upright by pushes to the left or right; each step pays 1, an episode
terminates when the pole falls and is truncated after 500 steps. Two actions are a vocabulary of
two: `ppo_loss` takes the logits of the actor as it takes those of a language model. The settings
are those of CleanRL's ppo.py (Huang et al., 2022, JMLR 23), save for more environments with shorter
rollouts, a higher learning rate for the larger minibatches, and the value of the observation at
which an episode was truncated, which there counts as 0.
"""

import sys
import time
from statistics import fmean

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from ppo_kernels import (
    AdvantagesAndReturns,
    gae,
    masked_whiten,
    ppo_loss,
    token_logprobs,
    value_loss,
)
from rlhf.errors import UserError

try:
    import gymnasium
except ImportError as error:
    raise UserError(
        'task cartpole needs gymnasium, which is not installed: pip install "ppo-kernels[gym]"'
    ) from error

# Mean return, of 500, that a run must reach.
THRESHOLD = 475.0

TOTAL_STEPS = 500_000
NUM_ENVS = 32
NUM_STEPS = 64
NUM_EPOCHS = 4
NUM_MINIBATCHES = 4
LEARNING_RATE = 1e-3
ADAM_EPSILON = 1e-5
GAMMA = 0.99
LAM = 0.95
CLIP = 0.2
ENTROPY_COEF = 0.01
VF_COEF = 0.5
MAX_GRAD_NORM = 0.5
LAST_EPISODES = 100


def make_network(num_outputs: int, output_gain: float) -> nn.Sequential:
    """4 -> 64 -> 64 -> num_outputs with tanh between, orthogonal weights and biases of 0."""

    def linear(num_inputs: int, num_outputs: int, gain: float) -> nn.Linear:
        layer = nn.Linear(num_inputs, num_outputs)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
        return layer

    hidden = [linear(4, 64, 2**0.5), nn.Tanh(), linear(64, 64, 2**0.5), nn.Tanh()]
    return nn.Sequential(*hidden, linear(64, num_outputs, output_gain))


def make_environments() -> gymnasium.vector.VectorEnv:
    """NUM_ENVS environments that step together, as arrays of numpy. After an episode's end the next
    step only starts the next one: the action is ignored and the reward is 0."""
    return gymnasium.make_vec("CartPole-v1", NUM_ENVS, vectorization_mode="vector_entry_point")


def advantages_and_returns(
    rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor, counted: Tensor
) -> AdvantagesAndReturns:
    """GAE over the steps of N environments, of which several episodes may be in a row.

    Args:
        rewards, terminated, truncated: (N, T), of the step from observation t to t + 1.
        values: (N, T + 1) of the observations. The one that ends an episode has its own place in
            the row: the step from there to the first of the next episode is no step of either.
        counted: (N, T) bool, False at the steps from one episode to the next.
    """
    # Both ends cut the recursion, but only a fallen pole is worth nothing from there on: where time
    # was up while it stood, what it would have earned is the value of that observation.
    rewards = torch.where(truncated & ~terminated, rewards + GAMMA * values[:, 1:], rewards)
    return gae(
        rewards,
        values[:, :-1],
        counted,
        gamma=GAMMA,
        lam=LAM,
        dones=terminated | truncated,
        bootstrap_values=values[:, -1],
    )


def run_cartpole(seed: int, total_steps: int = TOTAL_STEPS) -> dict[str, float]:
    """Trains from scratch for `total_steps` steps, those between two episodes among them.

    Returns `return`, the mean return of the last 100 episodes that ended in training, whose actions
    are sampled, as CleanRL's published figures are; and `seconds`. The same seed gives the same
    return. The generator of torch is seeded.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    actor, critic = make_network(2, 0.01), make_network(1, 1.0)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, eps=ADAM_EPSILON, fused=True)
    num_updates = total_steps // (NUM_ENVS * NUM_STEPS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates)

    envs = make_environments()
    observation, _ = envs.reset(seed=seed)
    ended = np.zeros(NUM_ENVS, dtype=bool)
    running, episode_returns = np.zeros(NUM_ENVS), []

    for _ in track(range(num_updates), f"cartpole, seed {seed}", disable=not sys.stdout.isatty()):
        steps = []
        with torch.no_grad():
            for _ in range(NUM_STEPS):
                before, counted = torch.from_numpy(observation), ~ended
                action = torch.multinomial(actor(before).softmax(-1), 1)[:, 0]
                observation, reward, terminated, truncated, _ = envs.step(action.numpy())
                arrays = (reward, terminated, truncated, counted)
                steps.append((before, action, *map(torch.from_numpy, arrays)))

                ended = terminated | truncated
                running += reward
                episode_returns += running[ended].tolist()
                running[ended] = 0
            observations, actions, rewards, terminated, truncated, counted = (
                torch.stack(column, dim=1) for column in zip(*steps, strict=True)
            )
            last = torch.from_numpy(observation)[:, None]
            values = critic(torch.cat([observations, last], dim=1))[..., 0]
            advantages, returns = advantages_and_returns(
                rewards, values, terminated, truncated, counted
            )
            old_logprobs = token_logprobs(actor(observations), actions)
            batch = [
                x[counted]
                for x in (observations, actions, old_logprobs, values[:, :-1], advantages, returns)
            ]

        for _ in range(NUM_EPOCHS):
            for rows in torch.randperm(len(batch[0])).chunk(NUM_MINIBATCHES):
                part = [x[rows] for x in batch]
                observations, actions, old_logprobs, old_values, advantages, returns = part
                policy = ppo_loss(
                    actor(observations),
                    actions,
                    old_logprobs,
                    masked_whiten(advantages),
                    clip_low=CLIP,
                    clip_high=CLIP,
                    entropy_coef=ENTROPY_COEF,
                )
                values = critic(observations)[:, 0]
                loss = (
                    policy.loss + VF_COEF * value_loss(values, old_values, returns, clip=CLIP).loss
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                optimizer.step()
        schedule.step()

    return {
        "return": fmean(episode_returns[-LAST_EPISODES:]),
        "seconds": time.perf_counter() - start,
    }
