// What sample_tokens sums up in a row: a CTA walks it in at most 32 segments, one to a lane when
// they are compared, and walks one of them again. Which thread sums what depends on V and dtype
// alone.
#pragma once

#include "../sampling.h"
#include "sweeps.cuh"

namespace ppo::cuda {

constexpr int kWarps = kMostThreads / kWarp;
constexpr int kSegments = kWarp;
// Scores that a sweep compares all others with: for more there are no registers.
template <class R>
constexpr int kPivots = sizeof(R) == 8 ? 3 : 7;

// The least finite number: no larger than any logit that has a weight, and no NaN when it is
// subtracted.
template <class R>
constexpr R kLowest = sizeof(R) == 8 ? R(-DBL_MAX) : R(-FLT_MAX);

template <class R>
__device__ __forceinline__ R warp_min(R x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const R other = __shfl_xor_sync(kAllLanes, x, distance);
    x = other < x ? other : x;
  }
  return x;
}

// The sum of the lanes up to this one.
template <class X>
__device__ __forceinline__ X lanes_until(X x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const X before = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_id() >= distance) x += before;
  }
  return x;
}

// In shared memory; what is written is read after a `__syncthreads`.
template <class R>
struct Scratch {
  R tops[kSegments][kWarps];
  R sums[kSegments][kWarps];
  int ties[kSegments][kWarps];
  double below[kWarps][kPivots<R> + 1];
  double weight_of[kWarps];
  int ties_of[kWarps], passed[kWarps], last[kWarps];
};

// Elements of a segment: whole turns of all threads.
template <class T, Layout kLayout>
__device__ __forceinline__ int segment_length(int length) {
  const int turn = kInFlight<kLayout> * block_size<T, kLayout>();
  return ceil_div(length, kSegments * turn) * turn;
}

// f(vectors), kInFlight of them, over elements of a row.
template <class T, Layout kLayout, class F>
__device__ __forceinline__ void for_loaded(const T* row, int length, const F& f) {
  constexpr int n = kInFlight<kLayout>;
  for_vectors<T, kLayout, n>(length, [&](int i, auto whole) {
    uint4 x[n];
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = load<T, kLayout, whole>(row, length, i + j);
    f(x);
  });
}

// f(x) for each element of vectors.
template <class T, int n, class F>
__device__ __forceinline__ void for_elements(const uint4 (&vectors)[n], const F& f) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    Real<T> x[kVector<T>];
    unpack_vector<T>(vectors[i], x);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) f(x[j]);
  }
}

// Into `scratch`, of each segment and warp, the largest logit and Σ 2^(k (x - largest)).
template <class T, Layout kLayout>
__device__ __forceinline__ void segment_weights(const T* row, int length, Real<T> k,
                                                Scratch<Real<T>>& scratch) {
  using R = Real<T>;
  const int segment = segment_length<T, kLayout>(length);
  for (int i = 0; i * segment < length; ++i) {
    R top = kLowest<R>, sum = R(0);
    for_loaded<T, kLayout>(row + i * segment, min(segment, length - i * segment),
                           [&](const auto& x) {
                             constexpr int n = kInFlight<kLayout>;
                             const R found = std::fmax(top, largest<T, n>(x));
                             sum *= fast_exp2((top - found) * k);
                             top = found;
                             for_elements<T>(x, [&](R z) { sum += fast_exp2((z - top) * k); });
                           });
    const R warp_top = warp_max(top);
    sum = warp_sum(sum * fast_exp2((top - warp_top) * k));
    if (lane_id() == 0) {
      scratch.tops[i][warp_id()] = warp_top;
      scratch.sums[i][warp_id()] = sum;
    }
  }
}

// Of the segment that is this lane's.
template <class R>
struct Segment {
  R top;
  double factor, weight;  // 2^(k (top - largest)), and the weight relative to the row's largest
};

// From what `segment_weights` left; `largest` becomes the row's.
template <class R>
__device__ __forceinline__ Segment<R> segment_of_lane(const Scratch<R>& scratch, int segments,
                                                      double k, R& largest) {
  const int warps = int(blockDim.x) / kWarp, lane = lane_id();
  Segment<R> s{kLowest<R>, 0, 0};
  if (lane < segments) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warps) s.top = std::fmax(s.top, scratch.tops[lane][w]);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warps) {
        const double factor = fast_exp2(k * (double(scratch.tops[lane][w]) - double(s.top)));
        s.weight += weighed(double(scratch.sums[lane][w]), factor);
      }
    }
  }
  largest = warp_max(s.top);
  s.factor = fast_exp2(k * (double(s.top) - double(largest)));
  s.weight = weighed(s.weight, s.factor);
  return s;
}

// The segment in which the sum of weights, one in each lane, passes `target`, and the sum before
// it; the last one with weight if rounding leaves it below.
__device__ __forceinline__ int segment_at(double weight, double cumulative, double target,
                                          double& before) {
  const bool has_weight = weight > 0;
  const int passed = warp_min(has_weight && cumulative > target ? lane_id() : kSegments);
  const int last = -warp_min(has_weight ? -lane_id() : 0);
  const int at = passed < kSegments ? passed : last;
  before = __shfl_sync(kAllLanes, cumulative - weight, at);
  return at;
}

// The sum of the threads before this one; `of_warps` in shared memory. By all threads.
template <class X>
__device__ __forceinline__ X threads_before(X x, X* of_warps) {
  const X until = lanes_until(x);
  if (lane_id() == kWarp - 1) of_warps[warp_id()] = until;
  __syncthreads();
  X before = X(0);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_id()) before += of_warps[w];
  }
  return before + (until - x);
}

// Vectors of a segment that stand together in one thread, so that a sum over threads is one over
// elements in their order. Calls f(index, x) for each element.
template <class T, Layout kLayout, class F>
__device__ __forceinline__ void for_own_elements(const T* row, int length, int begin, int end,
                                                 const F& f) {
  const int each = ceil_div(end - begin, int(blockDim.x) * kVector<T>) * kVector<T>;
  const int first = begin + int(threadIdx.x) * each;
  for (int i = first; i < min(first + each, end); i += kVector<T>) {
    uint4 vectors[1];
    if constexpr (kLayout == Layout::aligned) {
      vectors[0] = load_vector(row + i);
    } else {
      T x[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) x[j] = i + j < end ? row[i + j] : T(-INFINITY);
      memcpy(vectors, x, sizeof(x));
    }
    int at = i;
    for_elements<T>(vectors, [&](Real<T> x) { f(at++, x); });
  }
}

// How the elements of a segment weigh.
template <class R>
struct Weights {
  Scale<R> scale;
  bool divides;
  R largest, centre;
  Kept<R> kept;

  __device__ __forceinline__ R score(R x) const { return divides ? x / scale.temperature : x; }
  // `tie` counts the ids at the cut, from the row's first.
  __device__ __forceinline__ R operator()(R x, int64_t& tie) const {
    const R s = score(x);
    if (s == kept.cut) return tie++ < kept.skipped ? R(0) : kept.tie_weight;
    const bool counts = s > kept.cut && exponent_of(s, largest, scale.k) >= kept.least;
    const R weight = fast_exp2((s - centre) * scale.k);
    return counts ? weight : R(0);
  }
};

// The element of [begin, end) at which the sum of weights passes this fraction of all of them; in
// every thread. `tie` is how many ids at the cut come before.
template <class T, Layout kLayout>
__device__ __forceinline__ int token_at(const T* row, int length, int begin, int end,
                                        double fraction, int64_t tie,
                                        const Weights<Real<T>>& weights,
                                        Scratch<Real<T>>& scratch) {
  using R = Real<T>;
  if (weights.divides) {
    int ties = 0;
    for_own_elements<T, kLayout>(row, length, begin, end,
                                 [&](int, R x) { ties += weights.score(x) == weights.kept.cut; });
    tie += threads_before(ties, scratch.ties_of);
  }
  double own = 0;
  int64_t counted = tie;
  for_own_elements<T, kLayout>(row, length, begin, end,
                               [&](int, R x) { own += double(weights(x, counted)); });
  double reached = threads_before(own, scratch.weight_of);
  double all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < int(blockDim.x) / kWarp) all += scratch.weight_of[w];
  }
  int passed = end, last = begin;
  for_own_elements<T, kLayout>(row, length, begin, end, [&](int i, R x) {
    const double weight = double(weights(x, tie));
    reached += weight;
    if (weight > 0) {
      last = i;
      if (passed == end && reached > fraction * all) passed = i;
    }
  });
  passed = warp_min(passed);
  last = -warp_min(-last);
  if (lane_id() == 0) {
    scratch.passed[warp_id()] = passed;
    scratch.last[warp_id()] = last;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < int(blockDim.x) / kWarp) {
      passed = min(passed, scratch.passed[w]);
      last = max(last, scratch.last[w]);
    }
  }
  return passed < end ? passed : last;
}

// For `search`: the weights, or the numbers, of scores from `low` on that are below pivots.
template <class T, Layout kLayout>
struct WeightsBelow {
  using R = Real<T>;
  const T* row;
  int length;
  Scale<R> scale;
  R largest, low;
  bool counts;
  Scratch<R>& scratch;

  static constexpr int kSums = kPivots<R> + 1;

  __device__ __forceinline__ void operator()(const R (&pivots)[kPivots<R>],
                                             double (&sums)[kSums]) const {
    R below[kSums] = {};
    for_loaded<T, kLayout>(row, length, [&](const auto& x) {
      for_elements<T>(x, [&](R z) {
        const R s = z / scale.temperature;
        R weight = counts ? R(s > -R(INFINITY)) : fast_exp2((s - largest) * scale.k);
        if (!(s >= low)) weight = R(0);
#pragma unroll
        for (int i = 0; i < kPivots<R>; ++i) below[i] += s < pivots[i] ? weight : R(0);
        below[kPivots<R>] += weight;
      });
    });
    __syncthreads();  // All have read the sums of the last sweep.
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const double sum = warp_sum(double(below[i]));
      if (lane_id() == 0) scratch.below[warp_id()][i] = sum;
    }
    __syncthreads();
    // A lane adds up its share of the warps for one of the sums.
    constexpr int kShares = kWarp / kSums;
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kWarps / kShares; ++j) {
      const int w = lane_id() / kSums + kShares * j;
      if (w < int(blockDim.x) / kWarp) sum += scratch.below[w][lane_id() % kSums];
    }
#pragma unroll
    for (int distance = kSums; distance < kWarp; distance *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = __shfl_sync(kAllLanes, sum, i);
  }
};

}  // namespace ppo::cuda
