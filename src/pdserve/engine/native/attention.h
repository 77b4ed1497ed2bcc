// What a call of attention takes: shared by the entry point and the levels. Plain C, see abi.h.
#pragma once

#include <cstdint>

// One row of a step: `num_tokens` queries of one sequence, from position `start` on.
struct pdserve_row {
  int32_t first;        // index of its first token among the step's
  int32_t num_tokens;
  int32_t start;
  int32_t first_block;  // where its block table begins in `tables`
};

// Numbers of a pool; as `KvKind` in structs.py.
enum KvKind { kKvFloat = 0, kKvBf16 = 1, kKvInt8 = 2 };

struct pdserve_attention_args {
  const void* queries;  // [token, head, head_dim], tokens query_stride apart
  void* out;            // [token, head, head_dim], tokens out_stride apart
  const void* kv;       // one layer of the pool: [block, 2, kv head, position, head_dim], or see
                        // kv_int8.hpp
  const pdserve_row* rows;
  const int32_t* tables;
  int64_t query_stride;  // in elements
  int64_t out_stride;
  int32_t num_rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;  // even
  int32_t block_size;
  int32_t kv_kind;           // a KvKind
  int32_t queries_are_bf16;  // else fp32; the same for the next one
  int32_t out_is_bf16;
  int32_t num_threads;
  float scale;
};

namespace pdserve {

using Attention = void (*)(const pdserve_attention_args&);

}  // namespace pdserve
