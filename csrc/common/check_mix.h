// The arguments of mix_log_probs, checked: the same code, so the same messages, for every device.
#pragma once

#include "tensors.h"

namespace moerge {

inline void check_mix(const Check& check, const Tensor& logits, const Tensor& weights) {
  check.floating(logits, "logits");
  check.floating(weights, "weights");
  MOERGE_CHECK(check, logits.dim() == 3, "logits must be [K, N, V], got ", shape_of(logits));
  check.shape(weights, "weights", {logits.size(1), logits.size(0)}, "[N=", logits.size(1), ", K=", logits.size(0),
              "] to match logits");
}

inline void check_mix_results(const Check& check, const Tensor& grad, const Tensor& result, const Tensor& logits) {
  const int64_t N = logits.size(1), V = logits.size(2);
  check.floating(grad, "grad");
  check.floating(result, "result");
  check.shape(grad, "grad", {N, V}, "[N=", N, ", V=", V, "]");
  check.shape(result, "result", {N, V}, "[N=", N, ", V=", V, "]");
}

}  // namespace moerge
