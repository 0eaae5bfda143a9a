// The pairs of each expert, in ascending order: a counting sort without atomics, so that the lists are always the same.
// One block per expert reads all ids (they are few and in the cache): first it counts its own and those of the experts
// before it, then it writes.
#include "lora.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class Acc>
struct GroupPairs {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_group_pairs";
  Lora p;
  bool skip_zero;
  Groups g;
  int64_t tiles;  // that there is room for

  // Where the expert's pairs begin, and its tiles; those it does not fill hold nothing.
  MOERGE_DEVICE void place(int32_t expert, int begin, int count) const {
    constexpr int kTile = static_cast<int>(kTilePairs);
    const bool last = expert == p.E - 1;
    const int first = begin / kTile + expert, filled = (count + kTile - 1) / kTile;
    const int next = last ? static_cast<int>(tiles) : (begin + count) / kTile + expert + 1;
    if (thread() == 0) {
      g.offsets[expert] = begin;
      if (last) g.offsets[p.E] = begin + count;
    }
    for (int i = first + thread(); i < next; i += kThreads) g.tile_expert[i] = i - first < filled ? expert : -1;
  }

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    int32_t* slots = shared.take<int32_t>(kWarps);
    const int32_t expert = static_cast<int32_t>(block_x());
    int32_t before = 0, count = 0;
    for (int64_t pair = thread(); pair < p.T * p.K; pair += kThreads) {
      const int32_t its = expert_of<Acc>(p, pair, skip_zero);
      before += its >= 0 && its < expert;
      count += its == expert;
    }
    int at = block_sum<kThreads>(before, slots);
    place(expert, at, block_sum<kThreads>(count, slots));
    for (int64_t first = 0; first < p.T * p.K; first += kThreads) {
      const int64_t pair = first + thread();
      const bool mine = expert_of<Acc>(p, pair, skip_zero) == expert;
      const Rank rank = block_rank<kThreads>(mine, slots);
      if (mine) g.order[at + rank.before] = static_cast<int32_t>(pair);
      at += rank.all;
    }
  }
};

template <class Acc>
void run_group(const Lora& p, bool skip_zero, const Groups& groups, Stream stream) {
  launch({p.E}, shared_size(kWarps * sizeof(int32_t)), stream, GroupPairs<Acc>{p, skip_zero, groups, most_tiles(p)});
}

}  // namespace

void group_pairs(const Lora& p, bool skip_zero, const Groups& groups, Stream stream) {
  if (p.wide)
    run_group<double>(p, skip_zero, groups, stream);
  else
    run_group<float>(p, skip_zero, groups, stream);
}

}  // namespace moerge::cuda
