// moerge::lora_apply, lora_apply_, routed_lora and pack_experts on the CPU.
//
//   y_t = base_t + sum_k w_tk (B_e A_e x_t + bias_e)                           e = experts[t,k]
//   factored: y_t = base_t + (sum_k w_tk B_e)(sum_k w_tk A_e) x_t + sum_k w_tk bias_e
#include "lora.h"

#include "route.h"

namespace moerge::cpu {

LoraArgs::LoraArgs(const Check& check, const Tensor& x_in, int64_t out_features, bool wide, const Tensor& lora_a,
                   const Tensor& lora_b, const Tensor& weights_in, const Tensor& experts_in,
                   std::optional<Tensor> lora_bias_in, std::optional<Tensor> rows, bool factored,
                   std::optional<Tensor> packed)
    : check(check),
      x(x_in),
      weights(weights_in),
      experts(experts_in),
      a((check.that(lora_a.dim() == 3, "lora_a must be [E, R, D], got ", shape_of(lora_a)), lora_a), 1, 2),
      b((check.that(lora_b.dim() == 3, "lora_b must be [E, O, R], got ", shape_of(lora_b)), lora_b), 2, 1),
      lora_bias(lora_bias_in),
      factored(factored),
      wide(wide || is_double(x_in) || is_double(lora_a) || is_double(lora_b)) {
  check.that(x.dim() == 2, "x must be [T, D], got ", shape_of(x));
  T = x.size(0), D = x.size(1), O = out_features;
  using Named = std::pair<const Tensor*, const char*>;
  for (const auto& [tensor, name] : {Named{&x, "x"}, Named{&lora_a, "lora_a"}, Named{&lora_b, "lora_b"}}) {
    check.floating(*tensor, name);
    check.that(tensor->is_cpu(), name, " must be on the CPU like base");
  }
  check.shape(lora_a, "lora_a", {-1, -1, D}, text("[E, R, D=", D, "] to match x"));
  E = lora_a.size(0), R = lora_a.size(1);
  check.shape(lora_b, "lora_b", {E, O, R}, text("[E=", E, ", O=", O, ", R=", R, "] to match lora_a and base"));
  check.floating(weights, "weights");
  check.that(weights.dim() == 2, "weights must be [T, K] or [N, K], got ", shape_of(weights));
  N = weights.size(0), K = weights.size(1);
  check.shape(experts, "experts", {N, K}, text("[", N, ", K=", K, "] like weights"));
  check.dtype(experts, "experts", ScalarType::Int);
  check.that(N > 0 || T == 0, "weights must have at least one row for T=", T, " tokens, got ", shape_of(weights));
  if (lora_bias) {
    check.floating(*lora_bias, "lora_bias");
    check.shape(*lora_bias, "lora_bias", {E, O}, text("[E=", E, ", O=", O, "]"));
    lora_bias = rows_contiguous(*lora_bias);
  }
  if (packed) {
    const int64_t columns = R * D + R * O;
    check.shape(*packed, "packed", {E, columns}, text("[E=", E, ", R*D + R*O=", columns, "] from pack_experts"));
    check.floating(*packed, "packed");
    check.that(packed->is_contiguous(), "packed must be contiguous, as pack_experts returns it");
    a = Factors(*packed, 0, R, D);
    b = Factors(*packed, R * D, R, O);
  }
  row = row_map(check, rows, T, N, rows_storage);
  x = rows_contiguous(x);
  experts = dense(experts);
  for (int64_t i = 0; i < N * K; ++i)
    check.that(ids()[i] >= 0 && ids()[i] < E, "experts must hold ids in [0, E=", E, "), got ", ids()[i], " at [", i / K,
               ", ", i % K, "]");
}

template <class Acc>
Pairs<Acc>::Pairs(const LoraArgs& args, const Acc* weights, int64_t block, bool skip_zero) {
  const int64_t T = args.T, K = args.K, E = args.E;
  order.resize(T * K);
  std::vector<int64_t> start(E + 1);
  int64_t at = 0;
  for (int64_t begin = 0; begin < T; begin += block) {
    const int64_t end = std::min(T, begin + block);
    first.push_back(static_cast<int64_t>(groups.size()));
    std::fill(start.begin(), start.end(), 0);
    const auto each = [&](auto&& visit) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t k = 0, slot = args.row(t) * K; k < K; ++k, ++slot)
          if (!skip_zero || weights[slot] != 0) visit(args.ids()[slot], t * K + k);
    };
    each([&](int32_t e, int64_t) { ++start[e + 1]; });
    for (int64_t e = 0; e < E; ++e) {
      if (start[e + 1]) groups.push_back({begin / block, e, at + start[e], at + start[e] + start[e + 1]});
      start[e + 1] += start[e];
    }
    const int64_t total = start[E];
    each([&](int32_t e, int64_t pair) { order[at + start[e]++] = pair; });
    at += total;
  }
  first.push_back(static_cast<int64_t>(groups.size()));
}

template <class Acc>
void shrink(const LoraArgs& args, const Pairs<Acc>& pairs, const Matrix& x, const Factors& w, Acc* h) {
  struct Task {
    const Group* group;
    int64_t begin, end, rank_begin, rank_end;
  };
  std::vector<Task> tasks;
  // a decode step has few pairs: cut the ranks as well, so that every thread has work
  const int64_t ranks =
      args.T * args.K < 8 ? std::max<int64_t>(1, std::min<int64_t>(8, w.ranks)) : std::max<int64_t>(1, w.ranks);
  for (const Group& group : pairs.groups)
    for (int64_t begin = group.begin; begin < group.end; begin += kTaskPairs)
      for (int64_t r = 0; r < w.ranks; r += ranks)
        tasks.push_back({&group, begin, std::min(group.end, begin + kTaskPairs), r, std::min(w.ranks, r + ranks)});
  const int64_t pairs_per_task = std::min<int64_t>(kTaskPairs, ceil_div(args.T * args.K, args.E));
  parallel(static_cast<int64_t>(tasks.size()), pairs_per_task * ranks * w.columns, [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t count = task.end - task.begin, R = w.ranks;
    Acc* loaded = scratch<Acc>(0, x.dtype == (sizeof(Acc) == 8 ? DType::f64 : DType::f32) ? 0 : count * w.columns);
    Acc* buffer = scratch<Acc>(1, w.column_stride == 1 ? 0 : R * w.columns + R);
    const void** rows = scratch<const void*>(2, R);
    const Acc* token[kTaskPairs];
    Acc* out[kTaskPairs];
    for (int64_t p = 0; p < count; ++p) {
      const int64_t pair = pairs.order[task.begin + p];
      token[p] = row_as<Acc>(x, pair / args.K, w.columns, loaded + p * w.columns);
      out[p] = h + pair * R + task.rank_begin;
    }
    const DType dtype = expert_rows<Acc>(w, task.group->expert, 0, w.columns, buffer, rows);
    micro<Acc>(dtype).dot(count, task.rank_end - task.rank_begin, w.columns, token, rows + task.rank_begin, out);
  });
}

template <class Acc>
void combine(const LoraArgs& args, const Acc* weights, Acc* h) {
  const int64_t K = args.K, R = args.R;
  parallel(ceil_div(args.T, kBlock), std::min(args.T, kBlock) * K * R, [&](int64_t block) {
    std::vector<Acc> mean(args.factored ? R : 0);
    for (int64_t t = block * kBlock; t < std::min(args.T, (block + 1) * kBlock); ++t) {
      const Acc* w = weights + args.row(t) * K;
      Acc* slots = h + t * K * R;
      if (args.factored) {
        std::fill(mean.begin(), mean.end(), Acc(0));
        for (int64_t k = 0; k < K; ++k)
          for (int64_t r = 0; w[k] != 0 && r < R; ++r) mean[r] += w[k] * slots[k * R + r];
      }
      for (int64_t k = 0; k < K; ++k)
        for (int64_t r = 0; w[k] != 0 && r < R; ++r)
          slots[k * R + r] = w[k] * (args.factored ? mean[r] : slots[k * R + r]);
    }
  });
}

namespace {

// One expand task: the columns [c, c+count) of one block of tokens, accumulated in `sums` ([tokens, count]).
template <class Acc>
void expand_block(const LoraArgs& args, const Pairs<Acc>& pairs, const Acc* h, const Factors& w,
                  const std::optional<Tensor>& bias, const Acc* weights, int64_t block, int64_t c, int64_t count,
                  Acc* sums) {
  const int64_t R = w.ranks, K = args.K;
  Acc* buffer = scratch<Acc>(1, w.column_stride == 1 ? 0 : R * count + R);
  const void** rows = scratch<const void*>(2, R);
  Acc* bias_row = scratch<Acc>(3, bias ? count : 0);
  const Acc* hidden[kTaskPairs];
  const Acc* weight[kTaskPairs];
  Acc* out[kTaskPairs];
  for (int64_t g = pairs.first[block]; g < pairs.first[block + 1]; ++g) {
    const Group& group = pairs.groups[g];
    const DType dtype = expert_rows<Acc>(w, group.expert, c, count, buffer, rows);
    if (bias) {
      const Matrix values(*bias);
      micro<Acc>(values.dtype).load(count, values.at(group.expert, c), bias_row);
    }
    for (int64_t begin = group.begin, n; begin < group.end; begin += n) {
      // a token that names this expert twice ends the batch: axpy must not see one output row twice
      int64_t last = -1;
      for (n = 0; n < kTaskPairs && begin + n < group.end; ++n) {
        const int64_t pair = pairs.order[begin + n], t = pair / K;
        if (t == last) break;
        last = t;
        hidden[n] = h + pair * R;
        weight[n] = weights + args.row(t) * K + pair % K;
        out[n] = sums + (t - block * kBlock) * count;
      }
      micro<Acc>(dtype).axpy(n, R, count, hidden, rows, out);
      const void* line = bias_row;
      if (bias) micro<Acc>(sizeof(Acc) == 8 ? DType::f64 : DType::f32).axpy(n, 1, count, weight, &line, out);
    }
  }
}

}  // namespace

template <class Acc>
void expand(const LoraArgs& args, const Pairs<Acc>& pairs, const Acc* h, const Factors& w, const Matrix* base,
            const std::optional<Tensor>& bias, const Acc* weights, const Matrix& out) {
  const int64_t chunks = ceil_div(w.columns, kChunk), blocks = ceil_div(args.T, kBlock);
  const int64_t cost = std::min(args.T, kBlock) * std::min(w.columns, kChunk) * (1 + args.K * w.ranks);
  parallel(blocks * chunks, cost, [&](int64_t task) {
    const int64_t block = task / chunks, c = task % chunks * kChunk, count = std::min(kChunk, w.columns - c);
    const int64_t begin = block * kBlock, tokens = std::min(kBlock, args.T - begin);
    Acc* sums = scratch<Acc>(0, tokens * count);
    if (base) {
      for (int64_t t = 0; t < tokens; ++t)
        micro<Acc>(base->dtype).load(count, base->at(begin + t, c), sums + t * count);
    } else {
      std::fill(sums, sums + tokens * count, Acc(0));
    }
    expand_block<Acc>(args, pairs, h, w, bias, weights, block, c, count, sums);
    for (int64_t t = 0; t < tokens; ++t) micro<Acc>(out.dtype).store(count, sums + t * count, out.at(begin + t, c));
  });
}

template <class Acc>
void lora_forward(const LoraArgs& args, const Matrix& base, const Matrix& out) {
  const Tensor weights = as_accumulator(args.weights, args.wide);
  const Acc* w = static_cast<const Acc*>(weights.data_ptr());
  const Tensor hidden = new_tensor(args.x, {args.T, args.K, args.R}, scalar_type<Acc>);
  Acc* h = static_cast<Acc*>(hidden.data_ptr());
  const Pairs<Acc> pairs(args, w, kBlock, true);
  shrink<Acc>(args, pairs, Matrix(args.x), args.a, h);
  combine<Acc>(args, w, h);
  expand<Acc>(args, pairs, h, args.b, &base, args.lora_bias, w, out);
}

#define MOERGE_INSTANTIATE(Acc)                                                                            \
  template struct Pairs<Acc>;                                                                              \
  template void shrink<Acc>(const LoraArgs&, const Pairs<Acc>&, const Matrix&, const Factors&, Acc*);      \
  template void combine<Acc>(const LoraArgs&, const Acc*, Acc*);                                           \
  template void expand<Acc>(const LoraArgs&, const Pairs<Acc>&, const Acc*, const Factors&, const Matrix*, \
                            const std::optional<Tensor>&, const Acc*, const Matrix&);
MOERGE_INSTANTIATE(float)
MOERGE_INSTANTIATE(double)
#undef MOERGE_INSTANTIATE

namespace {

void check_base(const Check& check, const Tensor& base, const Tensor& x) {
  check.floating(base, "base");
  check.that(base.dim() == 2, "base must be [T, O], got ", shape_of(base));
  check.that(x.dim() != 2 || base.size(0) == x.size(0), "base must have T=", x.dim() ? x.size(0) : 0,
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

void forward_into(const LoraArgs& args, const Tensor& base, const Tensor& out) {
  if (args.T == 0 || args.O == 0) return;
  if (args.wide)
    lora_forward<double>(args, Matrix(base), Matrix(out));
  else
    lora_forward<float>(args, Matrix(base), Matrix(out));
}

Tensor lora_apply(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                  std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                  std::optional<Tensor> packed) {
  const Check check{"lora_apply"};
  check_base(check, base, x);
  const LoraArgs args(check, x, base.size(1), is_double(base), lora_a, lora_b, weights, experts, lora_bias, rows,
                      factored, packed);
  const Tensor out = new_tensor(base, {args.T, args.O}, base.scalar_type());
  forward_into(args, rows_contiguous(base), out);
  return out;
}

void lora_apply_(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor experts,
                 std::optional<Tensor> lora_bias, std::optional<Tensor> rows, bool factored,
                 std::optional<Tensor> packed) {
  const Check check{"lora_apply_"};
  check_base(check, base, x);
  const LoraArgs args(check, x, base.size(1), is_double(base), lora_a, lora_b, weights, experts, lora_bias, rows,
                      factored, packed);
  check.that(!overlaps_itself(base), "base must not overlap itself in memory, got strides [", base.stride(0), ", ",
             base.stride(1), "]");
  const Tensor target = rows_contiguous(base);
  forward_into(args, target, target);
  if (target.data_ptr() != base.data_ptr()) torch::stable::copy_(base, target);
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
  const RouteArgs route(check, x, gates, top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting);
  check.that(lora_a.dim() == 3 && lora_a.size(0) == route.E, "lora_a must be [E=", route.E,
             ", R, D] to match gates, got ", shape_of(lora_a));
  const bool wide = is_double(x);
  const Tensor weights = new_tensor(x, {route.T, top_k}, wide ? ScalarType::Double : ScalarType::Float);
  const Tensor experts = new_tensor(x, {route.T, top_k}, ScalarType::Int);
  int32_t* ids = static_cast<int32_t*>(experts.data_ptr());
  if (route.T && wide)
    route_forward<double>(route, static_cast<double*>(weights.data_ptr()), ids);
  else if (route.T)
    route_forward<float>(route, static_cast<float*>(weights.data_ptr()), ids);
  const LoraArgs args(check, x, base.size(1), is_double(base), lora_a, lora_b, weights, experts, lora_bias,
                      std::nullopt, factored, packed);
  const Tensor out = new_tensor(base, {args.T, args.O}, base.scalar_type());
  forward_into(args, rows_contiguous(base), out);
  return {out, weights, experts};
}

Tensor pack_experts(Tensor lora_a, Tensor lora_b) {
  const Check check{"pack_experts"};
  check.floating(lora_a, "lora_a");
  check.that(lora_a.dim() == 3, "lora_a must be [E, R, D], got ", shape_of(lora_a));
  const int64_t E = lora_a.size(0), R = lora_a.size(1), D = lora_a.size(2);
  check.shape(lora_b, "lora_b", {E, -1, R}, text("[E=", E, ", O, R=", R, "] to match lora_a"));
  check.dtype(lora_b, "lora_b", lora_a.scalar_type());
  const int64_t O = lora_b.size(1);
  Tensor packed = new_tensor(lora_a, {E, R * D + R * O}, lora_a.scalar_type());
  Tensor a = torch::stable::narrow(packed, 1, 0, R * D), b = torch::stable::narrow(packed, 1, R * D, R * O);
  torch::stable::copy_(a, torch::stable::reshape(lora_a, {E, R * D}));
  torch::stable::copy_(b, torch::stable::reshape(torch::stable::transpose(lora_b, 1, 2), {E, R * O}));
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) {
  m.impl("lora_apply", TORCH_BOX(&lora_apply));
  m.impl("lora_apply_", TORCH_BOX(&lora_apply_));
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
  m.impl("pack_experts", TORCH_BOX(&pack_experts));
}

}  // namespace moerge::cpu
