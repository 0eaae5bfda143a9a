// The slots of one token: which experts it has, with which weights. Shared by the lora kernels.
#pragma once

#include "values.cuh"

namespace moerge::cuda {

template <class Acc>
struct Slots {
  const Lora& p;
  const Acc* weights = nullptr;
  const int32_t* experts = nullptr;

  MOERGE_DEVICE Slots(const Lora& p, int64_t token) : p(p) {
    const int64_t row = row_of(p.row, token);
    if (row < 0) return;
    weights = static_cast<const Acc*>(p.weights) + row * p.K;
    experts = p.experts + row * p.K;
  }

  // The slot names an expert; with weight 0 it adds nothing, and the expert may only be read for the weight's gradient.
  MOERGE_DEVICE bool named(int64_t k) const { return experts && experts[k] >= 0 && experts[k] < p.E; }
  MOERGE_DEVICE bool used(int64_t k) const { return named(k) && weights[k] != 0; }

  // h[k,r] of a token whose h [parts,T,K,R] begins here
  MOERGE_DEVICE Acc value(const Acc* h, int64_t k, int64_t r) const {
    Acc sum = h[k * p.R + r];
    for (int64_t part = 1; part < p.parts; ++part) sum += h[part * p.T * p.K * p.R + k * p.R + r];
    return sum;
  }
  // sum_k w_k h[k,r] over the used slots
  MOERGE_DEVICE Acc mean(const Acc* h, int64_t r) const {
    Acc sum = 0;
    for (int64_t k = 0; k < p.K; ++k)
      if (used(k)) sum += weights[k] * value(h, k, r);
    return sum;
  }
  // What slot k, which is used, contributes: w_k h[k,r], or w_k times the mean; h as above
  MOERGE_DEVICE Acc hidden(const Acc* h, int64_t k, int64_t r) const {
    return weights[k] * (p.factored ? mean(h, r) : value(h, k, r));
  }
};

// Whether the slot of a pair is its own number.
inline bool pairs_are_slots(const Lora& p) { return !p.row.rows && p.row.tokens_per_row == 1 && p.row.n >= p.T; }

// The experts of pairs first + lane, 32 apart, as far as they are below `end`, by a warp; -1: a pair names none, or its
// weight is 0 and such are left out. No load depends on another one or on a condition, and only a map of rows costs
// divisions. direct: pairs_are_slots.
template <class Acc, bool direct, int count>
MOERGE_DEVICE void experts_of(const Lora& p, bool skip_zero, uint32_t first, uint32_t end, int32_t (&expert)[count]) {
  const uint32_t K = static_cast<uint32_t>(p.K);
  Acc weight[count];
  bool named[count];
  MOERGE_UNROLL
  for (int j = 0; j < count; ++j) {
    const uint32_t its = first + j * 32 + lane(), pair = its < end ? its : 0;
    int64_t slot = pair;
    if constexpr (!direct) {
      const int64_t row = row_of(p.row, pair / K);
      slot = row < 0 ? -1 : row * K + pair % K;
    }
    named[j] = its < end && slot >= 0;
    expert[j] = p.experts[slot >= 0 ? slot : 0];
    weight[j] = skip_zero ? static_cast<const Acc*>(p.weights)[slot >= 0 ? slot : 0] : Acc(1);
  }
  MOERGE_UNROLL
  for (int j = 0; j < count; ++j)
    if (!named[j] || expert[j] >= p.E || weight[j] == 0) expert[j] = -1;
}

}  // namespace moerge::cuda
