"""sample_tokens; formulas in ppo_kernels/sampling.py."""

import math as pymath

import torch
import triton
import triton.language as tl

from ppo_kernels._triton import math, sweeps
from ppo_kernels._triton import sampling_sums as sums
from ppo_kernels._triton.common import implement, kernel, launch, per_token, row_counts, rows
from ppo_kernels.schemas import result_dtype


@triton.jit
def _scale(row, temperatures_ptr, temperature, DIVIDES: tl.constexpr, R: tl.constexpr):
    """(temperature to divide by, k in fp64, greedy, valid) of a row."""
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row).to(tl.float64)
    temperature = math.number(temperature, tl.float64)
    valid = (temperature >= 0.0) & (temperature < float("inf"))
    tau = temperature.to(R)
    greedy = tau == 0.0
    tau = tl.where(greedy | (tau != tau), 1.0, tau)
    k = tl.full((), math.LOG2_E, tl.float64)
    if not DIVIDES:
        MOST: tl.constexpr = -sums.LOWEST if R.primitive_bitwidth == 32 else -sums.LOWEST_FP64
        k = tl.minimum(k / tau.to(tl.float64), MOST)
    return tau, k, greedy, valid


@triton.jit
def _store(row, tokens_ptr, logprobs_ptr, V, token, score, largest, k, all_weight, greedy, defined):
    R: tl.constexpr = logprobs_ptr.dtype.element_ty
    log2 = k * (score.to(tl.float64) - largest.to(tl.float64)) - tl.log2(all_weight)
    logprob = tl.where(greedy, 0.0, tl.minimum(log2, 0.0) * math.LN_2)
    tl.store(tokens_ptr + row, tl.where(defined, token, V).to(tl.int64))
    tl.store(logprobs_ptr + row, tl.where(defined, logprob, float("nan")).to(R))


@kernel("logits_ptr")
def _unfiltered(
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    uniforms_ptr,
    mask_ptr,
    temperatures_ptr,
    tokens_ptr,
    logprobs_ptr,
    V: tl.int32,
    temperature: tl.float64,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = logprobs_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0)
    if row_counts(mask_ptr, row):
        start = sweeps.row_start(row, inner, outer_stride, inner_stride)
        p = sweeps._pointer(logits_ptr, start, VEC, ALIGNED)
        tau, scale, greedy, valid = _scale(row, temperatures_ptr, temperature, False, R)
        k = scale.to(R)
        u = tl.load(uniforms_ptr + row).to(tl.float64)
        tops, parts = sums.segment_weights(p, V, k, L, VEC, ALIGNED)
        index = tl.arange(0, sums.SEGMENTS)
        largest = tl.max(tops, axis=0)
        factors = tl.exp2((tops.to(tl.float64) - largest.to(tl.float64)) * scale)
        weights = tl.where(parts == 0.0, 0.0, parts * factors)
        all_weight = tl.sum(weights, axis=0)
        at, before = sums.segment_at(weights, u * all_weight)
        at = tl.where(
            greedy, tl.min(tl.where(tops == largest, index, sums.SEGMENTS - 1), axis=0), at
        )
        target = (u * all_weight - before) / sums.of_segment(factors, at)
        token, score = sums.token_at(
            p,
            V,
            at,
            tl.where(greedy, 0.0, target),
            tau,
            k,
            tl.where(greedy, largest, sums.of_segment(tops, at)),
            largest,
            tl.where(greedy, largest, -float("inf")),
            -float("inf"),
            tl.zeros((), tl.int32),
            tl.where(greedy, 1.0, 0.0).to(tl.float64),
            False,
            L * VEC,
        )
        finite = tl.abs(sums.divided(largest, tau, R)) < float("inf")
        defined = valid & (u >= 0.0) & (u < 1.0) & finite & (all_weight > 0.0)
        _store(
            *(row, tokens_ptr, logprobs_ptr, V, token, score, largest, scale, all_weight),
            *(greedy, defined),
        )
    else:
        tl.store(tokens_ptr + row, 0)
        tl.store(logprobs_ptr + row, 0.0)


@kernel("logits_ptr")
def _filtered(
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    uniforms_ptr,
    mask_ptr,
    temperatures_ptr,
    tokens_ptr,
    logprobs_ptr,
    V: tl.int32,
    temperature: tl.float64,
    top_k: tl.float64,
    top_p: tl.float64,
    least_exponent: tl.float64,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = logprobs_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0)
    if row_counts(mask_ptr, row):
        start = sweeps.row_start(row, inner, outer_stride, inner_stride)
        p = sweeps._pointer(logits_ptr, start, VEC, ALIGNED)
        tau, scale, greedy, valid = _scale(row, temperatures_ptr, temperature, True, R)
        k = scale.to(R)
        u = tl.load(uniforms_ptr + row).to(tl.float64)
        largest = sums.divided(sums.largest(p, V, L, VEC, ALIGNED, R), tau, R)
        finite = tl.abs(largest) < float("inf")
        largest = tl.where(finite, largest, 0.0)
        cut = tl.full((), -float("inf"), R)
        cut = tl.where(greedy, largest, cut)
        below = tl.zeros((), tl.float64)
        searched = below
        top_k, top_p = math.number(top_k, tl.float64), math.number(top_p, tl.float64)
        if (top_k < V) & (greedy == 0):
            cut, _, _ = sums.search(p, V, tau, k, cut, largest, top_k, True, L, VEC, ALIGNED)
        if (top_p < 1.0) & (greedy == 0):
            cut, below, searched = sums.search(
                p, V, tau, k, cut, largest, top_p, False, L, VEC, ALIGNED
            )
        least = math.number(least_exponent, R)
        above, ties = sums.kept_weights(p, V, tau, k, largest, cut, least, L, VEC, ALIGNED)
        exponent = (cut - largest) * k
        tie_weight = tl.exp2(exponent.to(tl.float64))
        skipped = tl.zeros((), tl.int32)
        if (top_p < 1.0) & (greedy == 0):
            skipped = sums.ties_removed(below, tie_weight, tl.sum(ties, axis=0), searched, top_p, R)
        tie_weight = tl.where(exponent >= least, tie_weight, 0.0)
        ties_before = tl.cumsum(ties, axis=0) - ties
        kept_ties = tl.maximum(ties_before + ties - skipped, 0) - tl.maximum(
            ties_before - skipped, 0
        )
        weights = above + tie_weight * kept_ties.to(tl.float64)
        all_weight = tl.sum(weights, axis=0)
        u = tl.where(greedy & (u >= 0.0) & (u < 1.0), 0.0, u)
        at, before = sums.segment_at(weights, u * all_weight)
        token, score = sums.token_at(
            p,
            V,
            at,
            u * all_weight - before,
            tau,
            k,
            largest,
            largest,
            cut,
            least,
            skipped - sums.of_segment(ties_before, at),
            tie_weight,
            True,
            L * VEC,
        )
        defined = valid & (u >= 0.0) & (u < 1.0) & finite
        _store(
            *(row, tokens_ptr, logprobs_ptr, V, token, score, largest, scale, all_weight),
            *(greedy, defined),
        )
    else:
        tl.store(tokens_ptr + row, 0)
        tl.store(logprobs_ptr + row, 0.0)


@implement("sample_tokens")
def sample_tokens(logits, uniforms, mask, temperatures, scalars):
    temperature, top_k, top_p, min_p = scalars.tolist()
    tokens = logits.new_empty(uniforms.shape, dtype=torch.int64)
    logprobs = logits.new_empty(uniforms.shape, dtype=result_dtype(logits))
    laid = rows(logits)
    vocabulary = logits.shape[-1]
    arguments = (
        *laid,
        *(per_token(uniforms), per_token(mask), per_token(temperatures), tokens, logprobs),
        *(vocabulary, temperature),
    )
    options = sweeps.lanes(logits)
    if top_k >= vocabulary and top_p >= 1 and min_p <= 0:
        launch(_unfiltered, uniforms.numel(), *arguments, **options)
    else:
        least_exponent = pymath.log2(min_p) if min_p > 0 else -pymath.inf
        numbers = top_k, top_p, least_exponent
        launch(_filtered, uniforms.numel(), *arguments, *numbers, **options)
    return tokens, logprobs
