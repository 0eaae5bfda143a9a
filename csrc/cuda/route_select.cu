// From similarities, in parts, to the K best experts of every token and their weights; one warp per token.
//
// A lane has up to kMostPerLane experts and keeps their scores in registers. Time goes by in dependent reads of the
// second-level cache, so the parts of all their sums are asked for at once, and of the token's moments each lane asks
// for a part. Variants: 1, 2 or 8 experts per lane; scores read again from memory in every round (double; more
// experts).
//
// The version before, which read one part after the other and all scores in each round, took 16.7 us on an H200 with 36
// experts in 32 parts, for 64 tokens as for 512. This one takes 3.5 and 4.0 us.
#include "route_select.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 64, kWarps = kThreads / 32;
constexpr int kMostPerLane = 8;

// What there is of a token's moments, by its warp: each lane has a part.
struct Moments {
  float pivot = 0, sum = 0, squares = 0;
  bool part;

  MOERGE_DEVICE Moments(const Route& p, int64_t t) : part(lane() < p.parts) {
    static_assert(kScoresParts <= 32);
    if (!p.moments) return;
    const float* from = p.moments + ((part ? lane() : 0) * p.T + t) * kMoments;
    pivot = from[0], sum = from[1], squares = from[2];
  }
  MOERGE_DEVICE Statistics<float> statistics(int64_t features) const {
    const float all = warp_sum(part ? sum : 0), all_squares = warp_sum(part ? squares : 0);
    const float D = static_cast<float>(features), rest = all / D, variance = all_squares / D - rest * rest;
    return {pivot, rest, 1 / sqrt((variance < 0 ? 0 : variance) + 1e-5f), 0};
  }
};

// For a token: the sums over the parts, added up in order, of the similarities of expert[i] and of those experts'
// gates.
template <int kPerLane>
struct Sums {
  const float *from, *gates_from;  // the next part
  int64_t stride, gates_stride;
  int expert[kPerLane];
  float similarity[kPerLane] = {}, gates[kPerLane] = {};

  // So many parts, all asked for at once: no load depends on a condition, or on another load.
  template <int count>
  MOERGE_DEVICE void add() {
    float value[count][kPerLane], gate[count][kPerLane];
    MOERGE_UNROLL
    for (int j = 0; j < count; ++j, from += stride, gates_from += gates_stride) {
      MOERGE_UNROLL
      for (int i = 0; i < kPerLane; ++i) value[j][i] = from[expert[i]], gate[j][i] = gates_from[expert[i]];
    }
    MOERGE_UNROLL
    for (int j = 0; j < count; ++j) {
      MOERGE_UNROLL
      for (int i = 0; i < kPerLane; ++i) similarity[i] += value[j][i], gates[i] += gate[j][i];
    }
  }
  MOERGE_DEVICE void add(int parts) {
    constexpr int kMost = kPerLane <= 2 ? 16 : 4;
    for (; parts >= kMost; parts -= kMost) add<kMost>();
    if (kMost > 8 && parts >= 8) add<8>(), parts -= 8;
    if (kMost > 4 && parts >= 4) add<4>(), parts -= 4;
    if (parts >= 2) add<2>(), parts -= 2;
    if (parts >= 1) add<1>();
  }
};

// similarity[i] of expert first + lane + 32 i, for token t by its warp. Those taken around a pivot are
// (S_e - (mean - pivot) sum_d g_ed) / deviation, with S_e = sum_d (x_d - pivot) g_ed.
template <int kPerLane>
MOERGE_DEVICE void similarities(const Route& p, int64_t t, int first, float (&similarity)[kPerLane]) {
  const int E = static_cast<int>(p.E);
  const float* all = static_cast<const float*>(p.similarity);
  const Moments moments(p, t);
  Sums<kPerLane> sums{all + t * p.E, p.moments ? p.gate_sums : all, p.T * p.E, p.E};  // without moments of no use
  MOERGE_UNROLL
  for (int i = 0; i < kPerLane; ++i) sums.expert[i] = first + lane() + 32 * i < E ? first + lane() + 32 * i : E - 1;
  sums.add(static_cast<int>(p.parts));
  const Statistics<float> stats = p.moments ? moments.statistics(p.D) : Statistics<float>{0, 0, 1, 0};
  MOERGE_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    similarity[i] = sums.similarity[i];
    if (p.moments) similarity[i] = (similarity[i] - stats.rest * sums.gates[i]) * stats.factor;
  }
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
    const Statistics<float> stats = Moments(p, t).statistics(p.D);
    if (lane() == 0) stats.store(p.statistics, t);
  }
};

// kPerLane 0: scores from memory.
template <class Acc, int kPerLane>
struct RouteSelect {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = kPerLane > 0 ? 8 : 6;  // room for all that is on its way
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
      HeldScores<kPerLane> scores(Scores<float>(p, t), similarity);
      selection.choose(scores, weights, experts);
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
