// moerge::route and its gradient.
#include "bind.h"

namespace moerge::cuda {

namespace {

Normalize parse_normalize(const Check& check, const std::string& name) {
  if (name == "standardize") return Normalize::standardize;
  if (name == "unit") return Normalize::unit;
  if (name == "none") return Normalize::none;
  check.fail("normalize must be 'standardize', 'unit' or 'none', got '", name, "'");
}

Weighting parse_weighting(const Check& check, const std::string& name) {
  if (name == "softmax") return Weighting::softmax;
  if (name == "softmax_all") return Weighting::softmax_all;
  if (name == "sigmoid") return Weighting::sigmoid;
  if (name == "score") return Weighting::score;
  check.fail("weighting must be 'softmax', 'softmax_all', 'sigmoid' or 'score', got '", name, "'");
}

// Bias and mask, and how many rows they have.
int64_t row_arguments(const Check& check, Call& call, const RouteOptions& options, Route& p) {
  int64_t n_rows = 0;
  if (options.bias) {
    const Tensor& bias = *options.bias;
    MOERGE_CHECK(check, on_device(bias), "bias must be on ", kDevice);
    check.floating(bias, "bias");
    check.shape(bias, "bias", {-1, p.E}, "[N, E=", p.E, "]");
    n_rows = bias.size(0);
    MOERGE_CHECK(check, n_rows > 0 || p.T == 0, "bias must have at least one row, got ", shape_of(bias));
    p.bias = call.read(dense(bias, accumulator(p.wide)));
  }
  if (options.mask) {
    const Tensor& mask = *options.mask;
    MOERGE_CHECK(check, on_device(mask), "mask must be on ", kDevice);
    check.dtype(mask, "mask", ScalarType::Bool);
    p.mask_per_row = mask.dim() == 2;
    if (p.mask_per_row) {
      check.shape(mask, "mask", {n_rows ? n_rows : -1, p.E}, "[E=", p.E, "] or [N, E=", p.E, "] with bias's N");
      n_rows = mask.size(0);
      MOERGE_CHECK(check, n_rows > 0 || p.T == 0, "mask must have at least one row, got ", shape_of(mask));
    } else {
      check.shape(mask, "mask", {p.E}, "[E=", p.E, "] or [N, E=", p.E, "]");
    }
    p.mask = static_cast<const bool*>(call.read(dense(mask)));
  }
  return n_rows;
}

}  // namespace

Route route_arguments(const Check& check, Call& call, const Tensor& x_in, const Tensor& gates_in,
                      const RouteOptions& options) {
  Route p{};
  MOERGE_CHECK(check, on_device(x_in) && on_device(gates_in), "x and gates must be on ", kDevice);
  p.normalize = parse_normalize(check, options.normalize);
  p.weighting = parse_weighting(check, options.weighting);
  check.floating(x_in, "x");
  check.floating(gates_in, "gates");
  MOERGE_CHECK(check, x_in.dim() == 2, "x must be [T, D], got ", shape_of(x_in));
  p.T = x_in.size(0), p.D = x_in.size(1);
  check.shape(gates_in, "gates", {-1, p.D}, "[E, D=", p.D, "] to match x");
  p.E = gates_in.size(0), p.K = options.top_k;
  MOERGE_CHECK(check, p.K >= 1 && p.K <= p.E, "top_k must be in [1, E=", p.E, "], got ", p.K);
  const double top_p = options.top_p.value_or(0);
  MOERGE_CHECK(check, !options.top_p || (top_p > 0 && top_p <= 1), "top_p must be in (0, 1], got ", top_p);
  p.top_p = top_p;
  p.absolute = options.absolute;
  p.scale = options.scale.value_or(p.normalize == Normalize::standardize && p.D > 0 ? 1 / std::sqrt(double(p.D)) : 1);
  p.wide = is_double(x_in);
  p.row = row_map(check, call, options.rows, p.T, row_arguments(check, call, options, p));
  const Tensor x = readable_rows(x_in), gates = readable_rows(gates_in);
  p.x = matrix(x, call.read(x));
  p.gates = matrix(gates, call.read(gates));
  p.statistics = call.workspace(p.T * kStatistics * accumulator_size(p.wide));
  p.parts = score_parts(p);
  p.similarity = call.workspace(p.parts * p.T * p.E * accumulator_size(p.wide));
  return p;
}

void run_route(Route p, Call& call, const Tensor& weights, const Tensor& experts) {
  if (p.T == 0) return;
  p.weights = call.write(weights);
  p.experts = static_cast<int32_t*>(call.write(experts));
  route_scores(p, call.stream());
  route_select(p, call.stream());
  call.finish();
}

namespace {

std::tuple<Tensor, Tensor> route(Tensor x, Tensor gates, int64_t top_k, std::string normalize, bool absolute,
                                 std::optional<double> scale, std::optional<Tensor> bias, std::optional<Tensor> rows,
                                 std::optional<Tensor> mask, std::optional<double> top_p, std::string weighting) {
  Call call(x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const Route p = route_arguments(Check{"route"}, call, x, gates, options);
  Tensor weights = new_tensor(x, {p.T, p.K}, accumulator(p.wide));
  Tensor experts = new_tensor(x, {p.T, p.K}, ScalarType::Int);
  run_route(p, call, weights, experts);
  return {weights, experts};
}

std::tuple<Tensor, Tensor, Tensor> route_backward_op(Tensor grad_weights, Tensor weights, Tensor experts, Tensor x,
                                                     Tensor gates, int64_t needs, int64_t top_k, std::string normalize,
                                                     bool absolute, std::optional<double> scale,
                                                     std::optional<Tensor> bias, std::optional<Tensor> rows,
                                                     std::optional<Tensor> mask, std::optional<double> top_p,
                                                     std::string weighting) {
  const Check check{"route_backward"};
  Call call(x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  Route p = route_arguments(check, call, x, gates, options);
  const std::string shape = text("[T=", p.T, ", K=", top_k, "]");
  check.shape(grad_weights, "grad_weights", {p.T, top_k}, shape);
  check.shape(weights, "weights", {p.T, top_k}, shape);
  check.shape(experts, "experts", {p.T, top_k}, shape);
  check.dtype(weights, "weights", accumulator(p.wide));
  check.dtype(experts, "experts", ScalarType::Int);
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
  p.weights = call.read(dense(weights));
  p.experts = static_cast<int32_t*>(call.read(dense(experts)));
  g.grad = call.read(dense(grad_weights, accumulator(p.wide)));
  g.score_gradient = call.workspace(p.T * p.E * accumulator_size(p.wide));
  p.parts = 1;
  g.forward = p;
  route_scores(p, call.stream());
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
