// Which instruction sets this machine can run.
#include "levels.hpp"

#include "abi.h"

namespace pdserve {

bool level_supported(int level) {
  switch (level) {
    case kPlain:
      return true;
#if defined(PDSERVE_ARM)
    case kNeon:
      return true;
#endif
#if defined(PDSERVE_X86)
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case kAvx512:
      return level_supported(kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case kAvx512Bf16:
      return level_supported(kAvx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#endif
    default:
      return false;
  }
}

}  // namespace pdserve

PDSERVE_EXPORT int pdserve_abi() { return PDSERVE_ABI; }

PDSERVE_EXPORT int pdserve_level_supported(int level) { return pdserve::level_supported(level); }
