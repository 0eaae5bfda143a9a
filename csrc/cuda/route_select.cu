// From similarities, in parts, to the K best experts of every token and their weights; one warp per token.
#include "route_select.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// What the moments say of a token, in parts that are added up in order.
MOERGE_DEVICE Statistics<float> statistics_of(const Route& p, int64_t t) {
  const float* moments = p.moments + t * kMoments;
  float sum = 0, squares = 0;
  for (int64_t part = 0; part < p.parts; ++part) {
    sum += moments[part * p.T * kMoments + 1];
    squares += moments[part * p.T * kMoments + 2];
  }
  const float D = static_cast<float>(p.D), rest = sum / D, variance = squares / D - rest * rest;
  return {moments[0], rest, 1 / sqrt((variance < 0 ? 0 : variance) + 1e-5f), 0};
}

// The similarities of one token, by its warp, from their parts, in order, into the first. Those taken around a pivot
// are (S_e - (mean - pivot) sum_d g_ed) / deviation, with S_e = sum_d (x_d - pivot) g_ed.
template <class Acc>
MOERGE_DEVICE void finish(const Route& p, int64_t t) {
  if (p.parts == 1 && !p.moments) return;
  Acc* similarity = static_cast<Acc*>(p.similarity) + t * p.E;
  Acc rest = 0, factor = 1;
  if (p.moments) {
    const Statistics<float> stats = statistics_of(p, t);
    rest = stats.rest, factor = stats.factor;
  }
  // each lane those that it alone will read
  for (int64_t e = lane(); e < p.E; e += 32) {
    Acc sum = similarity[e], gates = p.moments ? p.gate_sums[e] : 0;
    for (int64_t part = 1; part < p.parts; ++part) {
      sum += similarity[part * p.T * p.E + e];
      if (p.moments) gates += p.gate_sums[part * p.E + e];
    }
    similarity[e] = (sum - rest * gates) * factor;
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
    finish<float>(p, t);
    if (p.moments && lane() == 0) statistics_of(p, t).store(p.statistics, t);
  }
};

template <class Acc>
struct RouteSelect {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_select";
  Route p;

  MOERGE_DEVICE void operator()() const {
    const int64_t t = block_x() * kWarps + warp();
    if (t >= p.T) return;
    finish<Acc>(p, t);
    Selection<Acc>{p}.run(t, static_cast<Acc*>(p.weights) + t * p.K, p.experts + t * p.K);
  }
};

}  // namespace

void route_add_parts(const Route& p, Stream stream) {
  if (p.parts == 1 && !p.moments) return;
  launch({ceil_div(p.T, kWarps)}, 0, stream, RouteAddParts{p});
}

void route_select(const Route& p, Stream stream) {
  const Grid grid{ceil_div(p.T, kWarps)};
  if (p.wide)
    launch(grid, 0, stream, RouteSelect<double>{p});
  else
    launch(grid, 0, stream, RouteSelect<float>{p});
}

}  // namespace moerge::cuda
