"""Functions of TRL 1.12.0's `trl.trainer.utils` (unchanged in 1.16.0), for any trainer of TRL.

Results have TRL's shapes and dtype, that of the logits; in half precision they are the exact ones
rounded once. Where TRL's entropy is NaN, at -inf logits, these are finite. TRL's `masked_mean` and
`masked_whiten` are left alone: they are arithmetic on (B, T), with another variance than ours.
"""

import torch

from ppo_kernels.integrations.entropy import entropy
from ppo_kernels.logprobs import token_logprobs


def selective_log_softmax(logits, index):
    """log softmax(logits) at `index`.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        index: (...) or (..., K) int64 ids in [0, V).

    Returns:
        Log-probabilities in nats, of the shape of `index` and the dtype of the logits,
        differentiable. K of a row differ by their logits, so that one sweep serves them all.

    Raises:
        TypeError, ValueError: as `ppo_kernels.token_logprobs`, whose `tokens` are `index`.
    """
    if index.ndim < logits.ndim:
        return token_logprobs(logits, index).to(logits.dtype)
    chosen = logits.gather(-1, index).to(torch.promote_types(logits.dtype, torch.float32))
    likeliest = chosen.argmax(-1, keepdim=True)
    logprobs = token_logprobs(logits, index.gather(-1, likeliest).squeeze(-1)).unsqueeze(-1)
    logprobs = chosen - chosen.gather(-1, likeliest) + logprobs
    return logprobs.masked_fill(chosen == -torch.inf, -torch.inf).to(logits.dtype)


def entropy_from_logits(logits, chunk_size=128):
    """Entropy of each row, in nats: (..., V) -> (...), differentiable.

    `chunk_size` is TRL's and has no effect: nothing of the size of the vocabulary is allocated.
    """
    return entropy(logits).to(logits.dtype)


REPLACES = {"trl.trainer.utils": (selective_log_softmax, entropy_from_logits)}
