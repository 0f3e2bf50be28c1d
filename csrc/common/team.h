// Threads that work on one thing together and wait for each other between its steps.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>

namespace vpfast {

class alignas(64) Barrier {
 public:
  void wait(int64_t members) {
    if (members == 1) return;
    const int64_t phase = phase_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      waiting_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int64_t turns = 0; phase_.load(std::memory_order_acquire) == phase; ++turns) {
      if (turns > kSpins) std::this_thread::yield();
    }
  }

 private:
  static constexpr int64_t kSpins = 20000;  // some 10 microseconds
  std::atomic<int64_t> waiting_{0};
  alignas(64) std::atomic<int64_t> phase_{0};
};

// work(rank, members, barrier) by each of `members` threads, at the same time. Where the system does not run them all
// at once, as within a region of the caller's, nobody could wait for anybody: then one thread does it all alone.
template <class Work>
void together(int64_t members, const Work& work) {
  Barrier barrier;
  std::atomic<int64_t> claimed{0}, entered{0};
  std::atomic<bool> taken{false};
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    entered.fetch_add(1);
    claimed.fetch_add(end - begin);
    if (members > 1 && end - begin == 1) {
      while (claimed.load() < members) std::this_thread::yield();
      if (entered.load() == members) return work(begin, members, barrier);
    }
    if (!taken.exchange(true)) work(int64_t{0}, int64_t{1}, barrier);
  });
}

}  // namespace vpfast
