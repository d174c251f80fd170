"""Functions of TRL's `trl.trainer.utils`, 1.12.0 and what 1.14 to 1.16 add to it.

TRL's trainers score tokens with them up to 1.14. From 1.15 on only experimental ones do (SDPO,
SDFT, CPO, ORPO ...); the others, GRPO among them, take log-probs from hidden states in a kernel of
TRL's own, and `patch` changes nothing there.

Results have the shapes and dtype of TRL's in PyTorch, that of the logits; in half precision they
are the exact ones rounded once. Where TRL's entropy is NaN, at -inf logits, these are finite. TRL's
`masked_mean` and `masked_whiten` are left alone: they are arithmetic on (B, T), with another
variance than ours.
"""

import torch

from ppo_kernels.integrations.entropy import entropy
from ppo_kernels.logprobs import token_logprobs, token_logprobs_and_entropy


def _within(row_mask, x):
    """`x`, 0 where the mask is."""
    return x if row_mask is None else x.masked_fill(row_mask == 0, 0)


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    """log softmax(logits / temperature) at `index`.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        index: (...) or (..., K) int64 ids in [0, V).
        temperature: > 0 (TRL 1.14).
        row_mask: of the shape of `index`, gives 0 where it is 0; ids there are not looked at
            (TRL 1.14).

    Returns:
        Log-probabilities in nats, of the shape of `index` and the dtype of the logits,
        differentiable. K of a row differ by their logits, so that one sweep serves them all.

    Raises:
        TypeError, ValueError: as `ppo_kernels.token_logprobs`, whose `tokens` are `index`.
    """
    index = _within(row_mask, index)
    if index.ndim < logits.ndim:
        logprobs = token_logprobs(logits, index, temperature=temperature)
    else:
        chosen = logits.gather(-1, index).to(torch.promote_types(logits.dtype, torch.float32))
        chosen = chosen / temperature
        best = chosen.argmax(-1, keepdim=True)
        tokens = index.gather(-1, best).squeeze(-1)
        logprobs = token_logprobs(logits, tokens, temperature=temperature).unsqueeze(-1)
        logprobs = chosen - chosen.gather(-1, best) + logprobs
        logprobs = logprobs.masked_fill(chosen == -torch.inf, -torch.inf)
    return _within(row_mask, logprobs.to(logits.dtype))


def selective_log_softmax_and_entropy(
    logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
):
    """Both of softmax(logits / temperature) from one sweep (TRL 1.14).

    Arguments and errors are those of `selective_log_softmax`, with an `index` of (...).

    Returns:
        log-probabilities, entropy: (...) in nats, of the dtype of the logits. The entropy is
        differentiable if `entropy_requires_grad`.
    """
    index = _within(row_mask, index)
    logprobs, entropy = (
        _within(row_mask, x.to(logits.dtype))
        for x in token_logprobs_and_entropy(logits, index, temperature=temperature)
    )
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits, chunk_size=128):
    """Entropy of each row, in nats: (..., V) -> (...), differentiable.

    `chunk_size` is TRL's and has no effect: nothing of the size of the vocabulary is allocated.
    """
    return entropy(logits).to(logits.dtype)


REPLACES = {"trl.trainer.utils": (selective_log_softmax, entropy_from_logits)}
REPLACES_IN_LATER_VERSIONS = {"trl.trainer.utils": (selective_log_softmax_and_entropy,)}
