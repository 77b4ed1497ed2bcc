// Entry point of attention.
#include <new>

#include "abi.h"
#include "attention.h"
#include "levels.hpp"

namespace pdserve {
#define PDSERVE_DECLARE(name, level)        \
  namespace name {                          \
  void attention(const pdserve_attention_args&); \
  }
PDSERVE_FOR_LEVELS(PDSERVE_DECLARE)
#undef PDSERVE_DECLARE
}  // namespace pdserve

// Causal attention of each row over its sequence, this step's keys and values already in the pool.
// Returns 0, 1 for a level that is not compiled in, 2 if there is no memory for scratch.
PDSERVE_EXPORT int pdserve_attention(int level, const pdserve_attention_args* args) {
  try {
    switch (level) {
#define PDSERVE_CASE(name, level)           \
  case pdserve::level:                      \
    pdserve::name::attention(*args); \
    return 0;
      PDSERVE_FOR_LEVELS(PDSERVE_CASE)
#undef PDSERVE_CASE
      default:
        return 1;
    }
  } catch (const std::bad_alloc&) {
    return 2;
  }
}
