// Per-token arithmetic of PPO, each value beside its derivative. Host and device.
// Formulas: the docstrings of ppo_kernels/{ppo_loss,kl,gae}.py.
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define PPO_HD __host__ __device__ __forceinline__
#else
#define PPO_HD inline
#endif

namespace ppo {

// The type that elements of type T are computed in.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

// A log-ratio as it is exponentiated: within ±80, beyond which fp32 soon overflows. NaN unless it
// is finite.
template <class T>
PPO_HD T bounded(T log_ratio) {
  constexpr T kMost = 80;
  if (!std::isfinite(log_ratio)) return T(NAN);
  return log_ratio < -kMost ? -kMost : (log_ratio > kMost ? kMost : log_ratio);
}

template <class T>
struct PolicyTerm {
  T loss;
  T grad;       // ∂loss/∂logprob
  T approx_kl;  // k3 estimate of KL(old || new)
  bool clipped;
};

// The ratio is clipped to [low, high]; `dual_clip` is +inf when there is none.
template <class T>
PPO_HD PolicyTerm<T> policy_term(T log_ratio, T advantage, T low, T high, T dual_clip) {
  const T x = bounded(log_ratio), ratio = std::exp(x);
  const T within = ratio < low ? low : (ratio > high ? high : ratio);
  const T unclipped_loss = -advantage * ratio;
  const T clipped_loss = -advantage * within;
  PolicyTerm<T> term;
  term.clipped = clipped_loss > unclipped_loss;
  term.loss = term.clipped ? clipped_loss : unclipped_loss;
  term.grad = term.clipped || x != log_ratio ? T(0) : unclipped_loss;
  term.approx_kl = std::expm1(x) - x;
  if (advantage < T(0) && term.loss > -advantage * dual_clip) {
    term.loss = -advantage * dual_clip;
    term.grad = T(0);
  }
  return term;
}

template <class T>
struct ValueTerm {
  T loss;
  T grad;  // ∂loss/∂value
  bool clipped;
};

// `clip` is +inf when there is none.
template <class T>
PPO_HD ValueTerm<T> value_term(T value, T old_value, T target, T clip) {
  const T error = value - target;
  const T move = value - old_value;
  const bool outside = move < -clip || move > clip;
  const T bounded_error = outside ? old_value + (move < T(0) ? -clip : clip) - target : error;
  ValueTerm<T> term;
  term.clipped = bounded_error * bounded_error > error * error;
  const T chosen = term.clipped ? bounded_error : error;
  term.loss = T(0.5) * chosen * chosen;
  term.grad = term.clipped ? T(0) : error;
  return term;
}

enum class KLEstimator { k1, k2, k3, abs };

template <class T>
struct KLTerm {
  T value;
  T grad;  // ∂value/∂logprob = -∂value/∂ref_logprob
};

template <class T>
PPO_HD KLTerm<T> kl_term(KLEstimator estimator, T log_ratio) {
  switch (estimator) {
    case KLEstimator::k1:
      return {log_ratio, T(1)};
    case KLEstimator::k2:
      return {T(0.5) * log_ratio * log_ratio, log_ratio};
    case KLEstimator::k3: {
      const T x = bounded(log_ratio), excess = std::expm1(-x);
      return {excess + x, x == log_ratio ? -excess : T(0)};
    }
    default:
      return {std::fabs(log_ratio), T(log_ratio > T(0)) - T(log_ratio < T(0))};
  }
}

template <class T>
struct Objective {
  T low, high, dual_clip, entropy_coef, kl_coef;
  KLEstimator kl_estimator;
};

template <class T>
struct TokenTerms {
  PolicyTerm<T> policy;
  KLTerm<T> kl;

  // ∂loss/∂logprob
  PPO_HD T grad(const Objective<T>& objective) const {
    return policy.grad + objective.kl_coef * kl.grad;
  }
};

// There is a reference if it `has_ref`.
template <class T>
PPO_HD TokenTerms<T> token_terms(const Objective<T>& objective, T logprob, T old_logprob,
                                 T advantage, bool has_ref, T ref_logprob) {
  TokenTerms<T> terms{policy_term(logprob - old_logprob, advantage, objective.low, objective.high,
                                  objective.dual_clip),
                      {}};
  if (has_ref) terms.kl = kl_term(objective.kl_estimator, logprob - ref_logprob);
  return terms;
}

// What `masked_whiten` multiplies by; 0 where nothing varies.
PPO_HD double whitening_scale(double variance, double eps) {
  return variance + eps == 0 ? 0 : 1 / std::sqrt(variance + eps);
}

// All that a token hands to those before it is one number, G = γ V + γ λ A. Tokens in a row are a
// map of the G that comes to them, g + c G; past a done it is g alone, and c is NaN: no number that
// arithmetic could arrive at, and kept by products.
template <class T>
struct alignas(2 * sizeof(T)) GAEMap {
  T g, c;
};

// The map of no tokens.
template <class T>
PPO_HD GAEMap<T> no_tokens() {
  return {T(0), T(1)};
}

template <class T>
PPO_HD T apply_map(const GAEMap<T>& map, T G) {
  return map.c != map.c ? map.g : std::fma(map.c, G, map.g);
}

// The map of some tokens followed by later ones.
template <class T>
PPO_HD GAEMap<T> compose_maps(const GAEMap<T>& later, const GAEMap<T>& map) {
  return {apply_map(map, later.g), map.c * later.c};
}

// The advantage of a token, from the G of the next one, which becomes its own; where it does not
// count 0 and that G, or past a done none.
template <class T>
PPO_HD T gae_step(T reward, T value, bool counted, bool done, T gamma, T gamma_lam, T& G) {
  const T later = done ? T(0) : G, advantage = reward - value + later;
  const T handed = std::fma(gamma, value, gamma_lam * advantage);
  G = counted ? handed : later;
  return counted ? advantage : T(0);
}

// The discounted sum x + c S at a token, from the S of the next one, which becomes its own. Where
// it does not count it is 0 and S stays, but for a done, which cuts S wherever it stands. Such
// tokens are a map of S, x + c S.
template <class T>
PPO_HD T sum_step(T x, T decay, bool counted, bool done, T& S) {
  const T sum = done ? x : std::fma(decay, S, x);
  S = counted ? sum : done ? T(0) : S;
  return counted ? sum : T(0);
}

}  // namespace ppo
