// The C interface of the compiled kernels, as `library.py` calls it by ctypes.
//
// Every function takes raw pointers and sizes, holds no state between calls, and may be called from
// any thread. `level` is an index of `LEVELS` in `library.py`; the caller has asked
// `pdserve_level_supported` for it. A change of any signature or struct raises PDSERVE_ABI.
#pragma once

#define PDSERVE_ABI 4
#define PDSERVE_EXPORT extern "C" __attribute__((visibility("default")))
