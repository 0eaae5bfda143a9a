// Similarities of many tokens with all experts on tensor cores: similarity[t,e] = norm(x_t) . g_e, to float32 accuracy.
//
// A block has 64 tokens and up to 64 experts and walks over its part of the features with kStages tiles of 32 under
// way; each warp owns 16 of the tokens. Variants: 16, 40 or 64 experts per block, for banks that small. Every factor is
// the sum of two TF32 numbers of 11 bits, and three of the four products are added (the fourth is below float32's
// rounding), so this is no single-pass TF32. Tensor cores round every sum toward zero, which adds up: they only add
// up one tile, and the tiles are added as float32. The gates stay float32 in memory.
//
// x is read once: the mean is not known yet, so "standardize" takes every token around a pivot m, the mean of n = 32
// features (8 where D < 32), and the sums of x - m, of its square and of the gates are found on the way. route_select
// and route_add_parts take the rest of the mean off (finish in route_select.cu). What cancels is bounded: those n
// features alone give a variance of (n/D) (mean - m)^2 or more. "unit" divides by the largest value first and so reads
// x before (RouteStatistics).
#include "route.cuh"
#include "route_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 64, kFeatures = 32, kStages = 3;
constexpr int kGateStride = kFeatures + 4;
constexpr int kSamples = 4;  // of 8 features

// Of "unit".
template <class X>
struct RouteStatistics {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_statistics";
  Route p;

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    float* slots = shared.take<float>(kThreads / 32);
    const X* row = static_cast<const X*>(p.x.data) + block_x() * p.x.stride;
    const Statistics<float> stats =
        token_statistics<float, X, 8>(BlockTeam<kThreads, float>{slots}, row, p.x.dtype, p.D, p.normalize);
    if (thread() == 0) stats.store(p.statistics, block_x());
  }
};

template <class X, int kExperts>
struct RouteScoresMma {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = kExperts > 40 ? 3 : 4;
  static constexpr const char* kName = "route_scores_mma";
  static constexpr int kPerCopy = 16 / sizeof(X);  // elements of x in 16 bytes
  static constexpr int kTokenStride = kFeatures + kPerCopy;
  static constexpr size_t kShared =
      shared_size(kStages * kTokens * kTokenStride * sizeof(X)) + shared_size(kStages * kExperts * kGateStride * 4);
  Route p;

  MOERGE_DEVICE void copy_stage(int64_t tile, int64_t end, X* tokens, float* gates) const {
    const int64_t stage = tile % kStages, first = tile * kFeatures;
    if (tile < end) {
      for (int i = thread(); i < kTokens * kFeatures / kPerCopy; i += kThreads) {
        const int row = i / (kFeatures / kPerCopy), column = i % (kFeatures / kPerCopy) * kPerCopy;
        const int64_t t = block_x() * kTokens + row, d = first + column;
        const bool valid = t < p.T && d < p.D;
        const X* from = static_cast<const X*>(p.x.data) + (valid ? t * p.x.stride + d : 0);
        async_copy16(tokens + (stage * kTokens + row) * kTokenStride + column, from, valid);
      }
      for (int i = thread(); i < kExperts * kFeatures / 4; i += kThreads) {
        const int row = i / (kFeatures / 4), column = i % (kFeatures / 4) * 4;
        const int64_t e = block_y() * kExperts + row, d = first + column;
        const bool valid = e < p.E && d < p.D;
        const float* from = static_cast<const float*>(p.gates.data) + (valid ? e * p.gates.stride + d : 0);
        async_copy16(gates + (stage * kExperts + row) * kGateStride + column, from, valid);
      }
    }
    async_commit();  // an empty group at the end keeps the count right
  }

  // Of the two tokens that a lane has a part of, rows g and g + 8 of the warp's 16: how they are normalized here, and
  // what this lane has seen of them.
  struct Tokens {
    float shift[2] = {}, factor[2] = {1, 1}, sum[2] = {}, squares[2] = {};
  };

  MOERGE_DEVICE const X* row_of_x(int64_t t) const {
    return static_cast<const X*>(p.x.data) + (t < p.T ? t : p.T - 1) * p.x.stride;
  }

  MOERGE_DEVICE Tokens tokens_of_lane() const {
    const int64_t first = block_x() * kTokens + warp() * 16;
    Tokens mine;
    if (p.normalize == Normalize::unit) {
      for (int half = 0; half < 2; ++half) {
        const int64_t t = first + lane() / 4 + half * 8;
        mine.factor[half] = Statistics<float>::load(p.statistics, t < p.T ? t : p.T - 1).factor;
      }
    } else if (p.normalize == Normalize::standardize) {
      // two lanes for each of the 16; around the first feature, so that equal features give it exactly
      const X* row = row_of_x(first + lane() / 2);
      const float around = to_float(row[0]);
      float sum = 0, x[8];
      for (int i = lane() % 2; i < kSamples; i += 2) {
        load_vector<X>(row, p.x.dtype, p.D / (8 * kSamples) * 8 * i, x);
        for (int j = 0; j < 8; ++j) sum += x[j] - around;
      }
      const float pivot = around + (sum + shuffle_xor(sum, 1)) / (8 * kSamples);
      for (int half = 0; half < 2; ++half) mine.shift[half] = shuffle(pivot, (lane() / 4 + half * 8) * 2);
    } else if (block_y() == 0 && block_z() == 0 && lane() < 16 && first + lane() < p.T) {
      Statistics<float>{0, 0, 1, 0}.store(p.statistics, first + lane());
    }
    return mine;
  }

  // One number as two of TF32.
  MOERGE_DEVICE static void split(float value, uint32_t& high, uint32_t& low) {
    high = to_tf32(value);
    low = to_tf32(value - as_float(high));
  }

  // One tile, of which `left` features are within D.
  MOERGE_DEVICE void multiply(const X* tokens, const float* gates, int64_t left, Tokens& mine,
                              float (&sum)[kExperts / 8][4], float (&gate_sum)[kExperts / 8]) const {
    float part[kExperts / 8][4] = {};
    const int g = lane() / 4, i = lane() % 4, row = warp() * 16 + g;
    for (int k = 0; k < kFeatures; k += 8) {
      uint32_t a_high[4], a_low[4];
      for (int j = 0; j < 4; ++j) {
        const float x = to_float(tokens[(row + j % 2 * 8) * kTokenStride + k + i + j / 2 * 4]) - mine.shift[j % 2];
        if (sums_tokens() && k < left) mine.sum[j % 2] += x, mine.squares[j % 2] += x * x;
        split(x * mine.factor[j % 2], a_high[j], a_low[j]);
      }
      for (int n = 0; n < kExperts / 8; ++n) {
        uint32_t b_high[2], b_low[2];
        for (int j = 0; j < 2; ++j) {
          const float gate = gates[(n * 8 + g) * kGateStride + k + i + j * 4];
          if (sums_gates()) gate_sum[n] += gate;
          split(gate, b_high[j], b_low[j]);
        }
        mma_tf32(part[n], a_low, b_high);
        mma_tf32(part[n], a_high, b_low);
        mma_tf32(part[n], a_high, b_high);
      }
    }
    for (int n = 0; n < kExperts / 8; ++n)
      for (int j = 0; j < 4; ++j) sum[n][j] += part[n][j];
  }

  // Which blocks, and which of their warps, keep the sums.
  MOERGE_DEVICE bool sums_tokens() const { return p.normalize == Normalize::standardize && block_y() == 0; }
  MOERGE_DEVICE bool sums_gates() const {
    return p.normalize == Normalize::standardize && block_x() == 0 && warp() == 0;
  }

  MOERGE_DEVICE static float sum_of_four_lanes(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
  }

  MOERGE_DEVICE void store_sums(const Tokens& mine, const float (&gate_sum)[kExperts / 8]) const {
    for (int half = 0; sums_tokens() && half < 2; ++half) {
      const float sum = sum_of_four_lanes(mine.sum[half]), squares = sum_of_four_lanes(mine.squares[half]);
      const int64_t t = block_x() * kTokens + warp() * 16 + lane() / 4 + half * 8;
      if (t >= p.T || lane() % 4 != 0) continue;
      float* to = p.moments + (block_z() * p.T + t) * kMoments;
      to[0] = mine.shift[half], to[1] = sum, to[2] = squares;
    }
    for (int n = 0; sums_gates() && n < kExperts / 8; ++n) {
      const float sum = sum_of_four_lanes(gate_sum[n]);
      const int64_t e = block_y() * kExperts + n * 8 + lane() / 4;
      if (e < p.E && lane() % 4 == 0) p.gate_sums[block_z() * p.E + e] = sum;
    }
  }

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    X* tokens = shared.take<X>(kStages * kTokens * kTokenStride);
    float* gates = shared.take<float>(kStages * kExperts * kGateStride);
    const int64_t tiles = (p.D + kFeatures - 1) / kFeatures;
    const int64_t begin = tiles * block_z() / p.parts, end = tiles * (block_z() + 1) / p.parts;
    for (int64_t tile = begin; tile < begin + kStages - 1; ++tile) copy_stage(tile, end, tokens, gates);
    Tokens mine = tokens_of_lane();
    float sum[kExperts / 8][4] = {}, gate_sum[kExperts / 8] = {};
    for (int64_t tile = begin; tile < end; ++tile) {
      async_wait<kStages - 2>();
      sync_block();  // this tile is here, and nobody reads the one that is overwritten next
      copy_stage(tile + kStages - 1, end, tokens, gates);
      const int64_t stage = tile % kStages;
      multiply(tokens + stage * kTokens * kTokenStride, gates + stage * kExperts * kGateStride, p.D - tile * kFeatures,
               mine, sum, gate_sum);
    }
    store_sums(mine, gate_sum);
    for (int n = 0; n < kExperts / 8; ++n)
      for (int j = 0; j < 4; ++j) {
        const int64_t t = block_x() * kTokens + warp() * 16 + lane() / 4 + j / 2 * 8;
        const int64_t e = block_y() * kExperts + n * 8 + lane() % 4 * 2 + j % 2;
        if (t < p.T && e < p.E) static_cast<float*>(p.similarity)[(block_z() * p.T + t) * p.E + e] = sum[n][j];
      }
  }
};

int64_t experts_per_block(int64_t E) { return E <= 16 ? 16 : E <= 40 ? 40 : 64; }

template <class X, int kExperts>
void run_scores(const Route& p, Stream stream) {
  using Kernel = RouteScoresMma<X, kExperts>;
  static_assert(Kernel::kShared <= kMostShared);
  launch({ceil_div(p.T, kTokens), ceil_div(p.E, kExperts), p.parts}, Kernel::kShared, stream, Kernel{p});
}

template <class X>
void run(const Route& p, Stream stream) {
  if (p.normalize == Normalize::unit)
    launch({p.T}, shared_size(kThreads / 32 * sizeof(float)), stream, RouteStatistics<X>{p});
  switch (experts_per_block(p.E)) {
    case 16:
      return run_scores<X, 16>(p, stream);
    case 40:
      return run_scores<X, 40>(p, stream);
    default:
      return run_scores<X, 64>(p, stream);
  }
}

}  // namespace

int64_t score_parts_mma(const Route& p) {
  const int64_t blocks = ceil_div(p.T, kTokens) * ceil_div(p.E, experts_per_block(p.E));
  return parts_for(kScoresBlocks, blocks, ceil_div(p.D, kFeatures), kScoresParts);
}

void route_scores_mma(const Route& p, Stream stream) {
  if (p.x.dtype == DType::f32)
    run<float>(p, stream);
  else if (p.x.dtype == DType::bf16)
    run<bf16>(p, stream);
  else
    run<f16>(p, stream);
}

}  // namespace moerge::cuda
