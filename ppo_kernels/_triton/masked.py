"""masked_mean and masked_whiten; formulas in ppo_kernels/masked.py.

Sums are taken in fp64 over blocks of fixed size and merged in fixed order.
"""

import torch
import triton
import triton.language as tl

from ppo_kernels._triton import means
from ppo_kernels._triton.common import implement, kernel, launch, per_token
from ppo_kernels.schemas import result_dtype

_BLOCK = 4096
# Blocks whose sums are merged at a time.
_MERGED = 1024


@kernel()
def _sums(x_ptr, mask_ptr, parts_ptr, n: tl.int64, BLOCK: tl.constexpr):
    """Count, sum, sum of squares about its own mean, and that mean, of each block."""
    block, counts, i = means.which_count(mask_ptr, n, BLOCK)
    x = tl.load(x_ptr + i, mask=counts, other=0.0).to(tl.float64)
    count = tl.sum(counts.to(tl.float64), axis=0)
    # From the least on: what is equal has no variance at all.
    least = tl.min(tl.where(counts, x, float("inf")), axis=0)
    above = tl.where(counts, x - least, 0.0)
    mean = tl.sum(above, axis=0) / tl.maximum(count, 1.0)
    centred = tl.where(counts, above - mean, 0.0)
    means.store_part(parts_ptr, block, 0, counts)
    means.store_part(parts_ptr, block, 1, x)
    means.store_part(parts_ptr, block, 2, centred * centred)
    tl.store(parts_ptr + 3 * tl.num_programs(0) + block, tl.where(count > 0.0, least + mean, 0.0))


@triton.jit
def _part(parts_ptr, parts, which, first, BLOCK: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    return tl.load(parts_ptr + which * parts + i, mask=i < parts, other=0.0)


@triton.jit
def _count_and_sum(parts_ptr, parts, BLOCK: tl.constexpr):
    counts = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts, BLOCK):
        counts += _part(parts_ptr, parts, 0, first, BLOCK)
        sums += _part(parts_ptr, parts, 1, first, BLOCK)
    return tl.sum(counts, axis=0), tl.sum(sums, axis=0)


@kernel()
def _mean(parts_ptr, parts: tl.int32, denominator_ptr, mean_ptr, weight_ptr, BLOCK: tl.constexpr):
    R: tl.constexpr = mean_ptr.dtype.element_ty
    count, total = _count_and_sum(parts_ptr, parts, BLOCK)
    denominator = means.load_denominator(denominator_ptr, count)
    tl.store(mean_ptr, (total / denominator).to(R))
    tl.store(weight_ptr, (1.0 / denominator).to(R))


@kernel()
def _moments(parts_ptr, parts: tl.int32, moments_ptr, eps: tl.float64, BLOCK: tl.constexpr):
    """(mean, 1 / sqrt(variance + eps), 0 for 1 / 0); the blocks' squares are moved to the mean of
    all."""
    lowest = tl.full((BLOCK,), float("inf"), tl.float64)
    for first in range(0, parts, BLOCK):
        counts = _part(parts_ptr, parts, 0, first, BLOCK)
        means_of = _part(parts_ptr, parts, 3, first, BLOCK)
        lowest = tl.minimum(lowest, tl.where(counts > 0.0, means_of, float("inf")))
    least = tl.min(lowest, axis=0)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts, BLOCK):
        counts = _part(parts_ptr, parts, 0, first, BLOCK)
        above = _part(parts_ptr, parts, 3, first, BLOCK) - least
        count += counts
        total += tl.where(counts > 0.0, counts * above, 0.0)
    all_counts = tl.maximum(tl.sum(count, axis=0), 1.0)
    mean = tl.sum(total, axis=0) / all_counts
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts, BLOCK):
        counts = _part(parts_ptr, parts, 0, first, BLOCK)
        shift = _part(parts_ptr, parts, 3, first, BLOCK) - least - mean
        moved = _part(parts_ptr, parts, 2, first, BLOCK) + counts * shift * shift
        squares += tl.where(counts > 0.0, moved, 0.0)
    variance = tl.sum(squares, axis=0) / all_counts + eps
    tl.store(moments_ptr, least + mean)
    tl.store(moments_ptr + 1, tl.where(variance == 0.0, 0.0, 1.0 / tl.sqrt(variance)))


@kernel()
def _whiten(x_ptr, mask_ptr, moments_ptr, whitened_ptr, n: tl.int64, BLOCK: tl.constexpr):
    _, counts, i = means.which_count(mask_ptr, n, BLOCK)
    x = tl.load(x_ptr + i, mask=counts, other=0.0).to(tl.float64)
    whitened = (x - tl.load(moments_ptr)) * tl.load(moments_ptr + 1)
    whitened = tl.where(counts, whitened, 0.0).to(whitened_ptr.dtype.element_ty)
    tl.store(whitened_ptr + i, whitened, mask=i < n)


def _parts(x, mask):
    parts = x.new_empty((4, triton.cdiv(x.numel(), _BLOCK)), dtype=torch.float64)
    launch(_sums, parts.shape[1], x, mask, parts, x.numel(), BLOCK=_BLOCK, num_warps=8)
    return parts


@implement("masked_mean")
def masked_mean(x, mask, denominator):
    parts = _parts(per_token(x), per_token(mask))
    mean, weight = (x.new_empty((), dtype=result_dtype(x)) for _ in range(2))
    arguments = parts, parts.shape[1], denominator, mean, weight
    launch(_mean, 1, *arguments, BLOCK=_MERGED, num_warps=4)
    return mean, weight


@implement("masked_whiten")
def masked_whiten(x, mask, scalars):
    (eps,) = scalars.tolist()
    x, mask = per_token(x), per_token(mask)
    parts = _parts(x, mask)
    blocks = parts.shape[1]
    moments = parts.new_empty(2)
    launch(_moments, 1, parts, blocks, moments, eps, BLOCK=_MERGED, num_warps=4)
    whitened = x.new_empty(x.shape, dtype=result_dtype(x))
    launch(_whiten, blocks, x, mask, moments, whitened, x.numel(), BLOCK=_BLOCK, num_warps=8)
    return whitened
