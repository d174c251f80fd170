"""One iteration of PPO: the data that it learns from, and what it reports."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels import masked_mean
from rlhf.rewards.scoring import Samples, Scores, to_jsonl
from rlhf.rollout import Experience, Responses
from rlhf.run.files import write_file
from rlhf.run.folder import COMPLETIONS_FILE

NUM_COMPLETIONS = 128
NUM_SHOWN_COMPLETIONS = 16
SHOWN = (
    "objective/scores",
    "objective/kl",
    "objective/rlhf_reward",
    "eval/scores",
    "eval/kl",
    "policy/approxkl",
    "policy/entropy",
    "val/explained_variance",
    "tokens/response_len",
    "tokens_per_second",
)
PLOTS = {
    "reward": ("objective/scores", "objective/rlhf_reward", "objective/kl"),
    "policy": ("policy/approxkl", "policy/clipfrac", "policy/entropy"),
    "loss": ("loss/policy", "loss/value", "val/explained_variance"),
    "responses": ("tokens/response_len", "tokens/eos_rate", "tokens_per_second"),
}


class Batch(NamedTuple):
    """One iteration's responses and what follows from them, the same on every rank.

    `scores`: of the reward functions; `shaped` (B,): their sum as it enters `rewards`, that is
    scaled, clipped, and with what a missing end costs; the rest (B, T).
    """

    responses: Responses
    experience: Experience
    scores: Scores
    shaped: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def response_metrics(
    responses: Responses, experience: Experience, scores: Scores
) -> dict[str, Tensor]:
    """Means over responses. `objective/scores` are those of the reward functions, weighted and
    summed; `objective/kl` is in nats per response, and eos_rate counts what ended by itself."""
    mask = responses.mask
    lengths = mask.sum(1).float()
    kl = (experience.logprobs - experience.ref_logprobs).sum(1)
    return {
        "objective/scores": (scores.scores + scores.token_scores.sum(1)).mean(),
        "objective/kl": kl.mean(),
        "objective/kl_per_token": kl.sum() / lengths.sum(),
        "objective/entropy": masked_mean(experience.entropy, mask),
        "tokens/response_len": lengths.mean(),
        "tokens/eos_rate": responses.ended.float().mean(),
        **{f"rewards/{name}": values.nanmean() for name, values in scores.parts.items()},
    }


def iteration_metrics(batch: Batch, steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of an iteration: means over its responses, or over its optimizer steps.

    `policy/first_*` belong to the first minibatch, where the policy has not moved yet: the ratio is
    1 and approxkl 0, up to rounding.
    """
    mask, experience = batch.responses.mask, batch.experience
    rlhf_reward = batch.rewards.sum(1)
    token_scores = batch.scores.token_scores.sum(1)
    returns, values = batch.returns[mask], experience.values[mask]
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
    metrics = response_metrics(batch.responses, experience, batch.scores) | {
        "objective/rlhf_reward": rlhf_reward.mean(),
        "objective/non_score_reward": (rlhf_reward - batch.shaped - token_scores).mean(),
        "val/explained_variance": 1 - unexplained,
        "policy/first_approxkl": steps[0]["policy/approxkl"],
        "policy/first_ratio_error": steps[0]["policy/ratio_error"],
        "policy/ratio_max": torch.stack([step["policy/ratio_max"] for step in steps]).max(),
    }
    for name in steps[0]:
        if name not in ("policy/ratio_max", "policy/ratio_error"):
            metrics[name] = torch.stack([step[name] for step in steps if name in step]).mean()
    return metrics


def scored_answers(samples: Samples, scores: Scores) -> list[dict[str, object]]:
    """`samples.answers()`, each with its `score`, all rewards weighted and summed, and, if there
    are several, its `rewards` by name, NaN where they say nothing."""
    totals = (scores.scores + scores.token_scores.sum(1)).tolist()
    answers = [
        answer | {"score": score} for answer, score in zip(samples.answers(), totals, strict=True)
    ]
    if len(scores.parts) > 1:
        parts = {name: values.tolist() for name, values in scores.parts.items()}
        for i, answer in enumerate(answers):
            answer["rewards"] = {name: values[i] for name, values in parts.items()}
    return answers


def write_completions(output_dir: Path, records: list[dict]) -> None:
    """Writes COMPLETIONS_FILE, a line `prompt`, `before`, `after` for each prompt, where before is
    how the reference answers it and after the policy, as `scored_answers` has it; and the first of
    them to read, `completions.md`."""
    text = "# Completions before and after PPO\n\n"
    text += "In brackets the score, all rewards weighted and summed.\n"
    for record in records[:NUM_SHOWN_COMPLETIONS]:
        text += f"\n## {record['prompt'].strip() or '(empty prompt)'}\n\n"
        for side in ("before", "after"):
            answer = record[side]
            text += f"- {side} [{answer['score']:+.2f}]: {answer['completion'].strip()}\n"
    write_file(output_dir / COMPLETIONS_FILE, to_jsonl(records))
    write_file(output_dir / "completions.md", text.encode())
