// What sample_tokens draws from: scores s = z / τ, the ids that filters keep, and the weights
// 2^(k (s - largest)) of these. Host and device; formulas in ppo_kernels/sampling.py.
#pragma once

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "softmax_state.h"

#if defined(__CUDA_ARCH__)
#define PPO_UNROLL _Pragma("unroll")
#else
#define PPO_UNROLL
#endif

namespace ppo {

// The numbers of a call, neutral where there is no such filter: infinity, 1 and 0.
struct Filters {
  double top_k, top_p, min_p;

  bool keep_all(int64_t vocabulary) const {
    return top_k >= double(vocabulary) && top_p >= 1 && min_p <= 0;
  }
};

// How scores and weights follow from the logits of a row. Without filters, that is where no scores
// are compared, the division is left to k.
template <class R>
struct Scale {
  R temperature, k;
  bool greedy, valid;

  PPO_HD static Scale of(double temperature, bool divides) {
    const R rounded = R(temperature);
    const bool greedy = rounded == R(0);
    const double k = greedy || divides ? kLog2E : kLog2E / double(rounded);
    constexpr double kMost = sizeof(R) == 8 ? DBL_MAX : double(FLT_MAX);
    return {greedy ? R(1) : rounded, R(k < kMost ? k : kMost), greedy,
            temperature >= 0 && temperature < INFINITY};
  }
};

// Whether a row has a distribution, from its largest logit, NaN where it has a NaN.
template <class R>
PPO_HD bool can_be_drawn(R largest, const Scale<R>& scale) {
  return std::isfinite(largest / scale.temperature);
}

// The ids of scores above `cut`, of those at `cut` all but the first `skipped`, and of either only
// such whose exponent k (s - largest) is at least `least`.
template <class R>
struct Kept {
  R cut, least;
  R tie_weight;  // of an id at `cut`, 0 where `least` excludes them
  int64_t skipped;
};

// Floating-point numbers in their order: the next larger one has the next key.
template <class R>
using Key = std::conditional_t<sizeof(R) == 8, uint64_t, uint32_t>;

template <class R>
PPO_HD Key<R> key_of(R x) {
  Key<R> bits;
  memcpy(&bits, &x, sizeof(bits));
  constexpr Key<R> kSign = Key<R>(1) << (8 * sizeof(R) - 1);
  return bits & kSign ? ~bits : bits | kSign;
}

template <class R>
PPO_HD R of_key(Key<R> key) {
  constexpr Key<R> kSign = Key<R>(1) << (8 * sizeof(R) - 1);
  const Key<R> bits = key & kSign ? key & ~kSign : ~key;
  R x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The largest x in [low, high] of which `allowed(weight of scores in [low, x), all weight)`; that
// weight is `below`, and all of it `total`. `low` itself is allowed, `high` the largest score.
// `weights_below(pivots, sums)` sweeps the row for the weight below each of so many pivots, and
// last for all.
template <int kPivots, class R, class WeightsBelow, class Allowed>
PPO_HD R search(R low, R high, const WeightsBelow& weights_below, const Allowed& allowed,
                double& below, double& total) {
  static_assert(((kPivots + 1) & kPivots) == 0);
  Key<R> first = key_of(low), end = key_of(high) + 1;
  below = 0;
  do {
    const Key<R> span = end - first, begin = first;
    R pivots[kPivots];
    PPO_UNROLL
    for (int i = 0; i < kPivots; ++i) {
      constexpr Key<R> kParts = kPivots + 1;
      const Key<R> part = Key<R>(i + 1);
      pivots[i] = of_key<R>(begin + span / kParts * part + span % kParts * part / kParts);
    }
    double sums[kPivots + 1];
    weights_below(pivots, sums);
    total = sums[kPivots];
    PPO_UNROLL
    for (int i = 0; i < kPivots; ++i) {
      const Key<R> pivot = key_of(pivots[i]);
      if (pivot >= end) continue;
      if (allowed(sums[i], total)) {
        first = pivot;
        below = sums[i];
      } else {
        end = pivot;
      }
    }
  } while (end - first > 1);
  return of_key<R>(first);
}

// Whether top-p removes an id, by the probability of those at and below it.
template <class R>
PPO_HD bool removed_by_top_p(double probability, double top_p) {
  return R(probability) <= R(1.0 - top_p);
}

// How many of the ids at the cut top-p removes: one stays. Their probability is added up as it is
// rounded, as transformers does.
template <class R>
PPO_HD int64_t ties_removed(double below, double tie_weight, int64_t ties, double total,
                            double top_p) {
  const double probability = double(R(tie_weight / total));
  int64_t removed = 0, end = ties;
  while (end - removed > 1) {
    const int64_t middle = removed + (end - removed) / 2;
    const bool goes = removed_by_top_p<R>(below / total + double(middle) * probability, top_p);
    (goes ? removed : end) = middle;
  }
  return removed;
}

// The exponent of the weight of a score that is no larger than the largest.
template <class R>
PPO_HD R exponent_of(R score, R largest, R k) {
  return k * (score - largest);
}

}  // namespace ppo
