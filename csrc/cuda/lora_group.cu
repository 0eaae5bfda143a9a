// The pairs of each expert, in ascending order: a counting sort without atomics, so that the lists are always the same.
// One block per expert reads all ids (they are few and in the cache): first it counts, then it writes.
#include "lora.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class Acc>
MOERGE_DEVICE bool belongs(const Lora& p, bool skip_zero, int64_t pair, int64_t expert) {
  if (pair >= p.T * p.K) return false;
  const Slots<Acc> slots(p, pair / p.K);
  const int64_t k = pair % p.K;
  return (skip_zero ? slots.used(k) : slots.named(k)) && slots.experts[k] == expert;
}

MOERGE_DEVICE int tiles_of(int count) {
  return (count + static_cast<int>(kTilePairs) - 1) / static_cast<int>(kTilePairs);
}

template <class Acc>
struct GroupCount {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_group_count";
  Lora p;
  bool skip_zero;
  Groups g;

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    int* slots = shared.take<int>(kWarps);
    int count = 0;
    for (int64_t pair = thread(); pair < p.T * p.K; pair += kThreads)
      count += belongs<Acc>(p, skip_zero, pair, block_x());
    count = block_sum<kThreads>(count, slots);
    if (thread() == 0) g.counts[block_x()] = count;
  }
};

template <class Acc>
struct GroupFill {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_group_fill";
  Lora p;
  bool skip_zero;
  Groups g;

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    int* slots = shared.take<int>(kWarps);
    const int64_t expert = block_x();
    int at = 0, tile = 0;
    for (int64_t e = thread(); e < expert; e += kThreads) {
      at += g.counts[e];
      tile += tiles_of(g.counts[e]);
    }
    at = block_sum<kThreads>(at, slots);
    tile = block_sum<kThreads>(tile, slots);
    const int count = g.counts[expert];
    if (thread() == 0) {
      g.offsets[expert] = at, g.tiles[expert] = tile;
      if (expert == p.E - 1) g.offsets[p.E] = at + count, g.tiles[p.E] = tile + tiles_of(count);
    }
    for (int i = thread(); i < tiles_of(count); i += kThreads) g.tile_expert[tile + i] = static_cast<int32_t>(expert);
    for (int64_t first = 0; first < p.T * p.K; first += kThreads) {
      const int64_t pair = first + thread();
      const bool mine = belongs<Acc>(p, skip_zero, pair, expert);
      const uint32_t votes = ballot(mine);
      if (lane() == 0) slots[warp()] = count_bits(votes);
      sync_block();
      int before = 0, all = 0;
      for (int i = 0; i < kWarps; ++i) {
        if (i < warp()) before += slots[i];
        all += slots[i];
      }
      if (mine) g.order[at + before + count_bits(votes & ((1u << lane()) - 1))] = static_cast<int32_t>(pair);
      at += all;
      sync_block();
    }
  }
};

template <class Acc>
void run_group(const Lora& p, bool skip_zero, const Groups& groups, Stream stream) {
  const size_t shared = shared_size(kWarps * sizeof(int));
  launch({p.E}, shared, stream, GroupCount<Acc>{p, skip_zero, groups});
  launch({p.E}, shared, stream, GroupFill<Acc>{p, skip_zero, groups});
}

}  // namespace

void group_pairs(const Lora& p, bool skip_zero, const Groups& groups, Stream stream) {
  if (p.wide)
    run_group<double>(p, skip_zero, groups, stream);
  else
    run_group<float>(p, skip_zero, groups, stream);
}

}  // namespace moerge::cuda
