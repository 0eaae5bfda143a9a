// `Tiles` of micro.h: products of bfloat16 by the tile unit of AMX; part of micro_avx512.cpp.
//
// A tile is 16 rows of 64 bytes. One multiplication takes 16 rows of x with 32 features (or of h with 16 ranks) and 16
// columns of w, whose rows lie in pairs, interleaved, and adds to 16 x 16 sums in float32. The unit takes subnormal
// numbers for zero.
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

constexpr int64_t kPairRows = 8;  // of a tile of w that expand multiplies: 16 ranks
constexpr int64_t kShrinkRows = 48;
constexpr int64_t kTileAhead = 512;  // bytes of a row of w that are asked for early

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#define MOERGE_TILES __attribute__((target("amx-tile,amx-bf16")))
MOERGE_TILES inline void set_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
MOERGE_TILES inline void end_tiles() { asm volatile("tilerelease"); }
template <int tile>
MOERGE_TILES inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
MOERGE_TILES inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
MOERGE_TILES inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int x, int w>
MOERGE_TILES inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(x), "i"(w));
}

// 16 ranks of up to 48 rows: sums [48,16]
MOERGE_TILES void tiles_shrink_panel(int64_t M, int64_t D, const bf16* const* x, const bf16* w, int64_t stride,
                                     float* sums) {
  alignas(64) bf16 rows[kShrinkRows * kDepth];
  alignas(64) uint32_t pairs[kDepth / 2 * kTile];
  TileShapes shapes;
  for (int i = 0; i < 7; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = kTile;
  set_tiles(shapes);
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>();
  for (int64_t begin = 0; begin < D; begin += kDepth) {
    const int64_t depth = D - begin < kDepth ? D - begin : kDepth;
    for (int64_t m = 0; m < M; ++m)
      for (int64_t d = 0; d < depth; d += 32)  // a whole row by memcpy is `rep movsq`
        __builtin_memcpy(rows + m * kDepth + d, x[m] + begin + d, 32 * sizeof(bf16));
    for (int64_t d = 0; d < depth; d += 2) {
      const bf16* row = w + (begin + d) * stride;
      interleave(row, row + stride, pairs + d / 2 * kTile);
    }
    for (int64_t d = 0; d < depth; d += 32) {
      load_tile<3>(pairs + d / 2 * kTile, 64);
      load_tile<4>(rows + d, kDepth * sizeof(bf16));
      multiply_tiles<0, 4, 3>();
      if (M <= kTile) continue;
      load_tile<5>(rows + kTile * kDepth + d, kDepth * sizeof(bf16));
      multiply_tiles<1, 5, 3>();
      if (M <= 2 * kTile) continue;
      load_tile<6>(rows + 2 * kTile * kDepth + d, kDepth * sizeof(bf16));
      multiply_tiles<2, 6, 3>();
    }
  }
  store_tile<0>(sums, 64), store_tile<1>(sums + kTile * kTile, 64), store_tile<2>(sums + 2 * kTile * kTile, 64);
  end_tiles();
}

void tiles_shrink(int64_t M, int64_t D, int64_t R, const void* const* x, const void* w, int64_t stride,
                  float* const* out) {
  alignas(64) float sums[kShrinkRows * kTile];
  for (int64_t m0 = 0; m0 < M; m0 += kShrinkRows) {
    const int64_t count = M - m0 < kShrinkRows ? M - m0 : kShrinkRows;
    for (int64_t r = 0; r < R; r += kTile) {
      tiles_shrink_panel(count, D, reinterpret_cast<const bf16* const*>(x + m0), static_cast<const bf16*>(w) + r,
                         stride, sums);
      for (int64_t m = 0; m < count; ++m) store_vec<float, 16>(load_vec<float, 16>(sums + m * kTile), out[m0 + m] + r);
    }
  }
}

// One row: to = from + add, of whichever types
template <class From, class To>
inline void add_row(int64_t J, const void* from, const float* add, void* to) {
  for (int64_t j = 0; j < J; j += 16) {
    const Vec<float, 16> value = load_vec<float, 16>(static_cast<const From*>(from) + j) + load_vec<float, 16>(add + j);
    if constexpr (__is_same(To, bf16))
      narrow_tile(value, static_cast<bf16*>(to) + j);
    else
      store_vec<float, 16>(value, static_cast<float*>(to) + j);
  }
}

MOERGE_TILES void tiles_expand(int64_t M, int64_t R, int64_t J, const float* const* h, const void* const* w,
                               const TileRow* from, const TileRow* to) {
  // the distance of rows, so that they do not share a set of the cache
  constexpr int64_t kSums = kTileColumns + kTile, kBytes = kSums * sizeof(float);
  alignas(64) float sums[kTile * kSums];
  alignas(64) uint32_t pairs[kTileRanks / 2 * kTileColumns];
  alignas(64) bf16 left[kTileRanks * kTile];
  TileShapes shapes;
  for (int i = 0; i < 4; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = kTile;
  for (int i = 5; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = kPairRows;
  shapes.row_bytes[4] = 4 * kPairRows, shapes.rows[4] = kTile;
  set_tiles(shapes);
  uint32_t* pair = pairs;  // [J/16][R/2][16]
  for (int64_t j = 0; j < J; j += kTile)
    for (int64_t r = 0; r < R; r += 2, pair += kTile)
      interleave(static_cast<const bf16*>(w[r]) + j, static_cast<const bf16*>(w[r + 1]) + j, pair);
  for (int64_t m0 = 0; m0 < M; m0 += kTile) {
    const int64_t count = M - m0 < kTile ? M - m0 : kTile;
    for (int64_t m = 0; m < count; ++m)  // [R/16][16][16]
      for (int64_t r = 0; r < R; r += kTile) narrow_vec(load_vec<float, 16>(h[m0 + m] + r), left + (r + m) * kTile);
    // four tiles of sums at a time: one would wait for each multiplication
    int64_t j = 0;
    for (; j + 4 * kTile <= J; j += 4 * kTile) {
      clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
      for (int64_t r = 0; r < R; r += kTile) {
        const uint32_t* right = pairs + (j * R + r * kTile) / 2;
        load_tile<4>(left + r * kTile, 4 * kPairRows);
        load_tile<5>(right, 64), multiply_tiles<0, 4, 5>();
        load_tile<6>(right + R / 2 * kTile, 64), multiply_tiles<1, 4, 6>();
        load_tile<7>(right + R * kTile, 64), multiply_tiles<2, 4, 7>();
        load_tile<5>(right + R / 2 * 3 * kTile, 64), multiply_tiles<3, 4, 5>();
      }
      store_tile<0>(sums + j, kBytes), store_tile<1>(sums + j + kTile, kBytes);
      store_tile<2>(sums + j + 2 * kTile, kBytes), store_tile<3>(sums + j + 3 * kTile, kBytes);
    }
    for (; j < J; j += kTile) {
      clear_tile<0>();
      for (int64_t r = 0; r < R; r += kTile) {
        load_tile<4>(left + r * kTile, 4 * kPairRows);
        load_tile<5>(pairs + (j * R + r * kTile) / 2, 64);
        multiply_tiles<0, 4, 5>();
      }
      store_tile<0>(sums + j, kBytes);
    }
    for (int64_t m = 0; m < count; ++m) {
      const TileRow source = from[m0 + m], target = to[m0 + m];
      const float* add = sums + m * kSums;
      const auto run = source.narrow ? (target.narrow ? add_row<bf16, bf16> : add_row<bf16, float>)
                                     : (target.narrow ? add_row<float, bf16> : add_row<float, float>);
      run(J, source.data, add, target.data);
    }
  }
  end_tiles();
}

// 16 rows of w are the left operand as they lie, so that w is read once and moved nowhere.
MOERGE_TILES void tiles_linear(int64_t M, int64_t N, int64_t D, const uint32_t* pairs, const void* w, int64_t stride,
                               float* const* out) {
  constexpr int64_t ahead = kTileAhead / sizeof(bf16);
  alignas(64) float sums[kTile * kTile];
  TileShapes shapes;
  shapes.row_bytes[1] = 64, shapes.rows[2] = kTile;
  shapes.row_bytes[0] = shapes.row_bytes[2] = static_cast<uint16_t>(4 * M);
  for (int64_t n = 0; n < N; n += kTile) {
    const int64_t count = N - n < kTile ? N - n : kTile;
    if (n == 0 || count < kTile) {
      shapes.rows[0] = shapes.rows[1] = static_cast<uint8_t>(count);
      set_tiles(shapes);
    }
    clear_tile<0>();
    const bf16* rows = static_cast<const bf16*>(w) + n * stride;
    for (int64_t d = 0; d < D; d += 32) {
      const bf16* soon = d + ahead < D ? rows + d + ahead : rows + kTile * stride + (d + ahead - D);
      for (int64_t i = 0; i < kTile; ++i) __builtin_prefetch(soon + i * stride);
      load_tile<1>(rows + d, stride * sizeof(bf16));
      load_tile<2>(pairs + d / 2 * M, 4 * M);
      multiply_tiles<0, 1, 2>();
    }
    store_tile<0>(sums, 4 * M);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t i = 0; i < count; ++i) out[m][n + i] = sums[i * M + m];
  }
  end_tiles();
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
