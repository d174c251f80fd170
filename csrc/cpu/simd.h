// Vectors of float and double for the instruction set that the including file chose by defining
// PPO_AVX512, PPO_AVX2 or neither. Included inside a namespace of that set and under its target.
// Loads widen half types to fp32; stores round to nearest even.

#define PPO_INLINE inline __attribute__((always_inline))

#if defined(PPO_AVX512)
constexpr int kBytes = 64;
#elif defined(PPO_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));

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

template <class V, class T>
PPO_INLINE V broadcast(T x) {
  return V{} + static_cast<std::remove_reference_t<decltype(V{}[0])>>(x);
}

PPO_INLINE void load(const float* p, Floats& v) { memcpy(&v, p, sizeof(v)); }
PPO_INLINE void load(const double* p, Doubles& v) { memcpy(&v, p, sizeof(v)); }
PPO_INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof(v)); }
PPO_INLINE void store(double* p, Doubles v) { memcpy(p, &v, sizeof(v)); }

#if defined(PPO_AVX512)

PPO_INLINE void load(const BFloat16* p, Floats& v) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  v = (Floats)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
PPO_INLINE void load(const Half* p, Floats& v) {
  v = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
PPO_INLINE void store(BFloat16* p, Floats v) {
  const __m512i bits = _mm512_castps_si512((__m512)v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded = _mm512_mask_set1_epi32(rounded, nan, 0x7fc00000);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
PPO_INLINE void store(Half* p, Floats v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
PPO_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
PPO_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

#elif defined(PPO_AVX2)

PPO_INLINE void load(const BFloat16* p, Floats& v) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  v = (Floats)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
PPO_INLINE void load(const Half* p, Floats& v) {
  v = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
PPO_INLINE void store(BFloat16* p, Floats v) {
  const __m256i bits = _mm256_castps_si256((__m256)v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(high),
                                                 _mm256_extracti128_si256(high, 1)));
}
PPO_INLINE void store(Half* p, Floats v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
PPO_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
PPO_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

#else

template <class H>
PPO_INLINE void load(const H* p, Floats& v) {
  for (int i = 0; i < kLanes<Floats>; ++i) v[i] = static_cast<float>(p[i]);
}
template <class H>
PPO_INLINE void store(H* p, Floats v) {
  for (int i = 0; i < kLanes<Floats>; ++i) p[i] = static_cast<H>(float(v[i]));
}
template <class V>
PPO_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

#endif

// max that keeps a NaN of `x`.
template <class V>
PPO_INLINE V max(V bound, V x) {
  return bound > x ? bound : x;
}

// 2^t for t <= 0 (and a little above), to 1.5 ulp; 0 below -126 or in the subnormals, as the
// probability of such a token is; NaN stays NaN. Minimax polynomial for 2^f, f in [0, 1].
PPO_INLINE Floats exp2(Floats t) {
#if defined(PPO_AVX512)
  const Floats f = (Floats)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats bounded = max(broadcast<Floats>(-127.0f), t);
  const Floats shifted = (bounded - 0.5f) + kRound;
  const Floats f = bounded - (shifted - kRound);
#endif
  Floats p = broadcast<Floats>(1.86713e-3f);
  p = fma(p, f, broadcast<Floats>(9.017031e-3f));
  p = fma(p, f, broadcast<Floats>(5.5799913e-2f));
  p = fma(p, f, broadcast<Floats>(2.4016444e-1f));
  p = fma(p, f, broadcast<Floats>(6.931513e-1f));
  p = fma(p, f, broadcast<Floats>(1.0f));
#if defined(PPO_AVX512)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)t);
#else
  const Ints scale = ((Ints)shifted << 23) + (127 << 23);
  const Floats value = p * (Floats)scale;
  return t < -126.0f ? broadcast<Floats>(0.0f) : value;
#endif
}

PPO_INLINE Doubles exp2(Doubles t) {
  Doubles result;
  for (int i = 0; i < kLanes<Doubles>; ++i) result[i] = std::exp2(t[i]);
  return result;
}
