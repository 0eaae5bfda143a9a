// What the expand on tensor cores reads (see lora_expand.cuh): H, whose parts are added up and weighted once here
// rather than by every block that reads it; and the tokens of each chunk sorted by expert, slot by slot. Most blocks
// make H, the first ones sort: a counting sort with atomics, whose order inside an expert is left to chance, since a
// token's result does not depend on its place in a tile.
#include "lora_expand.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokensEach = static_cast<int>((kExpandMostTokens + kThreads - 1) / kThreads);
constexpr int kPartsAtOnce = 8;

template <class T>
struct LoraExpandSort {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_expand_sort";
  Lora p;
  const float* h;
  ExpandPlan plan;
  char* workspace;

  struct Memory {
    int32_t *counts, *starts;  // [E + 1] tokens of an expert, the last for those of none; see scan
    int32_t* totals;           // [kWarps]
  };

  static size_t shared(int64_t E) { return 2 * shared_size((E + 1) * 4) + shared_size(kWarps * 4); }

  // starts: how many tokens come before an expert's, and in the upper 16 bits how many tiles. Returns both of all.
  MOERGE_DEVICE int scan(const Memory& m) const {
    const int keys = static_cast<int>(p.E) + 1, each = (keys + kThreads - 1) / kThreads;
    const int from = thread() * each, to = from + each < keys ? from + each : keys;
    const auto both = [&](int key) { return m.counts[key] | (m.counts[key] + kTileRows - 1) / kTileRows << 16; };
    int sum = 0;
    for (int key = from; key < to; ++key) sum += both(key);
    int through = sum;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = shuffle(through, lane() - distance);
      if (lane() >= distance) through += before;
    }
    if (lane() == 31) m.totals[warp()] = through;
    sync_block();
    int at = through - sum, all = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp()) at += m.totals[i];
      all += m.totals[i];
    }
    for (int key = from; key < to; ++key) {
      m.starts[key] = at;
      at += both(key);
    }
    sync_block();
    return all;
  }

  MOERGE_DEVICE void sort(int chunk, int k) const {
    Shared shared;
    Memory m;
    const int E = static_cast<int>(p.E);
    m.counts = shared.take<int32_t>(E + 1);
    m.starts = shared.take<int32_t>(E + 1);
    m.totals = shared.take<int32_t>(kWarps);
    for (int i = thread(); i <= E; i += kThreads) m.counts[i] = 0;
    sync_block();
    const int64_t first = int64_t(chunk) * plan.tokens;
    const int count = p.T - first < plan.tokens ? static_cast<int>(p.T - first) : plan.tokens;
    int keys[kTokensEach], before[kTokensEach];
    for (int j = 0; j < kTokensEach; ++j) {
      const int i = thread() + j * kThreads;
      if (i >= count) continue;
      const Slots<float> slots(p, first + i);
      keys[j] = slots.used(k) ? slots.experts[k] : E;
      before[j] = atomic_add(m.counts + keys[j], 1);
    }
    sync_block();
    const int all = scan(m);
    char* list = workspace + plan.lists + chunk * plan.list_bytes;
    uint16_t* rows = reinterpret_cast<uint16_t*>(list) + k * plan.tokens;
    int32_t* tiles = reinterpret_cast<int32_t*>(list + plan.rows_bytes) + k * plan.tiles * 2;
    for (int j = 0; j < kTokensEach; ++j) {
      const int i = thread() + j * kThreads;
      if (i >= count) continue;
      const int start = m.starts[keys[j]], at = (start & 0xFFFF) + before[j];
      rows[at] = static_cast<uint16_t>(i);
      if (before[j] % kTileRows) continue;
      const int left = m.counts[keys[j]] - before[j], tile = (start >> 16) + before[j] / kTileRows;
      tiles[tile * 2] = keys[j] < E ? keys[j] : -1;
      tiles[tile * 2 + 1] = at | (left < kTileRows ? left : kTileRows) << 16;
    }
    for (int i = (all >> 16) + thread(); i < plan.tiles; i += kThreads) tiles[i * 2] = -1, tiles[i * 2 + 1] = 0;
  }

  // h[pair,r], its parts added in order
  MOERGE_DEVICE float value(int64_t pair, int r) const {
    const float* from = h + pair * p.R + r;
    const int64_t stride = p.T * p.K * p.R;
    const int parts = static_cast<int>(p.parts);
    float sum = 0;
    for (int first = 0; first < parts; first += kPartsAtOnce) {
      float part[kPartsAtOnce];
      for (int i = 0; i < kPartsAtOnce; ++i) part[i] = first + i < parts ? from[(first + i) * stride] : 0;
      for (int i = 0; i < kPartsAtOnce; ++i) sum += part[i];
    }
    return sum;
  }

  MOERGE_DEVICE float hidden(const Slots<float>& slots, int64_t t, int k, int r) const {
    if (r >= p.R) return 0;
    if (!p.factored) {
      const float its = value(t * p.K + k, r);
      return slots.used(k) ? slots.weights[k] * its : 0;
    }
    if (!slots.used(k)) return 0;
    float mean = 0;
    for (int j = 0; j < plan.K; ++j)
      if (slots.used(j)) mean += slots.weights[j] * value(t * p.K + j, r);
    return slots.weights[k] * mean;
  }

  // Two ranks of a pair for each thread.
  MOERGE_DEVICE void fill_hidden(int64_t block) const {
    const int words = plan.ranks / 2;
    const int64_t pair = block * (kThreads / words) + thread() / words;
    const int word = thread() % words;
    if (pair >= p.T * p.K) return;
    const int64_t t = static_cast<int32_t>(pair) / plan.K;
    const int k = static_cast<int32_t>(pair) % plan.K;
    const Slots<float> slots(p, t);
    const float low = hidden(slots, t, k, word * 2), high = hidden(slots, t, k, word * 2 + 1);
    reinterpret_cast<uint32_t*>(workspace)[pair * words + word] = pack<T>(low, high);
    if (word == 0) reinterpret_cast<float*>(workspace + plan.weights)[pair] = slots.used(k) ? slots.weights[k] : 0;
  }

  MOERGE_DEVICE void operator()() const {
    const int64_t sorts = plan.chunks * plan.K;
    if (block_x() < sorts)
      sort(static_cast<int>(block_x()) / plan.K, static_cast<int>(block_x()) % plan.K);
    else
      fill_hidden(block_x() - sorts);
  }
};

template <class T>
void run(const Lora& p, const void* h, const ExpandPlan& plan, void* workspace, Stream stream) {
  const int64_t pairs_each = kThreads / (plan.ranks / 2);
  launch({plan.chunks * plan.K + ceil_div(p.T * p.K, pairs_each)}, LoraExpandSort<T>::shared(p.E), stream,
         LoraExpandSort<T>{p, static_cast<const float*>(h), plan, static_cast<char*>(workspace)});
}

}  // namespace

void expand_prepare(const Lora& p, const void* h, const Factors& w, void* workspace, Stream stream) {
  const ExpandPlan plan(p, w);
  if (w.dtype == DType::bf16)
    run<bf16>(p, h, plan, workspace, stream);
  else
    run<f16>(p, h, plan, workspace, stream);
}

}  // namespace moerge::cuda
