"""A trainer of the classic API, and what it must report."""

import torch

from rlhf import classic
from rlhf.classic import PPOConfig, PPOTrainer
from tests.rlhf.helpers.classic_peer import RAGGED, make_model, make_tokenizer

KEYS = {
    *("objective/kl", "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs"),
    *("objective/kl_coef", "objective/entropy"),
    *("ppo/mean_non_score_reward", "ppo/mean_scores", "ppo/std_scores", "ppo/learning_rate"),
    *("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total"),
    *("ppo/policy/entropy", "ppo/policy/approxkl", "ppo/policy/policykl", "ppo/policy/clipfrac"),
    *("ppo/policy/advantages", "ppo/policy/advantages_mean", "ppo/policy/ratio"),
    *("ppo/returns/mean", "ppo/returns/var"),
    *("ppo/val/vpred", "ppo/val/error", "ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var"),
    "ppo/val/var_explained",
    *("tokens/queries_len_mean", "tokens/queries_len_std", "tokens/queries_dist"),
    *("tokens/responses_len_mean", "tokens/responses_len_std", "tokens/responses_dist"),
    *("time/ppo/forward_pass", "time/ppo/compute_rewards", "time/ppo/compute_advantages"),
    *("time/ppo/optimize_step", "time/ppo/calc_stats", "time/ppo/total"),
}
ARRAYS = {
    *("objective/kl_dist", "objective/logprobs", "objective/ref_logprobs"),
    *("ppo/policy/advantages", "ppo/policy/ratio", "tokens/queries_dist", "tokens/responses_dist"),
}


def rows(values) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


def make_trainer(dropout: float = 0.0, **options) -> PPOTrainer:
    """A trainer of four responses at a time whose reference is another model."""
    options = {"batch_size": 4, "mini_batch_size": 4, "learning_rate": 1e-2} | options
    return PPOTrainer(
        PPOConfig(**options),
        make_model(classic, 0.0, dropout),
        make_model(classic, 0.5, dropout),
        make_tokenizer(),
    )


def step(trainer: PPOTrainer, queries=RAGGED[0], responses=RAGGED[1], masks=None) -> dict:
    scores = rows([1.0, -0.5, 0.25, 2.0][: len(queries)])
    return trainer.step(rows(queries), rows(responses), scores, masks)


def weights(trainer: PPOTrainer) -> torch.Tensor:
    return torch.cat([x.detach().flatten().clone() for x in trainer.model.parameters()])


GOOD = {
    "queries": rows(RAGGED[0]),
    "responses": rows(RAGGED[1]),
    "scores": rows([1.0, -0.5, 0.25, 2.0]),
}
