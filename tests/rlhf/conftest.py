"""Models and data of the world, and stages that were trained on them."""

import signal
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.demo.base import write_jsonl
from rlhf.reward_model import train_reward
from rlhf.sft import train_sft
from tests.rlhf.helpers.world import make_tokenizer, make_world


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """A shell that starts the tests in the background has them, and what they start, ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("world")
    make_world(path, tokenizer)
    return path


@pytest.fixture(scope="session")
def sft_config(world):
    def make(**changes) -> SFTConfig:
        defaults = {
            "model_name_or_path": str(world / "llama"),
            "dataset_name": str(world / "texts.jsonl"),
            "per_device_train_batch_size": 20,
            "learning_rate": 1e-2,
            "num_train_epochs": 4,
            "save_steps": 0,
            "report_to": "none",
        }
        return SFTConfig(**defaults | changes)

    return make


@pytest.fixture(scope="session")
def reward_config(world, trained_sft):
    def make(**changes) -> RewardConfig:
        defaults = {
            "model_name_or_path": str(trained_sft),
            "dataset_name": str(world / "pairs.jsonl"),
            "eval_dataset_name": str(world / "pairs.jsonl"),
            "per_device_train_batch_size": 20,
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "save_steps": 0,
            "report_to": "none",
        }
        return RewardConfig(**defaults | changes)

    return make


@pytest.fixture(scope="session")
def ppo_config(world, trained_sft, trained_reward):
    def make(**changes) -> PPOConfig:
        defaults = {
            "model_name_or_path": str(trained_sft),
            "reward_funcs": [str(trained_reward)],
            "dataset_name": str(world / "prompts.jsonl"),
            "per_device_train_batch_size": 8,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "total_episodes": 32,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "response_length": 8,
            "save_steps": 0,
            "report_to": "none",
        }
        return PPOConfig(**defaults | changes)

    return make


@pytest.fixture(scope="session")
def trained_sft(sft_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "sft"
    train_sft(sft_config(output_dir=str(path)))
    return path


@pytest.fixture(scope="session")
def trained_reward(reward_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "reward"
    train_reward(reward_config(output_dir=str(path)))
    return path


@pytest.fixture
def save(tmp_path):
    """Writes rows of data to a file; gives its path."""

    def save(*rows: dict) -> str:
        write_jsonl(tmp_path / "data.jsonl", rows)
        return str(tmp_path / "data.jsonl")

    return save


@pytest.fixture
def options(world, tmp_path):
    """Options of a command that would run."""

    def make(stage: str, **changes) -> list[str]:
        data = {"sft": "texts", "reward": "pairs", "ppo": "prompts"}[stage]
        values = {
            "model_name_or_path": world / "llama",
            "dataset_name": world / f"{data}.jsonl",
            "output_dir": tmp_path / "out",
            "report_to": "none",
        }
        if stage == "ppo":
            values |= {
                "reward_funcs": world / "llama-reward",
                "total_episodes": 16,
                "response_length": 4,
            }
        values |= changes
        return [stage, *(f"--{key}={value}" for key, value in values.items())]

    return make
