// Mergeable state of a softmax over part of a row, and what follows from it. Host and device.
//
// Everything is in base 2, the base in which processors exponentiate: with k = log2(e) / τ a logit
// z stands for the exponent t = k (z - shift), where shift is the maximum, or near it, so that sums
// neither overflow nor cancel, however large the logits: k z itself may be beyond the range of T.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "ppo_math.h"

namespace ppo {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// A temperature τ and k, NaN where there is no such temperature.
template <class T>
struct Temperature {
  T value, k;

  PPO_HD static Temperature of(double value) {
    constexpr double kMost = sizeof(T) == sizeof(float) ? FLT_MAX : DBL_MAX;
    const double k = kLog2E / value;
    return {T(value), value > 0 && value < INFINITY ? T(k < kMost ? k : kMost) : T(NAN)};
  }
};

// Of each row its own, or the same of all.
template <class T>
struct Temperatures {
  const double* own;  // may be null
  Temperature<T> common;

  PPO_HD Temperature<T> operator[](int64_t row) const {
    return own ? Temperature<T>::of(own[row]) : common;
  }
};

// `schemas.ELSEWHERE`: the token of this row is in a part of the vocabulary that another rank has.
constexpr int64_t kElsewhere = -(int64_t(1) << 31);

template <class T>
struct SoftmaxState {
  T shift;     // -inf: nothing with probability seen yet
  T sum;       // Σ 2^t
  T weighted;  // Σ 2^t t

  PPO_HD static SoftmaxState empty() { return {-INFINITY, T(0), T(0)}; }
};

// The larger of two shifts; NaN where either is.
template <class T>
PPO_HD T common_shift(T a, T b) {
  return a > b || std::isnan(a) ? a : b;
}

// The change of exponents when a part moves from its own shift to a common one; 0 for an empty
// part, whose sums are 0.
template <class T>
PPO_HD T shift_change(T from, T to, T k) {
  return from == -T(INFINITY) ? T(0) : k * (from - to);
}

// weight * x, and 0 for a weight of 0, though x may have overflowed.
template <class T>
PPO_HD T weighed(T weight, T x) {
  return weight == T(0) ? T(0) : weight * x;
}

template <class T>
PPO_HD SoftmaxState<T> merge(const SoftmaxState<T>& a, const SoftmaxState<T>& b, T k) {
  const T shift = common_shift(a.shift, b.shift);
  const T da = shift_change(a.shift, shift, k), db = shift_change(b.shift, shift, k);
  const T fa = std::exp2(da), fb = std::exp2(db);
  return {shift, fa * a.sum + fb * b.sum,
          weighed(fa, a.weighted + da * a.sum) + weighed(fb, b.weighted + db * b.sum)};
}

// log2 Σ 2^t, the log-sum-exp beyond `shift`.
template <class T>
PPO_HD T log2_sum(const SoftmaxState<T>& s) {
  return std::log2(s.sum);
}

// The bounds that roundings do not respect; NaN stays.
template <class T>
PPO_HD T at_least(T bound, T x) {
  return x < bound ? bound : x;
}
template <class T>
PPO_HD T at_most(T bound, T x) {
  return x > bound ? bound : x;
}

// H = -Σ p log p, in nats.
template <class T>
PPO_HD T entropy(const SoftmaxState<T>& s) {
  return at_least(T(0), T(kLn2) * (log2_sum(s) - s.weighted / s.sum));
}

// What `softmax_stats` holds of a row: shift and log2 Σ 2^t, -inf for a row of -inf throughout.
template <class T>
struct RowStats {
  T shift, log2_sum;
};

// A row's statistics as the loss and its gradient need them.
template <class T>
struct Scored {
  RowStats<T> stats;
  T logprob, entropy;
};

template <class T>
PPO_HD Scored<T> score(const SoftmaxState<T>& state, T logit, T k) {
  const T log2 = log2_sum(state);
  if (state.sum == T(0)) return {{state.shift, log2}, T(NAN), T(NAN)};
  // The exponent of a logit may be beyond the range of T where the log-prob is not.
  const T logprob = std::fma(T(kLn2) * k, logit - state.shift, -(T(kLn2) * log2));
  return {{state.shift, log2}, at_most(T(0), logprob), entropy(state)};
}

// What `token_statistics` sums up besides.
template <class T>
struct Moments : SoftmaxState<T> {
  T squares;  // Σ 2^2t
  T second;   // Σ 2^t t²
  T largest;  // logit

  PPO_HD static Moments empty() { return {SoftmaxState<T>::empty(), T(0), T(0), -T(INFINITY)}; }
};

template <class T>
PPO_HD T shifted_second(const Moments<T>& m, T change, T factor) {
  return weighed(factor, m.second + change * (T(2) * m.weighted + change * m.sum));
}

template <class T>
PPO_HD Moments<T> merge(const Moments<T>& a, const Moments<T>& b, T k) {
  const SoftmaxState<T>&first = a, &other = b;
  const SoftmaxState<T> both = merge(first, other, k);
  const T da = shift_change(a.shift, both.shift, k), db = shift_change(b.shift, both.shift, k);
  const T fa = std::exp2(da), fb = std::exp2(db);
  return {both, fa * fa * a.squares + fb * fb * b.squares,
          shifted_second(a, da, fa) + shifted_second(b, db, fb),
          a.largest > b.largest ? a.largest : b.largest};
}

// A row as its token and its distribution tell; formulas in ppo_kernels/statistics.py.
template <class T>
struct TokenStatistics {
  T logprob, entropy, max_prob, sum_sq_probs, varentropy;
  bool top1;
};

template <class T>
PPO_HD TokenStatistics<T> token_statistics(const Moments<T>& m, T logit, T k) {
  const Scored<T> scored = score(m, logit, k);
  const T mean = m.weighted / m.sum, variance = m.second / m.sum - mean * mean;
  return {scored.logprob,
          scored.entropy,
          at_most(T(1), std::exp2(k * (m.largest - m.shift)) / m.sum),
          at_most(T(1), m.squares / m.sum / m.sum),
          T(kLn2 * kLn2) * at_least(T(0), variance),
          logit == m.largest && !std::isnan(scored.logprob)};
}

// Gradient of g logprob + h entropy in one row of logits:
//   (g (1[j = a] - p_j) - h p_j (log p_j + H)) / τ = 2^t_j (a + b t_j) + 1[j = a] g / τ
template <class T>
struct RowGradient {
  T shift, a, b;
  T at_token;  // the whole sum, before it is rounded to the logits' type

  PPO_HD bool zero() const { return a == T(0) && b == T(0); }
};

template <class T>
PPO_HD RowGradient<T> row_gradient(T g, T h, T entropy, const RowStats<T>& stats,
                                   const Temperature<T>& temperature, T token_logit) {
  const T weight = -std::exp2(-stats.log2_sum) / temperature.value;
  const T a = weight * (g + h * (entropy - T(kLn2) * stats.log2_sum));
  const T b = weight * h * T(kLn2);
  const T t = temperature.k * (token_logit - stats.shift);
  const T softmax_part = weighed(std::exp2(t), std::fma(b, t, a));
  return {stats.shift, a, b, softmax_part + g / temperature.value};
}

// State of two softmaxes over the same part of a row, for KL(p || q).
template <class T>
struct JointState {
  T shift, sum;
  T ref_shift, ref_sum;
  T cross;  // Σ 2^t (t - t_ref); +inf where q excludes what p allows

  PPO_HD static JointState empty() { return {-INFINITY, T(0), -INFINITY, T(0), T(0)}; }
};

template <class T>
PPO_HD T shifted_cross(const JointState<T>& s, T shift, T ref_shift, T k) {
  if (s.sum == T(0)) return T(0);
  const T change = shift_change(s.shift, shift, k), weight = std::exp2(change);
  if (std::isinf(s.cross)) return weighed(weight, s.cross);
  return weighed(weight, s.cross + s.sum * (change - shift_change(s.ref_shift, ref_shift, k)));
}

template <class T>
PPO_HD JointState<T> merge(const JointState<T>& a, const JointState<T>& b, T k) {
  const T shift = common_shift(a.shift, b.shift);
  const T ref_shift = common_shift(a.ref_shift, b.ref_shift);
  JointState<T> s;
  s.shift = shift;
  s.ref_shift = ref_shift;
  s.sum = std::exp2(shift_change(a.shift, shift, k)) * a.sum +
          std::exp2(shift_change(b.shift, shift, k)) * b.sum;
  s.ref_sum = std::exp2(shift_change(a.ref_shift, ref_shift, k)) * a.ref_sum +
              std::exp2(shift_change(b.ref_shift, ref_shift, k)) * b.ref_sum;
  s.cross = shifted_cross(a, shift, ref_shift, k) + shifted_cross(b, shift, ref_shift, k);
  return s;
}

// KL(p || q) in nats.
template <class T>
PPO_HD T kl(const JointState<T>& s) {
  return at_least(T(0), T(kLn2) * (s.cross / s.sum - std::log2(s.sum) + std::log2(s.ref_sum)));
}

}  // namespace ppo
