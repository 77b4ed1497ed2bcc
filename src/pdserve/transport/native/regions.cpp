// Copies of many regions, and writes of many pieces, in one call. Plain C interface, as `__init__.py` calls it by ctypes; no
// state, any thread. A change of the signature raises PDSERVE_REGIONS_ABI.
#include <poll.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
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

// Writes pieces to a stream socket that does not block, up to `at_once` of them in a call, until all
// are written or none can be for `timeout_ms`. Returns how many bytes were written; if none were, 0
// after the time, or -errno. The pieces are afterwards what they were.
PDSERVE_EXPORT int64_t pdserve_write_pieces(int fd, iovec* pieces, int64_t num_pieces,
                                            int64_t at_once, int timeout_ms) {
  int64_t written = 0;
  int64_t next = 0;
  size_t begun = 0;  // of the next piece
  while (next < num_pieces) {
    iovec& first = pieces[next];
    const iovec whole = first;
    first.iov_base = static_cast<char*>(whole.iov_base) + begun;
    first.iov_len = whole.iov_len - begun;
    const ssize_t moved = writev(fd, &first, static_cast<int>(std::min(num_pieces - next, at_once)));
    const int error = errno;
    first = whole;
    if (moved < 0) {
      if (error == EINTR) continue;
      if (error != EAGAIN) return written > 0 ? written : -error;
      pollfd waiting{fd, POLLOUT, 0};
      if (poll(&waiting, 1, timeout_ms) == 0) return written;
      continue;
    }
    written += moved;
    begun += static_cast<size_t>(moved);
    while (next < num_pieces && begun >= pieces[next].iov_len) begun -= pieces[next++].iov_len;
  }
  return written;
}
