// moerge::route on the CPU. Many tokens: blocks of tokens over threads; within a block statistics, similarities and one
// selection per token, so that no [T,E] array exists. Few tokens: the depth of the gates is cut over the threads, so
// that all of them read; the parts are added in their order, which gives the same bits.
#include "route.h"

#include <cstring>
#include <numeric>

namespace moerge::cpu {

namespace {

constexpr int64_t kFewSelected = 8;

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

// The best K of E scores, best first, into ids. False, with ids undefined, when fewer than K are above -infinity.
template <class Acc>
bool select_few(const Acc* scores, int64_t E, int64_t K, int32_t* ids) {
  Acc best[kFewSelected];
  int64_t held = 0;
  for (int64_t e = 0; e < E; ++e) {
    const Acc score = scores[e];
    // never true for a NaN; candidates arrive in id order, so an equal one does not displace
    if (!(score > (held < K ? -std::numeric_limits<Acc>::infinity() : best[K - 1]))) continue;
    int64_t at = held < K ? held++ : K - 1;
    for (; at > 0 && score > best[at - 1]; --at) best[at] = best[at - 1], ids[at] = ids[at - 1];
    best[at] = score;
    ids[at] = static_cast<int32_t>(e);
  }
  return held == K;
}

// The best min(K, number of candidates) of ids[0..n), best first, at the front of ids.
template <class Acc>
void select(const Acc* scores, int32_t* ids, int64_t n, int64_t K) {
  const Better<Acc> better{scores};
  if (K > kFewSelected) {
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

constexpr float kTooSmall = 1e-25f;

// What `similarities` takes from a row of bfloat16, by one pass over it.
struct OnePass {
  float mean = 0, factor = 1;
  bool sound = true;  // whether one pass is enough
};

inline OnePass one_pass(Normalize mode, int64_t D, const Moments& moments) {
  OnePass stats;
  if (mode == Normalize::none) return stats;
  if (mode == Normalize::unit) {
    stats.sound = moments.squares > 1e-20 && std::isfinite(moments.squares);
    stats.factor = static_cast<float>(1 / std::sqrt(moments.squares));
    return stats;
  }
  const double each = 1 / static_cast<double>(D), mean = moments.sum * each;
  const double variance = moments.squares * each - mean * mean;
  stats.sound = mean * mean <= 4 * variance && std::isfinite(variance);
  stats.mean = static_cast<float>(mean);
  stats.factor = static_cast<float>(1 / std::sqrt(variance + 1e-5));
  return stats;
}

}  // namespace

// Tokens [begin, begin + count): raw similarities [count,E] (then scores) -> weights and experts. The best two and
// their softmax are found for a register of tokens at a time, with a mask or without: the same bits.
template <class Acc>
void RouteForward<Acc>::choose(int64_t begin, int64_t count, Acc* scores) const {
  const RouteArgs& args = args_;
  const int64_t E = args.E;
  const auto two = row_micro<Acc>().two;
  bool found[kTokenBlock] = {};
  for (int64_t i = 0; i < count; ++i) finish_scores(args, begin + i, scores + i * E);
  if (two && args.top_k == 2 && !(args.top_p > 0) && args.weighting == Weighting::softmax) {
    for (int64_t i = 0; args.mask && i < count; ++i)
      for (int64_t e = 0; e < E; ++e)
        if (!args.eligible(begin + i, e)) scores[i * E + e] = -std::numeric_limits<Acc>::infinity();
    two(count, E, scores, weights_ + begin * 2, experts_ + begin * 2, found);
  }
  int32_t* ids = scratch<int32_t>(2, E);
  for (int64_t i = 0; i < count; ++i)
    if (!found[i]) choose_one(begin + i, scores + i * E, ids);
}

// One token: scores [E] -> weights [K], experts [K]. `ids` is scratch [E].
template <class Acc>
void RouteForward<Acc>::choose_one(int64_t token, const Acc* scores, int32_t* ids) const {
  const RouteArgs& args = args_;
  const int64_t K = args.top_k;
  Acc* weights = weights_ + token * K;
  int32_t* experts = experts_ + token * K;
  if (!args.mask && !(args.top_p > 0) && args.weighting == Weighting::softmax && K <= kFewSelected &&
      select_few(scores, args.E, K, experts)) {
    const Acc best = scores[experts[0]];
    Acc total = weights[0] = 1 + (best - best);  // exp(0), and NaN of an infinite score
    for (int64_t k = 1; k < K; ++k) total += weights[k] = std::exp(scores[experts[k]] - best);
    for (int64_t k = 0; k < K; ++k) weights[k] /= total;
    return;
  }
  const int64_t n = eligible_experts(args, token, ids);
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

RouteArgs::RouteArgs(const Check& check, const Tensor& x_in, const Tensor& gates_in, const RouteOptions& options)
    : RoutePlan(check_route(check, x_in, gates_in, options)),
      check(check),
      x(rows_contiguous(x_in)),
      gates(gates_in),
      row(row_map(check, options.rows, T, n_rows, tokens_per_row)) {
  if (options.bias) bias = dense(*options.bias, accumulator(wide));
  if (options.mask) mask = dense(*options.mask);
  tall_gates = gates.stride(1) != 1 && (gates.stride(0) == 1 || E == 1) && gates.stride(1) >= E;
  if (!tall_gates) gates = rows_contiguous(gates);
  gate_stride = gates.stride(tall_gates ? 1 : 0);
}

template <class Acc>
RouteForward<Acc>::RouteForward(const RouteArgs& args, Workspace& workspace, Acc* weights, int32_t* experts)
    : args_(args), weights_(weights), experts_(experts), by_tiles_(std::is_same_v<Acc, float> && args.by_tiles()) {
  parts_ = ceil_div(args.D, kDepth);
  if (by_tiles_) {
    width_ = ceil_div(kGateParts * args.E, kTileWidth) * kTileWidth;
    pairs_ = workspace.get<uint32_t>(args.D / 2 * width_);
    gate_sums_ = workspace.get<float>(parts_ * args.E);
  }
  if (!few()) return;
  rows_ = workspace.get<Acc>(args.T * args.D);
  token_ = workspace.get<const Acc*>(args.T);
  stats_ = workspace.get<Statistics<Acc>>(args.T);
  partial_ = workspace.get<Acc>(parts_ * args.T * args.E);
}

template <class Acc>
void RouteForward<Acc>::run(Team& team) const {
  if (by_tiles_) {
    prepare(team);
    return team.run(1, ceil_div(args_.T, kScoreRows), [&](int64_t i) { tile_block(i); });
  }
  if (!few()) return team.run(0, ceil_div(args_.T, block_tokens()), [&](int64_t i) { block(i); });
  team.run(0, args_.T, [&](int64_t i) { centre(i); });
  team.run(1, parts_, [&](int64_t i) { dots(i); });
  team.run(2, args_.T, [&](int64_t i) { sum_and_choose(i); });
}

template <class Acc>
void RouteForward<Acc>::block(int64_t index) const {
  const int64_t begin = index * block_tokens(), count = std::min(block_tokens(), args_.T - begin);
  Acc* rows = scratch<Acc>(0, kTokenBlock * args_.D);
  Acc* scores = scratch<Acc>(1, kTokenBlock * args_.E);
  Statistics<Acc> stats[kTokenBlock];
  const Acc* token[kTokenBlock];
  similarities<Acc>(args_, begin, count, rows, token, stats, scores);
  choose(begin, count, scores);
}

template <class Acc>
void RouteForward<Acc>::split(int64_t part) const {
  const RouteArgs& args = args_;
  const int64_t begin = part * kDepth, depth = std::min(kDepth, args.D - begin);
  const int64_t feature = args.tall_gates ? args.gate_stride : 1, expert = args.tall_gates ? 1 : args.gate_stride;
  tiles()->split(depth, args.E, static_cast<const float*>(args.gates.data_ptr()) + begin * feature, feature, expert,
                 width_, pairs_ + begin / 2 * width_, gate_sums_ + part * args.E);
}

// The sums [kScoreRows,width] and moments of a block, whose rows beyond `count` are copies of the last.
template <class Acc>
void RouteForward<Acc>::tile_scores(int64_t begin, int64_t count, float* sums, Moments* moments) const {
  const Matrix x(args_.x);
  const int64_t D = args_.D, bytes = D * size_of(x.dtype);
  moments = args_.normalize == Normalize::none ? nullptr : moments;
  if (count == kScoreRows)
    return tiles()->scores(D, width_, x.at(begin), x.row_bytes / size_of(x.dtype), pairs_, sums, moments);
  char* copied = scratch<char>(3, kScoreRows * bytes);
  for (int64_t i = 0; i < kScoreRows; ++i) std::memcpy(copied + i * bytes, x.at(begin + std::min(i, count - 1)), bytes);
  tiles()->scores(D, width_, copied, D, pairs_, sums, moments);
}

// A block by tiles. Its statistics are those of one pass, and the mean is taken out of the sums, not of the tokens:
// both lose what the mean is larger than the deviation. A token of which that is more than twice, or whose sums are no
// numbers (an infinite one times a part that is zero) or so small that what tiles take for zero shows, goes the way of
// `similarities`.
template <class Acc>
void RouteForward<Acc>::tile_block(int64_t index) const {
  const RouteArgs& args = args_;
  const int64_t E = args.E, begin = index * kScoreRows, count = std::min(kScoreRows, args.T - begin);
  float* sums = scratch<float>(0, kScoreRows * width_ + E);
  float* gate_sums = sums + kScoreRows * width_;
  Acc* scores = scratch<Acc>(1, kScoreRows * E);
  Moments moments[kScoreRows] = {};
  OnePass stats[kScoreRows];
  tile_scores(begin, count, sums, moments);
  for (int64_t i = 0; i < kScoreRows; ++i) stats[i] = one_pass(args.normalize, args.D, moments[i]);
  std::fill(gate_sums, gate_sums + E, 0.f);
  for (int64_t part = 0; part < parts_; ++part)
    for (int64_t e = 0; e < E; ++e) gate_sums[e] += gate_sums_[part * E + e];
  for (int64_t i = 0; i < count; ++i) {
    const float* sum = sums + i * width_;
    Acc* score = scores + i * E;
    Acc largest = 0;
    bool sound = stats[i].sound;
    for (int64_t e = 0; e < E; ++e) {
      score[e] = (sum[e] + (sum[E + e] + sum[2 * E + e]) - stats[i].mean * gate_sums[e]) * stats[i].factor;
      largest = std::max(largest, std::abs(score[e]));
      sound &= std::isfinite(score[e]);
    }
    if (!sound || largest < kTooSmall) {
      const Acc* token;
      Statistics<Acc> careful;
      similarities<Acc>(args, begin + i, 1, scratch<Acc>(3, args.D), &token, &careful, score);
    }
  }
  choose(begin, count, scores);
}

template <class Acc>
void RouteForward<Acc>::centre(int64_t token) const {
  Acc* row = rows_ + token * args_.D;
  const Acc* x = row_as<Acc>(Matrix(args_.x), token, args_.D, row);
  stats_[token] = centre_row<Acc>(args_.normalize, args_.D, x, row, &token_[token]);
}

template <class Acc>
void RouteForward<Acc>::dots(int64_t part) const {
  const int64_t begin = part * kDepth, size = args_.T * args_.E;
  Acc* out = partial_ + part * size;
  std::fill(out, out + size, Acc(0));
  add_dots(args_, args_.T, token_, begin, std::min(args_.D, begin + kDepth), out);
}

template <class Acc>
void RouteForward<Acc>::sum_and_choose(int64_t token) const {
  const int64_t E = args_.E;
  Acc* scores = scratch<Acc>(1, E);
  std::fill(scores, scores + E, Acc(0));
  for (int64_t part = 0; part < parts_; ++part) {
    const Acc* add = partial_ + (part * args_.T + token) * E;
    for (int64_t e = 0; e < E; ++e) scores[e] += add[e];
  }
  for (int64_t e = 0; e < E; ++e) scores[e] *= stats_[token].factor;
  choose(token, 1, scores);
}

template class RouteForward<float>;
template class RouteForward<double>;

namespace {

template <class Acc>
void run(const RouteArgs& args, const Tensor& weights, const Tensor& experts) {
  Workspace workspace;
  const RouteForward<Acc> forward(args, workspace, static_cast<Acc*>(weights.data_ptr()),
                                  static_cast<int32_t*>(experts.data_ptr()));
  Team::work(forward.cost(), [&](Team& team) { forward.run(team); });
}

std::tuple<Tensor, Tensor> route(Tensor x, Tensor gates, int64_t top_k, Word normalize, bool absolute,
                                 std::optional<double> scale, std::optional<Tensor> bias, std::optional<Tensor> rows,
                                 std::optional<Tensor> mask, std::optional<double> top_p, Word weighting) {
  const Check check{"route", Device::cpu};
  const RouteOptions options{
      top_k, std::move(normalize), absolute, scale, std::move(bias), std::move(rows), std::move(mask),
      top_p, std::move(weighting)};
  const RouteArgs args(check, x, gates, options);
  Tensor weights = new_tensor(x, {args.T, top_k}, accumulator(args.wide));
  Tensor experts = new_tensor(x, {args.T, top_k}, ScalarType::Int);
  if (args.T > 0 && args.wide)
    run<double>(args, weights, experts);
  else if (args.T > 0)
    run<float>(args, weights, experts);
  return {weights, experts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) { m.impl("route", TORCH_BOX(&route)); }

}  // namespace moerge::cpu
