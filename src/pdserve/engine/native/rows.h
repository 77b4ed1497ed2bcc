// What the kernels over single tokens take. Plain C, see abi.h.
#pragma once

#include <cstdint>

#include "attention.h"

struct pdserve_norm_args {
  const void* rows;    // [row, width]; all of bf16 or all fp32
  const void* weight;  // [width]
  void* out;           // [row, width]
  int64_t num_rows;
  int64_t width;
  int32_t is_bf16;
  int32_t num_threads;
  float epsilon;
};

struct pdserve_best_args {
  const float* rows;  // [row, width]
  int64_t* out;       // [row]
  int64_t num_rows;
  int64_t width;  // at least 1
  int32_t num_threads;
};

// What differs from layer to layer.
struct pdserve_place_layer {
  const void* query_norm;  // [head_dim], of the heads' type; null: queries are not normalised
  const void* key_norm;    // the same for keys
  int64_t rotates;         // else queries and keys keep their angles
};

struct pdserve_place_args {
  void* heads;           // [token, head, head_dim]: query heads, key heads, value heads
  void* kv;              // one layer of the pool: [block, 2, kv head, position, head_dim], or see
                         // kv_int8.hpp
  const float* cosines;  // [position, rotary_dim / 2]
  const float* sines;    // the same
  pdserve_place_layer layer;
  const pdserve_row* rows;
  const int32_t* tables;
  int32_t num_rows;
  int32_t num_heads;  // of queries
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;  // of head_dim, from the first on
  int32_t block_size;
  int32_t is_bf16;   // heads; else fp32
  int32_t kv_is_int8;  // else the pool is like the heads
  int32_t num_threads;
  float epsilon;  // of the norms
};
