// The base layer inside routed_linear, y = x W^T + b: its checks, and torch's own product. Shared by csrc/cpu and
// csrc/cuda.
#pragma once

#include <array>
#include <vector>

#include "check.h"

namespace moerge {

// x [T,D], weight [O,D] and linear_bias [O] of one dtype, as torch's linear wants them.
inline void check_linear(const Check& check, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& linear_bias) {
  check.floating(x, "x");
  check.here(weight, "weight");
  check.shape(weight, "weight", {-1, x.size(1)}, "[O, D=", x.size(1), "] to match x");
  check.dtype(weight, "weight", x.scalar_type(), " like x");
  if (!linear_bias) return;
  check.here(*linear_bias, "linear_bias");
  check.shape(*linear_bias, "linear_bias", {weight.size(0)}, "[O=", weight.size(0), "] to match weight");
  check.dtype(*linear_bias, "linear_bias", x.scalar_type(), " like x");
}

// y [T,O] <- x weight^T + linear_bias, rounded to y's dtype. The out= form is the one that autocast leaves alone.
inline void linear_into(const Tensor& y, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& linear_bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(linear_bias), from(y)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference to y that came back
}

// The shape of x [..., D] with `columns` in place of D.
inline std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(columns);
  return sizes;
}

}  // namespace moerge
