"""One iteration of PPO on a small model: responses, rewards, advantages, update.

On a GPU in bf16, with the backend that `auto` takes there.
"""

import random

import pytest
import torch

from rlhf.config import PPOConfig
from rlhf.models import load_scorer, set_score_normalisation
from rlhf.state import save_model
from rlhf.tasks.base import make_base, write_jsonl
from rlhf.trainer import PPOTrainer

NUM_RESPONSES = 64
PROMPT_LENGTH = 8
ROUNDS = 3


@pytest.fixture
def trainer(tmp_path, setting):
    """Four models of the demo's size, untrained: most responses then have the full length."""
    policy_path, reward_path = tmp_path / "policy", tmp_path / "reward"
    prompts_path = tmp_path / "prompts.jsonl"
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(500)]
    tokenizer = make_base(
        policy_path, texts, vocab_size=1536, hidden_size=128, num_layers=2, seed=0
    )
    scorer = load_scorer(str(policy_path), tokenizer)
    set_score_normalisation(scorer, torch.tensor([-1.0, 1.0]))
    save_model(reward_path, scorer, tokenizer)
    write_jsonl(prompts_path, ({"text": text} for text in texts))
    return PPOTrainer(
        PPOConfig(
            model_name_or_path=str(policy_path),
            reward_funcs=[str(reward_path)],
            dataset_name=str(prompts_path),
            text_prompt_length=[PROMPT_LENGTH, PROMPT_LENGTH],
            output_dir="",
            response_length=72,
            bf16=setting.name != "cpu",
            per_device_train_batch_size=NUM_RESPONSES // 2,
            num_mini_batches=2,
            num_ppo_epochs=2,
        )
    )


def test_ppo_iteration(benchmark, trainer):
    def iterate():
        rows = trainer.next_rows()
        responses = trainer.sample(trainer.prompts, rows, trainer.generator)
        batch = trainer.evaluate(rows, responses)
        return int(batch.responses.mask.sum()), trainer.update(batch)

    num_tokens, steps = benchmark.pedantic(iterate, rounds=ROUNDS, warmup_rounds=1)
    config = trainer.config
    assert len(steps) == config.num_ppo_epochs * config.num_mini_batches
    assert num_tokens > 0
    benchmark.extra_info |= {
        "op": "PPO iteration",
        "shape": [NUM_RESPONSES, config.response_length],
        "dtype": "bfloat16" if config.bf16 else "float32",
        "tokens_per_second": num_tokens / benchmark.stats.stats.median,
    }
