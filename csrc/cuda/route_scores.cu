// Statistics and similarities of every token with every expert: similarity[t,e] = norm(x_t) . g_e.
//
// A block has one token and some experts, a warp one expert at a time. With few tokens the experts are spread over many
// blocks, each of which finds the token's statistics again (x is small beside the gates). For any types, one element at
// a time: correct for anything. route_scores_mma.cu has the fast one.
#include "route.cuh"
#include "route_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class Acc>
struct RouteScores {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_scores";
  Route p;
  int64_t experts_per_block;

  MOERGE_DEVICE void operator()() const {
    const int64_t t = block_x();
    Shared shared;
    Acc* slots = shared.take<Acc>(kWarps);
    const char* row = static_cast<const char*>(p.x.data) + t * p.x.stride * size_of(p.x.dtype);
    const Statistics<Acc> stats =
        token_statistics<Acc, Any, 1>(BlockTeam<kThreads, Acc>{slots}, row, p.x.dtype, p.D, p.normalize);
    if (block_y() == 0 && thread() == 0) stats.store(p.statistics, t);
    const int64_t begin = block_y() * experts_per_block;
    const int64_t end = begin + experts_per_block < p.E ? begin + experts_per_block : p.E;
    for (int64_t e = begin + warp(); e < end; e += kWarps) {
      const char* gate = static_cast<const char*>(p.gates.data) + e * p.gates.stride * size_of(p.gates.dtype);
      Acc x[1], g[1], sum = 0;
      for (int64_t d = lane(); d < p.D; d += 32) {
        load_vector<Any>(row, p.x.dtype, d, x);
        load_vector<Any>(gate, p.gates.dtype, d, g);
        sum += stats.normalized(x[0]) * g[0];
      }
      sum = warp_sum(sum);
      if (lane() == 0) static_cast<Acc*>(p.similarity)[t * p.E + e] = sum;
    }
  }
};

template <class Acc>
void run_scores(const Route& p, Stream stream) {
  // about two thousand warps, if there are so many experts
  const int64_t wanted = ceil_div(ceil_div(p.T * p.E, 2048), kWarps) * kWarps;
  const int64_t per_block = wanted > p.E ? p.E : wanted;
  launch({p.T, ceil_div(p.E, per_block)}, shared_size(kWarps * sizeof(Acc)), stream, RouteScores<Acc>{p, per_block});
}

bool rows_are_vectors(const Route& p) {
  return p.D > 0 && p.D % 8 == 0 && !p.wide && p.gates.dtype == DType::f32 &&
         aligned16(p.x.data, p.x.stride * (p.x.dtype == DType::f32 ? 4 : 2)) &&
         aligned16(p.gates.data, p.gates.stride * 4);
}

}  // namespace

Reason scores_against_tensor_cores(const Route& p) {
  if (!rows_are_vectors(p)) return "x or gates have a type or strides that 16-byte loads cannot follow";
  return p.gates.stride < kScoresMmaStride ? nullptr : "the gates are too far apart in memory";
}

int64_t score_parts(const Route& p) { return scores_against_tensor_cores(p) ? 1 : score_parts_mma(p); }

bool score_moments(const Route& p) { return !scores_against_tensor_cores(p) && p.normalize == Normalize::standardize; }

void route_scores(const Route& p, Stream stream) {
  if (p.wide) return run_scores<double>(p, stream);
  if (!scores_against_tensor_cores(p)) return route_scores_mma(p, stream);
  run_scores<float>(p, stream);
}

}  // namespace moerge::cuda
