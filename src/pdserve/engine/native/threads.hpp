// Work split over threads that sleep when there is none.
#pragma once

#include <cstdint>

namespace pdserve {

// One item of a job. `thread` is below the number of threads asked for, and no two items of a job
// run at once with the same one.
using Work = void (*)(void* context, int64_t item, int thread);

// Run items 0 to num_items, in any order, on up to `num_threads` threads, the caller being one of
// them; returns when all are done. Which thread runs an item must not matter to its result. Helpers
// are made on first use and kept. A helper that has had work looks out for more during some
// microseconds (the next kernel of a step) and then sleeps. If another caller has the helpers, the
// items run on the caller alone.
void parallel(int num_threads, int64_t num_items, Work work, void* context);

// The same for a callable `f(item, thread)`.
template <typename F>
void parallel_for(int num_threads, int64_t num_items, F& f) {
  parallel(
      num_threads, num_items,
      [](void* context, int64_t item, int thread) { (*static_cast<F*>(context))(item, thread); },
      &f);
}

// `bytes` of 64-byte aligned memory that belongs to the calling thread until it asks again for the
// same `slot` (0 to 3). It grows and is kept, so a steady step allocates nothing.
void* scratch(int slot, int64_t bytes);

}  // namespace pdserve
