"""The losses of log-probs and values; formulas in ppo_kernels/token_losses.py."""

import torch
import triton
import triton.language as tl

from ppo_kernels._triton import math
from ppo_kernels._triton.common import implement, kernel, launch, per_token
from ppo_kernels._triton.means import (
    BLOCK,
    counted,
    load_denominator,
    means,
    store_part,
    which_count,
)
from ppo_kernels.schemas import result_dtype


def _loss_of_blocks(function, sums, inputs, mask, denominator, scalars):
    """So many means, the loss first, and its gradient in the first of `inputs`, by a kernel over
    blocks of tokens."""
    grad = inputs[0].new_empty(inputs[0].shape, dtype=result_dtype(inputs[0]))
    denominator, n = counted(mask, denominator), grad.numel()
    parts = grad.new_empty((sums, triton.cdiv(n, BLOCK)), dtype=torch.float64)
    launch(
        function,
        parts.shape[1],
        *map(per_token, (*inputs, mask)),
        *(denominator, parts, grad, n, *scalars.tolist()),
        BLOCK=BLOCK,
    )
    return *means(parts, denominator, n, grad.dtype), grad


@kernel()
def _clipped_policy_loss(
    logprobs_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    denominator_ptr,
    parts_ptr,
    grad_ptr,
    n: tl.int64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = grad_ptr.dtype.element_ty
    block, counts, i = which_count(mask_ptr, n, BLOCK)
    logprob = tl.load(logprobs_ptr + i, mask=counts, other=0.0).to(R)
    old_logprob = tl.load(old_logprobs_ptr + i, mask=counts, other=0.0).to(R)
    advantage = tl.load(advantages_ptr + i, mask=counts, other=0.0).to(R)
    loss, grad, approx_kl, clipped = math.policy_term(
        logprob - old_logprob,
        advantage,
        math.number(1.0 - clip_low, R),
        math.number(1.0 + clip_high, R),
        math.number(dual_clip, R),
    )
    denominator = load_denominator(denominator_ptr, n).to(R)
    tl.store(grad_ptr + i, tl.where(counts, grad / denominator, 0.0), mask=i < n)
    store_part(parts_ptr, block, 0, tl.where(counts, loss, 0.0))
    store_part(parts_ptr, block, 1, tl.where(counts, approx_kl, 0.0))
    store_part(parts_ptr, block, 2, tl.where(counts, clipped.to(R), 0.0))


@implement("clipped_policy_loss")
def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, denominator, scalars):
    inputs = logprobs, old_logprobs, advantages
    return _loss_of_blocks(_clipped_policy_loss, 3, inputs, mask, denominator, scalars)


@kernel()
def _value_loss(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,
    denominator_ptr,
    parts_ptr,
    grad_ptr,
    n: tl.int64,
    clip: tl.float64,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = grad_ptr.dtype.element_ty
    block, counts, i = which_count(mask_ptr, n, BLOCK)
    value = tl.load(values_ptr + i, mask=counts, other=0.0).to(R)
    old_value = tl.load(old_values_ptr + i, mask=counts, other=0.0).to(R)
    target = tl.load(returns_ptr + i, mask=counts, other=0.0).to(R)
    loss, grad, clipped = math.value_term(value, old_value, target, math.number(clip, R))
    denominator = load_denominator(denominator_ptr, n).to(R)
    tl.store(grad_ptr + i, tl.where(counts, grad / denominator, 0.0), mask=i < n)
    store_part(parts_ptr, block, 0, tl.where(counts, loss, 0.0))
    store_part(parts_ptr, block, 1, tl.where(counts, clipped.to(R), 0.0))


@implement("value_loss")
def value_loss(values, old_values, returns, mask, denominator, scalars):
    inputs = values, old_values, returns
    return _loss_of_blocks(_value_loss, 2, inputs, mask, denominator, scalars)
