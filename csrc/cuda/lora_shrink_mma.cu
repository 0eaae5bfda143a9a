// h[parts,pair,r] = sum_c x[token,c] w[expert,r,c] for many tokens: a block has up to 64 pairs of one expert (their
// rows of x are gathered) and all ranks, and walks over its part of the columns with kStages tiles of 64 under way.
// Each warp owns 16 pairs, so a sum has one owner and a fixed order.
//
// Which pairs: a tile of the sorted list (Groups); or, while all pairs are few, those of one expert that the block
// finds by looking at all ids itself, which saves the launch that sorts.
//
// The version before found its pairs with two barriers per 128 ids and computed every address anew, in 64 bits: on an
// H200 with 36 experts, D = 4096, K = 2, R = 16, bfloat16, it took 6.9, 8.1 and 24.2 us for 64, 512 and 4096 tokens.
// This one takes 5.7, 7.1 and 23.5 us.
#include "lora_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kRows = static_cast<int>(kTilePairs), kColumns = 64, kStages = 3;
static_assert(kShrinkSearches % kThreads == 0);
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
  bool skip_zero, direct;  // direct: pairs_are_slots
  Groups g;                // order null: the block searches
  float* h;

  struct Memory {
    T *rows, *factors;       // [kStages, kTilePairs, kRowStride], [kStages, kTile]
    int32_t *found, *votes;  // [kShrinkSearches], [kThreads / 32]
  };

  // What this thread copies of each tile: 8 columns of rows thread / 8 + 16 i of x, and 8 elements of the factors for
  // every i below ranks / 16, `factor_step` apart.
  struct Source {
    const T* row[4];  // at the thread's first column; null: none
    int rows;         // of 16 that there is a use for
    const T* factor;  // in the tile of the first columns
    int64_t factor_step;
    int column, columns, factor_rank, factor_column;
  };
  static constexpr int kRankStep = kRanksAdjacent ? 0 : 16, kColumnStep = kRanksAdjacent ? kThreads * 8 / ranks : 0;
  static constexpr int kFactorRow = kRanksAdjacent ? ranks : kColumns;  // of a tile in shared memory, without kPad

  MOERGE_DEVICE Source source_of(int64_t expert, const int32_t* pairs, int count) const {
    Source source;
    source.column = thread() % 8 * 8, source.columns = static_cast<int>(w.columns);
    source.rows = (count + 15) / 16;
    MOERGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = thread() / 8 + 16 * i;
      const uint32_t token = static_cast<uint32_t>(pairs[row < count ? row : 0]) / static_cast<uint32_t>(p.K);
      source.row[i] = row < count ? static_cast<const T*>(x.data) + token * x.stride + source.column : nullptr;
    }
    const int line = thread() / (kFactorRow / 8), chunk = thread() % (kFactorRow / 8) * 8;
    source.factor_rank = kRanksAdjacent ? chunk : line, source.factor_column = kRanksAdjacent ? line : chunk;
    source.factor = static_cast<const T*>(w.data) + expert * w.expert + source.factor_rank * w.rank +
                    source.factor_column * w.column;
    source.factor_step = kRankStep * w.rank + kColumnStep * w.column;
    return source;
  }

  // The tile of the columns from `first` on into stage `stage`.
  MOERGE_DEVICE void copy_stage(const Memory& m, const Source& source, int stage, int first, bool valid) const {
    if (valid) {
      const bool inside = first + source.column < source.columns;
      T* rows = m.rows + (stage * kRows + thread() / 8) * kRowStride + source.column;
      MOERGE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const bool there = inside && source.row[i];
        if (i < source.rows)
          async_copy16(rows + 16 * i * kRowStride, there ? source.row[i] + first : static_cast<const T*>(x.data),
                       there);
      }
      const T* from = source.factor + first * w.column;
      T* to = m.factors + stage * kTile + thread() / (kFactorRow / 8) * (kFactorRow + kPad) +
              thread() % (kFactorRow / 8) * 8;
      MOERGE_UNROLL
      for (int i = 0; i < ranks / 16; ++i) {
        const bool there = source.factor_rank + i * kRankStep < w.ranks &&
                           first + source.factor_column + i * kColumnStep < source.columns;
        async_copy16(to + i * (kThreads * 8 / kFactorRow) * (kFactorRow + kPad),
                     there ? from + i * source.factor_step : static_cast<const T*>(w.data), there);
      }
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
    const Source source = source_of(expert, pairs, count);
    const int64_t tiles = (w.columns + kColumns - 1) / kColumns;
    const int from = static_cast<int>(tiles * block_y() / p.parts);
    const int to = static_cast<int>(tiles * (block_y() + 1) / p.parts);
    MOERGE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) copy_stage(m, source, i, (from + i) * kColumns, from + i < to);
    float sum[ranks / 8][4] = {};
    int stage = 0;
    for (int tile = from; tile < to; ++tile) {
      async_wait<kStages - 2>();
      sync_block();  // this tile is here, and nobody reads the one that is overwritten next
      const int last = tile + kStages - 1;
      copy_stage(m, source, stage > 0 ? stage - 1 : kStages - 1, last * kColumns, last < to);
      if (warp() * 16 < count) multiply(m.rows + stage * kRows * kRowStride, m.factors + stage * kTile, sum);
      stage = stage + 1 < kStages ? stage + 1 : 0;
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

  // The pairs of an expert into m.found, in order; returns how many. Each warp looks at a run of them.
  MOERGE_DEVICE int search(const Memory& m, int32_t expert) const {
    constexpr int kWarps = kThreads / 32, kEach = static_cast<int>(kShrinkSearches) / kThreads;
    const uint32_t pairs = static_cast<uint32_t>(p.T * p.K), first = warp() * kEach * 32;
    int32_t ids[kEach];
    if (direct)
      experts_of<float, true>(p, skip_zero, first, pairs, ids);
    else
      experts_of<float, false>(p, skip_zero, first, pairs, ids);
    uint32_t votes[kEach];
    int mine = 0;
    MOERGE_UNROLL
    for (int j = 0; j < kEach; ++j) votes[j] = ballot(ids[j] == expert), mine += count_bits(votes[j]);
    if (lane() == 0) m.votes[warp()] = mine;
    sync_block();
    int at = 0, all = 0;
    MOERGE_UNROLL
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp()) at += m.votes[i];
      all += m.votes[i];
    }
    MOERGE_UNROLL
    for (int j = 0; j < kEach; ++j) {
      if (ids[j] == expert)
        m.found[at + count_bits(votes[j] & ((1u << lane()) - 1))] = static_cast<int32_t>(first + j * 32 + lane());
      at += count_bits(votes[j]);
    }
    sync_block();
    return all;
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
      count = search(m, static_cast<int32_t>(expert));
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
         Kernel{p, x, w, skip_zero, pairs_are_slots(p), groups, static_cast<float*>(h)});
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
  if (p.T == 0 || p.E == 0 || p.K == 0 || p.R == 0) return "there is nothing to multiply";
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
