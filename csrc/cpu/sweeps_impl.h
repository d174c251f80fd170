// The sweeps of sweeps.h, written once. Included under a target and inside its namespace, after
// simd.h. Loops carry kUnroll independent accumulators to hide the latency of additions.

constexpr int kUnroll = 4;

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

// The last n < kLanes elements, padded with -inf, which no sweep counts.
template <class V, class T>
PPO_INLINE V load_tail(const T* p, int64_t n) {
  T padded[kLanes<V>];
  for (int i = 0; i < kLanes<V>; ++i) padded[i] = static_cast<T>(-INFINITY);
  memcpy(padded, p, n * sizeof(T));
  V v;
  load(padded, v);
  return v;
}

template <class V, class T>
PPO_INLINE void store_tail(T* p, V v, int64_t n) {
  T padded[kLanes<V>];
  store(padded, v);
  memcpy(p, padded, n * sizeof(T));
}

template <class V, class T>
PPO_INLINE auto maximum(const T* z, int64_t n) {
  constexpr int L = kLanes<V>;
  V largest[kUnroll];
  for (V& m : largest) m = broadcast<V>(-INFINITY);
  int64_t i = 0;
  for (; i + kUnroll * L <= n; i += kUnroll * L) {
    for (int u = 0; u < kUnroll; ++u) {
      V x;
      load(z + i + u * L, x);
      largest[u] = max(largest[u], x);
    }
  }
  for (; i < n; i += L) {
    V x;
    if (i + L <= n) {
      load(z + i, x);
    } else {
      x = load_tail<V>(z + i, n - i);
    }
    largest[0] = max(largest[0], x);
  }
  for (int u = 1; u < kUnroll; ++u) largest[0] = max(largest[0], largest[u]);
  return horizontal_max(largest[0]);
}

// The exponent of an excluded token, finite so that 2^t t is 0 and not 0 * inf.
constexpr float kFloor = -2048.0f;

template <class T>
SoftmaxState<Real<T>> statistics(const T* z, int64_t n, Real<T> k) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  constexpr int L = kLanes<V>;
  const R largest = maximum<V>(z, n);
  if (largest == -R(INFINITY)) return SoftmaxState<R>::empty();
  const R shift = k * largest;
  const V scale = broadcast<V>(k), offset = broadcast<V>(-shift), floor = broadcast<V>(kFloor);
  V sum[kUnroll] = {}, weighted[kUnroll] = {};
  const auto add = [&](int u, V x) __attribute__((always_inline)) {
    const V t = max(floor, fma(x, scale, offset));
    const V e = exp2(t);
    sum[u] += e;
    weighted[u] = fma(e, t, weighted[u]);
  };
  int64_t i = 0;
  for (; i + kUnroll * L <= n; i += kUnroll * L) {
    for (int u = 0; u < kUnroll; ++u) {
      V x;
      load(z + i + u * L, x);
      add(u, x);
    }
  }
  for (; i + L <= n; i += L) {
    V x;
    load(z + i, x);
    add(0, x);
  }
  if (i < n) add(0, load_tail<V>(z + i, n - i));
  return {shift, horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])),
          horizontal_sum((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]))};
}

template <class T>
void gradient(const T* z, T* grad, int64_t n, Real<T> k, Real<T> shift, Real<T> a, Real<T> b) {
  using V = typename VectorOf<T>::type;
  constexpr int L = kLanes<V>;
  const V scale = broadcast<V>(k), offset = broadcast<V>(-shift), floor = broadcast<V>(kFloor);
  const V constant = broadcast<V>(a), slope = broadcast<V>(b);
  const auto at = [&](V x) __attribute__((always_inline)) {
    const V t = max(floor, fma(x, scale, offset));
    return exp2(t) * fma(slope, t, constant);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    V x;
    load(z + i, x);
    store(grad + i, at(x));
  }
  if (i < n) store_tail(grad + i, at(load_tail<V>(z + i, n - i)), n - i);
}

// e (t - q), and 0 where e is 0, whatever the reference says of that token.
template <class V>
PPO_INLINE V weighted_ratio(V e, V t, V q) {
  return e > 0 ? e * (t - q) : V{};
}

template <class T>
JointState<Real<T>> joint_statistics(const T* z, const T* ref, int64_t n, Real<T> k) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  constexpr int L = kLanes<V>;
  const R largest = maximum<V>(z, n), ref_largest = maximum<V>(ref, n);
  const R shift = k * largest, ref_shift = k * ref_largest;
  const bool excluded = largest == -R(INFINITY), ref_excluded = ref_largest == -R(INFINITY);
  const V scale = broadcast<V>(k), floor = broadcast<V>(kFloor);
  const V offset = broadcast<V>(excluded ? R(0) : -shift);
  const V ref_offset = broadcast<V>(ref_excluded ? R(0) : -ref_shift);
  V sum[2] = {}, ref_sum[2] = {}, cross[2] = {};
  const auto add = [&](int u, V x, V y) __attribute__((always_inline)) {
    const V t = max(floor, fma(x, scale, offset));
    const V q = fma(y, scale, ref_offset);
    const V e = exp2(t);
    sum[u] += e;
    ref_sum[u] += exp2(max(floor, q));
    cross[u] += weighted_ratio(e, t, q);
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    for (int u = 0; u < 2; ++u) {
      V x, y;
      load(z + i + u * L, x);
      load(ref + i + u * L, y);
      add(u, x, y);
    }
  }
  for (; i < n; i += L) {
    const int64_t m = n - i < L ? n - i : L;
    add(0, load_tail<V>(z + i, m), load_tail<V>(ref + i, m));
  }
  return {shift, horizontal_sum(sum[0] + sum[1]), ref_shift,
          horizontal_sum(ref_sum[0] + ref_sum[1]), horizontal_sum(cross[0] + cross[1])};
}

template <class T>
void kl_gradient(const T* z, const T* ref, T* grad, int64_t n, Real<T> k, Real<T> shift,
                 Real<T> ref_shift, Real<T> a, Real<T> b) {
  using V = typename VectorOf<T>::type;
  constexpr int L = kLanes<V>;
  const V scale = broadcast<V>(k), offset = broadcast<V>(-shift);
  const V ref_offset = broadcast<V>(-ref_shift), floor = broadcast<V>(kFloor);
  const V constant = broadcast<V>(a), slope = broadcast<V>(b);
  const auto at = [&](V x, V y) __attribute__((always_inline)) {
    const V t = max(floor, fma(x, scale, offset));
    const V e = exp2(t);
    return fma(e, constant, slope * weighted_ratio(e, t, fma(y, scale, ref_offset)));
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    V x, y;
    load(z + i, x);
    load(ref + i, y);
    store(grad + i, at(x, y));
  }
  if (i < n) {
    const int64_t m = n - i;
    store_tail(grad + i, at(load_tail<V>(z + i, m), load_tail<V>(ref + i, m)), m);
  }
}

template <class T>
constexpr Sweeps<T> sweeps_of() {
  return {statistics<T>, gradient<T>, joint_statistics<T>, kl_gradient<T>};
}
