"""What runs over the vocabulary: one program walks one row with L lanes.

A lane takes VEC elements at a time, 16 bytes of them. Where V is a multiple of VEC they are
ALIGNED: they stand together and are one load, for `common.rows` sees to it that rows begin at
multiples of 16 bytes; for other V (50257) they stand L apart, so that the lanes' loads are
together. Which lane sums what, and in which order, depends on V and dtype alone: a row comes out
bitwise the same wherever it stands.
"""

import functools

import torch
import triton
import triton.language as tl

from ppo_kernels._triton import math

WARP_SIZE = 32 if torch.version.hip is None else 64
# A lane has two vectors in flight: 512 of them 16 KiB.
_BYTES_PER_LANE = 128
_MOST_LANES = 512
# Programs to a multiprocessor that few rows are split into.
_PROGRAMS = 8


def lanes(x):
    """Launch options for a program per row of `x` (..., V); of nothing but V and dtype, so that
    results do not change with the batch."""
    row_bytes = x.shape[-1] * x.element_size()
    wanted = triton.next_power_of_2(triton.cdiv(row_bytes, _BYTES_PER_LANE))
    lanes = min(_MOST_LANES, max(32, wanted))
    aligned = row_bytes % 16 == 0
    return {"L": lanes, "ALIGNED": aligned, "num_warps": max(1, lanes // WARP_SIZE)}


@functools.cache
def _multiprocessors(device):
    if device.type == "cpu":  # interpreted
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(x):
    """(programs to a row of `x` (..., V), elements to each) where elements are computed each by
    itself, so that no split changes their bits: whole steps of a program's lanes, and as many
    programs as keep all multiprocessors busy, however few the rows."""
    V = x.shape[-1]
    step = 2 * lanes(x)["L"] * (16 // x.element_size())
    whole = triton.cdiv(V, step)
    wanted = triton.cdiv(_PROGRAMS * _multiprocessors(x.device), max(1, x.numel() // V))
    steps = triton.cdiv(whole, min(whole, wanted))
    return triton.cdiv(whole, steps), steps * step


@triton.jit
def part_of_row(V, parts, length):
    """(row, first element, number of elements) that fall to a program where rows are `split`: from
    the last to the first, so that what a forward read last is still in cache."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    row = i // parts
    begin = (i - row * parts) * length
    return row, begin, tl.minimum(length, V - begin)


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """The first element of a row; see `common.Rows`."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner) * inner_stride


@triton.jit
def _pointer(ptr, start, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    # The compiler believes a product; it forgets a `tl.multiple_of` on a number.
    if ALIGNED:
        start = start // VEC * VEC
    return ptr + start


@triton.jit
def _lengths(V, STEP: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """V, and the multiple of STEP below it."""
    if ALIGNED:
        V = V // VEC * VEC
    return V, V // STEP * STEP


@triton.jit
def _block(L: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets (L, VEC) of the elements of each lane."""
    lane, i = tl.arange(0, L)[:, None], tl.arange(0, VEC)[None, :]
    return lane * VEC + i if ALIGNED else i * L + lane


@triton.jit
def _load_below(p, offset, n):
    """Elements at `offset`, -inf from `n` on."""
    return tl.load(p + offset, mask=offset < n, other=-float("inf"))


@triton.jit
def softmax_sums(x_ptr, start, V, k, L: tl.constexpr, ALIGNED: tl.constexpr):
    """(shift, Σ 2^t, Σ 2^t t) of a row."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    STEP: tl.constexpr = L * VEC
    p = _pointer(x_ptr, start, VEC, ALIGNED)
    n, full = _lengths(V, 2 * STEP, VEC, ALIGNED)
    block = _block(L, VEC, ALIGNED)
    shift = math.nothing_seen(L, k.dtype)
    total = tl.zeros((L,), k.dtype)
    weighted = total
    for i in range(0, full, 2 * STEP):
        x, y = tl.load(p + i + block), tl.load(p + i + STEP + block)
        shift, total, weighted = math.absorb(shift, total, weighted, x, k)
        shift, total, weighted = math.absorb(shift, total, weighted, y, k)
    if full < n:
        x, y = _load_below(p, full + block, n), _load_below(p, full + STEP + block, n)
        shift, total, weighted = math.absorb(shift, total, weighted, x, k)
        shift, total, weighted = math.absorb(shift, total, weighted, y, k)
    return math.merge(shift, total, weighted, k)


@triton.jit
def moments(x_ptr, start, V, k, L: tl.constexpr, ALIGNED: tl.constexpr):
    """(shift, Σ 2^t, Σ 2^t t, Σ 2^2t, Σ 2^t t², largest logit) of a row; the first three with the
    bits of `softmax_sums`."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    STEP: tl.constexpr = L * VEC
    p = _pointer(x_ptr, start, VEC, ALIGNED)
    n, full = _lengths(V, STEP, VEC, ALIGNED)
    block = _block(L, VEC, ALIGNED)
    shift = math.nothing_seen(L, k.dtype)
    total = tl.zeros((L,), k.dtype)
    weighted, squares, second = total, total, total
    largest = tl.full((L,), -float("inf"), k.dtype)
    for i in range(0, full, STEP):
        x = tl.load(p + i + block)
        shift, total, weighted, squares, second, largest = math.moments_absorb(
            shift, total, weighted, squares, second, largest, x, k
        )
    if full < n:
        x = _load_below(p, full + block, n)
        shift, total, weighted, squares, second, largest = math.moments_absorb(
            shift, total, weighted, squares, second, largest, x, k
        )
    return math.moments_merge(shift, total, weighted, squares, second, largest, k)


@triton.jit
def _slope(x, k, shift, a, b):
    """2^t (a + b t), 0 where 2^t is."""
    t = math.exponents(x.to(k.dtype), k, shift)
    return tl.exp2(t) * tl.fma(t, b, a)


@triton.jit
def gradient(
    x_ptr,
    out_ptr,
    start,
    out_start,
    V,
    k,
    shift,
    a,
    b,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write 2^t (a + b t) of each element of a row, from its end back; `out_ptr` may be `x_ptr`."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // T.primitive_bitwidth
    STEP: tl.constexpr = L * VEC
    p = _pointer(x_ptr, start, VEC, ALIGNED)
    out = _pointer(out_ptr, out_start, VEC, ALIGNED)
    n, full = _lengths(V, 2 * STEP, VEC, ALIGNED)
    block = _block(L, VEC, ALIGNED)
    if full < n:
        x, y = _load_below(p, full + block, n), _load_below(p, full + STEP + block, n)
        x, y = _slope(x, k, shift, a, b).to(T), _slope(y, k, shift, a, b).to(T)
        tl.store(out + full + block, x, mask=full + block < n)
        tl.store(out + full + STEP + block, y, mask=full + STEP + block < n)
    for walked in range(0, full, 2 * STEP):
        i = full - 2 * STEP - walked
        x = tl.load(p + i + block, eviction_policy="evict_first")
        y = tl.load(p + i + STEP + block, eviction_policy="evict_first")
        x, y = _slope(x, k, shift, a, b).to(T), _slope(y, k, shift, a, b).to(T)
        tl.store(out + i + block, x, eviction_policy="evict_first")
        tl.store(out + i + STEP + block, y, eviction_policy="evict_first")


@triton.jit
def fill_zero(out_ptr, start, V, L: tl.constexpr, ALIGNED: tl.constexpr):
    """Write zeros to a row."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // T.primitive_bitwidth
    out = _pointer(out_ptr, start, VEC, ALIGNED)
    n, _ = _lengths(V, VEC, VEC, ALIGNED)
    block = _block(L, VEC, ALIGNED)
    zeros = tl.zeros((L, VEC), T)
    for i in range(0, n, L * VEC):
        tl.store(out + i + block, zeros, mask=i + block < n)


@triton.jit
def scale(x_ptr, start, V, factor, L: tl.constexpr, ALIGNED: tl.constexpr):
    """Multiply a row by `factor` in place; a zero of either makes a zero."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    p = _pointer(x_ptr, start, VEC, ALIGNED)
    n, _ = _lengths(V, VEC, VEC, ALIGNED)
    block = _block(L, VEC, ALIGNED)
    for i in range(0, n, L * VEC):
        x = tl.load(p + i + block, mask=i + block < n)
        scaled = tl.where(x == 0.0, 0.0, x.to(factor.dtype) * factor)
        scaled = tl.where(factor == 0.0, 0.0, scaled)
        tl.store(p + i + block, scaled.to(x.dtype), mask=i + block < n)


@triton.jit
def joint_sums(x_ptr, y_ptr, start, y_start, V, k, L: tl.constexpr, ALIGNED: tl.constexpr):
    """(shift, Σ 2^t, shift_ref, Σ 2^t_ref, Σ 2^t (t - t_ref)) of a row of each tensor."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    STEP: tl.constexpr = L * VEC
    p = _pointer(x_ptr, start, VEC, ALIGNED)
    q = _pointer(y_ptr, y_start, VEC, ALIGNED)
    n, full = _lengths(V, STEP, VEC, ALIGNED)
    block = _block(L, VEC, ALIGNED)
    shift = math.nothing_seen(L, k.dtype)
    total = tl.zeros((L,), k.dtype)
    ref_shift, ref_total, cross = shift, total, total
    for i in range(0, full, STEP):
        x, y = tl.load(p + i + block), tl.load(q + i + block)
        shift, total, ref_shift, ref_total, cross = math.joint_absorb(
            shift, total, ref_shift, ref_total, cross, x, y, k
        )
    if full < n:
        x, y = _load_below(p, full + block, n), _load_below(q, full + block, n)
        shift, total, ref_shift, ref_total, cross = math.joint_absorb(
            shift, total, ref_shift, ref_total, cross, x, y, k
        )
    return math.joint_merge(shift, total, ref_shift, ref_total, cross, k)


@triton.jit
def _kl_slope(x, y, k, shift, ref_shift, a, b):
    """2^t (a + b (t - t_ref)), 0 where 2^t is."""
    t = math.exponents(x.to(k.dtype), k, shift)
    u = math.scaled(y.to(k.dtype), k, ref_shift)
    return math.weighed(tl.exp2(t), tl.fma(t - u, b, a))


@triton.jit
def kl_gradient(
    x_ptr,
    y_ptr,
    out_ptr,
    start,
    y_start,
    out_start,
    V,
    k,
    shift,
    ref_shift,
    a,
    b,
    L: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write 2^t (a + b (t - t_ref)) of each element of a row."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    VEC: tl.constexpr = 128 // T.primitive_bitwidth
    STEP: tl.constexpr = L * VEC
    p = _pointer(x_ptr, start, VEC, ALIGNED)
    q = _pointer(y_ptr, y_start, VEC, ALIGNED)
    out = _pointer(out_ptr, out_start, VEC, ALIGNED)
    n, full = _lengths(V, STEP, VEC, ALIGNED)
    block = _block(L, VEC, ALIGNED)
    if full < n:
        x, y = _load_below(p, full + block, n), _load_below(q, full + block, n)
        slope = _kl_slope(x, y, k, shift, ref_shift, a, b)
        tl.store(out + full + block, slope.to(T), mask=full + block < n)
    for walked in range(0, full, STEP):
        i = full - STEP - walked
        x, y = tl.load(p + i + block), tl.load(q + i + block)
        slope = _kl_slope(x, y, k, shift, ref_shift, a, b)
        tl.store(out + i + block, slope.to(T))
