"""`rlhf demo`: all of RLHF in one command, on a world made on the spot or on labelled text."""

import json
import random
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.checkpoint import claim_output_dir, write_run_file
from rlhf.config import PPOConfig, RewardConfig, SFTConfig
from rlhf.errors import UserError
from rlhf.ppo import train_ppo
from rlhf.reward import train_reward
from rlhf.sft import train_sft
from rlhf.tasks import labelled, reviews
from rlhf.tasks.base import make_base, write_jsonl
from rlhf.tasks.evaluation import Sampler, compare
from rlhf.tasks.judge import Judge

RUN_FILE = "demo.yaml"
ANSWERS_PER_PROMPT = 4
PARTNERS = 4
PPO_SETTINGS = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "learning_rate": 3e-4,
    "critic_learning_rate": 1e-3,
    "warmup_ratio": 0.05,
    "kl_coef": 0.05,
    "logging_steps": 2,
    "save_steps": 0,
}


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


class Stopwatch:
    """Seconds of each part of a run, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_reviews(output_dir: Path, seed: int, bf16: bool, sizes: ReviewsSizes) -> dict:
    """SFT, reward model and PPO on the built-in reviews; returns the summary.

    The preferences are labellers' rankings of the SFT model's own answers. The gold score, which
    no training sees, judges the policy before and after on fresh prompts.
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
        reward_funcs=[str(reward)],
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
        author = Sampler(sft, ppo_config, seed)
        prompts = openings(sizes.num_rankings + sizes.num_heldout_rankings)
        answers = author.complete([p for p in prompts for _ in range(ANSWERS_PER_PROMPT)])
        rankings = []
        for i, prompt in enumerate(prompts):
            drawn = answers[i * ANSWERS_PER_PROMPT : (i + 1) * ANSWERS_PER_PROMPT]
            order = reviews.rank([prompt + answer for answer in drawn], rng)
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
        before, after, kl = compare(author, Sampler(ppo, ppo_config, seed), prompts)

    def gold(texts: list[str]) -> float:
        return statistics.fmean(map(reviews.gold_score, texts))

    return {
        "reward": {"accuracy": reward_metrics["eval/accuracy"]},
        "ppo": {"gold_before": gold(before), "gold_after": gold(after), "kl": kl},
        "stage_seconds": timed.seconds,
    }


def run_labelled(
    examples: list[labelled.Example],
    output_dir: Path,
    seed: int,
    bf16: bool,
    sizes: LabelledSizes,
) -> dict:
    """SFT, reward model and PPO on labelled texts; returns the summary.

    The judge, trained on texts that no stage sees, says which share of the policy's texts is
    positive before and after.
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
        reward_funcs=[str(reward)],
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
    with timed("ppo"):
        train_ppo(ppo_config)

    with timed("evaluation"):
        prompts = labelled.prompts(parts.heldout[half:], sizes.num_eval_prompts, tokenizer, rng)
        write_jsonl(data / "eval_prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
        author, policy = Sampler(sft, ppo_config, seed), Sampler(ppo, ppo_config, seed)
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


def run_demo(
    output_dir: Path,
    seed: int,
    sizes: ReviewsSizes | LabelledSizes,
    *,
    data: Path | None = None,
    bf16: bool = False,
    overwrite_output_dir: bool = False,
) -> dict:
    """Runs the demo in `output_dir` and writes `summary.json` there; returns the summary.

    `data` names a file of labelled texts, and `sizes` are then LabelledSizes; without it the
    built-in reviews are used, and `sizes` are ReviewsSizes. `bf16` is that of every stage.
    """
    start = time.perf_counter()
    # Checked first, so that a mistake costs no earlier run.
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in [0, 2**32), got {seed}")
    if data is not None and Path(data).resolve().is_relative_to(output_dir.resolve()):
        raise UserError(f"data file {data} lies in output_dir {output_dir}, which is emptied")
    examples = None if data is None else labelled.read_examples(data)
    claim_output_dir(output_dir, run_file=RUN_FILE, overwrite=overwrite_output_dir)
    settings = {"seed": seed, "data": data and str(data), "bf16": bf16, **asdict(sizes)}
    write_run_file(output_dir / RUN_FILE, settings)
    if examples is None:
        results = run_reviews(output_dir, seed, bf16, sizes)
    else:
        results = run_labelled(examples, output_dir, seed, bf16, sizes)
    summary = {"seed": seed, "seconds": round(time.perf_counter() - start, 1), **results}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="folder of the run"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="JSONL file of labelled texts: {'text': ..., 'label': 'positive' | 'negative'} "
        "(default: a built-in world of film reviews)",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="run the models in bfloat16 autocast (the weights stay fp32)",
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace an earlier demo in output_dir"
    )


def show(summary: dict, output_dir: Path) -> None:
    """Prints the final table."""
    results = {key: value for key, value in summary.items() if isinstance(value, dict)}
    seconds = results.pop("stage_seconds")
    table = Table("figure", "value", title="Result")
    for group, figures in results.items():
        for name, value in figures.items():
            table.add_row(f"{group}.{name}", f"{value:.3f}")
    table.add_section()
    for stage, value in seconds.items():
        table.add_row(f"{stage}, seconds", f"{value:.1f}")
    table.add_row("all, seconds", f"{summary['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"Completions before and after: {output_dir / 'ppo' / 'completions.md'}")


def main(args: Namespace) -> int:
    sizes = ReviewsSizes() if args.data is None else LabelledSizes()
    summary = run_demo(
        args.output_dir,
        args.seed,
        sizes,
        data=args.data,
        bf16=args.bf16,
        overwrite_output_dir=args.overwrite_output_dir,
    )
    show(summary, args.output_dir)
    return 0
