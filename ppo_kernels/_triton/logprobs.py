"""token_logprobs and its backward; formulas in ppo_kernels/logprobs.py."""

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
    written_in_place,
)
from ppo_kernels.schemas import ELSEWHERE as ELSEWHERE_ID
from ppo_kernels.schemas import result_dtype

ELSEWHERE = tl.constexpr(ELSEWHERE_ID)


@triton.jit
def load_logit(x_ptr, start, V, token, R: tl.constexpr):
    """The logit of a token, NaN for one outside [0, V)."""
    inside = (token >= 0) & (token < V)
    return tl.load(x_ptr + start + token, mask=inside, other=float("nan")).to(R)


@triton.jit
def score(x_ptr, start, V, token, k, L: tl.constexpr, ALIGNED: tl.constexpr):
    """(shift, log2_sum, logit of the token, logprob, entropy) of a row."""
    # Before the barriers of the sweep: afterwards another thread may write a gradient there.
    logit = load_logit(x_ptr, start, V, token, k.dtype)
    shift, total, weighted = sweeps.softmax_sums(x_ptr, start, V, k, L, ALIGNED)
    log2_sum = tl.log2(total)
    logprob = math.logprob(logit, shift, log2_sum, k)
    return shift, log2_sum, logit, logprob, math.entropy(total, weighted)


@triton.jit
def write_gradient(
    x_ptr,
    out_ptr,
    start,
    out_start,
    V,
    token,
    logit,
    g,
    h,
    entropy,
    shift,
    log2_sum,
    temperature,
    k,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the gradient of g logprob + h entropy in one row of logits.

    (g (1[j = a] - p_j) - h p_j (log p_j + H)) / τ = 2^t_j (a + b t_j) + 1[j = a] g / τ
    """
    weight = -tl.exp2(-log2_sum) / temperature
    a = weight * (g + h * (entropy - log2_sum * math.LN_2))
    b = weight * h * math.LN_2
    t = math.exponents(logit, k, shift)
    at_token = tl.exp2(t) * tl.fma(t, b, a) + g / temperature
    sweeps.gradient(x_ptr, out_ptr, start, out_start, V, k, shift, a, b, L, ALIGNED)
    # Other threads wrote an unfinished value there.
    tl.debug_barrier()
    inside = (token >= 0) & (token < V)
    tl.store(out_ptr + out_start + token, at_token.to(out_ptr.dtype.element_ty), mask=inside)


@kernel("logits_ptr")
def _forward(
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    tokens_ptr,
    mask_ptr,
    logprobs_ptr,
    entropy_ptr,
    stats_ptr,
    temperatures_ptr,
    V: tl.int32,
    temperature: tl.float64,
    k: tl.float64,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0)
    start = sweeps.row_start(row, inner, outer_stride, inner_stride)
    zero = tl.zeros((), R)
    shift, log2_sum, logprob, entropy = zero, zero, zero, zero
    if row_counts(mask_ptr, row):
        _, scale = math.temperature_of(row, temperatures_ptr, temperature, k, R)
        token = tl.load(tokens_ptr + row).to(tl.int64)
        shift, log2_sum, _, logprob, entropy = score(logits_ptr, start, V, token, scale, L, ALIGNED)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(stats_ptr + 2 * row.to(tl.int64), shift)
    tl.store(stats_ptr + 2 * row.to(tl.int64) + 1, log2_sum)


@implement("token_logprobs")
def token_logprobs(logits, tokens, mask, temperatures, scalars):
    (temperature,) = scalars.tolist()
    real = result_dtype(logits)
    logprobs, entropy = (logits.new_empty(tokens.shape, dtype=real) for _ in range(2))
    stats = logits.new_empty((*tokens.shape, 2), dtype=real)
    laid = rows(logits)
    launch(
        _forward,
        tokens.numel(),
        *laid,
        *(per_token(tokens), per_token(mask), logprobs, entropy, stats, per_token(temperatures)),
        logits.shape[-1],
        temperature,
        math.exponent_scale(temperature),
        **sweeps.lanes(logits),
    )
    return logprobs, entropy, stats


@kernel("logits_ptr", "grad_ptr")
def _backward(
    grad_logprobs_ptr,
    grad_entropy_ptr,
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    tokens_ptr,
    entropy_ptr,
    stats_ptr,
    temperatures_ptr,
    grad_ptr,
    grad_inner: tl.int32,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    V: tl.int32,
    parts: tl.int32,
    length: tl.int32,
    temperature: tl.float64,
    k: tl.float64,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`grad_ptr` may be `logits_ptr`."""
    R: tl.constexpr = stats_ptr.dtype.element_ty
    row, begin, n = sweeps.part_of_row(V, parts, length)
    start = sweeps.row_start(row, inner, outer_stride, inner_stride) + begin
    out_start = sweeps.row_start(row, grad_inner, grad_outer_stride, grad_inner_stride) + begin
    g = tl.zeros((), R)
    h = tl.zeros((), R)
    if grad_logprobs_ptr is not None:
        g = tl.load(grad_logprobs_ptr + row).to(R)
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + row).to(R)
    # A row without upstream gradient may be one that a mask excluded, whose token is anything.
    if (g != 0.0) | (h != 0.0):
        stats = stats_ptr + 2 * row.to(tl.int64)
        token = tl.load(tokens_ptr + row).to(tl.int64)
        # NaN, as the log-probability of a token outside of the row.
        g = tl.where((token >= 0) & (token < V) | (token == ELSEWHERE), g, float("nan"))
        # Of the program alone that writes there, and before another thread of it does.
        logit = load_logit(logits_ptr, start, n, token - begin, R)
        tl.debug_barrier()
        tau, scale = math.temperature_of(row, temperatures_ptr, temperature, k, R)
        write_gradient(
            logits_ptr,
            grad_ptr,
            start,
            out_start,
            n,
            token - begin,
            logit,
            g,
            h,
            tl.load(entropy_ptr + row),
            tl.load(stats),
            tl.load(stats + 1),
            tau,
            scale,
            L,
            ALIGNED,
        )
    else:
        sweeps.fill_zero(grad_ptr, out_start, n, L, ALIGNED)


def _write_backward(
    grad_logits,
    grad_logprobs,
    grad_entropy,
    logits,
    tokens,
    entropy,
    softmax_stats,
    temperatures,
    scalars,
):
    (temperature, *_) = scalars.tolist()
    laid, out = rows(logits), rows(grad_logits)
    parts, length = sweeps.split(logits)
    launch(
        _backward,
        tokens.numel() * parts,
        *(per_token(grad_logprobs), per_token(grad_entropy)),
        *laid,
        *map(per_token, (tokens, entropy, softmax_stats, temperatures)),
        *out,
        *(logits.shape[-1], parts, length),
        temperature,
        math.exponent_scale(temperature),
        **sweeps.lanes(logits),
    )


@implement("token_logprobs_backward")
def token_logprobs_backward(grad_logprobs, grad_entropy, logits, *rest):
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_backward(grad_logits, grad_logprobs, grad_entropy, logits, *rest)
    return grad_logits


@implement("token_logprobs_backward_")
def token_logprobs_backward_(grad_logprobs, grad_entropy, logits, *rest):
    with written_in_place(logits) as target:
        _write_backward(target, grad_logprobs, grad_entropy, target, *rest)
