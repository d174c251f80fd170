"""`rlhf demo`: the whole of RLHF in one command, on a world made on the spot or on labelled text."""

import random
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf.checkpoint import save_model
from rlhf.config import PPOConfig, RewardConfig, SFTConfig
from rlhf.ppo import train_ppo
from rlhf.reward import train_reward
from rlhf.sft import train_sft
from rlhf.tasks import reviews
from rlhf.tasks.base import small_llama, train_tokenizer, write_jsonl
from rlhf.tasks.evaluation import Sampler

RUN_FILE = "demo.yaml"
ANSWERS_PER_PROMPT = 4


@dataclass(frozen=True)
class ReviewsSizes:
    """How much of everything the demo on the built-in reviews uses."""

    num_reviews: int = 5000
    num_rankings: int = 2000
    num_heldout_rankings: int = 200
    num_eval_prompts: int = 512
    vocab_size: int = 1536
    hidden_size: int = 128
    num_layers: int = 2
    response_length: int = 72
    sft_steps: int = 500
    reward_steps: int = 500
    total_episodes: int = 6400


class Stopwatch:
    """Seconds of each part of a run, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_reviews(output_dir: Path, seed: int, sizes: ReviewsSizes) -> dict:
    """SFT, reward model and PPO on the built-in reviews; returns the summary.

    The preferences are labellers' rankings of the SFT model's own answers. The gold score, which
    no training sees, judges the policy before and after on fresh prompts.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    data, base = output_dir / "data", output_dir / "base"
    data.mkdir()
    timed = Stopwatch()

    with timed("world"):
        texts = ["".join(reviews.write_review(rng)) for _ in range(sizes.num_reviews)]
        write_jsonl(data / "reviews.jsonl", ({"text": text} for text in texts))
        tokenizer = train_tokenizer(texts, sizes.vocab_size)
        model = small_llama(
            tokenizer,
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            max_length=256,
        )
        save_model(base, model, tokenizer)

    with timed("sft"):
        train_sft(
            SFTConfig(
                model_name_or_path=str(base),
                dataset_name=str(data / "reviews.jsonl"),
                output_dir=str(output_dir / "sft"),
                max_steps=sizes.sft_steps,
                per_device_train_batch_size=32,
                learning_rate=3e-3,
                warmup_ratio=0.1,
                lr_scheduler_type="cosine",
                seed=seed,
                logging_steps=50,
            )
        )

    ppo_config = PPOConfig(
        model_name_or_path=str(output_dir / "sft"),
        reward_model_path=str(output_dir / "reward"),
        dataset_name=str(data / "prompts.jsonl"),
        output_dir=str(output_dir / "ppo"),
        total_episodes=sizes.total_episodes,
        response_length=sizes.response_length,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        num_mini_batches=2,
        num_ppo_epochs=2,
        learning_rate=3e-4,
        critic_learning_rate=1e-3,
        warmup_ratio=0.05,
        kl_coef=0.03,
        missing_eos_penalty=1.0,
        seed=seed,
    )

    def openings(count: int) -> list[str]:
        return [reviews.write_review(rng)[0] for _ in range(count)]

    with timed("labelling"):
        author = Sampler(output_dir / "sft", ppo_config, seed)
        num_prompts = sizes.num_rankings + sizes.num_heldout_rankings
        prompts = openings(num_prompts)
        answers = author.complete([p for p in prompts for _ in range(ANSWERS_PER_PROMPT)])
        rankings = []
        for i, prompt in enumerate(prompts):
            drawn = answers[i * ANSWERS_PER_PROMPT : (i + 1) * ANSWERS_PER_PROMPT]
            order = reviews.rank([prompt + answer for answer in drawn], rng)
            rankings.append({"prompt": prompt, "ranking": [drawn[j] for j in order]})
        write_jsonl(data / "rankings.jsonl", rankings[: sizes.num_rankings])
        write_jsonl(data / "rankings_heldout.jsonl", rankings[sizes.num_rankings :])
        write_jsonl(data / "prompts.jsonl", ({"prompt": p} for p in openings(4000)))

    with timed("reward"):
        reward_metrics = train_reward(
            RewardConfig(
                model_name_or_path=str(output_dir / "sft"),
                dataset_name=str(data / "rankings.jsonl"),
                eval_dataset_name=str(data / "rankings_heldout.jsonl"),
                output_dir=str(output_dir / "reward"),
                max_steps=sizes.reward_steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=128,
                learning_rate=2e-3,
                warmup_ratio=0.1,
                lr_scheduler_type="cosine",
                seed=seed,
                logging_steps=50,
            )
        )
    with timed("ppo"):
        train_ppo(ppo_config)

    with timed("evaluation"):
        prompts = openings(sizes.num_eval_prompts)
        before = author.complete(prompts)
        policy = Sampler(output_dir / "ppo", ppo_config, seed)
        responses = policy.sample(prompts)
        after = policy.decode(responses)
        kl = policy.kl(author, responses)

    def gold(answers: list[str]) -> float:
        pairs = zip(prompts, answers, strict=True)
        return statistics.fmean(reviews.gold_score(prompt + answer) for prompt, answer in pairs)

    return {
        "reward": {"accuracy": reward_metrics["eval/accuracy"]},
        "ppo": {"gold_before": gold(before), "gold_after": gold(after), "kl": kl},
        "stage_seconds": timed.seconds,
    }
