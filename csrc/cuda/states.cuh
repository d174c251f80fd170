// Softmax states on the GPU: what a thread saw of a row, in vectors of 16 bytes, and what a CTA
// did.
#pragma once

#include <limits>

#include "../softmax_state.h"
#include "means.cuh"

namespace ppo::cuda {

// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);
// The shift of a state that has seen nothing with probability, the lowest number: no difference of
// shifts is NaN.
template <class R>
constexpr R kNothing = std::numeric_limits<R>::lowest();
// Exponents below this are raised to it: their power is 0 all the same, and 0 times it too.
constexpr float kUnderflow = -1200.0f;

template <class T>
__device__ __forceinline__ void unpack_vector(const uint4& vector, Real<T> (&x)[kVector<T>]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack(words[i], T{});
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  } else {
    memcpy(x, &vector, sizeof(x));
  }
}

template <class T>
__device__ __forceinline__ uint4 pack_vector(const Real<T> (&x)[kVector<T>]) {
  uint4 vector;
  if constexpr (sizeof(T) == 2) {
    vector = {pack({x[0], x[1]}, T{}), pack({x[2], x[3]}, T{}), pack({x[4], x[5]}, T{}),
              pack({x[6], x[7]}, T{})};
  } else {
    memcpy(&vector, x, sizeof(x));
  }
  return vector;
}

// The largest element of some vectors; NaN does not count.
template <class T, int kCount>
__device__ __forceinline__ Real<T> largest(const uint4* vectors) {
  if constexpr (sizeof(T) == 2) {
    uint32_t top = vectors[0].x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint4& v = vectors[i];
      top = max_of_packed(top, max_of_packed(v.x, v.y, T{}), T{});
      top = max_of_packed(top, max_of_packed(v.z, v.w, T{}), T{});
    }
    const float2 pair = unpack(top, T{});
    return std::fmax(pair.x, pair.y);
  } else {
    Real<T> top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Real<T> x[kVector<T>];
      unpack_vector<T>(vectors[i], x);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) top = std::fmax(top, x[j]);
    }
    return top;
  }
}

// k (x - shift), NaN where x is.
template <class R>
__device__ __forceinline__ R exponent(R x, R k, R shift) {
  return max_or_nan(k * (x - shift), R(kUnderflow));
}

template <class R>
__device__ __forceinline__ void nothing_seen(SoftmaxState<R>& state) {
  state = {kNothing<R>, R(0), R(0)};
}

// The state with its exponents relative to a shift that is not smaller.
template <class R>
__device__ __forceinline__ SoftmaxState<R> shifted(const SoftmaxState<R>& state, R shift, R k) {
  const R change = k * (state.shift - shift), factor = fast_exp2(change);
  return {shift, factor * state.sum, weighed(factor, std::fma(change, state.sum, state.weighted))};
}

// The maximum comes first, so that it costs one exponential an element and one for all of them.
template <class T, int kCount>
__device__ __forceinline__ void absorb(SoftmaxState<Real<T>>& state, const uint4* vectors,
                                       Real<T> k) {
  using R = Real<T>;
  state = shifted(state, R(std::fmax(state.shift, largest<T, kCount>(vectors))), k);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    R x[kVector<T>];
    unpack_vector<T>(vectors[i], x);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const R t = exponent(x[j], k, state.shift);
      const R e = fast_exp2(t);
      state.sum += e;
      state.weighted = std::fma(e, t, state.weighted);
    }
  }
}

template <class R>
__device__ __forceinline__ void nothing_seen(Moments<R>& m) {
  m = {{kNothing<R>, R(0), R(0)}, R(0), R(0), R(-INFINITY)};
}

template <class R>
__device__ __forceinline__ Moments<R> shifted(const Moments<R>& m, R shift, R k) {
  const SoftmaxState<R>& softmax = m;
  const R change = k * (m.shift - shift), factor = fast_exp2(change);
  return {shifted(softmax, shift, k), factor * factor * m.squares,
          shifted_second(m, change, factor), m.largest};
}

// The state of softmax has the bits that it has alone.
template <class T, int kCount>
__device__ __forceinline__ void absorb(Moments<Real<T>>& m, const uint4* vectors, Real<T> k) {
  using R = Real<T>;
  const R found = largest<T, kCount>(vectors);
  m = shifted(m, R(std::fmax(m.shift, found)), k);
  m.largest = std::fmax(m.largest, found);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    R x[kVector<T>];
    unpack_vector<T>(vectors[i], x);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const R t = exponent(x[j], k, m.shift);
      const R e = fast_exp2(t);
      m.sum += e;
      m.weighted = std::fma(e, t, m.weighted);
      m.squares = std::fma(e, e, m.squares);
      m.second = std::fma(e * t, t, m.second);
    }
  }
}

template <class R>
__device__ __forceinline__ R warp_max(R x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = std::fmax(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

// The states of a warp's lanes as one, in every lane.
template <class R>
__device__ SoftmaxState<R> merge_lanes(SoftmaxState<R> state, R k) {
  state = shifted(state, warp_max(state.shift), k);
  return {state.shift, warp_sum(state.sum), warp_sum(state.weighted)};
}

template <class R>
__device__ Moments<R> merge_lanes(Moments<R> m, R k) {
  m = shifted(m, warp_max(m.shift), k);
  return {{m.shift, warp_sum(m.sum), warp_sum(m.weighted)},
          warp_sum(m.squares),
          warp_sum(m.second),
          warp_max(m.largest)};
}

// The state with its exponents relative to shifts that are not smaller; a cross of inf stays inf.
template <class R>
__device__ __forceinline__ JointState<R> shifted(const JointState<R>& s, R shift, R ref_shift,
                                                 R k) {
  const R change = k * (s.shift - shift), ref_change = k * (s.ref_shift - ref_shift);
  const R factor = fast_exp2(change);
  return {shift, factor * s.sum, ref_shift, fast_exp2(ref_change) * s.ref_sum,
          weighed(factor, std::fma(s.sum, change - ref_change, s.cross))};
}

template <class R>
__device__ JointState<R> merge_lanes(JointState<R> s, R k) {
  s = shifted(s, warp_max(s.shift), warp_max(s.ref_shift), k);
  return {s.shift, warp_sum(s.sum), s.ref_shift, warp_sum(s.ref_sum), warp_sum(s.cross)};
}

template <class R>
__device__ __forceinline__ void nothing_seen(JointState<R>& s) {
  s = {kNothing<R>, R(0), kNothing<R>, R(0), R(0)};
}

template <class T, int kCount>
__device__ __forceinline__ void absorb(JointState<Real<T>>& s, const uint4* logits,
                                       const uint4* ref_logits, Real<T> k) {
  using R = Real<T>;
  s = shifted(s, R(std::fmax(s.shift, largest<T, kCount>(logits))),
              R(std::fmax(s.ref_shift, largest<T, kCount>(ref_logits))), k);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    R x[kVector<T>], y[kVector<T>];
    unpack_vector<T>(logits[i], x);
    unpack_vector<T>(ref_logits[i], y);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const R t = exponent(x[j], k, s.shift), u = k * (y[j] - s.ref_shift);
      const R e = fast_exp2(t);
      s.sum += e;
      s.ref_sum += fast_exp2(u);
      s.cross += weighed(e, t - u);
    }
  }
}

// The first `count` states in memory as one, in every lane.
template <class State, class R>
__device__ State merge_first(const State* states, int count, R k) {
  State state;
  nothing_seen(state);
  if (lane_id() < count) state = states[lane_id()];
  return merge_lanes(state, k);
}

// The states of all threads of the CTA as one, in the first warp; `scratch` in shared memory has
// room for one of each warp.
template <class State, class R>
__device__ State merge_threads(State state, State* scratch, R k) {
  state = merge_lanes(state, k);
  if (lane_id() == 0) scratch[warp_id()] = state;
  __syncthreads();
  return warp_id() == 0 ? merge_first(scratch, int(blockDim.x) / kWarp, k) : state;
}

}  // namespace ppo::cuda
