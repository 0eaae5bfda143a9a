// Gradient of route. Nothing but ids and weights is kept from the forward: similarities are computed again, block by
// block, and one [T,E] array of score gradients feeds the three results.
//
//   ds: softmax     w_k (dw_k - sum_j w_j dw_j)        over the kept slots
//       softmax_all p_e ([e kept] dw_e - sum_j w_j dw_j) over every eligible expert
//       sigmoid     w (1 - w) dw                        score: dw
//   dz = ds * scale * f'(z);  dgates_e = sum_t dz_te norm(x_t);  dbias_n = sum over the row's tokens of ds
//   dnorm = sum_e dz_e g_e;   standardize: dx = (dnorm - mean(dnorm) - n mean(dnorm n)) * factor
//                             unit:        dx = (dnorm - n (dnorm . n)) * factor
#include <algorithm>

#include "route.h"

namespace moerge::cpu {

namespace {

constexpr int64_t kColumns = 512;  // columns of grad_gates per task

// ds [E] of one token. Which slots the forward kept is found again from the scores: a weight of 0 does not tell, since
// "score" may keep one. Where it does mean a derivative of 0, grad is not read: it may be NaN from an expert that the
// forward never read. `ids` is scratch [E].
template <class Acc>
void score_gradient(const RouteArgs& args, int64_t token, const Acc* scores, const Acc* grad, const Acc* weights,
                    const int32_t* experts, int32_t* ids, Acc* ds) {
  std::fill(ds, ds + args.E, Acc(0));
  const int64_t n = eligible_experts(args, token, ids);
  std::optional<Softmax<Acc>> all;
  if (args.top_p > 0 || args.weighting == Weighting::softmax_all) all.emplace(scores, ids, n);
  int64_t kept = std::min(args.top_k, n);
  if (args.top_p > 0) kept = kept_by_top_p(args, *all, scores, experts, kept);
  Acc mean = 0;
  for (int64_t k = 0; k < kept; ++k)
    if (weights[k] != 0) mean += weights[k] * grad[k];
  if (args.weighting == Weighting::softmax_all)
    for (int64_t i = 0; i < n; ++i) ds[ids[i]] = -all->of(scores[ids[i]]) * mean;
  for (int64_t k = 0; k < kept; ++k) {
    const Acc w = weights[k];
    if (w == 0 && args.weighting != Weighting::score) continue;
    switch (args.weighting) {
      case Weighting::softmax:
        ds[experts[k]] = w * (grad[k] - mean);
        break;
      case Weighting::softmax_all:
        ds[experts[k]] += w * grad[k];
        break;
      case Weighting::sigmoid:
        ds[experts[k]] = w * (1 - w) * grad[k];
        break;
      case Weighting::score:
        ds[experts[k]] = grad[k];
    }
  }
}

// dnorm [D] -> dx [D], in place.
template <class Acc>
void normalize_backward(Normalize mode, int64_t D, const Statistics<Acc>& stats, const Acc* normalized, Acc* grad) {
  if (mode == Normalize::none) return;
  double sum = 0, along = 0;
  for (int64_t d = 0; d < D; ++d) {
    sum += grad[d];
    along += static_cast<double>(grad[d]) * normalized[d];
  }
  Acc shift = 0, slope = 0;
  if (mode == Normalize::standardize) {
    shift = static_cast<Acc>(sum / static_cast<double>(D));
    slope = static_cast<Acc>(along / static_cast<double>(D));
  } else if (!stats.clamped) {
    slope = static_cast<Acc>(along);
  }
  for (int64_t d = 0; d < D; ++d) grad[d] = (grad[d] - shift - normalized[d] * slope) * stats.factor;
}

template <class Acc>
struct Backward {
  const RouteArgs& args;
  const Acc *grad, *weights;
  const int32_t* experts;
  Acc* dz;                             // [T,E]; holds ds until grad_bias is summed, then ds * scale * f'(z)
  std::vector<Statistics<Acc>> stats;  // [T]
  Tensor gate_rows;                    // the gates, each a row

  void block(int64_t index, bool keep_ds, const Tensor* grad_x) {
    const int64_t begin = index * kTokenBlock, count = std::min(kTokenBlock, args.T - begin);
    Acc* normalized = scratch<Acc>(0, kTokenBlock * args.D);
    Acc* z = scratch<Acc>(1, kTokenBlock * args.E);
    Acc* scores = scratch<Acc>(2, args.E);
    Acc* dx = scratch<Acc>(3, args.D);
    int32_t* ids = scratch<int32_t>(4, args.E);
    const Acc* token[kTokenBlock];
    similarities<Acc>(args, begin, count, normalized, token, stats.data() + begin, z);
    for (int64_t i = 0; i < count; ++i) {
      row_micro<Acc>().multiply(args.D, token[i], stats[begin + i].factor, normalized + i * args.D);
      const int64_t t = begin + i, at = t * args.top_k;
      Acc* ds = dz + t * args.E;
      std::copy(z + i * args.E, z + (i + 1) * args.E, scores);
      finish_scores(args, t, scores);
      score_gradient(args, t, scores, grad + at, weights + at, experts + at, ids, ds);
      if (keep_ds) continue;
      for (int64_t e = 0; e < args.E; ++e) {
        const Acc slope = args.absolute ? Acc((z[i * args.E + e] > 0) - (z[i * args.E + e] < 0)) : Acc(1);
        ds[e] *= static_cast<Acc>(args.scale) * slope;
      }
      if (grad_x) input_gradient(t, ds, normalized + i * args.D, dx, *grad_x);
    }
  }

  void input_gradient(int64_t t, const Acc* dz_row, const Acc* normalized, Acc* dx, const Tensor& grad_x) {
    const Matrix gates(gate_rows), out(grad_x);
    const auto& rows = micro<Acc>(gates.dtype);
    std::fill(dx, dx + args.D, Acc(0));
    for (int64_t e = 0; e < args.E; ++e) {
      if (dz_row[e] == 0) continue;
      const Acc* h = dz_row + e;
      const void* gate = gates.at(e);
      rows.axpy(1, 1, args.D, &h, &gate, &dx, &dx, nullptr);
    }
    normalize_backward(args.normalize, args.D, stats[t], normalized, dx);
    micro<Acc>(out.dtype).store(args.D, dx, out.at(t));
  }

  void gate_gradient(const Tensor& grad_gates) {
    const Matrix x(args.x), out(grad_gates);
    const int64_t chunks = ceil_div(args.D, kColumns);
    const DType acc = std::is_same_v<Acc, double> ? DType::f64 : DType::f32;
    // a block of experts shares the normalized columns of each token
    parallel(chunks, args.T * args.top_k * kColumns, [&](int64_t chunk) {
      const int64_t begin = chunk * kColumns, count = std::min(kColumns, args.D - begin);
      Acc* sums = scratch<Acc>(0, args.E * count);
      Acc* token = scratch<Acc>(1, count);
      std::fill(sums, sums + args.E * count, Acc(0));
      const void* row = token;
      for (int64_t t = 0; t < args.T; ++t) {
        micro<Acc>(x.dtype).load(count, x.at(t, begin), token);
        for (Acc shift : {stats[t].shift, stats[t].rest})
          if (shift != 0) row_micro<Acc>().centre(count, token, shift, token);
        row_micro<Acc>().multiply(count, token, stats[t].factor, token);
        for (int64_t e = 0; e < args.E; ++e) {
          const Acc* h = dz + t * args.E + e;
          Acc* sum = sums + e * count;
          if (*h != 0) micro<Acc>(acc).axpy(1, 1, count, &h, &row, &sum, &sum, nullptr);
        }
      }
      for (int64_t e = 0; e < args.E; ++e) micro<Acc>(out.dtype).store(count, sums + e * count, out.at(e, begin));
    });
  }

  void bias_gradient(const Tensor& grad_bias) {
    const Matrix out(grad_bias);
    const int64_t rows = grad_bias.size(0), E = args.E;
    std::vector<Acc> sums(rows * E, Acc(0));
    for (int64_t t = 0; t < args.T; ++t)
      for (int64_t e = 0; e < E; ++e) sums[args.row(t) * E + e] += dz[t * E + e];
    for (int64_t n = 0; n < rows; ++n) micro<Acc>(out.dtype).store(E, sums.data() + n * E, out.at(n));
  }
};

template <class Acc>
void run(const RouteArgs& args, const Tensor& grad, const Tensor& weights, const Tensor& experts, const Tensor* grad_x,
         const Tensor* grad_gates, const Tensor* grad_bias) {
  const ScalarType type = scalar_type<Acc>;
  const Tensor g = dense(grad, type);
  const Tensor w = dense(weights), ids = dense(experts);
  for (int64_t i = 0; i < args.T * args.top_k; ++i) {
    const int32_t id = static_cast<const int32_t*>(ids.data_ptr())[i];
    MOERGE_CHECK(args.check, id >= 0 && id < args.E, "experts must hold ids in [0, E=", args.E, "), got ", id);
  }
  const Tensor dz = new_tensor(args.x, {args.T, args.E}, type);
  Backward<Acc> backward{args,
                         static_cast<const Acc*>(g.data_ptr()),
                         static_cast<const Acc*>(w.data_ptr()),
                         static_cast<const int32_t*>(ids.data_ptr()),
                         static_cast<Acc*>(dz.data_ptr()),
                         std::vector<Statistics<Acc>>(args.T),
                         rows_contiguous(args.gates)};
  const int64_t blocks = ceil_div(args.T, kTokenBlock), cost = std::min(args.T, kTokenBlock) * args.D * args.E;
  if (grad_bias) {
    parallel(blocks, cost, [&](int64_t block) { backward.block(block, true, nullptr); });
    backward.bias_gradient(*grad_bias);
  }
  if (!grad_x && !grad_gates) return;
  parallel(blocks, cost, [&](int64_t block) { backward.block(block, false, grad_x); });
  if (grad_gates) backward.gate_gradient(*grad_gates);
}

std::tuple<Tensor, Tensor, Tensor> route_backward(Tensor grad_weights, Tensor weights, Tensor experts, Tensor x,
                                                  Tensor gates, int64_t needs, int64_t top_k, Word normalize,
                                                  bool absolute, std::optional<double> scale,
                                                  std::optional<Tensor> bias, std::optional<Tensor> rows,
                                                  std::optional<Tensor> mask, std::optional<double> top_p,
                                                  Word weighting) {
  const Check check{"route_backward", Device::cpu};
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const RouteArgs args(check, x, gates, options);
  check_route_results(check, args, grad_weights, weights, experts);
  const auto result = [&](int bit, const Tensor& like, int64_t rows, int64_t columns) {
    const bool needed = needs & (1 << bit);
    Tensor out =
        needed ? new_tensor(like, {rows, columns}, like.scalar_type()) : new_tensor(like, {0}, like.scalar_type());
    if (needed && args.T == 0) torch::stable::zero_(out);
    return out;
  };
  Tensor grad_x = result(0, x, args.T, args.D);
  Tensor grad_gates = result(1, gates, args.E, args.D);
  Tensor grad_bias = result(bias ? 2 : 31, bias ? *bias : x, bias ? bias->size(0) : 0, args.E);
  if (args.T == 0) return {grad_x, grad_gates, grad_bias};
  const Tensor *dx = needs & 1 ? &grad_x : nullptr, *dg = needs & 2 ? &grad_gates : nullptr;
  const Tensor* db = bias && (needs & 4) ? &grad_bias : nullptr;
  if (args.wide)
    run<double>(args, grad_weights, weights, experts, dx, dg, db);
  else
    run<float>(args, grad_weights, weights, experts, dx, dg, db);
  return {grad_x, grad_gates, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) { m.impl("route_backward", TORCH_BOX(&route_backward)); }

}  // namespace moerge::cpu
