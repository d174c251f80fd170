"""What several packages' functions take of logits."""

import torch
from torch import Tensor

from ppo_kernels.logprobs import token_logprobs_and_entropy


def softmax_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of `torch.softmax(logits, -1)`: under autocast on CUDA fp32 for half precision,
    else the logits' own."""
    if logits.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.promote_types(logits.dtype, torch.float32)
    return logits.dtype


def entropy(logits: Tensor) -> Tensor:
    """(..., V) logits -> (...) entropy in nats, fp32 (fp64 for fp64), differentiable."""
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs_and_entropy(logits, any_token).entropy
