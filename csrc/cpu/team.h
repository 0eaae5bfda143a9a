// Parallel loops. What a task computes must not depend on the thread that runs it.
//
// The threads are torch's (OpenMP): they are awake after a layer's own product. But a parallel region ends when every
// thread has come to its end, and one that the system has put aside for a busy neighbour comes a time slice later,
// whether there was anything left to do or not: some 4 to 12 ms. So a call is done by the calling thread alone
//   where that is as fast: kWorthThreads;
//   for a while after the regions of late have lost more by waiting than they have gained by help: kRestPerWait.
// Figures (float32 2048 -> 2048, E = 36, K = 2, R = 16, two cores, AVX-512):
//   no neighbour, layer and branch over the layer, one thread against two: T = 1 1.09, 1.13; T = 4 1.16, 1.12; T = 16
//   1.32, 1.22; E = 166, T = 1 1.52 and 1.36, 1.31 and 1.32 (Sapphire Rapids, weights from memory, two runs)
//   a busy process on one of the cores and other load, the branch, medians in us against always two threads: T = 1 28
//   (160 to 4100), T = 16 520 (12000), T = 256 4300 (12000)
//   a virtual machine whose host takes processors away now and then, one token of SmolLM2 in float32 over plain: 1.26
//   to 1.29, and 1.60 to 1.67 with a rest of kRestPerWait after each wait that was longer than the work, whatever help
//   had gained before; beside a busy process no difference
// Tried: threads of our own that a call waits for only while they run a task of it. Beside a busy process as fast; with
// no neighbour slower, since they find torch's threads, awake for some ms after the layer's product, on the other core:
// layer and branch over the layer T = 16 1.31 against 1.21.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace moerge::cpu {

// Multiply-adds, or numbers read from memory, from which on torch's threads are asked for help.
constexpr int64_t kWorthThreads = 1 << 18;

// Nanoseconds without torch's threads for one that was lost in waiting for them and not gained by their help before:
// what may be lost to busy neighbours in all is one part in so many.
constexpr int64_t kRestPerWait = 64;

// Nanoseconds of help that count, at most: a neighbour that comes after quiet times costs so much once. A host that now
// and then takes a processor away for a millisecond is no such neighbour.
constexpr int64_t kMostCredit = 16'000'000;

// Until when, on the steady clock, the calls of this process do without torch's threads, and what help is to their
// credit. Calls in several threads may overwrite each other's sums, which decide about time alone.
inline std::atomic<int64_t> rest_until{0}, credit{0};

// Several loops, one after the other, in one parallel region: every member calls `run` for the same phases in the same
// order, and claims their tasks one by one. A member waits only for tasks that others have begun, so the members need
// not run at the same time.
class Team {
 public:
  // Calls body(team) on every thread, or on this one alone: see above. `cost` is about how many multiply-adds it is.
  template <class F>
  static void work(int64_t cost, const F& body) {
    Team team;
    const int64_t members = cost < kWorthThreads ? 1 : torch::stable::get_num_threads();
    const int64_t begin = members == 1 ? 0 : now();
    if (members == 1 || begin < rest_until.load(std::memory_order_relaxed)) return body(team);
    int64_t worked = 0;  // by the calling thread, which is member 0
    std::atomic<int64_t> helped{0};
    torch::stable::parallel_for(0, members, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t came = i == 0 ? begin : now();
        waited_here() = 0;
        body(team);
        const int64_t spent = now() - came - waited_here();
        if (i == 0)
          worked = spent;
        else
          helped.fetch_add(spent, std::memory_order_relaxed);
      }
    });
    // a helper that was put aside in the middle of a task did no more than the calling thread in that time
    const int64_t end = now(), gained = std::min(helped.load(), (members - 1) * worked) - (end - begin - worked);
    settle(end, credit.load(std::memory_order_relaxed) + gained);
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
    if (state.done.load(std::memory_order_acquire) < n) wait(state, n);
  }

  // Whether a task has thrown: what the phases compute is then incomplete.
  bool failed() const { return failed_.load(); }

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };

  static int64_t now() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

  // Nanoseconds that this thread has waited for tasks of others, in the call at hand.
  static int64_t& waited_here() {
    static thread_local int64_t waited = 0;
    return waited;
  }

  static void settle(int64_t end, int64_t balance) {
    if (balance < 0) rest_until.store(end - kRestPerWait * balance, std::memory_order_relaxed);
    credit.store(std::clamp<int64_t>(balance, 0, kMostCredit), std::memory_order_relaxed);
  }

  void wait(const Phase& phase, int64_t n) {
    const int64_t begin = now();
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < n && !failed_.load(); ++spins)
      if (spins > 20000) std::this_thread::yield();
    waited_here() += now() - begin;
  }

  std::array<Phase, 8> phases_;
  std::atomic<bool> failed_{false};
};

// f(i) for i in [0, n), by a team; `cost` is about how many multiply-adds one f(i) is.
template <class F>
void parallel(int64_t n, int64_t cost, const F& f) {
  constexpr int64_t worth_claiming = 1 << 14;
  const int64_t grain = std::max<int64_t>(1, worth_claiming / std::max<int64_t>(1, cost));
  Team::work(n * cost, [&](Team& team) {
    team.run(0, (n + grain - 1) / grain, [&](int64_t part) {
      for (int64_t i = part * grain; i < std::min(n, (part + 1) * grain); ++i) f(i);
    });
  });
}

}  // namespace moerge::cpu
