"""token_statistics; formulas in ppo_kernels/statistics.py."""

import torch
import triton.language as tl

from ppo_kernels._triton import math, sweeps
from ppo_kernels._triton.common import implement, kernel, launch, per_token, row_counts, rows
from ppo_kernels._triton.logprobs import load_logit
from ppo_kernels.schemas import result_dtype


@kernel("logits_ptr")
def _forward(
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    tokens_ptr,
    mask_ptr,
    temperatures_ptr,
    logprobs_ptr,
    entropy_ptr,
    max_prob_ptr,
    sum_sq_probs_ptr,
    top1_ptr,
    varentropy_ptr,
    V: tl.int32,
    temperature: tl.float64,
    k: tl.float64,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = logprobs_ptr.dtype.element_ty
    row = tl.program_id(0)
    start = sweeps.row_start(row, inner, outer_stride, inner_stride)
    zero = tl.zeros((), R)
    logprob, entropy, max_prob, sum_sq_probs, varentropy = zero, zero, zero, zero, zero
    top1 = zero != 0.0
    if row_counts(mask_ptr, row):
        _, scale = math.temperature_of(row, temperatures_ptr, temperature, k, R)
        shift, total, weighted, squares, second, largest = sweeps.moments(
            logits_ptr, start, V, scale, L, ALIGNED
        )
        token = tl.load(tokens_ptr + row).to(tl.int64)
        logit = load_logit(logits_ptr, start, V, token, R)
        logprob = math.logprob(logit, shift, tl.log2(total), scale)
        entropy = math.entropy(total, weighted)
        max_prob = math.at_most_one(tl.exp2(math.scaled(largest, scale, shift)) / total)
        sum_sq_probs = math.at_most_one(squares / total / total)
        top1 = (logit == largest) & (logprob == logprob)
        varentropy = math.varentropy(total, weighted, second)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(max_prob_ptr + row, max_prob)
    tl.store(sum_sq_probs_ptr + row, sum_sq_probs)
    tl.store(top1_ptr + row, top1)
    tl.store(varentropy_ptr + row, varentropy)


@implement("token_statistics")
def token_statistics(logits, tokens, mask, temperatures, scalars):
    (temperature,) = scalars.tolist()
    real = result_dtype(logits)
    logprobs, entropy, max_prob, sum_sq_probs, varentropy = (
        logits.new_empty(tokens.shape, dtype=real) for _ in range(5)
    )
    top1 = logits.new_empty(tokens.shape, dtype=torch.bool)
    results = logprobs, entropy, max_prob, sum_sq_probs, top1, varentropy
    laid = rows(logits)
    launch(
        _forward,
        tokens.numel(),
        *(*laid, per_token(tokens), per_token(mask), per_token(temperatures), *results),
        logits.shape[-1],
        temperature,
        math.exponent_scale(temperature),
        **sweeps.lanes(logits),
    )
    return results
