// RowMicro of micro.h for one instruction set; part of micro_kernels.h.
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

// v_i = x_i - shift for i in [0, n), written to out unless it is null
template <class Acc>
Moments shifted_moments(int64_t n, const Acc* x, Acc shift, Acc* out) {
  constexpr int lanes = kDotLanes<Acc>;
  constexpr int64_t span = 1024;
  Moments total{0, 0};
  for (int64_t begin = 0; begin < n; begin += span) {
    const int64_t end = n - begin < span ? n : begin + span;
    Vec<Acc, lanes> sums[4] = {}, squares[4] = {};
    int64_t i = begin;
    for (; i + 4 * lanes <= end; i += 4 * lanes)
      for (int k = 0; k < 4; ++k) {
        const Vec<Acc, lanes> value = load_vec<Acc, lanes>(x + i + k * lanes) - shift;
        if (out) store_vec<Acc, lanes>(value, out + i + k * lanes);
        sums[k] += value;
        squares[k] += value * value;
      }
    Acc sum = reduce<Acc, lanes>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    Acc square = reduce<Acc, lanes>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < end; ++i) {
      const Acc value = x[i] - shift;
      if (out) out[i] = value;
      sum += value;
      square += value * value;
    }
    total.sum += sum;
    total.squares += square;
  }
  return total;
}

template <class Acc>
Moments moments(int64_t n, const Acc* x) {
  return shifted_moments<Acc>(n, x, Acc(0), nullptr);
}

template <class Acc>
Moments centre(int64_t n, const Acc* x, Acc shift, Acc* out) {
  return shifted_moments<Acc>(n, x, shift, out);
}

template <class Acc>
void multiply(int64_t n, const Acc* x, Acc factor, Acc* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
