"""The reward model: Bradley-Terry on preferences (Bradley and Terry, 1952; Ouyang et al., 2022).

A ranking of k answers stands for all its k (k - 1) / 2 pairs of a better and a worse answer, and
each answer is read once::

    loss = mean over pairs of -log σ(score_better - score_worse - margin)
                              + center_rewards_coefficient * (score_better + score_worse)²

The margin is the data's, or 0 (Touvron et al., 2023); the second term keeps the mean of the scores
near 0 (Eisenstein et al., 2023).
"""

import time
from itertools import combinations
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rlhf import distributed
from rlhf.config.training import RewardConfig
from rlhf.data.loaders import Ranking, load_rankings
from rlhf.data.padding import pad
from rlhf.models.loading import load_learning_reward_model, load_tokenizer, padding_in_text
from rlhf.models.passes import (
    autocast,
    check_fits,
    default_device,
    enable_gradient_checkpointing,
    sequence_scores,
    set_score_normalisation,
)
from rlhf.models.proof import prove_scorer
from rlhf.report.card import write_card
from rlhf.run.metrics import MetricsLog, plot_metrics, to_floats
from rlhf.run.progress import Display, hooked, num_passes
from rlhf.run.safe_points import SafePoints, stoppable
from rlhf.run.saving import Checkpoints, is_due
from rlhf.supervised import SupervisedTrainer

SHOWN = ("loss", "accuracy", "margin", "eval/loss", "eval/accuracy", "lr")


class Scorer(nn.Module):
    """A reward model whose forward pass gives `sequence_scores`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model = model
        self.skipped = padding_in_text(model, tokenizer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return sequence_scores(self.model, input_ids, attention_mask, self.skipped)


def pair_indices(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """For rankings of these sizes laid end to end, best first: the positions of the better and of
    the worse answer of every pair, each (pairs,)."""
    pairs, offset = [], 0
    for size in sizes:
        pairs += combinations(range(offset, offset + size), 2)
        offset += size
    better, worse = torch.tensor(pairs).unbind(1)
    return better, worse


def count_pairs(rankings: list[Ranking]) -> int:
    return sum(comb(len(ranking.answers), 2) for ranking in rankings)


def pair_metrics(
    scores: Tensor, rankings: list[Ranking], center: float, denominator: float
) -> dict[str, Tensor]:
    """Sums over all pairs, divided by `denominator`, of the loss, of 1 where the better answer's
    score is the higher one, and of score_better - score_worse.

    `scores` (answers,) are those of the rankings' answers, laid end to end; `center` is the
    coefficient of the loss's second term.
    """
    sizes = [len(ranking.answers) for ranking in rankings]
    better, worse = (scores[index.to(scores.device)] for index in pair_indices(sizes))
    asked = [ranking.margin for ranking in rankings for _ in range(count_pairs([ranking]))]
    margins = better - worse
    losses = -F.logsigmoid(margins - torch.tensor(asked, device=scores.device))
    losses = losses + center * (better + worse).square()
    sums = {
        "loss": losses.sum(),
        "accuracy": (margins > 0).float().sum(),
        "margin": margins.sum(),
    }
    return {name: value / denominator for name, value in sums.items()}


def score_answers(
    scorer: nn.Module, answers: list[list[int]], pad_token_id: int, bf16: bool
) -> Tensor:
    """A `Scorer`'s scores of token sequences, (answers,)."""
    ids, mask = (x.to(default_device()) for x in pad(answers, pad_token_id))
    with autocast(bf16):
        return scorer(ids, mask)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rankings: list[Ranking],
    config: RewardConfig,
) -> tuple[dict[str, float], Tensor]:
    """Loss, accuracy and margin over all pairs, and every answer's score; the answers are divided
    over the processes."""
    model.eval()
    answers = [answer for ranking in rankings for answer in ranking.answers]
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    size, num_processes = config.per_device_eval_batch_size, distributed.world_size()
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    scores = torch.zeros(len(answers), device=model.device)
    for rows in distributed.my_share(batches):
        batch = [answers[i] for i in rows]
        part = score_answers(Scorer(model, tokenizer), batch, tokenizer.pad_token_id, config.bf16)
        scores[rows] = num_processes * part
    scores = distributed.mean_of({"scores": scores})["scores"]
    model.train()
    center = config.center_rewards_coefficient
    metrics = pair_metrics(scores, rankings, center, count_pairs(rankings))
    return {f"eval/{name}": value for name, value in to_floats(metrics).items()}, scores


def prepare(
    config: RewardConfig,
) -> tuple[PreTrainedTokenizerBase, list[Ranking], list[Ranking], PreTrainedModel]:
    """The tokenizer, the rankings to learn from, the held-out ones, and the model, which fits
    them."""
    path = config.model_name_or_path
    tokenizer = load_tokenizer(path, config, config.revision)
    rankings = load_rankings(config, config.dataset_name, config.dataset_split, tokenizer)
    eval_rankings = []
    if config.eval_dataset_name is not None:
        eval_rankings = load_rankings(
            config, config.eval_dataset_name, config.eval_dataset_split, tokenizer
        )
    model = load_learning_reward_model(path, tokenizer, config, config.revision)
    prove_scorer(model, path)
    for name in ("reward_mean", "reward_std"):  # of the reward model that it may have been
        model.config.__dict__.pop(name, None)
    longest = max(len(answer) for ranking in rankings + eval_rankings for answer in ranking.answers)
    check_fits(model, tokenizer, longest, "lower max_length")
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return tokenizer, rankings, eval_rankings, model


@stoppable("reward")
def train_reward(config: RewardConfig) -> dict[str, float]:
    """Trains and saves a reward model; returns the last metrics.

    The mean and the standard deviation of its scores over the training data are stored in its
    configuration as `reward_mean` and `reward_std`. They are measured at the end: the model in a
    checkpoint has none.
    """
    start_time = time.perf_counter()
    set_seed(config.seed)
    tokenizer, rankings, eval_rankings, model = distributed.together(lambda: prepare(config))
    lengths = [max(map(len, ranking.answers)) for ranking in rankings]
    trainer = SupervisedTrainer(config, Scorer(model, tokenizer), rankings, lengths, eval_rankings)
    checkpoints = Checkpoints(config, "reward", trainer, {"": model}, tokenizer)
    metrics = checkpoints.resume()
    output_dir, total = checkpoints.run.output_dir, trainer.num_steps
    safe_points = SafePoints(checkpoints, "reward", trainer.step, metrics)

    def passes(rankings: list[Ranking]) -> int:
        count = sum(len(ranking.answers) for ranking in rankings)
        return num_passes(count, config.per_device_eval_batch_size, distributed.world_size())

    with MetricsLog(output_dir, "reward", total, config.report_to, SHOWN, step=trainer.step) as log:
        for batch in trainer.batches:
            num_pairs = count_pairs([rankings[i] for rows in batch for i in rows])
            for rows, weight in trainer.passes(batch):
                safe_points.check()
                micro = [rankings[i] for i in rows]
                answers = [answer for ranking in micro for answer in ranking.answers]
                scores = score_answers(
                    trainer.parallel, answers, tokenizer.pad_token_id, config.bf16
                )
                center = config.center_rewards_coefficient
                trainer.backward(weight, pair_metrics(scores, micro, center, num_pairs))
            trainer.take_step()
            log.advance()
            if is_due(config.logging_steps, trainer.step, total):
                figures = trainer.take_metrics()
                log.write(trainer.step, figures)
                metrics |= figures
            if eval_rankings and is_due(config.eval_steps, trainer.step, total):
                with log.phase("eval", passes(eval_rankings), model.score.register_forward_hook):
                    figures, _ = evaluate(model, tokenizer, eval_rankings, config)
                log.write(trainer.step, figures)
                metrics |= figures
            if config.save_steps and is_due(config.save_steps, trainer.step, total):
                checkpoints.save(trainer.step, metrics)
            safe_points.reached(trainer.step, metrics)

    metrics["steps"] = total

    def finish() -> None:
        checkpoints.save_models(output_dir)
        plot_metrics(output_dir, {"reward": ("loss", "accuracy", "margin")})
        write_card(output_dir, "reward", config, metrics)

    try:
        if config.load_best_model_at_end:
            checkpoints.load_best()
    finally:  # with the last model, if the best one is damaged
        with (
            Display("reward scale", passes(rankings)) as display,
            hooked(model.score.register_forward_hook, display.advance),
        ):
            _, scores = evaluate(model, tokenizer, rankings, config)
        set_score_normalisation(model, scores)
        distributed.from_main(finish)
    return metrics | {"seconds": time.perf_counter() - start_time}
