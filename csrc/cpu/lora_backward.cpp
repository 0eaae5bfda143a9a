// Gradient of lora_apply, by the loops of lora.h. With q = B^T dy and h = A x per pair, and
//   output:   Q = w q,            H = w h,            dw = q . h + dy . bias
//   factored: Q = w sum_j w_j q_j, H = w sum_j w_j h_j, dw = q . sum_j w_j h_j + h . sum_j w_j q_j + dy . bias
// the results are dx = A^T Q, dA = sum Q x^T, dB^T = sum H dy^T, dbias = sum w dy.
#include <algorithm>

#include "lora.h"

namespace moerge::cpu {

namespace {

constexpr int64_t kOuterPairs = 64;  // pairs per axpy of `outer`: the reduction runs over them

template <class Acc>
void shrink(const LoraArgs& args, const Pairs& pairs, const Matrix& x, const Factors& w, Acc* h) {
  const Shrink<Acc> shrink{args, pairs, x, w, nullptr, h};
  parallel(shrink.count(), shrink.cost(), shrink);
}

template <class Acc>
void weigh(const LoraArgs& args, const Acc* weights, Acc* h) {
  parallel(ceil_div(args.T, kBlock), std::min(args.T, kBlock) * args.K * args.R,
           [&](int64_t block) { combine<Acc>(args, weights, 1, block, h); });
}

// g[e,r,c] = sum over the pairs of e, in order, of q[pair,r] * x[token,c]; out is [E,R,C] contiguous.
template <class Acc>
void outer(const LoraArgs& args, const Pairs& pairs, const Acc* q, int64_t R, const Matrix& x, int64_t columns,
           const Tensor& out) {
  const int64_t chunks = ceil_div(columns, kChunk);
  const DType dtype = dtype_of(out);
  parallel(args.E * chunks, ceil_div(args.T * args.K, args.E) * R * std::min(columns, kChunk), [&](int64_t task) {
    const int64_t e = task / chunks, c = task % chunks * kChunk, count = std::min(kChunk, columns - c);
    Acc* sums = scratch<Acc>(0, R * count);
    Acc* transposed = scratch<Acc>(1, R * kOuterPairs);
    const Acc** left = scratch<const Acc*>(2, R);
    Acc** into = scratch<Acc*>(3, R);
    const void* row[kOuterPairs];
    std::fill(sums, sums + R * count, Acc(0));
    for (int64_t r = 0; r < R; ++r) left[r] = transposed + r * kOuterPairs, into[r] = sums + r * count;
    for (int64_t begin = pairs.start[e], end = pairs.start[e + 1]; begin < end; begin += kOuterPairs) {
      const int64_t n = std::min(kOuterPairs, end - begin);
      for (int64_t p = 0; p < n; ++p) {
        const int64_t pair = pairs.order[begin + p];
        row[p] = x.at(pair / args.K, c);
        for (int64_t r = 0; r < R; ++r) transposed[r * kOuterPairs + p] = q[pair * R + r];
      }
      micro<Acc>(x.dtype).axpy(R, n, count, left, row, into, into, nullptr);
    }
    char* base = static_cast<char*>(out.data_ptr());
    for (int64_t r = 0; r < R; ++r)
      micro<Acc>(dtype).store(count, sums + r * count, base + ((e * R + r) * columns + c) * size_of(dtype));
  });
}

// grad_weights [N,K]: one sum per slot over the tokens of its row, in order.
template <class Acc>
void weight_gradient(const LoraArgs& args, const Acc* weights, const Acc* h, const Acc* q, const Matrix& dy,
                     const Tensor& out) {
  const int64_t K = args.K, R = args.R;
  std::vector<Acc> per_pair(args.T * K);
  parallel(ceil_div(args.T, kBlock), std::min(args.T, kBlock) * K * (R + args.O), [&](int64_t block) {
    Acc* grad = scratch<Acc>(0, args.O);
    Acc* bias = scratch<Acc>(1, args.lora_bias ? args.O : 0);
    std::vector<Acc> mean_h(R), mean_q(R);
    for (int64_t t = block * kBlock; t < std::min(args.T, (block + 1) * kBlock); ++t) {
      const int64_t slot = args.row(t) * K;
      const Acc *ht = h + t * K * R, *qt = q + t * K * R;
      std::fill(mean_h.begin(), mean_h.end(), Acc(0));
      std::fill(mean_q.begin(), mean_q.end(), Acc(0));
      for (int64_t k = 0; args.factored && k < K; ++k)
        for (int64_t r = 0; weights[slot + k] != 0 && r < R; ++r) {
          mean_h[r] += weights[slot + k] * ht[k * R + r];
          mean_q[r] += weights[slot + k] * qt[k * R + r];
        }
      const Acc* dy_row = args.lora_bias ? row_as<Acc>(dy, t, args.O, grad) : nullptr;
      for (int64_t k = 0; k < K; ++k) {
        Acc sum = 0;
        for (int64_t r = 0; r < R; ++r)
          sum += args.factored ? qt[k * R + r] * mean_h[r] + ht[k * R + r] * mean_q[r] : qt[k * R + r] * ht[k * R + r];
        if (args.lora_bias) {
          const Matrix values(*args.lora_bias);
          const Acc* line = row_as<Acc>(values, args.ids[slot + k], args.O, bias);
          for (int64_t o = 0; o < args.O; ++o) sum += dy_row[o] * line[o];
        }
        per_pair[t * K + k] = sum;
      }
    }
  });
  std::vector<Acc> sums(args.N * K, Acc(0));
  for (int64_t t = 0; t < args.T; ++t)
    for (int64_t k = 0; k < K; ++k) sums[args.row(t) * K + k] += per_pair[t * K + k];
  micro<Acc>(dtype_of(out)).store(args.N * K, sums.data(), out.data_ptr());
}

struct Needs {
  bool x, a, b, weights, bias;
};

struct Results {
  Tensor x, a, b, weights, bias;  // b is [E,R,O]
};

template <class Acc>
void backward(const LoraArgs& args, const Tensor& weights, const Tensor& grad_y, const Needs& needs,
              const Results& out) {
  const Tensor weight_values = dense(weights, accumulator(args.wide));
  const Acc* w = static_cast<const Acc*>(weight_values.data_ptr());
  const Matrix x(args.x), dy(grad_y);
  // grad_weights is true at a weight of 0 too, so those pairs are read for it
  Pairs read, used;
  read.sort<Acc>(args, w, !needs.weights);
  used.sort<Acc>(args, w, true);
  const bool need_h = needs.b || needs.weights, need_q = needs.x || needs.a || needs.weights;
  const auto hidden = [&](bool needed) {
    return new_tensor(args.x, {needed ? args.T : 0, args.K, args.R}, scalar_type<Acc>);
  };
  const Tensor h_storage = hidden(need_h), q_storage = hidden(need_q);
  Acc *h = static_cast<Acc*>(h_storage.data_ptr()), *q = static_cast<Acc*>(q_storage.data_ptr());
  if (need_h) shrink<Acc>(args, read, x, args.a, h);
  if (need_q) shrink<Acc>(args, read, dy, args.b, q);
  if (needs.weights) weight_gradient<Acc>(args, w, h, q, dy, out.weights);
  if (needs.x || needs.a) weigh<Acc>(args, w, q);
  if (needs.b) weigh<Acc>(args, w, h);
  if (needs.x) {
    const std::optional<Tensor> no_bias;
    const Expand<Acc> expand{args, used, q, args.a, nullptr, no_bias, w, Matrix(out.x)};
    parallel(expand.count(), expand.cost(), expand);
  }
  if (!needs.a && !needs.b && !needs.bias) return;
  if (needs.a) outer<Acc>(args, used, q, args.R, x, args.D, out.a);
  if (needs.b) outer<Acc>(args, used, h, args.R, dy, args.O, out.b);
  if (needs.bias) {
    const Tensor pair_weights = new_tensor(args.x, {args.T, args.K}, scalar_type<Acc>);
    Acc* values = static_cast<Acc*>(pair_weights.data_ptr());
    for (int64_t i = 0; i < args.T * args.K; ++i) values[i] = w[args.row(i / args.K) * args.K + i % args.K];
    outer<Acc>(args, used, values, 1, dy, args.O, out.bias);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_apply_backward(Tensor grad_y, Tensor x, Tensor lora_a,
                                                                       Tensor lora_b, Tensor weights, Tensor experts,
                                                                       int64_t needs, std::optional<Tensor> lora_bias,
                                                                       std::optional<Tensor> rows, bool factored) {
  const Check check{"lora_apply_backward", Device::cpu};
  check_grad_y(check, grad_y, x);
  LoraArgs args(check, x, grad_y.size(1), is_double(grad_y), lora_a, lora_b, lora_bias, factored, std::nullopt);
  args.set_slots(weights, experts, rows);
  const Needs need{bool(needs & 1), bool(needs & 2), bool(needs & 4), bool(needs & 8), lora_bias && (needs & 16)};
  const auto result = [&](bool needed, const Tensor& like, std::initializer_list<int64_t> sizes) {
    Tensor out = needed ? new_tensor(like, sizes, like.scalar_type()) : new_tensor(like, {0}, like.scalar_type());
    if (needed && (args.T == 0 || args.R == 0 || args.K == 0)) torch::stable::zero_(out);
    return out;
  };
  Results out{result(need.x, x, {args.T, args.D}), result(need.a, lora_a, {args.E, args.R, args.D}),
              result(need.b, lora_b, {args.E, args.R, args.O}), result(need.weights, weights, {args.N, args.K}),
              result(need.bias, lora_bias ? *lora_bias : x, {args.E, args.O})};
  if (args.T > 0 && args.wide)
    backward<double>(args, weights, rows_contiguous(grad_y), need, out);
  else if (args.T > 0)
    backward<float>(args, weights, rows_contiguous(grad_y), need, out);
  return {out.x, out.a, need.b ? torch::stable::transpose(out.b, 1, 2) : out.b, out.weights, out.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) { m.impl("lora_apply_backward", TORCH_BOX(&lora_apply_backward)); }

}  // namespace moerge::cpu
