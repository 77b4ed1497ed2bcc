// The product inside attention: C[r][n] += sum over k of A[r][k] * B[k][n], in one register tile
// after another. k runs from 0 up in a single chain per element, so an element's bits depend on its
// own row of A and on B, and not on how many rows are computed with it.
//
// A number of A and B is 32 bits wide: a float, or a pair of bf16 that is multiplied as a dot product
// of two (`Pairs`).
#pragma once

#include "simd.hpp"

namespace pdserve::PDSERVE_LEVEL {

struct Floats {
  static PDSERVE_INLINE Vec dot(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(PDSERVE_IS_avx512bf16)
struct Pairs {
  static PDSERVE_INLINE Vec dot(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Memory to send for while a product is computed: `offset` bytes behind each of 64 addresses.
struct Ahead {
  const void* const* rows;
  int64_t offset;

  PDSERVE_INLINE void fetch(int k) const {
    if (k < 32) {
      __builtin_prefetch(static_cast<const char*>(rows[2 * k]) + offset);
      __builtin_prefetch(static_cast<const char*>(rows[2 * k + 1]) + offset);
    }
  }
};

struct Nothing {
  PDSERVE_INLINE void fetch(int) const {}
};

template <class Kind, int kRows, int kVecs, bool kAdd, class Fetch>
PDSERVE_INLINE void product_tile(const Fetch& ahead, const float* a, int64_t a_stride,
                                 const float* b, int64_t b_stride, int depth, float* c,
                                 int64_t c_stride) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sums[r][v] = kAdd ? load(c + r * c_stride + v * kWidth) : zero();
  }
  for (int k = 0; k < depth; ++k) {
    ahead.fetch(k);
    Vec columns[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) columns[v] = load(b + k * b_stride + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec row = splat(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Kind::dot(row, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(c + r * c_stride + v * kWidth, sums[r][v]);
  }
}

template <class Kind, int kVecs, bool kAdd, class Fetch>
PDSERVE_INLINE void product_columns(const Fetch& ahead, int rows, const float* a, int64_t a_stride,
                                    const float* b, int64_t b_stride, int depth, float* c,
                                    int64_t c_stride) {
  int r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    product_tile<Kind, kTileRows, kVecs, kAdd>(ahead, a + r * a_stride, a_stride, b, b_stride,
                                               depth, c + r * c_stride, c_stride);
  }
  a += r * a_stride;
  c += r * c_stride;
  switch (rows - r) {
    case 5:
      product_tile<Kind, 5, kVecs, kAdd>(ahead, a, a_stride, b, b_stride, depth, c, c_stride);
      break;
    case 4:
      product_tile<Kind, 4, kVecs, kAdd>(ahead, a, a_stride, b, b_stride, depth, c, c_stride);
      break;
    case 3:
      product_tile<Kind, 3, kVecs, kAdd>(ahead, a, a_stride, b, b_stride, depth, c, c_stride);
      break;
    case 2:
      product_tile<Kind, 2, kVecs, kAdd>(ahead, a, a_stride, b, b_stride, depth, c, c_stride);
      break;
    case 1:
      product_tile<Kind, 1, kVecs, kAdd>(ahead, a, a_stride, b, b_stride, depth, c, c_stride);
      break;
    default:
      break;
  }
}

// `columns` is a multiple of kWidth; C is overwritten unless kAdd.
template <class Kind, bool kAdd, class Fetch>
inline void product(const Fetch& ahead, int rows, int columns, int depth, const float* a,
                    int64_t a_stride, const float* b, int64_t b_stride, float* c,
                    int64_t c_stride) {
  int n = 0;
  for (; n + kColumnVecs * kWidth <= columns; n += kColumnVecs * kWidth) {
    product_columns<Kind, kColumnVecs, kAdd>(ahead, rows, a, a_stride, b + n, b_stride, depth,
                                             c + n, c_stride);
  }
  for (; n < columns; n += kWidth) {
    product_columns<Kind, 1, kAdd>(ahead, rows, a, a_stride, b + n, b_stride, depth, c + n, c_stride);
  }
}

}  // namespace pdserve::PDSERVE_LEVEL
