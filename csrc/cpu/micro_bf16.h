// Numbers of bfloat16 in vectors of AVX-512, and the products of `Tiles` (micro.h) that pay without a tile unit: by the
// instruction that adds two products to each of 16 sums (AVX512_BF16; on AMD since Zen 4). Part of micro_avx512.cpp.
//
// w lies in pairs as for tiles: the features (ranks) d and d + 1 of a column in one number of 32 bits. A pair of x (of
// h) is the other operand for all columns, as it lies in memory. Subnormal numbers are taken for zero.
//
// routed_lora_, E = 8, K = 2, one thread (Zen 4), ms against widening to float32, interleaved minima:
//   SmolLM2's 210 layers, T = 512: R = 8 84 (146), 16 104 (174), 64 295 (505); R = 16, T = 32: 16.2 (17.9)
//   seven of 2048 -> 2048, R = 16, T = 256: E = 36 9.5 (12.6), E = 166 31 (36)
// Of the 76 that lora_apply_ takes of the 104, the products would be 42 at the unit's rate, 236 GFLOP/s. y in the
// registers of the products: 80.7 against 84.4 by sums of their own; its next columns asked for: 79.1; h rounded for
// all pieces of y at once, pieces whose pairs stay in the cache: 75. Tried, no gain: asking for the next rows of w.
// Tasks of 128 pairs: 76.7 of the 79.1, but 6.2 against 5.6 at E = 36.
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

constexpr int64_t kTile = kTileWidth;
constexpr int64_t kPairDepth = 512;     // features whose pairs of w stay in the first-level cache
constexpr int64_t kExpandPairs = 4096;  // those of a piece of expand: 16 KB
constexpr int64_t kPairedRows = 48;
constexpr int64_t kVectorRows = 8;  // chains of a tile: an instruction takes 6 cycles, and each cycle begins one

using Bits = Lanes<float, 16>::u32;

// N columns of two rows of w, in pairs
template <int N = 16>
inline void interleave(const bf16* first, const bf16* second, uint32_t* out) {
  const auto both = lower_halves<N>(first) | (lower_halves<N>(second) << 16);
  __builtin_memcpy(out, &both, sizeof both);
}

// The nearest numbers of bfloat16, in the upper halves; a NaN stays one.
inline Bits upper_halves(Vec<float, 16> values) {
  const Bits bits = reinterpret_cast<Bits>(values);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return values != values ? Bits{} + 0x7fc00000 : rounded;
}

// 16 numbers, rounded as `narrow` does
inline void narrow_vec(Vec<float, 16> values, bf16* out) {
  using U16 = Lanes<float, 16>::u16;
  *reinterpret_cast<U16*>(out) = __builtin_convertvector(upper_halves(values) >> 16, U16);
}

// The same by one instruction, which takes subnormal numbers for zero as the tiles do
template <int N = 16>
inline void narrow_tile(Vec<float, N> values, bf16* out) {
  using U16 = typename Lanes<float, N>::u16;
  U16 halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(values));
  *reinterpret_cast<U16*>(out) = halves;
}

// to += x . y, of 32 numbers of bfloat16, two by two
inline void add_products(Vec<float, 16>& to, Bits x, Bits y) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(to) : "v"(x), "v"(y));
}

// The same for one pair and N pairs of w
template <int N>
[[gnu::always_inline]] inline void add_pair(Vec<float, N>& to, const typename Lanes<float, N>::u32& w,
                                            const uint32_t* pair) {
  if constexpr (N == 16)
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(to) : "v"(w), "m"(*pair));
  else
    asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(to) : "v"(w), "m"(*pair));
}

// `depth` features of kVectorRows rows and N ranks; pairs [depth/2][N]
template <int N>
inline void shrink_rows(int64_t depth, const bf16* const* x, const uint32_t* pairs, bool first, float* const* out) {
  Vec<float, N> sum[kVectorRows];
  unrolled<kVectorRows>([&](auto m) MOERGE_INLINE { sum[m] = first ? Vec<float, N>{} : load_vec<float, N>(out[m]); });
  for (int64_t d = 0; d < depth; d += 2, pairs += N) {
    typename Lanes<float, N>::u32 w;
    __builtin_memcpy(&w, pairs, sizeof w);
    unrolled<kVectorRows>([&](auto m)
                              MOERGE_INLINE { add_pair<N>(sum[m], w, reinterpret_cast<const uint32_t*>(x[m] + d)); });
  }
  unrolled<kVectorRows>([&](auto m) MOERGE_INLINE { store_vec<float, N>(sum[m], out[m]); });
}

// N ranks, from w and out[m] + r on
template <int N>
inline void shrink_panel(int64_t M, int64_t D, const void* const* x, const bf16* w, int64_t stride, int64_t r,
                         float* const* out) {
  alignas(64) uint32_t pairs[kPairDepth / 2 * N];
  alignas(64) float unused[N];
  for (int64_t begin = 0; begin < D; begin += kPairDepth) {
    const int64_t depth = D - begin < kPairDepth ? D - begin : kPairDepth;
    for (int64_t d = 0; d < depth; d += 2) {
      const bf16* row = w + (begin + d) * stride;
      interleave<N>(row, row + stride, pairs + d / 2 * N);
    }
    for (int64_t m = 0; m < M; m += kVectorRows) {
      const bf16* rows[kVectorRows];
      float* to[kVectorRows];
      for (int64_t i = 0; i < kVectorRows; ++i) {  // behind the last row, that row again
        rows[i] = static_cast<const bf16*>(x[m + i < M ? m + i : M - 1]) + begin;
        to[i] = m + i < M ? out[m + i] + r : unused;
      }
      shrink_rows<N>(depth, rows, pairs, begin == 0, to);
    }
  }
}

void vectors_shrink(int64_t M, int64_t D, int64_t R, const void* const* x, const void* w, int64_t stride,
                    float* const* out) {
  const bf16* from = static_cast<const bf16*>(w);
  int64_t r = 0;
  for (; r + 16 <= R; r += 16) shrink_panel<16>(M, D, x, from + r, stride, r, out);
  if (r < R) shrink_panel<8>(M, D, x, from + r, stride, r, out);
}

// Columns [j, j + 16 columns) of kVectorRows rows: h lies [R/2][kVectorRows]
template <int columns>
inline void expand_columns(int64_t R, int64_t j, const uint32_t* h, const uint32_t* pairs, const TileRow* from,
                           const TileRow* to) {
  Vec<float, 16> sum[kVectorRows][columns];
  unrolled<kVectorRows>([&](auto m) MOERGE_INLINE {
    __builtin_prefetch(static_cast<const char*>(from[m].data) + (j + 64) * (from[m].narrow ? 2 : 4));
    if (from[m].narrow)
      unrolled<columns>([&](auto n) MOERGE_INLINE {
        sum[m][n] = load_vec<float, 16>(static_cast<const bf16*>(from[m].data) + j + n * 16);
      });
    else
      unrolled<columns>([&](auto n) MOERGE_INLINE {
        sum[m][n] = load_vec<float, 16>(static_cast<const float*>(from[m].data) + j + n * 16);
      });
  });
  for (int64_t r = 0; r < R; r += 2, h += kVectorRows, pairs += 16) {
    Bits w[columns];
    unrolled<columns>([&](auto n) MOERGE_INLINE {
      __builtin_memcpy(&w[n], pairs + n * R / 2 * 16, sizeof w[n]);
      asm("" : "+v"(w[n]));
    });
    unrolled<kVectorRows, columns>([&](auto m, auto n) MOERGE_INLINE { add_pair<16>(sum[m][n], w[n], h + m); });
  }
  unrolled<kVectorRows>([&](auto m) MOERGE_INLINE {
    if (to[m].narrow)
      unrolled<columns>([&](auto n)
                            MOERGE_INLINE { narrow_tile(sum[m][n], static_cast<bf16*>(to[m].data) + j + n * 16); });
    else
      unrolled<columns>(
          [&](auto n) MOERGE_INLINE { store_vec<float, 16>(sum[m][n], static_cast<float*>(to[m].data) + j + n * 16); });
  });
}

// h of M rows, rounded: [M/8][R/2][8]
inline void pair_rows(int64_t M, int64_t R, const float* const* h, uint32_t* pairs) {
  for (int64_t m = 0; m < M; ++m) {
    uint32_t* to = pairs + m / kVectorRows * (R / 2 * kVectorRows) + m % kVectorRows;
    for (int64_t r = 0; r < R; r += 8, to += 4 * kVectorRows) {
      uint32_t four[4];
      narrow_tile<8>(load_vec<float, 8>(h[m] + r), reinterpret_cast<bf16*>(four));
      unrolled<4>([&](auto i) MOERGE_INLINE { to[i * kVectorRows] = four[i]; });
    }
  }
}

// Up to kPairedRows rows
inline void expand_rows(int64_t M, int64_t R, int64_t J, const float* const* h, const void* const* w,
                        const TileRow* from, const TileRow* to) {
  alignas(64) uint32_t pairs[kExpandPairs];
  alignas(64) uint32_t left[kPairedRows * kTileRanks / 2];
  alignas(64) float unused[kTileColumns];
  TileRow source[kPairedRows], target[kPairedRows];
  for (int64_t m = 0; m < kPairedRows; ++m) {
    source[m] = m < M ? from[m] : TileRow{unused, false};
    target[m] = m < M ? to[m] : TileRow{unused, false};
  }
  pair_rows(M, R, h, left);
  const int64_t width = kExpandPairs / (R / 2) / 32 * 32;
  for (int64_t begin = 0; begin < J; begin += width) {
    const int64_t end = J - begin < width ? J : begin + width;
    uint32_t* pair = pairs;  // [width/16][R/2][16]
    for (int64_t j = begin; j < end; j += 16)
      for (int64_t r = 0; r < R; r += 2, pair += 16)
        interleave(static_cast<const bf16*>(w[r]) + j, static_cast<const bf16*>(w[r + 1]) + j, pair);
    for (int64_t m = 0; m < M; m += kVectorRows) {
      const uint32_t* rows = left + m * R / 2;
      int64_t j = begin;
      for (; j + 32 <= end; j += 32) expand_columns<2>(R, j, rows, pairs + (j - begin) * R / 2, source + m, target + m);
      if (j < end) expand_columns<1>(R, j, rows, pairs + (j - begin) * R / 2, source + m, target + m);
    }
  }
}

void vectors_expand(int64_t M, int64_t R, int64_t J, const float* const* h, const void* const* w, const TileRow* from,
                    const TileRow* to) {
  for (int64_t m = 0; m < M; m += kPairedRows)
    expand_rows(M - m < kPairedRows ? M - m : kPairedRows, R, J, h + m, w, from + m, to + m);
}

// A tile of `linear`: numbers of bfloat16 as they lie, two products in each lane; D a multiple of 32
struct Paired {
  using X = bf16;
  using W = bf16;
  template <int M, int N, bool fetching = false>
  static void run(int64_t D, const bf16* const* x, const void* const* w, float* const* out, int64_t n0,
                  const void* const* next = nullptr) {
    constexpr int64_t ahead = kAhead / sizeof(bf16);
    Vec<float, 16> sum[M][N] = {};
    for (int64_t d = 0; d < D; d += 32) {
      Bits b[N];
      unrolled<N>([&](auto n) MOERGE_INLINE {
        __builtin_memcpy(&b[n], static_cast<const bf16*>(w[n]) + d, sizeof b[n]);
        asm("" : "+v"(b[n]));
        if constexpr (fetching)
          __builtin_prefetch(d + ahead < D ? static_cast<const bf16*>(w[n]) + d + ahead
                                           : static_cast<const bf16*>(next[n]) + (d + ahead - D));
      });
      unrolled<M>([&](auto m) MOERGE_INLINE {
        Bits a;
        __builtin_memcpy(&a, x[m] + d, sizeof a);
        asm("" : "+v"(a));
        unrolled<N>([&](auto n) MOERGE_INLINE { add_products(sum[m][n], a, b[n]); });
      });
    }
    unrolled<M, N>([&](auto m, auto n) MOERGE_INLINE { out[m][n0 + n] = reduce<float, 16>(sum[m][n]); });
  }
};

void vectors_linear(int64_t M, int64_t N, int64_t D, const void* const* x, const void* w, int64_t stride,
                    float* const* out) {
  linear_by<Paired>(M, N, D, reinterpret_cast<const bf16* const*>(x), w, stride, out);
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
