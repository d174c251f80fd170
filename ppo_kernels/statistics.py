r"""What one sweep over the logits tells of each token and of the distribution it was drawn from.

For a row of logits z (V,), temperature τ, p = softmax(z / τ), a token a::

    logprob      = log p_a                          nats
    entropy      = H = - Σ_j p_j log p_j            nats
    max_prob     = max_j p_j
    sum_sq_probs = Σ_j p_j²                         exp of minus the Rényi entropy of order 2
    top1         = z_a = max_j z_j                  whether greedy decoding may choose a
    varentropy   = Σ_j p_j (log p_j + H)²           nats²: Var_p[log p]

All of them follow from the maximum of the row and from four sums relative to it,
Σ 2^t, Σ 2^t t, Σ 2^2t and Σ 2^t t² with t_j = log2(e) (z_j - max z) / τ.
"""

from typing import NamedTuple

from torch import Tensor

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import kernels, resolve, scalars, temperatures_and_number


class TokenStatistics(NamedTuple):
    """All of shape (...) and detached, fp32 (fp64 for fp64 logits); `top1` is bool."""

    logprobs: Tensor
    entropy: Tensor
    max_prob: Tensor
    sum_sq_probs: Tensor
    top1: Tensor
    varentropy: Tensor


def token_statistics(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    backend: str = "auto",
) -> TokenStatistics:
    """Statistics of the given tokens and of their distributions, see `ppo_kernels.statistics`.

    `logprobs` and `entropy` are bitwise those of `token_logprobs_and_entropy` on the same backend.
    The varentropy is the difference of two moments, exact to a few roundings of (H + log max p)²,
    at most (log V)².

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        tokens: (...) int64 or int32 ids in [0, V); logits at a position score the token there.
        mask: (...) bool, True = counts; None counts all. Other rows are not read and get 0.
        temperature: > 0, a number or a floating tensor (...) with one for each token.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        TokenStatistics. A token whose logit is -inf has log-probability -inf; ties of the largest
        logit are hits. A row of -inf throughout, or with a NaN or +inf, is NaN and no hit.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; the message names
            it. Ids and a tensor of temperatures are looked at on the CPU only; on a GPU an id out
            of range gives a log-probability of NaN and no hit.
    """
    tokens = checks.logits_and_tokens(logits, tokens)
    mask = checks.boolean("mask", mask, "tokens", tokens)
    temperature = checks.temperature(temperature, tokens)
    backend = resolve(backend, logits)
    if backend == "reference":
        return TokenStatistics(
            *reference.token_statistics(logits, tokens, mask, temperature=temperature)
        )
    temperatures, number = temperatures_and_number(temperature)
    return TokenStatistics(
        *kernels(backend).token_statistics(
            logits.detach(), tokens, mask, temperatures, scalars(number)
        )
    )
