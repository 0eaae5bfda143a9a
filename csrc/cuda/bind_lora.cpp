// moerge::lora_apply, lora_apply_ and the gradient of lora_apply.
#include "bind_lora.h"

namespace moerge::cuda {

namespace {

Tensor lora_apply(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                  std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                  std::optional<Tensor> packed) {
  const Check check{"lora_apply", kDevice};
  check_base(check, base, x);
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  Call call(base);
  const LoraArguments args(check, plan, call, x, lora_a, lora_b, weights, experts, lora_bias, rows, factored, packed);
  const Tensor out = new_tensor(base, {plan.T, plan.O}, base.scalar_type());
  forward(args, call, base, out);
  return out;
}

void lora_apply_(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                 std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                 std::optional<Tensor> packed) {
  const Check check{"lora_apply_", kDevice};
  check_base(check, base, x);
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  Call call(base);
  const LoraArguments args(check, plan, call, x, lora_a, lora_b, weights, experts, lora_bias, rows, factored, packed);
  check_no_overlap(check, base);
  const Tensor target = readable_rows(base);
  update(args, call, target);
  if (target.data_ptr() != base.data_ptr()) torch::stable::copy_(base, target);
}

// Which gradients are wanted, and where they go: null is not wanted.
struct Gradients {
  Tensor x, a, b, weights, bias;  // b is [E,R,O]
  void *to_x = nullptr, *to_a = nullptr, *to_b = nullptr, *to_weights = nullptr, *to_bias = nullptr;
};

void run_backward(const LoraArguments& args, Call& call, const Matrix& dy, const Gradients& g) {
  const Lora& p = args.lora;
  const Stream stream = call.stream();
  Shrink shrink{p, call, stream};
  // a weight's gradient is true at a weight of 0 too, so those pairs are read for it
  const bool skip_zero = !g.to_weights;
  void* h = g.to_b || g.to_weights ? shrink(args.x, args.a, skip_zero) : nullptr;
  void* q = g.to_x || g.to_a || g.to_weights ? shrink(dy, args.b, skip_zero) : nullptr;
  if (g.to_weights)
    lora_weight_gradient(p, h, q, dy, args.O, args.bias, call.workspace(p.T * p.K * accumulator_size(p.wide)),
                         g.to_weights, dtype_of(g.weights), stream);
  if (g.to_x)
    lora_expand(p, q, prepared_expand(p, call, q, args.a, dtype_of(g.x), stream), args.a, {}, {}, matrix(g.x, g.to_x),
                stream);
  if (!g.to_a && !g.to_b && !g.to_bias) return;
  const Groups& groups = shrink.groups(true);
  const auto outer = [&](const void* left, const Matrix& right, int64_t columns, const Tensor& like, void* out) {
    void* workspace = call.workspace(outer_workspace(p, right, columns, dtype_of(like)));
    lora_outer(p, groups, left, p.R, right, columns, workspace, out, dtype_of(like), stream);
  };
  if (g.to_a) outer(q, args.x, args.D, g.a, g.to_a);
  if (g.to_b) outer(h, dy, args.O, g.b, g.to_b);
  if (g.to_bias) lora_outer(p, groups, nullptr, 1, dy, args.O, nullptr, g.to_bias, dtype_of(g.bias), stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_apply_backward(Tensor grad_y, Tensor x, Tensor lora_a,
                                                                       Tensor lora_b, Tensor weights, Tensor experts,
                                                                       int64_t needs, std::optional<Tensor> lora_bias,
                                                                       std::optional<Tensor> rows, bool factored) {
  const Check check{"lora_apply_backward", kDevice};
  check_grad_y(check, grad_y, x);
  const LoraPlan plan =
      check_bank(check, x, grad_y.size(1), is_double(grad_y), lora_a, lora_b, lora_bias, std::nullopt);
  Call call(grad_y);
  const LoraArguments args(check, plan, call, x, lora_a, lora_b, weights, experts, lora_bias, rows, factored,
                           std::nullopt);
  const Lora& p = args.lora;
  const bool nothing = p.T == 0 || p.R == 0 || p.K == 0 || p.E == 0;
  Gradients g;
  const auto result = [&](bool needed, const Tensor& like, std::initializer_list<int64_t> sizes, void*& target) {
    if (!needed) return new_tensor(like, {0}, like.scalar_type());
    Tensor out = new_tensor(like, sizes, like.scalar_type());
    if (nothing)
      torch::stable::zero_(out);
    else if (out.numel())
      target = call.write(out);
    return out;
  };
  g.x = result(needs & 1, x, {p.T, args.D}, g.to_x);
  g.a = result(needs & 2, lora_a, {p.E, p.R, args.D}, g.to_a);
  g.b = result(needs & 4, lora_b, {p.E, p.R, args.O}, g.to_b);
  g.weights = result(needs & 8, weights, {args.N, p.K}, g.to_weights);
  g.bias = result(lora_bias && (needs & 16), lora_bias ? *lora_bias : x, {p.E, args.O}, g.to_bias);
  if (!nothing) {
    const Tensor dy = readable_rows(grad_y);
    run_backward(args, call, matrix(dy, call.read(dy)), g);
    call.finish();
  }
  return {g.x, g.a, needs & 4 ? torch::stable::transpose(g.b, 1, 2) : g.b, g.weights, g.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, MOERGE_DISPATCH_KEY, m) {
  m.impl("lora_apply", TORCH_BOX(&lora_apply));
  m.impl("lora_apply_", TORCH_BOX(&lora_apply_));
  m.impl("lora_apply_backward", TORCH_BOX(&lora_apply_backward));
}

}  // namespace moerge::cuda
