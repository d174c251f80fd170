"""Advantages of an iteration's tokens, by generalised advantage estimation."""

from torch import Tensor

from ppo_kernels import gae, masked_whiten
from rlhf.config.ppo import PPOConfig


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Advantages (B, T), and the returns that the critic learns, of `rewards` and the critic's
    `values`; 0 where the mask is False. If so configured, rewards are whitened before, and
    advantages after."""
    advantages, returns = gae(
        masked_whiten(rewards, mask) if config.whiten_rewards else rewards,
        values,
        mask,
        gamma=config.gamma,
        lam=config.lam,
    )
    return masked_whiten(advantages, mask) if config.whiten_advantages else advantages, returns
