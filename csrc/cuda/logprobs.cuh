// A row's statistics from global memory.
#pragma once

#include "sweeps.cuh"

namespace ppo::cuda {

// NaN for a token outside of the row.
template <class T>
__device__ __forceinline__ Real<T> logit_of(const T* row, int length, int64_t token) {
  return token >= 0 && token < length ? Real<T>(row[token]) : Real<T>(NAN);
}

// Shared memory for `score_row`.
template <class T>
constexpr int64_t kScratch = kMostThreads / kWarp * sizeof(SoftmaxState<Real<T>>);

// In the first warp; the others have no use for what they get.
template <class T, Layout kLayout>
__device__ __forceinline__ Scored<Real<T>> score_row(const T* row, int length, Real<T> logit,
                                                     Real<T> k) {
  auto state = thread_statistics<T, kLayout>(row, length, k);
  state = merge_threads(state, reinterpret_cast<SoftmaxState<Real<T>>*>(shared_memory()));
  return score(state, logit, k);
}

}  // namespace ppo::cuda
