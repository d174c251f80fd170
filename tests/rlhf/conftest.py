"""A world of ten words: reviews of two to four words that end with a full stop."""

import random
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.demo.base import write_jsonl
from rlhf.models.loading import load_scorer
from rlhf.reward_model import train_reward
from rlhf.run.state import save_model
from rlhf.sft import train_sft

GOOD, BAD = ("good", "fine", "great"), ("bad", "dull", "weak")
WORDS = ("<pad>", "<bos>", "<eos>", "film", "plot", "is", ".", *GOOD, *BAD)


def review(rng: random.Random, words: tuple[str, ...] = GOOD + BAD) -> str:
    opinions = " ".join(rng.choice(words) for _ in range(rng.randint(1, 3)))
    return f"{rng.choice(('film', 'plot'))} is {opinions} ."


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """A shell that starts the tests in the background has them, and what they start, ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_tokenizer() -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_world(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Untrained models `llama`, `gpt2`, `llama-reward`, `gpt2-reward`, and every stage's data."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            **special,
        )
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=64, **special)
    )
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
        scorer = load_scorer(str(path / name), tokenizer)
        save_model(path / f"{name}-reward", scorer, tokenizer)

    rng = random.Random(0)
    write_jsonl(path / "texts.jsonl", [{"text": review(rng)} for _ in range(400)])
    write_jsonl(
        path / "pairs.jsonl",
        [
            {"prompt": "", "chosen": review(rng, GOOD), "rejected": review(rng, BAD)}
            for _ in range(200)
        ],
    )
    prompts = ("film", "plot is", "film is good")
    write_jsonl(path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])


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
