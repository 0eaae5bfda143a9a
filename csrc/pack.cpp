// moerge::pack_experts on any device: E x R x (D + O) numbers copied once, when a bank is built or moved.
#include "common/tensors.h"

namespace moerge {

namespace {

Tensor pack_experts(Tensor lora_a, Tensor lora_b) {
  const Check check{"pack_experts", lora_a.is_cuda() ? Device::cuda : Device::cpu};
  check.floating(lora_a, "lora_a");
  MOERGE_CHECK(check, lora_a.dim() == 3, "lora_a must be [E, R, D], got ", shape_of(lora_a));
  const int64_t E = lora_a.size(0), R = lora_a.size(1), D = lora_a.size(2);
  check.shape(lora_b, "lora_b", {E, -1, R}, "[E=", E, ", O, R=", R, "] to match lora_a");
  check.dtype(lora_b, "lora_b", lora_a.scalar_type());
  const int64_t O = lora_b.size(1);
  Tensor packed = new_tensor(lora_a, {E, R * D + R * O}, lora_a.scalar_type());
  Tensor a = torch::stable::narrow(packed, 1, 0, R * D), b = torch::stable::narrow(packed, 1, R * D, R * O);
  torch::stable::copy_(a, torch::stable::reshape(torch::stable::transpose(lora_a, 1, 2), {E, D * R}));
  torch::stable::copy_(b, torch::stable::reshape(torch::stable::transpose(lora_b, 1, 2), {E, R * O}));
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) { m.impl("pack_experts", TORCH_BOX(&pack_experts)); }
STABLE_TORCH_LIBRARY_IMPL(moerge, CUDA, m) { m.impl("pack_experts", TORCH_BOX(&pack_experts)); }

}  // namespace moerge
