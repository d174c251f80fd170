"""Per-token arithmetic and softmax states: the twin of csrc/ppo_math.h and csrc/softmax_state.h,
under the same names where a function is the same.

Base 2 as there: with k = log2(e) / τ a logit z stands for the exponent t = k (z - shift), where
shift is the maximum of what was seen.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# The lowest numbers, the shift of a state that has seen nothing with probability: no difference of
# shifts is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LOWEST_FP64 = tl.constexpr(-1.7976931348623157e308)
# Exponents below this are raised to it: their power is 0 all the same, and 0 times it too.
UNDERFLOW = tl.constexpr(-1200.0)
MOST_LOG_RATIO = tl.constexpr(80.0)

K1 = tl.constexpr(0)
K2 = tl.constexpr(1)
K3 = tl.constexpr(2)


@triton.jit
def number(x, R: tl.constexpr):
    """A number of the call (a double) in the type that the kernel computes in."""
    return tl.full((), x, R)


def exponent_scale(temperature):
    """k of a number, for a launcher."""
    return LOG2_E.value / temperature


@triton.jit
def temperature_of(row, temperatures_ptr, temperature, k, R: tl.constexpr):
    """(τ, k) of a row: its own where rows have, NaN where that is no temperature, or the call's."""
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row).to(tl.float64)
        valid = (temperature > 0.0) & (temperature < float("inf"))
        k = tl.where(valid, LOG2_E / temperature, float("nan"))
    MOST: tl.constexpr = -_LOWEST_FP64 if R.primitive_bitwidth == 64 else -_LOWEST
    k = number(k, tl.float64)
    return number(temperature, R), tl.where(k > MOST, MOST, k).to(R)


@triton.jit
def _quadratic_part(x):
    """exp(x) - 1 - x for |x| < 1, by its series; the first left-out term is below 1e-17."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(16):
        series = 1.0 + x * series * (1.0 / (18 - i))
    return 0.5 * x * x * series


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation."""
    return tl.where(tl.abs(x) < 1.0, x + _quadratic_part(x), tl.exp(x) - 1.0)


@triton.jit
def bounded(log_ratio):
    """A log-ratio as it is exponentiated: within ±80, NaN unless it is finite."""
    x = tl.where(log_ratio > MOST_LOG_RATIO, MOST_LOG_RATIO, log_ratio)
    x = tl.where(x < -MOST_LOG_RATIO, -MOST_LOG_RATIO, x)
    return tl.where(tl.abs(log_ratio) < float("inf"), x, float("nan"))


@triton.jit
def k3(x):
    """exp(x) - 1 - x without cancellation."""
    return tl.where(tl.abs(x) < 1.0, _quadratic_part(x), tl.exp(x) - 1.0 - x)


@triton.jit
def policy_term(log_ratio, advantage, low, high, dual_clip):
    """(loss, ∂loss/∂logprob, k3 estimate of KL(old || new), clipped); dual_clip inf for none."""
    x = bounded(log_ratio)
    ratio = tl.exp(x)
    within = tl.where(ratio < low, low, ratio)
    within = tl.where(ratio > high, high, within)
    unclipped_loss = -advantage * ratio
    clipped_loss = -advantage * within
    clipped = clipped_loss > unclipped_loss
    loss = tl.where(clipped, clipped_loss, unclipped_loss)
    grad = tl.where(clipped | (x != log_ratio), 0.0, unclipped_loss)
    bound = -advantage * dual_clip
    beyond = (advantage < 0.0) & (loss > bound)
    loss = tl.where(beyond, bound, loss)
    grad = tl.where(beyond, 0.0, grad)
    return loss, grad, k3(x), clipped


@triton.jit
def value_term(value, old_value, target, clip):
    """(loss, ∂loss/∂value, clipped); clip inf for none."""
    error = value - target
    move = value - old_value
    outside = (move < -clip) | (move > clip)
    bounded = old_value + tl.where(move < 0.0, -clip, clip) - target
    bounded = tl.where(outside, bounded, error)
    clipped = bounded * bounded > error * error
    chosen = tl.where(clipped, bounded, error)
    return 0.5 * chosen * chosen, tl.where(clipped, 0.0, error), clipped


@triton.jit
def kl_term(estimator, log_ratio):
    """(value, ∂value/∂logprob) of an estimator, by its index in `reference.ESTIMATORS`."""
    sign = (log_ratio > 0.0).to(log_ratio.dtype) - (log_ratio < 0.0).to(log_ratio.dtype)
    value, grad = tl.abs(log_ratio), sign
    value = tl.where(estimator == K1, log_ratio, value)
    grad = tl.where(estimator == K1, 1.0, grad)
    value = tl.where(estimator == K2, 0.5 * log_ratio * log_ratio, value)
    grad = tl.where(estimator == K2, log_ratio, grad)
    x = bounded(log_ratio)
    value = tl.where(estimator == K3, k3(-x), value)
    grad = tl.where(estimator == K3, tl.where(x == log_ratio, -expm1(-x), 0.0), grad)
    return value, grad


# The coefficient past a done: no number that arithmetic could arrive at, and kept by products.
CUT = tl.constexpr(float("nan"))


@triton.jit
def gae_step(reward, value, counted, done, G, gamma, gamma_lam):
    """(A, G) at a token, from the G = γ V + γ λ A of the next one; where it does not count 0 and
    that G, or past a done none."""
    later = tl.where(done, 0.0, G)
    advantage = reward - value + later
    handed = gamma * value + gamma_lam * advantage
    return tl.where(counted, advantage, 0.0), tl.where(counted, handed, later)


@triton.jit
def apply_map(g, c, G):
    """What tokens hand on, g + c G; only g where c is CUT, as past a done."""
    return tl.where(c != c, g, g + c * G)


@triton.jit
def compose_maps(later_g, later_c, g, c):
    """The map of some tokens followed by later ones."""
    return apply_map(g, c, later_g), c * later_c


@triton.jit
def sum_step(x, decay, counted, done, S):
    """(sum, S) of x + c S at a token, from the S of the next one; 0 and that S where it does not
    count, but a done cuts S wherever it stands."""
    total = tl.where(done, x, tl.fma(decay, S, x))
    return tl.where(counted, total, 0.0), tl.where(counted, total, tl.where(done, 0.0, S))


@triton.jit
def scaled(x, k, shift):
    """k (x - shift). Rounded: the compiler would contract a product with what it is added to."""
    return tl.fma(x - shift, k, 0.0)


@triton.jit
def exponents(x, k, shift):
    """k (x - shift) above what underflows, NaN where x is."""
    t = scaled(x, k, shift)
    return tl.maximum(t, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def weighed(weight, x):
    """weight * x, and 0 for a weight of 0, though x may have overflowed."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def nothing_seen(L: tl.constexpr, R: tl.constexpr):
    """Shifts (L,) of lanes that have seen nothing with probability."""
    lowest: tl.constexpr = _LOWEST_FP64 if R.primitive_bitwidth == 64 else _LOWEST
    return tl.full((L,), lowest, R)


@triton.jit
def _shifted(total, weighted, change):
    """Sums of 2^t and 2^t t after every exponent changed by `change` <= 0."""
    factor = tl.exp2(change)
    return factor * total, weighed(factor, weighted + change * total)


@triton.jit
def absorb(shift, total, weighted, x, k):
    """Lane states (L,) and a block (L, n) of logits, n to each lane -> lane states.

    The block's maximum comes first, so that it costs one exponential an element and one a lane.
    """
    x = x.to(shift.dtype)
    top = tl.maximum(shift, tl.max(x, axis=1))
    t = exponents(x, k, top[:, None])
    e = tl.exp2(t)
    total, weighted = _shifted(total, weighted, scaled(shift, k, top))
    total += tl.sum(e, axis=1)
    weighted += tl.sum(e * t, axis=1)
    return top, total, weighted


@triton.jit
def merge(shift, total, weighted, k):
    """Lane states -> the state of the row."""
    top = tl.max(shift, axis=0)
    total, weighted = _shifted(total, weighted, scaled(shift, k, top))
    return top, tl.sum(total, axis=0), tl.sum(weighted, axis=0)


@triton.jit
def _shifted_moments(total, weighted, squares, second, change):
    """`_shifted` with Σ 2^2t and Σ 2^t t²."""
    factor = tl.exp2(change)
    second = weighed(factor, tl.fma(change, tl.fma(change, total, 2.0 * weighted), second))
    total, weighted = _shifted(total, weighted, change)
    return total, weighted, factor * factor * squares, second


@triton.jit
def moments_absorb(shift, total, weighted, squares, second, largest, x, k):
    """`absorb` with the sums of second order and the largest logit."""
    x = x.to(shift.dtype)
    found = tl.max(x, axis=1)
    top = tl.maximum(shift, found)
    t = exponents(x, k, top[:, None])
    e = tl.exp2(t)
    total, weighted, squares, second = _shifted_moments(
        total, weighted, squares, second, scaled(shift, k, top)
    )
    total += tl.sum(e, axis=1)
    weighted += tl.sum(e * t, axis=1)
    squares += tl.sum(e * e, axis=1)
    second += tl.sum(e * (t * t), axis=1)
    return top, total, weighted, squares, second, tl.maximum(largest, found)


@triton.jit
def moments_merge(shift, total, weighted, squares, second, largest, k):
    """Lane states -> the state of the row."""
    top = tl.max(shift, axis=0)
    total, weighted, squares, second = _shifted_moments(
        total, weighted, squares, second, scaled(shift, k, top)
    )
    total, weighted = tl.sum(total, axis=0), tl.sum(weighted, axis=0)
    squares, second = tl.sum(squares, axis=0), tl.sum(second, axis=0)
    return top, total, weighted, squares, second, tl.max(largest, axis=0)


@triton.jit
def varentropy(total, weighted, second):
    """Σ p (log p + H)² in nats²."""
    mean = weighted / total
    variance = second / total - mean * mean
    return tl.where(variance < 0.0, 0.0, variance) * (LN_2 * LN_2)


@triton.jit
def logprob(logit, shift, log2_sum, k):
    """The exponent of a logit may be beyond the range of fp32 where the log-prob is not."""
    log_p = tl.fma(logit - shift, k * LN_2, -tl.fma(log2_sum, LN_2, 0.0))
    return tl.where(log_p > 0.0, 0.0, log_p)


@triton.jit
def entropy(total, weighted):
    """H = -Σ p log p in nats."""
    h = (tl.log2(total) - weighted / total) * LN_2
    return tl.where(h < 0.0, 0.0, h)


@triton.jit
def at_most_one(p):
    return tl.where(p > 1.0, 1.0, p)


@triton.jit
def _shifted_cross(cross, total, change, ref_change):
    """Σ 2^t (t - t_ref) after the exponents of both softmaxes changed; inf stays inf."""
    factor = tl.exp2(change)
    return weighed(factor, cross + total * (change - ref_change))


@triton.jit
def joint_absorb(shift, total, ref_shift, ref_total, cross, x, y, k):
    """Lane states of two softmaxes and blocks (L, n) of their logits -> lane states.

    `cross` is Σ 2^t (t - t_ref), +inf where the reference excludes what the first one allows.
    """
    x, y = x.to(shift.dtype), y.to(shift.dtype)
    top = tl.maximum(shift, tl.max(x, axis=1))
    ref_top = tl.maximum(ref_shift, tl.max(y, axis=1))
    t = exponents(x, k, top[:, None])
    u = scaled(y, k, ref_top[:, None])
    e = tl.exp2(t)
    change, ref_change = scaled(shift, k, top), scaled(ref_shift, k, ref_top)
    cross = _shifted_cross(cross, total, change, ref_change)
    cross += tl.sum(weighed(e, t - u), axis=1)
    total = tl.exp2(change) * total + tl.sum(e, axis=1)
    ref_total = tl.exp2(ref_change) * ref_total + tl.sum(tl.exp2(u), axis=1)
    return top, total, ref_top, ref_total, cross


@triton.jit
def joint_merge(shift, total, ref_shift, ref_total, cross, k):
    """Lane states of two softmaxes -> the state of the row."""
    top, ref_top = tl.max(shift, axis=0), tl.max(ref_shift, axis=0)
    change, ref_change = scaled(shift, k, top), scaled(ref_shift, k, ref_top)
    cross = tl.sum(_shifted_cross(cross, total, change, ref_change), axis=0)
    total = tl.sum(tl.exp2(change) * total, axis=0)
    return top, total, ref_top, tl.sum(tl.exp2(ref_change) * ref_total, axis=0), cross


@triton.jit
def kl(total, ref_total, cross):
    """KL(p || q) in nats."""
    divergence = (cross / total - tl.log2(total) + tl.log2(ref_total)) * LN_2
    return tl.where(divergence < 0.0, 0.0, divergence)
