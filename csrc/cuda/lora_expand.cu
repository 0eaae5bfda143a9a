// out[t,c] = base[t,c] + sum_k H[t,k,:] . w[e,:,c] + sum_k w_tk bias[e,c]: a block has one token and some columns.
//
// A token is owned by its block: base is read and out written once, sums have a fixed order, and nothing of size K x O
// exists. The (slot, rank) terms are dealt to kSplits groups of threads, which are added in order at the end. Variants:
// 16-byte loads for w, base and out of one known type whose columns are adjacent; any types and strides, one element at
// a time.
#include "lora.cuh"
#include "lora_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kSplits = 8;
constexpr int kColumnThreads = kThreads / kSplits;
constexpr int kTerms = 1024;  // (slot, rank) terms in shared memory at a time

template <class Acc, class W, int V>
struct LoraExpand {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_expand";
  Lora p;
  const void* h;
  Factors w;
  Matrix base, bias, out;

  // Terms [begin, end) of this thread's split, from `terms` (which holds H from `begin` on), into sum.
  MOERGE_DEVICE void add_terms(const Slots<Acc>& slots, const Acc* terms, int64_t begin, int64_t end, int64_t c,
                               Acc (&sum)[V]) const {
    const int64_t split = thread() / kColumnThreads;
    for (int64_t j = begin; j < end;) {
      const int64_t k = j / p.R, r = j % p.R;
      const int64_t count = p.R - r < end - j ? p.R - r : end - j;
      if (slots.used(k)) {
        const int64_t from = slots.experts[k] * w.expert + c * w.column;
        for (int64_t i = (split + kSplits - r % kSplits) % kSplits; i < count; i += kSplits) {
          Acc value[V];
          load_vector<W>(w.data, w.dtype, from + (r + i) * w.rank, value);
          for (int v = 0; v < V; ++v) sum[v] += terms[j - begin + i] * value[v];
        }
      }
      j += count;
    }
  }

  MOERGE_DEVICE void add_bias(const Slots<Acc>& slots, int64_t c, Acc (&sum)[V]) const {
    for (int64_t k = 0; k < p.K; ++k)
      if (slots.used(k))
        for (int v = 0; v < V; ++v)
          sum[v] += slots.weights[k] * load_as<Acc>(bias.data, bias.dtype, slots.experts[k] * bias.stride + c + v);
  }

  MOERGE_DEVICE void operator()() const {
    const int64_t t = block_x(), c = (block_y() * kColumnThreads + thread() % kColumnThreads) * V;
    const bool inside = c < w.columns;
    Shared shared;
    Acc* terms = shared.take<Acc>(kTerms);
    Acc* sums = shared.take<Acc>(kThreads * V);
    const Slots<Acc> slots(p, t);
    const Acc* hidden = static_cast<const Acc*>(h) + t * p.K * p.R;
    Acc sum[V] = {};
    const int64_t total = p.K * p.R;
    for (int64_t begin = 0; begin < total; begin += kTerms) {
      const int64_t end = begin + kTerms < total ? begin + kTerms : total;
      sync_block();
      for (int64_t j = begin + thread(); j < end; j += kThreads)
        terms[j - begin] = slots.used(j / p.R) ? slots.hidden(hidden, j / p.R, j % p.R) : Acc(0);
      sync_block();
      if (inside) add_terms(slots, terms, begin, end, c, sum);
    }
    for (int v = 0; v < V; ++v) sums[thread() * V + v] = sum[v];
    sync_block();
    if (!inside || thread() >= kColumnThreads) return;
    for (int split = 1; split < kSplits; ++split)
      for (int v = 0; v < V; ++v) sum[v] += sums[(split * kColumnThreads + thread()) * V + v];
    if (bias.data) add_bias(slots, c, sum);
    if (base.data) {
      Acc value[V];
      load_vector<W>(base.data, base.dtype, t * base.stride + c, value);
      for (int v = 0; v < V; ++v) sum[v] += value[v];
    }
    store_vector<W>(out.data, out.dtype, t * out.stride + c, sum);
  }
};

template <class Acc, class W, int V>
void run_expand(const Lora& p, const void* h, const Factors& w, const Matrix& base, const Matrix& bias,
                const Matrix& out, Stream stream) {
  const size_t shared = shared_size(kTerms * sizeof(Acc)) + shared_size(kThreads * V * sizeof(Acc));
  launch({p.T, ceil_div(w.columns, kColumnThreads * V)}, shared, stream,
         LoraExpand<Acc, W, V>{p, h, w, base, bias, out});
}

}  // namespace

void lora_expand(const Lora& p, const void* h, const void* prepared, const Factors& w, const Matrix& base,
                 const Matrix& bias, const Matrix& out, Stream stream) {
  if (p.T * w.columns == 0) return;
  if (!expand_against_tensor_cores(p, w, base, out)) return lora_expand_mma(p, prepared, w, base, bias, out, stream);
  if (p.wide) return run_expand<double, Any, 1>(p, h, w, base, bias, out, stream);
  const int64_t size = w.dtype == DType::f32 ? 4 : 2;
  const bool vectors = w.dtype == out.dtype && w.column == 1 && w.columns % 8 == 0 &&
                       aligned16(w.data, w.expert * size) && w.rank * size % 16 == 0 &&
                       aligned16(out.data, out.stride * size) &&
                       (!base.data || (base.dtype == w.dtype && aligned16(base.data, base.stride * size)));
  if (vectors && w.dtype == DType::f32) return run_expand<float, float, 8>(p, h, w, base, bias, out, stream);
  if (vectors && w.dtype == DType::bf16) return run_expand<float, bf16, 8>(p, h, w, base, bias, out, stream);
  if (vectors && w.dtype == DType::f16) return run_expand<float, f16, 8>(p, h, w, base, bias, out, stream);
  run_expand<float, Any, 1>(p, h, w, base, bias, out, stream);
}

}  // namespace moerge::cuda
