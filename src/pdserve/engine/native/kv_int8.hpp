// How a pool of int8 lies in memory. A block has a run for each (key/value, kv head); a run is
// numbers and then one fp32 scale for each position. The bytes lie as dot products of four want them,
// so that attention reads them in place:
//   keys    [16 positions][head_dim / 4][position][4]   four dimensions of one position side by side
//   values  [position / 4][head_dim][4]                 four positions of one dimension side by side
// Both have 16 * head_dim bytes for 16 positions. head_dim is a multiple of 4, block_size of 16.
#pragma once

#include <cstdint>

namespace pdserve {

constexpr int kInt8Group = 16;    // positions that lie together
constexpr int kMostHeadDim = 512;  // of a pool of int8; sums of products fit 32 bits with room
constexpr float kInt8Range = 127.0f;
constexpr float kSmallest = 1e-30f;  // a range below it counts as nothing but zeros

inline int64_t int8_numbers(int block_size, int head_dim) { return int64_t{block_size} * head_dim; }
inline int64_t int8_run(int block_size, int head_dim) {
  return int8_numbers(block_size, head_dim) + int64_t{4} * block_size;
}

}  // namespace pdserve
