"""What adapts during a run, and is saved with it: the KL coefficient and the scale of scores."""

import math

import torch
from torch import Tensor

from rlhf.config.ppo import PPOConfig


def adapt(kl_coef: float, kl: float, target: float, num_responses: int, horizon: float) -> float:
    """The next weight of the KL penalty (Ziegler et al., 2019, arXiv:1909.08593, equation 2)::

    kl_coef · (1 + clip(kl / target - 1, -0.2, 0.2) · num_responses / horizon)
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)


class Moments:
    """Count, mean, and sum of the squared deviations from it of all numbers seen, merged as in
    Chan, Golub and LeVeque (1979), in fp64."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def see(self, numbers: Tensor) -> None:
        """Counts a vector among them."""
        numbers = numbers.double()
        mean = numbers.mean()
        squares = (numbers - mean).square().sum()
        mean, squares = torch.stack([mean, squares]).tolist()
        total = self.count + len(numbers)
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * len(numbers) / total
        self.mean += shift * len(numbers) / total
        self.count = total

    def deviation(self, correction: int) -> float:
        """Standard deviation: 0 for the biased one, 1 for the unbiased."""
        return math.sqrt(self.squares / (self.count - correction))


class KLController:
    """The weight of the KL penalty: fixed, or adapted to a target KL, in nats, of a whole response
    (`adaptive_kl: sequence`) or of a token (`token`)."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self.kl_coef = config.kl_coef

    def update(self, kl: Tensor, mask: Tensor) -> None:
        """Adapts to an iteration's log π - log π_ref, (B, T), 0 where the mask is False."""
        config = self.config
        if config.adaptive_kl == "none":
            return
        count = len(kl) if config.adaptive_kl == "sequence" else mask.sum()
        mean = (kl.double().sum() / count).item()
        self.kl_coef = adapt(self.kl_coef, mean, config.target_kl, len(kl), config.kl_horizon)

    def state_dict(self) -> dict:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict) -> None:
        self.kl_coef = state["kl_coef"]


class ScoreScaler:
    """(score - mean) / std, with the moments of every score seen so far (`score_scaling: running`),
    of the first iteration's (`reference`: the policy still is the reference), or not at all.

    The deviation is the biased one.
    """

    def __init__(self, config: PPOConfig):
        self.kind = config.score_scaling
        self.moments = Moments()

    def __call__(self, scores: Tensor) -> Tensor:
        """The scores (B,) of an iteration, scaled; they count among those seen."""
        if self.kind == "none":
            return scores
        if self.kind == "running" or self.moments.count == 0:
            self.moments.see(scores)
        return (scores - self.moments.mean) / max(self.moments.deviation(correction=0), 1e-6)

    def state_dict(self) -> dict:
        return vars(self.moments).copy()

    def load_state_dict(self, state: dict) -> None:
        vars(self.moments).update(state)
