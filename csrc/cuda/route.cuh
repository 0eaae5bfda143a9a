// One token's router: statistics, scores, the order of experts. Shared by the route kernels.
//
//   score_te = f(norm(x_t) . g_e) * scale + bias[row(t), e]       f: identity or absolute value
#pragma once

#include "values.cuh"

namespace moerge::cuda {

template <class Acc>
struct Statistics {
  Acc shift, rest, factor, clamped;

  // (x - mean) / deviation, x / norm, or x; the mean is shift + rest, since Acc cannot hold it well enough
  MOERGE_DEVICE Acc normalized(Acc x) const { return (x - shift - rest) * factor; }

  MOERGE_DEVICE static Statistics load(const void* all, int64_t token) {
    const Acc* from = static_cast<const Acc*>(all) + token * kStatistics;
    return {from[0], from[1], from[2], from[3]};
  }
  MOERGE_DEVICE void store(void* all, int64_t token) const {
    Acc* to = static_cast<Acc*>(all) + token * kStatistics;
    to[0] = shift, to[1] = rest, to[2] = factor, to[3] = clamped;
  }
};

// Of one row, by a team. Two passes around a value near the mean: no cancellation for a mean far from 0.
template <class Acc, class X, int V, class Team>
MOERGE_DEVICE Statistics<Acc> token_statistics(const Team& team, const void* row, DType dtype, int64_t D,
                                               Normalize mode) {
  if (mode == Normalize::none || D == 0) return {0, 0, 1, 0};
  Acc x[V];
  const auto over_row = [&](auto&& visit) {
    for (int64_t d = Team::rank() * V; d < D; d += Team::kSize * V) {
      load_vector<X>(row, dtype, d, x);
      for (int i = 0; i < V; ++i) visit(x[i]);
    }
  };
  if (mode == Normalize::unit) {
    // divided by the largest first: squares neither overflow nor vanish
    Acc largest = 0, squares = 0;
    over_row([&](Acc value) { largest = fmax(largest, fabs(value)); });
    largest = team.max(largest);
    over_row([&](Acc value) { squares += largest > 0 ? (value / largest) * (value / largest) : value * value; });
    squares = team.sum(squares);
    const Acc norm = largest > 0 ? largest * sqrt(squares) : squares;
    const bool clamped = norm < Acc(1e-12);
    return {0, 0, clamped ? Acc(1e12) : 1 / norm, clamped ? Acc(1) : Acc(0)};
  }
  const Acc first = load_as<Acc>(row, dtype, 0);
  Acc sum = 0, squares = 0;
  over_row([&](Acc value) { sum += value - first; });
  const Acc mean = first + team.sum(sum) / static_cast<Acc>(D);
  sum = 0;
  over_row([&](Acc value) {
    sum += value - mean;
    squares += (value - mean) * (value - mean);
  });
  const Acc rest = team.sum(sum) / static_cast<Acc>(D);
  const Acc variance = team.sum(squares) / static_cast<Acc>(D) - rest * rest;
  return {mean, rest, 1 / sqrt(variance + Acc(1e-5)), 0};
}

// The scores of one token, read again whenever they are needed.
template <class Acc>
struct Scores {
  const Route& p;
  const Acc *similarity, *bias;
  const bool* mask;
  bool nobody;  // the token belongs to no row

  MOERGE_DEVICE Scores(const Route& p, int64_t token) : p(p) {
    const int64_t row = p.bias || p.mask_per_row ? row_of(p.row, token) : 0;
    nobody = row < 0;
    similarity = static_cast<const Acc*>(p.similarity) + token * p.E;
    bias = p.bias && !nobody ? static_cast<const Acc*>(p.bias) + row * p.E : nullptr;
    mask = p.mask ? p.mask + (p.mask_per_row && !nobody ? row * p.E : 0) : nullptr;
  }
  MOERGE_DEVICE bool eligible(int64_t e) const { return !nobody && (!mask || mask[e]); }
  MOERGE_DEVICE Acc of(int64_t e, Acc z) const {
    const Acc score = (p.absolute ? fabs(z) : z) * static_cast<Acc>(p.scale);
    return bias ? score + bias[e] : score;
  }
  MOERGE_DEVICE Acc operator()(int64_t e) const { return of(e, similarity[e]); }

  // visit(expert, score) for those of the lane that are eligible, in ascending order
  template <class Visit>
  MOERGE_DEVICE void each(const Visit& visit) const {
    for (int32_t e = lane(); e < p.E; e += 32)
      if (eligible(e)) visit(e, (*this)(e));
  }
};

// exp(score - highest) / total over the eligible experts, by the warp. A NaN score makes the total NaN.
template <class Acc>
struct SoftmaxAll {
  Acc highest = -INFINITY, total = 0;

  template <class All>
  MOERGE_DEVICE explicit SoftmaxAll(const All& scores) {
    scores.each([&](int32_t, Acc score) { highest = fmax(highest, score); });
    highest = warp_max(highest);
    scores.each([&](int32_t, Acc score) { total += exp(score - highest); });
    total = warp_sum(total);
  }
  MOERGE_DEVICE Acc of(Acc score) const { return exp(score - highest) / total; }
};

}  // namespace moerge::cuda
