// h[parts,pair,r] = sum_c x[token,c] w[expert,r,c] for many tokens: a block has up to 64 pairs of one expert (their
// rows of x are gathered) and all ranks, and walks over its part of the columns with kStages tiles of 64 under way.
// Each warp owns 16 pairs, so a sum has one owner and a fixed order.
//
// Which pairs: a tile of the sorted list (Groups); or, while all pairs are few, those of one expert that the block
// finds by looking at all ids itself, which saves the launch that sorts.
#include "lora_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64, kStages = 3;
constexpr int kRowStride = kColumns + kPad;

template <class T, int ranks, bool kRanksAdjacent>
struct LoraShrinkMma {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = ranks <= 64 ? 4 : 3;
  static constexpr const char* kName = "lora_shrink_mma";
  static constexpr int kTile = kTileElements<ranks, kColumns, kRanksAdjacent>;
  static constexpr size_t kShared = shared_size(kStages * kTilePairs * kRowStride * 2) +
                                    shared_size(kStages * kTile * 2) + shared_size(kShrinkSearches * 4) +
                                    shared_size(kThreads / 32 * 4);
  Lora p;
  Matrix x;
  Factors w;
  bool skip_zero;
  Groups g;  // order null: the block searches
  float* h;

  struct Memory {
    T *rows, *factors;       // [kStages, kTilePairs, kRowStride], [kStages, kTile]
    int32_t *found, *votes;  // [kShrinkSearches], [kThreads / 32]
  };

  // Rows of x that this thread copies: thread / 8 + 16 i for i < 4, 8 columns of each tile.
  struct Source {
    const T* row[4];  // null: none
  };

  MOERGE_DEVICE void copy_stage(const Memory& m, const Source& source, int64_t expert, int64_t tile,
                                int64_t end) const {
    const int64_t stage = tile % kStages, first = tile * kColumns;
    const int64_t column = first + thread() % 8 * 8;
    if (tile < end) {
      for (int i = 0; i < 4; ++i) {
        const bool valid = source.row[i] && column < w.columns;
        T* to = m.rows + (stage * kTilePairs + thread() / 8 + 16 * i) * kRowStride + thread() % 8 * 8;
        async_copy16(to, valid ? source.row[i] + column : static_cast<const T*>(x.data), valid);
      }
      copy_tile<T, kThreads, ranks, kColumns, kRanksAdjacent>(w, expert, first, m.factors + stage * kTile);
    }
    async_commit();  // an empty group at the end keeps the count right
  }

  MOERGE_DEVICE void multiply(const T* rows, const T* factors, float (&sum)[ranks / 8][4]) const {
    constexpr int kStride = kRanksAdjacent ? ranks + kPad : kColumns + kPad;
    for (int k = 0; k < kColumns; k += 16) {
      uint32_t a[4];
      load_matrices<false>(a, rows + (warp() * 16 + lane() % 16) * kRowStride + k + lane() / 16 * 8);
      for (int n = 0; n < ranks; n += 16) {
        uint32_t b[4];
        load_right<!kRanksAdjacent>(b, factors, kStride, k, n);
        mma<T>(sum[n / 8], a, {b[0], b[1]});
        mma<T>(sum[n / 8 + 1], a, {b[2], b[3]});
      }
    }
  }

  // `count` pairs of one expert, at most kTilePairs.
  MOERGE_DEVICE void run_tile(const Memory& m, int64_t expert, const int32_t* pairs, int count) const {
    Source source;
    for (int i = 0; i < 4; ++i) {
      const int row = thread() / 8 + 16 * i;
      source.row[i] = row < count ? static_cast<const T*>(x.data) + pairs[row] / p.K * x.stride : nullptr;
    }
    const int64_t tiles = (w.columns + kColumns - 1) / kColumns;
    const int64_t from = tiles * block_y() / p.parts, to = tiles * (block_y() + 1) / p.parts;
    for (int64_t tile = from; tile < from + kStages - 1; ++tile) copy_stage(m, source, expert, tile, to);
    float sum[ranks / 8][4] = {};
    for (int64_t tile = from; tile < to; ++tile) {
      async_wait<kStages - 2>();
      sync_block();  // this tile is here, and nobody reads the one that is overwritten next
      copy_stage(m, source, expert, tile + kStages - 1, to);
      const int64_t stage = tile % kStages;
      if (warp() * 16 < count) multiply(m.rows + stage * kTilePairs * kRowStride, m.factors + stage * kTile, sum);
    }
    for (int half = 0; half < 2; ++half) {
      const int row = warp() * 16 + lane() / 4 + half * 8;
      if (row >= count) continue;
      float* sums = h + (block_y() * p.T * p.K + pairs[row]) * p.R;
      for (int n = 0; n < ranks / 8; ++n)
        for (int j = 0; j < 2; ++j)
          if (const int r = n * 8 + lane() % 4 * 2 + j; r < p.R) sums[r] = sum[n][half * 2 + j];
    }
  }

  // The pairs of an expert into m.found, in order; returns how many.
  MOERGE_DEVICE int search(const Memory& m, int64_t expert) const {
    int count = 0;
    for (int64_t first = 0; first < p.T * p.K; first += kThreads) {
      const int64_t pair = first + thread();
      const bool mine = expert_of<float>(p, pair, skip_zero) == expert;
      const Rank rank = block_rank<kThreads>(mine, m.votes);
      if (mine) m.found[count + rank.before] = static_cast<int32_t>(pair);
      count += rank.all;
    }
    sync_block();
    return count;
  }

  MOERGE_DEVICE void operator()() const {
    constexpr int kTilePairs = static_cast<int>(cuda::kTilePairs);
    Shared shared;
    Memory m;
    m.rows = shared.take<T>(kStages * kTilePairs * kRowStride);
    m.factors = shared.take<T>(kStages * kTile);
    m.found = shared.take<int32_t>(kShrinkSearches);
    m.votes = shared.take<int32_t>(kThreads / 32);
    int64_t expert = block_x();
    const int32_t* pairs = m.found;
    int count;
    if (g.order) {
      expert = g.tile_expert[block_x()];
      if (expert < 0) return;
      const int64_t first_tile = g.offsets[expert] / kTilePairs + expert;
      const int32_t begin = g.offsets[expert] + static_cast<int32_t>((block_x() - first_tile) * kTilePairs);
      const int32_t left = g.offsets[expert + 1] - begin;
      pairs = g.order + begin, count = left < kTilePairs ? left : kTilePairs;
    } else {
      count = search(m, expert);
    }
    for (int begin = 0; begin < count; begin += kTilePairs) {
      if (begin > 0) sync_block();  // nobody reads the tiles of the pairs before
      run_tile(m, expert, pairs + begin, count - begin < kTilePairs ? count - begin : kTilePairs);
    }
  }
};

template <class T, int ranks, bool kRanksAdjacent>
void run(const Lora& p, const Matrix& x, const Factors& w, bool skip_zero, const Groups& groups, void* h,
         Stream stream) {
  using Kernel = LoraShrinkMma<T, ranks, kRanksAdjacent>;
  static_assert(Kernel::kShared <= kMostShared);
  launch({groups.order ? most_tiles(p) : p.E, p.parts}, Kernel::kShared, stream,
         Kernel{p, x, w, skip_zero, groups, static_cast<float*>(h)});
}

template <class T, int ranks>
void run_layout(const Lora& p, const Matrix& x, const Factors& w, bool skip_zero, const Groups& groups, void* h,
                Stream stream) {
  if (ranks_adjacent(w))
    run<T, ranks, true>(p, x, w, skip_zero, groups, h, stream);
  else
    run<T, ranks, false>(p, x, w, skip_zero, groups, h, stream);
}

template <class T>
void run_ranks(const Lora& p, const Matrix& x, const Factors& w, bool skip_zero, const Groups& groups, void* h,
               Stream stream) {
  switch (padded_ranks(p.R)) {
    case 16:
      return run_layout<T, 16>(p, x, w, skip_zero, groups, h, stream);
    case 32:
      return run_layout<T, 32>(p, x, w, skip_zero, groups, h, stream);
    case 64:
      return run_layout<T, 64>(p, x, w, skip_zero, groups, h, stream);
    default:
      return run_layout<T, 128>(p, x, w, skip_zero, groups, h, stream);
  }
}

}  // namespace

bool shrink_uses_groups(const Lora& p, const Matrix& x, const Factors& w) {
  return p.T * p.K > kShrinkSearches && !shrink_against_tensor_cores(p, x, w);
}

Reason shrink_against_tensor_cores(const Lora& p, const Matrix& x, const Factors& w) {
  if (p.T < kLoraMmaTokens) return "few tokens";
  if (p.E == 0 || p.K == 0 || p.R == 0) return "there is nothing to multiply";
  if (p.wide) return "float64";
  if (x.dtype != w.dtype) return "tokens and experts are of different types";
  if (Reason reason = against_copies(w)) return reason;
  return aligned16(x.data, x.stride * 2) ? nullptr : "the tokens do not begin at multiples of 16 bytes";
}

int64_t shrink_parts(const Lora& p, const Matrix& x, const Factors& w) {
  if (shrink_against_tensor_cores(p, x, w)) return 1;
  const int64_t pairs = p.T * p.K, tiles = ceil_div(pairs, kTilePairs) + (pairs < p.E ? pairs : p.E);
  return parts_for(kShrinkBlocks, tiles, ceil_div(w.columns, kColumns), kShrinkParts);
}

void lora_shrink_mma(const Lora& p, const Matrix& x, const Factors& w, bool skip_zero, const Groups& groups, void* h,
                     Stream stream) {
  if (x.dtype == DType::bf16)
    run_ranks<bf16>(p, x, w, skip_zero, groups, h, stream);
  else
    run_ranks<f16>(p, x, w, skip_zero, groups, h, stream);
}

}  // namespace moerge::cuda
