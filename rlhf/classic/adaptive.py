"""What adapts from step to step: the KL coefficient, and the moments by which scores are scaled."""

import math

import torch
from torch import Tensor


class FixedKLController:
    """A KL coefficient `value` that stays as it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Takes the KL of a response, in nats, and the number of responses; changes nothing."""


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that adapts to a target (Ziegler et al., 2019, arXiv:1909.08593)::

    value ← value · (1 + clip(current / target - 1, -0.2, 0.2) · n_steps / horizon)
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        super().__init__(init_kl_coef)
        self.target, self.horizon = target, horizon

    def update(self, current: float, n_steps: int) -> None:
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class RunningMoments:
    """The mean and the unbiased standard deviation of all scores seen (Chan, Golub and LeVeque,
    1979); 0 and 1 before there are two."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 1.0

    def scale(self, scores: Tensor, centre: bool) -> Tensor:
        """The scores (B,), which count among those seen, in units of the deviation; `centre`
        subtracts the mean first."""
        self._see(scores)
        centred = scores - self.mean if centre else scores
        return centred / (self.std + torch.finfo(scores.dtype).eps)

    def _see(self, scores: Tensor) -> None:
        mean = scores.double().mean().item()
        shift, total = mean - self.mean, self.count + len(scores)
        self.squares += (scores.double() - mean).square().sum().item()
        self.squares += shift**2 * self.count * len(scores) / total
        self.mean += shift * len(scores) / total
        self.count = total
