// A row's statistics as the loss and its gradient need them.
#pragma once

#include "common.h"

namespace ppo::cpu {

template <class R>
struct Scored {
  RowStats<R> stats;
  R logprob, entropy;
};

template <class R>
Scored<R> score(const SoftmaxState<R>& state, R logit, R k) {
  // Nothing with probability: a row of -inf throughout.
  if (state.sum == R(0)) return {{state.shift, R(0)}, R(NAN), R(NAN)};
  const R log2 = log2_sum(state);
  return {{state.shift, log2}, R(kLn2) * (std::fma(k, logit, -state.shift) - log2), entropy(state)};
}

// Gradient of g logprob + h entropy in one row of logits, ready for Sweeps::gradient:
//   ∂/∂z_j = (g (1[j = a] - p_j) - h p_j (log p_j + H)) / τ = 2^t_j (a + b t_j) + 1[j = a] g / τ
template <class R>
struct RowGradient {
  R shift, a, b;
  R at_token;  // the whole sum, before it is rounded to the logits' type

  bool zero() const { return a == R(0) && b == R(0); }
};

template <class R>
RowGradient<R> row_gradient(R g, R h, R entropy, const RowStats<R>& stats, R temperature,
                            R token_logit, R k) {
  const R weight = -std::exp2(-stats.log2_sum) / temperature;
  const R a = weight * (g + h * (entropy - R(kLn2) * stats.log2_sum));
  const R b = weight * h * R(kLn2);
  const R t = std::fma(k, token_logit, -stats.shift);
  const R softmax_part = t == -R(INFINITY) ? R(0) : std::exp2(t) * std::fma(b, t, a);
  return {stats.shift, a, b, softmax_part + g / temperature};
}

// Writes elements [begin, begin + n) of the gradient of a row; `grad` may be `z`.
template <class T>
void write_gradient(const RowGradient<Real<T>>& row, const T* z, T* grad, int64_t begin, int64_t n,
                    int64_t token, Real<T> k) {
  if (row.zero()) {
    std::fill_n(grad + begin, n, T(0));
    return;
  }
  sweeps<T>().gradient(z + begin, grad + begin, n, k, row.shift, row.a, row.b);
  if (begin <= token && token < begin + n) grad[token] = T(row.at_token);
}

}  // namespace ppo::cpu
