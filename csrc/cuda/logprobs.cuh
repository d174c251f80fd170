// How a row is shared out over CTAs, and its statistics.
#pragma once

#include "sweeps.cuh"

namespace ppo::cuda {

// A row goes to `parts` CTAs, `length` elements to each; `kept` in their shared memory, which has
// room for them behind `kHead` bytes.
struct Division {
  int parts, length, threads;
  bool kept;
  int64_t shared;

  // The CTAs of a row are a cluster.
  Grid grid(int64_t rows, int64_t bytes) const { return {rows * parts, threads, bytes, parts}; }
};

// Room for what precedes the logits: so little that a quarter of 151,936 bf16 logits fits three
// times on an H200.
constexpr int64_t kHead = 832;
// How often the threads of a CTA may copy kTogether vectors each into shared memory.
constexpr int kMostCopies = 16;

// The fewest parts of which three, or else two, fit on a multiprocessor. If rows are too long for
// that they are not kept, nor divided. Of nothing but the device, V and dtype, for all kernels that
// score tokens: the scores are then bitwise the same.
template <class T>
Division division_of(const Limits& limits, int64_t length) {
  constexpr int64_t n = kVector<T>;
  for (const int resident : {3, 2}) {
    for (int parts = 1; parts <= limits.most_parts; parts *= 2) {
      const int64_t part = ceil_div(ceil_div<int64_t>(length, parts), n) * n;
      const int64_t threads = threads_for<T>(length, part);
      const int64_t bytes = kHead + part * sizeof(T);
      if (resident * (bytes + limits.reserved_per_block) <= limits.shared_per_multiprocessor &&
          part <= kMostCopies * kTogether * threads * n) {
        return {parts, int(part), int(threads), true, bytes};
      }
    }
  }
  return {1, int(length), threads_for<T>(length, length), false, kHead};
}

// Where elements are computed each by itself, so that no division changes their bits: of as many
// CTAs as keep all multiprocessors busy, however few the rows; each takes whole steps of its
// threads.
template <class T>
Division elementwise_division(const Limits& limits, int64_t rows, int64_t length) {
  constexpr int64_t kWanted = 8;  // of a multiprocessor, where three or four run at once
  const int64_t threads = threads_for<T>(length, length), step = threads * kTogether * kVector<T>;
  const int64_t all = ceil_div(length, step);
  const int64_t wanted = kWanted * limits.multiprocessors;
  const int64_t steps = ceil_div(all, std::min(all, ceil_div(wanted, std::max<int64_t>(rows, 1))));
  return {int(ceil_div(all, steps)), int(steps * step), int(threads), false, 0};
}

// What of a row falls to a CTA, the one of its cluster that has this rank or that `block` of all.
struct Part {
  uint32_t row;
  int index, begin, length;

  __device__ Part(const Division& division, int row_length, uint32_t block = blockIdx.x)
      : row(block / division.parts),
        index(block % division.parts),
        begin(index * division.length),
        length(max(0, min(division.length, row_length - begin))) {}
};

// In a backward, for `Part`: rows from the last to the first, so that what the forward read last is
// still in cache.
__device__ __forceinline__ uint32_t block_from_last() { return gridDim.x - 1 - blockIdx.x; }

// The states on their way to that of the row, in shared memory.
template <class R, template <class> class State = SoftmaxState>
struct States {
  State<R> warps[kMostThreads / kWarp], parts[kMostParts];
};

// By all threads before they look at their part of a row.
__device__ __forceinline__ void begin_row(const Division& division) {
  if (division.parts > 1) cluster_arrive();
}

// The state of a row, in the first warp of each of its CTAs, from those of all threads. What the
// first thread read before is read before anything is written after, also by another CTA: it is one
// of those that fence.
template <class R, template <class> class State>
__device__ State<R> merge_row(State<R> state, States<R, State>& states, const Division& division,
                              const Part& part, R k) {
  state = merge_threads(state, states.warps, k);
  if (division.parts == 1) return state;
  cluster_wait();  // All have begun and can be written to.
  if (int(threadIdx.x) < division.parts) {
    *in_cluster(states.parts + part.index, threadIdx.x) = state;
    fence_cluster();
  }
  cluster_arrive();
  cluster_wait();
  return warp_id() == 0 ? merge_first(states.parts, division.parts, k) : state;
}

// NaN for a token outside of the row.
template <class T>
__device__ __forceinline__ Real<T> logit_of(const T* row, int length, int64_t token) {
  return token >= 0 && token < length ? Real<T>(row[token]) : Real<T>(NAN);
}

struct KeepNothing {
  template <class Whole>
  __device__ __forceinline__ void operator()(int, const uint4&, Whole) const {}
};

}  // namespace ppo::cuda
