// Runs kernels written in the device vocabulary on the host, one block after another, every thread of a block a fiber.
// It is made to find bugs, not to be fast:
//   - the order in which threads run is shuffled anew after every barrier, from a seed;
//   - shared memory and outputs begin as NaN, and every array lies against an inaccessible page;
//   - asynchronous copies land at the last legal moment (when they are waited for), or at the first;
//   - a barrier or warp operation that some threads do not reach is an error that names the place.
// A launch whose blocks run together keeps all of them alive, so that they can wait for each other.
// Every error is a std::runtime_error thrown by `launch`. One launch at a time (a mutex); threads that ask for
// anything out of turn do not exist, since fibers only switch at barriers and warp operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace moerge::simt {

using Place = std::source_location;

// At first from the environment: MOERGE_SIMT_SEED, and MOERGE_SIMT_COPIES=early.
struct Settings {
  uint64_t seed = 1;        // of the order of threads; 0: in order
  bool late_copies = true;  // asynchronous copies land when waited for, else at once
};
Settings& settings();

struct Index {
  int x, y, z;
};

// ---- for the host -----------------------------------------------------------------------------------------------
struct Name {
  const char* kernel;  // for messages
  const char* type;    // as the compiler spells the instance: the first launch of each is entered in the file
                       // MOERGE_SIMT_LAUNCHED
};
void launch(Index grid, int threads, size_t shared_bytes, bool together, Name name, void (*body)(const void*),
            const void* arguments);

// ---- for kernels: the thread that runs --------------------------------------------------------------------------
int thread();
int threads();
Index block();
Index grid();

void block_barrier(const Place& place);
uint32_t grid_arrive(const Place& place);
void grid_wait(uint32_t arrival, const Place& place);

// Every lane of the warp hands in its `mine`; when the last one has, `run(all)` is called once on the 32 of them.
void warp_operation(const Place& place, void* mine, void (*run)(void** all));

// The n-th array that this thread asks for is the n-th of every other thread of the block.
void* shared_array(size_t bytes, const Place& place);

void async_copy(void* to, const void* from, size_t copied, size_t zeroed);
void async_commit();
void async_wait(int groups_left);

// Ends the launch with an error. The fiber is left as it stands: what it owns on its stack is not freed.
[[noreturn]] void fail(const char* message, const Place& place);

}  // namespace moerge::simt
