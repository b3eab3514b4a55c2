// Threads that help with chunks of work, and are never waited for before they have begun one.
//
// The caller works too. Each chunk is claimed by one thread, so a helper that the system does not
// let run costs its help and nothing else: on a busy machine a barrier that waits for every
// thread, as OpenMP's does, costs a time slice at each of the dozens of operations of a step.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace baton {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Pool {
 public:
  // Calls function(context, chunk) for every chunk below `chunks`, on up to `threads` threads.
  void run(int threads, int64_t chunks, void (*function)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> alone(mutex_, std::try_to_lock);
    if (threads <= 1 || chunks <= 1 || chunks >= int64_t(CLOSED) || !alone.owns_lock()) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) function(context, chunk);
      return;
    }
    start(threads - 1);
    // A ticket holds the job's number above the next chunk's, so that a helper which wakes late
    // can claim nothing of a job it has not read.
    function_ = function;
    context_ = context;
    chunks_ = chunks;
    allowed_ = threads - 1;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> CHUNK_BITS) + 1;
    ticket_.store(job << CHUNK_BITS, std::memory_order_seq_cst);
    job_.store(uint32_t(job), std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) job_.notify_all();
    work(job);
    for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) {
      if (spins < SPINS_BEFORE_YIELD) {
        relax();
      } else {
        sched_yield();
      }
    }
    // From here on nobody can claim a chunk while the next job is written down.
    ticket_.store((job << CHUNK_BITS) | CLOSED, std::memory_order_seq_cst);
  }

 private:
  static constexpr int CHUNK_BITS = 24;
  static constexpr uint64_t CLOSED = (uint64_t(1) << CHUNK_BITS) - 1;
  static constexpr int SPINS_BEFORE_YIELD = 2000;
  static constexpr int SPINS_BEFORE_SLEEP = 4000;  // some 100 us: longer than a gap within a step

  // Where the system gives no more threads, those that there are do the work.
  void start(int count) {
    try {
      while (int(helpers_.size()) < count) {
        helpers_.emplace_back([this, number = int(helpers_.size())] { help(number); });
        helpers_.back().detach();
      }
    } catch (const std::system_error&) {
    }
  }

  void work(uint64_t job) {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (ticket >> CHUNK_BITS != job) return;
      const int64_t chunk = int64_t(ticket & CLOSED);
      if (chunk == int64_t(CLOSED)) return;
      // The claim fails when the job has ended meanwhile, and then nothing read here is used.
      void (*function)(void*, int64_t) = function_;
      void* context = context_;
      if (chunk >= chunks_) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      function(context, chunk);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void help(int number) {
    uint32_t seen = 0;
    for (;;) {
      uint32_t now = job_.load(std::memory_order_acquire);
      for (int spins = 0; now == seen && spins < SPINS_BEFORE_SLEEP; ++spins) {
        relax();
        now = job_.load(std::memory_order_acquire);
      }
      if (now == seen) {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        job_.wait(seen, std::memory_order_seq_cst);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        continue;
      }
      seen = now;
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (uint32_t(ticket >> CHUNK_BITS) == now && number < allowed_) work(ticket >> CHUNK_BITS);
    }
  }

  std::mutex mutex_;
  std::vector<std::thread> helpers_;
  std::atomic<void (*)(void*, int64_t)> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> chunks_{0};
  std::atomic<int> allowed_{0};
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<uint32_t> job_{0};
  std::atomic<int> sleeping_{0};
};

// Never destroyed: helpers may still spin in it when the process ends.
inline Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

template <typename Function>
void parallel(int threads, int64_t chunks, Function&& function) {
  pool().run(
      threads, chunks,
      [](void* context, int64_t chunk) {
        (*static_cast<std::remove_reference_t<Function>*>(context))(chunk);
      },
      &function);
}

}  // namespace baton
