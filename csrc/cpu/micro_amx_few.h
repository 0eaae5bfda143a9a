// The branch of few experts by the tiles of AMX (lora_few.h); part of micro_avx512.cpp.
//
//   h = x [A_1 ... A_E]^T        all experts' ranks side by side
//   y = base + h' [B_1 ... B_E]  h': weighted, rounded to bfloat16, and zero where the token has not chosen
//
// Both factors lie as tiles: pairs[column / 16][row / 2][column % 16], the features (ranks) d and d + 1 of a column in
// one number of 32 bits.
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

constexpr int64_t kFewColumns = 128;  // of y whose sums are held at a time

// Whether a half of any of these is infinite or a NaN: its exponent is all ones, and one more reaches the sign.
inline Bits overflowing(Bits pairs) { return ((pairs & 0x7f807f80) + 0x00800080) & 0x80008000; }

bool tiles_interleave(int64_t rows, int64_t columns, const void* w, int64_t stride, uint32_t* pairs, int64_t panel) {
  Bits strange{};
  for (int64_t c = 0; c < columns; c += kTile, pairs += panel) {
    const bf16* from = static_cast<const bf16*>(w) + c;
    for (int64_t r = 0; r < rows; r += 2, from += 2 * stride) {
      const Bits both = lower_halves<16>(from) | (lower_halves<16>(from + stride) << 16);
      strange |= overflowing(both);
      __builtin_memcpy(pairs + r / 2 * kTile, &both, sizeof both);
    }
  }
  for (int i = 0; i < 16; ++i)
    if (strange[i]) return false;
  return true;
}

// Two tiles of rows by two of columns: sums of `depth` products, the rows `bytes` apart, the second panel of w at
// `second`.
MOERGE_TILES inline void multiply_four(int64_t depth, const bf16* x, int64_t bytes, const uint32_t* w, int64_t second,
                                       float* sums, int64_t sums_bytes) {
  const bf16* below = x + kTile * bytes / static_cast<int64_t>(sizeof(bf16));
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  for (int64_t d = 0; d < depth; d += 32, w += 16 * kTile) {
    load_tile<4>(x + d, bytes), load_tile<6>(w, 64), multiply_tiles<0, 4, 6>();
    load_tile<5>(below + d, bytes), multiply_tiles<1, 5, 6>();
    load_tile<7>(w + second, 64), multiply_tiles<2, 4, 7>(), multiply_tiles<3, 5, 7>();
  }
  float* next = sums + kTile * sums_bytes / static_cast<int64_t>(sizeof(float));
  store_tile<0>(sums, sums_bytes), store_tile<1>(next, sums_bytes);
  store_tile<2>(sums + kTile, sums_bytes), store_tile<3>(next + kTile, sums_bytes);
}

// h' of one token; false where it is all zero
inline bool choose(const FewBranch& branch, const float* sums, const float* weights, const int32_t* experts,
                   bf16* left) {
  bool any = false;
  for (int64_t k = 0; k < branch.K; ++k) {
    float weight = 0;
    bool used = false;  // a weight of zero asks for nothing, weights whose sum is zero do
    for (int64_t other = 0; other < branch.K; ++other)
      if (experts[other] == experts[k]) weight += weights[other], used = used || weights[other] != 0;
    if (!used) continue;
    any = true;
    const int64_t from = experts[k] * branch.R;
    for (int64_t r = from; r < from + branch.R; r += kTile)
      narrow_vec(load_vec<float, 16>(sums + r) * weight, left + r);
  }
  return any;
}

MOERGE_TILES void tiles_few(const FewBranch& branch, int64_t M, const void* x, int64_t x_bytes,
                            const float* const* weights, const int32_t* const* experts, const void* const* base,
                            void* const* out) {
  constexpr int64_t kSums = kFewColumns + kTile;  // so that rows do not share a set of the cache
  alignas(64) float sums[kFewRows * (kFewRanks + kTile)];
  alignas(64) bf16 left[kFewRows * (kFewRanks + 2 * kTile)];
  bool chosen[kFewRows];
  const int64_t ranks = branch.ranks, sums_row = ranks + kTile, left_row = ranks + 2 * kTile;
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = kTile;
  set_tiles(shapes);
  const int64_t a_panel = branch.D / 2 * kTile, b_panel = ranks / 2 * kTile;
  // part i of n of the rows of `base` in the next columns [c, c + kFewColumns), which are asked for between products
  const auto fetch = [&](int64_t i, int64_t n, int64_t c) MOERGE_INLINE {
    const int64_t count = branch.O - c < kFewColumns ? branch.O - c : kFewColumns;
    for (int64_t m = M * i / n; m < M * (i + 1) / n; ++m)
      for (int64_t j = 0; j < count; j += 32) __builtin_prefetch(static_cast<const bf16*>(base[m]) + c + j);
  };
  for (int64_t r = 0; r < ranks; r += 2 * kTile) {
    fetch(r / (2 * kTile), ranks / (2 * kTile), 0);
    multiply_four(branch.D, static_cast<const bf16*>(x), x_bytes, branch.a + r / kTile * a_panel, a_panel, sums + r,
                  sums_row * sizeof(float));
  }
  __builtin_memset(left, 0, kFewRows * left_row * sizeof(bf16));
  for (int64_t m = 0; m < M; ++m)
    chosen[m] = choose(branch, sums + m * sums_row, weights[m], experts[m], left + m * left_row);
  for (int64_t c = 0; c < branch.O; c += kFewColumns) {
    const int64_t count = branch.O - c < kFewColumns ? branch.O - c : kFewColumns;
    for (int64_t j = 0; j < count; j += 2 * kTile) {
      fetch(j / (2 * kTile), kFewColumns / (2 * kTile), c + kFewColumns);
      multiply_four(ranks, left, left_row * sizeof(bf16), branch.b + (c + j) / kTile * b_panel,
                    j + kTile < count ? b_panel : 0, sums + j, kSums * sizeof(float));
    }
    for (int64_t m = 0; m < M; ++m) {
      const bf16* from = static_cast<const bf16*>(base[m]) + c;
      bf16* to = static_cast<bf16*>(out[m]) + c;
      if (chosen[m])
        add_row<bf16, bf16>(count, from, sums + m * kSums, to);
      else if (from != to)
        __builtin_memcpy(to, from, count * sizeof(bf16));
    }
  }
  end_tiles();
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
