"""What adapts from step to step: the KL coefficient, and the moments by which scores are scaled."""

import torch
from torch import Tensor

from rlhf.ppo.adaptive import Moments, adapt


class FixedKLController:
    """A KL coefficient `value` that stays as it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Takes the KL of a response, in nats, and the number of responses; changes nothing."""


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that adapts to a target (`rlhf.ppo.adaptive.adapt`)."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        super().__init__(init_kl_coef)
        self.target, self.horizon = target, horizon

    def update(self, current: float, n_steps: int) -> None:
        self.value = adapt(self.value, current, self.target, n_steps, self.horizon)


class RunningMoments(Moments):
    """The mean and the unbiased standard deviation of all scores seen; 0 and 1 before there are
    two."""

    @property
    def std(self) -> float:
        return self.deviation(correction=1) if self.count > 1 else 1.0

    def scale(self, scores: Tensor, centre: bool) -> Tensor:
        """The scores (B,), which count among those seen, in units of the deviation; `centre`
        subtracts the mean first."""
        self.see(scores)
        centred = scores - self.mean if centre else scores
        return centred / (self.std + torch.finfo(scores.dtype).eps)
