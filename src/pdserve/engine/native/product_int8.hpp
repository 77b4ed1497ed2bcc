// The products inside attention over a pool of int8: rows of 16-bit numbers, as pairs of rows of bytes,
// times keys or values that are read where they lie (`kv_int8.hpp`). All sums are exact.
#pragma once

#include "kv_int8.hpp"
#include "simd_int8.hpp"

namespace pdserve::PDSERVE_LEVEL {

constexpr int kTile = 64;
constexpr int kGroups = kTile / kInt8Group;

// Where the 16-position groups of a tile lie.
struct Places {
  const int8_t* keys[kGroups];
  const float* key_scales[kGroups];
  int64_t to_values;  // from a group's keys to its values, and from scales to scales, in bytes

  const int8_t* values(int group) const { return keys[group] + to_values; }
  const float* value_scales(int group) const { return key_scales[group] + to_values / 4; }
};

// The two sides of attention as B of a product [row][k] x [k][column], a number being four bytes.
// Rows come in pairs; `put` takes the joined sums of the pair `r`.
struct KeySide {
  const Places& places;
  const int32_t* starts;  // [row]
  const float* factors;   // [pair]
  const float* scales;    // [column]
  float* scores;          // [pair, 64]

  PDSERVE_INLINE const int8_t* at(int k, int column) const {
    return places.keys[column / kInt8Group] + (k * kInt8Group + column % kInt8Group) * 4;
  }
  PDSERVE_INLINE Ints start(int row) const { return splat_int(starts[row]); }
  // Unsigned by adding 128, which `starts` takes off again.
  static PDSERVE_INLINE Ints read(const int8_t* p) { return flip_signs(load_ints(p)); }
  static PDSERVE_INLINE Ints dot(Ints sum, Ints row, Ints column) { return dot4(sum, column, row); }
  PDSERVE_INLINE void put(int r, int column, Ints sum) const {
    const Vec scale = mul(splat(factors[r]), load(scales + column));
    store(scores + r * kTile + column, mul(to_floats(sum), scale));
  }
};

struct ValueSide {
  const int8_t* quads[kTile / 4];  // where four positions lie
  const float* steps;  // [pair]: what 1 of a sum is worth
  float* sums;         // [pair, columns]
  int64_t columns;

  ValueSide(const Places& places, int head_dim, const float* steps, float* sums, int64_t columns)
      : steps(steps), sums(sums), columns(columns) {
    for (int k = 0; k < kTile / 4; ++k) {
      quads[k] = places.values(k / 4) + int64_t{k % 4} * 4 * head_dim;
    }
  }
  PDSERVE_INLINE const int8_t* at(int k, int column) const {
    return quads[k] + column * 4;
  }
  PDSERVE_INLINE Ints start(int) const { return splat_int(0); }
  static PDSERVE_INLINE Ints read(const int8_t* p) { return load_ints(p); }
  static PDSERVE_INLINE Ints dot(Ints sum, Ints row, Ints column) { return dot4(sum, row, column); }
  PDSERVE_INLINE void put(int r, int column, Ints sum) const {
    float* const to = sums + r * columns + column;
    store(to, fma(to_floats(sum), splat(steps[r]), load(to)));
  }
};

// With kAhead, each load also sends for the same place of the `next` tile.
template <bool kAhead, int kPairs, int kVecs, class Side>
PDSERVE_INLINE void product_tile(const Side& side, const Side& next, int depth, int first,
                                 int column, const int32_t* a, int64_t a_stride) {
  Ints sums[2 * kPairs][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < 2 * kPairs; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sums[r][v] = side.start(2 * first + r);
  }
  for (int k = 0; k < depth; ++k) {
    Ints columns[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      columns[v] = Side::read(side.at(k, column + v * kWidth));
      if (kAhead) __builtin_prefetch(next.at(k, column + v * kWidth));
    }
#pragma GCC unroll 8
    for (int r = 0; r < 2 * kPairs; ++r) {
      const Ints row = splat_int(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Side::dot(sums[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kPairs; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      side.put(first + r, column + v * kWidth, join(sums[2 * r][v], sums[2 * r + 1][v]));
    }
  }
}

template <bool kAhead, int kVecs, class Side>
PDSERVE_INLINE void product_columns(const Side& side, const Side& next, int pairs, int depth,
                                    int column, const int32_t* a, int64_t a_stride) {
  int r = 0;
  if (kAhead && pairs >= 3) {
    product_tile<true, 3, kVecs>(side, next, depth, 0, column, a, a_stride);
    r = 3;
  }
  for (; r + 3 <= pairs; r += 3) {
    product_tile<false, 3, kVecs>(side, next, depth, r, column, a + 2 * r * a_stride, a_stride);
  }
  a += 2 * r * a_stride;
  if (pairs - r == 2) {
    product_tile<kAhead, 2, kVecs>(side, next, depth, r, column, a, a_stride);
  } else if (pairs - r == 1) {
    product_tile<kAhead, 1, kVecs>(side, next, depth, r, column, a, a_stride);
  }
}

// A[row][k] * B[k][column] summed over k below `depth`, for the first `columns`. Two rows of A are a
// pair; they are `a_stride` apart.
template <bool kAhead, class Side>
inline void product(const Side& side, const Side& next, int pairs, int columns, int depth,
                    const int32_t* a, int64_t a_stride) {
  int n = 0;
  for (; n + kColumnVecs * kWidth <= columns; n += kColumnVecs * kWidth) {
    product_columns<kAhead, kColumnVecs>(side, next, pairs, depth, n, a, a_stride);
  }
  for (; n < columns; n += kWidth) {
    product_columns<kAhead, 1>(side, next, pairs, depth, n, a, a_stride);
  }
}

}  // namespace pdserve::PDSERVE_LEVEL
