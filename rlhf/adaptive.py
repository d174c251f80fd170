"""What adapts during a run, and is saved with it: the KL coefficient and the scale of scores."""

import math

import torch
from torch import Tensor

from rlhf.config import PPOConfig


class KLController:
    """The weight of the KL penalty: fixed, or adapted to a target (Ziegler et al., 2019,
    arXiv:1909.08593, equation 2)::

        kl_coef ← kl_coef · (1 + clip(KL / target_kl - 1, -0.2, 0.2) · responses / kl_horizon)

    KL is that of a whole response (`adaptive_kl: sequence`) or of a token (`token`), in nats.
    """

    def __init__(self, config: PPOConfig):
        self.config = config
        self.kl_coef = config.kl_coef

    def update(self, kl: Tensor, mask: Tensor) -> None:
        """Adapts to an iteration's log π - log π_ref, (B, T), 0 where the mask is False."""
        config = self.config
        if config.adaptive_kl == "none":
            return
        num_responses = len(kl)
        count = num_responses if config.adaptive_kl == "sequence" else mask.sum()
        kl = (kl.double().sum() / count).item()
        error = min(max(kl / config.target_kl - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * num_responses / config.kl_horizon

    def state_dict(self) -> dict:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict) -> None:
        self.kl_coef = state["kl_coef"]


class ScoreScaler:
    """(score - mean) / std, with the moments of every score seen so far (`score_scaling: running`),
    of the first iteration's (`reference`: the policy still is the reference), or not at all.

    The moments of running scores are merged as in Chan, Golub and LeVeque (1979), in fp64.
    """

    def __init__(self, config: PPOConfig):
        self.kind = config.score_scaling
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        """The scores (B,) of an iteration, scaled; they count among those seen."""
        if self.kind == "none":
            return scores
        if self.kind == "running" or self.count == 0:
            self._see(scores.double())
        return (scores - self.mean) / max(self.std, 1e-6)

    @property
    def std(self) -> float:
        """Biased standard deviation of the scores seen."""
        return math.sqrt(self.squares / self.count)

    def _see(self, scores: Tensor) -> None:
        mean = scores.mean()
        squares = (scores - mean).square().sum()
        mean, squares = torch.stack([mean, squares]).tolist()
        total = self.count + len(scores)
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * len(scores) / total
        self.mean += shift * len(scores) / total
        self.count = total

    def state_dict(self) -> dict:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
