// `two` of RowMicro (micro.h): the best two scores and their softmax, a register of tokens at a time; part of
// micro_kernels.h. 210 calls of route (SmolLM2's layers, bfloat16, T = 512, E = 8, one thread), ms, against a token at
// a time and std::exp: 22 to 23 (28); routed_lora_ 80 (89).
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

template <int N>
using Ints = decltype(Vec<float, N>{} > Vec<float, N>{});

// exp(x) of x <= 0, to 2 units in the last place; 0 where it is below the smallest normal number. A NaN stays one.
//   x = n log 2 + f, |f| <= log 2 / 2 : 2^n exp(f), log 2 in two parts, exp(f) by the polynomial of Cephes' expf
template <int N>
inline Vec<float, N> exp_of(Vec<float, N> x) {
  constexpr float round = 0x1.8p23f;  // added, it leaves no digits after the point
  const Vec<float, N> n = (x * 1.44269504f + round) - round;
  const Vec<float, N> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const Vec<float, N> high = (f * 1.9875691500e-4f + 1.3981999507e-3f) * f + 8.3334519073e-3f;
  const Vec<float, N> low = ((high * f + 4.1665795894e-2f) * f + 1.6666665459e-1f) * f + 5.0000001201e-1f;
  const Vec<float, N> p = low * f * f + f + 1.0f;
  const Ints<N> exponent = (__builtin_convertvector(n, Ints<N>) + 127) << 23;
  return x < -87.0f ? Vec<float, N>{} : p * reinterpret_cast<Vec<float, N>>(exponent);
}

constexpr int64_t kColumns = 16;  // experts whose scores are turned round together

void two(int64_t n, int64_t E, const float* scores, float* weights, int32_t* ids, bool* found) {
  constexpr int N = kWide<float>;
  const Vec<float, N> nothing = Vec<float, N>{} - __builtin_inff();
  for (int64_t begin = 0; begin < n; begin += N) {
    const int64_t count = n - begin < N ? n - begin : N;
    const float* rows = scores + begin * E;
    alignas(64) float column[kColumns * N] = {};
    Vec<float, N> first = nothing, second = nothing;
    Ints<N> best{}, next{};
    for (int64_t e = 0; e < E; ++e) {
      if (e % kColumns == 0)
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < kColumns && e + j < E; ++j) column[j * N + i] = rows[i * E + e + j];
      const Vec<float, N> score = load_vec<float, N>(column + e % kColumns * N);
      const Ints<N> id = Ints<N>{} + static_cast<int32_t>(e), above = score > first, between = score > second;
      next = above ? best : between ? id : next;
      best = above ? id : best;
      const Vec<float, N> lower = first < score ? first : score;  // in this order of comparisons a NaN changes nothing
      second = second < lower ? lower : second;
      first = first < score ? score : first;
    }
    const Vec<float, N> one = 1 + (first - first), other = exp_of<N>(second - first);  // NaN of an infinite score
    const Vec<float, N> total = one + other, large = one / total, small = other / total;
    const Ints<N> both = second > nothing;
    for (int64_t i = 0; i < count; ++i) {
      weights[2 * (begin + i)] = large[i], weights[2 * (begin + i) + 1] = small[i];
      ids[2 * (begin + i)] = best[i], ids[2 * (begin + i) + 1] = next[i];
      found[begin + i] = both[i] != 0;
    }
  }
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
