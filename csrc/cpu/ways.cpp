// moerge::routed_lora_ways on the CPU: which kernels routed_lora runs, in words. There is one way through them, for
// every size, type and stride; what differs is the instruction set that it was compiled for.
#include "../common/check_lora.h"
#include "micro.h"

namespace moerge::cpu {

namespace {

Tensor routed_lora_ways(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                        Word normalize, bool absolute, std::optional<double> scale, std::optional<Tensor> bias,
                        std::optional<Tensor> rows, std::optional<Tensor> mask, std::optional<double> top_p,
                        Word weighting, std::optional<Tensor> lora_bias, bool, std::optional<Tensor> packed) {
  const Check check{"routed_lora_ways", Device::cpu};
  check_base(check, base, x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  check_route(check, x, gates, options);
  check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  return bytes_of(std::string("kernels for ") + instruction_set() + "\n");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) { m.impl("routed_lora_ways", TORCH_BOX(&routed_lora_ways)); }

}  // namespace moerge::cpu
