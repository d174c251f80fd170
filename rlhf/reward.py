"""The reward model: Bradley-Terry on preferences (Bradley and Terry, 1952; Ouyang et al., 2022).

A ranking of k answers stands for all its k (k - 1) / 2 pairs of a better and a worse answer, and
each answer is read once::

    loss = mean over pairs of -log σ(score_better - score_worse)
"""

import time
from itertools import combinations
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoint import save_model, start_run
from rlhf.config import RewardConfig
from rlhf.data import count_steps, load_rankings, micro_batches, pad
from rlhf.metrics import MetricsLog, plot_metrics
from rlhf.models import (
    autocast,
    check_fits,
    load_scorer,
    load_tokenizer,
    sequence_scores,
    set_score_normalisation,
)
from rlhf.optim import clip_gradients, make_optimizer


def pair_indices(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """For rankings of these sizes laid end to end, best first: the positions of the better and of
    the worse answer of every pair, each (pairs,)."""
    pairs, offset = [], 0
    for size in sizes:
        pairs += combinations(range(offset, offset + size), 2)
        offset += size
    better, worse = torch.tensor(pairs).unbind(1)
    return better, worse


def pair_margins(scores: Tensor, sizes: list[int]) -> Tensor:
    """score_better - score_worse of every pair, (pairs,)."""
    better, worse = (index.to(scores.device) for index in pair_indices(sizes))
    return scores[better] - scores[worse]


def score_answers(
    model: PreTrainedModel, answers: list[list[int]], pad_token_id: int, bf16: bool
) -> Tensor:
    """Scores of token sequences, (answers,)."""
    ids, mask = pad(answers, pad_token_id)
    with autocast(bf16):
        return sequence_scores(model, ids.to(model.device), mask.to(model.device))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rankings: list[list[list[int]]],
    config: RewardConfig,
) -> tuple[dict[str, float], Tensor]:
    """Loss, accuracy and margin over all pairs, and every answer's score."""
    model.eval()
    answers = [answer for ranking in rankings for answer in ranking]
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    scores = torch.empty(len(answers), device=model.device)
    for start in range(0, len(order), config.per_device_eval_batch_size):
        index = order[start : start + config.per_device_eval_batch_size]
        batch = [answers[i] for i in index]
        scores[index] = score_answers(model, batch, tokenizer.pad_token_id, config.bf16)
    margins = pair_margins(scores, [len(ranking) for ranking in rankings])
    metrics = {
        "eval/loss": -F.logsigmoid(margins).mean().item(),
        "eval/accuracy": (margins > 0).float().mean().item(),
        "eval/margin": margins.mean().item(),
    }
    return metrics, scores


def train_reward(config: RewardConfig) -> dict[str, float]:
    """Trains and saves a reward model; returns the last metrics.

    The mean and the standard deviation of its scores over the training data are stored in its
    configuration as `reward_mean` and `reward_std`.
    """
    start_time = time.perf_counter()
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.model_name_or_path)
    rankings = load_rankings(config.dataset_name, tokenizer, config.max_length, config.append_eos)
    eval_rankings = None
    if config.eval_dataset_name is not None:
        eval_rankings = load_rankings(
            config.eval_dataset_name, tokenizer, config.max_length, config.append_eos
        )
    model = load_scorer(config.model_name_or_path, tokenizer)
    lengths = [max(len(answer) for answer in ranking) for ranking in rankings]
    eval_lengths = [len(answer) for ranking in eval_rankings or [] for answer in ranking]
    check_fits(model, tokenizer, max(lengths + eval_lengths), "lower max_length")
    output_dir = start_run(config, "reward")

    num_steps = count_steps(len(rankings), config)
    optimizer, scheduler = make_optimizer([(model, config.learning_rate)], config, num_steps)
    generator = torch.Generator().manual_seed(config.seed)
    batches = micro_batches(lengths, config, generator)

    shown = ("loss", "accuracy", "margin", "eval/loss", "eval/accuracy", "lr")
    with MetricsLog(output_dir, "reward", num_steps, config.report_to, shown) as log:
        model.train()
        margins = []
        for step, batch in zip(range(1, num_steps + 1), batches, strict=False):
            num_pairs = sum(comb(len(rankings[i]), 2) for indices in batch for i in indices)
            for indices in batch:
                answers = [answer for i in indices for answer in rankings[i]]
                scores = score_answers(model, answers, tokenizer.pad_token_id, config.bf16)
                margin = pair_margins(scores, [len(rankings[i]) for i in indices])
                (-F.logsigmoid(margin).sum() / num_pairs).backward()
                margins.append(margin.detach())
            grad_norm = clip_gradients(model, config.max_grad_norm)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            log.advance()
            if step % config.logging_steps == 0 or step == num_steps:
                margins = torch.cat(margins)
                metrics = {
                    "loss": -F.logsigmoid(margins).mean().item(),
                    "accuracy": (margins > 0).float().mean().item(),
                    "margin": margins.mean().item(),
                    "grad_norm": grad_norm.item(),
                    "lr": learning_rate,
                }
                log.write(step, metrics)
                margins = []
        _, scores = evaluate(model, tokenizer, rankings, config)
        set_score_normalisation(model, scores)
        save_model(output_dir, model, tokenizer)
        if eval_rankings is not None:
            eval_metrics, _ = evaluate(model, tokenizer, eval_rankings, config)
            log.write(num_steps, eval_metrics)
            metrics |= eval_metrics
    plot_metrics(output_dir, {"reward": ("loss", "accuracy", "margin")})
    return metrics | {"steps": num_steps, "seconds": time.perf_counter() - start_time}
