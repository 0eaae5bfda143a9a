// Similarities of many tokens with all experts on tensor cores: similarity[t,e] = norm(x_t) . g_e, to float32 accuracy.
//
// A block has 64 tokens and up to 64 experts and walks over its part of the features with kStages tiles of 32 under
// way; each warp owns 16 of the tokens. Variants: 16, 40 or 64 experts per block, for banks that small. Tokens are
// normalized in float32 on the way to the registers. Every factor is the sum of two TF32 numbers of 11 bits, and three
// of the four products are added (the fourth is below float32's rounding), so this is no single-pass TF32. The gates
// stay float32 in memory.
#include "route.cuh"
#include "route_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 64, kFeatures = 32, kStages = 3;
constexpr int kGateStride = kFeatures + 4;

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

  // One number as two of TF32.
  MOERGE_DEVICE static void split(float value, uint32_t& high, uint32_t& low) {
    high = to_tf32(value);
    low = to_tf32(value - as_float(high));
  }

  MOERGE_DEVICE void multiply(const X* tokens, const float* gates, const Statistics<float> (&stats)[2],
                              float (&sum)[kExperts / 8][4]) const {
    const int g = lane() / 4, i = lane() % 4, row = warp() * 16 + g;
    for (int k = 0; k < kFeatures; k += 8) {
      uint32_t a_high[4], a_low[4];
      for (int j = 0; j < 4; ++j) {
        const float x = to_float(tokens[(row + j % 2 * 8) * kTokenStride + k + i + j / 2 * 4]);
        split(stats[j % 2].normalized(x), a_high[j], a_low[j]);
      }
      for (int n = 0; n < kExperts / 8; ++n) {
        uint32_t b_high[2], b_low[2];
        for (int j = 0; j < 2; ++j) split(gates[(n * 8 + g) * kGateStride + k + i + j * 4], b_high[j], b_low[j]);
        mma_tf32(sum[n], a_low, b_high);
        mma_tf32(sum[n], a_high, b_low);
        mma_tf32(sum[n], a_high, b_high);
      }
    }
  }

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    X* tokens = shared.take<X>(kStages * kTokens * kTokenStride);
    float* gates = shared.take<float>(kStages * kExperts * kGateStride);
    Statistics<float> stats[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t t = block_x() * kTokens + warp() * 16 + lane() / 4 + half * 8;
      stats[half] = Statistics<float>::load(p.statistics, t < p.T ? t : p.T - 1);
    }
    const int64_t tiles = (p.D + kFeatures - 1) / kFeatures;
    const int64_t begin = tiles * block_z() / p.parts, end = tiles * (block_z() + 1) / p.parts;
    for (int64_t tile = begin; tile < begin + kStages - 1; ++tile) copy_stage(tile, end, tokens, gates);
    float sum[kExperts / 8][4] = {};
    for (int64_t tile = begin; tile < end; ++tile) {
      async_wait<kStages - 2>();
      sync_block();  // this tile is here, and nobody reads the one that is overwritten next
      copy_stage(tile + kStages - 1, end, tokens, gates);
      const int64_t stage = tile % kStages;
      multiply(tokens + stage * kTokens * kTokenStride, gates + stage * kExperts * kGateStride, stats, sum);
    }
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
  launch({ceil_div(p.T, kTokens), ceil_div(p.E, kExperts), p.parts}, Kernel::kShared, stream, Kernel{p});
}

template <class X>
void run(const Route& p, Stream stream) {
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
