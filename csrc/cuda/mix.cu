// mix_log_probs: the log of the weighted mean of K next-token distributions.
//
//   out[n,v] = log( sum_k w_nk softmax(logits[k,n])_v / sum_k w_nk )
// as a log-sum-exp over k of log w_nk + logits[k,n,v] - logsumexp(logits[k,n]); a weight of 0 is skipped and its logits
// are never read. With r_kv = w_k p_k(v) / sum_j w_j p_j(v):
//   dlogits_kv = g_v r_kv - p_k(v) sum_u g_u r_ku        dw_k = sum_v g_v r_kv / w_k - sum_v g_v / sum_j w_j
#include "values.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class Acc>
MOERGE_DEVICE Acc log_total(const Mix& p, int64_t n) {
  Acc total = 0;
  for (int64_t k = 0; k < p.K; ++k) total += static_cast<const Acc*>(p.weights)[n * p.K + k];
  return total == 0 ? Acc(0) : log(total);
}

template <class Acc>
MOERGE_DEVICE Acc logit(const Mix& p, int64_t k, int64_t n, int64_t v) {
  return load_as<Acc>(p.logits, p.dtype, (k * p.N + n) * p.V + v);
}

// offset[n,k] = log w - logsumexp(logits[k,n]); one block per row of logits.
template <class Acc>
struct MixOffset {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "mix_offset";
  Mix p;

  MOERGE_DEVICE void operator()() const {
    const int64_t n = block_x() / p.K, k = block_x() % p.K;
    Shared shared;
    Acc* slots = shared.take<Acc>(kWarps);
    Acc* offset = static_cast<Acc*>(p.offset) + block_x();
    const Acc w = static_cast<const Acc*>(p.weights)[block_x()];
    Acc highest = -INFINITY, total = 0;
    for (int64_t v = thread(); w != 0 && v < p.V; v += kThreads) highest = fmax(highest, logit<Acc>(p, k, n, v));
    highest = block_max<kThreads>(highest, slots);
    for (int64_t v = thread(); w != 0 && v < p.V; v += kThreads) total += exp(logit<Acc>(p, k, n, v) - highest);
    total = block_sum<kThreads>(total, slots);
    if (thread() == 0) *offset = w == 0 ? Acc(0) : log(w) - (highest + log(total));
  }
};

template <class Acc>
struct MixForward {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "mix_forward";
  Mix p;
  void* out;

  MOERGE_DEVICE void operator()() const {
    const int64_t n = block_x(), v = block_y() * kThreads + thread();
    if (v >= p.V) return;
    const Acc* weights = static_cast<const Acc*>(p.weights) + n * p.K;
    const Acc* offset = static_cast<const Acc*>(p.offset) + n * p.K;
    Acc highest = -INFINITY, total = 0;
    bool nan = false;
    for (int64_t k = 0; k < p.K; ++k) {
      if (weights[k] == 0) continue;
      const Acc value = logit<Acc>(p, k, n, v) + offset[k];
      highest = fmax(highest, value);
      nan = nan || value != value;
    }
    for (int64_t k = 0; k < p.K; ++k)
      if (weights[k] != 0 && highest != -INFINITY) total += exp(logit<Acc>(p, k, n, v) + offset[k] - highest);
    const Acc result = highest + log(total) - log_total<Acc>(p, n);
    static_cast<Acc*>(out)[n * p.V + v] = nan ? Acc(NAN) : result;
  }
};

// One block per row of logits.
template <class Acc>
struct MixBackward {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "mix_backward";
  Mix p;
  const void *grad, *result;
  void *grad_logits, *grad_weights;
  DType weights_dtype;

  MOERGE_DEVICE void operator()() const {
    const int64_t n = block_x() / p.K, k = block_x() % p.K;
    Shared shared;
    Acc* slots = shared.take<Acc>(kWarps);
    const Acc* g = static_cast<const Acc*>(grad) + n * p.V;
    const Acc* y = static_cast<const Acc*>(result) + n * p.V;
    const Acc w = static_cast<const Acc*>(p.weights)[block_x()];
    const Acc offset = static_cast<const Acc*>(p.offset)[block_x()], log_sum = log_total<Acc>(p, n);
    // this distribution's share of the mixture at v
    const auto share = [&](int64_t v) {
      return y[v] == -INFINITY ? Acc(0) : exp(logit<Acc>(p, k, n, v) + offset - y[v] - log_sum);
    };
    Acc along = 0, sum = 0;
    for (int64_t v = thread(); w != 0 && v < p.V; v += kThreads) {
      along += g[v] * share(v);
      sum += g[v];
    }
    along = block_sum<kThreads>(along, slots);
    sum = block_sum<kThreads>(sum, slots);
    if (grad_weights && thread() == 0)
      store_as<Acc>(grad_weights, weights_dtype, block_x(), w == 0 ? Acc(0) : along / w - sum / exp(log_sum));
    for (int64_t v = thread(); grad_logits && v < p.V; v += kThreads) {
      const Acc value = w == 0 ? Acc(0) : g[v] * share(v) - exp(logit<Acc>(p, k, n, v) + offset - log(w)) * along;
      store_as<Acc>(grad_logits, p.dtype, (k * p.N + n) * p.V + v, value);
    }
  }
};

template <class Acc>
void offsets(const Mix& p, Stream stream) {
  if (p.K > 0) launch({p.N * p.K}, shared_size(kWarps * sizeof(Acc)), stream, MixOffset<Acc>{p});
}

template <class Acc>
void run_forward(const Mix& p, void* out, Stream stream) {
  offsets<Acc>(p, stream);
  launch({p.N, ceil_div(p.V, kThreads)}, 0, stream, MixForward<Acc>{p, out});
}

template <class Acc>
void run_backward(const Mix& p, const void* grad, const void* result, void* grad_logits, void* grad_weights,
                  DType weights_dtype, Stream stream) {
  offsets<Acc>(p, stream);
  if (p.K > 0)
    launch({p.N * p.K}, shared_size(kWarps * sizeof(Acc)), stream,
           MixBackward<Acc>{p, grad, result, grad_logits, grad_weights, weights_dtype});
}

}  // namespace

void mix_forward(const Mix& p, void* out, Stream stream) {
  if (p.wide)
    run_forward<double>(p, out, stream);
  else
    run_forward<float>(p, out, stream);
}

void mix_backward(const Mix& p, const void* grad, const void* result, void* grad_logits, void* grad_weights,
                  DType weights_dtype, Stream stream) {
  if (p.wide)
    run_backward<double>(p, grad, result, grad_logits, grad_weights, weights_dtype, stream);
  else
    run_backward<float>(p, grad, result, grad_logits, grad_weights, weights_dtype, stream);
}

}  // namespace moerge::cuda
