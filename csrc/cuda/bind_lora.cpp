// moerge::lora_apply, lora_apply_, routed_lora, routed_lora_, routed_linear and the gradient of lora_apply.
#include "../linear.h"
#include "bind.h"

namespace moerge::cuda {

namespace {

// A stack of factors; axis_r and axis_c: which axes of `tensor` are R and C.
Factors factors(Call& call, const Tensor& tensor, int axis_r, int axis_c) {
  return {call.read(tensor),
          dtype_of(tensor),
          tensor.stride(0),
          tensor.stride(axis_r),
          tensor.size(axis_c) <= 1 ? 1 : tensor.stride(axis_c),
          tensor.size(axis_r),
          tensor.size(axis_c)};
}

// The arguments of lora_apply as the kernels take them, once `plan` says that they fit.
struct LoraArguments : LoraPlan {
  Lora lora{};
  Factors a, b;    // [E,R,D] and, transposed, [E,R,O]
  Matrix x, bias;  // bias.data null: none

  LoraArguments(const Check& check, const LoraPlan& plan, Call& call, const Tensor& x_in, const Tensor& lora_a,
                const Tensor& lora_b, const Tensor& weights, const Tensor& experts,
                const std::optional<Tensor>& lora_bias, const std::optional<Tensor>& rows, bool factored,
                const std::optional<Tensor>& packed)
      : LoraPlan(plan) {
    check_slots(check, weights, experts, rows, *this);
    MOERGE_CHECK(check, T * K < (int64_t(1) << 31), "T x K must be below 2^31, got ", T, " x ", K);
    lora.T = T, lora.E = E, lora.K = K, lora.R = R;
    lora.factored = factored;
    lora.wide = wide;
    lora.row = row_map(call, rows, N, tokens_per_row);
    lora.weights = call.read(dense(weights, accumulator(wide)));
    lora.experts = static_cast<const int32_t*>(call.read(dense(experts)));
    if (packed) {
      char* data = static_cast<char*>(call.read(*packed));
      const DType type = dtype_of(*packed);
      const int64_t columns = packed->size(1);
      a = {data, type, columns, 1, R, R, D};
      b = {data + R * D * packed->element_size(), type, columns, O, 1, R, O};
    } else {
      a = factors(call, lora_a, 1, 2);
      b = factors(call, lora_b, 2, 1);
    }
    const Tensor x_rows = readable_rows(x_in);
    x = matrix(x_rows, call.read(x_rows));
    if (!lora_bias) return;
    const Tensor values = readable_rows(*lora_bias);
    bias = matrix(values, call.read(values));
  }
};

// Runs lora_shrink, which may need the pairs sorted by expert; they are sorted once per skip_zero.
struct Shrink {
  const Lora& p;
  Call& call;
  std::optional<Groups> sorted[2];

  const Groups& groups(bool skip_zero) {
    std::optional<Groups>& found = sorted[skip_zero];
    if (!found) {
      const auto ids = [&](int64_t count) { return static_cast<int32_t*>(call.workspace(count * 4)); };
      found = Groups{ids(p.T * p.K), ids(p.E), ids(p.E + 1), ids(p.E + 1), ids(most_tiles(p))};
      group_pairs(p, skip_zero, *found, call.stream());
    }
    return *found;
  }

  void* operator()(const Matrix& x, const Factors& w, bool skip_zero) {
    void* h = call.workspace(p.T * p.K * p.R * accumulator_size(p.wide));
    const Groups& used = shrink_uses_groups(p, x, w) ? groups(skip_zero) : Groups{};
    lora_shrink(p, x, w, skip_zero, used, h, call.stream());
    return h;
  }
};

void run_forward(const LoraArguments& args, Call& call, const Matrix& base, const Matrix& out) {
  const void* h = Shrink{args.lora, call, {}}(args.x, args.a, true);
  lora_expand(args.lora, h, args.b, base, args.bias, out, call.stream());
  call.finish();
}

Tensor forward(const LoraArguments& args, Call& call, const Tensor& base_in) {
  Tensor out = new_tensor(base_in, {args.lora.T, args.O}, base_in.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor base = readable_rows(base_in);
  run_forward(args, call, matrix(base, call.read(base)), matrix(out, call.write(out)));
  return out;
}

// The forward written into base.
void update(const Check& check, const LoraArguments& args, Call& call, Tensor base) {
  check_no_overlap(check, base);
  if (base.numel() == 0) return;
  const Tensor target = readable_rows(base);
  const Matrix rows_of = matrix(target, call.update(target));
  run_forward(args, call, rows_of, rows_of);
  if (target.data_ptr() != base.data_ptr()) torch::stable::copy_(base, target);
}

Tensor lora_apply(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                  std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                  std::optional<Tensor> packed) {
  const Check check{"lora_apply", kDevice};
  check_base(check, base, x);
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  Call call(base);
  const LoraArguments args(check, plan, call, x, lora_a, lora_b, weights, experts, lora_bias, rows, factored, packed);
  return forward(args, call, base);
}

void lora_apply_(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                 std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                 std::optional<Tensor> packed) {
  const Check check{"lora_apply_", kDevice};
  check_base(check, base, x);
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  Call call(base);
  const LoraArguments args(check, plan, call, x, lora_a, lora_b, weights, experts, lora_bias, rows, factored, packed);
  update(check, args, call, base);
}

struct Routed {
  Tensor weights, experts;
};

// Routes, checking first that gates and factors are of one bank.
Routed routed(const Check& check, const LoraPlan& lora, const Tensor& x, const Tensor& gates,
              const RouteOptions& options) {
  const RoutePlan plan = check_route(check, x, gates, options);
  check_same_bank(check, plan, lora);
  Call call(x);
  const auto [weights, experts] = run_route(route_arguments(plan, call, x, gates, options), call, x);
  return {weights, experts};
}

std::tuple<Tensor, Tensor, Tensor> routed_lora(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b,
                                               int64_t top_k, std::string normalize, bool absolute,
                                               std::optional<double> scale, std::optional<Tensor> bias,
                                               std::optional<Tensor> rows, std::optional<Tensor> mask,
                                               std::optional<double> top_p, std::string weighting,
                                               std::optional<Tensor> lora_bias, bool factored,
                                               std::optional<Tensor> packed) {
  const Check check{"routed_lora", kDevice};
  check_base(check, base, x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  const auto [weights, experts] = routed(check, plan, x, gates, options);
  Call call(base);
  const LoraArguments args(check, plan, call, x, lora_a, lora_b, weights, experts, lora_bias, std::nullopt, factored,
                           packed);
  return {forward(args, call, base), weights, experts};
}

void routed_lora_(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                  std::string normalize, bool absolute, std::optional<double> scale, std::optional<Tensor> bias,
                  std::optional<Tensor> rows, std::optional<Tensor> mask, std::optional<double> top_p,
                  std::string weighting, std::optional<Tensor> lora_bias, bool factored, std::optional<Tensor> packed) {
  const Check check{"routed_lora_", kDevice};
  base = flattened(check, base, "base");
  x = flattened(check, x, "x");
  check_base(check, base, x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  const auto [weights, experts] = routed(check, plan, x, gates, options);
  Call call(base);
  const LoraArguments args(check, plan, call, x, lora_a, lora_b, weights, experts, lora_bias, std::nullopt, factored,
                           packed);
  update(check, args, call, base);
}

std::tuple<Tensor, Tensor, Tensor> routed_linear(Tensor x, Tensor weight, std::optional<Tensor> linear_bias,
                                                 Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                                                 std::string normalize, bool absolute, std::optional<double> scale,
                                                 std::optional<Tensor> bias, std::optional<Tensor> rows,
                                                 std::optional<Tensor> mask, std::optional<double> top_p,
                                                 std::string weighting, std::optional<Tensor> lora_bias, bool factored,
                                                 std::optional<Tensor> packed) {
  const Check check{"routed_linear", kDevice};
  const Tensor tokens = flattened(check, x, "x");
  check_linear(check, tokens, weight, linear_bias);
  const Tensor out = torch::stable::new_empty(x, with_columns(x, weight.size(0)), x.scalar_type());
  const Tensor y = flattened(check, out, "y");
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, tokens, y.size(1), false, lora_a, lora_b, lora_bias, packed);
  const auto [weights, experts] = routed(check, plan, tokens, gates, options);
  Call call(y);
  const LoraArguments args(check, plan, call, tokens, lora_a, lora_b, weights, experts, lora_bias, std::nullopt,
                           factored, packed);
  linear_into(y, tokens, weight, linear_bias);
  update(check, args, call, y);
  return {out, weights, experts};
}

// Which gradients are wanted, and where they go: null is not wanted.
struct Gradients {
  Tensor x, a, b, weights, bias;  // b is [E,R,O]
  void *to_x = nullptr, *to_a = nullptr, *to_b = nullptr, *to_weights = nullptr, *to_bias = nullptr;
};

void run_backward(const LoraArguments& args, Call& call, const Matrix& dy, const Gradients& g) {
  const Lora& p = args.lora;
  const Stream stream = call.stream();
  Shrink shrink{p, call, {}};
  // a weight's gradient is true at a weight of 0 too, so those pairs are read for it
  const bool skip_zero = !g.to_weights;
  void* h = g.to_b || g.to_weights ? shrink(args.x, args.a, skip_zero) : nullptr;
  void* q = g.to_x || g.to_a || g.to_weights ? shrink(dy, args.b, skip_zero) : nullptr;
  if (g.to_weights)
    lora_weight_gradient(p, h, q, dy, args.O, args.bias, call.workspace(p.T * p.K * accumulator_size(p.wide)),
                         g.to_weights, dtype_of(g.weights), stream);
  if (g.to_x) lora_expand(p, q, args.a, {}, {}, matrix(g.x, g.to_x), stream);
  if (!g.to_a && !g.to_b && !g.to_bias) return;
  const Groups& groups = shrink.groups(true);
  if (g.to_a) lora_outer(p, groups, q, p.R, args.x, args.D, g.to_a, dtype_of(g.a), stream);
  if (g.to_b) lora_outer(p, groups, h, p.R, dy, args.O, g.to_b, dtype_of(g.b), stream);
  if (g.to_bias) lora_outer(p, groups, nullptr, 1, dy, args.O, g.to_bias, dtype_of(g.bias), stream);
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
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
  m.impl("routed_lora_", TORCH_BOX(&routed_lora_));
  m.impl("routed_linear", TORCH_BOX(&routed_linear));
  m.impl("lora_apply_backward", TORCH_BOX(&lora_apply_backward));
}

}  // namespace moerge::cuda
