// The router on the CPU: shared by route, routed_lora and route_backward.
//
//   score_te = f(norm(x_t) . g_e) * scale + bias[row(t), e]       f: identity or absolute value
//   norm: (u - mean) / sqrt(var + 1e-5) | u / max(|u|, 1e-12) | u
//   kept: the top_k eligible experts, cut by top_p; weights by `weighting`
//
// Gates of up to 8 experts are stored expert by expert and go through `dot`, whose vectors lie along D: in the columns
// of `tall` 8 experts fill half a vector of AVX-512. us by `dot` (by `tall`), one thread beside other load, minima:
//   AVX-512, T = 512: E = 4 D = 576 95 (188), 1536 262 (485); E = 8 D = 1536 332 (469), 2048 646 (984); bfloat16 E = 8
//     D = 576 219 (292), 1536 299 (417); T = 16, D = 2048: 27 (28)
//   AVX2, T = 512: E = 4 D = 576 127 (158), 2048 483 (589); E = 8 172 (165), 664 (609)
//   beyond: AVX-512 E = 16 D = 2048 795 (969), 64 1593 (1338); AVX2 E = 16 1095 (913)
//
// Tokens of bfloat16 are multiplied with float32 gates by the tiles of AMX (micro_amx_route.h), whose statistics come
// from the same pass. us against widening, centring and `dot`, T = 512, E = 8, K = 2, one thread beside other load,
// minima:
//   D = 576 86 to 101 (120 to 131), 1536 214 to 225 (297 to 345)
// routed_lora_ of SmolLM2's 210 layers, with the same change to interleaving and copying in micro_amx.h: 116 to 122 ms
// (152 to 156).
//
// Tried: one call for the layers that share an input (q, k, v). One over 3 x 36 gates against three over 36, D = 2048,
// float32, cold: T = 1 139 against 248 us, 16 177 against 272 us, 256 1.2 against 1.7 ms, 1024 5.1 against 7.7 ms. Of
// what three patched layers take that is 3.6, 0.8, 0.9 and 1.4 %, before one layer hands anything to the next: left
// out. Nor does one op for all they do gain: routed_lora_ with a list of tensors for each argument, whose phases are
// those of all branches, over q, k, v and gate, up of SmolLM2. Torch allocates twice for each tensor of a list too, and
// those of all branches at once (lora.h, Pairs): in bfloat16 it was slower than the separate calls. The separate calls
// one after the other, by the first layer for the others, who then hand their results out: as fast as each by itself.
// Statistics of float32 tokens by one pass too, the mean taken out of the products: 210 calls (SmolLM2, T = 512, E = 8)
// 42 against 47 ms, AVX2 54 against 59, 0.3 % of the model's prefill: left out.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/check_route.h"
#include "view.h"

namespace moerge::cpu {

constexpr int64_t kTokenBlock = 48;  // tokens scored together: a multiple of the rows of a tile of `tall`
// Up to so many tokens a call is bound by reading the gates: their depth is cut over the threads instead of the tokens.
constexpr int64_t kFewTokens = 48;
constexpr int64_t kFewBlock = 8;  // tokens scored together among so few, so that each thread has some

struct RouteArgs : RoutePlan {
  const Check& check;
  Tensor x, gates;
  bool tall_gates;  // stored [D,E]: an expert's elements lie gate_stride apart, and the experts side by side
  int64_t gate_stride;
  std::optional<Tensor> bias, mask;
  RowMap row;

  RouteArgs(const Check& check, const Tensor& x, const Tensor& gates, const RouteOptions& options);

  // Whether tokens and gates are multiplied by `tiles()`.
  bool by_tiles() const {
    return tiles() && tiles()->scores && dtype_of(x) == DType::bf16 && dtype_of(gates) == DType::f32 &&
           T > kFewTokens && E > 0 && D > 0 && D % 32 == 0;
  }

  bool eligible(int64_t token, int64_t expert) const {
    if (!mask) return true;
    const bool* allowed = static_cast<const bool*>(mask->data_ptr());
    return mask->dim() == 1 ? allowed[expert] : allowed[row(token) * E + expert];
  }
};

// norm(x) = centred * factor; centred is x - shift - rest under "standardize" and x itself otherwise.
template <class Acc>
struct Statistics {
  Acc shift = 0, rest = 0, factor = 1;
  bool clamped = false;  // "unit" with a norm below the floor
};

// The same sums in double: for rows whose squares Acc cannot hold.
template <class Acc>
double sum_of_squares(int64_t n, const Acc* x) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total;
}

// Sets `centred` to the centred row: x itself, or `buffer` ([D], may be x) when something is subtracted.
template <class Acc>
Statistics<Acc> centre_row(Normalize mode, int64_t D, const Acc* x, Acc* buffer, const Acc** centred) {
  const RowMicro<Acc>& rows = row_micro<Acc>();
  Statistics<Acc> stats;
  *centred = x;
  if (mode == Normalize::none || D == 0) return stats;
  if (mode == Normalize::unit) {
    double squares = rows.moments(D, x).squares;
    if (!std::isfinite(squares)) squares = sum_of_squares(D, x);
    const double norm = std::sqrt(squares);
    stats.clamped = norm < 1e-12;
    stats.factor = static_cast<Acc>(stats.clamped ? 1e12 : 1 / norm);
    return stats;
  }
  const double n = static_cast<double>(D);
  *centred = buffer;
  stats.shift = static_cast<Acc>(rows.sum(D, x) / n);
  Moments left = rows.centre(D, x, stats.shift, buffer);
  // the first mean was rounded to Acc; what that left in is subtracted where it would show in the scores
  if (std::abs(left.sum / n) > std::numeric_limits<Acc>::epsilon() * std::sqrt(left.squares / n)) {
    stats.rest = static_cast<Acc>(left.sum / n);
    left = rows.centre(D, buffer, stats.rest, buffer);
  }
  if (!std::isfinite(left.squares)) left.squares = sum_of_squares(D, buffer);
  const double mean = left.sum / n;
  stats.factor = static_cast<Acc>(1 / std::sqrt(left.squares / n - mean * mean + 1e-5));
  return stats;
}

// out[i,e] += sum over d in [begin, end) of token[i][d] * gate[e][d]. Sums run in the order of `tall`.
template <class Acc>
void add_dots(const RouteArgs& args, int64_t count, const Acc* const* token, int64_t begin, int64_t end, Acc* out) {
  const Acc** part = scratch<const Acc*>(4, count);
  Acc** row = scratch<Acc*>(5, count);
  for (int64_t i = 0; i < count; ++i) part[i] = token[i] + begin, row[i] = out + i * args.E;
  const Matrix gates(args.gates);
  const char* start = gates.data + begin * args.gate_stride * size_of(gates.dtype);
  micro<Acc>(gates.dtype).tall(count, end - begin, args.E, part, start, args.gate_stride, row);
}

// Tokens [begin, begin+count): their centred rows (in `buffer`, [count,D], or in x itself), statistics, and raw
// similarities norm(x) . g in `scores` ([count,E]).
template <class Acc>
void similarities(const RouteArgs& args, int64_t begin, int64_t count, Acc* buffer, const Acc** token,
                  Statistics<Acc>* stats, Acc* scores) {
  const Matrix x(args.x);
  for (int64_t i = 0; i < count; ++i) {
    Acc* row = buffer + i * args.D;
    stats[i] = centre_row<Acc>(args.normalize, args.D, row_as<Acc>(x, begin + i, args.D, row), row, &token[i]);
  }
  if (args.tall_gates) {
    std::fill(scores, scores + count * args.E, Acc(0));
    add_dots(args, count, token, 0, args.D, scores);
  } else {
    const Matrix gates(args.gates);
    const void** gate = scratch<const void*>(4, args.E);
    Acc** row = scratch<Acc*>(5, count);
    for (int64_t e = 0; e < args.E; ++e) gate[e] = gates.at(e);
    for (int64_t i = 0; i < count; ++i) row[i] = scores + i * args.E;
    micro<Acc>(gates.dtype).dot(count, args.E, args.D, token, gate, row);
  }
  for (int64_t i = 0; i < count; ++i)
    row_micro<Acc>().multiply(args.E, scores + i * args.E, stats[i].factor, scores + i * args.E);
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

// route for a whole batch, as phases [0, kPhases) of a team: weights [T,K] and experts [T,K] are written.
template <class Acc>
class RouteForward {
 public:
  static constexpr int kPhases = 3;

  RouteForward(const RouteArgs& args, Workspace& workspace, Acc* weights, int32_t* experts);
  int64_t cost() const { return args_.T * args_.D * (by_tiles_ ? 4 + args_.E / 8 : args_.E + 2); }
  void run(Team& team) const;

  // By tiles, the first phase makes the gates ready for all blocks, and a block of kScoreRows tokens needs no other.
  bool in_blocks() const { return by_tiles_; }
  void prepare(Team& team) const {
    team.run(0, parts_, [&](int64_t i) { split(i); });
  }
  void tile_block(int64_t index) const;

 private:
  bool few() const { return !by_tiles_ && args_.tall_gates && args_.T <= kFewTokens && args_.D > kDepth; }
  int64_t block_tokens() const { return args_.T <= kFewTokens ? kFewBlock : kTokenBlock; }
  void block(int64_t index) const;
  void split(int64_t part) const;
  void tile_scores(int64_t begin, int64_t count, float* sums, Moments* moments) const;
  void centre(int64_t token) const;
  void dots(int64_t part) const;
  void sum_and_choose(int64_t token) const;
  void choose(int64_t begin, int64_t count, Acc* scores) const;
  void choose_one(int64_t token, const Acc* scores, int32_t* ids) const;

  const RouteArgs& args_;
  Acc* weights_;
  int32_t* experts_;
  // by tiles: the parts of the gates [D/2,width], and their sums over each kDepth features [parts,E]
  bool by_tiles_ = false;
  int64_t width_ = 0;
  uint32_t* pairs_ = nullptr;
  float* gate_sums_ = nullptr;
  // for few tokens: rows [T,D], pointers to what is centred, statistics, partial scores [parts,T,E]
  int64_t parts_ = 0;
  Acc* rows_ = nullptr;
  const Acc** token_ = nullptr;
  Statistics<Acc>* stats_ = nullptr;
  Acc* partial_ = nullptr;
};

}  // namespace moerge::cpu
