// Vectors of float and double for the instruction set that the including file chose by defining
// PPO_AVX512 (with or without PPO_AVX512_BF16), PPO_AVX2 or nothing. Included inside a namespace of
// that set and under its target.

#define PPO_INLINE inline __attribute__((always_inline))

#if defined(PPO_AVX512)
constexpr int kBytes = 64;
#elif defined(PPO_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef uint64_t LongWords __attribute__((vector_size(kBytes)));

template <class T>
struct VectorOf {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);

// Vectors worked on side by side, a stage of arithmetic at a time: one alone would wait for each of
// its own results.
#if defined(PPO_AVX512)
constexpr int kPack = 4;
#else
constexpr int kPack = 2;
#endif

template <class V, class T>
PPO_INLINE V broadcast(T x) {
  return static_cast<std::remove_reference_t<decltype(V{}[0])>>(x) - V{};  // exact for -0, too
}

#if defined(PPO_AVX512)

PPO_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
PPO_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

#elif defined(PPO_AVX2)

PPO_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
PPO_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

#else

template <class V>
PPO_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

#endif

// The fma that gives exponents, rounded once on every processor: products far larger than the sum
// cancel here.
template <class V>
PPO_INLINE V exact_fma(V a, V b, V c) {
#if defined(PPO_AVX2) || defined(PPO_AVX512)
  return fma(a, b, c);
#else
  for (int i = 0; i < kLanes<V>; ++i) {
    if constexpr (sizeof(a[0]) == sizeof(float)) {
      c[i] = static_cast<float>(double(a[i]) * double(b[i]) + double(c[i]));
    } else {
      c[i] = std::fma(a[i], b[i], c[i]);
    }
  }
  return c;
#endif
}

// max that keeps a NaN of `x`.
PPO_INLINE Floats max(Floats bound, Floats x) {
#if defined(PPO_AVX512)
  return (Floats)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(PPO_AVX2)
  return (Floats)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return bound > x ? bound : x;
#endif
}
PPO_INLINE Doubles max(Doubles bound, Doubles x) { return bound > x ? bound : x; }

// Packs of N vectors in memory. Half types are widened to fp32 and rounded back to nearest even.
// Lanes of a bf16 pack stand in an order of their own, the same for load and store.

template <int N, class V, class T>
PPO_INLINE void load(const T* p, V (&x)[N]) {
  constexpr int L = kLanes<V>;
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == sizeof(V{}[0])) {
      memcpy(&x[i], p + i * L, sizeof(V));
    } else {
      for (int lane = 0; lane < L; ++lane) x[i][lane] = static_cast<float>(p[i * L + lane]);
    }
  }
}

template <int N, class V, class T>
PPO_INLINE void store(T* p, const V (&x)[N]) {
  constexpr int L = kLanes<V>;
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == sizeof(V{}[0])) {
      memcpy(p + i * L, &x[i], sizeof(V));
    } else {
      for (int lane = 0; lane < L; ++lane) p[i * L + lane] = static_cast<T>(float(x[i][lane]));
    }
  }
}

// A pair of vectors holds the even and the odd elements: widening is a shift and a mask.
template <int N>
PPO_INLINE void load(const BFloat16* p, Floats (&x)[N]) {
  for (int i = 0; i < N; i += 2) {
    Words pairs;
    memcpy(&pairs, p + i * kLanes<Floats>, sizeof(pairs));
    x[i] = (Floats)(pairs << 16);
    x[i + 1] = (Floats)(pairs & 0xffff0000u);
  }
}

#if defined(PPO_AVX512_BF16)

template <int N>
PPO_INLINE void store(BFloat16* p, const Floats (&x)[N]) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kInterleave);
  for (int i = 0; i < N; i += 2) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[i + 1], (__m512)x[i]);
    const __m512i pairs = _mm512_permutexvar_epi16(order, halves);
    memcpy(p + i * kLanes<Floats>, &pairs, sizeof(pairs));
  }
}

#else

// Nearest even, in the upper half. A NaN computed from bf16 has no low bits to carry into its sign.
PPO_INLINE Words rounded_up(Floats x) {
  const Words bits = (Words)x;
  return bits + ((bits >> 16 & 1u) + 0x7fffu);
}

template <int N>
PPO_INLINE void store(BFloat16* p, const Floats (&x)[N]) {
  for (int i = 0; i < N; i += 2) {
    const Words pairs = (rounded_up(x[i]) >> 16) | (rounded_up(x[i + 1]) & 0xffff0000u);
    memcpy(p + i * kLanes<Floats>, &pairs, sizeof(pairs));
  }
}

#endif

#if defined(PPO_AVX512)

template <int N>
PPO_INLINE void load(const Half* p, Floats (&x)[N]) {
  for (int i = 0; i < N; ++i) {
    x[i] = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i * 16)));
  }
}
template <int N>
PPO_INLINE void store(Half* p, const Floats (&x)[N]) {
  for (int i = 0; i < N; ++i) {
    _mm256_storeu_si256((__m256i*)(p + i * 16),
                        _mm512_cvtps_ph((__m512)x[i], _MM_FROUND_TO_NEAREST_INT));
  }
}

#elif defined(PPO_AVX2)

template <int N>
PPO_INLINE void load(const Half* p, Floats (&x)[N]) {
  for (int i = 0; i < N; ++i) {
    x[i] = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i * 8)));
  }
}
template <int N>
PPO_INLINE void store(Half* p, const Floats (&x)[N]) {
  for (int i = 0; i < N; ++i) {
    _mm_storeu_si128((__m128i*)(p + i * 8),
                     _mm256_cvtps_ph((__m256)x[i], _MM_FROUND_TO_NEAREST_INT));
  }
}

#endif

// The least exponent; 2^t is exactly 0 there, and a token excluded by a logit of -inf is put there.
template <class V>
constexpr float kFloor = -127.0f;
template <>
constexpr float kFloor<Doubles> = -1023.0f;

// 2^t for kFloor <= t <= kHeadroom, exact at integers. Adding 1.5 * 2^(bits of the mantissa) rounds
// t to an integer n in the low bits; a polynomial gives 2^f of the rest, |f| <= 1/2, and n is added
// to its exponent. For a NaN the result is arbitrary.
template <class Bits, int N, class V, class S, int K>
PPO_INLINE void exp2(const V (&t)[N], V (&result)[N], S round, int mantissa, S leading,
                     const S (&coefficients)[K]) {
  V rounded[N], f[N], p[N];
  for (int i = 0; i < N; ++i) rounded[i] = t[i] + round;
  for (int i = 0; i < N; ++i) f[i] = t[i] - (rounded[i] - round);
  for (int i = 0; i < N; ++i) p[i] = broadcast<V>(leading);
  for (const S c : coefficients) {
    for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], broadcast<V>(c));
  }
  for (int i = 0; i < N; ++i) {
    result[i] = (V)((Bits)p[i] + ((Bits)rounded[i] << mantissa));
  }
}

// The Taylor series, to 2e-16.
template <int N>
PPO_INLINE void exp2(const Doubles (&t)[N], Doubles (&result)[N]) {
  constexpr double kCoefficients[] = {2.5678435993488196e-11,
                                      4.4455382718708101e-10,
                                      7.0549116208011209e-09,
                                      1.0178086009239696e-07,
                                      1.3215486790144305e-06,
                                      1.5252733804059838e-05,
                                      0.00015403530393381606,
                                      0.0013333558146428441,
                                      0.0096181291076284769,
                                      0.055504108664821576,
                                      0.24022650695910069,
                                      0.69314718055994529,
                                      1.0};
  exp2<LongWords>(t, result, 6755399441055744.0, 52, 1.3691488853904124e-12, kCoefficients);
}

#if defined(PPO_AVX512)

// To 1.5 ulp above the subnormals. Rounds to multiples of 1/32: the low five bits choose 2^(j / 32)
// from a table, less j << 18, which the shift of the whole integer into the exponent puts back; the
// rest, |f| <= 1/64, takes two terms of a minimax series.
template <int N>
PPO_INLINE void exp2(const Floats (&t)[N], Floats (&result)[N]) {
  alignas(64) static constexpr uint32_t kTable[32] = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3,
      0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b,
      0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a,
      0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
      0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  const __m512i low = _mm512_load_si512(kTable), high = _mm512_load_si512(kTable + 16);
  constexpr float kRound = 12582912.0f / 32;
  Floats rounded[N], f[N], power[N];
  for (int i = 0; i < N; ++i) rounded[i] = t[i] + kRound;
  for (int i = 0; i < N; ++i) f[i] = t[i] - (rounded[i] - kRound);
  for (int i = 0; i < N; ++i) {
    const Words entry = (Words)_mm512_permutex2var_epi32(low, (__m512i)rounded[i], high);
    power[i] = (Floats)(entry + ((Words)rounded[i] << 18));
  }
  for (int i = 0; i < N; ++i) {
    const Floats series =
        fma(broadcast<Floats>(2.40228742e-1f), f[i], broadcast<Floats>(6.93157315e-1f));
    result[i] = fma(power[i], f[i] * series, power[i]);
  }
}

#else

// A minimax polynomial, to 1.5 ulp above the subnormals.
template <int N>
PPO_INLINE void exp2(const Floats (&t)[N], Floats (&result)[N]) {
  constexpr float kCoefficients[] = {9.67151299e-3f, 5.55073358e-2f, 2.4022242e-1f, 6.93146989e-1f,
                                     1.0f};
  exp2<Words>(t, result, 12582912.0f, 23, 1.32647273e-3f, kCoefficients);
}

#endif
