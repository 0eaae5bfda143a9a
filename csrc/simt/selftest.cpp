// The emulator's own test: small kernels that are right must run, and the same kernels with one planted bug must be
// caught, by an error or by a wrong result. `simt_selftest` prints one line per case and returns how many failed.
#include <cstdio>
#include <device.cuh>
#include <functional>
#include <stdexcept>
#include <vector>

#include "guarded.h"

using namespace moerge::cuda;
using moerge::simt::Guarded;
using moerge::simt::settings;

namespace {

constexpr int kBlock = 64;

enum class Bug {
  none,
  barrier,         // missing
  warp_barrier,    // missing
  lonely_barrier,  // some threads leave before it
  other_barrier,   // half of the block waits at another one
  lonely_shuffle,  // a lane does not take part
  wait,            // missing
  early_wait,      // waits for one group too few
  late_read,       // overwrites what an asynchronous copy has yet to read
  fragment,        // wrong index
  read_past,       // global memory
  read_before,
  write_past,
  shared_past,   // shared memory
  shared_left,   // an element that nobody wrote
  shared_size,   // more than the launch asked for
  grid_wait,     // missing
  lonely_block,  // does not come to the barrier of the grid
  alone,         // a barrier of the grid in an ordinary launch
};

// Reverses kBlock numbers through shared memory.
struct Reverse {
  static constexpr int kThreads = kBlock;
  static constexpr const char* kName = "reverse";
  Bug bug;
  const float* in;
  float* out;

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    float* all = shared.take<float>(bug == Bug::shared_size ? 2 * kBlock : kBlock);
    const int i = thread();
    if (bug == Bug::lonely_barrier && i == 5) return;
    if (bug != Bug::shared_left || i != 7)
      all[i] = in[bug == Bug::read_past ? i + 1 : bug == Bug::read_before ? i - 1024 : i];
    if (bug == Bug::other_barrier && i < 32)
      sync_block();
    else if (bug != Bug::barrier)
      sync_block();
    out[bug == Bug::write_past ? i + 4 : i] = all[kBlock - 1 - i + (bug == Bug::shared_past)];
  }
};

// Each lane reads what its neighbour wrote, and the warp's sum.
struct Neighbours {
  static constexpr int kThreads = kBlock;
  static constexpr const char* kName = "neighbours";
  Bug bug;
  const float* in;
  float* out;

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    float* all = shared.take<float>(kBlock);
    const int i = thread();
    all[i] = in[i];
    if (bug != Bug::warp_barrier) sync_warp();
    float sum = all[i ^ 1];
    if (bug == Bug::lonely_shuffle && i == 3) return;
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    out[i] = sum;
  }
};

// Two tiles of 4 numbers per thread arrive asynchronously; each thread adds its neighbour's.
struct Pipeline {
  static constexpr int kThreads = kBlock;
  static constexpr const char* kName = "pipeline";
  Bug bug;
  const float* in;
  float* out;

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    float* tiles = shared.take<float>(2 * 4 * kBlock);
    const int i = thread(), other = kBlock - 1 - i;
    for (int tile = 0; tile < 2; ++tile) {
      async_copy16(tiles + (tile * kBlock + i) * 4, in + (tile * kBlock + i) * 4, true);
      async_commit();
    }
    if (bug == Bug::late_read) const_cast<float*>(in)[(kBlock + i) * 4] = -1;
    float sum = 0;
    if (bug != Bug::wait) async_wait<1>();
    sync_block();
    sum += tiles[other * 4];
    if (bug != Bug::early_wait)
      async_wait<0>();
    else
      async_wait<1>();
    sync_block();
    out[i] = sum + tiles[(kBlock + other) * 4];
  }
};

// c = a b for a [16,16] and b [16,8] of whole numbers in bf16: a by load_matrices, b transposed by it.
struct Product {
  static constexpr int kThreads = 32;
  static constexpr const char* kName = "product";
  Bug bug;
  const bf16 *a, *b;
  float* c;

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    bf16 *as = shared.take<bf16>(256), *bs = shared.take<bf16>(128);
    for (int i = lane(); i < 256; i += 32) as[i] = a[i];
    for (int i = lane(); i < 128; i += 32) bs[i] = b[i];
    sync_warp();
    uint32_t left[4], right[4];
    const int row = bug == Bug::fragment ? lane() / 2 : lane() % 16;
    load_matrices<false>(left, as + row * 16 + lane() / 16 * 8);
    load_matrices<true>(right, bs + lane() % 16 * 8);
    float sum[4] = {};
    mma<bf16>(sum, left, {right[0], right[1]});
    for (int i = 0; i < 4; ++i) c[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = sum[i];
  }
};

// c = a b for a [16,8] and b [8,8] in tf32, fragments made as PTX says.
struct ProductTf32 {
  static constexpr int kThreads = 32;
  static constexpr const char* kName = "product_tf32";
  float* c;
  MOERGE_DEVICE void operator()() const {
    const auto a = [](int row, int k) { return to_tf32(static_cast<float>((row * 8 + k) * 7 % 13)); };
    const auto b = [](int k, int column) { return to_tf32(static_cast<float>((k * 8 + column) * 5 % 11)); };
    const int g = lane() / 4, i = lane() % 4;
    float sum[4] = {};
    mma_tf32(sum, {a(g, i), a(g + 8, i), a(g, i + 4), a(g + 8, i + 4)}, {b(i, g), b(i + 4, g)});
    for (int j = 0; j < 4; ++j) c[(g + j / 2 * 8) * 8 + i * 2 + j % 2] = sum[j];
  }
};

// Every block hands its sum on to the next, twice: `passed` [2, kTogether] starts as NaN.
constexpr int kTogether = 3;
struct Chain {
  static constexpr int kThreads = kBlock;
  static constexpr const char* kName = "chain";
  Bug bug;
  float *passed, *out;

  MOERGE_DEVICE void operator()() const {
    const int64_t block = block_x(), before = (block + kTogether - 1) % kTogether;
    if (bug == Bug::lonely_block && block == 1) return;
    if (thread() == 40) passed[block] = static_cast<float>(block + 1);
    grid_wait(grid_arrive());
    if (thread() == 7) passed[kTogether + block] = 10 * passed[before];
    const uint32_t arrival = grid_arrive();
    if (bug != Bug::grid_wait) grid_wait(arrival);
    if (thread() == 0) out[block] = passed[kTogether + before];
  }
};

std::vector<float> numbers(int count) {
  std::vector<float> out(count);
  for (int i = 0; i < count; ++i) out[i] = static_cast<float>(i * i % 23) - 5;
  return out;
}

float* guarded(Guarded& memory, const std::vector<float>& values) {
  std::memcpy(memory.data(), values.data(), values.size() * 4);
  return reinterpret_cast<float*>(memory.data());
}

// Whether `Kernel` turns kBlock * width numbers into what `expected` says, with nothing written elsewhere.
template <class Kernel>
bool runs(Bug bug, int width, size_t shared, const std::function<float(const std::vector<float>&, int)>& expected) {
  const std::vector<float> values = numbers(kBlock * width);
  Guarded in(values.size() * 4), out(kBlock * 4);
  const float* from = guarded(in, values);
  float* to = reinterpret_cast<float*>(out.data());
  launch({2}, shared, nullptr, Kernel{bug, from, to});
  for (int i = 0; i < kBlock; ++i)
    if (!(to[i] == expected(values, i))) return false;
  return in.intact() && out.intact();
}

bool reverse(Bug bug) {
  return runs<Reverse>(bug, 1, kBlock * 4, [](const auto& v, int i) { return v[kBlock - 1 - i]; });
}

bool neighbours(Bug bug) {
  return runs<Neighbours>(bug, 1, kBlock * 4, [](const auto& v, int i) {
    float sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += v[i / 32 * 32 + lane];
    return sum;
  });
}

bool pipeline(Bug bug) {
  return runs<Pipeline>(bug, 8, 2 * 16 * kBlock, [](const auto& v, int i) {
    const int other = kBlock - 1 - i;
    return v[other * 4] + v[(kBlock + other) * 4];
  });
}

bool product(Bug bug) {
  Guarded a(512), b(256), c(512);
  bf16 *pa = reinterpret_cast<bf16*>(a.data()), *pb = reinterpret_cast<bf16*>(b.data());
  for (int i = 0; i < 256; ++i) from_float(static_cast<float>(i * 7 % 13 - 6), pa[i]);
  for (int i = 0; i < 128; ++i) from_float(static_cast<float>(i * 5 % 11 - 4), pb[i]);
  float* pc = reinterpret_cast<float*>(c.data());
  launch({1}, 768, nullptr, Product{bug, pa, pb, pc});
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += to_float(pa[row * 16 + k]) * to_float(pb[k * 8 + column]);
      if (pc[row * 8 + column] != sum) return false;
    }
  return true;
}

bool chain(Bug bug) {
  Guarded passed(2 * kTogether * 4), out(kTogether * 4);
  float* to = reinterpret_cast<float*>(out.data());
  const Chain kernel{bug, reinterpret_cast<float*>(passed.data()), to};
  if (bug == Bug::alone)
    launch({kTogether}, 0, nullptr, kernel);
  else
    launch_together(kTogether, 0, nullptr, kernel);
  return to[0] == 20 && to[1] == 30 && to[2] == 10;
}

bool product_tf32() {
  Guarded c(512);
  float* pc = reinterpret_cast<float*>(c.data());
  launch({1}, 0, nullptr, ProductTf32{pc});
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int k = 0; k < 8; ++k) sum += (row * 8 + k) * 7 % 13 * ((k * 8 + column) * 5 % 11);
      if (pc[row * 8 + column] != static_cast<float>(sum)) return false;
    }
  return true;
}

int failures = 0;

void report(const char* name, bool good, const std::string& detail) {
  std::printf("%-28s %s%s%s\n", name, good ? "ok" : "FAILED", detail.empty() ? "" : ": ", detail.c_str());
  failures += !good;
}

// A kernel without a bug is right for every order of threads and both kinds of copies; with one it must be caught in
// at least one of them.
void check(const char* name, bool wanted, const std::function<bool()>& run) {
  bool right = true;
  std::string message;
  for (uint64_t seed = 0; seed < 6; ++seed)
    for (bool late : {true, false}) {
      settings() = {seed, late};
      try {
        const bool fine = run();
        if (!fine && message.empty()) message = "a wrong result";
        right = right && fine;
      } catch (const std::runtime_error& error) {
        if (message.empty()) message = error.what();
        right = false;
      }
    }
  report(name, right == wanted, message);
}

}  // namespace

int main() {
  check("reverse", true, [] { return reverse(Bug::none); });
  check("neighbours", true, [] { return neighbours(Bug::none); });
  check("pipeline", true, [] { return pipeline(Bug::none); });
  check("product", true, [] { return product(Bug::none); });
  check("product in tf32", true, [] { return product_tf32(); });
  check("blocks together", true, [] { return chain(Bug::none); });
  check("missing barrier", false, [] { return reverse(Bug::barrier); });
  check("barrier without some", false, [] { return reverse(Bug::lonely_barrier); });
  check("two barriers", false, [] { return reverse(Bug::other_barrier); });
  check("read past the end", false, [] { return reverse(Bug::read_past); });
  check("read in front", false, [] { return reverse(Bug::read_before); });
  check("write past the end", false, [] { return reverse(Bug::write_past); });
  check("shared past the end", false, [] { return reverse(Bug::shared_past); });
  check("shared never written", false, [] { return reverse(Bug::shared_left); });
  check("too much shared memory", false, [] { return reverse(Bug::shared_size); });
  check("missing warp barrier", false, [] { return neighbours(Bug::warp_barrier); });
  check("shuffle without a lane", false, [] { return neighbours(Bug::lonely_shuffle); });
  check("missing wait", false, [] { return pipeline(Bug::wait); });
  check("wait for too few", false, [] { return pipeline(Bug::early_wait); });
  check("source overwritten", false, [] { return pipeline(Bug::late_read); });
  check("wrong fragment index", false, [] { return product(Bug::fragment); });
  check("missing wait for the grid", false, [] { return chain(Bug::grid_wait); });
  check("a block does not arrive", false, [] { return chain(Bug::lonely_block); });
  check("blocks not together", false, [] { return chain(Bug::alone); });
  std::printf("%d failed\n", failures);
  return failures;
}
