r"""Kullback-Leibler divergence per token: exact, from two logits, or estimated from samples.

Exact, with p = softmax(z / τ), q = softmax(z_ref / τ)::

    KL(p || q) = Σ_j p_j (log p_j - log q_j)         ∂KL/∂z_j = p_j (log p_j - log q_j - KL) / τ

Estimators of KL(π || π_ref) from tokens sampled from π, with Δ = logprob - ref_logprob
(J. Schulman, "Approximating KL Divergence", 2020)::

    k1 = Δ      k2 = Δ² / 2      k3 = exp(-Δ) - 1 + Δ      abs = |Δ|

In k3 Δ is bounded at ±80, beyond which the gradient is 0.
"""

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
from ppo_kernels.logprobs import within
from ppo_kernels.schemas import promoted


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, mask, temperatures, scalars, backend):
        kl, *stats = kernels(backend).kl_divergence(logits, ref_logits, mask, temperatures, scalars)
        # A clone: results are the caller's to write to.
        ctx.save_for_backward(mask, logits, ref_logits, kl.clone(), *stats, temperatures, scalars)
        ctx.backend = backend
        return kl

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_kl):
        mask, *saved = ctx.saved_tensors
        grad_logits = kernels(ctx.backend).kl_divergence_backward(within(mask, grad_kl), *saved)
        return grad_logits, None, None, None, None, None


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Exact KL(softmax(logits / τ) || softmax(ref_logits / τ)) of each row, in nats.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64.
        ref_logits: the same shape, dtype and device; a constant: no gradient flows into it.
        mask: (...) bool, True = counts; None counts all. Other rows are not read: they have KL and
            gradient 0.
        temperature: τ > 0, divides both: a number or (...) one per row, of which no gradient is
            taken.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (...) fp32 (fp64 for fp64 logits), at least 0, differentiable in `logits` under any upstream
        gradient. Where p_j = 0 a term is 0; +inf where the reference excludes what p allows,
        by -inf or by a logit farther below its largest than the dtype's range (finfo.min).

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value. A tensor of temperatures
            is looked at on the CPU only.
    """
    checks.floating("logits", logits)
    checks.vocabulary("logits", logits)
    checks.per_token("ref_logits", ref_logits, "logits", logits)
    if ref_logits.dtype != logits.dtype:
        raise TypeError(
            f"ref_logits must have dtype {logits.dtype} like logits, got {ref_logits.dtype}"
        )
    rows, like = logits[..., 0], "logits without its last dimension"
    mask = checks.boolean("mask", mask, like, rows)
    temperature = checks.temperature(temperature, rows, like)
    ref_logits = ref_logits.detach()
    if is_differentiable(logits):
        ref_logits = checks.constant(ref_logits)
    backend = resolve(backend, logits)
    if backend == "reference":
        return reference.kl_divergence(logits, ref_logits, mask, temperature=temperature)
    temperatures, number = temperatures_and_number(temperature)
    arguments = logits, ref_logits, mask, temperatures, scalars(number)
    if not is_differentiable(logits):
        return kernels(backend).kl_divergence(*arguments)[0]
    return _KLDivergence.apply(*arguments, backend)


class _KLEstimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, ref_logprobs, estimator, backend):
        kl, derivative = kernels(backend).kl_estimate(logprobs, ref_logprobs, estimator)
        ctx.save_for_backward(derivative)
        ctx.dtypes = logprobs.dtype, ref_logprobs.dtype
        return kl

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_kl):
        (derivative,) = ctx.saved_tensors
        grad, (dtype, ref_dtype) = reference.chained(grad_kl, derivative), ctx.dtypes
        return grad.to(dtype), (-grad).to(ref_dtype), None, None


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: str,
    backend: str = "auto",
) -> Tensor:
    """Per-token estimate of KL(π || π_ref) from the log-probabilities of sampled tokens.

    Args:
        logprobs, ref_logprobs: (...) in nats, the same shape and device.
        mask: (...) bool, True = counts; None counts all. Elsewhere estimate and gradients are 0,
            whatever stands there.
        estimator: "k1", "k2", "k3" or "abs"; formulas in `ppo_kernels.kl`.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (...) fp32 (fp64 where an input is), differentiable in both.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("logprobs", logprobs)
    checks.per_token("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.choice("estimator", estimator, reference.ESTIMATORS)
    mask = checks.boolean("mask", mask, "logprobs", logprobs)
    logprobs, ref_logprobs = within(mask, logprobs), within(mask, ref_logprobs)
    logprobs = promoted(logprobs, ref_logprobs)
    backend = resolve(backend, logprobs)
    if backend == "reference":
        return reference.kl_estimate(logprobs, ref_logprobs, estimator=estimator)
    index = reference.ESTIMATORS.index(estimator)
    return _KLEstimate.apply(logprobs, ref_logprobs, index, backend)
