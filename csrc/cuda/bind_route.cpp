// moerge::route and its gradient.
#include "bind.h"

namespace moerge::cuda {

Route route_arguments(const RoutePlan& plan, Call& call, const Tensor& x_in, const Tensor& gates_in,
                      const RouteOptions& options) {
  Route p{};
  p.T = plan.T, p.D = plan.D, p.E = plan.E, p.K = plan.top_k;
  p.normalize = plan.normalize;
  p.weighting = plan.weighting;
  p.absolute = plan.absolute;
  p.scale = plan.scale, p.top_p = plan.top_p;
  p.wide = plan.wide;
  if (options.bias) p.bias = call.read(dense(*options.bias, accumulator(p.wide)));
  if (options.mask) p.mask = static_cast<const bool*>(call.read(dense(*options.mask)));
  p.mask_per_row = options.mask && options.mask->dim() == 2;
  p.row = row_map(call, options.rows, plan.n_rows, plan.tokens_per_row);
  const Tensor x = readable_rows(x_in), gates = readable_rows(gates_in);
  p.x = matrix(x, call.read(x));
  p.gates = matrix(gates, call.read(gates));
  return p;
}

namespace {

// What route_scores and route_select need besides.
void give_workspace(Route& p, Call& call) {
  p.statistics = call.workspace(p.T * kStatistics * accumulator_size(p.wide));
  p.parts = score_parts(p);
  p.similarity = call.workspace(p.parts * p.T * p.E * accumulator_size(p.wide));
  if (score_moments(p)) {
    p.moments = static_cast<float*>(call.workspace(p.parts * p.T * kMoments * 4));
    p.gate_sums = static_cast<float*>(call.workspace(p.parts * p.E * 4));
  }
}

}  // namespace

void run_route(Route p, Call& call, const Tensor& weights, const Tensor& experts, Stream stream) {
  if (p.T == 0) return;
  give_workspace(p, call);
  p.weights = call.write(weights);
  p.experts = static_cast<int32_t*>(call.write(experts));
  route_scores(p, stream);
  route_select(p, stream);
  call.finish();
}

namespace {

std::tuple<Tensor, Tensor> route(Tensor x, Tensor gates, int64_t top_k, Word normalize, bool absolute,
                                 std::optional<double> scale, std::optional<Tensor> bias, std::optional<Tensor> rows,
                                 std::optional<Tensor> mask, std::optional<double> top_p, Word weighting) {
  const Check check{"route", kDevice};
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const RoutePlan plan = check_route(check, x, gates, options);
  Call call(x);
  const Route p = route_arguments(plan, call, x, gates, options);
  Tensor weights = new_tensor(x, {p.T, p.K}, accumulator(p.wide));
  Tensor experts = new_tensor(x, {p.T, p.K}, ScalarType::Int);
  run_route(p, call, weights, experts, call.stream());
  return {weights, experts};
}

std::tuple<Tensor, Tensor, Tensor> route_backward_op(Tensor grad_weights, Tensor weights, Tensor experts, Tensor x,
                                                     Tensor gates, int64_t needs, int64_t top_k, Word normalize,
                                                     bool absolute, std::optional<double> scale,
                                                     std::optional<Tensor> bias, std::optional<Tensor> rows,
                                                     std::optional<Tensor> mask, std::optional<double> top_p,
                                                     Word weighting) {
  const Check check{"route_backward", kDevice};
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const RoutePlan plan = check_route(check, x, gates, options);
  check_route_results(check, plan, grad_weights, weights, experts);
  Call call(x);
  Route p = route_arguments(plan, call, x, gates, options);
  RouteGradient g{};
  const auto result = [&](bool needed, const Tensor& like, int64_t rows, int64_t columns, Matrix& target) {
    if (!needed) return new_tensor(like, {0}, like.scalar_type());
    Tensor out = new_tensor(like, {rows, columns}, like.scalar_type());
    if (p.T == 0)
      torch::stable::zero_(out);
    else
      target = {call.write(out), dtype_of(out), columns};
    return out;
  };
  Tensor grad_x = result(needs & 1, x, p.T, p.D, g.x);
  Tensor grad_gates = result(needs & 2, gates, p.E, p.D, g.gates);
  Tensor grad_bias = result(bias && (needs & 4), bias ? *bias : x, bias ? bias->size(0) : 0, p.E, g.bias);
  if (p.T == 0) return {grad_x, grad_gates, grad_bias};
  give_workspace(p, call);
  p.weights = call.read(dense(weights));
  p.experts = static_cast<int32_t*>(call.read(dense(experts)));
  g.grad = call.read(dense(grad_weights, accumulator(p.wide)));
  g.score_gradient = call.workspace(p.T * p.E * accumulator_size(p.wide));
  g.forward = p;
  route_scores(p, call.stream());
  route_add_parts(p, call.stream());
  route_backward(g, call.stream());
  call.finish();
  return {grad_x, grad_gates, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, MOERGE_DISPATCH_KEY, m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward_op));
}

}  // namespace moerge::cuda
