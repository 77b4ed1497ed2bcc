// One tile of 64 positions of one kv head, taken out of the pool's blocks into the order in which
// attention's products want it. What lies past the end of a sequence becomes zero, so stale bytes of
// the pool cannot matter, be they not numbers.
//
// A format says how a pool's numbers become numbers of the product (`product.hpp`):
//   keys    [unit of head_dim][64 positions]          transposed
//   values  [unit of positions][head_dim, padded]     as they lie, or two positions interleaved
#pragma once

#include "product.hpp"

namespace pdserve::PDSERVE_LEVEL {

constexpr int kTile = 64;

// Where the positions of a tile lie. `count` of them are before the sequence's end.
template <class Element>
struct TileRows {
  const Element* keys[kTile];
  int64_t to_values;  // from a position's key to its value
  int count;
};

struct FloatFormat {  // fp32 pool, fp32 products
  using Element = float;
  using Kind = Floats;
  static constexpr int kUnit = 1;  // elements of the pool in a number of the product
  static PDSERVE_INLINE Vec units(const float* p) { return load(p); }
  static PDSERVE_INLINE float unit(const float* p) { return *p; }
};

struct WidenedFormat {  // bf16 pool, fp32 products
  using Element = bf16;
  using Kind = Floats;
  static constexpr int kUnit = 1;
  static PDSERVE_INLINE Vec units(const bf16* p) { return widen(p); }
  static PDSERVE_INLINE float unit(const bf16* p) { return widen(*p); }
};

#if defined(PDSERVE_IS_avx512bf16)
struct PairFormat {  // bf16 pool, products of bf16 pairs
  using Element = bf16;
  using Kind = Pairs;
  static constexpr int kUnit = 2;
  static PDSERVE_INLINE Vec units(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
  static PDSERVE_INLINE float unit(const bf16* p) {
    float pair;
    std::memcpy(&pair, p, sizeof pair);
    return pair;
  }
};
#endif

// Each load of `rows` also sends for the same place of `next`, so that memory is busy all along; for
// the last vector of each row the products do that (`Ahead`), so that it is busy then, too.
template <class Format, bool kAhead>
PDSERVE_INLINE void pack_keys(const TileRows<typename Format::Element>& rows,
                              const TileRows<typename Format::Element>& next, int head_dim,
                              float* out) {
  const int units = head_dim / Format::kUnit;
  for (int j = 0; j < kTile; j += kWidth) {
    int u = 0;
    for (; u + kWidth <= units; u += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        square[i] =
            j + i < rows.count ? Format::units(rows.keys[j + i] + u * Format::kUnit) : zero();
        if (kAhead && u + kWidth < units) {
          __builtin_prefetch(next.keys[j + i] + u * Format::kUnit);
        }
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(out + (u + i) * kTile + j, square[i]);
    }
    for (; u < units; ++u) {
      for (int i = 0; i < kWidth; ++i) {
        const bool known = j + i < rows.count;
        out[u * kTile + j + i] = known ? Format::unit(rows.keys[j + i] + u * Format::kUnit) : 0.0f;
      }
    }
  }
}

// `columns` is head_dim, padded to whole vectors.
template <class Format, bool kAhead>
PDSERVE_INLINE void pack_values(const TileRows<typename Format::Element>& rows,
                                const TileRows<typename Format::Element>& next, int head_dim,
                                int columns, float* out) {
  for (int j = 0; j < kTile; ++j, out += columns) {
    int d = 0;
    if (j < rows.count) {
      const auto* value = rows.keys[j] + rows.to_values;
      for (; d + kWidth <= head_dim; d += kWidth) {
        store(out + d, Format::units(value + d));
        if (kAhead && d + kWidth < head_dim) {
          __builtin_prefetch(next.keys[j] + next.to_values + d);
        }
      }
      for (; d < head_dim; ++d) out[d] = Format::unit(value + d);
    }
    for (; d < columns; ++d) out[d] = 0.0f;
  }
}

#if defined(PDSERVE_IS_avx512bf16)
template <bool kAhead>
PDSERVE_INLINE void pack_value_pairs(const TileRows<bf16>& rows, const TileRows<bf16>& next,
                                     int head_dim, int columns, float* out) {
  alignas(64) static constexpr uint16_t kLow[32] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int j = 0; j < kTile; j += 2, out += columns) {
    const bf16* first = rows.keys[j] + rows.to_values;
    const bf16* second = rows.keys[j + 1] + rows.to_values;
    for (int d = 0; d < columns; d += 32) {
      const int left = head_dim - d;
      const __mmask32 known = left >= 32 ? ~0u : (1u << left) - 1u;
      const __m512i a = _mm512_maskz_loadu_epi16(j < rows.count ? known : 0u, first + d);
      const __m512i b = _mm512_maskz_loadu_epi16(j + 1 < rows.count ? known : 0u, second + d);
      if (kAhead && d + 32 < head_dim) {
        __builtin_prefetch(next.keys[j] + next.to_values + d);
        __builtin_prefetch(next.keys[j + 1] + next.to_values + d);
      }
      _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
      if (d + 16 < columns) {
        _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
}
#endif

template <class Format, bool kAhead>
PDSERVE_INLINE void pack_tile(const TileRows<typename Format::Element>& rows,
                              const TileRows<typename Format::Element>& next, int head_dim,
                              int columns, float* keys, float* values) {
  pack_keys<Format, kAhead>(rows, next, head_dim, keys);
#if defined(PDSERVE_IS_avx512bf16)
  if constexpr (Format::kUnit == 2) {
    return pack_value_pairs<kAhead>(rows, next, head_dim, columns, values);
  }
#endif
  pack_values<Format, kAhead>(rows, next, head_dim, columns, values);
}

}  // namespace pdserve::PDSERVE_LEVEL
