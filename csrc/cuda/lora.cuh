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

// The expert of a pair; -1: it names none, or its weight is 0 and such are left out.
template <class Acc>
MOERGE_DEVICE int32_t expert_of(const Lora& p, int64_t pair, bool skip_zero) {
  if (pair >= p.T * p.K) return -1;
  const Slots<Acc> slots(p, pair / p.K);
  const int64_t k = pair % p.K;
  return (skip_zero ? slots.used(k) : slots.named(k)) ? slots.experts[k] : -1;
}

}  // namespace moerge::cuda
