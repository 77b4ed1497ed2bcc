// A pool of helper threads: made on first use, asleep when idle, never torn down (the process ends
// with them). One job at a time. A job is opened under the mutex, helpers enter it while it is open,
// and its caller closes it when no item is left; so a helper that wakes up late costs nothing.
//
// Each thread has a share of neighbouring items and goes through it from the front, so that what it
// fetches ahead is what it needs next; a thread that is done takes from the back of another's share.
#include "threads.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pdserve {
namespace {

constexpr std::chrono::microseconds kLookOut{40};
constexpr int kMostThreads = 256;

// Items [first, end) that nobody has taken, both in one word.
class Share {
 public:
  void set(int64_t first, int64_t end) {
    left_.store(static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(end),
                std::memory_order_relaxed);
  }
  int64_t take_first() { return take([](uint64_t left) { return left + (uint64_t{1} << 32); }, 32); }
  int64_t take_last() { return take([](uint64_t left) { return left - 1; }, 0); }

 private:
  // The item that is gone after `without`, or -1 if there is none.
  template <class Without>
  int64_t take(Without without, int from_bit) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    while (left >> 32 < (left & 0xFFFFFFFFu)) {
      const uint64_t rest = without(left);
      if (left_.compare_exchange_weak(left, rest, std::memory_order_relaxed)) {
        return static_cast<int64_t>(((from_bit ? left : rest) >> from_bit) & 0xFFFFFFFFu);
      }
    }
    return -1;
  }

  alignas(64) std::atomic<uint64_t> left_{0};
};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  Work work = nullptr;
  void* context = nullptr;
  int64_t num_items = 0;
  int num_threads = 0;
};

class Pool {
 public:
  bool run(const Job& job) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_helpers_ < job.num_threads - 1) {
        const int thread = ++num_helpers_;
        std::thread([this, thread] { help(thread); }).detach();
      }
      job_ = job;
      for (int thread = 0; thread < job.num_threads; ++thread) {
        shares_[thread].set(job.num_items * thread / job.num_threads,
                            job.num_items * (thread + 1) / job.num_threads);
      }
      open_ = true;
      opened_.fetch_add(1, std::memory_order_release);
    }
    if (num_asleep_.load(std::memory_order_acquire) > 0) wake_.notify_all();
    claim(job, 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
    }
    const auto until = std::chrono::steady_clock::now() + kLookOut;
    while (num_inside_.load(std::memory_order_acquire) > 0) {
      pause();
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      left_.wait(lock, [this] { return num_inside_.load(std::memory_order_acquire) == 0; });
    }
    return true;
  }

 private:
  void claim(const Job& job, int thread) {
    int64_t item;
    while ((item = shares_[thread].take_first()) >= 0) job.work(job.context, item, thread);
    for (int step = 1; step < job.num_threads; ++step) {
      Share& share = shares_[(thread + step) % job.num_threads];
      while ((item = share.take_last()) >= 0) job.work(job.context, item, thread);
    }
  }

  void help(int thread) {
    uint64_t seen = 0;
    for (;;) {
      look_out(seen);
      Job job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(lock, [&] { return opened_.load(std::memory_order_acquire) != seen; });
        num_asleep_.fetch_sub(1, std::memory_order_acq_rel);
        seen = opened_.load(std::memory_order_acquire);
        if (!open_ || thread >= job_.num_threads) continue;
        job = job_;
        num_inside_.fetch_add(1, std::memory_order_acq_rel);
      }
      claim(job, thread);
      if (num_inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        left_.notify_all();
      }
    }
  }

  void look_out(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kLookOut;
    while (opened_.load(std::memory_order_acquire) == seen) {
      for (int i = 0; i < 16; ++i) pause();
      if (std::chrono::steady_clock::now() >= until) return;
    }
  }

  std::mutex owner_;  // held by the caller whose job runs
  std::mutex mutex_;  // guards job_, open_, num_helpers_
  std::condition_variable wake_;
  std::condition_variable left_;
  Job job_;
  bool open_ = false;
  int num_helpers_ = 0;
  std::atomic<uint64_t> opened_{0};
  std::atomic<int> num_asleep_{0};
  std::atomic<int> num_inside_{0};
  Share shares_[kMostThreads];
};

Pool& pool() {
  static Pool* const kept = new Pool;  // never destroyed: helpers outlive static destructors
  return *kept;
}

struct Buffer {
  void* memory = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

void parallel(int num_threads, int64_t num_items, Work work, void* context) {
  if (num_threads > kMostThreads) num_threads = kMostThreads;
  if (num_threads > 1 && num_items > 1 && pool().run({work, context, num_items, num_threads})) {
    return;
  }
  for (int64_t item = 0; item < num_items; ++item) work(context, item, 0);
}

void* scratch(int slot, int64_t bytes) {
  thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes) {
    const int64_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    std::free(buffer.memory);
    buffer.memory = std::aligned_alloc(64, static_cast<size_t>(size));
    if (buffer.memory == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.memory;
}

}  // namespace pdserve
