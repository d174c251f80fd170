"""The dtype that the peers' results of logits have."""

import torch


def softmax_dtype(logits):
    """That of `torch.softmax(logits, -1)`: under autocast on CUDA fp32 for half precision, else
    the logits' own."""
    if logits.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.promote_types(logits.dtype, torch.float32)
    return logits.dtype
