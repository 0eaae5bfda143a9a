// moerge::route on the CPU: blocks of tokens over threads; within a block, statistics and similarities, then one
// selection per token. No [T,E] array exists: scores live in the block.
#include "route.h"

#include <numeric>

namespace moerge::cpu {

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

// Numbers before NaN, then the higher score, then the lower id.
template <class Acc>
struct Better {
  const Acc* scores;
  bool operator()(int32_t a, int32_t b) const {
    const bool nan_a = std::isnan(scores[a]), nan_b = std::isnan(scores[b]);
    if (nan_a != nan_b) return nan_b;
    if (!nan_a && scores[a] != scores[b]) return scores[a] > scores[b];
    return a < b;
  }
};

// The best min(K, number of candidates) of ids[0..n), best first, at the front of ids.
template <class Acc>
void select(const Acc* scores, int32_t* ids, int64_t n, int64_t K) {
  const Better<Acc> better{scores};
  if (K > 8) {
    std::partial_sort(ids, ids + std::min(K, n), ids + n, better);
    return;
  }
  // ids[0..held) is the sorted best so far; candidates arrive in id order, so an equal one never displaces
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t candidate = ids[i];
    if (held == K && !better(candidate, ids[held - 1])) continue;
    int64_t at = held < K ? held++ : held - 1;
    for (; at > 0 && better(candidate, ids[at - 1]); --at) ids[at] = ids[at - 1];
    ids[at] = candidate;
  }
}

// One token: scores [E] -> weights [K], experts [K]. `ids` is scratch [E].
template <class Acc>
void choose(const RouteArgs& args, int64_t token, const Acc* scores, int32_t* ids, Acc* weights, int32_t* experts) {
  const int64_t K = args.top_k, n = eligible_experts(args, token, ids);
  std::optional<Softmax<Acc>> all;
  if (args.top_p > 0 || args.weighting == Weighting::softmax_all) all.emplace(scores, ids, n);
  select(scores, ids, n, K);
  int64_t kept = std::min(K, n);
  if (args.top_p > 0) kept = kept_by_top_p(args, *all, scores, ids, kept);
  const Softmax<Acc> selected(scores, ids, kept);
  for (int64_t k = 0; k < kept; ++k) {
    const Acc score = scores[ids[k]];
    experts[k] = ids[k];
    switch (args.weighting) {
      case Weighting::softmax:
        weights[k] = selected.of(score);
        break;
      case Weighting::softmax_all:
        weights[k] = all->of(score);
        break;
      case Weighting::sigmoid:
        weights[k] = 1 / (1 + std::exp(-score));
        break;
      case Weighting::score:
        weights[k] = score;
    }
  }
  // unused slots: weight 0 and the lowest ids that no kept slot has
  int32_t unused = 0;
  for (int64_t k = kept; k < K; ++k, ++unused) {
    while (std::find(experts, experts + kept, unused) != experts + kept) ++unused;
    experts[k] = unused;
    weights[k] = 0;
  }
}

}  // namespace

RouteArgs::RouteArgs(const Check& check, const Tensor& x_in, const Tensor& gates_in, int64_t top_k,
                     const std::string& normalize, bool absolute, std::optional<double> scale,
                     std::optional<Tensor> bias_in, std::optional<Tensor> rows, std::optional<Tensor> mask_in,
                     std::optional<double> top_p, const std::string& weighting)
    : check(check),
      x(x_in),
      gates(gates_in),
      top_k(top_k),
      normalize(parse_normalize(check, normalize)),
      absolute(absolute),
      top_p(top_p.value_or(0)),
      weighting(parse_weighting(check, weighting)) {
  check.floating(x, "x");
  check.floating(gates, "gates");
  check.that(x.dim() == 2, "x must be [T, D], got ", shape_of(x));
  T = x.size(0), D = x.size(1);
  check.shape(gates, "gates", {-1, D}, text("[E, D=", D, "] to match x"));
  E = gates.size(0);
  check.that(top_k >= 1 && top_k <= E, "top_k must be in [1, E=", E, "], got ", top_k);
  check.that(!top_p || (*top_p > 0 && *top_p <= 1), "top_p must be in (0, 1], got ", top_p.value_or(0));
  this->scale = scale.value_or(this->normalize == Normalize::standardize && D > 0 ? 1 / std::sqrt(double(D)) : 1);
  n_rows = 0;
  const ScalarType acc = is_double(x) ? ScalarType::Double : ScalarType::Float;
  if (bias_in) {
    check.floating(*bias_in, "bias");
    check.shape(*bias_in, "bias", {-1, E}, text("[N, E=", E, "]"));
    n_rows = bias_in->size(0);
    check.that(n_rows > 0 || T == 0, "bias must have at least one row, got ", shape_of(*bias_in));
    bias = dense(*bias_in, acc);
  }
  if (mask_in) {
    check.dtype(*mask_in, "mask", ScalarType::Bool);
    if (mask_in->dim() == 2) {
      check.shape(*mask_in, "mask", {n_rows ? n_rows : -1, E}, text("[E=", E, "] or [N, E=", E, "] with bias's N"));
      n_rows = mask_in->size(0);
      check.that(n_rows > 0 || T == 0, "mask must have at least one row, got ", shape_of(*mask_in));
    } else {
      check.shape(*mask_in, "mask", {E}, text("[E=", E, "] or [N, E=", E, "]"));
    }
    mask = dense(*mask_in);
  }
  row = row_map(check, rows, T, n_rows, rows_storage);
  x = rows_contiguous(x);
  gates = rows_contiguous(gates);
}

template <class Acc>
void route_forward(const RouteArgs& args, Acc* weights, int32_t* experts) {
  const int64_t T = args.T, K = args.top_k;
  parallel(ceil_div(T, kTokenBlock), std::min(T, kTokenBlock) * args.D * args.E, [&](int64_t block) {
    const int64_t begin = block * kTokenBlock, count = std::min(kTokenBlock, T - begin);
    Acc* normalized = scratch<Acc>(0, kTokenBlock * args.D);
    Acc* scores = scratch<Acc>(1, kTokenBlock * args.E);
    int32_t* ids = scratch<int32_t>(2, args.E);
    Statistics<Acc> stats[kTokenBlock];
    similarities<Acc>(args, begin, count, normalized, stats, scores);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = begin + i;
      finish_scores(args, t, scores + i * args.E);
      choose(args, t, scores + i * args.E, ids, weights + t * K, experts + t * K);
    }
  });
}

template void route_forward<float>(const RouteArgs&, float*, int32_t*);
template void route_forward<double>(const RouteArgs&, double*, int32_t*);

namespace {

std::tuple<Tensor, Tensor> route(Tensor x, Tensor gates, int64_t top_k, std::string normalize, bool absolute,
                                 std::optional<double> scale, std::optional<Tensor> bias, std::optional<Tensor> rows,
                                 std::optional<Tensor> mask, std::optional<double> top_p, std::string weighting) {
  const Check check{"route"};
  const RouteArgs args(check, x, gates, top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting);
  const bool wide = is_double(x);
  Tensor weights = new_tensor(x, {args.T, top_k}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor experts = new_tensor(x, {args.T, top_k}, ScalarType::Int);
  int32_t* ids = static_cast<int32_t*>(experts.data_ptr());
  if (args.T == 0) return {weights, experts};
  if (wide)
    route_forward<double>(args, static_cast<double*>(weights.data_ptr()), ids);
  else
    route_forward<float>(args, static_cast<float*>(weights.data_ptr()), ids);
  return {weights, experts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) { m.impl("route", TORCH_BOX(&route)); }

}  // namespace moerge::cpu
