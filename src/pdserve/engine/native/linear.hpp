// Products of rows with packed weights: what the entry point and the code of each level share.
#pragma once

#include <cstdint>

namespace pdserve {

// Columns of one panel: as many output columns as the largest register tile has.
constexpr int kPanel = 48;
// Most rows of a register tile of any level.
constexpr int kTileRows = 8;

enum ElementKind : int32_t { kBf16 = 0, kFp32 = 1, kInt8 = 2 };
enum Epilogue : int32_t { kStore = 0, kAdd = 1, kGate = 2 };

// out = epilogue(rows @ weight.T * scale + bias). The struct of the C interface: `LinearCall` in
// engine/torch/native_linear.py has the same fields.
//
// `weight` is a sequence of panels, each over the whole of `num_in`:
//   bf16   [num_in / 2][column][2]
//   fp32   [num_in][column]
//   int8   [num_in / 4][3][4][2][4][2]: 16 columns, of these 4, pair of inputs, column, input
// `scale` and `bias` are fp32, one for each packed column, or null. With kGate a panel is half gate
// and half up, and `num_out` counts the columns of the output.
struct LinearCall {
  const void* rows;      // [num_rows][num_in], bf16 or fp32
  const void* weight;
  const float* scale;
  const float* bias;
  const void* residual;  // [num_rows][num_out] like out, for kAdd; may be out itself
  void* out;             // [num_rows][num_out], bf16 or fp32
  int64_t num_rows;
  int64_t num_in;        // a multiple of the inputs that the layout holds together
  int64_t num_out;
  int32_t rows_kind;
  int32_t weight_kind;
  int32_t out_kind;
  int32_t epilogue;
  int32_t level;
  int32_t num_threads;
};

// A rectangle of a call's output: rows from `first_row`, panels from `first_panel`. `rows` are
// already of the kind that the products are made in. `sums` has room for [num_rows][kPanel] if the
// weight is int8.
struct LinearPart {
  const LinearCall* call;
  const void* rows;
  int64_t first_row, num_rows;
  int64_t first_panel, num_panels;
  float* sums;
};

}  // namespace pdserve
