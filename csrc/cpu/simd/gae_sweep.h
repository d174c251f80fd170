// The scan of gae, once per instruction set: included after simd.h, under its target and inside its
// namespace. GAEMap and the steps are those of ppo_math.h.

// The vector moved down by kStep lanes, those of `filling` moving in.
template <int kStep, class V, int... kLane>
PPO_INLINE V shifted_down(V x, V filling, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, filling, (kLane + kStep)...);
}

template <int kStep, class V>
PPO_INLINE V shifted_down(V x, V filling) {
  return shifted_down<kStep>(x, filling, std::make_integer_sequence<int, kLanes<V>>());
}

// Vectors of maps, a token's in each lane; without kDones none is past a done.
template <bool kDones, class V>
struct Maps {
  V g, c;
};

template <bool kDones, class V>
PPO_INLINE V apply(const Maps<kDones, V>& maps, V G) {
  const V mapped = fma(maps.c, G, maps.g);
  if constexpr (kDones) return maps.c != maps.c ? maps.g : mapped;
  return mapped;
}

// Scan by doubling: a lane's map becomes that of its token and all later ones of the vector.
template <int kStep = 1, bool kDones, class V>
PPO_INLINE void compose(Maps<kDones, V>& maps) {
  if constexpr (kStep < kLanes<V>) {
    maps.g = apply(maps, shifted_down<kStep>(maps.g, V{}));
    maps.c *= shifted_down<kStep>(maps.c, broadcast<V>(1));
    compose<2 * kStep>(maps);
  }
}

// Whether each of a vector's tokens is marked, -1 or 0.
template <class V>
PPO_INLINE auto marks(const bool* p) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes<V>)));
  Bytes marked;
  memcpy(&marked, p, sizeof(marked));
  return __builtin_convertvector(-marked, decltype(V{} == V{}));
}

// With kMarked some tokens are done or do not count, with kSums they are of `discounted_sums`.
// Whole vectors start at the row's first token.
template <bool kMarked, bool kSums, class R>
void gae_row(const GAEScan<R>& scan, int64_t begin, int64_t n, R G) {
  using V = typename VectorOf<R>::type;
  constexpr int L = kLanes<V>;
  const R *rewards = scan.rewards + begin, *values = scan.values + begin;
  const bool* mask = scan.mask ? scan.mask + begin : nullptr;
  const bool* dones = scan.dones ? scan.dones + begin : nullptr;
  R *advantages = scan.advantages + begin, *returns = kSums ? nullptr : scan.returns + begin;
  int64_t t = n;
  while (t % L != 0) {
    --t;
    const bool counted = !mask || mask[t], done = dones && dones[t];
    if constexpr (kSums) {
      advantages[t] = sum_step(rewards[t], values[t], counted, done, G);
    } else {
      advantages[t] = gae_step(rewards[t], values[t], counted, done, scan.gamma, scan.gamma_lam, G);
      returns[t] = counted ? advantages[t] + values[t] : R(0);
    }
  }
  const V gamma = broadcast<V>(scan.gamma), gamma_lam = broadcast<V>(scan.gamma_lam);
  V later = broadcast<V>(G);
  while (t > 0) {
    t -= L;
    V reward, value;
    memcpy(&reward, rewards + t, sizeof(V));
    memcpy(&value, values + t, sizeof(V));
    const V delta = reward - value;
    Maps<kMarked, V> maps{fma(gamma_lam, delta, gamma * value), gamma_lam};
    if constexpr (kSums) maps = {reward, value};
    decltype(V{} == V{}) done{}, skipped{};
    if constexpr (kMarked) {
      if (dones) done = marks<V>(dones + t);
      if (mask) skipped = ~marks<V>(mask + t);
      maps.g = skipped ? V{} : maps.g;
      maps.c = done ? broadcast<V>(NAN) : skipped ? broadcast<V>(1) : maps.c;
    }
    compose(maps);
    const V handed = apply(maps, later);
    V following = shifted_down<1>(handed, later);
    if constexpr (kMarked) following = done ? V{} : following;
    V advantage = kSums ? handed : delta + following, result = advantage + value;
    if constexpr (kMarked) {
      advantage = skipped ? V{} : advantage;
      result = skipped ? V{} : result;
    }
    memcpy(advantages + t, &advantage, sizeof(V));
    if constexpr (!kSums) memcpy(returns + t, &result, sizeof(V));
    later = broadcast<V>(handed[0]);
  }
}

template <class R>
void gae(const GAEScan<R>& scan, int64_t begin, int64_t n, R G) {
  if (scan.mask || scan.dones) {
    gae_row<true, false>(scan, begin, n, G);
  } else {
    gae_row<false, false>(scan, begin, n, G);
  }
}

template <class R>
void discounted_sums(const GAEScan<R>& scan, int64_t begin, int64_t n) {
  if (scan.mask || scan.dones) {
    gae_row<true, true>(scan, begin, n, R(0));
  } else {
    gae_row<false, true>(scan, begin, n, R(0));
  }
}
