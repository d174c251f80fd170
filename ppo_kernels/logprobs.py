r"""Per-token log-probabilities and entropy from logits.

For a row of logits z (V,), its temperature τ and p = softmax(z / τ)::

    logprob(a) = z_a / τ - log Σ_j exp(z_j / τ)          ∂logprob/∂z_j = (1[j = a] - p_j) / τ
    H          = - Σ_j p_j log p_j                        ∂H/∂z_j       = -p_j (log p_j + H) / τ

so one sweep over the row gives both, and one more gives the gradient of any function of both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import (
    is_differentiable,
    kernels,
    resolve,
    scalars,
    temperatures_and_number,
)


class LogprobsAndEntropy(NamedTuple):
    """Both of shape (...), in nats, fp32 (fp64 for fp64 logits)."""

    logprobs: Tensor
    entropy: Tensor


def within(mask, x):
    """`x`, 0 where a mask is."""
    return x if mask is None or x is None else x.masked_fill(~mask, 0.0)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens, mask, temperatures, scalars, backend):
        ctx.set_materialize_grads(False)
        logprobs, entropy, stats = kernels(backend).token_logprobs(
            logits, tokens, mask, temperatures, scalars
        )
        # A clone: results are the caller's to write to.
        known = tokens, entropy.clone(), stats, temperatures, scalars
        ctx.save_for_backward(mask, logits, *known)
        ctx.backend = backend
        return logprobs, entropy

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_logprobs, grad_entropy):
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        mask, *saved = ctx.saved_tensors
        grad_logits = kernels(ctx.backend).token_logprobs_backward(
            within(mask, grad_logprobs), within(mask, grad_entropy), *saved
        )
        return grad_logits, None, None, None, None, None


def _scored(logits, tokens, mask, temperature, backend):
    tokens = checks.logits_and_tokens(logits, tokens)
    mask = checks.boolean("mask", mask, "tokens", tokens)
    temperature = checks.temperature(temperature, tokens)
    backend = resolve(backend, logits)
    if backend == "reference":
        return reference.token_logprobs_and_entropy(logits, tokens, mask, temperature=temperature)
    temperatures, number = temperatures_and_number(temperature)
    arguments = logits, tokens, mask, temperatures, scalars(number)
    if not is_differentiable(logits):
        return kernels(backend).token_logprobs(*arguments)[:2]
    return _TokenLogprobs.apply(*arguments, backend)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """log softmax(logits / temperature) at the given tokens; formula in `ppo_kernels.logprobs`.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; rows may be strided, V must not.
        tokens: (...) int64 or int32 ids in [0, V); logits at a position score the token there.
        mask: (...) bool, True = counts; None counts all. Other rows are not read, nor are their
            tokens and temperatures: they have log-probability, entropy and gradient 0.
        temperature: > 0, a number or (...) one per token, of which no gradient is taken.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (...) log-probabilities in nats, at most 0, fp32 (fp64 for fp64 logits), differentiable
        in `logits`. A token whose logit is -inf has log-probability -inf.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range; the message names
            it. Ids and a tensor of temperatures are looked at on the CPU only, see
            `check_logprobs`.
    """
    return _scored(logits, tokens, mask, temperature, backend)[0]


def token_logprobs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    backend: str = "auto",
) -> LogprobsAndEntropy:
    """`token_logprobs` and the entropy of each row, at no further sweep over the vocabulary.

    Arguments and errors are those of `token_logprobs`.

    Returns:
        LogprobsAndEntropy: `logprobs` (...) and `entropy` (...), both differentiable in `logits`.
    """
    return LogprobsAndEntropy(*_scored(logits, tokens, mask, temperature, backend))


def check_logprobs(logprobs: Tensor, tokens: Tensor, mask: Tensor | None = None) -> None:
    """Look whether every token that counts has a finite log-probability, and wait for the answer.

    On a GPU the ops never wait for the device, so they cannot raise for what a tensor holds: a
    token outside [0, V) has log-probability NaN there, one whose logit is -inf has -inf, and
    `ppo_loss` and `ppo_loss_` give a NaN loss for either. This names the first of them.

    Args:
        logprobs: (...) as an op gave them.
        tokens: (...) ids that were scored.
        mask: (...) bool, True = counts; None counts all.

    Raises:
        ValueError: naming the token, its place and its log-probability.
        TypeError: an argument of wrong type.
    """
    checks.floating("logprobs", logprobs)
    checks.integer("tokens", tokens)
    checks.same("tokens", tokens, "logprobs", logprobs.shape, logprobs.device)
    checks.boolean("mask", mask, "logprobs", logprobs)
    checks.check_logprobs(logprobs, tokens, mask)
