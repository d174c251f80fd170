// The sweeps of sweeps.h, written once. Included under a target and inside its namespace, after
// simd.h.

template <class V>
PPO_INLINE auto horizontal_sum(V v) {
  auto sum = v[0];
  for (int i = 1; i < kLanes<V>; ++i) sum += v[i];
  return sum;
}

template <class V>
PPO_INLINE auto horizontal_max(V v) {
  auto largest = v[0];
  for (int i = 1; i < kLanes<V>; ++i) {
    largest = largest > v[i] || largest != largest ? largest : v[i];
  }
  return largest;
}

// A pack from p; with kTail only the first n elements are there, and the rest is -inf, which no
// sweep counts.
template <bool kTail, int N, class V, class T>
PPO_INLINE void load(const T* p, int64_t n, V (&x)[N]) {
  if constexpr (kTail) {
    T padded[N * kLanes<V>];
    for (T& element : padded) element = static_cast<T>(-INFINITY);
    memcpy(padded, p, n * sizeof(T));
    load(padded, x);
  } else {
    load(p, x);
  }
}

template <bool kTail, int N, class V, class T>
PPO_INLINE void store(T* p, int64_t n, const V (&x)[N]) {
  if constexpr (kTail) {
    T padded[N * kLanes<V>];
    store(padded, x);
    memcpy(p, padded, n * sizeof(T));
  } else {
    store(p, x);
  }
}

// Calls f(tail, begin, count) for packs of vectors over n elements, tail true for the last, short
// one.
template <class V, class F>
PPO_INLINE void for_packs(int64_t n, const F& f) {
  constexpr int64_t kElements = kPack * kLanes<V>;
  int64_t i = 0;
  for (; i + kElements <= n; i += kElements) f(std::false_type{}, i, kElements);
  if (i < n) f(std::true_type{}, i, n - i);
}

#define PPO_LAMBDA __attribute__((always_inline))

template <int N, class V>
PPO_INLINE void raise(V (&largest)[N], const V (&x)[N]) {
  for (int u = 0; u < N; ++u) largest[u] = max(largest[u], x[u]);
}

template <int N, class V>
PPO_INLINE auto maximum(V (&lanes)[N]) {
  for (int u = 1; u < N; ++u) lanes[0] = max(lanes[0], lanes[u]);
  return horizontal_max(lanes[0]);
}

template <class V, class T>
PPO_INLINE auto maximum(const T* z, int64_t n) {
  V largest[kPack];
  for (V& m : largest) m = broadcast<V>(-INFINITY);
  for_packs<V>(n, [&](auto tail, int64_t i, int64_t count) PPO_LAMBDA {
    V x[kPack];
    load<tail.value>(z + i, count, x);
    raise(largest, x);
  });
  return maximum(largest);
}

// A chunk is summed in one pass, relative to the maximum of its first elements; only if a later one
// proves larger by kHeadroom (in base 2) is it summed again, relative to its true maximum.
constexpr int64_t kSample = 256;
constexpr float kHeadroom = 10.0f;

// Where exponents k (x - shift) are counted from. In fp32 one fma makes k x - fl(k shift) of a
// logit, `rest` more than its exponent, which is put right in the sums, 2^-rest times as large. In
// fp64, or where k shift is so large that `rest` would be, the difference comes before the product.
template <class R>
struct Origin {
  static constexpr bool kFused = sizeof(R) == sizeof(float);
  R place, rest, factor;

  Origin(R k, R shift) : place(shift), rest(0), factor(1) {
    if constexpr (kFused) {
      place = -(k * shift);
      rest = std::fma(k, shift, place);
      factor = std::exp2(-rest);
    }
  }

  // Whether shifts of this size are left to fp64.
  static bool beyond(R k, R shift) { return kFused && !(std::fabs(k * shift) < R(1 << 20)); }
};

template <class V>
PPO_INLINE V exponent(V x, V k, V place) {
  if constexpr (sizeof(x[0]) == sizeof(float)) return exact_fma(x, k, place);
  return k * (x - place);
}

// At least kFloor, finite so that 2^t t is 0 and not 0 * inf where x is -inf.
template <int N, class V>
PPO_INLINE void exponents(const V (&x)[N], V k, V place, V (&t)[N]) {
  for (int u = 0; u < N; ++u) t[u] = exponent(x[u], k, place);
  for (int u = 0; u < N; ++u) t[u] = max(broadcast<V>(kFloor<V>), t[u]);
}

template <int N, class V>
PPO_INLINE auto total(const V (&x)[N]) {
  V sum = x[0];
  for (int u = 1; u < N; ++u) sum += x[u];
  return horizontal_sum(sum);
}

// Sums run over blocks of this many elements and then over blocks: lanes that added up a whole
// chunk one by one would lose digits.
constexpr int64_t kBlock = 1024;

// Calls f(begin, count) for the blocks of n elements.
template <class F>
PPO_INLINE void for_blocks(int64_t n, const F& f) {
  for (int64_t begin = 0; begin < n; begin += kBlock) f(begin, std::min(kBlock, n - begin));
}

template <int N, class V>
PPO_INLINE void add(V (&sum)[N], const V (&x)[N]) {
  for (int u = 0; u < N; ++u) sum[u] += x[u];
}

// What packs of 2^t and t add up to.
template <class V>
struct SoftmaxSums {
  V sum[kPack] = {}, weighted[kPack] = {};

  PPO_INLINE void absorb(const V (&e)[kPack], const V (&t)[kPack]) {
    add(sum, e);
    for (int u = 0; u < kPack; ++u) weighted[u] = fma(e[u], t[u], weighted[u]);
  }
  PPO_INLINE void absorb(const SoftmaxSums& block) {
    add(sum, block.sum);
    add(weighted, block.weighted);
  }
  template <class R>
  PPO_INLINE SoftmaxState<R> state(R shift, R, const Origin<R>& origin) const {
    const R s = total(sum);
    return {shift, origin.factor * s, origin.factor * (total(weighted) - origin.rest * s)};
  }
};

// The sums of second order in half as many vectors, or there would not be registers for them.
template <class V>
struct MomentSums {
  SoftmaxSums<V> softmax;
  V squares[kPack / 2] = {}, second[kPack / 2] = {};

  PPO_INLINE void absorb(const V (&e)[kPack], const V (&t)[kPack]) {
    softmax.absorb(e, t);
    for (int u = 0; u < kPack; ++u) {
      V &square = squares[u % (kPack / 2)], &product = second[u % (kPack / 2)];
      square = fma(e[u], e[u], square);
      product = fma(e[u] * t[u], t[u], product);
    }
  }
  PPO_INLINE void absorb(const MomentSums& block) {
    softmax.absorb(block.softmax);
    add(squares, block.squares);
    add(second, block.second);
  }
  template <class R>
  PPO_INLINE Moments<R> state(R shift, R largest, const Origin<R>& origin) const {
    const R f = origin.factor, s = total(softmax.sum), w = total(softmax.weighted);
    return {softmax.state(shift, largest, origin), f * f * total(squares),
            f * (total(second) + origin.rest * (origin.rest * s - R(2) * w)), largest};
  }
};

// The state relative to `centre`; `centre` becomes the true maximum. A NaN among the logits makes
// `weighted` NaN.
template <template <class> class Sums, class T>
PPO_INLINE auto state_about(const T* z, int64_t n, Real<T> k, Real<T>& centre) {
  using V = typename VectorOf<T>::type;
  const Real<T> shift = centre;
  const Origin<Real<T>> origin(k, shift);
  const V scale = broadcast<V>(k), place = broadcast<V>(origin.place);
  Sums<V> sums;
  V largest[kPack];
  for (V& m : largest) m = broadcast<V>(centre);
  for_blocks(n, [&](int64_t begin, int64_t size) PPO_LAMBDA {
    Sums<V> block;
    for_packs<V>(size, [&](auto tail, int64_t i, int64_t count) PPO_LAMBDA {
      V x[kPack], t[kPack], e[kPack];
      load<tail.value>(z + begin + i, count, x);
      raise(largest, x);
      exponents(x, scale, place, t);
      exp2(t, e);
      block.absorb(e, t);
    });
    sums.absorb(block);
  });
  centre = maximum(largest);
  return sums.state(shift, centre, origin);
}

// A chunk in fp64, and what comes of one.
template <class T>
PPO_INLINE void widen(const T* z, int64_t n, double* wide) {
  for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<float>(z[i]);
}
inline SoftmaxState<float> narrow(const SoftmaxState<double>& s) {
  return {float(s.shift), float(s.sum), float(s.weighted)};
}
inline Moments<float> narrow(const Moments<double>& m) {
  const SoftmaxState<double>& softmax = m;
  return {narrow(softmax), float(m.squares), float(m.second), float(m.largest)};
}
inline JointState<float> narrow(const JointState<double>& s) {
  return {float(s.shift), float(s.sum), float(s.ref_shift), float(s.ref_sum), float(s.cross)};
}

template <template <class> class Sums, class T>
PPO_INLINE auto state_of(const T* z, int64_t n, Real<T> k);

template <template <class> class Sums, class T>
__attribute__((noinline)) auto state_in_fp64(const T* z, int64_t n, double k) {
  double wide[kChunk];
  widen(z, n, wide);
  return narrow(state_of<Sums>(wide, n, k));
}

template <template <class> class Sums, class T>
PPO_INLINE auto state_of(const T* z, int64_t n, Real<T> k) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  R centre = maximum<V>(z, std::min(n, kSample));
  if (!(centre > -R(INFINITY)) || Origin<R>::beyond(k, centre)) centre = maximum<V>(z, n);
  const bool excluded = centre == -R(INFINITY);
  if (excluded) centre = R(0);
  if constexpr (Origin<R>::kFused) {
    if (Origin<R>::beyond(k, centre)) return state_in_fp64<Sums>(z, n, k);
  }
  auto state = state_about<Sums>(z, n, k, centre);
  // Before the sums are asked for NaN, which may be what 2^t is beyond its range.
  if (k * (centre - state.shift) > R(kHeadroom)) {
    if constexpr (Origin<R>::kFused) {
      if (Origin<R>::beyond(k, centre)) return state_in_fp64<Sums>(z, n, k);
    }
    state = state_about<Sums>(z, n, k, centre);
  }
  if (!(centre < R(INFINITY)) || std::isnan(state.weighted)) {
    state.shift = state.sum = state.weighted = R(NAN);
    return state;
  }
  return excluded ? decltype(state)::empty() : state;
}

template <class T>
SoftmaxState<Real<T>> softmax_sums(const T* z, int64_t n, Real<T> k) {
  return state_of<SoftmaxSums>(z, n, k);
}

template <class T>
Moments<Real<T>> moments(const T* z, int64_t n, Real<T> k) {
  return state_of<MomentSums>(z, n, k);
}

template <class T>
void gradient(const T* z, T* grad, int64_t n, Real<T> k, Real<T> shift, Real<T> a, Real<T> b);

template <class T>
__attribute__((noinline)) void gradient_in_fp64(const T* z, T* grad, int64_t n, double k,
                                                double shift, double a, double b) {
  double wide[kChunk];
  widen(z, n, wide);
  gradient(wide, wide, n, k, shift, a, b);
  for (int64_t i = 0; i < n; ++i) grad[i] = static_cast<T>(float(wide[i]));
}

template <class T>
void gradient(const T* z, T* grad, int64_t n, Real<T> k, Real<T> shift, Real<T> a, Real<T> b) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  if constexpr (Origin<R>::kFused) {
    if (Origin<R>::beyond(k, shift)) return gradient_in_fp64(z, grad, n, k, shift, a, b);
  }
  const Origin<R> origin(k, shift);
  const V scale = broadcast<V>(k), place = broadcast<V>(origin.place);
  const V level = broadcast<V>(origin.factor * (a - b * origin.rest));
  const V slope = broadcast<V>(origin.factor * b);
  for_packs<V>(n, [&](auto tail, int64_t i, int64_t count) PPO_LAMBDA {
    V x[kPack], t[kPack], e[kPack];
    load<tail.value>(z + i, count, x);
    exponents(x, scale, place, t);
    exp2(t, e);
    for (int u = 0; u < kPack; ++u) x[u] = e[u] * fma(slope, t[u], level);
    store<tail.value>(grad + i, count, x);
  });
}

// e (t - q), and 0 where e is 0, whatever the reference says of that token.
template <class V>
PPO_INLINE V weighted_ratio(V e, V t, V q) {
  return e > 0 ? e * (t - q) : V{};
}

// The state relative to two centres, which become the true maxima; `defined` says whether all
// logits are numbers. A side whose exponents are all at kFloor has no centre, and 0 for one.
template <class T>
PPO_INLINE JointState<Real<T>> joint_sums_about(const T* z, const T* ref, int64_t n, Real<T> k,
                                                Real<T>& centre, Real<T>& ref_centre,
                                                bool& defined) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  const R shift = centre, ref_shift = ref_centre;
  const Origin<R> origin(k, shift), ref_origin(k, ref_shift);
  const V scale = broadcast<V>(k), place = broadcast<V>(origin.place);
  const V ref_place = broadcast<V>(ref_origin.place);
  V sum[kPack] = {}, ref_sum[kPack] = {}, cross[kPack] = {}, exponent_sum[kPack] = {};
  V largest[kPack], ref_largest[kPack];
  for (V& m : largest) m = broadcast<V>(centre);
  for (V& m : ref_largest) m = broadcast<V>(ref_centre);
  for_blocks(n, [&](int64_t begin, int64_t size) PPO_LAMBDA {
    V block_sum[kPack] = {}, block_ref_sum[kPack] = {}, block_cross[kPack] = {};
    for_packs<V>(size, [&](auto tail, int64_t i, int64_t count) PPO_LAMBDA {
      V x[kPack], y[kPack], t[kPack], e[kPack];
      load<tail.value>(z + begin + i, count, x);
      load<tail.value>(ref + begin + i, count, y);
      raise(largest, x);
      raise(ref_largest, y);
      exponents(x, scale, place, t);
      exp2(t, e);
      add(block_sum, e);
      add(exponent_sum, t);
      for (int u = 0; u < kPack; ++u) {
        block_cross[u] += weighted_ratio(e[u], t[u], exponent(y[u], scale, ref_place));
      }
      exponents(y, scale, ref_place, t);
      exp2(t, e);
      add(block_ref_sum, e);
      add(exponent_sum, t);
    });
    add(sum, block_sum);
    add(ref_sum, block_ref_sum);
    add(cross, block_cross);
  });
  centre = maximum(largest);
  ref_centre = maximum(ref_largest);
  defined = !std::isnan(total(exponent_sum)) && centre < R(INFINITY) && ref_centre < R(INFINITY);
  const R s = total(sum), apart = ref_origin.rest - origin.rest;
  return {shift, origin.factor * s, ref_shift, ref_origin.factor * total(ref_sum),
          origin.factor * (total(cross) + apart * s)};
}

template <class T>
JointState<Real<T>> joint_sums(const T* z, const T* ref, int64_t n, Real<T> k);

template <class T>
__attribute__((noinline)) JointState<float> joint_sums_in_fp64(const T* z, const T* ref, int64_t n,
                                                               double k) {
  double wide[kChunk], ref_wide[kChunk];
  widen(z, n, wide);
  widen(ref, n, ref_wide);
  return narrow(joint_sums(wide, ref_wide, n, k));
}

template <class T>
JointState<Real<T>> joint_sums(const T* z, const T* ref, int64_t n, Real<T> k) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  const auto centre_of = [&](const T* p, bool& excluded) {
    R centre = maximum<V>(p, std::min(n, kSample));
    if (!(centre > -R(INFINITY)) || Origin<R>::beyond(k, centre)) centre = maximum<V>(p, n);
    excluded = centre == -R(INFINITY);
    return excluded ? R(0) : centre;
  };
  bool excluded, ref_excluded, defined;
  R centre = centre_of(z, excluded), ref_centre = centre_of(ref, ref_excluded);
  const auto beyond = [&] {
    return Origin<R>::beyond(k, centre) || Origin<R>::beyond(k, ref_centre);
  };
  if constexpr (Origin<R>::kFused) {
    if (beyond()) return joint_sums_in_fp64(z, ref, n, k);
  }
  JointState<R> state = joint_sums_about(z, ref, n, k, centre, ref_centre, defined);
  if (!defined) return {R(NAN), R(NAN), R(NAN), R(NAN), R(NAN)};
  if (k * (centre - state.shift) > R(kHeadroom) ||
      k * (ref_centre - state.ref_shift) > R(kHeadroom)) {
    if constexpr (Origin<R>::kFused) {
      if (beyond()) return joint_sums_in_fp64(z, ref, n, k);
    }
    state = joint_sums_about(z, ref, n, k, centre, ref_centre, defined);
  }
  if (excluded) state.shift = -R(INFINITY);
  if (ref_excluded) state.ref_shift = -R(INFINITY);
  return state;
}

template <class T>
void kl_gradient(const T* z, const T* ref, T* grad, int64_t n, Real<T> k, Real<T> shift,
                 Real<T> ref_shift, Real<T> a, Real<T> b);

template <class T>
__attribute__((noinline)) void kl_gradient_in_fp64(const T* z, const T* ref, T* grad, int64_t n,
                                                   double k, double shift, double ref_shift,
                                                   double a, double b) {
  double wide[kChunk], ref_wide[kChunk];
  widen(z, n, wide);
  widen(ref, n, ref_wide);
  kl_gradient(wide, ref_wide, wide, n, k, shift, ref_shift, a, b);
  for (int64_t i = 0; i < n; ++i) grad[i] = static_cast<T>(float(wide[i]));
}

template <class T>
void kl_gradient(const T* z, const T* ref, T* grad, int64_t n, Real<T> k, Real<T> shift,
                 Real<T> ref_shift, Real<T> a, Real<T> b) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  if constexpr (Origin<R>::kFused) {
    if (Origin<R>::beyond(k, shift) || Origin<R>::beyond(k, ref_shift)) {
      return kl_gradient_in_fp64(z, ref, grad, n, k, shift, ref_shift, a, b);
    }
  }
  const Origin<R> origin(k, shift), ref_origin(k, ref_shift);
  const V scale = broadcast<V>(k), place = broadcast<V>(origin.place);
  const V ref_place = broadcast<V>(ref_origin.place);
  a = origin.factor * (a + b * (ref_origin.rest - origin.rest));
  b = origin.factor * b;
  for_packs<V>(n, [&](auto tail, int64_t i, int64_t count) PPO_LAMBDA {
    V x[kPack], y[kPack], t[kPack], e[kPack];
    load<tail.value>(z + i, count, x);
    load<tail.value>(ref + i, count, y);
    exponents(x, scale, place, t);
    exp2(t, e);
    for (int u = 0; u < kPack; ++u) {
      const V ratio = weighted_ratio(e[u], t[u], exponent(y[u], scale, ref_place));
      x[u] = fma(e[u], broadcast<V>(a), broadcast<V>(b) * ratio);
    }
    store<tail.value>(grad + i, count, x);
  });
}

#include "gae_sweep.h"
#include "sampling_sweeps.h"

template <class T>
constexpr Sweeps<T> sweeps_of() {
  return {softmax_sums<T>,
          moments<T>,
          gradient<T>,
          joint_sums<T>,
          kl_gradient<T>,
          block_weight<T>,
          kept_weight<T>,
          weights_below<false, T>,
          weights_below<true, T>,
          scores_and_weights<T>,
          gae<Real<T>>,
          discounted_sums<Real<T>>};
}

constexpr SweepTable sweep_table_of(const char* level) {
  return {sweeps_of<float>(), sweeps_of<double>(), sweeps_of<BFloat16>(), sweeps_of<Half>(), level};
}
