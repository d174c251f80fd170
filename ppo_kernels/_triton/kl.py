"""kl_divergence and kl_estimate; formulas in ppo_kernels/kl.py."""

import torch
import triton
import triton.language as tl

from ppo_kernels._triton import math, sweeps
from ppo_kernels._triton.common import (
    implement,
    kernel,
    launch,
    per_token,
    row_counts,
    rows,
)
from ppo_kernels._triton.means import BLOCK
from ppo_kernels.schemas import result_dtype


@kernel("logits_ptr", "ref_logits_ptr")
def _forward(
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ref_logits_ptr,
    ref_inner: tl.int32,
    ref_outer_stride: tl.int64,
    ref_inner_stride: tl.int64,
    mask_ptr,
    kl_ptr,
    stats_ptr,
    ref_stats_ptr,
    temperatures_ptr,
    V: tl.int32,
    temperature: tl.float64,
    k: tl.float64,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0)
    start = sweeps.row_start(row, inner, outer_stride, inner_stride)
    ref_start = sweeps.row_start(row, ref_inner, ref_outer_stride, ref_inner_stride)
    R: tl.constexpr = kl_ptr.dtype.element_ty
    zero = tl.zeros((), R)
    kl, shift, log2_sum, ref_shift, ref_log2_sum = zero, zero, zero, zero, zero
    if row_counts(mask_ptr, row):
        _, scale = math.temperature_of(row, temperatures_ptr, temperature, k, R)
        shift, total, ref_shift, ref_total, cross = sweeps.joint_sums(
            logits_ptr, ref_logits_ptr, start, ref_start, V, scale, L, ALIGNED
        )
        kl = math.kl(total, ref_total, cross)
        log2_sum, ref_log2_sum = tl.log2(total), tl.log2(ref_total)
    tl.store(kl_ptr + row, kl)
    stats = 2 * row.to(tl.int64)
    tl.store(stats_ptr + stats, shift)
    tl.store(stats_ptr + stats + 1, log2_sum)
    tl.store(ref_stats_ptr + stats, ref_shift)
    tl.store(ref_stats_ptr + stats + 1, ref_log2_sum)


@implement("kl_divergence")
def kl_divergence(logits, ref_logits, mask, temperatures, scalars):
    (temperature,) = scalars.tolist()
    shape, real = logits.shape[:-1], result_dtype(logits)
    kl = logits.new_empty(shape, dtype=real)
    stats, ref_stats = (logits.new_empty((*shape, 2), dtype=real) for _ in range(2))
    laid, ref_laid = rows(logits), rows(ref_logits)
    launch(
        _forward,
        kl.numel(),
        *laid,
        *ref_laid,
        *(per_token(mask), kl, stats, ref_stats, per_token(temperatures)),
        logits.shape[-1],
        temperature,
        math.exponent_scale(temperature),
        **sweeps.lanes(logits),
    )
    return kl, stats, ref_stats


@kernel("logits_ptr", "ref_logits_ptr", "grad_ptr")
def _backward(
    grad_kl_ptr,
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    ref_logits_ptr,
    ref_inner: tl.int32,
    ref_outer_stride: tl.int64,
    ref_inner_stride: tl.int64,
    kl_ptr,
    stats_ptr,
    ref_stats_ptr,
    temperatures_ptr,
    grad_ptr,
    V: tl.int32,
    parts: tl.int32,
    length: tl.int32,
    temperature: tl.float64,
    k: tl.float64,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """p (log p - log q - KL) g / τ = 2^t (a + b (t - t_ref))"""
    R: tl.constexpr = kl_ptr.dtype.element_ty
    row, begin, n = sweeps.part_of_row(V, parts, length)
    out_start = row.to(tl.int64) * V + begin
    g = tl.load(grad_kl_ptr + row).to(R)
    if g != 0.0:
        stats = 2 * row.to(tl.int64)
        shift, log2_sum = tl.load(stats_ptr + stats), tl.load(stats_ptr + stats + 1)
        ref_shift = tl.load(ref_stats_ptr + stats)
        ref_log2_sum = tl.load(ref_stats_ptr + stats + 1)
        tau, scale = math.temperature_of(row, temperatures_ptr, temperature, k, R)
        weight = g * tl.exp2(-log2_sum) / tau
        sweeps.kl_gradient(
            logits_ptr,
            ref_logits_ptr,
            grad_ptr,
            sweeps.row_start(row, inner, outer_stride, inner_stride) + begin,
            sweeps.row_start(row, ref_inner, ref_outer_stride, ref_inner_stride) + begin,
            out_start,
            n,
            scale,
            shift,
            ref_shift,
            weight * ((ref_log2_sum - log2_sum) * math.LN_2 - tl.load(kl_ptr + row)),
            weight * math.LN_2,
            L,
            ALIGNED,
        )
    else:
        sweeps.fill_zero(grad_ptr, out_start, n, L, ALIGNED)


@implement("kl_divergence_backward")
def kl_divergence_backward(
    grad_kl, logits, ref_logits, kl, softmax_stats, ref_softmax_stats, temperatures, scalars
):
    (temperature,) = scalars.tolist()
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    laid, ref_laid = rows(logits), rows(ref_logits)
    parts, length = sweeps.split(logits)
    launch(
        _backward,
        kl.numel() * parts,
        per_token(grad_kl),
        *laid,
        *ref_laid,
        *map(per_token, (kl, softmax_stats, ref_softmax_stats, temperatures)),
        grad_logits,
        *(logits.shape[-1], parts, length),
        temperature,
        math.exponent_scale(temperature),
        **sweeps.lanes(logits),
    )
    return grad_logits


@kernel()
def _estimate(
    logprobs_ptr,
    ref_logprobs_ptr,
    kl_ptr,
    derivative_ptr,
    n: tl.int64,
    estimator: tl.int32,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = kl_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    logprob = tl.load(logprobs_ptr + i, mask=inside).to(R)
    ref_logprob = tl.load(ref_logprobs_ptr + i, mask=inside).to(R)
    value, derivative = math.kl_term(estimator, logprob - ref_logprob)
    tl.store(kl_ptr + i, value, mask=inside)
    tl.store(derivative_ptr + i, derivative, mask=inside)


@implement("kl_estimate")
def kl_estimate(logprobs, ref_logprobs, estimator):
    real = result_dtype(logprobs)
    value, derivative = (logprobs.new_empty(logprobs.shape, dtype=real) for _ in range(2))
    n = value.numel()
    launch(
        _estimate,
        triton.cdiv(n, BLOCK),
        *(per_token(logprobs), per_token(ref_logprobs), value, derivative, n, estimator),
        BLOCK=BLOCK,
    )
    return value, derivative
