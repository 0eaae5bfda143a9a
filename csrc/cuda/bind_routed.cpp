// moerge::routed_lora, routed_lora_ and routed_linear. With few tokens router and branch (and the base layer) are one
// launch; else they are those of route and lora_apply, and routed_linear chooses where the base layer comes.
#include "../common/linear.h"
#include "bind_lora.h"

namespace moerge::cuda {

namespace {

// The router's and the bank's arguments of the routed ops.
struct Routing {
  const Tensor &x, &gates, &lora_a, &lora_b;
  const RouteOptions& options;
  const std::optional<Tensor>& lora_bias;
  bool factored;
  const std::optional<Tensor>& packed;
};

// The routing of one call: its results, and its workspace while the call lasts.
class Router {
 public:
  Router(const Check& check, const LoraPlan& plan, const Routing& r)
      : check_(check),
        plan_(plan),
        r_(r),
        route_plan_(check_route(check, r.x, r.gates, r.options)),
        call_(r.x),
        x_(readable_rows(r.x)) {
    check_same_bank(check, route_plan_, plan);
    route_ = route_arguments(route_plan_, call_, x_, r.gates, r.options);
    weights = new_tensor(r.x, {route_.T, route_.K}, accumulator(route_.wide));
    experts = new_tensor(r.x, {route_.T, route_.K}, ScalarType::Int);
  }

  Tensor weights, experts;

  Stream stream() const { return call_.stream(); }
  void run(Stream stream) { run_route(route_, call_, weights, experts, stream); }

  // Whether the branch reads what the router reads and writes as it lies. Where it has to be converted, torch does that
  // on the current stream, whichever the router runs on.
  bool feeds_branch() const { return plan_.wide == route_.wide; }

  // The branch's arguments, once the router has run.
  LoraArguments chosen(Call& call) const {
    return LoraArguments(check_, plan_, call, x_, r_.lora_a, r_.lora_b, weights, experts, r_.lora_bias, std::nullopt,
                         r_.factored, r_.packed);
  }

  const Route& route() const { return route_; }

  // The arguments of the one launch, with what `place` says of base and output (see Decode).
  template <class Place>
  Decode one_launch(const Place& place) {
    const LoraArguments args = chosen(call_);
    Decode p{};
    p.route = route_;
    p.route.weights = call_.write(weights);
    p.route.experts = static_cast<int32_t*>(call_.write(experts));
    p.a = args.a, p.b = args.b, p.lora_bias = args.bias, p.factored = r_.factored;
    const int64_t floats = plan_decode(p);
    set_workspace(p, static_cast<float*>(call_.workspace(floats * 4)));
    place(call_, p);
    return p;
  }

  // With at most so many tokens and arguments that fit: all of it in one launch. False: nothing is done.
  template <class Place>
  bool decode(int64_t most, const Place& place) {
    if (route_.T == 0 || route_.T > most) return false;
    if (!routed_decode(one_launch(place), call_.stream())) return false;
    call_.finish();
    return true;
  }

 private:
  const Check& check_;
  const LoraPlan& plan_;
  const Routing& r_;
  RoutePlan route_plan_;
  Call call_;
  Tensor x_;
  Route route_;
};

std::tuple<Tensor, Tensor, Tensor> routed_lora(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b,
                                               int64_t top_k, Word normalize, bool absolute,
                                               std::optional<double> scale, std::optional<Tensor> bias,
                                               std::optional<Tensor> rows, std::optional<Tensor> mask,
                                               std::optional<double> top_p, Word weighting,
                                               std::optional<Tensor> lora_bias, bool factored,
                                               std::optional<Tensor> packed) {
  const Check check{"routed_lora", kDevice};
  check_base(check, base, x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  const Routing routing{x, gates, lora_a, lora_b, options, lora_bias, factored, packed};
  Router router(check, plan, routing);
  const Tensor out = new_tensor(base, {plan.T, plan.O}, base.scalar_type());
  const bool done = router.decode(kDecodeTokens, [&](Call& call, Decode& decode) {
    const Tensor from = readable_rows(base);
    decode.base = matrix(from, call.read(from));
    decode.out = matrix(out, call.write(out));
  });
  if (!done) {
    router.run(router.stream());
    Call call(base);
    forward(router.chosen(call), call, base, out);
  }
  return {out, router.weights, router.experts};
}

void routed_lora_(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k, Word normalize,
                  bool absolute, std::optional<double> scale, std::optional<Tensor> bias, std::optional<Tensor> rows,
                  std::optional<Tensor> mask, std::optional<double> top_p, Word weighting,
                  std::optional<Tensor> lora_bias, bool factored, std::optional<Tensor> packed) {
  const Check check{"routed_lora_", kDevice};
  base = flattened(check, base, "base");
  x = flattened(check, x, "x");
  check_base(check, base, x);
  check_no_overlap(check, base);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  const Routing routing{x, gates, lora_a, lora_b, options, lora_bias, factored, packed};
  const Tensor target = readable_rows(base);
  Router router(check, plan, routing);
  const bool done = router.decode(kDecodeTokens, [&](Call& call, Decode& decode) {
    decode.base = decode.out = matrix(target, call.update(target));
  });
  if (!done) {
    router.run(router.stream());
    Call call(base);
    update(router.chosen(call), call, target);
  }
  if (target.data_ptr() != base.data_ptr()) torch::stable::copy_(base, target);
}

Tensor routed_lora_ways(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                        Word normalize, bool absolute, std::optional<double> scale, std::optional<Tensor> bias,
                        std::optional<Tensor> rows, std::optional<Tensor> mask, std::optional<double> top_p,
                        Word weighting, std::optional<Tensor> lora_bias, bool factored, std::optional<Tensor> packed) {
  const Check check{"routed_lora_ways", kDevice};
  check_base(check, base, x);
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, packed);
  const Routing routing{x, gates, lora_a, lora_b, options, lora_bias, factored, packed};
  Router router(check, plan, routing);
  if (plan.T == 0) return bytes_of("nothing to do: no tokens\n");
  const Tensor from = readable_rows(base), out = new_tensor(base, {plan.T, plan.O}, base.scalar_type());
  Call call(base);
  const Matrix base_rows = matrix(from, call.read(from)), out_rows = matrix(out, call.write(out));
  const Reason split =
      against_decode(router.one_launch([&](Call&, Decode& decode) { decode.base = base_rows, decode.out = out_rows; }));
  if (!split) return bytes_of("one launch for router and branch\n");
  const LoraArguments args = router.chosen(call);
  std::string said = std::string("several launches: ") + split + "\n";
  const auto kernel = [&](const char* name, Reason reason) {
    said += std::string(name) + (reason ? std::string(": no tensor cores: ") + reason : ": tensor cores") + "\n";
  };
  kernel("scores", scores_against_tensor_cores(router.route()));
  kernel("shrink", shrink_against_tensor_cores(args.lora, args.x, args.a));
  kernel("expand", expand_against_tensor_cores(args.lora, args.b, base_rows, out_rows));
  return bytes_of(said);
}

// The base layer of routed_linear: x [T,D] weight^T + bias.
struct Linear {
  const Tensor &x, &weight;
  const std::optional<Tensor>& bias;
};

// y <- the base layer and the branch of many tokens, in the order that costs least.
//
// Very many: the branch (with the base layer's bias in place of a base) comes first, and the base layer's product is
// added to it by the beta = 1 of its own GEMM, which reads y while it computes. y is then rounded twice.
// Else the base layer comes first. While a graph is recorded, it runs beside all of the branch but the expand itself,
// which leaves most of the device idle; launched one by one, the calls that fork and join would cost more than that
// saves.
void many_tokens(Router& router, const Linear& linear, const Tensor& y) {
  const Stream stream = router.stream();
  Call call(y);  // like the router's, until the streams have joined
  if (y.size(0) >= kBranchFirstTokens) {
    router.run(stream);
    const LoraArguments args = router.chosen(call);
    const Matrix base = linear.bias ? Matrix{call.read(dense(*linear.bias)), dtype_of(y), 0} : Matrix{};
    run_forward(args, call, base, matrix(y, call.write(y)));
    add_product(y, linear.x, torch::stable::transpose(linear.weight, 0, 1));
    return;
  }
  const bool forks = router.feeds_branch() && recording(stream);
  const Stream beside = forks ? fork(stream) : stream;
  router.run(beside);
  const LoraArguments args = router.chosen(call);
  Branch branch{args, call, dtype_of(y)};
  branch.shrink(beside);
  linear_into(y, linear.x, linear.weight, linear.bias);
  if (forks) join(stream, beside);
  const Matrix rows = matrix(y, call.update(y));
  branch.expand(rows, rows, stream);
}

std::tuple<Tensor, Tensor, Tensor> routed_linear(Tensor x, Tensor weight, std::optional<Tensor> linear_bias,
                                                 Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                                                 Word normalize, bool absolute, std::optional<double> scale,
                                                 std::optional<Tensor> bias, std::optional<Tensor> rows,
                                                 std::optional<Tensor> mask, std::optional<double> top_p,
                                                 Word weighting, std::optional<Tensor> lora_bias, bool factored,
                                                 std::optional<Tensor> packed) {
  const Check check{"routed_linear", kDevice};
  const Tensor tokens = flattened(check, x, "x");
  check_linear(check, tokens, weight, linear_bias);
  const Tensor out = torch::stable::new_empty(x, with_columns(x, weight.size(0)), x.scalar_type());
  const Tensor y = flattened(check, out, "y");
  const RouteOptions options{top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting};
  const LoraPlan plan = check_bank(check, tokens, y.size(1), false, lora_a, lora_b, lora_bias, packed);
  const Routing routing{tokens, gates, lora_a, lora_b, options, lora_bias, factored, packed};
  Router router(check, plan, routing);
  const bool done = router.decode(kDecodeLinearTokens, [&](Call& call, Decode& decode) {
    const Tensor w = readable_rows(weight);
    decode.weight = matrix(w, call.read(w));
    if (linear_bias) decode.linear_bias = call.read(dense(*linear_bias));
    decode.out = matrix(y, call.write(y));
  });
  if (!done && y.numel() > 0)
    many_tokens(router, {tokens, weight, linear_bias}, y);
  else if (!done)
    router.run(router.stream());
  return {out, router.weights, router.experts};
}

Tensor routed_linear_y(Tensor x, Tensor weight, std::optional<Tensor> linear_bias, Tensor gates, Tensor lora_a,
                       Tensor lora_b, int64_t top_k, Word normalize, bool absolute, std::optional<double> scale,
                       std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> mask,
                       std::optional<double> top_p, Word weighting, std::optional<Tensor> lora_bias, bool factored,
                       std::optional<Tensor> packed) {
  return std::get<0>(routed_linear(x, weight, linear_bias, gates, lora_a, lora_b, top_k, normalize, absolute, scale,
                                   bias, rows, mask, top_p, weighting, lora_bias, factored, packed));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, MOERGE_DISPATCH_KEY, m) {
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
  m.impl("routed_lora_", TORCH_BOX(&routed_lora_));
  m.impl("routed_lora_ways", TORCH_BOX(&routed_lora_ways));
  m.impl("routed_linear", TORCH_BOX(&routed_linear));
  m.impl("routed_linear_y", TORCH_BOX(&routed_linear_y));
}

}  // namespace moerge::cuda
