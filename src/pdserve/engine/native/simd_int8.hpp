// Integer lanes beside `simd.hpp`: kWidth int32, each of which may be four bytes of a dot product.
// Sums are exact, so their order does not matter, and they are the same at every level.
#pragma once

#include "simd.hpp"

namespace pdserve::PDSERVE_LEVEL {

#if defined(PDSERVE_IS_avx512) || defined(PDSERVE_IS_avx512bf16)

// Not __m512i, whose lanes are of 64 bits: GCC then keeps sums in memory.
typedef int32_t Ints __attribute__((vector_size(64)));

PDSERVE_INLINE Ints splat_int(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
PDSERVE_INLINE Ints load_ints(const void* p) { return (Ints)_mm512_loadu_si512(p); }
PDSERVE_INLINE Ints flip_signs(Ints x) { return x ^ static_cast<int32_t>(0x80808080u); }
// sum + the dot product of four unsigned bytes with four signed ones.
PDSERVE_INLINE Ints dot4(Ints sum, Ints u, Ints s) {
#if defined(PDSERVE_IS_avx512bf16)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#else
  const __m512i a = (__m512i)u, b = (__m512i)s;
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
  return sum + (Ints)even + (Ints)odd;
#endif
}
PDSERVE_INLINE Ints add(Ints a, Ints b) { return a + b; }
// high * 256 + low
PDSERVE_INLINE Ints join(Ints high, Ints low) { return (high << 8) + low; }
// The byte above the lowest comes to be the lowest.
PDSERVE_INLINE Ints high_byte(Ints x) { return x >> 8; }
PDSERVE_INLINE Vec to_floats(Ints x) { return _mm512_cvtepi32_ps((__m512i)x); }
PDSERVE_INLINE Ints to_ints(Vec x) { return (Ints)_mm512_cvtps_epi32(x); }
PDSERVE_INLINE void store_bytes(void* p, Ints x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
}
PDSERVE_INLINE Vec magnitude(Vec x) { return _mm512_abs_ps(x); }
// The first `count` lanes, the others zero, whatever they were.
PDSERVE_INLINE Vec keep_first(Vec x, int count) {
  const int kept = count < 0 ? 0 : count > 16 ? 16 : count;
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << kept) - 1u), x);
}

#elif defined(PDSERVE_IS_avx2)

typedef int32_t Ints __attribute__((vector_size(32)));

PDSERVE_INLINE Ints splat_int(int32_t x) { return (Ints)_mm256_set1_epi32(x); }
PDSERVE_INLINE Ints load_ints(const void* p) {
  return (Ints)_mm256_loadu_si256(static_cast<const __m256i*>(p));
}
PDSERVE_INLINE Ints flip_signs(Ints x) { return x ^ static_cast<int32_t>(0x80808080u); }
PDSERVE_INLINE Ints dot4(Ints sum, Ints u, Ints s) {
  const __m256i a = (__m256i)u, b = (__m256i)s;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return sum + (Ints)even + (Ints)odd;
}
PDSERVE_INLINE Ints add(Ints a, Ints b) { return a + b; }
PDSERVE_INLINE Ints join(Ints high, Ints low) { return (high << 8) + low; }
PDSERVE_INLINE Ints high_byte(Ints x) { return x >> 8; }
PDSERVE_INLINE Vec to_floats(Ints x) { return _mm256_cvtepi32_ps((__m256i)x); }
PDSERVE_INLINE Ints to_ints(Vec x) { return (Ints)_mm256_cvtps_epi32(x); }
PDSERVE_INLINE void store_bytes(void* p, Ints x) {
  for (int i = 0; i < kWidth; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(x[i]);
}
PDSERVE_INLINE Vec magnitude(Vec x) { return _mm256_andnot_ps(splat(-0.0f), x); }
PDSERVE_INLINE Vec keep_first(Vec x, int count) {
  const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  return (Vec)((Ints)x & (lanes < splat_int(count)));
}

#else

using Ints = IntVec;

PDSERVE_INLINE Ints splat_int(int32_t x) { return Ints{x, x, x, x}; }
PDSERVE_INLINE Ints load_ints(const void* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PDSERVE_INLINE Ints flip_signs(Ints x) { return x ^ static_cast<int32_t>(0x80808080u); }
PDSERVE_INLINE Ints dot4(Ints sum, Ints u, Ints s) {
  sum += (u & 255) * ((s << 24) >> 24);
  sum += ((u >> 8) & 255) * ((s << 16) >> 24);
  sum += ((u >> 16) & 255) * ((s << 8) >> 24);
  return sum + ((u >> 24) & 255) * (s >> 24);
}
PDSERVE_INLINE Ints join(Ints high, Ints low) { return high * 256 + low; }
PDSERVE_INLINE Vec to_floats(Ints x) { return __builtin_convertvector(x, Vec); }
PDSERVE_INLINE Ints to_ints(Vec x) { return __builtin_convertvector(round_even(x), Ints); }
PDSERVE_INLINE void store_bytes(void* p, Ints x) {
  for (int i = 0; i < kWidth; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(x[i]);
}
PDSERVE_INLINE Ints add(Ints a, Ints b) { return a + b; }
PDSERVE_INLINE Ints high_byte(Ints x) { return x >> 8; }
PDSERVE_INLINE Vec magnitude(Vec x) { return (Vec)((Ints)x & 0x7fffffff); }
PDSERVE_INLINE Vec keep_first(Vec x, int count) {
  const Ints lanes = {0, 1, 2, 3};
  return (Vec)((Ints)x & (lanes < splat_int(count)));
}

#endif

// The largest magnitude of `count` numbers; not a number if one of them is none or infinite.
PDSERVE_INLINE float range_of(const float* x, int count) {
  Vec highest = zero(), broken = zero();
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec here = load(x + i);
    highest = max(highest, magnitude(here));
    broken = fma(here, zero(), broken);
  }
  float lanes[kWidth] = {};
  if (i < count) std::memcpy(lanes, x + i, sizeof(float) * static_cast<size_t>(count - i));
  const Vec here = load(lanes);
  highest = max(highest, magnitude(here));
  broken = fma(here, zero(), broken);
  return reduce_max(highest) + reduce_add(broken);
}

}  // namespace pdserve::PDSERVE_LEVEL
