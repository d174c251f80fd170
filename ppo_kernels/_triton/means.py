"""Means over the tokens that count: partial sums in blocks of fixed size, added in fixed order."""

import torch
import triton
import triton.language as tl

from ppo_kernels._triton.common import kernel, launch

# Tokens to a program where an op is a few numbers per token.
BLOCK = 1024


def counted(mask, denominator):
    """What a mean divides by: the caller's denominator or the mask's sum; None for all tokens."""
    if denominator is not None or mask is None:
        return denominator
    return mask.sum(dtype=torch.float64)


@triton.jit
def load_denominator(denominator_ptr, n):
    """In fp64; `n` where there is no tensor. 0 counts as 1, and less than that gives NaN."""
    if denominator_ptr is not None:
        value = tl.load(denominator_ptr).to(tl.float64)
    else:
        value = n.to(tl.float64)
    return tl.where(value == 0.0, 1.0, tl.where(value > 0.0, value, float("nan")))


@triton.jit
def which_count(mask_ptr, n, BLOCK: tl.constexpr):
    """(number of this program's block, which of its tokens count, their indices)."""
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts = i < n
    if mask_ptr is not None:
        counts = counts & (tl.load(mask_ptr + i, mask=counts, other=0) != 0)
    return block, counts, i


@triton.jit
def store_part(parts_ptr, block, which, x):
    """The block's part of sum number `which`."""
    part = tl.sum(x.to(tl.float64), axis=0)
    tl.store(parts_ptr + which * tl.num_programs(0) + block, part)


@kernel()
def _means(parts_ptr, parts: tl.int64, denominator_ptr, n: tl.int64, means, BLOCK: tl.constexpr):
    which = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, parts, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        sums += tl.load(parts_ptr + which * parts + i, mask=i < parts, other=0.0).to(tl.float64)
    mean = tl.sum(sums, axis=0) / load_denominator(denominator_ptr, n)
    for i in tl.static_range(len(means)):
        if which == i:
            tl.store(means[i], mean.to(means[i].dtype.element_ty))


def means(parts, denominator, n, dtype):
    """Sums over the rows of `parts` (K, P), in fp64, over the denominator: K scalars."""
    results = tuple(parts.new_empty((), dtype=dtype) for _ in range(parts.shape[0]))
    arguments = parts, parts.shape[1], denominator, n, results
    launch(_means, len(results), *arguments, BLOCK=4 * BLOCK, num_warps=8)
    return results
