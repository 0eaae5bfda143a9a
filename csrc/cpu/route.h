// The router on the CPU: shared by route, routed_lora and route_backward.
//
//   score_te = f(norm(x_t) . g_e) * scale + bias[row(t), e]       f: identity or absolute value
//   norm: (u - mean) / sqrt(var + 1e-5) | u / max(|u|, 1e-12) | u
//   kept: the top_k eligible experts, cut by top_p; weights by `weighting`
#pragma once

#include <algorithm>
#include <limits>

#include "view.h"

namespace moerge::cpu {

enum class Normalize { standardize, unit, none };
enum class Weighting { softmax, softmax_all, sigmoid, score };

constexpr int64_t kTokenBlock = 16;  // tokens scored together

struct RouteArgs {
  const Check& check;
  Tensor x, gates;
  int64_t top_k;
  Normalize normalize;
  bool absolute;
  double scale, top_p;  // top_p 0: no cut
  Weighting weighting;
  std::optional<Tensor> bias, mask;
  RowMap row;
  int64_t T, D, E, n_rows;  // n_rows 0: neither bias nor mask is per row
  Tensor rows_storage;

  RouteArgs(const Check& check, const Tensor& x, const Tensor& gates, int64_t top_k, const std::string& normalize,
            bool absolute, std::optional<double> scale, std::optional<Tensor> bias, std::optional<Tensor> rows,
            std::optional<Tensor> mask, std::optional<double> top_p, const std::string& weighting);

  bool eligible(int64_t token, int64_t expert) const {
    if (!mask) return true;
    const bool* allowed = static_cast<const bool*>(mask->data_ptr());
    return mask->dim() == 1 ? allowed[expert] : allowed[row(token) * E + expert];
  }
};

// What a token's normalization needs: norm(x) = (x - shift - rest) * factor, where shift + rest is the mean (the rest
// is what Acc cannot hold of it; left in, it would offset every element).
template <class Acc>
struct Statistics {
  Acc shift = 0, rest = 0, factor = 1;
  bool clamped = false;  // "unit" with a norm below the floor
};

// Normalizes x[0..D) into out (which may be x) and returns the statistics.
template <class Acc>
Statistics<Acc> normalize_row(Normalize mode, int64_t D, const Acc* x, Acc* out) {
  Statistics<Acc> stats;
  if (mode == Normalize::none || D == 0) {
    if (out != x) std::copy(x, x + D, out);
    return stats;
  }
  const RowMicro<Acc>& rows = row_micro<Acc>();
  if (mode == Normalize::standardize) {
    const double mean = rows.sum(D, x) / static_cast<double>(D);
    const double variance = rows.squares(D, x, mean) / static_cast<double>(D);
    stats.shift = static_cast<Acc>(mean);
    stats.rest = static_cast<Acc>(mean - static_cast<double>(stats.shift));
    stats.factor = static_cast<Acc>(1 / std::sqrt(variance + 1e-5));
  } else {
    const double norm = std::sqrt(rows.squares(D, x, 0));
    stats.clamped = norm < 1e-12;
    stats.factor = static_cast<Acc>(stats.clamped ? 1e12 : 1 / norm);
  }
  rows.affine(D, x, stats.shift, stats.rest, stats.factor, out);
  return stats;
}

// Normalized tokens [begin, begin+count) in `out` ([count,D]) and raw similarities norm(x).g in `scores` ([count,E]).
template <class Acc>
void similarities(const RouteArgs& args, int64_t begin, int64_t count, Acc* normalized, Statistics<Acc>* stats,
                  Acc* scores) {
  const Matrix x(args.x), gates(args.gates);
  std::vector<const Acc*> token(count);
  std::vector<Acc*> out(count);
  std::vector<const void*> gate(args.E);
  for (int64_t i = 0; i < count; ++i) {
    Acc* row = normalized + i * args.D;
    stats[i] = normalize_row<Acc>(args.normalize, args.D, row_as<Acc>(x, begin + i, args.D, row), row);
    token[i] = row;
    out[i] = scores + i * args.E;
  }
  for (int64_t e = 0; e < args.E; ++e) gate[e] = gates.at(e);
  micro<Acc>(gates.dtype).dot(count, args.E, args.D, token.data(), gate.data(), out.data());
}

// Similarity -> score, in place, for one token.
template <class Acc>
void finish_scores(const RouteArgs& args, int64_t token, Acc* scores) {
  const Acc scale = static_cast<Acc>(args.scale);
  for (int64_t e = 0; e < args.E; ++e) scores[e] = (args.absolute ? std::abs(scores[e]) : scores[e]) * scale;
  if (!args.bias) return;
  const Acc* bias = static_cast<const Acc*>(args.bias->data_ptr()) + args.row(token) * args.E;
  for (int64_t e = 0; e < args.E; ++e) scores[e] += bias[e];
}

// The eligible experts of a token in id order, in `ids` ([E]); returns how many.
inline int64_t eligible_experts(const RouteArgs& args, int64_t token, int32_t* ids) {
  int64_t n = 0;
  for (int64_t e = 0; e < args.E; ++e)
    if (args.eligible(token, e)) ids[n++] = static_cast<int32_t>(e);
  return n;
}

// exp(score - highest), whose sum is `total`: the softmax over ids[0..n). A NaN score makes the total NaN.
template <class Acc>
struct Softmax {
  Acc highest = -std::numeric_limits<Acc>::infinity(), total = 0;

  Softmax(const Acc* scores, const int32_t* ids, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
      if (!(scores[ids[i]] <= highest)) highest = scores[ids[i]];
    for (int64_t i = 0; i < n; ++i) total += std::exp(scores[ids[i]] - highest);
  }
  Acc of(Acc score) const { return std::exp(score - highest) / total; }
};

// How many of ids[0..n), best first, the top_p cut keeps; `all` is the softmax over every eligible expert.
template <class Acc>
int64_t kept_by_top_p(const RouteArgs& args, const Softmax<Acc>& all, const Acc* scores, const int32_t* ids,
                      int64_t n) {
  Acc before = 0;
  int64_t k = 0;
  for (; k < n && !(before >= static_cast<Acc>(args.top_p)); ++k) before += all.of(scores[ids[k]]);
  return k;
}

// route for a whole batch; weights [T,K] and experts [T,K] are written.
template <class Acc>
void route_forward(const RouteArgs& args, Acc* weights, int32_t* experts);

}  // namespace moerge::cpu
