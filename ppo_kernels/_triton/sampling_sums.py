"""Sums over a row for sample_tokens.

A row is cut into at most SEGMENTS segments of whole steps, whose weights are summed up in one
sweep. The segment in which the sum passes the number is walked again, step by step.
"""

import triton
import triton.language as tl

from ppo_kernels._triton import sweeps

SEGMENTS = tl.constexpr(32)
# Beyond any index.
NOWHERE = tl.constexpr(2**31 - 1)


# The least finite number: no larger than any logit that has a weight, and no NaN when it is
# subtracted.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOWEST_FP64 = tl.constexpr(-1.7976931348623157e308)


@triton.jit
def divided(x, tau, R: tl.constexpr):
    """Rounded as IEEE has it, so that equal scores are those of other backends."""
    return tl.div_rn(x.to(R), tau) if R.primitive_bitwidth == 32 else x.to(R) / tau


@triton.jit
def _segment(V, STEP: tl.constexpr):
    return tl.cdiv(V, SEGMENTS * STEP) * STEP


@triton.jit
def segment_weights(p, V, k, L: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """(largest logit, Σ 2^(k (x - largest)) in fp64) of each segment."""
    R: tl.constexpr = k.dtype
    STEP: tl.constexpr = L * VEC
    n, _ = sweeps._lengths(V, STEP, VEC, ALIGNED)
    block = sweeps._block(L, VEC, ALIGNED)
    index = tl.arange(0, SEGMENTS)
    LOW: tl.constexpr = LOWEST if R.primitive_bitwidth == 32 else LOWEST_FP64
    tops = tl.full((SEGMENTS,), LOW, R)
    sums = tl.zeros((SEGMENTS,), tl.float64)
    length = _segment(V, STEP)
    for i in range(0, tl.cdiv(V, length)):
        top = tl.full((L,), LOW, R)
        total = tl.zeros((L,), R)
        for j in range(i * length, tl.minimum(n, (i + 1) * length), STEP):
            x = sweeps._load_below(p, j + block, n).to(R)
            found = tl.maximum(top, tl.max(x, axis=1))
            total *= tl.exp2((top - found) * k)
            top = found
            total += tl.sum(tl.exp2((x - top[:, None]) * k), axis=1)
        segment_top = tl.max(top, axis=0)
        total = total.to(tl.float64) * tl.exp2((top - segment_top) * k).to(tl.float64)
        tops = tl.where(index == i, segment_top, tops)
        sums = tl.where(index == i, tl.sum(total, axis=0), sums)
    return tops, sums


@triton.jit
def largest(p, V, L: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr):
    """The largest logit, NaN where there is one."""
    STEP: tl.constexpr = L * VEC
    n, _ = sweeps._lengths(V, STEP, VEC, ALIGNED)
    block = sweeps._block(L, VEC, ALIGNED)
    top = tl.full((L,), -float("inf"), R)
    unordered = tl.zeros((L,), tl.int32)
    for j in range(0, n, STEP):
        x = sweeps._load_below(p, j + block, n).to(R)
        unordered += tl.sum((x != x).to(tl.int32), axis=1)
        top = tl.maximum(top, tl.max(tl.where(x == x, x, 0.0), axis=1))
    return tl.where(tl.sum(unordered, axis=0) > 0, float("nan"), tl.max(top, axis=0))


@triton.jit
def _key(x):
    """Floating-point numbers in their order: the next larger one has the next key."""
    if x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    else:
        bits = x.to(tl.int64, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


@triton.jit
def _of_key(key, R: tl.constexpr):
    if R.primitive_bitwidth == 32:
        bits = key.to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(R, bitcast=True)
    else:
        return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(R, bitcast=True)


@triton.jit
def _pivot(first, span, i: tl.constexpr, R: tl.constexpr):
    part = (span >> 3) * i + (((span & 7) * i) >> 3)
    return _of_key(first + part.to(tl.int64, bitcast=True), R)


@triton.jit
def _below(total, s, weight, pivot):
    return total + tl.sum(tl.where(s < pivot, weight, 0.0), axis=1)


@triton.jit
def _decided(first, end, below, pivot, total, all_weight, limit, COUNT: tl.constexpr):
    """(first, end, below) after the weight `total` of scores below a pivot is known."""
    R: tl.constexpr = pivot.dtype
    total = tl.sum(total.to(tl.float64), axis=0)
    if COUNT:
        allowed = total <= all_weight - limit
    else:
        allowed = _removed_by_top_p(total / all_weight, limit, R)
    key = _key(pivot)
    inside = key < end
    moves = inside & allowed
    end = tl.where(inside & (allowed == 0), key, end)
    return tl.where(moves, key, first), end, tl.where(moves, total, below)


@triton.jit
def _removed_by_top_p(probability, top_p, R: tl.constexpr):
    return probability.to(R) <= (1.0 - top_p).to(R)


@triton.jit
def search(
    p,
    V,
    tau,
    k,
    low,
    high,
    limit,
    COUNT: tl.constexpr,
    L: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(x, weight below x, all weight) of scores from `low` on, for the largest x in [low, high]
    below which top-k (COUNT, the weight of a score is 1) or top-p removes all."""
    R: tl.constexpr = high.dtype
    STEP: tl.constexpr = L * VEC
    n, _ = sweeps._lengths(V, STEP, VEC, ALIGNED)
    block = sweeps._block(L, VEC, ALIGNED)
    first, end = _key(low), _key(high) + 1
    below = tl.zeros((), tl.float64)
    all_weight = below
    more = end > first
    while more:
        span = (end - first).to(tl.uint64, bitcast=True)
        p1, p2 = _pivot(first, span, 1, R), _pivot(first, span, 2, R)
        p3, p4 = _pivot(first, span, 3, R), _pivot(first, span, 4, R)
        p5, p6 = _pivot(first, span, 5, R), _pivot(first, span, 6, R)
        p7 = _pivot(first, span, 7, R)
        total = tl.zeros((L,), R)
        t1, t2, t3, t4, t5, t6, t7 = total, total, total, total, total, total, total
        for j in range(0, n, STEP):
            s = divided(sweeps._load_below(p, j + block, n), tau, R)
            weight = (s > -float("inf")).to(R) if COUNT else tl.exp2((s - high) * k)
            weight = tl.where(s >= low, weight, 0.0)
            t1, t2 = _below(t1, s, weight, p1), _below(t2, s, weight, p2)
            t3, t4 = _below(t3, s, weight, p3), _below(t4, s, weight, p4)
            t5, t6 = _below(t5, s, weight, p5), _below(t6, s, weight, p6)
            t7 = _below(t7, s, weight, p7)
            total += tl.sum(weight, axis=1)
        all_weight = tl.sum(total.to(tl.float64), axis=0)
        first, end, below = _decided(first, end, below, p1, t1, all_weight, limit, COUNT)
        first, end, below = _decided(first, end, below, p2, t2, all_weight, limit, COUNT)
        first, end, below = _decided(first, end, below, p3, t3, all_weight, limit, COUNT)
        first, end, below = _decided(first, end, below, p4, t4, all_weight, limit, COUNT)
        first, end, below = _decided(first, end, below, p5, t5, all_weight, limit, COUNT)
        first, end, below = _decided(first, end, below, p6, t6, all_weight, limit, COUNT)
        first, end, below = _decided(first, end, below, p7, t7, all_weight, limit, COUNT)
        more = end - first > 1
    return _of_key(first, R), below, all_weight


@triton.jit
def kept_weights(
    p,
    V,
    tau,
    k,
    largest,
    cut,
    least,
    L: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(weight of the scores above the cut, how many are at it) of each segment."""
    R: tl.constexpr = largest.dtype
    STEP: tl.constexpr = L * VEC
    n, _ = sweeps._lengths(V, STEP, VEC, ALIGNED)
    block = sweeps._block(L, VEC, ALIGNED)
    index = tl.arange(0, SEGMENTS)
    above = tl.zeros((SEGMENTS,), tl.float64)
    ties = tl.zeros((SEGMENTS,), tl.int32)
    length = _segment(V, STEP)
    for i in range(0, tl.cdiv(V, length)):
        weight = tl.zeros((L,), R)
        count = tl.zeros((L,), tl.int32)
        for j in range(i * length, tl.minimum(n, (i + 1) * length), STEP):
            s = divided(sweeps._load_below(p, j + block, n), tau, R)
            t = (s - largest) * k
            weight += tl.sum(tl.where((s > cut) & (t >= least), tl.exp2(t), 0.0), axis=1)
            count += tl.sum((s == cut).to(tl.int32), axis=1)
        above = tl.where(index == i, tl.sum(weight.to(tl.float64), axis=0), above)
        ties = tl.where(index == i, tl.sum(count, axis=0), ties)
    return above, ties


@triton.jit
def ties_removed(below, tie_weight, ties, all_weight, top_p, R: tl.constexpr):
    """The number of scores at the cut that top-p removes: one stays. Their probability is added up
    as it is rounded, as transformers does."""
    probability = (tie_weight / all_weight).to(R).to(tl.float64)
    removed = tl.zeros((), tl.int32)
    end = ties
    while end - removed > 1:
        middle = removed + (end - removed) // 2
        reached = below / all_weight + middle.to(tl.float64) * probability
        goes = _removed_by_top_p(reached, top_p, R)
        removed, end = tl.where(goes, middle, removed), tl.where(goes, end, middle)
    return removed


@triton.jit
def segment_at(weights, target):
    """(segment in which the sum of weights passes `target`, the sum before it); the last one with
    weight if rounding leaves it below."""
    index = tl.arange(0, SEGMENTS)
    cumulative = tl.cumsum(weights, axis=0)
    passed = tl.min(tl.where((cumulative > target) & (weights > 0.0), index, NOWHERE), axis=0)
    last = tl.max(tl.where(weights > 0.0, index, 0), axis=0)
    at = tl.minimum(passed, last)
    return at, tl.sum(tl.where(index < at, weights, 0.0), axis=0)


@triton.jit
def of_segment(values, at):
    index = tl.arange(0, SEGMENTS)
    return tl.sum(tl.where(index == at, values, 0), axis=0)


@triton.jit
def token_at(
    p,
    V,
    segment,
    target,
    tau,
    k,
    centre,
    largest,
    cut,
    least,
    skipped,
    tie_weight,
    DIVIDES: tl.constexpr,
    STEP: tl.constexpr,
):
    """(token, its score) in a segment at which the sum of weights passes `target`; the last one
    with weight if rounding leaves it below. Of the scores at the cut, `skipped` have no weight."""
    R: tl.constexpr = largest.dtype
    length = _segment(V, STEP)
    # For more elements of 16 bits, in fp64, there are no registers.
    WALK: tl.constexpr = STEP // 2 if p.dtype.element_ty.primitive_bitwidth == 16 else STEP
    offset = tl.arange(0, WALK)
    before = tl.zeros((), tl.float64)
    passed = tl.full((), NOWHERE, tl.int32)
    last = tl.zeros((), tl.int32)
    for j in range(segment * length, tl.minimum(V, (segment + 1) * length), WALK):
        s = sweeps._load_below(p, j + offset, V).to(R)
        if DIVIDES:
            s = divided(s, tau, R)
        tie = (s == cut).to(tl.int32)
        rank = tl.cumsum(tie, axis=0)
        kept = (s > cut) & ((s - largest) * k >= least)
        weight = tl.where(kept, tl.exp2((s - centre) * k), 0.0).to(tl.float64)
        weight = tl.where((tie > 0) & (rank > skipped), tie_weight, weight)
        reached = before + tl.cumsum(weight, axis=0)
        hit = (reached > target) & (weight > 0.0)
        passed = tl.minimum(passed, tl.min(tl.where(hit, j + offset, NOWHERE), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, j + offset, 0), axis=0))
        before += tl.sum(weight, axis=0)
        skipped -= tl.sum(tie, axis=0)
    token = tl.minimum(passed, last)
    score = tl.load(p + token).to(R)
    if DIVIDES:
        score = divided(score, tau, R)
    return token, score
