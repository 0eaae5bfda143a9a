// Parallel loops. What a task computes must not depend on the thread that runs it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <thread>

namespace moerge::cpu {

// Waking torch's threads costs as much as some ten thousand multiply-adds.
constexpr int64_t kWorthThreads = 32768;

// f(i) for i in [0, n), spread over torch's threads; `cost` is about how many multiply-adds one f(i) is.
template <class F>
void parallel(int64_t n, int64_t cost, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kWorthThreads / 2 / std::max<int64_t>(1, cost));
  if (n <= grain) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Several loops, one after the other, in one parallel region: every member calls `run` for the same phases in the same
// order, and claims their tasks one by one. A member waits only for tasks that others have begun, so the members need
// not run at the same time.
class Team {
 public:
  // Calls body(team) on every thread, or on this one alone when the whole is not worth waking the others.
  template <class F>
  static void work(int64_t cost, const F& body) {
    Team team;
    const int64_t members = cost < kWorthThreads ? 1 : torch::stable::get_num_threads();
    if (members == 1) return body(team);
    torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(team);
    });
  }

  // f(i) for i in [0, n); returns when all are done, or when a task has thrown (then nothing more is run).
  template <class F>
  void run(int phase, int64_t n, const F& f) {
    Phase& state = phases_[phase];
    int64_t finished = 0;
    try {
      for (int64_t i; !failed_.load(std::memory_order_relaxed) && (i = state.next.fetch_add(1)) < n; ++finished) f(i);
    } catch (...) {
      failed_.store(true);
      throw;
    }
    if (finished) state.done.fetch_add(finished, std::memory_order_release);
    for (int spins = 0; state.done.load(std::memory_order_acquire) < n && !failed_.load(); ++spins)
      if (spins > 20000) std::this_thread::yield();
  }

  // Whether a task has thrown: what the phases compute is then incomplete.
  bool failed() const { return failed_.load(); }

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::array<Phase, 8> phases_;
  std::atomic<bool> failed_{false};
};

}  // namespace moerge::cpu
