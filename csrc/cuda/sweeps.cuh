// What runs over the vocabulary: the threads of a CTA walk one row, or a part of it.
//
// A thread takes 16 bytes at a time, a vector. Where V is a multiple of a vector its elements stand
// together, and are one load if rows begin at multiples of 16 bytes too; for other V (50257) they
// stand apart by the number of threads, so that the loads of a warp are together. Which thread sums
// what depends on the device, V and dtype alone: a row comes out bitwise the same wherever it
// stands. Who copies or writes what does not matter to that: bulk copies and gradients take what of
// a row is aligned vectors, and the few elements at its ends by themselves.
#pragma once

#include "states.cuh"

namespace ppo::cuda {

enum class Layout { apart, together, aligned };

// Vectors that are absorbed at once, in every kernel that scores tokens: bits depend on it. And
// written at once.
constexpr int kTogether = 2;
// Vectors that a thread has in flight; of elements that stand apart fewer, for want of registers.
template <Layout kLayout>
constexpr int kInFlight = kLayout == Layout::apart ? 2 : 4;

// Elements that stand apart do so by a number that the compiler knows.
constexpr int kApartThreads = 256;
template <Layout kLayout>
constexpr int kThreadBound = kLayout == Layout::apart ? kApartThreads : kMostThreads;
// CTAs of so many threads to a multiprocessor: more registers are had by fp64 and by rows that are
// read element by element.
template <class T, Layout kLayout>
constexpr int kResident = sizeof(T) == 8                ? 1
                          : kLayout == Layout::aligned  ? 3
                          : kLayout == Layout::together ? 2
                                                        : 4;

template <Layout kLayout>
__device__ __forceinline__ int threads() {
  return kLayout == Layout::apart ? kApartThreads : int(blockDim.x);
}

// To a CTA that has `part` elements of a row of `length`.
template <class T>
int threads_for(int64_t length, int64_t part) {
  if (length % kVector<T> != 0) return kApartThreads;
  constexpr int64_t kBytesEach = 128;
  const int64_t wanted = ceil_div<int64_t>(part * sizeof(T), kBytesEach);
  return int(std::clamp<uint64_t>(std::bit_ceil(uint64_t(wanted)), kWarp, kMostThreads));
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

// A vector of -inf.
template <class T>
__device__ __forceinline__ uint4 no_vector() {
  T x[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) x[j] = T(-INFINITY);
  uint4 vector;
  memcpy(&vector, x, sizeof(x));
  return vector;
}

// Elements in a vector of each thread.
template <class T, Layout kLayout>
__device__ __forceinline__ int block_size() {
  return threads<kLayout>() * kVector<T>;
}

// Where the elements of vector `i` of this thread's stand in a row: the first one, and from each to
// the next.
template <class T, Layout kLayout>
__device__ __forceinline__ int first_of(int i) {
  const int thread = int(threadIdx.x);
  return i * block_size<T, kLayout>() + (kLayout == Layout::apart ? thread : thread * kVector<T>);
}

template <Layout kLayout>
constexpr int kStep = kLayout == Layout::apart ? kApartThreads : 1;

// Vector `i` of this thread's in a row of `length` elements in global memory; where the row does
// not have the `kWhole` of it, -inf beyond.
template <class T, Layout kLayout, bool kWhole>
__device__ __forceinline__ uint4 load(const T* row, int length, int i) {
  const int first = first_of<T, kLayout>(i);
  if constexpr (kLayout == Layout::aligned) {
    return kWhole || first < length ? load_vector(row + first) : no_vector<T>();
  } else {
    T x[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const int step = j * kStep<kLayout>;
      x[j] = kWhole || first + step < length ? row[first + step] : T(-INFINITY);
    }
    uint4 vector;
    memcpy(&vector, x, sizeof(x));
    return vector;
  }
}

// Puts vector `i` of this thread's where `load` took it from.
template <class T, Layout kLayout, bool kWhole>
__device__ __forceinline__ void store(T* row, int length, int i, const uint4& vector) {
  const int first = first_of<T, kLayout>(i);
  if constexpr (kLayout == Layout::aligned) {
    if (kWhole || first < length) *reinterpret_cast<uint4*>(row + first) = vector;
  } else {
    T x[kVector<T>];
    memcpy(x, &vector, sizeof(x));
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const int step = j * kStep<kLayout>;
      if (kWhole || first + step < length) row[first + step] = x[j];
    }
  }
}

// f(i, whole) for a row of `length` elements, of vectors i to i + n of each thread; `whole` is a
// type that tells whether all of them are there. From the first to the last,
template <class T, Layout kLayout, int n, class F>
__device__ __forceinline__ void for_vectors(int length, const F& f) {
  const int block = block_size<T, kLayout>(), whole = length / (n * block) * n;
  for (int i = 0; i < whole; i += n) f(i, std::true_type{});
  if (whole * block < length) f(whole, std::false_type{});
}

// and from the last to the first.
template <class T, Layout kLayout, int n, class F>
__device__ __forceinline__ void for_vectors_back(int length, const F& f) {
  const int block = block_size<T, kLayout>(), whole = length / (n * block) * n;
  if (whole * block < length) f(whole, std::false_type{});
  for (int i = whole - n; i >= 0; i -= n) f(i, std::true_type{});
}

// What this thread sees of a row in global memory; `keep(i, vector, whole)` is given all of it.
template <class T, Layout kLayout, class State = SoftmaxState<Real<T>>, class Keep>
__device__ __forceinline__ State thread_sums(const T* row, int length, Real<T> k,
                                             const Keep& keep) {
  State state;
  nothing_seen(state);
  constexpr int n = kInFlight<kLayout>;
  for_vectors<T, kLayout, n>(length, [&](int i, auto whole) {
    uint4 x[n];
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = load<T, kLayout, whole>(row, length, i + j);
#pragma unroll
    for (int j = 0; j < n; ++j) keep(i + j, x[j], whole);
#pragma unroll
    for (int j = 0; j < n; j += kTogether) absorb<T, kTogether>(state, x + j, k);
  });
  return state;
}

// What of a row is vectors that are aligned in memory.
struct Inner {
  int begin, length;
};

template <class T, Layout kLayout>
__device__ __forceinline__ Inner inner_of(const T* row, int length) {
  if constexpr (kLayout == Layout::aligned) return {0, length};
  const int before = int(-reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int begin = min(before, length);
  return {begin, (length - begin) / kVector<T> * kVector<T>};
}

// f(at) for the elements before it and after it, each by another thread.
template <class F>
__device__ __forceinline__ void for_ends(const Inner& inner, int length, const F& f) {
  const int thread = int(threadIdx.x);
  const int at = thread < inner.begin ? thread : thread + inner.length;
  if (at < length) f(at);
}

// Whether this thread is the one that `write_gradient` has write element `at`, if there is one.
template <class T>
__device__ __forceinline__ bool writes(const Inner& inner, int length, int64_t at) {
  const int64_t within = at - inner.begin;
  const int thread = int(threadIdx.x);
  if (within >= 0 && within < inner.length) return int(within / kVector<T> % blockDim.x) == thread;
  return at >= 0 && at < length && (within < 0 ? at : at - inner.length) == thread;
}

// Writes a row vector by vector: `source.load<whole>(i)` is what vector i is made of and
// `source.compute(loaded, x)` its elements. Walks back, so that what was read last is still in
// cache; the source may read where it writes.
template <class T, Layout kLayout, class Source>
__device__ __forceinline__ void write_row(T* row, int length, const Source& source) {
  constexpr int n = kLayout == Layout::aligned ? kTogether : 1;
  for_vectors_back<T, kLayout, n>(length, [&](int i, auto whole) {
    typename Source::Loaded loaded[n];
#pragma unroll
    for (int j = 0; j < n; ++j) loaded[j] = source.template load<whole>(i + j);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      Real<T> x[kVector<T>];
      source.compute(loaded[j], x);
      store<T, kLayout, whole>(row, length, i + j, pack_vector<T>(x));
    }
  });
}

template <class T>
struct Zeros {
  struct Loaded {};
  template <bool>
  __device__ __forceinline__ Loaded load(int) const {
    return {};
  }
  __device__ __forceinline__ void compute(Loaded, Real<T> (&x)[kVector<T>]) const {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) x[j] = Real<T>(0);
  }
};

// Where a source finds the vectors of a row: in global memory.
template <class T, Layout kLayout>
struct InGlobal {
  const T* row;
  int length;

  template <bool kWhole>
  __device__ __forceinline__ uint4 load(int i) const {
    return cuda::load<T, kLayout, kWhole>(row, length, i);
  }
  template <Layout kOther>
  __device__ InGlobal<T, kOther> part(const Inner& inner) const {
    return {row + inner.begin, inner.length};
  }
};

// The gradient of a row away from the token, 2^t (a + b t).
template <class R>
__device__ __forceinline__ R gradient_at(R logit, const RowGradient<R>& row, R k) {
  const R t = exponent(logit, k, row.shift);
  return fast_exp2(t) * std::fma(row.b, t, row.a);
}

template <class T, class Place>
struct Gradient {
  using Loaded = uint4;
  Place logits;
  RowGradient<Real<T>> row;
  Real<T> k;

  template <bool kWhole>
  __device__ __forceinline__ uint4 load(int i) const {
    return logits.template load<kWhole>(i);
  }
  __device__ __forceinline__ void compute(const uint4& loaded, Real<T> (&x)[kVector<T>]) const {
    unpack_vector<T>(loaded, x);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) x[j] = gradient_at(x[j], row, k);
  }
};

// Threads write aligned vectors, whichever elements they summed. `token` counts from `out` and may
// lie outside of it.
template <class T, Layout kLayout, class Place>
__device__ __forceinline__ void write_gradient(const RowGradient<Real<T>>& row, const Place& logits,
                                               T* out, int length, int64_t token, Real<T> k) {
  const Inner inner = inner_of<T, kLayout>(out, length);
  const auto write = [&](const auto& source) {
    write_row<T, Layout::aligned>(out + inner.begin, inner.length, source);
  };
  if (row.zero()) {
    write(Zeros<T>{});
    for_ends(inner, length, [&](int at) { out[at] = T(0); });
    return;
  }
  const auto address = [](const T* p) { return reinterpret_cast<uintptr_t>(p); };
  if (kLayout == Layout::aligned || (address(logits.row) - address(out)) % 16 == 0) {
    const auto vectors = logits.template part<Layout::aligned>(inner);
    write(Gradient<T, decltype(vectors)>{vectors, row, k});
  } else {
    const auto vectors = logits.template part<Layout::together>(inner);
    write(Gradient<T, decltype(vectors)>{vectors, row, k});
  }
  for_ends(inner, length,
           [&](int at) { out[at] = T(gradient_at(Real<T>(logits.row[at]), row, k)); });
  if (writes<T>(inner, length, token)) out[token] = T(row.at_token);
}

}  // namespace ppo::cuda
