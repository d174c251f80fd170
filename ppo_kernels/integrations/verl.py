"""Functions of verl 0.9.1's `verl.utils.torch_functional` and `verl.trainer.ppo.core_algos`.

Results of logits have verl's dtype: that of the logits, but fp32 for half precision under autocast
on CUDA. Where verl's results are NaN, for entropy at -inf logits and for advantages at a masked-out
NaN, these are finite.
"""

import importlib.util
import os

import torch
from torch import Tensor
from torch.nn import functional

from ppo_kernels.gae import gae
from ppo_kernels.integrations.common import entropy, softmax_dtype
from ppo_kernels.logprobs import token_logprobs
from ppo_kernels.masked import masked_mean

_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits) at `labels`: (..., V), (...) -> (...), differentiable.

    fp32 for half logits also where verl would take flash-attn's kernel, as in verl. The logits are
    never written: `inplace_backward` has no effect, as in verl without flash-attn.
    """
    logprobs = token_logprobs(logits, labels)
    if _FLASH_ATTN and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1":
        return logprobs
    return logprobs.to(softmax_dtype(logits))


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row, in nats: (..., V) -> (...), differentiable."""
    return entropy(logits).to(softmax_dtype(logits))


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of each row, in nats: (N, V) -> (N,) fp32, differentiable.

    `chunk_size` is verl's and has no effect: nothing of the size of the vocabulary is allocated.
    """
    return entropy(logits).float()


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns, of `ppo_kernels.gae` with gaps skipped.

    A masked-out position has what the scan carries over it: the advantage A of the next counted
    one, or 0. With mean and unbiased variance of A over the n counted positions::

        advantages = (A - mean) / sqrt(var + 1e-8)        returns = A + values

    Args:
        token_level_rewards, values: (B, T) floating.
        response_mask: (B, T) of an integer or floating dtype, 1 = counts, 0 = skipped.
        gamma, lam: discount γ and decay λ, in [0, 1].

    Returns:
        advantages, returns: (B, T) of the common dtype of the three tensors, without gradient.

    Raises:
        ValueError: fewer than two positions count, or the mask has another value than 0 and 1.
    """
    counts = response_mask != 0
    if not torch.equal(counts.to(response_mask.dtype), response_mask):
        raise ValueError(f"response_mask must be 0 or 1, got {response_mask.unique().tolist()[:8]}")
    n = int(counts.sum())
    if n < 2:
        raise ValueError(f"response_mask must count two positions or more, got {n}")
    dtype = torch.promote_types(token_level_rewards.dtype, values.dtype)
    dtype = torch.promote_types(dtype, response_mask.dtype)
    length = values.shape[1]
    advantages = gae(
        token_level_rewards, values, counts, gamma=float(gamma), lam=float(lam)
    ).advantages
    positions = torch.arange(length, device=values.device)
    following = torch.where(counts, positions, length).flip(1).cummin(1).values.flip(1)
    advantages = functional.pad(advantages, (0, 1)).gather(1, following)
    returns = advantages + values.detach()
    centred = advantages - masked_mean(advantages, counts)
    variance = masked_mean(centred.square(), counts) * (n / (n - 1))
    return (centred * torch.rsqrt(variance + 1e-8)).to(dtype), returns.to(dtype)


REPLACES = {
    "verl.utils.torch_functional": (
        logprobs_from_logits,
        entropy_from_logits,
        entropy_from_logits_with_chunking,
    ),
    "verl.trainer.ppo.core_algos": (compute_gae_advantage_return,),
}
