"""Entropy of rows of logits where no token is at hand."""

import torch

from ppo_kernels.logprobs import token_logprobs_and_entropy


def entropy(logits):
    """(..., V) logits -> (...) entropy in nats, fp32 (fp64 for fp64), differentiable."""
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs_and_entropy(logits, any_token).entropy
