// Gradient of route. Only ids and weights are kept from the forward: route_scores runs again, then
//
//   ds: softmax     w_k (dw_k - sum_j w_j dw_j)          over the kept slots
//       softmax_all p_e ([e kept] dw_e - sum_j w_j dw_j)  over every eligible expert
//       sigmoid     w (1 - w) dw                          score: dw
//   dz = ds * scale * f'(z);  dgates_e = sum_t dz_te norm(x_t);  dbias_n = sum over the row's tokens of ds
//   dnorm = sum_e dz_e g_e;   standardize: dx = (dnorm - mean(dnorm) - n mean(dnorm n)) * factor
//                             unit:        dx = (dnorm - n (dnorm . n)) * factor
// Sums over tokens run in order, one thread per result: the same bits every time.
#include "route.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// ds [T,E]; one warp per token. Which slots the forward kept is found again from the scores: a weight of 0 does not
// tell, since "score" may keep one. Where it does mean a derivative of 0, grad is not read: it may be NaN from an
// expert that the forward never read.
template <class Acc>
struct RouteScoreGradient {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = 8;
  static constexpr const char* kName = "route_score_gradient";
  RouteGradient g;

  MOERGE_DEVICE int64_t kept_slots(const Scores<Acc>& scores, const SoftmaxAll<Acc>& all,
                                   const int32_t* experts) const {
    const Route& p = g.forward;
    int64_t kept = 0;
    for (int64_t first = 0; first < p.E; first += 32)
      kept += count_bits(ballot(first + lane() < p.E && scores.eligible(first + lane())));
    kept = kept < p.K ? kept : p.K;
    if (p.top_p == 0) return kept;
    Acc before = 0;
    int64_t k = 0;
    for (; k < kept && !(before >= static_cast<Acc>(p.top_p)); ++k)
      if (experts[k] >= 0 && experts[k] < p.E) before += all.of(scores(experts[k]));
    return k;
  }

  MOERGE_DEVICE void operator()() const {
    const Route& p = g.forward;
    const int64_t t = block_x() * kWarps + warp();
    if (t >= p.T) return;
    const Scores<Acc> scores(p, t);
    const Acc* weights = static_cast<const Acc*>(p.weights) + t * p.K;
    const Acc* grad = static_cast<const Acc*>(g.grad) + t * p.K;
    const int32_t* experts = p.experts + t * p.K;
    Acc* ds = static_cast<Acc*>(g.score_gradient) + t * p.E;
    const SoftmaxAll<Acc> all(scores);
    const int64_t kept = kept_slots(scores, all, experts);
    Acc mean = 0;
    for (int64_t k = lane(); k < kept; k += 32)
      if (weights[k] != 0) mean += weights[k] * grad[k];
    mean = warp_sum(mean);
    for (int64_t e = lane(); e < p.E; e += 32)
      ds[e] = p.weighting == Weighting::softmax_all && scores.eligible(e) ? -all.of(scores(e)) * mean : Acc(0);
    sync_warp();
    for (int64_t k = lane(); k < kept; k += 32) {
      const Acc w = weights[k];
      const int32_t e = experts[k];
      if ((w == 0 && p.weighting != Weighting::score) || e < 0 || e >= p.E) continue;
      switch (p.weighting) {
        case Weighting::softmax:
          ds[e] = w * (grad[k] - mean);
          break;
        case Weighting::softmax_all:
          ds[e] += w * grad[k];
          break;
        case Weighting::sigmoid:
          ds[e] = w * (1 - w) * grad[k];
          break;
        case Weighting::score:
          ds[e] = grad[k];
      }
    }
  }
};

// d/d similarity of one token and expert.
template <class Acc>
MOERGE_DEVICE Acc similarity_gradient(const RouteGradient& g, int64_t t, int64_t e) {
  const Route& p = g.forward;
  const Acc ds = static_cast<const Acc*>(g.score_gradient)[t * p.E + e] * static_cast<Acc>(p.scale);
  if (!p.absolute) return ds;
  const Acc z = static_cast<const Acc*>(p.similarity)[t * p.E + e];
  return ds * static_cast<Acc>((z > 0) - (z < 0));
}

// dx; one block per token. dnorm is made twice rather than stored: once for its sums, once for the result.
template <class Acc>
struct RouteInputGradient {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_input_gradient";
  RouteGradient g;

  MOERGE_DEVICE Acc normalized_gradient(int64_t t, int64_t d) const {
    const Matrix& gates = g.forward.gates;
    Acc sum = 0;
    for (int64_t e = 0; e < g.forward.E; ++e) {
      const Acc dz = similarity_gradient<Acc>(g, t, e);
      if (dz != 0) sum += dz * load_as<Acc>(gates.data, gates.dtype, e * gates.stride + d);
    }
    return sum;
  }

  MOERGE_DEVICE void operator()() const {
    const Route& p = g.forward;
    const int64_t t = block_x();
    Shared shared;
    Acc* slots = shared.take<Acc>(kWarps);
    const Statistics<Acc> stats = Statistics<Acc>::load(p.statistics, t);
    const auto norm = [&](int64_t d) {
      return stats.normalized(load_as<Acc>(p.x.data, p.x.dtype, t * p.x.stride + d));
    };
    Acc sum = 0, along = 0;
    if (p.normalize != Normalize::none) {
      for (int64_t d = thread(); d < p.D; d += kThreads) {
        const Acc dn = normalized_gradient(t, d);
        sum += dn;
        along += dn * norm(d);
      }
      sum = block_sum<kThreads>(sum, slots);
      along = block_sum<kThreads>(along, slots);
    }
    const bool standardize = p.normalize == Normalize::standardize;
    const Acc shift = standardize ? sum / static_cast<Acc>(p.D) : Acc(0);
    const Acc slope = standardize ? along / static_cast<Acc>(p.D) : stats.clamped != 0 ? Acc(0) : along;
    for (int64_t d = thread(); d < p.D; d += kThreads) {
      Acc dx = normalized_gradient(t, d);
      if (p.normalize != Normalize::none) dx = (dx - shift - norm(d) * slope) * stats.factor;
      store_as<Acc>(g.x.data, g.x.dtype, t * g.x.stride + d, dx);
    }
  }
};

// dgates; a block has an expert, a thread a feature. Under most weightings nearly every dz is 0: of each kThreads
// tokens those that count are listed first, in order.
template <class Acc>
struct RouteGateGradient {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_gate_gradient";
  static constexpr size_t kShared = shared_size(kWarps * sizeof(int32_t)) + shared_size(kThreads * sizeof(int64_t)) +
                                    shared_size(kThreads * sizeof(Acc));
  RouteGradient g;

  struct Memory {
    int32_t* counts;  // per warp
    int64_t* tokens;
    Acc* slopes;
  };

  // Lists the tokens among those from `first` whose dz is not 0, and returns how many they are.
  MOERGE_DEVICE int list_tokens(const Memory& m, int64_t expert, int64_t first) const {
    const int64_t t = first + thread();
    const Acc dz = t < g.forward.T ? similarity_gradient<Acc>(g, t, expert) : Acc(0);
    const Rank rank = block_rank<kThreads>(dz != 0, m.counts);  // a barrier: nobody reads the list before any more
    if (dz != 0) m.tokens[rank.before] = t, m.slopes[rank.before] = dz;
    sync_block();
    return rank.all;
  }

  MOERGE_DEVICE void operator()() const {
    const Route& p = g.forward;
    const int64_t e = block_x(), d = block_y() * kThreads + thread();
    Shared shared;
    Memory m;
    m.counts = shared.take<int32_t>(kWarps);
    m.tokens = shared.take<int64_t>(kThreads);
    m.slopes = shared.take<Acc>(kThreads);
    Acc sum = 0;
    for (int64_t first = 0; first < p.T; first += kThreads) {
      const int count = list_tokens(m, e, first);
      for (int i = 0; d < p.D && i < count; ++i) {
        const int64_t t = m.tokens[i];
        const Acc x = load_as<Acc>(p.x.data, p.x.dtype, t * p.x.stride + d);
        sum += m.slopes[i] * Statistics<Acc>::load(p.statistics, t).normalized(x);
      }
    }
    if (d < p.D) store_as<Acc>(g.gates.data, g.gates.dtype, e * g.gates.stride + d, sum);
  }
};

// dbias; one thread per element.
template <class Acc>
struct RouteBiasGradient {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "route_bias_gradient";
  RouteGradient g;

  MOERGE_DEVICE void operator()() const {
    const Route& p = g.forward;
    const int64_t n = block_x(), e = block_y() * kThreads + thread();
    if (e >= p.E) return;
    const int64_t begin = p.row.rows ? 0 : n * p.row.tokens_per_row;
    const int64_t end = p.row.rows ? p.T : begin + p.row.tokens_per_row;
    Acc sum = 0;
    for (int64_t t = begin; t < end; ++t)
      if (!p.row.rows || p.row.rows[t] == n) sum += static_cast<const Acc*>(g.score_gradient)[t * p.E + e];
    store_as<Acc>(g.bias.data, g.bias.dtype, n * g.bias.stride + e, sum);
  }
};

template <class Acc>
void run_backward(const RouteGradient& g, Stream stream) {
  const Route& p = g.forward;
  launch({ceil_div(p.T, kWarps)}, 0, stream, RouteScoreGradient<Acc>{g});
  if (g.bias.data) launch({p.row.n, ceil_div(p.E, kThreads)}, 0, stream, RouteBiasGradient<Acc>{g});
  if (g.x.data) launch({p.T}, shared_size(kWarps * sizeof(Acc)), stream, RouteInputGradient<Acc>{g});
  if (g.gates.data) {
    const Grid grid{p.E, ceil_div(p.D, kThreads)};
    launch(grid, RouteGateGradient<Acc>::kShared, stream, RouteGateGradient<Acc>{g});
  }
}

}  // namespace

void route_backward(const RouteGradient& g, Stream stream) {
  if (g.forward.wide)
    run_backward<double>(g, stream);
  else
    run_backward<float>(g, stream);
}

}  // namespace moerge::cuda
