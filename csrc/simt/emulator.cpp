#include "emulator.h"

#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "guarded.h"

namespace moerge::simt {

namespace {

struct Copy {
  void* to;
  const void* from;
  size_t copied, zeroed;
};

enum class State { ready, at_barrier, at_warp, done };

struct Thread {
  State state = State::ready;
  Place place;
  size_t arrays = 0;                     // shared arrays asked for so far
  std::vector<Copy> open;                // copies not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  int arrived = 0;
  Place place;
  void* all[32];
};

struct Launch {
  const char* kernel;
  void (*body)(const void*);
  const void* arguments;
  Index grid, block;
  int threads;
  size_t shared_limit, shared_used;
};

// Everything about the launch that runs; only one does.
Launch now;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Thread> all_threads;
std::vector<Warp> warps;
std::vector<std::unique_ptr<Guarded>> arrays;
int current;
bool in_fiber = false;
Context home;
std::string error;
std::mt19937_64 random_order;

std::string at(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(place.line());
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

void leave(State state, const Place& place) {
  Thread& mine = all_threads[current];
  mine.state = state;
  mine.place = place;
  fibers[current]->yield(home);
}

void begin_thread() {
  fiber_started(home);
  now.body(now.arguments);
  leave(State::done, Place::current());
}

void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.copied);
  std::memset(static_cast<char*>(copy.to) + copy.copied, 0, copy.zeroed);
}

std::string whereabouts(const Thread& thread) {
  if (thread.state == State::done) return "its end";
  return (thread.state == State::at_barrier ? "the barrier at " : "the warp operation at ") + at(thread.place);
}

// Nobody can run: either all are at the same barrier and may pass, or something was not reached by all.
void pass_barrier() {
  const auto waits = [](const Thread& thread) { return thread.state == State::at_barrier; };
  const auto first = std::find_if(all_threads.begin(), all_threads.end(), waits);
  for (const Thread& thread : all_threads) {
    const bool together = first != all_threads.end() && waits(thread) && same(thread.place, first->place);
    if (together) continue;
    const Thread& other = first != all_threads.end()
                              ? *first
                              : *std::find_if(all_threads.begin(), all_threads.end(),
                                              [](const Thread& t) { return t.state == State::at_warp; });
    error = "not all threads reach " + whereabouts(other) + "; thread " + std::to_string(&thread - &all_threads[0]) +
            " is at " + whereabouts(thread);
    return;
  }
  for (Thread& thread : all_threads) thread.state = State::ready;
}

void run_block() {
  all_threads.assign(now.threads, Thread());
  warps.assign(now.threads / 32, Warp());
  for (auto& array : arrays) array->poison();
  now.shared_used = 0;
  std::vector<int> order(now.threads);
  for (int i = 0; i < now.threads; ++i) {
    order[i] = i;
    fibers[i]->prepare(begin_thread);
  }
  while (error.empty()) {
    if (settings().seed) std::shuffle(order.begin(), order.end(), random_order);
    bool progress = false, alive = false;
    for (int i : order) {
      if (all_threads[i].state == State::ready) {
        current = i;
        in_fiber = true;
        fibers[i]->resume(home);
        in_fiber = false;
        progress = true;
        if (!error.empty()) return;
      }
      alive = alive || all_threads[i].state != State::done;
    }
    if (!alive) return;
    if (!progress) pass_barrier();
  }
}

void check_arrays() {
  for (auto& array : arrays)
    if (error.empty() && !array->intact()) error = "a shared array was written outside its bounds";
}

void on_fault(int number, siginfo_t* info, void*) {
  const char* where = Guarded::describe(info->si_addr);
  if (!in_fiber) {
    signal(number, SIG_DFL);  // not a kernel's: let it happen again
    return;
  }
  error = std::string("out-of-bounds access, ") + (where ? where : "not near any array");
  fibers[current]->yield(home);  // for good: the fiber is not resumed
}

// Catches accesses of inaccessible pages while it lives. The handler needs a stack of its own: fibers' are small.
class FaultHandler {
 public:
  FaultHandler() : stack_(64 * 1024) {
    stack_t alternate{};
    alternate.ss_sp = stack_.data();
    alternate.ss_size = stack_.size();
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  std::vector<char> stack_;
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

void run_grid() {
  for (now.block.z = 0; now.block.z < now.grid.z; ++now.block.z)
    for (now.block.y = 0; now.block.y < now.grid.y; ++now.block.y)
      for (now.block.x = 0; now.block.x < now.grid.x; ++now.block.x) {
        run_block();
        check_arrays();
        if (!error.empty()) return;
      }
}

}  // namespace

Settings& settings() {
  static Settings chosen = [] {
    Settings given;
    if (const char* seed = std::getenv("MOERGE_SIMT_SEED")) given.seed = std::strtoull(seed, nullptr, 10);
    if (const char* copies = std::getenv("MOERGE_SIMT_COPIES")) given.late_copies = std::string(copies) != "early";
    return given;
  }();
  return chosen;
}

void launch(Index grid, int threads, size_t shared_bytes, const char* kernel, void (*body)(const void*),
            const void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  now = {kernel, body, arguments, grid, {}, threads, shared_bytes, 0};
  error.clear();
  random_order.seed(settings().seed);
  while (fibers.size() < static_cast<size_t>(threads)) fibers.push_back(std::make_unique<Fiber>());
  if (threads % 32 || threads > 1024) error = "a block must have a multiple of 32 threads, at most 1024";
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535) error = "a grid that CUDA refuses";
  if (error.empty()) {
    const FaultHandler handler;
    run_grid();
  }
  arrays.clear();
  if (!error.empty())
    throw std::runtime_error("simt: " + std::string(kernel) + ", block (" + std::to_string(now.block.x) + ", " +
                             std::to_string(now.block.y) + ", " + std::to_string(now.block.z) + "): " + error);
}

int thread() { return current; }
int threads() { return now.threads; }
Index block() { return now.block; }
Index grid() { return now.grid; }

void block_barrier(const Place& place) { leave(State::at_barrier, place); }

void warp_operation(const Place& place, void* mine, void (*run)(void** all)) {
  const int first = current / 32 * 32;
  Warp& warp = warps[current / 32];
  if (warp.arrived == 0) warp.place = place;
  if (!same(warp.place, place)) fail("the lanes of a warp are at different operations; one is", place);
  warp.all[current - first] = mine;
  if (++warp.arrived < 32) return leave(State::at_warp, place);
  warp.arrived = 0;
  run(warp.all);
  for (int i = first; i < first + 32; ++i) all_threads[i].state = State::ready;
}

void* shared_array(size_t bytes, const Place& place) {
  const size_t index = all_threads[current].arrays++;
  if (index == arrays.size()) arrays.push_back(std::make_unique<Guarded>(bytes));
  if (arrays[index]->size() != bytes) fail("threads ask for shared arrays of different sizes", place);
  size_t used = 0;
  for (size_t i = 0; i <= index; ++i) used += (arrays[i]->size() + 15) / 16 * 16;
  if (used > now.shared_limit) fail("more shared memory is used than the launch asked for", place);
  return arrays[index]->data();
}

void async_copy(void* to, const void* from, size_t copied, size_t zeroed) {
  const Copy copy{to, from, copied, zeroed};
  if (settings().late_copies)
    all_threads[current].open.push_back(copy);
  else
    land(copy);
}

void async_commit() {
  Thread& mine = all_threads[current];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void async_wait(int groups_left) {
  auto& groups = all_threads[current].groups;
  for (; groups.size() > static_cast<size_t>(groups_left); groups.pop_front())
    for (const Copy& copy : groups.front()) land(copy);
}

void fail(const char* message, const Place& place) {
  error = std::string(message) + " at " + at(place);
  for (;;) fibers[current]->yield(home);
}

}  // namespace moerge::simt
