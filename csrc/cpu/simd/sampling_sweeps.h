// What sample_tokens sums up, of blocks of at most kDrawBlock elements; see sweeps.h. Included
// after sweeps_impl.h.

// t = max(kFloor, k (x - largest)).
template <int N, class V>
PPO_INLINE void exponents_below(const V (&x)[N], V k, V largest, V (&t)[N]) {
  for (int u = 0; u < N; ++u) t[u] = max(broadcast<V>(kFloor<V>), k * (x[u] - largest));
}

// A pack's sum, exact: beside a likely token in one lane unlikely ones in others add up.
template <int N, class V>
PPO_INLINE double exact_total(const V (&x)[N]) {
  double sum = 0;
  for (const V& v : x) {
    for (int lane = 0; lane < kLanes<V>; ++lane) sum += double(v[lane]);
  }
  return sum;
}

// In one pass relative to the largest logit seen before; only if one proves larger by kHeadroom (in
// base 2) in another, relative to that.
template <class T>
BlockWeight<Real<T>> block_weight(const T* z, int64_t n, Real<T> k, Real<T> seen) {
  using R = Real<T>;
  using V = typename VectorOf<T>::type;
  BlockWeight<R> block{-R(INFINITY), seen > -R(INFINITY) ? seen : maximum<V>(z, n), 0};
  for (bool again = true; again;) {
    // Nothing is to be subtracted from -inf.
    if (block.centre == -R(INFINITY)) block.centre = R(0);
    V sum[kPack] = {}, exponent_sum[kPack] = {}, largest[kPack];
    for (V& m : largest) m = broadcast<V>(-INFINITY);
    for_packs<V>(n, [&](auto tail, int64_t i, int64_t count) PPO_LAMBDA {
      V x[kPack], t[kPack], e[kPack];
      load<tail.value>(z + i, count, x);
      raise(largest, x);
      exponents_below(x, broadcast<V>(k), broadcast<V>(block.centre), t);
      exp2(t, e);
      add(sum, e);
      add(exponent_sum, t);
    });
    block.largest = maximum(largest);
    again = k * (block.largest - block.centre) > R(kHeadroom) && block.centre < R(INFINITY);
    if (again) {
      block.centre = block.largest;
    } else {
      block.sum = exact_total(sum);
      if (std::isnan(total(exponent_sum)) && block.largest < R(INFINITY)) block.largest = R(NAN);
    }
  }
  return block;
}

// Calls f with packs of scores and of their weights, -inf and 0 beyond the end.
template <class T, class F>
PPO_INLINE void for_scores(const T* z, int64_t n, const Scale<Real<T>>& scale, Real<T> largest,
                           const F& f) {
  using V = typename VectorOf<T>::type;
  for_packs<V>(n, [&](auto tail, int64_t i, int64_t count) PPO_LAMBDA {
    V s[kPack], t[kPack], e[kPack];
    load<tail.value>(z + i, count, s);
    for (int u = 0; u < kPack; ++u) s[u] = s[u] / broadcast<V>(scale.temperature);
    exponents_below(s, broadcast<V>(scale.k), broadcast<V>(largest), t);
    exp2(t, e);
    f(s, t, e);
  });
}

template <class T>
KeptWeight kept_weight(const T* z, int64_t n, const Scale<Real<T>>& scale, Real<T> largest,
                       const Kept<Real<T>>& kept) {
  using V = typename VectorOf<T>::type;
  const V cut = broadcast<V>(kept.cut), least = broadcast<V>(kept.least), one = broadcast<V>(1);
  V above[kPack] = {}, ties[kPack] = {};
  for_scores(z, n, scale, largest, [&](const auto& s, const auto& t, const auto& e) PPO_LAMBDA {
    for (int u = 0; u < kPack; ++u) {
      above[u] += s[u] > cut ? (t[u] >= least ? e[u] : V{}) : V{};
      ties[u] += s[u] == cut ? one : V{};
    }
  });
  return {exact_total(above), int64_t(total(ties))};
}

template <bool kCount, class T>
void weights_below(const T* z, int64_t n, const Scale<Real<T>>& scale, Real<T> largest, Real<T> low,
                   const Real<T>* pivots, double* sums) {
  using V = typename VectorOf<T>::type;
  const V none = broadcast<V>(-INFINITY), one = broadcast<V>(1), least = broadcast<V>(low);
  V below[kPivots + 1][1] = {};
  for_scores(z, n, scale, largest, [&](const auto& s, const auto&, const auto& e) PPO_LAMBDA {
    for (int u = 0; u < kPack; ++u) {
      V weight = kCount ? (s[u] > none ? one : V{}) : e[u];
      weight = s[u] >= least ? weight : V{};
      for (int i = 0; i < kPivots; ++i) {
        below[i][0] += s[u] < broadcast<V>(pivots[i]) ? weight : V{};
      }
      below[kPivots][0] += weight;
    }
  });
  for (int i = 0; i <= kPivots; ++i) sums[i] += exact_total(below[i]);
}

template <class T>
void scores_and_weights(const T* z, int64_t n, const Scale<Real<T>>& scale, Real<T> largest,
                        Real<T>* scores, Real<T>* weights) {
  using R = Real<T>;
  R widened[kDrawBlock];
  // In order, in which packs of bf16 are not.
  for (int64_t i = 0; i < n; ++i) widened[i] = static_cast<R>(z[i]);
  using V = typename VectorOf<R>::type;
  int64_t at = 0;
  for_scores(widened, n, scale, largest, [&](const auto& s, const auto&, const auto& e) PPO_LAMBDA {
    const int64_t count = std::min<int64_t>(kPack * kLanes<V>, n - at);
    store<true>(scores + at, count, s);
    store<true>(weights + at, count, e);
    at += count;
  });
}
