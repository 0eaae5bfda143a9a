// moerge::mix_log_probs on the CPU: the log of the weighted mean of K next-token distributions.
//
//   out[n,v] = log( sum_k w_nk softmax(logits[k,n])_v / sum_k w_nk )
// computed as a log-sum-exp over k of log w_nk + logits[k,n,v] - logsumexp(logits[k,n]); a weight of 0 is skipped and
// its logits are never read. With r_kv = w_k p_k(v) / sum_j w_j p_j(v):
//   dlogits_kv = g_v r_kv - p_k(v) sum_u g_u r_ku        dw_k = sum_v g_v r_kv / w_k - sum_v g_v / sum_j w_j
#include <algorithm>
#include <limits>

#include "../common/check_mix.h"
#include "view.h"

namespace moerge::cpu {

namespace {

constexpr int64_t kVocabChunk = 4096;

template <class Acc>
struct Mix {
  static constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
  int64_t K, N, V;
  Tensor logits_storage, weights_storage;
  DType dtype;
  const char* logits;
  const Acc* weights;
  std::vector<Acc> offset;     // [N,K]: log w - logsumexp(logits)
  std::vector<Acc> log_total;  // [N]: log of the sum of the weights

  Mix(const Tensor& logits_in, const Tensor& weights_in)
      : K(logits_in.size(0)),
        N(logits_in.size(1)),
        V(logits_in.size(2)),
        logits_storage(dense(logits_in)),
        weights_storage(dense(weights_in, scalar_type<Acc>)),
        dtype(dtype_of(logits_in)),
        logits(static_cast<const char*>(logits_storage.data_ptr())),
        weights(static_cast<const Acc*>(weights_storage.data_ptr())),
        offset(N * K),
        log_total(N) {
    for (int64_t n = 0; n < N; ++n) {
      Acc total = 0;
      for (int64_t k = 0; k < K; ++k) total += weights[n * K + k];
      log_total[n] = total == 0 ? 0 : std::log(total);
    }
    parallel(N * K, 10 * V,
             [&](int64_t i) { offset[i] = weights[i] == 0 ? 0 : std::log(weights[i]) - log_sum(i % K, i / K); });
  }

  void load(int64_t k, int64_t n, int64_t v, int64_t count, Acc* out) const {
    micro<Acc>(dtype).load(count, logits + ((k * N + n) * V + v) * size_of(dtype), out);
  }

  Acc log_sum(int64_t k, int64_t n) const {
    Acc* chunk = scratch<Acc>(0, kVocabChunk);
    Acc highest = kNone, total = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t v = 0; v < V; v += kVocabChunk) {
        const int64_t count = std::min(kVocabChunk, V - v);
        load(k, n, v, count, chunk);
        for (int64_t i = 0; i < count; ++i)
          if (pass)
            total += std::exp(chunk[i] - highest);
          else if (!(chunk[i] <= highest))
            highest = chunk[i];
      }
    return highest + std::log(total);
  }

  // f(n, v, count) over all chunks of the vocabulary
  template <class F>
  void each_chunk(const F& f) const {
    const int64_t chunks = ceil_div(V, kVocabChunk);
    parallel(N * chunks, 10 * K * std::min(V, kVocabChunk), [&](int64_t task) {
      const int64_t v = task % chunks * kVocabChunk;
      f(task / chunks, v, std::min(kVocabChunk, V - v));
    });
  }

  void forward(Acc* out) const {
    each_chunk([&](int64_t n, int64_t v, int64_t count) {
      Acc* term = scratch<Acc>(0, K * kVocabChunk);
      Acc* result = out + n * V + v;
      for (int64_t k = 0; k < K; ++k)
        if (weights[n * K + k] != 0) load(k, n, v, count, term + k * kVocabChunk);
      for (int64_t i = 0; i < count; ++i) {
        Acc highest = kNone, total = 0;
        for (int64_t k = 0; k < K; ++k) {
          const Acc value = term[k * kVocabChunk + i] + offset[n * K + k];
          if (weights[n * K + k] != 0 && !(value <= highest)) highest = value;
        }
        for (int64_t k = 0; k < K; ++k)
          if (weights[n * K + k] != 0 && highest != kNone)
            total += std::exp(term[k * kVocabChunk + i] + offset[n * K + k] - highest);
        result[i] = highest + std::log(total) - log_total[n];
      }
    });
  }

  // r = exp(log w + logit - lse - (result + log_total)): this distribution's share of the mixture at v
  Acc share(Acc logit, int64_t n, int64_t k, Acc result) const {
    return result == kNone ? Acc(0) : std::exp(logit + offset[n * K + k] - result - log_total[n]);
  }

  void backward(const Acc* grad, const Acc* result, const Tensor* grad_logits, Acc* grad_weights) const {
    parallel(N * K, 20 * V, [&](int64_t i) {
      const int64_t n = i / K, k = i % K;
      const Acc w = weights[i];
      const Acc *g = grad + n * V, *y = result + n * V;
      Acc* chunk = scratch<Acc>(0, kVocabChunk);
      Acc* out = scratch<Acc>(1, kVocabChunk);
      double along = 0, sum = 0;
      for (int64_t v = 0; v < V; v += kVocabChunk) {
        const int64_t count = std::min(kVocabChunk, V - v);
        if (w != 0) load(k, n, v, count, chunk);
        for (int64_t j = 0; w != 0 && j < count; ++j) {
          along += static_cast<double>(g[v + j]) * share(chunk[j], n, k, y[v + j]);
          sum += g[v + j];
        }
      }
      if (grad_weights)
        grad_weights[i] = w == 0 ? Acc(0) : static_cast<Acc>(along / w - sum / std::exp(double(log_total[n])));
      if (!grad_logits) return;
      const DType type = dtype_of(*grad_logits);
      for (int64_t v = 0; v < V; v += kVocabChunk) {
        const int64_t count = std::min(kVocabChunk, V - v);
        std::fill(out, out + count, Acc(0));
        if (w != 0) load(k, n, v, count, chunk);
        const Acc log_w = w == 0 ? 0 : std::log(w);
        for (int64_t j = 0; w != 0 && j < count; ++j)
          out[j] = g[v + j] * share(chunk[j], n, k, y[v + j]) -
                   std::exp(chunk[j] + offset[i] - log_w) * static_cast<Acc>(along);
        char* base = static_cast<char*>(grad_logits->data_ptr());
        micro<Acc>(type).store(count, out, base + ((k * N + n) * V + v) * size_of(type));
      }
    });
  }
};

Tensor mix_log_probs(Tensor logits, Tensor weights) {
  check_mix(Check{"mix_log_probs", Device::cpu}, logits, weights);
  const bool wide = is_double(logits);
  const Tensor out = new_tensor(logits, {logits.size(1), logits.size(2)}, accumulator(wide));
  if (out.numel() == 0) return out;
  if (wide)
    Mix<double>(logits, weights).forward(static_cast<double*>(out.data_ptr()));
  else
    Mix<float>(logits, weights).forward(static_cast<float*>(out.data_ptr()));
  return out;
}

template <class Acc>
void run_backward(const Tensor& grad, const Tensor& result, const Tensor& logits, const Tensor& weights,
                  const Tensor* grad_logits, const Tensor* grad_weights) {
  const Mix<Acc> mix(logits, weights);
  const Tensor g = dense(grad, scalar_type<Acc>);
  const Tensor y = dense(result, scalar_type<Acc>);
  std::vector<Acc> dw(grad_weights ? mix.N * mix.K : 0);
  mix.backward(static_cast<const Acc*>(g.data_ptr()), static_cast<const Acc*>(y.data_ptr()), grad_logits,
               grad_weights ? dw.data() : nullptr);
  if (grad_weights) micro<Acc>(dtype_of(*grad_weights)).store(mix.N * mix.K, dw.data(), grad_weights->data_ptr());
}

std::tuple<Tensor, Tensor> mix_log_probs_backward(Tensor grad, Tensor result, Tensor logits, Tensor weights,
                                                  int64_t needs) {
  const Check check{"mix_log_probs_backward", Device::cpu};
  check_mix(check, logits, weights);
  const int64_t K = logits.size(0), N = logits.size(1), V = logits.size(2);
  check_mix_results(check, grad, result, logits);
  const bool need_logits = needs & 1, need_weights = needs & 2;
  Tensor grad_logits =
      need_logits ? new_tensor(logits, {K, N, V}, logits.scalar_type()) : new_tensor(logits, {0}, logits.scalar_type());
  Tensor grad_weights = need_weights ? new_tensor(weights, {N, K}, weights.scalar_type())
                                     : new_tensor(weights, {0}, weights.scalar_type());
  if (need_weights && V == 0) torch::stable::zero_(grad_weights);
  if (grad.numel() == 0) return {grad_logits, grad_weights};
  const Tensor *dl = need_logits ? &grad_logits : nullptr, *dw = need_weights ? &grad_weights : nullptr;
  if (is_double(logits))
    run_backward<double>(grad, result, logits, weights, dl, dw);
  else
    run_backward<float>(grad, result, logits, weights, dl, dw);
  return {grad_logits, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moerge, CPU, m) {
  m.impl("mix_log_probs", TORCH_BOX(&mix_log_probs));
  m.impl("mix_log_probs_backward", TORCH_BOX(&mix_log_probs_backward));
}

}  // namespace moerge::cpu
