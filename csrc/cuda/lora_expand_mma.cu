// out[t,c] = base[t,c] + sum_k H[t,k,:] . w[e,:,c] + sum_k w_tk bias[e,c] for many tokens: a block has a chunk of
// tokens and kExpandColumns columns, and goes through the slots in turn. In each slot the tokens are sorted by expert
// (see lora_expand.cuh), and a warp takes a tile of up to 16 of one expert at a time: H of its rows by the expert's
// factor.
//
// A token is in one tile of a slot, and a barrier lies between slots, so that its sum has one owner at a time and the
// order of its slots. Between slots sums lie in shared memory; base is read and out written once, by the tiles of the
// last slot. Rows of other experts are in no product: a NaN in an expert reaches only the tokens that use it.
//
// Fragments come from global memory as they lie there, without a stop in shared memory: a product does not depend on
// the order of the ranks, as long as H and w have the same one, so that a lane takes four neighbouring ranks; nor does
// it matter which columns a fragment has, so that a lane takes kWide neighbours of w, and has twice as many of a row of
// the result. What a tile reads is on its way while the tile before it is multiplied, across slots too.
//
// On an H200 it takes 7.9, 11.2 and 47 us, and the sort 2.5, 2.7 and 4.4. The kernel before it, whose blocks went
// through all experts of their tokens with most rows of a product thrown away, took 24, 95 and 650 us for 64, 512 and
// 4096 tokens on an H200 (4096 columns, 36 experts, K 2, R 16, bfloat16).
#include "lora_expand.cuh"

namespace moerge::cuda {

namespace {

constexpr int kWide = kExpandColumns / 8;
constexpr int64_t kMostStride = (int64_t(1) << 30) - 1;  // elements; in bytes strides are 32-bit numbers

template <class T, int ranks, bool kRanksAdjacent, bool kBias>
struct LoraExpandMma {
  static constexpr int kThreads = 32 * kExpandWarps;
  static constexpr int kLeastBlocks = 2;
  static constexpr const char* kName = "lora_expand_mma";
  static constexpr int kSteps = ranks / 16;
  ExpandPlan plan;
  const char *prepared, *w, *base;  // base may be null
  char* out;
  int R, columns, w_expert, w_rank, w_column, base_stride, out_stride;  // strides in bytes
  Matrix bias;

  // What a thread begins with. Its pointers are to the chunk's first token, or to the first expert.
  struct Block {
    char* sums;              // [tokens, kExpandColumns] floats, with the lane's place in a row: see finish
    const char* experts;     // of the lists
    const char* rows;        // with the lane's row of a tile
    const char *hidden, *w;  // with the lane's ranks and columns
    const char* base;        // with the columns of the lane's results
    char* out;
    const float* weights;
    int ranks_left;  // from the lane's first on
    int column;      // of the lane's results
  };

  // A warp's tile, and the tokens of the two rows that this lane has of its product, as the list has them. k = K: none.
  struct Tile {
    int k, index;
    int expert, row[2];
  };
  // What is read of a tile ahead of time: 16 ranks of the factors, before they are put in order, and base.
  struct Ahead {
    uint32_t a[4], b[4][kWide / 2], base[2][kWide];
  };

  // This tile or, where there is none, the warp's first of a later slot.
  MOERGE_DEVICE Tile tile_from(const Block& m, int k, int index) const {
    for (; k < plan.K; ++k, index = warp()) {
      uint32_t expert[1];
      load_words<1>(expert, m.experts + (k * (plan.tiles + kExpandWarps) + index) * 4);
      if (static_cast<int>(expert[0]) == kNoTile) continue;
      const int16_t* rows = reinterpret_cast<const int16_t*>(m.rows + (k * plan.tiles + index) * (kTileRows * 2));
      return {k, index, static_cast<int>(expert[0]), {rows[0], rows[8]}};
    }
    return {k, 0, -1, {0, 0}};
  }

  MOERGE_DEVICE void read(const Block& m, const Tile& tile, int step, Ahead& f) const {
    for (int half = 0; half < 2; ++half) {
      uint32_t pair[2];
      const int row = tile.row[half] & ~kAgain;
      load_words<2>(pair, m.hidden + (row * plan.K + tile.k) * (ranks * 2) + step * 32);
      f.a[half] = pair[0], f.a[half + 2] = pair[1];
    }
    const int64_t line = kRanksAdjacent ? w_column : w_rank;
    const char* from = m.w + int64_t(tile.expert) * w_expert + int64_t(kRanksAdjacent ? 2 : w_rank) * (step * 16);
    if (tile.expert >= 0 && R == ranks) {
      for (int j = 0; j < 4; ++j) load_words<kWide / 2>(f.b[j], from + line * j);
      return;
    }
    const int left = tile.expert < 0 ? 0 : m.ranks_left - step * 16;
    for (int j = 0; j < 4; ++j) {
      for (int n = 0; n < kWide / 2; ++n) f.b[j][n] = 0;
      if (left > (kRanksAdjacent ? 0 : j)) load_words<kWide / 2>(f.b[j], from + line * j);
    }
  }

  MOERGE_DEVICE void read_base(const Block& m, const Tile& tile, Ahead& f) const {
    for (int half = 0; half < 2; ++half)
      load_words<kWide>(f.base[half], m.base + int64_t(tile.row[half] & ~kAgain) * base_stride);
  }

  MOERGE_DEVICE void multiply(const Ahead& f, float (&sum)[kWide][4]) const {
    for (int j = 0; j < kWide; ++j) {
      if constexpr (kRanksAdjacent)
        mma<T>(sum[j], f.a, {f.b[j][0], f.b[j][1]});
      else if (j % 2 == 0)
        mma<T>(sum[j], f.a, {low_halves(f.b[0][j / 2], f.b[1][j / 2]), low_halves(f.b[2][j / 2], f.b[3][j / 2])});
      else
        mma<T>(sum[j], f.a, {high_halves(f.b[0][j / 2], f.b[1][j / 2]), high_halves(f.b[2][j / 2], f.b[3][j / 2])});
    }
  }

  MOERGE_DEVICE void add_bias(const Block& m, const Tile& tile, float (&sum)[kWide][4]) const {
    float weight[2];
    for (int half = 0; half < 2; ++half) weight[half] = m.weights[(tile.row[half] & ~kAgain) * plan.K + tile.k];
    for (int j = 0; j < 2 * kWide; ++j) {
      const float value = load_as<float>(bias.data, bias.dtype, tile.expert * bias.stride + m.column + j);
      for (int half = 0; half < 2; ++half) sum[j % kWide][half * 2 + j / kWide] += weight[half] * value;
    }
  }

  // The lane's neighbouring columns of one row: the sum so far is added, and the sum left for the next slot or, with
  // the last, written to out. Half of them lie together; rows of an even and of an odd number use different banks.
  template <bool kLast>
  MOERGE_DEVICE void finish(const Block& m, int k, int row, const uint32_t (&before)[kWide],
                            float (&value)[2 * kWide]) const {
    char* const sums = m.sums + row * (kExpandColumns * 4);
    const int first = (row & 1) * (kExpandColumns * 2);
    for (int half = 0; k > 0 && half < 2; ++half) {
      uint32_t words[4];
      load_words<4>(words, sums + (first ^ half * (kExpandColumns * 2)));
      for (int j = 0; j < 4; ++j) value[half * 4 + j] += as_float(words[j]);
    }
    if constexpr (!kLast) {
      for (int half = 0; half < 2; ++half) {
        const float* v = value + half * 4;
        store_words<4>(sums + (first ^ half * (kExpandColumns * 2)),
                       {as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
      }
    } else if (m.column < columns) {
      for (int j = 0; base && j < kWide; ++j)
        value[2 * j] += low_half<T>(before[j]), value[2 * j + 1] += high_half<T>(before[j]);
      uint32_t words[kWide];
      for (int j = 0; j < kWide; ++j) words[j] = pack<T>(value[2 * j], value[2 * j + 1]);
      store_words<kWide>(m.out + int64_t(row) * out_stride, words);
    }
  }

  // `tile`, whose first fragments are in f0, becomes the next one; its first are then in f0, or with one step in f1.
  template <bool kLast>
  MOERGE_DEVICE void run_tile(const Block& m, Tile& tile, Ahead& f0, Ahead& f1) const {
    const Tile now = tile;
    const auto next = [&](Ahead& f) {
      tile = tile_from(m, now.k, now.index + kExpandWarps);
      if (tile.k < plan.K) read(m, tile, 0, f);
      if (kSteps == 1 && base && tile.k == plan.K - 1) read_base(m, tile, f);
    };
    float sum[kWide][4] = {};
    if constexpr (kSteps == 1) {
      next(f1);
      multiply(f0, sum);
    } else {
      if (kLast && base) read_base(m, now, f1);
      for (int step = 0; step < kSteps; step += 2) {
        read(m, now, step + 1, f1);
        multiply(f0, sum);
        if (step + 2 < kSteps)
          read(m, now, step + 2, f0);
        else
          next(f0);
        multiply(f1, sum);
      }
    }
    if (kBias && now.expert >= 0 && m.column < columns) add_bias(m, now, sum);
    for (int half = 0; half < 2; ++half) {
      if (now.row[half] < 0) continue;
      float value[2 * kWide];
      for (int j = 0; j < 2 * kWide; ++j) value[j] = sum[j % kWide][half * 2 + j / kWide];
      finish<kLast>(m, now.k, now.row[half], kSteps == 1 ? f0.base[half] : f1.base[half], value);
    }
  }

  // All of the warp's tiles of slot k. turned: the next tile's fragments are in f1.
  template <bool kLast>
  MOERGE_DEVICE void run_slot(const Block& m, int k, Tile& tile, Ahead& f0, Ahead& f1, bool& turned) const {
    for (; tile.k == k; turned = kSteps == 1 && !turned)
      turned ? run_tile<kLast>(m, tile, f1, f0) : run_tile<kLast>(m, tile, f0, f1);
  }

  MOERGE_DEVICE Block begin() const {
    const int across = (columns + kExpandColumns - 1) / kExpandColumns, block = static_cast<int>(block_x());
    const int64_t chunk = block / across, first = chunk * plan.tokens;
    const int column = block % across * kExpandColumns, i = lane() % 4;
    Shared shared;
    Block m;
    m.sums = shared.take<char>(plan.K > 1 ? plan.tokens * kExpandColumns * 4 : 0) + i * 16;
    char* list = shared.take<char>(plan.list_bytes);
    const char* from = prepared + plan.lists + chunk * plan.list_bytes;
    for (int at = thread() * 16; at < plan.list_bytes; at += kThreads * 16) async_copy16(list + at, from + at, true);
    async_commit();
    m.experts = list;
    m.rows = list + plan.experts_bytes + lane() / 4 * 2;
    m.hidden = prepared + (first * plan.K * ranks + i * 4) * 2;
    int its = column + lane() / 4 * kWide;  // columns of the lane's fragments; what lies behind the last is not used
    if (its > columns - kWide) its = columns - kWide;
    m.w = w + int64_t(its) * w_column + int64_t(i * 4) * w_rank;
    m.ranks_left = R - i * 4;
    m.column = column + i * (2 * kWide);
    const int inside = m.column < columns ? m.column : columns - 2 * kWide;
    m.base = base ? base + first * base_stride + inside * 2 : nullptr;
    m.out = out + first * out_stride + inside * 2;
    m.weights = reinterpret_cast<const float*>(prepared + plan.weights) + first * plan.K;
    async_wait<0>();
    sync_block();
    return m;
  }

  MOERGE_DEVICE void operator()() const {
    const Block m = begin();
    Tile tile = tile_from(m, 0, warp());
    Ahead f0, f1;
    if (tile.k < plan.K) read(m, tile, 0, f0);
    if (kSteps == 1 && base && tile.k == plan.K - 1) read_base(m, tile, f0);
    bool turned = false;
    for (int k = 0; k < plan.K - 1; ++k) {
      run_slot<false>(m, k, tile, f0, f1, turned);
      sync_block();  // the sums are there for the next slot
    }
    run_slot<true>(m, plan.K - 1, tile, f0, f1, turned);
  }
};

template <class T, int ranks, bool kRanksAdjacent, bool kBias>
void start(const Lora& p, const void* prepared, const Factors& w, const Matrix& base, const Matrix& bias,
           const Matrix& out, Stream stream) {
  const ExpandPlan plan(p, w);
  const auto bytes = [](int64_t elements) { return static_cast<int>(elements * 2); };
  launch({plan.chunks * ceil_div(w.columns, kExpandColumns)}, plan.shared(), stream,
         LoraExpandMma<T, ranks, kRanksAdjacent, kBias>{
             plan, static_cast<const char*>(prepared), static_cast<const char*>(w.data),
             static_cast<const char*>(base.data), static_cast<char*>(out.data), static_cast<int>(w.ranks),
             static_cast<int>(w.columns), bytes(w.expert), bytes(w.rank), bytes(w.column), bytes(base.stride),
             bytes(out.stride), bias});
}

template <class T, int ranks>
void run(const Lora& p, const void* prepared, const Factors& w, const Matrix& base, const Matrix& bias,
         const Matrix& out, Stream stream) {
  if (ranks_adjacent(w) && bias.data) return start<T, ranks, true, true>(p, prepared, w, base, bias, out, stream);
  if (ranks_adjacent(w)) return start<T, ranks, true, false>(p, prepared, w, base, bias, out, stream);
  if (bias.data) return start<T, ranks, false, true>(p, prepared, w, base, bias, out, stream);
  start<T, ranks, false, false>(p, prepared, w, base, bias, out, stream);
}

template <class T>
void run_ranks(const Lora& p, const void* prepared, const Factors& w, const Matrix& base, const Matrix& bias,
               const Matrix& out, Stream stream) {
  switch (padded_ranks(p.R)) {
    case 16:
      return run<T, 16>(p, prepared, w, base, bias, out, stream);
    case 32:
      return run<T, 32>(p, prepared, w, base, bias, out, stream);
    case 64:
      return run<T, 64>(p, prepared, w, base, bias, out, stream);
    default:
      return run<T, 128>(p, prepared, w, base, bias, out, stream);
  }
}

Reason against(const Lora& p, const Factors& w, DType out) {
  if (p.T == 0 || p.K == 0 || p.R == 0) return "there is nothing to multiply";
  if (p.K > kMostSlots || p.E > kMostExperts) return "too many experts, or too many of them per token";
  if (p.wide) return "float64";
  if (Reason reason = against_copies(w)) return reason;
  if (out != w.dtype) return "base and experts are of different types";
  const int64_t line = w.rank > w.column ? w.rank : w.column;
  return w.expert > kMostStride || line > kMostStride || w.columns > kMostStride ? "the factors are too far apart"
                                                                                 : nullptr;
}

}  // namespace

Reason expand_against_tensor_cores(const Lora& p, const Factors& w, const Matrix& base, const Matrix& out) {
  if (Reason reason = against(p, w, out.dtype)) return reason;
  if (base.data && base.dtype != w.dtype) return "base and experts are of different types";
  if (base.stride > kMostStride || out.stride > kMostStride) return "the tokens are too far apart";
  const bool aligned = aligned16(out.data, out.stride * 2) && (!base.data || aligned16(base.data, base.stride * 2));
  return aligned ? nullptr : "the base does not begin at multiples of 16 bytes";
}

int64_t expand_workspace(const Lora& p, const Factors& w, DType out) {
  return against(p, w, out) ? 0 : ExpandPlan(p, w).bytes;
}

void lora_expand_mma(const Lora& p, const void* prepared, const Factors& w, const Matrix& base, const Matrix& bias,
                     const Matrix& out, Stream stream) {
  if (w.dtype == DType::bf16)
    run_ranks<bf16>(p, prepared, w, base, bias, out, stream);
  else
    run_ranks<f16>(p, prepared, w, base, bias, out, stream);
}

}  // namespace moerge::cuda
