"""All of RLHF on labelled texts: SFT, reward model and PPO, from nothing."""

import random
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.ppo import PPOConfig
from rlhf.config.training import RewardConfig, SFTConfig
from rlhf.demo import labelled
from rlhf.demo.base import PPO_SETTINGS, Stopwatch, make_base, write_jsonl
from rlhf.demo.evaluation import compare
from rlhf.demo.judge import Judge
from rlhf.inference.policy import Policy
from rlhf.ppo.train import train_ppo
from rlhf.reward_model import train_reward
from rlhf.sft import train_sft

PARTNERS = 4


@dataclass(frozen=True)
class LabelledSizes:
    """How much of everything the demo on labelled text uses."""

    num_prompts: int = 4000
    num_eval_prompts: int = 500
    vocab_size: int = 3000
    hidden_size: int = 128
    num_layers: int = 2
    min_response_length: int = 8
    response_length: int = 24
    sft_epochs: float = 8
    reward_epochs: float = 1
    total_episodes: int = 12800


def run_labelled(
    examples: list[labelled.Example],
    output_dir: Path,
    seed: int,
    bf16: bool,
    sizes: LabelledSizes,
) -> dict:
    """SFT, reward model and PPO on labelled texts; returns the summary.

    The judge, trained on texts that no stage sees, says which share of the policy's texts is
    positive: as PPO goes on (a reward `gold` of weight 0), and before and after on other prompts.
    """
    rng = random.Random(seed)
    timed = Stopwatch()
    base, data = output_dir / "base", output_dir / "data"
    sft, reward, ppo = output_dir / "sft", output_dir / "reward", output_dir / "ppo"
    data.mkdir()

    with timed("judge"):
        parts = labelled.split(examples, rng)
        judge = Judge(parts.judge)
        judge_accuracy = judge.accuracy(parts.heldout)
        print(f"judge: accuracy {judge_accuracy:.3f} on {len(parts.heldout)} held-out texts")

    with timed("data"):
        texts = [example.text for example in parts.train]
        tokenizer = make_base(
            base, texts, sizes.vocab_size, sizes.hidden_size, sizes.num_layers, seed
        )
        pairs = labelled.preference_pairs(parts.train, PARTNERS, rng)
        heldout_pairs = labelled.preference_pairs(parts.heldout, PARTNERS, rng)
        half = len(parts.heldout) // 2
        prompts = labelled.prompts(parts.heldout[:half], sizes.num_prompts, tokenizer, rng)
        write_jsonl(data / "texts.jsonl", ({"text": text} for text in texts))
        write_jsonl(data / "pairs.jsonl", pairs)
        write_jsonl(data / "heldout_pairs.jsonl", heldout_pairs)
        write_jsonl(data / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))

    with timed("sft"):
        train_sft(
            SFTConfig(
                model_name_or_path=str(base),
                dataset_name=str(data / "texts.jsonl"),
                output_dir=str(sft),
                num_train_epochs=sizes.sft_epochs,
                per_device_train_batch_size=32,
                max_length=128,
                learning_rate=2e-3,
                warmup_ratio=0.1,
                lr_scheduler_type="cosine",
                weight_decay=0.1,
                seed=seed,
                bf16=bf16,
                logging_steps=50,
                save_steps=0,
            )
        )
    with timed("reward"):
        reward_metrics = train_reward(
            RewardConfig(
                model_name_or_path=str(sft),
                dataset_name=str(data / "pairs.jsonl"),
                eval_dataset_name=str(data / "heldout_pairs.jsonl"),
                output_dir=str(reward),
                num_train_epochs=sizes.reward_epochs,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=128,
                max_length=128,
                append_eos=False,
                learning_rate=5e-4,
                warmup_ratio=0.1,
                weight_decay=0.1,
                seed=seed,
                bf16=bf16,
                logging_steps=50,
                save_steps=0,
            )
        )
    ppo_config = PPOConfig(
        model_name_or_path=str(sft),
        reward_funcs=[],  # train_ppo is given them below, for `gold` is in no file
        reward_weights=[1.0, 0.0],  # of the reward model, and of `gold`
        dataset_name=str(data / "prompts.jsonl"),
        output_dir=str(ppo),
        total_episodes=sizes.total_episodes,
        response_length=sizes.response_length,
        min_response_length=sizes.min_response_length,
        sample_response_length=True,
        seed=seed,
        bf16=bf16,
        **PPO_SETTINGS,
    )

    def gold(prompts: list[str], completions: list[str]) -> list[float]:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        return judge.positive(texts).float().tolist()

    with timed("ppo"):
        train_ppo(ppo_config, [str(reward), gold])

    with timed("evaluation"):
        prompts = labelled.prompts(parts.heldout[half:], sizes.num_eval_prompts, tokenizer, rng)
        write_jsonl(data / "eval_prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
        author, policy = (Policy(str(folder), ppo_config) for folder in (sft, ppo))
        before, after, kl = compare(author, policy, prompts)

    def share_positive(texts: list[str]) -> float:
        return judge.positive(texts).float().mean().item()

    return {
        "judge": {"accuracy": judge_accuracy},
        "reward": {"accuracy": reward_metrics["eval/accuracy"]},
        "ppo": {
            "judge_before": share_positive(before),
            "judge_after": share_positive(after),
            "kl": kl,
        },
        "stage_seconds": timed.seconds,
    }
