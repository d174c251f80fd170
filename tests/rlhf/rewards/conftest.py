"""Responses, and what scores them."""

import pytest
import torch

from rlhf.config.ppo import PPOConfig
from rlhf.data.padding import pad
from rlhf.rewards.loading import load_rewards
from rlhf.rewards.scoring import Samples, score_samples
from rlhf.rollout import Responses, decode_responses
from tests.rlhf.helpers.rewards import PROMPTS, RESPONSES


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
