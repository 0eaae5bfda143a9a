// out[t,c] = base[t,c] + sum_k H[t,k,:] . w[e,:,c] + sum_k w_tk bias[e,c] for many tokens: a block has a chunk of
// tokens and kExpandColumns columns, and goes through the slots in turn. In each the tokens are sorted by expert (see
// lora_expand.cuh), and a warp takes a tile of up to 16 of one expert at a time: H of its rows by the expert's factor.
//
// A token is in one tile of a slot, and slots are a barrier apart, so that its sum has one owner at a time and the
// order of its slots. Between slots sums lie in shared memory; base is read and out written once, by the tiles of the
// last slot. Nothing else is shared: fragments come from global memory as they lie, since any order of the ranks will
// do that H and w have in common (a lane has four neighbours), and any order of the columns (a lane has kWide
// neighbours, and so twice as many of its rows of the product). The fragments of a tile are on their way while the one
// before it is multiplied, across slots too. Rows of other experts are in no product: a NaN in an expert reaches only
// the tokens that use it.
#include "lora_expand.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWide = kExpandColumns / 8;
constexpr int64_t kMostStride = int64_t(1) << 26;  // elements: 16 of them are below 2^31 bytes

// The first, or the second, halves of two words.
MOERGE_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
MOERGE_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

template <class T, int ranks, bool kRanksAdjacent, bool kBias>
struct LoraExpandMma {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = ranks <= 32 ? kExpandTogether : 2;
  static constexpr const char* kName = "lora_expand_mma";
  static constexpr int kSteps = ranks / 16;
  ExpandPlan plan;
  const char *prepared, *w, *base;  // base may be null
  char* out;
  int R, columns, w_expert, w_rank, w_column, base_stride, out_stride;  // strides in bytes
  Matrix bias;

  // What a thread begins with. Its pointers are to the chunk's first token, or to the first expert.
  struct Block {
    const uint16_t* rows;  // of the lists
    const char* tiles;
    char* sums;              // [tokens, kExpandColumns] floats, with the lane's place in a row: see sums_at
    const char *hidden, *w;  // with the lane's ranks and columns
    const char* base;        // with the columns of the lane's results
    char* out;
    const float* weights;
    int ranks_left;  // from the lane's first on
    int column;      // of the lane's results
  };

  // A warp's tile, and the tokens of the two rows that this lane has of its product (where there are not so many: of
  // the last). k = K: none.
  struct Tile {
    int k, index;
    int expert, count, row[2];
  };
  // 16 ranks of the factors of a tile, before they are put in order.
  struct Fragments {
    uint32_t a[4], b[4][kWide / 2];
  };

  // The first tile that is not empty: this one, or the warp's first of a later slot.
  MOERGE_DEVICE Tile tile_from(const Block& m, int k, int index) const {
    for (;; ++k, index = warp()) {
      if (k == plan.K) return {k, 0, -1, 0, {0, 0}};
      if (index >= plan.tiles) continue;
      uint32_t words[2];
      load_words<2>(words, m.tiles + (k * plan.tiles + index) * 8);
      const int count = words[1] >> 16;
      if (count == 0) continue;
      const uint16_t* rows = m.rows + k * plan.tokens + (words[1] & 0xFFFF);
      const int upper = lane() / 4, lower = upper + 8;
      return {k,
              index,
              static_cast<int>(words[0]),
              count,
              {rows[upper < count ? upper : count - 1], rows[lower < count ? lower : count - 1]}};
    }
  }

  MOERGE_DEVICE void read(const Block& m, const Tile& tile, int step, Fragments& f) const {
    for (int half = 0; half < 2; ++half) {
      uint32_t pair[2];
      load_words<2>(pair, m.hidden + (tile.row[half] * plan.K + tile.k) * (ranks * 2) + step * 32);
      f.a[half] = pair[0], f.a[half + 2] = pair[1];
    }
    const char* from = m.w + int64_t(tile.expert) * w_expert + step * 16 * (kRanksAdjacent ? 2 : w_rank);
    const int left = tile.expert < 0 ? 0 : m.ranks_left - step * 16;
    for (int j = 0; j < 4; ++j) {
      for (int n = 0; n < kWide / 2; ++n) f.b[j][n] = 0;
      if (left > (kRanksAdjacent ? 0 : j))
        load_words<kWide / 2>(f.b[j], from + j * (kRanksAdjacent ? w_column : w_rank));
    }
  }

  MOERGE_DEVICE void multiply(const Fragments& f, float (&sum)[kWide][4]) const {
    for (int j = 0; j < kWide; ++j) {
      if constexpr (kRanksAdjacent)
        mma<T>(sum[j], f.a, {f.b[j][0], f.b[j][1]});
      else if (j % 2 == 0)
        mma<T>(sum[j], f.a, {low_halves(f.b[0][j / 2], f.b[1][j / 2]), low_halves(f.b[2][j / 2], f.b[3][j / 2])});
      else
        mma<T>(sum[j], f.a, {high_halves(f.b[0][j / 2], f.b[1][j / 2]), high_halves(f.b[2][j / 2], f.b[3][j / 2])});
    }
  }

  // A row's sum so far is added, and the sum left for the next slot or written to out. Four neighbouring sums of the
  // lane lie together; rows of an even and an odd number use different banks.
  MOERGE_DEVICE void finish(const Block& m, int k, int row, const uint32_t (&before)[kWide],
                            float (&value)[2 * kWide]) const {
    char* const sums = m.sums + row * (kExpandColumns * 4);
    const int first = row % 2 * 64;
    for (int half = 0; k > 0 && half < 2; ++half) {
      uint32_t words[4];
      load_words<4>(words, sums + (first ^ half * 64));
      for (int j = 0; j < 4; ++j) value[half * 4 + j] += as_float(words[j]);
    }
    if (k < plan.K - 1) {
      for (int half = 0; half < 2; ++half) {
        const float* v = value + half * 4;
        store_words<4>(sums + (first ^ half * 64), {as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
      }
    } else if (m.column < columns) {
      uint32_t words[kWide];
      for (int j = 0; j < kWide; ++j)
        words[j] = pack<T>(value[2 * j] + low_half<T>(before[j]), value[2 * j + 1] + high_half<T>(before[j]));
      store_words<kWide>(m.out + int64_t(row) * out_stride, words);
    }
  }

  MOERGE_DEVICE void add_bias(const Block& m, const Tile& tile, float (&sum)[kWide][4]) const {
    float weight[2];
    for (int half = 0; half < 2; ++half) weight[half] = m.weights[tile.row[half] * plan.K + tile.k];
    for (int j = 0; j < 2 * kWide; ++j) {
      const float value = load_as<float>(bias.data, bias.dtype, tile.expert * bias.stride + m.column + j);
      for (int half = 0; half < 2; ++half) sum[j % kWide][half * 2 + j / kWide] += weight[half] * value;
    }
  }

  // `tile`, whose first fragments are in f0, becomes the next one, whose first are then in f0, or with one step in f1.
  MOERGE_DEVICE void run_tile(const Block& m, Tile& tile, Fragments& f0, Fragments& f1) const {
    const Tile now = tile;
    uint32_t before[2][kWide] = {};
    for (int half = 0; half < 2; ++half)
      if (m.base && now.k == plan.K - 1) load_words<kWide>(before[half], m.base + int64_t(now.row[half]) * base_stride);
    float sum[kWide][4] = {};
    const auto next = [&](Fragments& f) {
      tile = tile_from(m, now.k, now.index + kWarps);
      if (tile.k < plan.K) read(m, tile, 0, f);
    };
    if constexpr (kSteps == 1) {
      next(f1);
      if (now.expert >= 0) multiply(f0, sum);
    } else {
      for (int step = 0; step < kSteps; step += 2) {
        read(m, now, step + 1, f1);
        if (now.expert >= 0) multiply(f0, sum);
        if (step + 2 < kSteps)
          read(m, now, step + 2, f0);
        else
          next(f0);
        if (now.expert >= 0) multiply(f1, sum);
      }
    }
    if (kBias && now.expert >= 0 && m.column < columns) add_bias(m, now, sum);
    for (int half = 0; half < 2; ++half) {
      if (lane() / 4 + half * 8 >= now.count) continue;
      float value[2 * kWide];
      for (int j = 0; j < 2 * kWide; ++j) value[j] = sum[j % kWide][half * 2 + j / kWide];
      finish(m, now.k, now.row[half], before[half], value);
    }
  }

  MOERGE_DEVICE Block begin() const {
    const int across = (columns + kExpandColumns - 1) / kExpandColumns, block = static_cast<int>(block_x());
    const int64_t chunk = block / across, first = chunk * plan.tokens;
    const int column = block % across * kExpandColumns, i = lane() % 4;
    Shared shared;
    Block m;
    // the sums begin at a multiple of 128 bytes
    m.sums = shared.take<char>(plan.K > 1 ? plan.tokens * kExpandColumns * 4 : 0) + i * 16;
    char* list = shared.take<char>(plan.list_bytes);
    const char* from = prepared + plan.lists + chunk * plan.list_bytes;
    for (int at = thread() * 16; at < plan.list_bytes; at += kThreads * 16) async_copy16(list + at, from + at, true);
    async_commit();
    m.rows = reinterpret_cast<const uint16_t*>(list);
    m.tiles = list + plan.rows_bytes;
    m.hidden = prepared + (first * plan.K * ranks + i * 4) * 2;
    int its = column + lane() / 4 * kWide;  // columns of the lane's fragments; what lies behind the last is not used
    if (its > columns - kWide) its = columns - kWide;
    m.w = w + int64_t(its) * w_column + int64_t(i * 4) * w_rank;
    m.ranks_left = R - i * 4;
    m.column = column + i * (2 * kWide);
    const int inside = m.column < columns ? m.column : 0;
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
    Fragments f0, f1;
    if (tile.k < plan.K) read(m, tile, 0, f0);
    bool turned = false;  // the next tile's fragments are in f1
    for (int k = 0; k < plan.K; ++k) {
      if (k > 0) sync_block();  // the sums of the slot before are there
      for (; tile.k == k; turned = kSteps % 2 && !turned)
        turned ? run_tile(m, tile, f1, f0) : run_tile(m, tile, f0, f1);
    }
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
  if (p.T < kLoraMmaTokens) return "few tokens";
  if (p.K == 0 || p.R == 0) return "there is nothing to multiply";
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
