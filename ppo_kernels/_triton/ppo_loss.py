"""ppo_loss, ppo_loss_and_gradient and ppo_loss_; formulas in ppo_kernels/ppo_loss.py.

Nothing waits for the device, so nothing raises for what a tensor holds: `loss` is NaN where a
counted token has a log-probability or an advantage that is not finite.
"""

import torch
import triton
import triton.language as tl

from ppo_kernels._triton import math, sweeps
from ppo_kernels._triton.common import (
    begins_aligned,
    implement,
    kernel,
    launch,
    per_token,
    row_counts,
    rows,
    written_in_place,
)
from ppo_kernels._triton.logprobs import score, write_gradient
from ppo_kernels._triton.means import counted, load_denominator, means
from ppo_kernels.schemas import LossInputs, result_dtype


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@kernel("logits_ptr", "grad_ptr")
def _ppo_loss(
    logits_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    tokens_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    ref_logprobs_ptr,
    denominator_ptr,
    temperatures_ptr,
    logprobs_ptr,
    entropy_ptr,
    terms_ptr,
    stats_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_ptr,
    grad_inner: tl.int32,
    grad_outer_stride: tl.int64,
    grad_inner_stride: tl.int64,
    n: tl.int64,
    V: tl.int32,
    temperature: tl.float64,
    k: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    kl_estimator: tl.int32,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One row: its token's terms of the loss, and their gradient at `grad_ptr`, which may be
    `logits_ptr`, or, where there are `stats_ptr` and those after it, what the backward needs."""
    R: tl.constexpr = logprobs_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    start = sweeps.row_start(tl.program_id(0), inner, outer_stride, inner_stride)
    grad_start = sweeps.row_start(
        tl.program_id(0), grad_inner, grad_outer_stride, grad_inner_stride
    )
    counts = row_counts(mask_ptr, row)
    zero = tl.zeros((), R)
    logprob, entropy, shift, log2_sum, g, h = zero, zero, zero, zero, zero, zero
    loss, policy, kl, approx_kl, clip = zero, zero, zero, zero, zero
    if counts:
        tau, scale = math.temperature_of(row, temperatures_ptr, temperature, k, R)
        token = tl.load(tokens_ptr + row).to(tl.int64)
        shift, log2_sum, logit, logprob, entropy = score(
            logits_ptr, start, V, token, scale, L, ALIGNED
        )
        old_logprob = tl.load(old_logprobs_ptr + row).to(R)
        advantage = tl.load(advantages_ptr + row).to(R)
        policy, g, approx_kl, clipped = math.policy_term(
            logprob - old_logprob,
            advantage,
            math.number(1.0 - clip_low, R),
            math.number(1.0 + clip_high, R),
            math.number(dual_clip, R),
        )
        clip = clipped.to(R)
        finite = _finite(logprob) & _finite(old_logprob) & _finite(advantage)
        if ref_logprobs_ptr is not None:
            ref_logprob = tl.load(ref_logprobs_ptr + row).to(R)
            finite = finite & _finite(ref_logprob)
            kl, kl_grad = math.kl_term(kl_estimator, logprob - ref_logprob)
            g += math.number(kl_coef, R) * kl_grad
        h = -math.number(entropy_coef, R)
        loss = policy + h * entropy + math.number(kl_coef, R) * kl
        loss = tl.where(finite, loss, float("nan"))
        denominator = load_denominator(denominator_ptr, n).to(R)
        g /= denominator
        h /= denominator
        if stats_ptr is None:
            write_gradient(
                logits_ptr,
                grad_ptr,
                start,
                grad_start,
                V,
                token,
                logit,
                g,
                h,
                entropy,
                shift,
                log2_sum,
                tau,
                scale,
                L,
                ALIGNED,
            )
    else:
        if stats_ptr is None:
            sweeps.fill_zero(grad_ptr, grad_start, V, L, ALIGNED)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(terms_ptr + row, loss)
    tl.store(terms_ptr + n + row, policy)
    tl.store(terms_ptr + 2 * n + row, entropy)
    tl.store(terms_ptr + 3 * n + row, kl)
    tl.store(terms_ptr + 4 * n + row, approx_kl)
    tl.store(terms_ptr + 5 * n + row, clip)
    if stats_ptr is not None:
        tl.store(stats_ptr + 2 * row, shift)
        tl.store(stats_ptr + 2 * row + 1, log2_sum)
        tl.store(grad_logprobs_ptr + row, g)
        tl.store(grad_entropy_ptr + row, h)


def _run(logits, *arguments, saved=(None,) * 3, grad=None):
    """The results of all three ops, which leave in `saved` what a backward needs, or the gradient
    in `grad`."""
    *inputs, scalars, kl_estimator = arguments
    inputs = LossInputs(*inputs)
    temperature, *numbers = scalars.tolist()
    shape, n = inputs.tokens.shape, inputs.tokens.numel()
    logprobs, entropy = (logits.new_empty(shape, dtype=result_dtype(logits)) for _ in range(2))
    terms = logprobs.new_empty((6, n))
    denominator = counted(inputs.mask, inputs.denominator)
    laid = rows(logits)
    out = laid if grad is None else rows(grad)
    launch(
        _ppo_loss,
        n,
        *laid,
        *map(per_token, inputs._replace(denominator=denominator)),
        *(logprobs, entropy, terms, *saved, *out, n),
        *(logits.shape[-1], temperature, math.exponent_scale(temperature)),
        *(*numbers, kl_estimator),
        **sweeps.lanes(logits),
    )
    return *means(terms, denominator, n, logprobs.dtype), logprobs, entropy


@implement("ppo_loss")
def ppo_loss(logits, tokens, *arguments):
    real = result_dtype(logits)
    shapes = (*tokens.shape, 2), tokens.shape, tokens.shape
    saved = tuple(logits.new_empty(shape, dtype=real) for shape in shapes)
    return *_run(logits, tokens, *arguments, saved=saved), *saved


@implement("ppo_loss_and_gradient")
def ppo_loss_and_gradient(logits, tokens, *arguments):
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_run(logits, tokens, *arguments, grad=grad), grad


@implement("ppo_loss_")
def ppo_loss_(logits, tokens, *arguments):
    with written_in_place(logits) as target:
        return _run(target, tokens, *arguments, grad=target)


@kernel("grad_ptr")
def _rescale(
    grad_ptr,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    scale_ptr,
    V: tl.int32,
    parts: tl.int32,
    length: tl.int32,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    factor = tl.load(scale_ptr)
    if factor != 1.0:
        row, begin, n = sweeps.part_of_row(V, parts, length)
        start = sweeps.row_start(row, inner, outer_stride, inner_stride) + begin
        sweeps.scale(grad_ptr, start, n, factor, L, ALIGNED)


@implement("rescale_")
def rescale_(grad, scale):
    with written_in_place(grad, anywhere=True) as target:
        options = sweeps.lanes(target)
        options["ALIGNED"] &= begins_aligned(target)
        parts, length = sweeps.split(target)
        launch(
            _rescale,
            grad.shape[:-1].numel() * parts,
            *rows(target, anywhere=True),
            scale.to(result_dtype(grad)),
            *(grad.shape[-1], parts, length),
            **options,
        )
