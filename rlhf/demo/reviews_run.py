"""All of RLHF on the built-in reviews: SFT, reward model and PPO, from nothing."""

import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.demo import reviews
from rlhf.demo.base import PPO_SETTINGS, Stopwatch, make_base, write_jsonl
from rlhf.demo.evaluation import answer, compare
from rlhf.inference.policy import Policy
from rlhf.ppo.train import train_ppo
from rlhf.reward_model import train_reward
from rlhf.sft import train_sft

ANSWERS_PER_PROMPT = 4


@dataclass(frozen=True)
class ReviewsSizes:
    """How much of everything the demo on the built-in reviews uses."""

    num_reviews: int = 5000
    num_rankings: int = 4000
    num_heldout_rankings: int = 300
    num_prompts: int = 4000
    num_eval_prompts: int = 512
    vocab_size: int = 1536
    hidden_size: int = 128
    num_layers: int = 2
    response_length: int = 72
    sft_steps: int = 700
    reward_steps: int = 800
    total_episodes: int = 3840


def run_reviews(output_dir: Path, seed: int, bf16: bool, sizes: ReviewsSizes) -> dict:
    """SFT, reward model and PPO on the built-in reviews; returns the summary.

    The preferences are labellers' rankings of the SFT model's own answers. The gold score, from
    which no model learns, is logged as PPO goes on (a reward of weight 0), and judges the policy
    before and after on fresh prompts.
    """
    rng = random.Random(seed)
    timed = Stopwatch()
    base, data = output_dir / "base", output_dir / "data"
    sft, reward, ppo = output_dir / "sft", output_dir / "reward", output_dir / "ppo"
    data.mkdir()

    seen: set[str] = set()

    def openings(count: int) -> list[str]:
        """Openings that have not been given out yet."""
        fresh = []
        while len(fresh) < count:
            opening = reviews.write_opening(rng)
            if opening not in seen:
                seen.add(opening)
                fresh.append(opening)
        return fresh

    with timed("world"):
        texts = [opening + reviews.write_body(rng) for opening in openings(sizes.num_reviews)]
        write_jsonl(data / "reviews.jsonl", ({"text": text} for text in texts))
        write_jsonl(data / "prompts.jsonl", ({"prompt": p} for p in openings(sizes.num_prompts)))
        make_base(base, texts, sizes.vocab_size, sizes.hidden_size, sizes.num_layers, seed)

    with timed("sft"):
        train_sft(
            SFTConfig(
                model_name_or_path=str(base),
                dataset_name=str(data / "reviews.jsonl"),
                output_dir=str(sft),
                max_steps=sizes.sft_steps,
                per_device_train_batch_size=32,
                learning_rate=3e-3,
                warmup_ratio=0.1,
                lr_scheduler_type="cosine",
                seed=seed,
                bf16=bf16,
                logging_steps=50,
                save_steps=0,
            )
        )

    ppo_config = PPOConfig(
        model_name_or_path=str(sft),
        reward_funcs=[str(reward), "rlhf.demo.reviews:gold"],
        reward_weights=[1.0, 0.0],
        dataset_name=str(data / "prompts.jsonl"),
        output_dir=str(ppo),
        total_episodes=sizes.total_episodes,
        response_length=sizes.response_length,
        missing_eos_penalty=1.0,
        seed=seed,
        bf16=bf16,
        **PPO_SETTINGS,
    )
    with timed("labelling"):
        author = Policy(str(sft), ppo_config)
        prompts = openings(sizes.num_rankings + sizes.num_heldout_rankings)
        repeated = [prompt for prompt in prompts for _ in range(ANSWERS_PER_PROMPT)]
        answers = answer(author, repeated, "labelling").completions
        rankings = []
        for i, prompt in enumerate(prompts):
            drawn = answers[i * ANSWERS_PER_PROMPT : (i + 1) * ANSWERS_PER_PROMPT]
            order = reviews.rank([prompt + text for text in drawn], rng)
            rankings.append({"prompt": prompt, "ranking": [drawn[j] for j in order]})
        write_jsonl(data / "rankings.jsonl", rankings[: sizes.num_rankings])
        write_jsonl(data / "heldout_rankings.jsonl", rankings[sizes.num_rankings :])

    with timed("reward"):
        reward_metrics = train_reward(
            RewardConfig(
                model_name_or_path=str(sft),
                dataset_name=str(data / "rankings.jsonl"),
                eval_dataset_name=str(data / "heldout_rankings.jsonl"),
                output_dir=str(reward),
                max_steps=sizes.reward_steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=128,
                learning_rate=6e-4,
                warmup_ratio=0.05,
                lr_scheduler_type="cosine",
                seed=seed,
                bf16=bf16,
                logging_steps=50,
                save_steps=0,
            )
        )
    with timed("ppo"):
        train_ppo(ppo_config)

    with timed("evaluation"):
        prompts = openings(sizes.num_eval_prompts)
        write_jsonl(data / "eval_prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
        before, after, kl = compare(author, Policy(str(ppo), ppo_config), prompts)

    def mean_gold(texts: list[str]) -> float:
        return statistics.fmean(map(reviews.gold_score, texts))

    return {
        "reward": {"accuracy": reward_metrics["eval/accuracy"]},
        "ppo": {"gold_before": mean_gold(before), "gold_after": mean_gold(after), "kl": kl},
        "stage_seconds": timed.seconds,
    }
