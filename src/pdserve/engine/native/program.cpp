// Several kernels in one call: what lies between two of them is then C++ and not Python.
//
// A step whose layers nobody waits for is one call: the layers share the arguments of what reads and
// writes the pool, which are pointed to each layer's part of it in turn.
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

struct pdserve_layers {
  const pdserve_op* ops;  // [layer][ops_per_layer]
  pdserve_attention_args* attention;  // of all layers
  pdserve_place_args* place;          // the same
  const pdserve_place_layer* place_layers;  // [layer]
  char* kv;                           // the pool: its first layer
  int64_t layer_bytes;
  int32_t ops_per_layer;
};

extern "C" {
int pdserve_norm(int level, const pdserve_norm_args* args);
int pdserve_place(int level, const pdserve_place_args* args);
int pdserve_attention(int level, const pdserve_attention_args* args);
int pdserve_linear(const pdserve::LinearCall* call);
}

// Runs them in order; stops at the first that fails, and returns what it returned.
PDSERVE_EXPORT int pdserve_run(const pdserve_op* ops, int num_ops) {
  for (int i = 0; i < num_ops; ++i) {
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

// Runs `num_layers` layers from `first` on, as `pdserve_run`.
PDSERVE_EXPORT int pdserve_run_layers(const pdserve_layers* layers, int first, int num_layers) {
  for (int layer = first; layer < first + num_layers; ++layer) {
    char* const kv = layers->kv + layer * layers->layer_bytes;
    layers->attention->kv = kv;
    layers->place->kv = kv;
    layers->place->layer = layers->place_layers[layer];
    const pdserve_op* const ops = layers->ops + int64_t{layer} * layers->ops_per_layer;
    if (const int failed = pdserve_run(ops, layers->ops_per_layer)) return failed;
  }
  return 0;
}
