// Similarities of tokens with all experts on tensor cores: similarity[t,e] = norm(x_t) . g_e, to float32 accuracy.
//
// A warp has 32 tokens, all experts of its block and every n-th chunk of 32 features; nothing is shared but the sums at
// the end. Features can be dealt to the fragments in any order, so a lane loads 8 adjacent ones of 4 tokens and of each
// expert in 16-byte pieces, and these are its fragments of two products. Tokens come through a ring in shared memory
// that each lane fills and reads for itself, kStages - 1 chunks ahead; gates, which all warps of the block want at
// about the same time, through the first-level cache into registers, one chunk ahead. Variants: 8, 16, 40 or 56 experts
// per block.
//
// A gate is the sum of three bfloat16 numbers of 8 bits, exactly. So is what is left of a token without its pivot, and
// the six largest of the nine products are added, the smallest first (the others are below float32's rounding); a
// bfloat16 token without a pivot is one number of 8 bits, and three products are all. Tensor cores round every sum
// toward zero, which adds up: they only add up 16 features, and those sums are added as float32. The gates stay float32
// in memory.
//
// x is read once: the mean is not known yet, so "standardize" takes every token around a pivot m, and the sums of x -
// m, of its square and of the gates are found on the way. route_select and route_add_parts take the rest of the mean
// off (similarities in route_select.cu). m is the mean of n = 32 features (8 where D < 32), or 0 where that mean is
// below their deviation. What cancels is bounded: those n features alone give a variance of (n/D) (mean - m)^2 or more,
// or half of that. "unit" divides by the largest value first and so reads x before (RouteStatistics).
//
// The version before multiplied TF32 parts, made by a conversion of a quarter rate in every warp, behind a barrier per
// 32 features: on an H200, 36 experts and D = 4096, bfloat16, it took 9.9, 14.0 and 70 us for 64, 512 and 4096 tokens.
// This one takes 6.0, 8.5 and 30.2 us.
#include "route_scores_mma.cuh"

namespace moerge::cuda {

namespace {

using scores_mma::blocks_together, scores_mma::kTokens, scores_mma::kFeatures, scores_mma::kWarps;

// Of "unit".
template <class X>
struct RouteStatistics {
  static constexpr int kThreads = 128;
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

// How a launch is cut.
struct Cut {
  int experts, group_bits, tokens;  // of a block
  int64_t blocks;                   // for each part of the features
};

Cut cut_of(const Route& p) {
  const int group_bits = p.T <= kScoresOneGroup ? 0 : p.T <= kScoresTwoGroups ? 1 : 2, tokens = kTokens << group_bits;
  const int experts = p.E <= 8 ? 8 : p.E <= 16 ? 16 : ceil_div(p.E, 56) * 56 <= ceil_div(p.E, 40) * 40 ? 56 : 40;
  return {experts, group_bits, tokens, ceil_div(p.T, tokens) * ceil_div(p.E, experts)};
}

template <class X, int kExperts>
void run_scores(const Route& p, const Cut& cut, Stream stream) {
  using Kernel = scores_mma::RouteScoresMma<X, kExperts>;
  static_assert(Kernel::kShared <= kMostShared);
  launch({ceil_div(p.T, cut.tokens), ceil_div(p.E, kExperts), p.parts}, Kernel::kShared, stream,
         Kernel{p, cut.group_bits});
}

template <class X>
void run(const Route& p, Stream stream) {
  if (p.normalize == Normalize::unit) {
    using Kernel = RouteStatistics<X>;
    launch({p.T}, shared_size(Kernel::kThreads / 32 * sizeof(float)), stream, Kernel{p});
  }
  const Cut cut = cut_of(p);
  switch (cut.experts) {
    case 8:
      return run_scores<X, 8>(p, cut, stream);
    case 16:
      return run_scores<X, 16>(p, cut, stream);
    case 40:
      return run_scores<X, 40>(p, cut, stream);
    default:
      return run_scores<X, 56>(p, cut, stream);
  }
}

}  // namespace

// The fewest parts that take the least time: for every round of blocks, what each warp has to do, and kScoresStart.
int64_t score_parts_mma(const Route& p) {
  const Cut cut = cut_of(p);
  const int64_t together = kProcessors * blocks_together(cut.experts, p.x.dtype == DType::f32 ? 4 : 2);
  const int64_t chunks = ceil_div(p.D, kFeatures);
  int64_t best = 1, least = 0;
  for (int64_t parts = 1; parts <= kScoresParts && parts <= chunks; ++parts) {
    const int64_t per_warp = ceil_div(ceil_div(chunks, parts), kWarps >> cut.group_bits);
    const int64_t time = ceil_div(cut.blocks * parts, together) * (per_warp + kScoresStart);
    if (parts == 1 || time < least) best = parts, least = time;
  }
  return best;
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
