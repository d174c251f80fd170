// What runs over the vocabulary: the threads of a CTA walk one row, or a part of it.
//
// A thread takes 16 bytes at a time, a vector. Where V is a multiple of a vector its elements stand
// together, and are one load if rows begin at multiples of 16 bytes too; for other V (50257) they
// stand apart by the number of threads, so that the loads of a warp are together. Which thread sums
// what depends on V and dtype alone: a row comes out bitwise the same wherever it stands.
#pragma once

#include "states.cuh"

namespace ppo::cuda {

enum class Layout { apart, together, aligned };

// Vectors that a thread has in flight; of elements that stand apart fewer, for want of registers.
template <Layout kLayout>
constexpr int kInFlight = kLayout == Layout::apart ? 2 : 4;
constexpr int kMostThreads = 512;
// CTAs of so many threads to a multiprocessor: more registers are had by fp64 and by rows that are
// read element by element.
template <class T, Layout kLayout>
constexpr int kResident = sizeof(T) == 8               ? 1
                          : kLayout == Layout::aligned ? 3
                                                       : 2;

// Threads for `bytes` of a row, `per_thread` each.
inline int threads_for(int64_t bytes, int64_t per_thread) {
  const uint64_t wanted = std::bit_ceil(uint64_t(ceil_div(bytes, per_thread)));
  return int(std::clamp<uint64_t>(wanted, kWarp, kMostThreads));
}

// For a row of `x` (..., V): of nothing but V and dtype.
inline int threads_for_row(const Tensor& x) {
  return threads_for(x.size(-1) * x.element_size(), 16 * 16);
}

template <class T, class... Others>
Layout layout_of(int64_t length, const Rows<T>& rows, const Others&... others) {
  if (length % kVector<T> != 0) return Layout::apart;
  const auto aligned = [](const auto& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.outer_stride % kVector<T> == 0 &&
           x.inner_stride % kVector<T> == 0;
  };
  return aligned(rows) && (aligned(others) && ...) ? Layout::aligned : Layout::together;
}

// Calls f with the layout as a type.
template <class F>
auto with_layout(Layout layout, const F& f) {
  switch (layout) {
    case Layout::aligned:
      return f(std::integral_constant<Layout, Layout::aligned>{});
    case Layout::together:
      return f(std::integral_constant<Layout, Layout::together>{});
    default:
      return f(std::integral_constant<Layout, Layout::apart>{});
  }
}

template <class T>
__device__ __forceinline__ T nothing() {
  return T(-INFINITY);
}

// A vector of -inf.
template <class T>
__device__ __forceinline__ uint4 no_vector() {
  T x[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) x[j] = nothing<T>();
  uint4 vector;
  memcpy(&vector, x, sizeof(x));
  return vector;
}

// Where the elements of vector `i` of this thread's stand in a row: the first one, and from each to
// the next.
template <class T, Layout kLayout>
__device__ __forceinline__ int first_of(int i) {
  const int block = i * int(blockDim.x) * kVector<T>, thread = int(threadIdx.x);
  return block + (kLayout == Layout::apart ? thread : thread * kVector<T>);
}

template <Layout kLayout>
__device__ __forceinline__ int step() {
  return kLayout == Layout::apart ? int(blockDim.x) : 1;
}

// Vector `i` of this thread's in a row of `length` elements in global memory; -inf beyond it.
template <class T, Layout kLayout>
__device__ __forceinline__ uint4 load(const T* row, int length, int i) {
  const int first = first_of<T, kLayout>(i);
  if constexpr (kLayout == Layout::aligned) {
    return first < length ? load_vector(row + first) : no_vector<T>();
  } else {
    T x[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const int at = first + j * step<kLayout>();
      x[j] = at < length ? row[at] : nothing<T>();
    }
    uint4 vector;
    memcpy(&vector, x, sizeof(x));
    return vector;
  }
}

// Vectors to each thread in a row of `length` elements.
template <class T>
__device__ __forceinline__ int vectors_each(int length) {
  return ceil_div(length, int(blockDim.x) * kVector<T>);
}

// What this thread sees of a row in global memory.
template <class T, Layout kLayout>
__device__ __forceinline__ SoftmaxState<Real<T>> thread_statistics(const T* row, int length,
                                                                   Real<T> k) {
  SoftmaxState<Real<T>> state;
  nothing_seen(state);
  const int vectors = vectors_each<T>(length);
  constexpr int n = kInFlight<kLayout>;
  for (int i = 0; i < vectors; i += n) {
    uint4 x[n];
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = load<T, kLayout>(row, length, i + j);
    absorb<T>(state, x, k);
  }
  return state;
}

// Puts vector `i` of this thread's where `load` took it from.
template <class T, Layout kLayout>
__device__ __forceinline__ void store(T* row, int length, int i, const Real<T> (&x)[kVector<T>]) {
  const int first = first_of<T, kLayout>(i);
  if constexpr (kLayout == Layout::aligned) {
    if (first < length) *reinterpret_cast<uint4*>(row + first) = pack_vector<T>(x);
  } else {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const int at = first + j * step<kLayout>();
      if (at < length) row[at] = T(x[j]);
    }
  }
}

// Whether this thread is the one that stores element `at` of a row.
template <class T, Layout kLayout>
__device__ __forceinline__ bool stores(int at) {
  return (kLayout == Layout::apart ? at : at / kVector<T>) % int(blockDim.x) == int(threadIdx.x);
}

// Writes a row vector by vector: `source.load(i)` is what vector i is made of and
// `source.compute(loaded, x)` its elements. Walks back, so that what was read last is still in
// cache; the source may read where it writes.
template <class T, Layout kLayout, class Source>
__device__ __forceinline__ void write_row(T* row, int length, const Source& source) {
  constexpr int n = kLayout == Layout::aligned ? Source::kVectors : 1;
  for (int i = (vectors_each<T>(length) - 1) / n * n; i >= 0; i -= n) {
    typename Source::Loaded loaded[n];
#pragma unroll
    for (int j = 0; j < n; ++j) loaded[j] = source.load(i + j);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      Real<T> x[kVector<T>];
      source.compute(loaded[j], x);
      store<T, kLayout>(row, length, i + j, x);
    }
  }
}

template <class T>
struct Zeros {
  static constexpr int kVectors = 1;
  struct Loaded {};
  __device__ __forceinline__ Loaded load(int) const { return {}; }
  __device__ __forceinline__ void compute(Loaded, Real<T> (&x)[kVector<T>]) const {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) x[j] = Real<T>(0);
  }
};

// Where a source finds the vectors of a row: in global memory,
template <class T, Layout kLayout>
struct InGlobal {
  static constexpr int kVectors = kInFlight<kLayout>;
  const T* row;
  int length;

  __device__ __forceinline__ uint4 load(int i) const {
    return cuda::load<T, kLayout>(row, length, i);
  }
};

// or `count` of them in shared memory, each in the place of its thread's.
template <class T>
struct InShared {
  static constexpr int kVectors = 2;
  uint4* vectors;
  int count;

  __device__ __forceinline__ uint4 load(int i) const {
    const int at = place(i);
    return at < count ? vectors[at] : no_vector<T>();
  }
  __device__ __forceinline__ void keep(int i, const uint4& vector) const {
    const int at = place(i);
    if (at < count) vectors[at] = vector;
  }

 private:
  __device__ __forceinline__ int place(int i) const {
    return i * int(blockDim.x) + int(threadIdx.x);
  }
};

// Of `n` elements, with those that a thread's last vector lacks.
template <class T, Layout kLayout>
__device__ __forceinline__ int vectors_kept(int n) {
  return kLayout == Layout::apart ? vectors_each<T>(n) * int(blockDim.x) : n / kVector<T>;
}

// The gradient of a row away from the token, 2^t (a + b t).
template <class T, class Place>
struct Gradient {
  static constexpr int kVectors = Place::kVectors;
  using Loaded = uint4;
  Place logits;
  RowGradient<Real<T>> row;
  Real<T> k;

  __device__ __forceinline__ uint4 load(int i) const { return logits.load(i); }
  __device__ __forceinline__ void compute(const uint4& loaded, Real<T> (&x)[kVector<T>]) const {
    unpack_vector<T>(loaded, x);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const Real<T> t = exponent(x[j], k, row.shift);
      x[j] = fast_exp2(t) * std::fma(row.b, t, row.a);
    }
  }
};

// `token` counts from `out` and may lie outside of it.
template <class T, Layout kLayout, class Place>
__device__ __forceinline__ void write_gradient(const RowGradient<Real<T>>& row, const Place& logits,
                                               T* out, int length, int64_t token, Real<T> k) {
  if (row.zero()) {
    write_row<T, kLayout>(out, length, Zeros<T>{});
    return;
  }
  write_row<T, kLayout>(out, length, Gradient<T, Place>{logits, row, k});
  if (token >= 0 && token < length && stores<T, kLayout>(int(token))) {
    out[token] = T(row.at_token);
  }
}

}  // namespace ppo::cuda
