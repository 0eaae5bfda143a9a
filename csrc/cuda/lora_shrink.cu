// h[pair,r] = sum_c x[token,c] w[expert,r,c]: one warp per pair and rank, or one block per pair.
//
// Correct for anything. Variants: 16-byte loads for x and w of one known type whose columns are adjacent; the same
// where the ranks are adjacent (a bank stored transposed); any types and strides, one element at a time.
// lora_shrink_mma.cu has the fast one, for 16 bits and ranks up to 128.
#include "lora.cuh"
#include "lora_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class Acc, class X, int V>
struct LoraShrink {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_shrink";
  Lora p;
  Matrix x;
  Factors w;
  bool skip_zero;
  void* h;

  MOERGE_DEVICE void operator()() const {
    const int64_t pair = block_x(), t = pair / p.K, k = pair % p.K, r = block_y() * kWarps + warp();
    const Slots<Acc> slots(p, t);
    if (r >= p.R || !(skip_zero ? slots.used(k) : slots.named(k))) return;
    const int64_t from = slots.experts[k] * w.expert + r * w.rank;
    Acc a[V], b[V], sum = 0;
    for (int64_t c = lane() * V; c < w.columns; c += 32 * V) {
      load_vector<X>(x.data, x.dtype, t * x.stride + c, a);
      load_vector<X>(w.data, w.dtype, from + c * w.column, b);
      for (int i = 0; i < V; ++i) sum += a[i] * b[i];
    }
    sum = warp_sum(sum);
    if (lane() == 0) static_cast<Acc*>(h)[pair * p.R + r] = sum;
  }
};

// Ranks adjacent: a thread adds up 8 ranks over some of the columns, neighbouring threads having neighbouring ranks; a
// block has one pair, and at the end a thread per rank adds the parts in order.
template <class X>
struct LoraShrinkRanks {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_shrink_ranks";
  static constexpr int V = 8, kMostRanks = kThreads * V;
  Lora p;
  Matrix x;
  Factors w;
  bool skip_zero;
  float* h;

  MOERGE_DEVICE void operator()() const {
    const int64_t pair = block_x(), t = pair / p.K, k = pair % p.K;
    Shared shared;
    float* sums = shared.take<float>(kThreads * V);
    const Slots<float> slots(p, t);
    if (!(skip_zero ? slots.used(k) : slots.named(k))) return;
    const int groups = static_cast<int>(p.R) / V, parts = kThreads / groups;
    const int group = thread() % groups, part = thread() / groups;
    const int64_t from = slots.experts[k] * w.expert + group * V;
    const X* row = static_cast<const X*>(x.data) + t * x.stride;
    float sum[V] = {}, value[V];
    for (int64_t c = part; part < parts && c < w.columns; c += parts) {
      load_vector<X>(w.data, w.dtype, from + c * w.column, value);
      for (int i = 0; i < V; ++i) sum[i] += to_float(row[c]) * value[i];
    }
    for (int i = 0; i < V; ++i) sums[thread() * V + i] = sum[i];
    sync_block();
    for (int r = thread(); r < p.R; r += kThreads) {
      float total = 0;
      for (int i = 0; i < parts; ++i) total += sums[(i * groups + r / V) * V + r % V];
      h[pair * p.R + r] = total;
    }
  }
};

template <class Acc, class X, int V>
void run_shrink(const Lora& p, const Matrix& x, const Factors& w, bool skip_zero, void* h, Stream stream) {
  launch({p.T * p.K, ceil_div(p.R, kWarps)}, 0, stream, LoraShrink<Acc, X, V>{p, x, w, skip_zero, h});
}

bool ranks_fit(const Lora& p, const Matrix& x, const Factors& w, int64_t size) {
  return x.dtype == w.dtype && w.rank == 1 && w.column != 1 && p.R % 8 == 0 &&
         p.R <= LoraShrinkRanks<float>::kMostRanks && aligned16(w.data, w.expert * size) && w.column * size % 16 == 0;
}

template <class X>
void run_ranks(const Lora& p, const Matrix& x, const Factors& w, bool skip_zero, void* h, Stream stream) {
  launch({p.T * p.K}, shared_size(kThreads * LoraShrinkRanks<X>::V * sizeof(float)), stream,
         LoraShrinkRanks<X>{p, x, w, skip_zero, static_cast<float*>(h)});
}

}  // namespace

void lora_shrink(const Lora& p, const Matrix& x, const Factors& w, bool skip_zero, const Groups& groups, void* h,
                 Stream stream) {
  if (p.T * p.K * p.R == 0) return;
  if (!shrink_against_tensor_cores(p, x, w)) return lora_shrink_mma(p, x, w, skip_zero, groups, h, stream);
  if (p.wide) return run_shrink<double, Any, 1>(p, x, w, skip_zero, h, stream);
  const int64_t size = x.dtype == DType::f32 ? 4 : 2;
  if (ranks_fit(p, x, w, size)) {
    if (x.dtype == DType::f32) return run_ranks<float>(p, x, w, skip_zero, h, stream);
    if (x.dtype == DType::bf16) return run_ranks<bf16>(p, x, w, skip_zero, h, stream);
    return run_ranks<f16>(p, x, w, skip_zero, h, stream);
  }
  const bool vectors = x.dtype == w.dtype && w.column == 1 && w.columns % 8 == 0 &&
                       aligned16(x.data, x.stride * size) && aligned16(w.data, w.expert * size) &&
                       w.rank * size % 16 == 0;
  if (vectors && x.dtype == DType::f32) return run_shrink<float, float, 8>(p, x, w, skip_zero, h, stream);
  if (vectors && x.dtype == DType::bf16) return run_shrink<float, bf16, 8>(p, x, w, skip_zero, h, stream);
  if (vectors && x.dtype == DType::f16) return run_shrink<float, f16, 8>(p, x, w, skip_zero, h, stream);
  run_shrink<float, Any, 1>(p, x, w, skip_zero, h, stream);
}

}  // namespace moerge::cuda
