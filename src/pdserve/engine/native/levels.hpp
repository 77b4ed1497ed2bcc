// Instruction sets that kernels are compiled for, and how code of one of them is named.
#pragma once

#if defined(__x86_64__)
#define PDSERVE_X86 1
#elif defined(__aarch64__)
#define PDSERVE_ARM 1
#endif

namespace pdserve {

// The order is that of `LEVELS` in library.py; a processor family has some of them.
enum Level { kPlain = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Bf16 = 4, kNumLevels = 5 };

bool level_supported(int level);

// Expands `M(level name, Level)` for each level of this processor family.
#if defined(PDSERVE_X86)
#define PDSERVE_FOR_LEVELS(M) \
  M(plain, kPlain) M(avx2, kAvx2) M(avx512, kAvx512) M(avx512bf16, kAvx512Bf16)
#elif defined(PDSERVE_ARM)
#define PDSERVE_FOR_LEVELS(M) M(plain, kPlain) M(neon, kNeon)
#else
#define PDSERVE_FOR_LEVELS(M) M(plain, kPlain)
#endif

}  // namespace pdserve
