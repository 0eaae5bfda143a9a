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

  // A slot's expert, and its weight: 0 where it is not used. Both are read at once.
  struct Used {
    int32_t expert = -1;
    float weight = 0;

    MOERGE_DEVICE Used(const Slots<float>& slots, int k) {
      if (!slots.experts) return;
      expert = slots.experts[k], weight = slots.weights[k];
      if (expert < 0 || expert >= slots.p.E) weight = 0;
    }
  };

  struct Memory {
    int32_t *counts, *starts;  // [E + 1] tokens of an expert, and tiles before its own; the last is for no expert
    int32_t* totals;           // [kWarps]
  };

  static size_t shared(int64_t E) { return 2 * shared_size((E + 1) * 4) + shared_size(kWarps * 4); }

  // starts from counts; returns how many tiles there are.
  MOERGE_DEVICE int scan(const Memory& m) const {
    const int keys = static_cast<int>(p.E) + 1, each = (keys + kThreads - 1) / kThreads;
    const int from = thread() * each, to = from + each < keys ? from + each : keys;
    const auto tiles_of = [&](int key) { return (m.counts[key] + kTileRows - 1) / kTileRows; };
    int sum = 0;
    for (int key = from; key < to; ++key) sum += tiles_of(key);
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
      at += tiles_of(key);
    }
    sync_block();
    return all;
  }

  // The tiles of one slot of a chunk.
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
      const Used used(Slots<float>(p, first + i), k);
      keys[j] = used.weight != 0 ? used.expert : E;
    }
    for (int j = 0; j < kTokensEach; ++j)
      if (thread() + j * kThreads < count) before[j] = atomic_add(m.counts + keys[j], 1);
    sync_block();
    const int all = scan(m);
    char* list = workspace + plan.lists + int64_t(chunk) * plan.list_bytes;
    int32_t* experts = reinterpret_cast<int32_t*>(list) + k * (plan.tiles + kExpandWarps);
    int16_t* rows = reinterpret_cast<int16_t*>(list + plan.experts_bytes) + k * plan.tiles * kTileRows;
    for (int j = 0; j < kTokensEach; ++j) {
      const int i = thread() + j * kThreads;
      if (i >= count) continue;
      const int at = m.starts[keys[j]] * kTileRows + before[j];
      rows[at] = static_cast<int16_t>(i);
      if (before[j] % kTileRows == 0) experts[at / kTileRows] = keys[j] < E ? keys[j] : -1;
      for (int rest = at + 1; before[j] == m.counts[keys[j]] - 1 && rest % kTileRows; ++rest)
        rows[rest] = static_cast<int16_t>(i | kAgain);
    }
    for (int i = all + thread(); i < plan.tiles + kExpandWarps; i += kThreads) experts[i] = kNoTile;
  }

  // Adds factor * h[pair, r and r + 1] to sum, where there are such ranks; the parts of h are added in order.
  MOERGE_DEVICE void add(int64_t pair, int r, float factor, float (&sum)[2]) const {
    const float* from = h + pair * p.R + r;
    const int64_t stride = p.T * p.K * p.R;
    const int parts = static_cast<int>(p.parts);
    float all[2] = {};
    for (int first = 0; first < parts; first += kPartsAtOnce) {
      float part[kPartsAtOnce][2];
      for (int i = 0; i < kPartsAtOnce; ++i)
        for (int j = 0; j < 2; ++j) part[i][j] = first + i < parts && r + j < p.R ? from[(first + i) * stride + j] : 0;
      for (int i = 0; i < kPartsAtOnce; ++i)
        for (int j = 0; j < 2; ++j) all[j] += part[i][j];
    }
    for (int j = 0; j < 2; ++j) sum[j] += factor * all[j];
  }

  // Two ranks of a pair for each thread.
  MOERGE_DEVICE void fill_hidden(int64_t block) const {
    const int words = plan.ranks / 2, word = thread() % words;
    const int64_t pair = block * (kThreads / words) + thread() / words;
    if (pair >= p.T * p.K) return;
    const int64_t t = static_cast<int32_t>(pair) / plan.K;
    const int k = static_cast<int32_t>(pair) % plan.K;
    const Slots<float> slots(p, t);
    const float weight = Used(slots, k).weight;
    float sum[2] = {};
    if (!p.factored) add(pair, word * 2, 1, sum);  // what a slot that is not used has here is thrown away
    for (int j = 0; p.factored && j < plan.K; ++j)
      if (const float its = Used(slots, j).weight; its != 0) add(t * p.K + j, word * 2, its, sum);
    const uint32_t both = weight != 0 ? pack<T>(weight * sum[0], weight * sum[1]) : 0;
    reinterpret_cast<uint32_t*>(workspace)[pair * words + word] = both;
    if (word == 0) reinterpret_cast<float*>(workspace + plan.weights)[pair] = weight;
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
