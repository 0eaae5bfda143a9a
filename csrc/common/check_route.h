// The arguments of route and routed_lora, checked: the same code, so the same messages, for every device.
#pragma once

#include <cmath>

#include "tensors.h"
#include "word.h"

namespace moerge {

// The options of route, as the ops take them.
struct RouteOptions {
  int64_t top_k;
  std::string normalize;
  bool absolute;
  std::optional<double> scale;
  std::optional<Tensor> bias, rows, mask;
  std::optional<double> top_p;
  std::string weighting;
};

// The options once they are known to be right.
struct RoutePlan {
  int64_t T, D, E, top_k;
  Normalize normalize;
  Weighting weighting;
  bool absolute;
  double scale, top_p;     // top_p 0: no cut
  bool wide;               // the accumulator is double
  int64_t n_rows;          // of bias and mask; 0: neither is per row
  int64_t tokens_per_row;  // where rows does not say
};

inline Normalize parse_normalize(const Check& check, const std::string& name) {
  if (name == "standardize") return Normalize::standardize;
  if (name == "unit") return Normalize::unit;
  if (name == "none") return Normalize::none;
  check.fail("normalize must be 'standardize', 'unit' or 'none', got '", name, "'");
}

inline Weighting parse_weighting(const Check& check, const std::string& name) {
  if (name == "softmax") return Weighting::softmax;
  if (name == "softmax_all") return Weighting::softmax_all;
  if (name == "sigmoid") return Weighting::sigmoid;
  if (name == "score") return Weighting::score;
  check.fail("weighting must be 'softmax', 'softmax_all', 'sigmoid' or 'score', got '", name, "'");
}

// Checks which of n_rows rows (0: nothing is per row) each of T tokens belongs to, but for the values of `rows`.
// Returns how many adjacent tokens share a row where `rows` does not say.
inline int64_t check_rows(const Check& check, const std::optional<Tensor>& rows, int64_t T, int64_t n_rows) {
  if (rows) {
    check.dtype(*rows, "rows", ScalarType::Int);
    check.shape(*rows, "rows", {T}, "[T=", T, "]");
  }
  const int64_t n = n_rows > 1 ? n_rows : 1;
  MOERGE_CHECK(check, rows || T % n == 0, "the number of tokens T=", T, " must be a multiple of N=", n,
               " rows, or rows [T] must say which row each token belongs to");
  return T > n ? T / n : 1;
}

// Bias and mask; returns how many rows they have, 0 when neither is per row.
inline int64_t check_bias_and_mask(const Check& check, const RouteOptions& options, int64_t T, int64_t E) {
  int64_t n_rows = 0;
  if (options.bias) {
    const Tensor& bias = *options.bias;
    check.floating(bias, "bias");
    check.shape(bias, "bias", {-1, E}, "[N, E=", E, "]");
    n_rows = bias.size(0);
    MOERGE_CHECK(check, n_rows > 0 || T == 0, "bias must have at least one row, got ", shape_of(bias));
  }
  if (!options.mask) return n_rows;
  const Tensor& mask = *options.mask;
  check.dtype(mask, "mask", ScalarType::Bool);
  if (mask.dim() != 2) {
    check.shape(mask, "mask", {E}, "[E=", E, "] or [N, E=", E, "]");
    return n_rows;
  }
  check.shape(mask, "mask", {n_rows ? n_rows : -1, E}, "[E=", E, "] or [N, E=", E, "] with bias's N");
  n_rows = mask.size(0);
  MOERGE_CHECK(check, n_rows > 0 || T == 0, "mask must have at least one row, got ", shape_of(mask));
  return n_rows;
}

inline RoutePlan check_route(const Check& check, const Tensor& x, const Tensor& gates, const RouteOptions& options) {
  RoutePlan p;
  p.normalize = parse_normalize(check, options.normalize);
  p.weighting = parse_weighting(check, options.weighting);
  check.floating(x, "x");
  check.floating(gates, "gates");
  MOERGE_CHECK(check, x.dim() == 2, "x must be [T, D], got ", shape_of(x));
  p.T = x.size(0), p.D = x.size(1);
  check.shape(gates, "gates", {-1, p.D}, "[E, D=", p.D, "] to match x");
  p.E = gates.size(0), p.top_k = options.top_k;
  MOERGE_CHECK(check, p.top_k >= 1 && p.top_k <= p.E, "top_k must be in [1, E=", p.E, "], got ", p.top_k);
  p.top_p = options.top_p.value_or(0);
  MOERGE_CHECK(check, !options.top_p || (p.top_p > 0 && p.top_p <= 1), "top_p must be in (0, 1], got ", p.top_p);
  p.absolute = options.absolute;
  p.scale = options.scale.value_or(p.normalize == Normalize::standardize && p.D > 0 ? 1 / std::sqrt(double(p.D)) : 1);
  p.wide = is_double(x);
  p.n_rows = check_bias_and_mask(check, options, p.T, p.E);
  p.tokens_per_row = check_rows(check, options.rows, p.T, p.n_rows);
  return p;
}

// What the forward returned and its gradient, for route_backward.
inline void check_route_results(const Check& check, const RoutePlan& p, const Tensor& grad_weights,
                                const Tensor& weights, const Tensor& experts) {
  const auto slots = [&](const Tensor& tensor, const char* name) {
    check.shape(tensor, name, {p.T, p.top_k}, "[T=", p.T, ", K=", p.top_k, "]");
  };
  slots(grad_weights, "grad_weights"), slots(weights, "weights"), slots(experts, "experts");
  check.floating(grad_weights, "grad_weights");
  check.dtype(weights, "weights", accumulator(p.wide));
  check.dtype(experts, "experts", ScalarType::Int);
}

}  // namespace moerge
