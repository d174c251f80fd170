r"""Kullback-Leibler divergence per token: exact, from two logits, or estimated from samples.

Exact, with p = softmax(z / τ), q = softmax(z_ref / τ)::

    KL(p || q) = Σ_j p_j (log p_j - log q_j)         ∂KL/∂z_j = p_j (log p_j - log q_j - KL) / τ

Estimators of KL(π || π_ref) from tokens sampled from π, with Δ = logprob - ref_logprob
(J. Schulman, "Approximating KL Divergence", 2020)::

    k1 = Δ      k2 = Δ² / 2      k3 = exp(-Δ) - 1 + Δ      abs = |Δ|

In k3 Δ is bounded at ±80, beyond which the gradient is 0.
"""

import torch

from ppo_kernels import checks, reference
from ppo_kernels.dispatch import kernels, resolve, scalars
from ppo_kernels.schemas import promoted


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, temperatures, scalars, backend):
        kl, stats, ref_stats = kernels(backend).kl_divergence(
            logits, ref_logits, temperatures, scalars
        )
        # A clone: results are the caller's to write to.
        saved = kl.clone(), stats, ref_stats, temperatures, scalars
        ctx.save_for_backward(logits, ref_logits, *saved)
        ctx.backend = backend
        return kl

    @staticmethod
    @checks.first_order
    def backward(ctx, grad_kl):
        grad_logits = kernels(ctx.backend).kl_divergence_backward(grad_kl, *ctx.saved_tensors)
        return grad_logits, None, None, None, None


def kl_divergence(logits, ref_logits, *, temperature=1.0, backend="auto"):
    """Exact KL(softmax(logits / τ) || softmax(ref_logits / τ)) of each row, in nats.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64.
        ref_logits: the same shape, dtype and device; a constant: no gradient flows into it.
        temperature: τ > 0, divides both: a number or (...) one per row, of which no gradient is
            taken.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (...) fp32 (fp64 for fp64 logits), at least 0, differentiable in `logits` under any upstream
        gradient. Where p_j = 0 a term is 0; +inf where the reference excludes what p allows.

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
    temperatures, number = checks.temperature(
        temperature, logits[..., 0], "logits without its last dimension"
    )
    backend = resolve(backend, logits)
    if backend == "reference":
        return reference.kl_divergence(logits, ref_logits, temperature=temperature)
    return _KLDivergence.apply(logits, ref_logits.detach(), temperatures, scalars(number), backend)


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


def kl_estimate(logprobs, ref_logprobs, *, estimator, backend="auto"):
    """Per-token estimate of KL(π || π_ref) from the log-probabilities of sampled tokens.

    Args:
        logprobs, ref_logprobs: (...) in nats, the same shape and device.
        estimator: "k1", "k2", "k3" or "abs"; see the module for the formulas.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        (...) fp32 (fp64 where an input is), differentiable in both.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    checks.floating("logprobs", logprobs)
    checks.per_token("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.choice("estimator", estimator, reference.ESTIMATORS)
    logprobs = promoted(logprobs, ref_logprobs)
    backend = resolve(backend, logprobs)
    if backend == "reference":
        return reference.kl_estimate(logprobs, ref_logprobs, estimator=estimator)
    estimator = reference.ESTIMATORS.index(estimator)
    return _KLEstimate.apply(logprobs, ref_logprobs, estimator, backend)
