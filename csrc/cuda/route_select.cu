// From similarities, in parts, to the K best experts of every token and their weights; one warp per token.
#include "route_select.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// The similarity of token and expert `i` (t * E + e) from its parts, in order, into the first.
template <class Acc>
MOERGE_DEVICE void add_parts(const Route& p, int64_t i) {
  Acc* similarity = static_cast<Acc*>(p.similarity);
  Acc sum = similarity[i];
  for (int64_t part = 1; part < p.parts; ++part) sum += similarity[part * p.T * p.E + i];
  similarity[i] = sum;
}

template <class Acc>
struct RouteAddParts {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_add_parts";
  Route p;

  MOERGE_DEVICE void operator()() const {
    const int64_t i = block_x() * kThreads + thread();
    if (i < p.T * p.E) add_parts<Acc>(p, i);
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
    // each lane those that it alone will read
    for (int64_t e = lane(); p.parts > 1 && e < p.E; e += 32) add_parts<Acc>(p, t * p.E + e);
    Selection<Acc>{p}.run(t, static_cast<Acc*>(p.weights) + t * p.K, p.experts + t * p.K);
  }
};

}  // namespace

void route_add_parts(const Route& p, Stream stream) {
  if (p.parts == 1) return;
  const Grid grid{ceil_div(p.T * p.E, kThreads)};
  if (p.wide)
    launch(grid, 0, stream, RouteAddParts<double>{p});
  else
    launch(grid, 0, stream, RouteAddParts<float>{p});
}

void route_select(const Route& p, Stream stream) {
  const Grid grid{ceil_div(p.T, kWarps)};
  if (p.wide)
    launch(grid, 0, stream, RouteSelect<double>{p});
  else
    launch(grid, 0, stream, RouteSelect<float>{p});
}

}  // namespace moerge::cuda
