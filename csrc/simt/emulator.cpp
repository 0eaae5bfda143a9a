// Blocks and their threads, barriers, shared memory and late copies of the emulator (emulator.h).
#include "emulator.h"

#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <set>
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

enum class State { ready, at_barrier, at_warp, at_grid, done };

struct Thread {
  State state = State::ready;
  Place place;
  size_t arrays = 0;                     // shared arrays asked for so far
  uint32_t arrivals = 0, waits = 0;      // at the barrier of the grid
  std::vector<Copy> open;                // copies not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  int arrived = 0;
  Place place;
  void* all[32];
};

struct Block {
  Index index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Guarded>> arrays;
};

struct Launch {
  const char* kernel;
  void (*body)(const void*);
  const void* arguments;
  Index grid;
  int threads;
  size_t shared_limit;
  bool together;
};

// Everything about the launch that runs; only one does.
Launch now;
std::vector<Block> blocks;                   // those that live at the same time: one, or the whole grid
std::vector<std::unique_ptr<Fiber>> fibers;  // those of the first block, then those of the next
Block* here;                                 // the block that runs, and which of its threads
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

Thread& me() { return here->threads[current]; }
Fiber& my_fiber() { return *fibers[(here - blocks.data()) * now.threads + current]; }

void leave(State state, const Place& place) {
  me().state = state;
  me().place = place;
  my_fiber().yield(home);
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
  const char* what = thread.state == State::at_barrier ? "the barrier at "
                     : thread.state == State::at_warp  ? "the warp operation at "
                                                       : "the barrier of the grid at ";
  return what + at(thread.place);
}

// Whether every thread of the block is at the same barrier, which they then pass.
bool pass_barrier(Block& block) {
  for (const Thread& thread : block.threads)
    if (thread.state != State::at_barrier || !same(thread.place, block.threads[0].place)) return false;
  for (Thread& thread : block.threads) thread.state = State::ready;
  return true;
}

// Whether somebody waits for the whole grid and all of it has arrived as often; then they go on.
bool pass_grid_barrier() {
  uint32_t arrived = me().arrivals;
  for (const Block& block : blocks)
    for (const Thread& thread : block.threads) arrived = std::min(arrived, thread.arrivals);
  bool passed = false;
  for (Block& block : blocks)
    for (Thread& thread : block.threads)
      if (thread.state == State::at_grid && thread.arrivals <= arrived) thread.state = State::ready, passed = true;
  return passed;
}

// Nobody can ever run again: two threads that are not at the same place, of one block if possible.
void report_stuck() {
  const auto waits = [](const Thread& t) { return t.state == State::at_barrier || t.state == State::at_warp; };
  const auto stuck = [&](const Block& b) { return std::any_of(b.threads.begin(), b.threads.end(), waits); };
  const auto found = std::find_if(blocks.begin(), blocks.end(), stuck);
  if (found != blocks.end()) {
    here = &*found;
    const auto& threads = here->threads;
    auto first =
        std::find_if(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::at_barrier; });
    if (first == threads.end()) first = std::find_if(threads.begin(), threads.end(), waits);
    const auto apart = [&](const Thread& t) { return t.state != first->state || !same(t.place, first->place); };
    const auto other = std::find_if(threads.begin(), threads.end(), apart);
    error = "not all threads reach " + whereabouts(*first) + "; thread " + std::to_string(other - threads.begin()) +
            " is at " + whereabouts(*other);
    return;
  }
  const auto at_grid = [](const Block& b) { return b.threads[0].state == State::at_grid; };
  here = &*std::find_if(blocks.begin(), blocks.end(), at_grid);
  error = "not all blocks arrive before " + whereabouts(here->threads[0]);
}

void prepare(Block& block, Index index) {
  block.index = index;
  block.threads.assign(now.threads, Thread());
  block.warps.assign(now.threads / 32, Warp());
  for (auto& array : block.arrays) array->poison();
}

// Lets one block pass its barrier, so that blocks get ahead of each other; in order the first, else any.
bool pass_one_barrier() {
  const size_t first = settings().seed ? random_order() % blocks.size() : 0;
  for (size_t i = 0; i < blocks.size(); ++i)
    if (pass_barrier(blocks[(first + i) % blocks.size()])) return true;
  return false;
}

// Runs the blocks that live at the same time to their end.
void run_blocks() {
  std::vector<int> order(blocks.size() * now.threads);
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<int>(i);
    fibers[i]->prepare(begin_thread);
  }
  while (error.empty()) {
    if (settings().seed) std::shuffle(order.begin(), order.end(), random_order);
    bool progress = false, alive = false;
    for (int i : order) {
      here = &blocks[i / now.threads];
      current = i % now.threads;
      if (me().state == State::ready) {
        in_fiber = true;
        fibers[i]->resume(home);
        in_fiber = false;
        progress = true;
        if (!error.empty()) return;
      }
      alive = alive || me().state != State::done;
    }
    if (!alive) return;
    if (!progress && !pass_one_barrier() && !pass_grid_barrier()) report_stuck();
  }
}

void check_arrays() {
  for (Block& block : blocks)
    for (auto& array : block.arrays)
      if (error.empty() && !array->intact()) here = &block, error = "a shared array was written outside its bounds";
}

void on_fault(int number, siginfo_t* info, void*) {
  const char* where = Guarded::describe(info->si_addr);
  if (!in_fiber) {
    signal(number, SIG_DFL);  // not a kernel's: let it happen again
    return;
  }
  error = std::string("out-of-bounds access, ") + (where ? where : "not near any array");
  my_fiber().yield(home);  // for good: the fiber is not resumed
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
  blocks.resize(now.together ? size_t(now.grid.x) * now.grid.y * now.grid.z : 1);
  while (fibers.size() < blocks.size() * now.threads) fibers.push_back(std::make_unique<Fiber>());
  size_t next = 0;
  Index at;
  for (at.z = 0; at.z < now.grid.z; ++at.z)
    for (at.y = 0; at.y < now.grid.y; ++at.y)
      for (at.x = 0; at.x < now.grid.x; ++at.x) {
        here = &blocks[next];
        prepare(*here, at);
        next = (next + 1) % blocks.size();
        if (next) continue;
        run_blocks();
        check_arrays();
        if (!error.empty()) return;
      }
}

void enter_launched(const char* type) {
  static const char* const path = std::getenv("MOERGE_SIMT_LAUNCHED");
  static std::set<std::string> entered;
  if (path && entered.insert(type).second) std::ofstream(path, std::ios::app) << type << '\n';
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

void launch(Index grid, int threads, size_t shared_bytes, bool together, Name name, void (*body)(const void*),
            const void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  enter_launched(name.type);
  now = {name.kernel, body, arguments, grid, threads, shared_bytes, together};
  error.clear();
  random_order.seed(settings().seed);
  blocks.resize(1);
  here = blocks.data();
  if (threads % 32 || threads > 1024) error = "a block must have a multiple of 32 threads, at most 1024";
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535) error = "a grid that CUDA refuses";
  if (error.empty()) {
    const FaultHandler handler;
    run_grid();
  }
  const Index failed = here->index;
  blocks.clear();
  if (!error.empty())
    throw std::runtime_error("simt: " + std::string(name.kernel) + ", block (" + std::to_string(failed.x) + ", " +
                             std::to_string(failed.y) + ", " + std::to_string(failed.z) + "): " + error);
}

int thread() { return current; }
int threads() { return now.threads; }
Index block() { return here->index; }
Index grid() { return now.grid; }

void block_barrier(const Place& place) { leave(State::at_barrier, place); }

uint32_t grid_arrive(const Place& place) {
  if (!now.together) fail("a barrier of the grid, whose blocks do not run together,", place);
  if (me().arrivals > me().waits)
    fail("the block arrives at the barrier of the grid again without having waited", place);
  block_barrier(place);
  return ++me().arrivals;
}

void grid_wait(uint32_t arrival, const Place& place) {
  if (arrival != me().waits + 1) fail("the block waits for the grid without having arrived", place);
  ++me().waits;
  leave(State::at_grid, place);
  block_barrier(place);
}

void warp_operation(const Place& place, void* mine, void (*run)(void** all)) {
  const int first = current / 32 * 32;
  Warp& warp = here->warps[current / 32];
  if (warp.arrived == 0) warp.place = place;
  if (!same(warp.place, place)) fail("the lanes of a warp are at different operations; one is", place);
  warp.all[current - first] = mine;
  if (++warp.arrived < 32) return leave(State::at_warp, place);
  warp.arrived = 0;
  run(warp.all);
  for (int i = first; i < first + 32; ++i) here->threads[i].state = State::ready;
}

void* shared_array(size_t bytes, const Place& place) {
  auto& arrays = here->arrays;
  const size_t index = me().arrays++;
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
    me().open.push_back(copy);
  else
    land(copy);
}

void async_commit() {
  Thread& mine = me();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void async_wait(int groups_left) {
  auto& groups = me().groups;
  for (; groups.size() > static_cast<size_t>(groups_left); groups.pop_front())
    for (const Copy& copy : groups.front()) land(copy);
}

void fail(const char* message, const Place& place) {
  error = std::string(message) + " at " + at(place);
  for (;;) my_fiber().yield(home);
}

}  // namespace moerge::simt
