// Entry points of the kernels over single tokens.
#include "abi.h"
#include "levels.hpp"
#include "rows.h"

namespace pdserve {
#define PDSERVE_DECLARE(name, level)     \
  namespace name {                       \
  void norm(const pdserve_norm_args&);   \
  void place(const pdserve_place_args&); \
  void best(const pdserve_best_args&);   \
  }
PDSERVE_FOR_LEVELS(PDSERVE_DECLARE)
#undef PDSERVE_DECLARE
}  // namespace pdserve

#define PDSERVE_DISPATCH()            \
  switch (level) {                      \
    PDSERVE_FOR_LEVELS(PDSERVE_CASE)    \
    default:                            \
      return 1;                         \
  }

// RMSNorm of each row (arXiv:1910.07467). Returns 0, or 1 for a level that is not compiled in.
#define PDSERVE_CASE(name, index) \
  case pdserve::index:            \
    pdserve::name::norm(*args);   \
    return 0;
PDSERVE_EXPORT int pdserve_norm(int level, const pdserve_norm_args* args) {
  PDSERVE_DISPATCH()
}
#undef PDSERVE_CASE

// Normalises and rotates the query heads in place, as far as the layer does that, and puts the keys,
// treated alike, and the values into the pool.
#define PDSERVE_CASE(name, index) \
  case pdserve::index:            \
    pdserve::name::place(*args);  \
    return 0;
PDSERVE_EXPORT int pdserve_place(int level, const pdserve_place_args* args) {
  PDSERVE_DISPATCH()
}
#undef PDSERVE_CASE

// Index of the greatest value of each row; of several, the first; something that is not a number is
// greater than all that is.
#define PDSERVE_CASE(name, index) \
  case pdserve::index:            \
    pdserve::name::best(*args);   \
    return 0;
PDSERVE_EXPORT int pdserve_best(int level, const pdserve_best_args* args) {
  PDSERVE_DISPATCH()
}
#undef PDSERVE_CASE
