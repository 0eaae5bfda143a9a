// `tall` of micro.h for one instruction set; part of micro_kernels.h.
//
// The depth is cut into parts of kDepth, a part into four chains of kChain rows of w, and
//   out += ((c0 + c1) + c2) + c3,      c_i the sum over chain i, in the order of its rows.
// Many rows of x: one chain after the other, so that a tile holds 8 rows x up to 3 vectors and a chain's rows of w stay
// in the first-level cache for all of them; 8, since more pointers to x do not fit the registers. Few rows: the four
// chains at once, without which the additions would wait for each other. No sum across lanes is left, unlike in dot.
//
// route at T = 1024, D = 2048, E = 36 takes 0.8 times what tiles of 3 rows x 2 vectors with four chains took, E = 166
// 0.77 times (float32, AVX-512, interleaved).
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

constexpr int64_t kChain = kDepth / 4;
constexpr int64_t kTallRows = 48;  // rows that share a pass over a chain

// V vectors of columns of w, of which the last has `last` columns.
template <class Acc, class T, int V>
struct Panel {
  static constexpr int N = kWide<Acc>;
  const T* w;
  int64_t stride, last;

  [[gnu::always_inline]] void row(int64_t d, Vec<Acc, N> (&values)[V]) const {
    const T* from = w + d * stride;
    unrolled<V - 1>([&](auto v) MOERGE_INLINE { pin(values[v] = load_vec<Acc, N>(from + v * N)); });
    pin(values[V - 1] = load_first<Acc, N>(from + (V - 1) * N, last));
  }

  // to[0..) += sum
  void add(const Vec<Acc, N> (&sum)[V], Acc* to) const {
    for (int v = 0; v < V - 1; ++v) store_vec<Acc, N>(load_vec<Acc, N>(to + v * N) + sum[v], to + v * N);
    for (int64_t i = 0; i < last; ++i) to[(V - 1) * N + i] += sum[V - 1][i];
  }
};

// sum[m] = x[m] . w over rows [begin, end)
template <class Acc, class T, int M, int V>
inline void one_chain(const Panel<Acc, T, V>& panel, int64_t begin, int64_t end, const Acc* const* x,
                      Vec<Acc, kWide<Acc>> (&sum)[M][V]) {
  constexpr int N = kWide<Acc>;
  const Acc* row[M];
  unrolled<M>([&](auto m) MOERGE_INLINE { row[m] = x[m]; });
  unrolled<M, V>([&](auto m, auto v) MOERGE_INLINE { sum[m][v] = Vec<Acc, N>{}; });
  for (int64_t d = begin; d < end; ++d) {
    Vec<Acc, N> values[V];
    panel.row(d, values);
    unrolled<M, V>([&](auto m, auto v) MOERGE_INLINE { sum[m][v] += row[m][d] * values[v]; });
  }
}

// Rows [0, M) of x, M a multiple of 8, chain by chain.
template <class Acc, class T, int V>
inline void tall_many(int64_t M, int64_t depth, const Acc* const* x, const Panel<Acc, T, V>& panel, Acc* const* out) {
  constexpr int N = kWide<Acc>;
  Vec<Acc, N> total[kTallRows][V];
  for (int64_t chain = 0; chain < 4; ++chain) {
    const int64_t begin = chain * kChain, end = depth < begin + kChain ? depth : begin + kChain;
    for (int64_t m0 = 0; m0 < M; m0 += 8) {
      Vec<Acc, N> sum[8][V];
      one_chain<Acc, T, 8, V>(panel, begin, end, x + m0, sum);
      if (chain)
        unrolled<8, V>([&](auto m, auto v) MOERGE_INLINE { total[m0 + m][v] += sum[m][v]; });
      else
        unrolled<8, V>([&](auto m, auto v) MOERGE_INLINE { total[m0 + m][v] = sum[m][v]; });
    }
  }
  for (int64_t m = 0; m < M; ++m) panel.add(total[m], out[m]);
}

// Rows [0, M) of x, the four chains at once.
template <class Acc, class T, int M, int V>
inline void tall_few(int64_t depth, const Acc* const* x, const Panel<Acc, T, V>& panel, Acc* const* out) {
  constexpr int N = kWide<Acc>;
  Vec<Acc, N> sum[4][M][V] = {};
  const auto step = [&](int64_t d, auto chain) MOERGE_INLINE {
    Vec<Acc, N> values[V];
    panel.row(chain * kChain + d, values);
    unrolled<M, V>([&](auto m, auto v) MOERGE_INLINE { sum[chain][m][v] += x[m][chain * kChain + d] * values[v]; });
  };
  if (depth == kDepth)
    for (int64_t d = 0; d < kChain; ++d) unrolled<4>([&](auto chain) MOERGE_INLINE { step(d, chain); });
  else
    unrolled<4>([&](auto chain) MOERGE_INLINE {
      for (int64_t d = 0; d < kChain && chain * kChain + d < depth; ++d) step(d, chain);
    });
  unrolled<M>([&](auto m) MOERGE_INLINE {
    Vec<Acc, N> total[V];
    unrolled<V>([&](auto v)
                    MOERGE_INLINE { total[v] = ((sum[0][m][v] + sum[1][m][v]) + sum[2][m][v]) + sum[3][m][v]; });
    panel.add(total, out[m]);
  });
}

// One part of the depth for up to kTallRows rows and one panel of columns.
template <class Acc, class T, int V>
inline void tall_part(int64_t M, int64_t depth, const Acc* const* x, const Panel<Acc, T, V>& panel, Acc* const* out) {
  constexpr int few = kRegisters / 4 / V < 4 ? kRegisters / 4 / V : 4;
  int64_t m = M / 8 * 8;
  if (m) tall_many<Acc, T, V>(m, depth, x, panel, out);
  for (; m + few <= M; m += few) tall_few<Acc, T, few, V>(depth, x + m, panel, out + m);
  for (; m < M; ++m) tall_few<Acc, T, 1, V>(depth, x + m, panel, out + m);
}

template <class Acc, class T>
void tall(int64_t M, int64_t D, int64_t J, const Acc* const* x, const void* w_start, int64_t stride, Acc* const* out) {
  constexpr int N = kWide<Acc>, V = kRegisters == 32 ? 3 : 1;
  const Acc* part[kTallRows];
  Acc* to[kTallRows];
  for (int64_t begin = 0; begin < D; begin += kDepth) {
    const int64_t depth = D - begin < kDepth ? D - begin : kDepth;
    for (int64_t m0 = 0; m0 < M; m0 += kTallRows) {
      const int64_t count = M - m0 < kTallRows ? M - m0 : kTallRows;
      for (int64_t m = 0; m < count; ++m) part[m] = x[m0 + m] + begin;
      for (int64_t j = 0; j < J; j += V * N) {
        const T* w = static_cast<const T*>(w_start) + begin * stride + j;
        const int64_t left = J - j;
        for (int64_t m = 0; m < count; ++m) to[m] = out[m0 + m] + j;
        if constexpr (V == 3) {
          if (left > 2 * N) {
            tall_part<Acc, T, 3>(count, depth, part, {w, stride, left < 3 * N ? left - 2 * N : N}, to);
            continue;
          }
          if (left > N) {
            tall_part<Acc, T, 2>(count, depth, part, {w, stride, left - N}, to);
            continue;
          }
        }
        tall_part<Acc, T, 1>(count, depth, part, {w, stride, left < N ? left : N}, to);
      }
    }
  }
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
