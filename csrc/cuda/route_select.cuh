// One token's selection, by one warp: from its scores to the K best experts and their weights.
//
// Each of the K rounds looks for the best expert in the order "numbers before NaN, then the higher score, then the
// lower id": among scores that are read from memory, the best after the last one, so that nothing has to be marked;
// among those in registers, where the order is that of whole numbers, the best that has not been taken.
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

// The scores of a token in registers, for up to 32 kPerLane experts.
template <int kPerLane>
struct HeldScores {
  float score[kPerLane];   // of expert lane + 32 i
  bool chosen[kPerLane];   // whether it is eligible
  uint32_t key[kPerLane];  // the greater, the better; 0: not eligible, or taken

  MOERGE_DEVICE HeldScores(const Scores<float>& scores, const float (&similarity)[kPerLane]) {
    MOERGE_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t e = lane() + 32 * i;
      chosen[i] = e < scores.p.E && scores.eligible(e);
      score[i] = chosen[i] ? scores.of(e, similarity[i]) : 0;
      const uint32_t bits = as_bits(score[i] + 0.0f);  // of -0 those of 0
      const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
      key[i] = !chosen[i] ? 0 : score[i] != score[i] ? 1 : order;
    }
  }

  template <class Visit>
  MOERGE_DEVICE void each(const Visit& visit) const {
    MOERGE_UNROLL
    for (int i = 0; i < kPerLane; ++i)
      if (chosen[i]) visit(lane() + 32 * i, score[i]);
  }

  MOERGE_DEVICE Candidate<float> take() {
    uint32_t best = 0, id = UINT32_MAX;
    MOERGE_UNROLL
    for (int i = 0; i < kPerLane; ++i) best = key[i] > best ? key[i] : best;
    best = warp_most(best);
    if (best == 0) return {0, -1};
    MOERGE_UNROLL
    for (int i = kPerLane - 1; i >= 0; --i)
      if (key[i] == best) id = lane() + 32 * i;
    id = warp_least(id);
    float its = 0;
    MOERGE_UNROLL
    for (int i = 0; i < kPerLane; ++i)
      if (id == static_cast<uint32_t>(lane() + 32 * i)) its = score[i], key[i] = 0;
    return {shuffle(its, static_cast<int>(id % 32)), static_cast<int32_t>(id)};
  }
};

template <class Acc>
struct Selection {
  const Route& p;

  template <int kPerLane>
  MOERGE_DEVICE Candidate<Acc> next(HeldScores<kPerLane>& scores, const Candidate<Acc>&) const {
    return scores.take();
  }

  // The best eligible expert after `last` (id -1: the best of all).
  MOERGE_DEVICE Candidate<Acc> next(const Scores<Acc>& scores, const Candidate<Acc>& last) const {
    Candidate<Acc> best{0, -1};
    scores.each([&](int32_t e, Acc score) {
      const Candidate<Acc> candidate{score, e};
      if ((last.id < 0 || last.better_than(candidate)) && e != last.id && candidate.better_than(best)) best = candidate;
    });
    MOERGE_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      const Candidate<Acc> other{shuffle_xor(best.score, mask), shuffle_xor(best.id, mask)};
      if (other.better_than(best)) best = other;
    }
    return best;
  }

  // The scores of the kept slots become weights. each(visit): visit(slot, score) for the slots of the lane.
  template <class All, class Each>
  MOERGE_DEVICE void weigh(const All& scores, const Each& each, Acc* weights) const {
    if (p.weighting == Weighting::softmax) {
      Acc highest = -INFINITY, total = 0;
      each([&](int64_t, Acc score) { highest = fmax(highest, score); });
      highest = warp_max(highest);
      each([&](int64_t, Acc score) { total += exp(score - highest); });
      total = warp_sum(total);
      each([&](int64_t k, Acc score) { weights[k] = exp(score - highest) / total; });
    } else if (p.weighting == Weighting::softmax_all) {
      const SoftmaxAll<Acc> all(scores);
      each([&](int64_t k, Acc score) { weights[k] = all.of(score); });
    } else if (p.weighting == Weighting::sigmoid) {
      each([&](int64_t k, Acc score) { weights[k] = 1 / (1 + exp(-score)); });
    } else {
      each([&](int64_t k, Acc score) { weights[k] = score; });
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

  // weights and experts [K] of the token with these scores. Up to 32 slots stay with the lanes until they are weights.
  template <class All>
  MOERGE_DEVICE void choose(All& scores, Acc* weights, int32_t* experts) const {
    Acc highest = 0, total = 1, before = 0;
    if (p.top_p > 0) {
      const SoftmaxAll<Acc> all(scores);
      highest = all.highest, total = all.total;
    }
    Candidate<Acc> last{0, -1};
    Acc mine = 0;
    int32_t kept = 0;
    const bool few = p.K <= 32;
    for (; kept < p.K; ++kept) {
      if (p.top_p > 0 && before >= static_cast<Acc>(p.top_p)) break;
      last = next(scores, last);
      if (last.id < 0) break;
      if (p.top_p > 0) before += exp(last.score - highest) / total;
      if (kept % 32 == lane()) {
        experts[kept] = last.id;
        mine = last.score;
        if (!few) weights[kept] = mine;
      }
    }
    const auto each = [&](const auto& visit) {
      for (int32_t k = lane(); k < kept; k += 32) visit(k, few ? mine : weights[k]);
    };
    weigh(scores, each, weights);
    if (kept == p.K) return;
    sync_warp();
    fill_unused(kept, weights, experts);
  }

  // Of token t.
  MOERGE_DEVICE void run(int64_t t, Acc* weights, int32_t* experts) const {
    Scores<Acc> scores(p, t);
    choose(scores, weights, experts);
  }
};

}  // namespace moerge::cuda
