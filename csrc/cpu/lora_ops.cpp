// moerge::lora_apply, lora_apply_, routed_lora, routed_lora_ and routed_linear on the CPU.
//
//   y_t = base_t + sum_k w_tk (B_e A_e x_t + bias_e)                           e = experts[t,k]
//   factored: y_t = base_t + (sum_k w_tk B_e)(sum_k w_tk A_e) x_t + sum_k w_tk bias_e
//
// One parallel region per call: the base layer of few tokens and route (if asked), sort the pairs, shrink, combine (if
// needed), expand.
#include "linear.h"
#include "lora.h"
#include "lora_few.h"
#include "route.h"

namespace moerge::cpu {

namespace {

// The branch as phases of a team, from [first] on, with what they share.
template <class Acc>
struct Branch {
  static constexpr int kPhases = 4;
  const LoraArgs& args;
  const Acc* weights;
  Pairs pairs;
  Shrink<Acc> shrink;
  Expand<Acc> expand;
  std::optional<FewExperts> few;

  // base is read and out written; they may be one
  Branch(const LoraArgs& args, const Acc* weights, const Matrix& base, const Matrix& out, Workspace& workspace)
      : args(args),
        weights(weights),
        shrink{args, pairs, Matrix(args.x), args.a, nullptr, nullptr},
        expand{args, pairs, nullptr, args.b, &base, args.lora_bias, weights, out} {
    if (args.a.tall() && args.T * args.K <= kFewPairs) shrink.parts = std::max<int64_t>(1, ceil_div(args.D, kDepth));
    if (shrink.parts == 1 && !args.factored) shrink.weights = weights;
    shrink.by_tiles = expand.by_tiles = std::is_same_v<Acc, float> && shrink.weights && args.by_tiles(base, out);
    if constexpr (std::is_same_v<Acc, float>)
      if (shrink.by_tiles && FewExperts::takes(args, out)) few.emplace(args, weights, base, out, workspace);
    shrink.h = workspace.get<Acc>(shrink.parts * args.T * args.K * args.R);
    expand.h = shrink.h;
  }

  int64_t cost() const { return args.T * args.K * args.R * (args.D + args.O); }

  void run(Team& team, int first) {
    if (few) {
      few->prepare(team, first + 2);
      if (team.failed()) return;
      if (few->finite()) return team.run(first, few->count(), *few);
    }
    run_sorted(team, first);
  }

  // The router of the same tokens before it, block by block where both can: x is then at hand for the branch.
  void run_after(const RouteForward<Acc>& router, Team& team) {
    constexpr int first = RouteForward<Acc>::kPhases;
    if (!few || !router.in_blocks()) {
      router.run(team);
      if (!team.failed()) run(team, first);
      return;
    }
    router.prepare(team);
    few->prepare(team, first + 2);
    if (team.failed()) return;
    const bool at_once = few->finite();
    team.run(1, few->count(), [&](int64_t block) {
      router.tile_block(block);
      if (at_once) (*few)(block);
    });
    if (!at_once && !team.failed()) run_sorted(team, first);
  }

  void run_sorted(Team& team, int first) {
    team.run(first, 1, [&](int64_t) { pairs.sort<Acc>(args, weights, true); });
    if (team.failed()) return;
    team.run(first + 1, shrink.count(), shrink);
    if (!shrink.weights)
      team.run(first + 2, ceil_div(args.T, kBlock),
               [&](int64_t block) { combine<Acc>(args, weights, shrink.parts, block, shrink.h); });
    team.run(first + 3, expand.count(), expand);
  }
};

template <class Acc>
void apply(const LoraArgs& args, const Tensor& weights, const Tensor& base, const Tensor& out) {
  Workspace workspace;
  const Tensor values = dense(weights, accumulator(args.wide));
  const Matrix from(base), to(out);
  Branch<Acc> branch(args, static_cast<const Acc*>(values.data_ptr()), from, to, workspace);
  Team::work(branch.cost(), [&](Team& team) { branch.run(team, 0); });
}

// Writes through a contiguous copy when the rows of `base` are not.
template <class F>
void in_place(const Check& check, const Tensor& base, const F& write) {
  check_no_overlap(check, base);
  const Tensor target = rows_contiguous(base);
  write(target);
  if (target.data_ptr() == base.data_ptr()) return;
  Tensor destination = base;
  torch::stable::copy_(destination, target);
}

void lora(const LoraArgs& args, const Tensor& weights, const Tensor& base, const Tensor& out) {
  if (args.T == 0 || args.O == 0) return;
  if (args.wide)
    apply<double>(args, weights, base, out);
  else
    apply<float>(args, weights, base, out);
}

Tensor lora_apply(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                  std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                  std::optional<Tensor> packed) {
  const Check check{"lora_apply", Device::cpu};
  check_base(check, base, x);
  LoraArgs args(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, factored, packed);
  args.set_slots(weights, experts, rows);
  const Tensor out = new_tensor(base, {args.T, args.O}, base.scalar_type());
  lora(args, weights, rows_contiguous(base), out);
  return out;
}

void lora_apply_(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                 std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                 std::optional<Tensor> packed) {
  const Check check{"lora_apply_", Device::cpu};
  check_base(check, base, x);
  LoraArgs args(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, factored, packed);
  args.set_slots(weights, experts, rows);
  in_place(check, base, [&](const Tensor& target) { lora(args, weights, target, target); });
}

// The router and the branch in one parallel region, with the base layer before them if `linear` is given. The router
// may accumulate in float beside a branch in double: then there are two.
template <class RouteAcc, class Acc>
void route_and_apply(const RouteArgs& route, LoraArgs& args, RouteAcc* weights, int32_t* experts, const Tensor& base,
                     const Tensor& out, Workspace& workspace, const FewLinear* linear) {
  args.set_slots(route.top_k, experts);
  const RouteForward<RouteAcc> router(route, workspace, weights, experts);
  const Matrix from(base), to(out);
  if constexpr (std::is_same_v<RouteAcc, Acc>) {
    Branch<Acc> branch(args, weights, from, to, workspace);
    constexpr int first = RouteForward<RouteAcc>::kPhases + Branch<Acc>::kPhases;
    Team::work(router.cost() + branch.cost() + (linear ? linear->cost() : 0), [&](Team& team) {
      if (linear) team.run(first, linear->count(), *linear);
      if (!team.failed()) branch.run_after(router, team);
    });
  } else {
    Acc* wide = workspace.get<Acc>(args.T * args.K);
    Team::work(router.cost(), [&](Team& team) { router.run(team); });
    std::copy(weights, weights + args.T * args.K, wide);
    Branch<Acc> branch(args, wide, from, to, workspace);
    Team::work(branch.cost(), [&](Team& team) { branch.run(team, 0); });
  }
}

// weights [T,K] of the router's type and experts [T,K]: where to put what it chooses, or null. `linear` is for
// accumulation in float.
void routed(const RouteArgs& route, LoraArgs& args, void* weights, int32_t* experts, const Tensor& base,
            const Tensor& out, Workspace& workspace, const FewLinear* linear = nullptr) {
  check_same_bank(args.check, route, args);
  if (args.T == 0) return;
  const int64_t slots = args.T * route.top_k;
  if (!weights) weights = workspace.get<char>(slots * (route.wide ? 8 : 4)), experts = workspace.get<int32_t>(slots);
  if (route.wide)
    route_and_apply<double, double>(route, args, static_cast<double*>(weights), experts, base, out, workspace, nullptr);
  else if (args.wide)
    route_and_apply<float, double>(route, args, static_cast<float*>(weights), experts, base, out, workspace, nullptr);
  else
    route_and_apply<float, float>(route, args, static_cast<float*>(weights), experts, base, out, workspace, linear);
}

std::tuple<Tensor, Tensor, Tensor> routed_lora(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b,
                                               int64_t top_k, Word normalize, bool absolute,
                                               std::optional<double> scale, std::optional<Tensor> bias,
                                               std::optional<Tensor> rows, std::optional<Tensor> mask,
                                               std::optional<double> top_p, Word weighting,
                                               std::optional<Tensor> lora_bias, bool factored,
                                               std::optional<Tensor> packed) {
  const Check check{"routed_lora", Device::cpu};
  check_base(check, base, x);
  const RouteOptions options{
      top_k, std::move(normalize), absolute, scale, std::move(bias), std::move(rows), std::move(mask),
      top_p, std::move(weighting)};
  const RouteArgs route(check, x, gates, options);
  LoraArgs args(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, factored, packed);
  const Tensor weights = new_tensor(x, {args.T, top_k}, accumulator(route.wide));
  const Tensor experts = new_tensor(x, {args.T, top_k}, ScalarType::Int);
  const Tensor out = new_tensor(base, {args.T, args.O}, base.scalar_type());
  Workspace workspace;
  routed(route, args, weights.data_ptr(), static_cast<int32_t*>(experts.data_ptr()), rows_contiguous(base), out,
         workspace);
  return {out, weights, experts};
}

void routed_lora_(Tensor base, Tensor x, Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k, Word normalize,
                  bool absolute, std::optional<double> scale, std::optional<Tensor> bias, std::optional<Tensor> rows,
                  std::optional<Tensor> mask, std::optional<double> top_p, Word weighting,
                  std::optional<Tensor> lora_bias, bool factored, std::optional<Tensor> packed) {
  const Check check{"routed_lora_", Device::cpu};
  base = flattened(check, base, "base");
  x = flattened(check, x, "x");
  check_base(check, base, x);
  const RouteOptions options{
      top_k, std::move(normalize), absolute, scale, std::move(bias), std::move(rows), std::move(mask),
      top_p, std::move(weighting)};
  const RouteArgs route(check, x, gates, options);
  LoraArgs args(check, x, base.size(1), is_double(base), lora_a, lora_b, lora_bias, factored, packed);
  Workspace workspace;
  in_place(check, base,
           [&](const Tensor& target) { routed(route, args, nullptr, nullptr, target, target, workspace); });
}

// What routed_linear is given beside x and the router's options.
struct Layer {
  const Tensor& weight;
  const std::optional<Tensor>& linear_bias;
  const Tensor &gates, &lora_a, &lora_b;
  const std::optional<Tensor>& lora_bias;
  bool factored;
  const std::optional<Tensor>& packed;
};

// weights and experts [T,K], where they are asked for.
struct Chosen {
  std::optional<Tensor> weights, experts;
};

// The base layer of many tokens is torch's; the branch is added to it in place.
Tensor layer_with_branch(const Tensor& x, const Layer& layer, const RouteOptions& options, Chosen* chosen) {
  const Check check{"routed_linear", Device::cpu};
  const Tensor tokens = flattened(check, x, "x");
  check_linear(check, tokens, layer.weight, layer.linear_bias);
  const RouteArgs route(check, tokens, layer.gates, options);
  LoraArgs args(check, tokens, layer.weight.size(0), false, layer.lora_a, layer.lora_b, layer.lora_bias, layer.factored,
                layer.packed);
  if (chosen) {
    chosen->weights = new_tensor(x, {args.T, route.top_k}, accumulator(route.wide));
    chosen->experts = new_tensor(x, {args.T, route.top_k}, ScalarType::Int);
  }
  const Tensor out = torch::stable::new_empty(x, with_columns(x, args.O), x.scalar_type());
  const Tensor y = flattened(check, out, "y");
  Workspace workspace;
  std::optional<FewLinear> few;
  if (!route.wide && !args.wide && FewLinear::takes(args.x, layer.weight))
    few.emplace(args.x, layer.weight, layer.linear_bias, y, workspace);
  else
    linear_into(y, args.x, layer.weight, layer.linear_bias);
  routed(route, args, chosen ? chosen->weights->data_ptr() : nullptr,
         chosen ? static_cast<int32_t*>(chosen->experts->data_ptr()) : nullptr, y, y, workspace, few ? &*few : nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> routed_linear(Tensor x, Tensor weight, std::optional<Tensor> linear_bias,
                                                 Tensor gates, Tensor lora_a, Tensor lora_b, int64_t top_k,
                                                 Word normalize, bool absolute, std::optional<double> scale,
                                                 std::optional<Tensor> bias, std::optional<Tensor> rows,
                                                 std::optional<Tensor> mask, std::optional<double> top_p,
                                                 Word weighting, std::optional<Tensor> lora_bias, bool factored,
                                                 std::optional<Tensor> packed) {
  Chosen chosen;
  const Tensor y = layer_with_branch(x, {weight, linear_bias, gates, lora_a, lora_b, lora_bias, factored, packed},
                                     {top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting}, &chosen);
  return {y, *chosen.weights, *chosen.experts};
}

Tensor routed_linear_y(Tensor x, Tensor weight, std::optional<Tensor> linear_bias, Tensor gates, Tensor lora_a,
                       Tensor lora_b, int64_t top_k, Word normalize, bool absolute, std::optional<double> scale,
                       std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> mask,
                       std::optional<double> top_p, Word weighting, std::optional<Tensor> lora_bias, bool factored,
                       std::optional<Tensor> packed) {
  return layer_with_branch(x, {weight, linear_bias, gates, lora_a, lora_b, lora_bias, factored, packed},
                           {top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting}, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) {
  m.impl("lora_apply", TORCH_BOX(&lora_apply));
  m.impl("lora_apply_", TORCH_BOX(&lora_apply_));
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
  m.impl("routed_lora_", TORCH_BOX(&routed_lora_));
  m.impl("routed_linear", TORCH_BOX(&routed_linear));
  m.impl("routed_linear_y", TORCH_BOX(&routed_linear_y));
}

}  // namespace moerge::cpu
