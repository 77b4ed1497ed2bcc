// The vectors of each instruction set, as the register tile of linear.cpp sees them.
//
// A `Lanes` type says how many columns a vector has (kWidth), how many inputs one step takes
// (kStep), how to load a step of weights and of one row, and how a step is added to a sum. That
// addition is the whole of the numerics: sums begin at +0 and take the steps in order of the inputs.
// A tile has up to kRows rows and `columns(rows)` vectors side by side, as many as registers hold.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pdserve {
namespace PDSERVE_LEVEL {

inline uint32_t load32(const void* from) {
  uint32_t bits;
  std::memcpy(&bits, from, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#if defined(PDSERVE_IS_avx512) || defined(PDSERVE_IS_avx512bf16)

struct Fp32Lanes {
  using Element = float;
  using Row = float;
  using Sum = __m512;
  using Weight = __m512;
  using Input = __m512;
  static constexpr int kWidth = 16, kStep = 1, kRows = 8;
  static constexpr bool kByColumn = false;
  static constexpr int columns(int) { return 3; }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum read(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
  static Weight load(const Element* from) { return _mm512_loadu_ps(from); }
  static Input broadcast(const Row* from) { return _mm512_set1_ps(*from); }
  static Sum add(Sum sum, Weight w, Input x) { return _mm512_fmadd_ps(w, x, sum); }
};

#if defined(PDSERVE_IS_avx512bf16)

struct Bf16Lanes : Fp32Lanes {
  using Element = uint16_t;
  using Row = uint16_t;
  using Weight = __m512bh;
  using Input = __m512bh;
  static constexpr int kStep = 2;
  static Weight load(const Element* from) {
    return reinterpret_cast<Weight>(_mm512_loadu_si512(from));
  }
  static Input broadcast(const Row* from) {
    return reinterpret_cast<Input>(_mm512_set1_epi32(static_cast<int>(load32(from))));
  }
  static Sum add(Sum sum, Weight w, Input x) { return _mm512_dpbf16_ps(sum, w, x); }
};

// Integers of up to seven bits and a sign are exact in bf16: the bytes of the magnitude's pattern
// are looked up, and the sign is put in. 64 weights are 16 columns of two steps of `Bf16Lanes`.
struct Int8Lanes : Bf16Lanes {
  using Element = int8_t;
  struct Weight {
    __m512bh first, second;
  };
  struct Input {
    __m512bh first, second;
  };
  static constexpr int kStep = 4, kRows = 8;
  static constexpr bool kByColumn = true;
  static Weight load(const Element* from) {
    const __m512i bytes = _mm512_loadu_si512(from);
    const __m512i magnitude = _mm512_abs_epi8(bytes);
    const __m512i low =
        _mm512_permutex2var_epi8(table(0, 0), magnitude, table(64, 0));
    const __m512i high =
        _mm512_permutex2var_epi8(table(0, 8), magnitude, table(64, 8));
    // (bytes & 0x80) | high
    const __m512i signed_high = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(-128), high, 0xEA);
    return {reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(low, signed_high)),
            reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(low, signed_high))};
  }
  static Input broadcast(const Row* from) {
    return {Bf16Lanes::broadcast(from), Bf16Lanes::broadcast(from + 2)};
  }
  static Sum add(Sum sum, Weight w, Input x) {
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum, w.first, x.first), w.second, x.second);
  }

 private:
  struct Table {
    alignas(64) uint8_t bytes[2][128];
  };
  static constexpr Table make_table() {
    Table made{};
    for (int value = 1; value < 128; ++value) {
      int exponent = 0;
      while ((value >> (exponent + 1)) != 0) ++exponent;
      const int bits = ((127 + exponent) << 7) | ((value << (7 - exponent)) & 0x7F);
      made.bytes[0][value] = static_cast<uint8_t>(bits & 0xFF);
      made.bytes[1][value] = static_cast<uint8_t>(bits >> 8);
    }
    return made;
  }
  static __m512i table(int first, int shift) {
    static constexpr Table kTable = make_table();
    return _mm512_load_si512(kTable.bytes[shift / 8] + first);
  }
};

#else

// A pair of bf16 is widened to two fp32 by shifting and masking; even inputs are added first.
struct Bf16Lanes : Fp32Lanes {
  using Element = uint16_t;
  using Row = uint16_t;
  struct Weight {
    __m512 even, odd;
  };
  using Input = Weight;
  static constexpr int kStep = 2, kRows = 6;
  static Weight widen(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
  }
  static Weight load(const Element* from) { return widen(_mm512_loadu_si512(from)); }
  static Input broadcast(const Row* from) {
    return widen(_mm512_set1_epi32(static_cast<int>(load32(from))));
  }
  static Sum add(Sum sum, Weight w, Input x) {
    return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
  }
};

#endif

#elif defined(PDSERVE_IS_avx2)

struct Fp32Lanes {
  using Element = float;
  using Row = float;
  using Sum = __m256;
  using Weight = __m256;
  using Input = __m256;
  static constexpr int kWidth = 8, kStep = 1, kRows = 4;
  static constexpr bool kByColumn = false;
  static constexpr int columns(int rows) { return rows <= 2 ? 6 : 3; }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum read(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Sum sum) { _mm256_storeu_ps(to, sum); }
  static Weight load(const Element* from) { return _mm256_loadu_ps(from); }
  static Input broadcast(const Row* from) { return _mm256_set1_ps(*from); }
  static Sum add(Sum sum, Weight w, Input x) { return _mm256_fmadd_ps(w, x, sum); }
};

struct Bf16Lanes : Fp32Lanes {
  using Element = uint16_t;
  using Row = uint16_t;
  struct Weight {
    __m256 even, odd;
  };
  using Input = Weight;
  static constexpr int kStep = 2;
  static Weight widen(__m256i pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)))};
  }
  static Weight load(const Element* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Input broadcast(const Row* from) {
    return widen(_mm256_set1_epi32(static_cast<int>(load32(from))));
  }
  static Sum add(Sum sum, Weight w, Input x) {
    return _mm256_fmadd_ps(w.odd, x.odd, _mm256_fmadd_ps(w.even, x.even, sum));
  }
};

#elif defined(PDSERVE_IS_neon)

struct Fp32Lanes {
  using Element = float;
  using Row = float;
  using Sum = float32x4_t;
  using Weight = float32x4_t;
  using Input = float32x4_t;
  static constexpr int kWidth = 4, kStep = 1, kRows = 4;
  static constexpr bool kByColumn = false;
  static constexpr int columns(int rows) { return rows <= 2 ? 6 : 4; }
  static Sum zero() { return vdupq_n_f32(0.0f); }
  static Sum read(const float* from) { return vld1q_f32(from); }
  static void store(float* to, Sum sum) { vst1q_f32(to, sum); }
  static Weight load(const Element* from) { return vld1q_f32(from); }
  static Input broadcast(const Row* from) { return vdupq_n_f32(*from); }
  static Sum add(Sum sum, Weight w, Input x) { return vfmaq_f32(sum, w, x); }
};

struct Bf16Lanes : Fp32Lanes {
  using Element = uint16_t;
  using Row = uint16_t;
  struct Weight {
    float32x4_t even, odd;
  };
  using Input = Weight;
  static constexpr int kStep = 2;
  static Weight widen(uint32x4_t pairs) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)),
            vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000u)))};
  }
  static Weight load(const Element* from) {
    return widen(vreinterpretq_u32_u16(vld1q_u16(from)));
  }
  static Input broadcast(const Row* from) { return widen(vdupq_n_u32(load32(from))); }
  static Sum add(Sum sum, Weight w, Input x) {
    return vfmaq_f32(vfmaq_f32(sum, w.even, x.even), w.odd, x.odd);
  }
};

#else

struct Four {
  float at[4];
};

struct Fp32Lanes {
  using Element = float;
  using Row = float;
  using Sum = Four;
  using Weight = Four;
  using Input = float;
  static constexpr int kWidth = 4, kStep = 1, kRows = 4;
  static constexpr bool kByColumn = false;
  static constexpr int columns(int rows) { return rows <= 2 ? 4 : 2; }
  static Sum zero() { return Sum{}; }
  static Sum read(const float* from) { return load(from); }
  static void store(float* to, Sum sum) { std::memcpy(to, sum.at, sizeof sum.at); }
  static Weight load(const Element* from) {
    Weight weight;
    std::memcpy(weight.at, from, sizeof weight.at);
    return weight;
  }
  static Input broadcast(const Row* from) { return *from; }
  static Sum add(Sum sum, Weight w, Input x) {
    for (int i = 0; i < kWidth; ++i) sum.at[i] += w.at[i] * x;
    return sum;
  }
};

struct Bf16Lanes : Fp32Lanes {
  using Element = uint16_t;
  using Row = uint16_t;
  struct Weight {
    Four even, odd;
  };
  struct Input {
    float even, odd;
  };
  static constexpr int kStep = 2;
  static Weight load(const Element* from) {
    uint32_t pairs[kWidth];
    std::memcpy(pairs, from, sizeof pairs);
    Weight weight;
    for (int i = 0; i < kWidth; ++i) {
      weight.even.at[i] = float_of(pairs[i] << 16);
      weight.odd.at[i] = float_of(pairs[i] & 0xFFFF0000u);
    }
    return weight;
  }
  static Input broadcast(const Row* from) {
    const uint32_t pair = load32(from);
    return {float_of(pair << 16), float_of(pair & 0xFFFF0000u)};
  }
  static Sum add(Sum sum, Weight w, Input x) {
    return Fp32Lanes::add(Fp32Lanes::add(sum, w.even, x.even), w.odd, x.odd);
  }
};

#endif

}  // namespace PDSERVE_LEVEL
}  // namespace pdserve
