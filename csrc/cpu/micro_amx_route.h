// The router's part of `Tiles` (micro.h): float32 gates as sums of three numbers of bfloat16, and products of them with
// tokens of bfloat16 as they lie in memory; part of micro_avx512.cpp.
//
//   g = g0 + g1 + g2,  g0 = bf16(g), g1 = bf16(g - g0), g2 = bf16(g - g0 - g1):  24 bits, as float32 has
//
// so that x . g is summed in float32 of exact products, three columns for each expert.
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

constexpr int64_t kScoreDepth = 512;  // features of a part of the scores

// Takes the next part of each number off it.
inline Bits next_part(Vec<float, 16>& left) {
  const Bits part = upper_halves(left);
  left -= reinterpret_cast<Vec<float, 16>>(part);
  return part;
}

// `count` experts, side by side, at most 16 (all: exactly so many).
template <bool all>
inline void split_some(int64_t D, int64_t E, int64_t count, const float* gates, int64_t stride, int64_t width,
                       uint32_t* pairs, float* sums) {
  const auto load = [&](const float* from) MOERGE_INLINE {
    if constexpr (all) return load_vec<float, 16>(from);
    Vec<float, 16> values{};
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
    return values;
  };
  Vec<float, 16> sum{};
  for (int64_t d = 0; d < D; d += 2) {
    Vec<float, 16> first = load(gates + d * stride), second = load(gates + (d + 1) * stride);
    sum += first + second;
    for (int part = 0; part < kGateParts; ++part) {
      const Bits low = next_part(first), both = (low >> 16) | next_part(second);
      uint32_t* to = pairs + d / 2 * width + part * E;
      if constexpr (all)
        __builtin_memcpy(to, &both, sizeof both);
      else
        for (int64_t i = 0; i < count; ++i) to[i] = both[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) sums[i] = sum[i];
}

void split_tall(int64_t D, int64_t E, const float* gates, int64_t stride, int64_t width, uint32_t* pairs, float* sums) {
  int64_t e = 0;
  for (; e + 16 <= E; e += 16) split_some<true>(D, E, 16, gates + e, stride, width, pairs + e, sums + e);
  if (e < E) split_some<false>(D, E, E - e, gates + e, stride, width, pairs + e, sums + e);
}

// Expert by expert: 16 features of one at a time.
void split_rows(int64_t D, int64_t E, const float* gates, int64_t stride, int64_t width, uint32_t* pairs, float* sums) {
  for (int64_t e = 0; e < E; ++e) {
    Vec<float, 16> sum{};
    for (int64_t d = 0; d < D; d += 16) {
      Vec<float, 16> left = load_vec<float, 16>(gates + e * stride + d);
      sum += left;
      for (int part = 0; part < kGateParts; ++part) {
        const Bits halves = next_part(left);
        uint32_t* to = pairs + d / 2 * width + part * E + e;
        for (int i = 0; i < 8; ++i) to[i * width] = (halves[2 * i] >> 16) | halves[2 * i + 1];
      }
    }
    sums[e] = reduce<float, 16>(sum);
  }
}

void tiles_split(int64_t D, int64_t E, const float* gates, int64_t feature_stride, int64_t expert_stride, int64_t width,
                 uint32_t* pairs, float* sums) {
  if (feature_stride == 1)
    split_rows(D, E, gates, expert_stride, width, pairs, sums);
  else
    split_tall(D, E, gates, feature_stride, width, pairs, sums);
}

// The moments of n numbers of bfloat16, n a multiple of 32.
inline void add_moments(int64_t n, const bf16* x, Moments* to) {
  const Bits ones = Bits{} + 0x3f803f80;
  Vec<float, 16> sums[2] = {}, squares[2] = {};
  for (int64_t at = 0; at < n; at += 64) {
    Bits first, second{};
    __builtin_memcpy(&first, x + at, sizeof first);
    if (at + 32 < n) __builtin_memcpy(&second, x + at + 32, sizeof second);
    add_products(sums[0], first, ones), add_products(squares[0], first, first);
    add_products(sums[1], second, ones), add_products(squares[1], second, second);
  }
  to->sum += reduce<float, 16>(sums[0] + sums[1]);
  to->squares += reduce<float, 16>(squares[0] + squares[1]);
}

// Two tiles of tokens by one or two of columns. The moments are taken part by part, before the part's products, so that
// these find it in the first-level cache.
template <int columns>
MOERGE_TILES void score_columns(int64_t D, int64_t width, const bf16* x, int64_t stride, const uint32_t* pairs,
                                float* sums, Moments* moments) {
  const int64_t bytes = stride * sizeof(bf16), row = width * sizeof(uint32_t);
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  for (int64_t begin = 0; begin < D; begin += kScoreDepth) {
    const int64_t end = D - begin < kScoreDepth ? D : begin + kScoreDepth;
    if (moments)
      for (int64_t m = 0; m < kScoreRows; ++m) add_moments(end - begin, x + m * stride + begin, moments + m);
    for (int64_t d = begin; d < end; d += 32) {
      load_tile<4>(x + d, bytes), load_tile<5>(x + kTile * stride + d, bytes);
      load_tile<6>(pairs + d / 2 * width, row), multiply_tiles<0, 4, 6>(), multiply_tiles<1, 5, 6>();
      if constexpr (columns == 1) continue;
      load_tile<7>(pairs + d / 2 * width + kTile, row), multiply_tiles<2, 4, 7>(), multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(sums, row), store_tile<1>(sums + kTile * width, row);
  if constexpr (columns == 1) return;
  store_tile<2>(sums + kTile, row), store_tile<3>(sums + kTile * width + kTile, row);
}

MOERGE_TILES void tiles_scores(int64_t D, int64_t width, const void* x, int64_t stride, const uint32_t* pairs,
                               float* sums, Moments* moments) {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = kTile;
  set_tiles(shapes);
  const bf16* rows = static_cast<const bf16*>(x);
  int64_t c = 0;
  for (; c + 2 * kTile <= width; c += 2 * kTile)
    score_columns<2>(D, width, rows, stride, pairs + c, sums + c, c ? nullptr : moments);
  if (c < width) score_columns<1>(D, width, rows, stride, pairs + c, sums + c, c ? nullptr : moments);
  end_tiles();
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
