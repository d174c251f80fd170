"""The ops of `schemas.py` in Triton, for NVIDIA and AMD. Importing this registers them."""

from ppo_kernels._triton import (
    gae,
    kl,
    logprobs,
    masked,
    ppo_loss,
    sampling,
    statistics,
    token_losses,
)

__all__ = [
    "gae",
    "kl",
    "logprobs",
    "masked",
    "ppo_loss",
    "sampling",
    "statistics",
    "token_losses",
]
