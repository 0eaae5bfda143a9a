// The schema of every op, one commented block per op. The contracts are in moerge_ext/ops/wrappers.py (public
// docstrings) and moerge_ext/ops/reference.py (the definition in plain torch); implementations register per device in
// cpu/ and cuda/. The options are listed once more in moerge_ext/ops/options.py, with what they mean.
//
// T tokens, D in features, O out features, E experts, K selected per token, R rank, N rows (sequences).
// Backward ops take `needs`, one bit per gradient in the order of their results; a gradient that is not needed
// comes back with zero elements. Nothing is keyword-only here, since torch's autograd registration takes tensors by
// position; the public wrappers make the options keyword-only.
#include "common/check.h"

#define MOERGE_ROUTE_OPTIONS                                                           \
  "int top_k=2, str normalize='standardize', bool absolute=False, float? scale=None, " \
  "Tensor? bias=None, Tensor? rows=None, Tensor? mask=None, float? top_p=None, "       \
  "str weighting='softmax'"

STABLE_TORCH_LIBRARY(moerge, m) {
  // x [T,D], gates [E,D], bias [N,E], rows [T] int32, mask [E] or [N,E] bool
  //   -> weights [T,K] float32 (float64 for float64 x), experts [T,K] int32
  m.def("route(Tensor x, Tensor gates, " MOERGE_ROUTE_OPTIONS ") -> (Tensor, Tensor)");

  // grad_weights, weights, experts [T,K] -> grad_x [T,D], grad_gates [E,D], grad_bias [N,E]
  m.def(
      "route_backward(Tensor grad_weights, Tensor weights, Tensor experts, Tensor x, Tensor gates, "
      "int needs, " MOERGE_ROUTE_OPTIONS ") -> (Tensor, Tensor, Tensor)");

  // base [T,O], x [T,D], lora_a [E,R,D], lora_b [E,O,R], weights and experts [T,K] or [N,K], lora_bias [E,O]
  //   -> y [T,O] in base's dtype
  m.def(
      "lora_apply(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts, "
      "Tensor? lora_bias=None, Tensor? rows=None, bool factored=False, Tensor? packed=None) -> Tensor");

  // The same, written into base.
  m.def(
      "lora_apply_(Tensor(a!) base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts, "
      "Tensor? lora_bias=None, Tensor? rows=None, bool factored=False, Tensor? packed=None) -> ()");

  // grad_y [T,O] -> grad_x, grad_lora_a, grad_lora_b (O contiguous), grad_weights, grad_lora_bias
  m.def(
      "lora_apply_backward(Tensor grad_y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, "
      "Tensor experts, int needs, Tensor? lora_bias=None, Tensor? rows=None, bool factored=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // route, then lora_apply with its result: y [T,O], weights [T,K], experts [T,K]
  m.def("routed_lora(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, " MOERGE_ROUTE_OPTIONS
        ", Tensor? lora_bias=None, bool factored=False, Tensor? packed=None) -> (Tensor, Tensor, Tensor)");

  // The same, written into base; what was chosen is not returned.
  m.def("routed_lora_(Tensor(a!) base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, " MOERGE_ROUTE_OPTIONS
        ", Tensor? lora_bias=None, bool factored=False, Tensor? packed=None) -> ()");

  // For people: which kernels routed_lora would run for these arguments, and why not faster ones, a line each; the
  // bytes of the text, since torch (2.13) never frees a `str` that an op returns.
  m.def("routed_lora_ways(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, " MOERGE_ROUTE_OPTIONS
        ", Tensor? lora_bias=None, bool factored=False, Tensor? packed=None) -> Tensor");

  // The base layer too: x [T,D] or [...,D] contiguous, weight [O,D], linear_bias [O] -> y [T,O] or [...,O] in x's
  // dtype, weights [T,K], experts [T,K]
  m.def(
      "routed_linear(Tensor x, Tensor weight, Tensor? linear_bias, Tensor gates, Tensor lora_a, Tensor "
      "lora_b, " MOERGE_ROUTE_OPTIONS
      ", Tensor? lora_bias=None, bool factored=False, Tensor? packed=None) -> (Tensor, Tensor, Tensor)");

  // Its y alone, without a gradient: each result and torch's Python kernel for gradients cost microseconds.
  m.def(
      "routed_linear_y(Tensor x, Tensor weight, Tensor? linear_bias, Tensor gates, Tensor lora_a, Tensor "
      "lora_b, " MOERGE_ROUTE_OPTIONS ", Tensor? lora_bias=None, bool factored=False, Tensor? packed=None) -> Tensor");

  // lora_a [E,R,D], lora_b [E,O,R] -> packed [E, R*D + R*O]: the transpose of A_e, then that of B_e, each row by row
  m.def("pack_experts(Tensor lora_a, Tensor lora_b) -> Tensor");

  // logits [K,N,V], weights [N,K] -> log of the weighted mean of the K distributions, [N,V] float32 or float64
  m.def("mix_log_probs(Tensor logits, Tensor weights) -> Tensor");

  // grad [N,V], result [N,V] -> grad_logits [K,N,V], grad_weights [N,K]
  m.def(
      "mix_log_probs_backward(Tensor grad, Tensor result, Tensor logits, Tensor weights, int needs) "
      "-> (Tensor, Tensor)");
}
