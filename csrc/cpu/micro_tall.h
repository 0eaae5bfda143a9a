// `tall` of micro.h for one instruction set; part of micro_kernels.h.
//
// The depth is cut into parts of kDepth, a part into four chains of kChain rows of w, and
//   out += ((c0 + c1) + c2) + c3,      c_i the sum over chain i, in the order of its rows.
// Many rows of x: one chain after the other, so that a tile holds kTileRows rows x up to 3 vectors and a chain's rows
// of w stay in the first-level cache for all of them. Few rows: the four chains at once, without which the additions
// would wait for each other. No sum across lanes is left, unlike in dot.
//
// Tiles: with 32 registers 8 rows x 3 vectors (8, since more pointers to x do not fit the registers): route at T =
// 1024, D = 2048, E = 36 takes 0.8 times what 3 rows x 2 vectors with four chains took, E = 166 0.77 times (float32,
// AVX-512, interleaved). With 16 registers 4 x 3 and 6 x 2, bound by multiplications, where 8 x 1 is by loads; and
// columns that do not fill a vector are loaded whole, with some of the next row behind them. T = 256, D = 2048,
// float32, AVX2 on Zen 4, one thread, minima, us against 8 x 1 with the last vector element by element:
//   E = 8 120 (116), 24 248 (364), 36 416 (1040), 40 432 (631), 64 709 (1027), 166 1857 (3130), 168 1914 (2690)
// Portable code, 16-byte vectors: E = 36 1300 (4220 with 32 bytes, of which its registers hold half).
// Tried: a part's rows of w asked for in order before its panels take their pieces. With w from memory, E = 166, the
// loop alone T = 1 / 4 / 16 took 158 / 213 / 302 us against 166 / 287 / 381 (AVX2); route and the layer, whose w is in
// part in the third-level cache, no less.
// One vector of columns (R = 16 with 32 registers) is bound by its loads, 9 for 8 multiplications, at 0.7 of what three
// vectors reach. Tried there: two chains at once, so that 16 sums hide the time of an addition: no faster.
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

constexpr int64_t kChain = kDepth / 4;
constexpr int64_t kTallRows = 48;  // rows that share a pass over a chain: a multiple of each kTileRows

// Rows of a tile of V vectors, when there are many.
template <int V>
constexpr int kTileRows = kRegisters == 32 ? 8
                          : V == 3         ? 4
                          : V == 2         ? 6
                                           : 8;

// V vectors of columns of w, of which the last has `last` columns of its own. What is loaded beyond those belongs to
// the next row, and no result takes it; the rows of which that would lie behind the end of w are copied first.
template <class Acc, class T, int V>
struct Panel {
  static constexpr int N = kWide<Acc>;
  const T* w;
  int64_t stride, last, safe;  // rows [0, safe) are read where they are
  T copied[N][V * N];

  // `rows` rows, the last of which ends w after column (V - 1) * N + last; `beyond` more rows follow them
  Panel(const T* w, int64_t stride, int64_t last, int64_t rows, int64_t beyond) : w(w), stride(stride), last(last) {
    const int64_t reach = N - last;  // of a row beyond its own columns
    const int64_t unsafe = (reach + stride - 1) / stride - beyond;
    safe = unsafe > 0 ? rows - (unsafe < rows ? unsafe : rows) : rows;
    for (int64_t d = safe; d < rows; ++d)
      for (int64_t i = 0; i < V * N; ++i) copied[d - safe][i] = i < (V - 1) * N + last ? w[d * stride + i] : T{};
  }

  [[gnu::always_inline]] void row(int64_t d, Vec<Acc, N> (&values)[V]) const {
    const T* from = d < safe ? w + d * stride : copied[d - safe];
    unrolled<V>([&](auto v) MOERGE_INLINE { pin(values[v] = load_vec<Acc, N>(from + v * N)); });
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

// Rows [0, M) of x, M a multiple of kTileRows<V>, chain by chain.
template <class Acc, class T, int V>
inline void tall_many(int64_t M, int64_t depth, const Acc* const* x, const Panel<Acc, T, V>& panel, Acc* const* out) {
  constexpr int N = kWide<Acc>, tile = kTileRows<V>;
  Vec<Acc, N> total[kTallRows][V];
  for (int64_t chain = 0; chain < 4; ++chain) {
    const int64_t begin = chain * kChain, end = depth < begin + kChain ? depth : begin + kChain;
    for (int64_t m0 = 0; m0 < M; m0 += tile) {
      Vec<Acc, N> sum[tile][V];
      one_chain<Acc, T, tile, V>(panel, begin, end, x + m0, sum);
      if (chain)
        unrolled<tile, V>([&](auto m, auto v) MOERGE_INLINE { total[m0 + m][v] += sum[m][v]; });
      else
        unrolled<tile, V>([&](auto m, auto v) MOERGE_INLINE { total[m0 + m][v] = sum[m][v]; });
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
  constexpr int few = kRegisters / 4 / V < 1 ? 1 : kRegisters / 4 / V < 4 ? kRegisters / 4 / V : 4;
  int64_t m = M / kTileRows<V> * kTileRows<V>;
  if (m) tall_many<Acc, T, V>(m, depth, x, panel, out);
  for (; m + few <= M; m += few) tall_few<Acc, T, few, V>(depth, x + m, panel, out + m);
  for (; m < M; ++m) tall_few<Acc, T, 1, V>(depth, x + m, panel, out + m);
}

template <class Acc, class T>
void tall(int64_t M, int64_t D, int64_t J, const Acc* const* x, const void* w_start, int64_t stride, Acc* const* out) {
  constexpr int N = kWide<Acc>;
  const Acc* part[kTallRows];
  Acc* to[kTallRows];
  for (int64_t begin = 0; begin < D; begin += kDepth) {
    const int64_t depth = D - begin < kDepth ? D - begin : kDepth, beyond = D - begin - depth;
    for (int64_t m0 = 0; m0 < M; m0 += kTallRows) {
      const int64_t count = M - m0 < kTallRows ? M - m0 : kTallRows;
      for (int64_t m = 0; m < count; ++m) part[m] = x[m0 + m] + begin;
      for (int64_t j = 0; j < J;) {
        for (int64_t m = 0; m < count; ++m) to[m] = out[m0 + m] + j;
        const auto panel = [&](auto v) MOERGE_INLINE {
          constexpr int V = v;
          const int64_t left = J - j, last = left < V * N ? left - (V - 1) * N : N;
          const T* w = static_cast<const T*>(w_start) + begin * stride + j;
          tall_part<Acc, T, V>(count, depth, part, {w, stride, last, depth, beyond}, to);
          j += V * N;
        };
        // three vectors at a time, but two and two where one would be left
        const int64_t vectors = (J - j + N - 1) / N;
        if (vectors == 3 || vectors > 4)
          panel(Index<3>{});
        else if (vectors > 1)
          panel(Index<2>{});
        else
          panel(Index<1>{});
      }
    }
  }
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
