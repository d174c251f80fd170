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

template <class T>
struct PolicyTerm {
  T loss;
  T grad;       // ∂loss/∂logprob
  T approx_kl;  // k3 estimate of KL(old || new)
  bool clipped;
};

// `dual_clip` is +inf when there is none.
template <class T>
PPO_HD PolicyTerm<T> policy_term(T log_ratio, T advantage, T clip_low, T clip_high, T dual_clip) {
  const T ratio = std::exp(log_ratio);
  const T low = T(1) - clip_low, high = T(1) + clip_high;
  const T bounded = ratio < low ? low : (ratio > high ? high : ratio);
  const T unclipped_loss = -advantage * ratio;
  const T clipped_loss = -advantage * bounded;
  PolicyTerm<T> term;
  term.clipped = clipped_loss > unclipped_loss;
  term.loss = term.clipped ? clipped_loss : unclipped_loss;
  term.grad = term.clipped ? T(0) : unclipped_loss;
  term.approx_kl = std::expm1(log_ratio) - log_ratio;
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
      const T excess = std::expm1(-log_ratio);
      return {excess + log_ratio, -excess};
    }
    default:
      return {std::fabs(log_ratio), T(log_ratio > T(0)) - T(log_ratio < T(0))};
  }
}

// What a GAE scan hands to the token before.
template <class T>
struct GAECarry {
  T value;
  T advantage;
};

// One step backwards; the advantage of this token is the `advantage` of the result.
template <class T>
PPO_HD GAECarry<T> gae_step(T reward, T value, bool done, T gamma, T gamma_lam, GAECarry<T> next) {
  const T next_value = done ? T(0) : next.value;
  const T next_advantage = done ? T(0) : next.advantage;
  return {value, reward + gamma * next_value - value + gamma_lam * next_advantage};
}

}  // namespace ppo
