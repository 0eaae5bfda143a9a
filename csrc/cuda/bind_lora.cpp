// moerge::lora_apply, lora_apply_, routed_lora, routed_lora_, routed_linear, pack_experts and the gradient of lora_apply.
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

// Checked arguments of lora_apply.
struct LoraArguments {
  Lora lora{};
  Factors a, b;  // [E,R,D] and, transposed, [E,R,O]
  Tensor x;
  Matrix x_rows, bias;  // bias.data null: none
  int64_t D, O, N;

  LoraArguments(const Check& check, Call& call, const Tensor& x_in, int64_t out_features, bool wide,
                const Tensor& lora_a, const Tensor& lora_b, const Tensor& weights, const Tensor& experts,
                const std::optional<Tensor>& lora_bias, const std::optional<Tensor>& rows, bool factored,
                const std::optional<Tensor>& packed)
      : x(x_in), O(out_features) {
    check_shapes(check, x_in, lora_a, lora_b, weights, experts);
    lora.factored = factored;
    lora.wide = wide || is_double(x) || is_double(lora_a) || is_double(lora_b);
    if (lora_bias) {
      MOERGE_CHECK(check, on_device(*lora_bias), "lora_bias must be on ", kDevice);
      check.floating(*lora_bias, "lora_bias");
      check.shape(*lora_bias, "lora_bias", {lora.E, O}, "[E=", lora.E, ", O=", O, "]");
      const Tensor values = readable_rows(*lora_bias);
      bias = matrix(values, call.read(values));
    }
    if (packed) {
      const int64_t R = lora.R, columns = R * D + R * O;
      MOERGE_CHECK(check, on_device(*packed), "packed must be on ", kDevice);
      check.shape(*packed, "packed", {lora.E, columns}, "[E=", lora.E, ", R*D + R*O=", columns, "] from pack_experts");
      check.floating(*packed, "packed");
      MOERGE_CHECK(check, packed->is_contiguous(), "packed must be contiguous, as pack_experts returns it");
      char* data = static_cast<char*>(call.read(*packed));
      const DType type = dtype_of(*packed);
      a = {data, type, columns, 1, R, R, D};
      b = {data + R * D * packed->element_size(), type, columns, O, 1, R, O};
    } else {
      a = factors(call, lora_a, 1, 2);
      b = factors(call, lora_b, 2, 1);
    }
    lora.row = row_map(check, call, rows, lora.T, N);
    x = readable_rows(x);
    x_rows = matrix(x, call.read(x));
    lora.weights = call.read(dense(weights, accumulator(lora.wide)));
    lora.experts = static_cast<const int32_t*>(call.read(dense(experts)));
  }

 private:
  void check_shapes(const Check& check, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                    const Tensor& weights, const Tensor& experts) {
    MOERGE_CHECK(check, lora_a.dim() == 3, "lora_a must be [E, R, D], got ", shape_of(lora_a));
    MOERGE_CHECK(check, lora_b.dim() == 3, "lora_b must be [E, O, R], got ", shape_of(lora_b));
    MOERGE_CHECK(check, x.dim() == 2, "x must be [T, D], got ", shape_of(x));
    lora.T = x.size(0), D = x.size(1);
    using Named = std::pair<const Tensor*, const char*>;
    for (const auto& [tensor, name] :
         {Named{&x, "x"}, Named{&lora_a, "lora_a"}, Named{&lora_b, "lora_b"}, Named{&weights, "weights"}}) {
      check.floating(*tensor, name);
      MOERGE_CHECK(check, on_device(*tensor), name, " must be on ", kDevice, " like base");
    }
    MOERGE_CHECK(check, on_device(experts), "experts must be on ", kDevice, " like base");
    check.shape(lora_a, "lora_a", {-1, -1, D}, "[E, R, D=", D, "] to match x");
    lora.E = lora_a.size(0), lora.R = lora_a.size(1);
    check.shape(lora_b, "lora_b", {lora.E, O, lora.R}, "[E=", lora.E, ", O=", O, ", R=", lora.R,
                "] to match lora_a and base");
    MOERGE_CHECK(check, weights.dim() == 2, "weights must be [T, K] or [N, K], got ", shape_of(weights));
    N = weights.size(0), lora.K = weights.size(1);
    check.shape(experts, "experts", {N, lora.K}, "[", N, ", K=", lora.K, "] like weights");
    check.dtype(experts, "experts", ScalarType::Int);
    MOERGE_CHECK(check, N > 0 || lora.T == 0, "weights must have at least one row for T=", lora.T, " tokens, got ",
                 shape_of(weights));
    MOERGE_CHECK(check, lora.T * lora.K < (int64_t(1) << 31), "T x K must be below 2^31, got ", lora.T, " x ", lora.K);
  }
};

void check_base(const Check& check, const Tensor& base, const Tensor& x) {
  MOERGE_CHECK(check, on_device(base), "base must be on ", kDevice);
  check.floating(base, "base");
  MOERGE_CHECK(check, base.dim() == 2, "base must be [T, O], got ", shape_of(base));
  MOERGE_CHECK(check, x.dim() != 2 || base.size(0) == x.size(0), "base must have T=", x.dim() ? x.size(0) : 0,
               " rows to match x, got ", shape_of(base));
}

// Whether elements may share memory, as in an expanded tensor: then writing into it has no meaning.
bool overlaps_itself(const Tensor& matrix) {
  const int near = matrix.stride(1) <= matrix.stride(0) ? 1 : 0;
  int64_t reach = 0;
  for (int axis : {near, 1 - near}) {
    if (matrix.size(axis) <= 1) continue;
    if (matrix.stride(axis) <= reach) return true;
    reach += matrix.stride(axis) * (matrix.size(axis) - 1);
  }
  return false;
}

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
  const void* h = Shrink{args.lora, call, {}}(args.x_rows, args.a, true);
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
  MOERGE_CHECK(check, !overlaps_itself(base), "base must not overlap itself in memory, got strides [", base.stride(0),
               ", ", base.stride(1), "]");
  if (base.numel() == 0) return;
  const Tensor target = readable_rows(base);
  const Matrix rows_of = matrix(target, call.update(target));
  run_forward(args, call, rows_of, rows_of);
  if (target.data_ptr() != base.data_ptr()) torch::stable::copy_(base, target);
}

Tensor lora_apply(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                  std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                  std::optional<Tensor> packed) {
  const Check check{"lora_apply"};
  check_base(check, base, x);
  Call call(base);
  const LoraArguments args(check, call, x, base.size(1), is_double(base), lora_a, lora_b, weights, experts, lora_bias,
                           rows, factored, packed);
  return forward(args, call, base);
}

void lora_apply_(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                 std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                 std::optional<Tensor> packed) {
  const Check check{"lora_apply_"};
  check_base(check, base, x);
  Call call(base);
  const LoraArguments args(check, call, x, base.size(1), is_double(base), lora_a, lora_b, weights, experts, lora_bias,
                           rows, factored, packed);
  update(check, args, call, base);
}

struct Routed {
  Tensor weights, experts;
};

// Routes, checking first that gates and factors are of one bank.
Routed routed(const Check& check, const Tensor& base, const Tensor& x, const Tensor& gates, const Tensor& lora_a,
              const Tensor& lora_b, const RouteOptions& options) {
  Call call(base);
  const Route route = route_arguments(check, call, x, gates, options);
  MOERGE_CHECK(check, lora_a.dim() == 3 && lora_a.size(0) == route.E, "lora_a must be [E=", route.E,
               ", R, D] to match gates, got ", shape_of(lora_a));
  check.shape(lora_b, "lora_b", {route.E, base.size(1), lora_a.size(1)}, "[E=", route.E, ", O=", base.size(1),
              ", R=", lora_a.size(1), "] to match lora_a and base");
  const auto [weights, experts] = run_route(route, call, x);
  return {weights, experts};
}

std::tuple<Tensor, Tensor, Tensor> routed_lora(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b,
                                               int64_t top_k, std::string normalize, bool absolute,
                                               std::optional<double> scale, std::optional<Tensor> bias,
                                               std::optional<Tensor> rows, std::optional<Tensor> mask,
                                               std::optional<double> top_p, std::string weighting,
                                               std::optional<Tensor> lora_bias, bool factored,
                                               std::optional<Tensor> packed) {
  const Check check{"routed_lora"};
  check_base(check, base, x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const auto [weights, experts] = routed(check, base, x, gates, lora_a, lora_b, options);
  Call call(base);
  const LoraArguments args(check, call, x, base.size(1), is_double(base), lora_a, lora_b, weights, experts, lora_bias,
                           std::nullopt, factored, packed);
  return {forward(args, call, base), weights, experts};
}

void routed_lora_(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                  std::string normalize, bool absolute, std::optional<double> scale, std::optional<Tensor> bias,
                  std::optional<Tensor> rows, std::optional<Tensor> mask, std::optional<double> top_p,
                  std::string weighting, std::optional<Tensor> lora_bias, bool factored, std::optional<Tensor> packed) {
  const Check check{"routed_lora_"};
  base = flattened(check, base, "base");
  x = flattened(check, x, "x");
  check_base(check, base, x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const auto [weights, experts] = routed(check, base, x, gates, lora_a, lora_b, options);
  Call call(base);
  const LoraArguments args(check, call, x, base.size(1), is_double(base), lora_a, lora_b, weights, experts, lora_bias,
                           std::nullopt, factored, packed);
  update(check, args, call, base);
}

std::tuple<Tensor, Tensor, Tensor> routed_linear(Tensor x, Tensor weight, std::optional<Tensor> linear_bias,
                                                 Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                                                 std::string normalize, bool absolute, std::optional<double> scale,
                                                 std::optional<Tensor> bias, std::optional<Tensor> rows,
                                                 std::optional<Tensor> mask, std::optional<double> top_p,
                                                 std::string weighting, std::optional<Tensor> lora_bias, bool factored,
                                                 std::optional<Tensor> packed) {
  const Check check{"routed_linear"};
  MOERGE_CHECK(check, on_device(x) && on_device(weight) && (!linear_bias || on_device(*linear_bias)),
               "x, weight and linear_bias must be on ", kDevice);
  const Tensor tokens = flattened(check, x, "x");
  check_linear(check, tokens, weight, linear_bias);
  const Tensor out = torch::stable::new_empty(x, with_columns(x, weight.size(0)), x.scalar_type());
  const Tensor y = flattened(check, out, "y");
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const auto [weights, experts] = routed(check, y, tokens, gates, lora_a, lora_b, options);
  Call call(y);
  const LoraArguments args(check, call, tokens, y.size(1), false, lora_a, lora_b, weights, experts, lora_bias,
                           std::nullopt, factored, packed);
  linear_into(y, tokens, weight, linear_bias);
  update(check, args, call, y);
  return {out, weights, experts};
}

Tensor pack_experts(Tensor lora_a, Tensor lora_b) {
  const Check check{"pack_experts"};
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
  void* h = g.to_b || g.to_weights ? shrink(args.x_rows, args.a, skip_zero) : nullptr;
  void* q = g.to_x || g.to_a || g.to_weights ? shrink(dy, args.b, skip_zero) : nullptr;
  if (g.to_weights)
    lora_weight_gradient(p, h, q, dy, args.O, args.bias, call.workspace(p.T * p.K * accumulator_size(p.wide)),
                         g.to_weights, dtype_of(g.weights), stream);
  if (g.to_x) lora_expand(p, q, args.a, {}, {}, matrix(g.x, g.to_x), stream);
  if (!g.to_a && !g.to_b && !g.to_bias) return;
  const Groups& groups = shrink.groups(true);
  if (g.to_a) lora_outer(p, groups, q, p.R, args.x_rows, args.D, g.to_a, dtype_of(g.a), stream);
  if (g.to_b) lora_outer(p, groups, h, p.R, dy, args.O, g.to_b, dtype_of(g.b), stream);
  if (g.to_bias) lora_outer(p, groups, nullptr, 1, dy, args.O, g.to_bias, dtype_of(g.bias), stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_apply_backward(Tensor grad_y, Tensor x, Tensor lora_a,
                                                                       Tensor lora_b, Tensor weights, Tensor experts,
                                                                       int64_t needs, std::optional<Tensor> lora_bias,
                                                                       std::optional<Tensor> rows, bool factored) {
  const Check check{"lora_apply_backward"};
  MOERGE_CHECK(check, on_device(grad_y), "grad_y must be on ", kDevice);
  check.floating(grad_y, "grad_y");
  MOERGE_CHECK(check, grad_y.dim() == 2 && x.dim() == 2 && grad_y.size(0) == x.size(0),
               "grad_y must be [T, O] with the T of x ", shape_of(x), ", got ", shape_of(grad_y));
  Call call(grad_y);
  const LoraArguments args(check, call, x, grad_y.size(1), is_double(grad_y), lora_a, lora_b, weights, experts,
                           lora_bias, rows, factored, std::nullopt);
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
  m.impl("pack_experts", TORCH_BOX(&pack_experts));
  m.impl("lora_apply_backward", TORCH_BOX(&lora_apply_backward));
}

}  // namespace moerge::cuda
