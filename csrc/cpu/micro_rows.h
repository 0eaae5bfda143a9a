// RowMicro of micro.h for one instruction set; part of micro_kernels.h.
//
// sum and centre of 48 rows of 2048 numbers, float32, us, against accumulators of 64 bytes on every machine and moments
// for the mean: AVX2 13 (89), AVX-512 10 (14), portable 23 (65).
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

// v_i = x_i - shift for i in [0, n), written to out unless it is null; with their squares, or only their sum. Four
// accumulators of 64 bytes each are summed; where a register holds less, a part of each after the other, since all
// would not fit the registers.
template <class Acc, bool with_squares>
Moments shifted_moments(int64_t n, const Acc* x, Acc shift, Acc* out) {
  constexpr int N = kWide<Acc>, lanes = kDotLanes<Acc>;
  constexpr int64_t span = 1024;
  const auto fold = [](const Vec<Acc, N>(&v)[4]) MOERGE_INLINE { return (v[0] + v[1]) + (v[2] + v[3]); };
  Moments total{0, 0};
  for (int64_t begin = 0; begin < n; begin += span) {
    const int64_t end = n - begin < span ? n : begin + span, whole = begin + (end - begin) / (4 * lanes) * (4 * lanes);
    Vec<Acc, N> sum_of[kDotParts<Acc>], square_of[kDotParts<Acc>];
    for (int part = 0; part < kDotParts<Acc>; ++part) {
      Vec<Acc, N> sums[4] = {}, squares[4] = {};
      for (int64_t i = begin + part * N; i < whole; i += 4 * lanes)
        unrolled<4>([&](auto k) MOERGE_INLINE {
          const Vec<Acc, N> value = load_vec<Acc, N>(x + i + k * lanes) - shift;
          if (out) store_vec<Acc, N>(value, out + i + k * lanes);
          sums[k] += value;
          if constexpr (with_squares) squares[k] += value * value;
        });
      sum_of[part] = fold(sums);
      square_of[part] = fold(squares);
    }
    Acc sum = reduce_parts<Acc>(sum_of), square = reduce_parts<Acc>(square_of);
    for (int64_t i = whole; i < end; ++i) {
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
double sum(int64_t n, const Acc* x) {
  return shifted_moments<Acc, false>(n, x, Acc(0), nullptr).sum;
}

template <class Acc>
Moments moments(int64_t n, const Acc* x) {
  return shifted_moments<Acc, true>(n, x, Acc(0), nullptr);
}

template <class Acc>
Moments centre(int64_t n, const Acc* x, Acc shift, Acc* out) {
  return shifted_moments<Acc, true>(n, x, shift, out);
}

template <class Acc>
void multiply(int64_t n, const Acc* x, Acc factor, Acc* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
