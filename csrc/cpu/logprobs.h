// The gradient of a row of logits, in parts.
#pragma once

#include "common.h"

namespace ppo::cpu {

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
