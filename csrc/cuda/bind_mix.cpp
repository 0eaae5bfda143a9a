// moerge::mix_log_probs and its gradient.
#include "../common/check_mix.h"
#include "bind.h"

namespace moerge::cuda {

namespace {

Mix arguments(Call& call, const Tensor& logits, const Tensor& weights) {
  Mix p{};
  p.K = logits.size(0), p.N = logits.size(1), p.V = logits.size(2);
  p.logits = call.read(dense(logits));
  p.dtype = dtype_of(logits);
  p.wide = is_double(logits);
  p.weights = call.read(dense(weights, accumulator(p.wide)));
  p.offset = call.workspace(p.N * p.K * accumulator_size(p.wide));
  return p;
}

Tensor mix_log_probs(Tensor logits, Tensor weights) {
  check_mix(Check{"mix_log_probs", kDevice}, logits, weights);
  Call call(logits);
  const Mix p = arguments(call, logits, weights);
  Tensor out = new_tensor(logits, {p.N, p.V}, accumulator(p.wide));
  if (out.numel() == 0) return out;
  mix_forward(p, call.write(out), call.stream());
  call.finish();
  return out;
}

std::tuple<Tensor, Tensor> mix_log_probs_backward(Tensor grad, Tensor result, Tensor logits, Tensor weights,
                                                  int64_t needs) {
  const Check check{"mix_log_probs_backward", kDevice};
  check_mix(check, logits, weights);
  check_mix_results(check, grad, result, logits);
  Call call(logits);
  const Mix p = arguments(call, logits, weights);
  const bool need_logits = needs & 1, need_weights = needs & 2;
  Tensor grad_logits = need_logits ? new_tensor(logits, {p.K, p.N, p.V}, logits.scalar_type())
                                   : new_tensor(logits, {0}, logits.scalar_type());
  Tensor grad_weights = need_weights ? new_tensor(weights, {p.N, p.K}, weights.scalar_type())
                                     : new_tensor(weights, {0}, weights.scalar_type());
  if (need_weights && p.V == 0) torch::stable::zero_(grad_weights);
  if (grad.numel() == 0 || needs == 0) return {grad_logits, grad_weights};
  const ScalarType acc = accumulator(p.wide);
  mix_backward(p, call.read(dense(grad, acc)), call.read(dense(result, acc)),
               need_logits ? call.write(grad_logits) : nullptr, need_weights ? call.write(grad_weights) : nullptr,
               dtype_of(weights), call.stream());
  call.finish();
  return {grad_logits, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, MOERGE_DISPATCH_KEY, m) {
  m.impl("mix_log_probs", TORCH_BOX(&mix_log_probs));
  m.impl("mix_log_probs_backward", TORCH_BOX(&mix_log_probs_backward));
}

}  // namespace moerge::cuda
