// One token's selection, by one warp: from its scores to the K best experts and their weights.
//
// Each of the K rounds looks for the best expert that comes after the last one in the order "numbers before NaN, then
// the higher score, then the lower id", so nothing has to be marked and any K up to E works.
#pragma once

#include "route.cuh"

namespace moerge::cuda {

template <class Acc>
struct Candidate {
  Acc score;
  int32_t id;  // -1: none

  MOERGE_DEVICE bool better_than(const Candidate& other) const {
    if (id < 0 || other.id < 0) return id >= 0;
    const bool nan = score != score, other_nan = other.score != other.score;
    if (nan != other_nan) return other_nan;
    if (!nan && score != other.score) return score > other.score;
    return id < other.id;
  }
};

template <class Acc>
struct Selection {
  const Route& p;

  // The best eligible expert after `last` (id -1: the best of all).
  MOERGE_DEVICE Candidate<Acc> next(const Scores<Acc>& scores, const Candidate<Acc>& last) const {
    Candidate<Acc> best{0, -1};
    for (int32_t e = lane(); e < p.E; e += 32) {
      if (!scores.eligible(e)) continue;
      const Candidate<Acc> candidate{scores(e), e};
      if ((last.id < 0 || last.better_than(candidate)) && e != last.id && candidate.better_than(best)) best = candidate;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const Candidate<Acc> other{shuffle_xor(best.score, mask), shuffle_xor(best.id, mask)};
      if (other.better_than(best)) best = other;
    }
    return best;
  }

  // The scores of the kept slots become weights.
  MOERGE_DEVICE void weigh(int64_t kept, const Scores<Acc>& scores, Acc* weights) const {
    if (p.weighting == Weighting::softmax) {
      Acc highest = -INFINITY, total = 0;
      for (int64_t k = lane(); k < kept; k += 32) highest = fmax(highest, weights[k]);
      highest = warp_max(highest);
      for (int64_t k = lane(); k < kept; k += 32) total += exp(weights[k] - highest);
      total = warp_sum(total);
      for (int64_t k = lane(); k < kept; k += 32) weights[k] = exp(weights[k] - highest) / total;
    } else if (p.weighting == Weighting::softmax_all) {
      const SoftmaxAll<Acc> all(scores, p.E);
      for (int64_t k = lane(); k < kept; k += 32) weights[k] = all.of(weights[k]);
    } else if (p.weighting == Weighting::sigmoid) {
      for (int64_t k = lane(); k < kept; k += 32) weights[k] = 1 / (1 + exp(-weights[k]));
    }
  }

  // Unused slots: weight 0 and the lowest ids that no kept slot has.
  MOERGE_DEVICE void fill_unused(int64_t kept, Acc* weights, int32_t* experts) const {
    int64_t slot = kept;
    for (int32_t first = 0; slot < p.K; first += 32) {
      const int32_t id = first + lane();
      bool unused = id < p.E;
      for (int64_t k = 0; unused && k < kept; ++k) unused = experts[k] != id;
      const uint32_t all = ballot(unused);
      const int64_t mine = slot + count_bits(all & ((1u << lane()) - 1));
      if (unused && mine < p.K) {
        experts[mine] = id;
        weights[mine] = 0;
      }
      slot += count_bits(all);
    }
  }

  // weights and experts [K] of token t
  MOERGE_DEVICE void run(int64_t t, Acc* weights, int32_t* experts) const {
    const Scores<Acc> scores(p, t);
    Acc highest = 0, total = 1, before = 0;
    if (p.top_p > 0) {
      const SoftmaxAll<Acc> all(scores, p.E);
      highest = all.highest, total = all.total;
    }
    Candidate<Acc> last{0, -1};
    int64_t kept = 0;
    for (; kept < p.K; ++kept) {
      if (p.top_p > 0 && before >= static_cast<Acc>(p.top_p)) break;
      last = next(scores, last);
      if (last.id < 0) break;
      if (p.top_p > 0) before += exp(last.score - highest) / total;
      if (lane() == 0) weights[kept] = last.score, experts[kept] = last.id;
    }
    sync_warp();
    weigh(kept, scores, weights);
    fill_unused(kept, weights, experts);
  }
};

}  // namespace moerge::cuda
