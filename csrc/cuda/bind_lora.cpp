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
      found = Groups{ids(p.T * p.K), ids(p.E + 1), ids(most_tiles(p))};
      group_pairs(p, skip_zero, *found, call.stream());
    }
    return *found;
  }

  void* operator()(const Matrix& x, const Factors& w, bool skip_zero) {
    void* h = call.workspace(p.parts * p.T * p.K * p.R * accumulator_size(p.wide));
    const Groups& used = shrink_uses_groups(p, x, w) ? groups(skip_zero) : Groups{};
    lora_shrink(p, x, w, skip_zero, used, h, call.stream());
    return h;
  }
};

void run_forward(const LoraArguments& args, Call& call, const Matrix& base, const Matrix& out) {
  Lora p = args.lora;
  p.parts = shrink_parts(p, args.x, args.a);
  const void* h = Shrink{p, call, {}}(args.x, args.a, true);
  lora_expand(p, h, args.b, base, args.bias, out, call.stream());
  call.finish();
}

void forward(const LoraArguments& args, Call& call, const Tensor& base_in, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor base = readable_rows(base_in);
  run_forward(args, call, matrix(base, call.read(base)), matrix(out, call.write(out)));
}

// The forward written into base, whose rows are readable.
void update(const LoraArguments& args, Call& call, const Tensor& base) {
  if (base.numel() == 0) return;
  const Matrix rows_of = matrix(base, call.update(base));
  run_forward(args, call, rows_of, rows_of);
}

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

// The router's and the bank's arguments of the routed ops.
struct Routing {
  const Tensor &x, &gates, &lora_a, &lora_b;
  const RouteOptions& options;
  const std::optional<Tensor>& lora_bias;
  bool factored;
  const std::optional<Tensor>& packed;
};

struct Routed {
  Tensor weights, experts;
  bool applied;  // the branch has been added as well
};

LoraArguments chosen(const Check& check, const LoraPlan& plan, Call& call, const Routing& r, const Tensor& weights,
                     const Tensor& experts) {
  return LoraArguments(check, plan, call, r.x, r.lora_a, r.lora_b, weights, experts, r.lora_bias, std::nullopt,
                       r.factored, r.packed);
}

// Routes. With few tokens and arguments that fit, the branch and what `place` says of base and output (see Decode) are
// part of the same launch.
template <class Place>
Routed routed(const Check& check, const LoraPlan& plan, const Routing& r, const Place& place) {
  const RoutePlan route_plan = check_route(check, r.x, r.gates, r.options);
  check_same_bank(check, route_plan, plan);
  Call call(r.x);
  const Route route = route_arguments(route_plan, call, r.x, r.gates, r.options);
  const Tensor weights = new_tensor(r.x, {route.T, route.K}, accumulator(route.wide));
  const Tensor experts = new_tensor(r.x, {route.T, route.K}, ScalarType::Int);
  if (route.T > 0 && route.T <= kDecodeTokens) {
    const LoraArguments args = chosen(check, plan, call, r, weights, experts);
    Decode decode{};
    decode.route = route;
    decode.route.weights = call.write(weights);
    decode.route.experts = static_cast<int32_t*>(call.write(experts));
    decode.a = args.a, decode.b = args.b, decode.lora_bias = args.bias, decode.factored = r.factored;
    decode.parts = static_cast<float*>(call.workspace(kDecodeParts * route.T * route.K * plan.R * 4));
    place(call, decode);
    if (routed_decode(decode, call.stream())) {
      call.finish();
      return {weights, experts, true};
    }
  }
  run_route(route, call, weights, experts);
  return {weights, experts, false};
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
  const Routing routing{x, gates, lora_a, lora_b, options, lora_bias, factored, packed};
  const Tensor out = new_tensor(base, {plan.T, plan.O}, base.scalar_type());
  const Routed found = routed(check, plan, routing, [&](Call& call, Decode& decode) {
    const Tensor from = readable_rows(base);
    decode.base = matrix(from, call.read(from));
    decode.out = matrix(out, call.write(out));
  });
  if (!found.applied) {
    Call call(base);
    forward(chosen(check, plan, call, routing, found.weights, found.experts), call, base, out);
  }
  return {out, found.weights, found.experts};
}

void routed_lora_(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                  std::string normalize, bool absolute, std::optional<double> scale, std::optional<Tensor> bias,
                  std::optional<Tensor> rows, std::optional<Tensor> mask, std::optional<double> top_p,
                  std::string weighting, std::optional<Tensor> lora_bias, bool factored, std::optional<Tensor> packed) {
  const Check check{"routed_lora_", kDevice};
  base = flattened(check, base, "base");
  x = flattened(check, x, "x");
  check_base(check, base, x);
  check_no_overlap(check, base);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  const Routing routing{x, gates, lora_a, lora_b, options, lora_bias, factored, packed};
  const Tensor target = readable_rows(base);
  const Routed found = routed(check, plan, routing, [&](Call& call, Decode& decode) {
    decode.base = decode.out = matrix(target, call.update(target));
  });
  if (!found.applied) {
    Call call(base);
    update(chosen(check, plan, call, routing, found.weights, found.experts), call, target);
  }
  if (target.data_ptr() != base.data_ptr()) torch::stable::copy_(base, target);
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
  const Routing routing{tokens, gates, lora_a, lora_b, options, lora_bias, factored, packed};
  const Routed found = routed(check, plan, routing, [&](Call& call, Decode& decode) {
    const Tensor w = readable_rows(weight);
    decode.weight = matrix(w, call.read(w));
    if (linear_bias) decode.linear_bias = call.read(dense(*linear_bias));
    decode.out = matrix(y, call.write(y));
  });
  if (!found.applied) {
    linear_into(y, tokens, weight, linear_bias);
    Call call(y);
    update(chosen(check, plan, call, routing, found.weights, found.experts), call, y);
  }
  return {out, found.weights, found.experts};
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
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
  m.impl("routed_lora_", TORCH_BOX(&routed_lora_));
  m.impl("routed_linear", TORCH_BOX(&routed_linear));
  m.impl("lora_apply_backward", TORCH_BOX(&lora_apply_backward));
}

}  // namespace moerge::cuda
