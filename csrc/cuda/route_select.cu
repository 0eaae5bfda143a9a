// From similarities, in parts, to the K best experts of every token and their weights; one warp per token.
//
// All that a token needs is asked for at once: a lane has up to kMostPerLane experts and keeps their scores in
// registers, the parts of their sums are read kLoads at a time before they are added in order, and those of the token's
// moments one per lane. Variant: scores read again from memory in every round (double; more experts).
#include "route_select.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 64, kWarps = kThreads / 32;
constexpr int kMostPerLane = 8, kLoads = 16;

// What the moments say of a token, by its warp: each lane takes a part, and their sums are added up.
MOERGE_DEVICE Statistics<float> statistics_of(const Route& p, int64_t t) {
  static_assert(kScoresParts <= 32);
  const bool part = lane() < p.parts;
  const float* moments = p.moments + ((part ? lane() : 0) * p.T + t) * kMoments;
  const float pivot = moments[0], its_sum = moments[1], its_squares = moments[2];
  const float sum = warp_sum(part ? its_sum : 0), squares = warp_sum(part ? its_squares : 0);
  const float D = static_cast<float>(p.D), rest = sum / D, variance = squares / D - rest * rest;
  return {pivot, rest, 1 / sqrt((variance < 0 ? 0 : variance) + 1e-5f), 0};
}

// sum[i] = the parts of a number, `stride` apart, added up in order: for expert[i], which lie behind `from`. Nothing
// that is read depends on a condition, so that all of it is on its way before the first sum.
template <int kPerLane>
MOERGE_DEVICE void add_parts(const float* from, int64_t stride, int parts, const int (&expert)[kPerLane],
                             float (&sum)[kPerLane]) {
  constexpr int kBatch = kLoads / kPerLane;
  MOERGE_UNROLL
  for (int i = 0; i < kPerLane; ++i) sum[i] = 0;
  for (int first = 0; first < parts; first += kBatch) {
    float value[kBatch][kPerLane];
    MOERGE_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      const float* part = from + (first + j < parts ? first + j : 0) * stride;
      MOERGE_UNROLL
      for (int i = 0; i < kPerLane; ++i) value[j][i] = part[expert[i]];
    }
    MOERGE_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      MOERGE_UNROLL
      for (int i = 0; i < kPerLane; ++i) sum[i] += first + j < parts ? value[j][i] : 0;
    }
  }
}

// similarity[i] of expert first + lane + 32 i, for token t by its warp. Those taken around a pivot are
// (S_e - (mean - pivot) sum_d g_ed) / deviation, with S_e = sum_d (x_d - pivot) g_ed.
template <int kPerLane>
MOERGE_DEVICE void similarities(const Route& p, int64_t t, int first, float (&similarity)[kPerLane]) {
  const int E = static_cast<int>(p.E), parts = static_cast<int>(p.parts);
  int expert[kPerLane];
  MOERGE_UNROLL
  for (int i = 0; i < kPerLane; ++i) expert[i] = first + lane() + 32 * i < E ? first + lane() + 32 * i : E - 1;
  add_parts(static_cast<const float*>(p.similarity) + t * E, p.T * E, parts, expert, similarity);
  if (!p.moments) return;
  float gates[kPerLane];
  add_parts(p.gate_sums, E, parts, expert, gates);
  const Statistics<float> stats = statistics_of(p, t);
  MOERGE_UNROLL
  for (int i = 0; i < kPerLane; ++i) similarity[i] = (similarity[i] - stats.rest * gates[i]) * stats.factor;
}

// The similarities of token t into the first part; each lane those that it alone will read.
MOERGE_DEVICE void finish(const Route& p, int64_t t) {
  if (p.parts == 1 && !p.moments) return;
  for (int first = 0; first < p.E; first += 32 * kMostPerLane) {
    float similarity[kMostPerLane];
    similarities(p, t, first, similarity);
    MOERGE_UNROLL
    for (int i = 0; i < kMostPerLane; ++i)
      if (const int e = first + lane() + 32 * i; e < p.E)
        static_cast<float*>(p.similarity)[t * p.E + e] = similarity[i];
  }
}

// Only tensor cores leave parts and moments, and they have no doubles.
struct RouteAddParts {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_add_parts";
  Route p;

  MOERGE_DEVICE void operator()() const {
    const int64_t t = block_x() * kWarps + warp();
    if (t >= p.T) return;
    finish(p, t);
    if (!p.moments) return;
    const Statistics<float> stats = statistics_of(p, t);
    if (lane() == 0) stats.store(p.statistics, t);
  }
};

// kPerLane 0: scores from memory.
template <class Acc, int kPerLane>
struct RouteSelect {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = 12;  // room for all that is on its way
  static constexpr const char* kName = "route_select";
  Route p;

  MOERGE_DEVICE void operator()() const {
    const int64_t t = block_x() * kWarps + warp();
    if (t >= p.T) return;
    const Selection<Acc> selection{p};
    Acc* weights = static_cast<Acc*>(p.weights) + t * p.K;
    int32_t* experts = p.experts + t * p.K;
    if constexpr (kPerLane > 0) {
      float similarity[kPerLane];
      similarities(p, t, 0, similarity);
      selection.choose(HeldScores<float, kPerLane>(Scores<float>(p, t), similarity), weights, experts);
    } else {
      if constexpr (std::is_same_v<Acc, float>) finish(p, t);
      selection.run(t, weights, experts);
    }
  }
};

template <class Acc, int kPerLane>
void run_select(const Route& p, Stream stream) {
  launch({ceil_div(p.T, kWarps)}, 0, stream, RouteSelect<Acc, kPerLane>{p});
}

}  // namespace

void route_add_parts(const Route& p, Stream stream) {
  if (p.parts == 1 && !p.moments) return;
  launch({ceil_div(p.T, kWarps)}, 0, stream, RouteAddParts{p});
}

void route_select(const Route& p, Stream stream) {
  if (p.wide) return run_select<double, 0>(p, stream);
  if (p.E <= 32) return run_select<float, 1>(p, stream);
  if (p.E <= 64) return run_select<float, 2>(p, stream);
  if (p.E <= 32 * kMostPerLane) return run_select<float, kMostPerLane>(p, stream);
  run_select<float, 0>(p, stream);
}

}  // namespace moerge::cuda
