// The parts of lora_apply's gradient that the forward has no kernel for. With q = B^T dy and h = A x per pair (both by
// lora_shrink), and Q and H made of them as lora_expand makes H of h:
//   dx = A^T Q (lora_expand),  dA = sum Q x^T,  dB^T = sum H dy^T,  dbias = sum w dy       over the pairs of an expert
//   dw = q . h + dy . bias;  factored: q . sum_j w_j h_j + h . sum_j w_j q_j + dy . bias
// Every sum has one owner and a fixed order.
#include "lora_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRanks = 8, kPairs = 32;

// A block has an expert, kRanks ranks and kThreads columns; a thread one column.
template <class Acc>
struct LoraOuter {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_outer";
  Lora p;
  Groups g;
  const void* q;
  int64_t R;
  Matrix x;
  int64_t columns;
  void* out;
  DType dtype;

  MOERGE_DEVICE Acc left(int64_t pair, int64_t r) const {
    const int64_t t = pair / p.K, k = pair % p.K;
    const Slots<Acc> slots(p, t);
    return q ? slots.hidden(static_cast<const Acc*>(q) + t * p.K * p.R, k, r) : slots.weights[k];
  }

  MOERGE_DEVICE void operator()() const {
    const int64_t e = block_x(), first = block_y() * kRanks, c = block_z() * kThreads + thread();
    Shared shared;
    Acc* values = shared.take<Acc>(kPairs * kRanks);
    const int32_t begin = g.offsets[e], end = g.offsets[e + 1];
    Acc sum[kRanks] = {};
    for (int32_t i = begin; i < end; i += kPairs) {
      const int count = end - i < kPairs ? end - i : kPairs;
      sync_block();
      for (int j = thread(); j < count * kRanks; j += kThreads)
        values[j] = first + j % kRanks < R ? left(g.order[i + j / kRanks], first + j % kRanks) : Acc(0);
      sync_block();
      for (int j = 0; c < columns && j < count; ++j) {
        const Acc value = load_as<Acc>(x.data, x.dtype, g.order[i + j] / p.K * x.stride + c);
        for (int r = 0; r < kRanks; ++r) sum[r] += values[j * kRanks + r] * value;
      }
    }
    for (int r = 0; c < columns && r < kRanks && first + r < R; ++r)
      store_as<Acc>(out, dtype, (e * R + first + r) * columns + c, sum[r]);
  }
};

// One warp per pair.
template <class Acc>
struct LoraPairGradient {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_pair_gradient";
  Lora p;
  const void *h, *q;
  Matrix dy;
  int64_t O;
  Matrix bias;
  void* per_pair;

  MOERGE_DEVICE void operator()() const {
    const int64_t pair = block_x() * kWarps + warp();
    if (pair >= p.T * p.K) return;
    const int64_t t = pair / p.K, k = pair % p.K;
    const Slots<Acc> slots(p, t);
    Acc sum = 0;
    if (slots.named(k)) {
      const Acc* ht = static_cast<const Acc*>(h) + t * p.K * p.R;
      const Acc* qt = static_cast<const Acc*>(q) + t * p.K * p.R;
      for (int64_t r = lane(); r < p.R; r += 32) {
        const Acc hk = slots.value(ht, k, r), qk = slots.value(qt, k, r);
        sum += p.factored ? qk * slots.mean(ht, r) + hk * slots.mean(qt, r) : qk * hk;
      }
      if (bias.data)
        for (int64_t o = lane(); o < O; o += 32)
          sum += load_as<Acc>(dy.data, dy.dtype, t * dy.stride + o) *
                 load_as<Acc>(bias.data, bias.dtype, slots.experts[k] * bias.stride + o);
    }
    sum = warp_sum(sum);
    if (lane() == 0) static_cast<Acc*>(per_pair)[pair] = sum;
  }
};

// One thread per weight.
template <class Acc>
struct LoraWeightGradient {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_weight_gradient";
  Lora p;
  const void* per_pair;
  void* out;
  DType dtype;

  MOERGE_DEVICE void operator()() const {
    const int64_t i = block_x() * kThreads + thread(), n = i / p.K, k = i % p.K;
    if (n >= p.row.n) return;
    const int64_t begin = p.row.rows ? 0 : n * p.row.tokens_per_row;
    const int64_t end = p.row.rows ? p.T : begin + p.row.tokens_per_row;
    Acc sum = 0;
    for (int64_t t = begin; t < end; ++t)
      if (!p.row.rows || p.row.rows[t] == n) sum += static_cast<const Acc*>(per_pair)[t * p.K + k];
    store_as<Acc>(out, dtype, i, sum);
  }
};

template <class Acc>
void run_weight_gradient(const Lora& p, const void* h, const void* q, const Matrix& dy, int64_t O, const Matrix& bias,
                         void* per_pair, void* out, DType dtype, Stream stream) {
  launch({ceil_div(p.T * p.K, kWarps)}, 0, stream, LoraPairGradient<Acc>{p, h, q, dy, O, bias, per_pair});
  launch({ceil_div(p.row.n * p.K, kThreads)}, 0, stream, LoraWeightGradient<Acc>{p, per_pair, out, dtype});
}

}  // namespace

void lora_outer(const Lora& p, const Groups& groups, const void* q, int64_t R, const Matrix& x, int64_t columns,
                void* workspace, void* out, DType dtype, Stream stream) {
  if (p.E * R * columns == 0) return;
  if (q && outer_workspace(p, x, columns, dtype))
    return lora_outer_mma(p, groups, q, x, columns, workspace, out, dtype, stream);
  const Grid grid{p.E, ceil_div(R, kRanks), ceil_div(columns, kThreads)};
  if (p.wide)
    launch(grid, shared_size(kPairs * kRanks * sizeof(double)), stream,
           LoraOuter<double>{p, groups, q, R, x, columns, out, dtype});
  else
    launch(grid, shared_size(kPairs * kRanks * sizeof(float)), stream,
           LoraOuter<float>{p, groups, q, R, x, columns, out, dtype});
}

void lora_weight_gradient(const Lora& p, const void* h, const void* q, const Matrix& dy, int64_t O, const Matrix& bias,
                          void* per_pair, void* out, DType dtype, Stream stream) {
  if (p.T * p.K == 0) return;
  if (p.wide)
    run_weight_gradient<double>(p, h, q, dy, O, bias, per_pair, out, dtype, stream);
  else
    run_weight_gradient<float>(p, h, q, dy, O, bias, per_pair, out, dtype, stream);
}

}  // namespace moerge::cuda
