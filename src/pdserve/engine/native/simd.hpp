// Vectors of the level that this translation unit is compiled for: `kWidth` fp32 lanes.
//
// Only for sources in PER_LEVEL. Everything lies in the level's own namespace, so that the linker
// never takes one level's instance of an inline function for another's. No templates of the standard
// library here, for the same reason.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(PDSERVE_IS_avx2) || defined(PDSERVE_IS_avx512) || defined(PDSERVE_IS_avx512bf16)
#include <immintrin.h>
#elif defined(PDSERVE_IS_neon)
#include <arm_neon.h>
#endif

#define PDSERVE_INLINE inline __attribute__((always_inline))

namespace pdserve::PDSERVE_LEVEL {

using bf16 = uint16_t;

PDSERVE_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// To the nearest, ties to even; a NaN stays one.
PDSERVE_INLINE bf16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(PDSERVE_IS_avx512) || defined(PDSERVE_IS_avx512bf16)

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kColumnVecs = 4;  // of a product's register tile
constexpr int kTileRows = 6;

PDSERVE_INLINE Vec zero() { return _mm512_setzero_ps(); }
PDSERVE_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
PDSERVE_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
PDSERVE_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
PDSERVE_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
PDSERVE_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
PDSERVE_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
PDSERVE_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
PDSERVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
PDSERVE_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PDSERVE_INLINE float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
PDSERVE_INLINE Vec round_even(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2^n for whole n of at least -127, where the result is 0.
PDSERVE_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_mul_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23)));
}
PDSERVE_INLINE Vec widen(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PDSERVE_INLINE void narrow(bf16* p, Vec x) {
#if defined(PDSERVE_IS_avx512bf16)
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i wide = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
  __m512i top = _mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  top = _mm512_mask_or_epi32(top, nan, wide, _mm512_set1_epi32(0x400000));
  const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(top, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

// A square of kWidth by kWidth numbers, rows to columns.
PDSERVE_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

#elif defined(PDSERVE_IS_avx2)

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kColumnVecs = 2;
constexpr int kTileRows = 6;

PDSERVE_INLINE Vec zero() { return _mm256_setzero_ps(); }
PDSERVE_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
PDSERVE_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
PDSERVE_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
PDSERVE_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
PDSERVE_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
PDSERVE_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
PDSERVE_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
PDSERVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PDSERVE_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PDSERVE_INLINE float reduce_max(Vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
PDSERVE_INLINE Vec round_even(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PDSERVE_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
PDSERVE_INLINE Vec widen(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PDSERVE_INLINE void narrow(bf16* p, Vec x) {
  const __m256i wide = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(wide, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(wide, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256 top = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan);
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(top), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
PDSERVE_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m256 a = r[i], b = r[4 + i];
    r[i] = _mm256_permute2f128_ps(a, b, 0x20);
    r[4 + i] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}

#else

// The compiler's own vectors: SSE2 or NEON where there is one, scalars where not.
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kWidth = 4;

PDSERVE_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
PDSERVE_INLINE Vec zero() { return splat(0.0f); }
PDSERVE_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PDSERVE_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
PDSERVE_INLINE Vec add(Vec a, Vec b) { return a + b; }
PDSERVE_INLINE Vec sub(Vec a, Vec b) { return a - b; }
PDSERVE_INLINE Vec mul(Vec a, Vec b) { return a * b; }
PDSERVE_INLINE Vec div(Vec a, Vec b) { return a / b; }
PDSERVE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
PDSERVE_INLINE float reduce_max(Vec x) {
  const float low = x[0] > x[1] ? x[0] : x[1], high = x[2] > x[3] ? x[2] : x[3];
  return low > high ? low : high;
}
// Adding 1.5 * 2^23 leaves no bits for a fraction; for |x| below 2^22.
PDSERVE_INLINE Vec round_even(Vec x) {
  const Vec magic = splat(12582912.0f);
  return (x + magic) - magic;
}
PDSERVE_INLINE Vec scale_by_power(Vec x, Vec n) {
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return x * (Vec)power;
}
PDSERVE_INLINE Vec widen(const bf16* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
PDSERVE_INLINE void narrow(bf16* p, Vec x) {
  for (int i = 0; i < 4; ++i) p[i] = narrow(static_cast<float>(x[i]));
}
PDSERVE_INLINE void transpose(Vec (&r)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = i + 1; j < 4; ++j) {
      const float a = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = a;
    }
  }
}

#if defined(PDSERVE_IS_neon)
constexpr int kColumnVecs = 4;
constexpr int kTileRows = 6;
PDSERVE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
constexpr int kColumnVecs = 2;
constexpr int kTileRows = 4;
PDSERVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

#endif

// Lanes added in pairs, always the same ones.
PDSERVE_INLINE float reduce_add(Vec x) {
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// 2^x: exactly 1 at 0 and exactly 0 below -126.5, minus infinity included; elsewhere within 2e-7 of
// the value, relatively. The polynomial was fitted to 2^f on [-0.5, 0.5] with its constant fixed.
PDSERVE_INLINE Vec exp2(Vec x) {
  x = max(splat(-127.0f), x);  // the second one, if one is not a number
  const Vec n = round_even(x);
  const Vec f = sub(x, n);
  Vec y = splat(0.001326472731307149f);
  y = fma(y, f, splat(0.009671512991189957f));
  y = fma(y, f, splat(0.05550733581185341f));
  y = fma(y, f, splat(0.24022242426872253f));
  y = fma(y, f, splat(0.6931470036506653f));
  y = fma(y, f, splat(1.0f));
  return scale_by_power(y, n);
}

}  // namespace pdserve::PDSERVE_LEVEL
