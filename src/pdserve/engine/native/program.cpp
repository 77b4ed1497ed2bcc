// Several kernels in one call: what lies between two of them is then C++ and not Python.
#include <cstdint>

#include "abi.h"
#include "attention.h"
#include "linear.hpp"
#include "rows.h"

// The numbers are those of `Kernel` in structs.py. A product carries its level itself.
enum { kNormOp = 0, kPlaceOp = 1, kAttentionOp = 2, kLinearOp = 3 };

struct pdserve_op {
  const void* args;
  int32_t kernel;
  int32_t level;
};

extern "C" {
int pdserve_norm(int level, const pdserve_norm_args* args);
int pdserve_place(int level, const pdserve_place_args* args);
int pdserve_attention(int level, const pdserve_attention_args* args);
int pdserve_linear(const pdserve::LinearCall* call);
}

// Runs them in order; stops at the first that fails, and returns what it returned.
PDSERVE_EXPORT int pdserve_run(const pdserve_op* ops, int64_t num_ops) {
  for (int64_t i = 0; i < num_ops; ++i) {
    const pdserve_op& op = ops[i];
    int failed = 1;
    switch (op.kernel) {
      case kNormOp:
        failed = pdserve_norm(op.level, static_cast<const pdserve_norm_args*>(op.args));
        break;
      case kPlaceOp:
        failed = pdserve_place(op.level, static_cast<const pdserve_place_args*>(op.args));
        break;
      case kAttentionOp:
        failed = pdserve_attention(op.level, static_cast<const pdserve_attention_args*>(op.args));
        break;
      case kLinearOp:
        failed = pdserve_linear(static_cast<const pdserve::LinearCall*>(op.args));
        break;
      default:
        break;
    }
    if (failed != 0) return failed;
  }
  return 0;
}
