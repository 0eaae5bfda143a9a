// From similarities, in parts, to the K best experts of every token and their weights; one warp per token.
#include "route_select.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class Acc>
struct RouteSelect {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_select";
  Route p;

  // Into the first part; each lane those that it alone will read.
  MOERGE_DEVICE void add_parts(int64_t t) const {
    Acc* similarity = static_cast<Acc*>(p.similarity) + t * p.E;
    for (int64_t e = lane(); e < p.E; e += 32) {
      Acc sum = similarity[e];
      for (int64_t part = 1; part < p.parts; ++part) sum += similarity[part * p.T * p.E + e];
      similarity[e] = sum;
    }
  }

  MOERGE_DEVICE void operator()() const {
    const int64_t t = block_x() * kWarps + warp();
    if (t >= p.T) return;
    if (p.parts > 1) add_parts(t);
    Selection<Acc>{p}.run(t, static_cast<Acc*>(p.weights) + t * p.K, p.experts + t * p.K);
  }
};

}  // namespace

void route_select(const Route& p, Stream stream) {
  const Grid grid{ceil_div(p.T, kWarps)};
  if (p.wide)
    launch(grid, 0, stream, RouteSelect<double>{p});
  else
    launch(grid, 0, stream, RouteSelect<float>{p});
}

}  // namespace moerge::cuda
