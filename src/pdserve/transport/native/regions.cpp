// Copies of many regions in one call. Plain C interface, as `__init__.py` calls it by ctypes; no
// state, any thread. A change of the signature raises PDSERVE_REGIONS_ABI.
#include <algorithm>
#include <cstdint>
#include <cstring>

#define PDSERVE_REGIONS_ABI 1
#define PDSERVE_EXPORT extern "C" __attribute__((visibility("default")))

struct pdserve_region {
  int64_t source;  // offsets in bytes, which the caller has checked
  int64_t target;
  int64_t length;
};

namespace {

constexpr int64_t kLine = 64;
// The processor foresees what lies behind a read, but no further than the end of its page, and not
// where the next region begins.
constexpr int64_t kAhead = 4096;

void fetch(const char* from, int64_t length) {
  const int64_t end = std::min(length, kAhead);
  for (int64_t at = 0; at < end; at += kLine) __builtin_prefetch(from + at);
}

}  // namespace

PDSERVE_EXPORT int pdserve_regions_abi(void) { return PDSERVE_REGIONS_ABI; }

// From the first to the last; source and target do not overlap.
PDSERVE_EXPORT void pdserve_copy_regions(char* target, const char* source,
                                         const pdserve_region* regions, int64_t num_regions) {
  for (int64_t i = 0; i < num_regions; ++i) {
    if (i + 1 < num_regions) fetch(source + regions[i + 1].source, regions[i + 1].length);
    const pdserve_region& region = regions[i];
    std::memcpy(target + region.target, source + region.source,
                static_cast<size_t>(region.length));
  }
}
