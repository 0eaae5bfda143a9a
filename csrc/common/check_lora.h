// The arguments of lora_apply and its relatives, checked: the same code, so the same messages, for every device.
#pragma once

#include "check_route.h"

namespace moerge {

// The sizes of lora_apply once they are known to fit each other.
struct LoraPlan {
  int64_t T, D, O, E, R;
  int64_t N = 0, K = 0;        // of the slots
  int64_t tokens_per_row = 1;  // where rows does not say
  bool wide;                   // the accumulator is double
};

inline void check_base(const Check& check, const Tensor& base, const Tensor& x) {
  check.floating(base, "base");
  MOERGE_CHECK(check, base.dim() == 2, "base must be [T, O], got ", shape_of(base));
  MOERGE_CHECK(check, x.dim() != 2 || base.size(0) == x.size(0), "base must have T=", x.dim() ? x.size(0) : 0,
               " rows to match x, got ", shape_of(base));
}

inline void check_grad_y(const Check& check, const Tensor& grad_y, const Tensor& x) {
  check.floating(grad_y, "grad_y");
  MOERGE_CHECK(check, grad_y.dim() == 2 && x.dim() == 2 && grad_y.size(0) == x.size(0),
               "grad_y must be [T, O] with the T of x ", shape_of(x), ", got ", shape_of(grad_y));
}

// Elements that share memory, as in an expanded tensor: then writing into it has no meaning.
inline void check_no_overlap(const Check& check, const Tensor& base) {
  const int near = base.stride(1) <= base.stride(0) ? 1 : 0;
  int64_t reach = 0;
  bool overlaps = false;
  for (int axis : {near, 1 - near}) {
    if (base.size(axis) <= 1) continue;
    overlaps = overlaps || base.stride(axis) <= reach;
    reach += base.stride(axis) * (base.size(axis) - 1);
  }
  MOERGE_CHECK(check, !overlaps, "base must not overlap itself in memory, got strides [", base.stride(0), ", ",
               base.stride(1), "]");
}

// x and the bank for an output of O features; the slots are still open. `wide_output`: it is float64.
inline LoraPlan check_bank(const Check& check, const Tensor& x, int64_t O, bool wide_output, const Tensor& lora_a,
                           const Tensor& lora_b, const std::optional<Tensor>& lora_bias,
                           const std::optional<Tensor>& packed) {
  check.floating(x, "x");
  check.floating(lora_a, "lora_a");
  check.floating(lora_b, "lora_b");
  MOERGE_CHECK(check, x.dim() == 2, "x must be [T, D], got ", shape_of(x));
  MOERGE_CHECK(check, lora_a.dim() == 3, "lora_a must be [E, R, D], got ", shape_of(lora_a));
  MOERGE_CHECK(check, lora_b.dim() == 3, "lora_b must be [E, O, R], got ", shape_of(lora_b));
  LoraPlan p;
  p.T = x.size(0), p.D = x.size(1), p.O = O;
  check.shape(lora_a, "lora_a", {-1, -1, p.D}, "[E, R, D=", p.D, "] to match x");
  p.E = lora_a.size(0), p.R = lora_a.size(1);
  check.shape(lora_b, "lora_b", {p.E, O, p.R}, "[E=", p.E, ", O=", O, ", R=", p.R, "] to match lora_a and base");
  p.wide = wide_output || is_double(x) || is_double(lora_a) || is_double(lora_b);
  if (lora_bias) {
    check.floating(*lora_bias, "lora_bias");
    check.shape(*lora_bias, "lora_bias", {p.E, O}, "[E=", p.E, ", O=", O, "]");
  }
  if (packed) {
    const int64_t columns = p.R * p.D + p.R * O;
    check.shape(*packed, "packed", {p.E, columns}, "[E=", p.E, ", R*D + R*O=", columns, "] from pack_experts");
    check.floating(*packed, "packed");
    MOERGE_CHECK(check, packed->is_contiguous(), "packed must be contiguous, as pack_experts returns it");
  }
  return p;
}

// The slots that the caller chose, but for the values of ids and rows.
inline void check_slots(const Check& check, const Tensor& weights, const Tensor& experts,
                        const std::optional<Tensor>& rows, LoraPlan& p) {
  check.floating(weights, "weights");
  MOERGE_CHECK(check, weights.dim() == 2, "weights must be [T, K] or [N, K], got ", shape_of(weights));
  p.N = weights.size(0), p.K = weights.size(1);
  check.shape(experts, "experts", {p.N, p.K}, "[", p.N, ", K=", p.K, "] like weights");
  check.dtype(experts, "experts", ScalarType::Int);
  MOERGE_CHECK(check, p.N > 0 || p.T == 0, "weights must have at least one row for T=", p.T, " tokens, got ",
               shape_of(weights));
  p.tokens_per_row = check_rows(check, rows, p.T, p.N);
}

// Gates and factors of routed_lora must be of one bank.
inline void check_same_bank(const Check& check, const RoutePlan& route, const LoraPlan& lora) {
  MOERGE_CHECK(check, lora.E == route.E, "lora_a must be [E=", route.E, ", R, D] to match gates, got [", lora.E, ", ",
               lora.R, ", ", lora.D, "]");
}

}  // namespace moerge
