// Entry point of the products: splits a call into parts for the threads, and picks the level.
#include <algorithm>
#include <new>

#include "abi.h"
#include "levels.hpp"
#include "linear.hpp"
#include "threads.hpp"

namespace pdserve {

#define PDSERVE_DECLARE(level, index)                                     \
  namespace level {                                                       \
  void linear(const LinearPart& part);                                    \
  void narrow_rows(const float* from, int64_t count, uint16_t* to);       \
  }
PDSERVE_FOR_LEVELS(PDSERVE_DECLARE)
#undef PDSERVE_DECLARE

namespace {

constexpr int kRowsSlot = 2, kSumsSlot = 3;   // of `scratch`
constexpr int64_t kBlockBytes = 400 * 1024;    // rows of one part: they stay in the L2 cache
constexpr int64_t kPartsPerThread = 4;         // so that threads of unequal speed end together

using Linear = void (*)(const LinearPart&);
using Narrow = void (*)(const float*, int64_t, uint16_t*);

struct Kernels {
  Linear linear;
  Narrow narrow_rows;
};

Kernels kernels_of(int level) {
  switch (level) {
#define PDSERVE_CASE(name, index) \
  case index:                     \
    return {name::linear, name::narrow_rows};
    PDSERVE_FOR_LEVELS(PDSERVE_CASE)
#undef PDSERVE_CASE
    default:
      return {nullptr, nullptr};
  }
}

void run(const LinearCall& call, const Kernels& kernels) {
  const void* rows = call.rows;
  if (call.rows_kind == kFp32 && call.weight_kind != kFp32) {
    const int64_t count = call.num_rows * call.num_in;
    auto* narrow = static_cast<uint16_t*>(scratch(kRowsSlot, count * 2));
    kernels.narrow_rows(static_cast<const float*>(call.rows), count, narrow);
    rows = narrow;
  }
  const int64_t width = call.epilogue == kGate ? kPanel / 2 : kPanel;
  const int64_t num_panels = (call.num_out + width - 1) / width;
  const int64_t row_bytes = call.num_in * (call.weight_kind == kFp32 ? 4 : 2);
  const int64_t most_rows = std::max<int64_t>(kTileRows * 4, kBlockBytes / row_bytes);
  const int64_t num_blocks = (call.num_rows + most_rows - 1) / most_rows;
  const int64_t num_groups =
      call.num_threads <= 1 ? 1 : std::min(num_panels, call.num_threads * kPartsPerThread);
  auto work = [&](int64_t item, int) {
    const int64_t block = item / num_groups, group = item % num_groups;
    const int64_t first_row = call.num_rows * block / num_blocks;
    const int64_t first_panel = num_panels * group / num_groups;
    LinearPart part;
    part.call = &call;
    part.rows = rows;
    part.first_row = first_row;
    part.num_rows = call.num_rows * (block + 1) / num_blocks - first_row;
    part.first_panel = first_panel;
    part.num_panels = num_panels * (group + 1) / num_groups - first_panel;
    part.sums = nullptr;
    if (call.weight_kind == kInt8)
      part.sums = static_cast<float*>(scratch(kSumsSlot, part.num_rows * kPanel * 4));
    kernels.linear(part);
  };
  parallel_for(call.num_threads, num_blocks * num_groups, work);
}

}  // namespace
}  // namespace pdserve

// 0; 1 if the level or a kind is not one of this library; 2 if there is no memory for scratch.
PDSERVE_EXPORT int pdserve_linear(const pdserve::LinearCall* call) {
  const auto kernels = pdserve::kernels_of(call->level);
  if (kernels.linear == nullptr || (call->weight_kind == pdserve::kFp32 && call->rows_kind != 1)) {
    return 1;
  }
  try {
    if (call->num_rows > 0) pdserve::run(*call, kernels);
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}
