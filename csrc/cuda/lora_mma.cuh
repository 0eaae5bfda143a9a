// The tensor-core paths of lora_shrink, lora_expand and lora_outer: when they are taken, and how a tile of a factor
// lies in shared memory for either order of its axes. Fragments are those of device.cuh.
//
// The first two multiply a left side [rows, k] by a tile of factors [k, n]. Seen as [E,R,C], a bank may have its
// columns adjacent (rank by rank) or its ranks adjacent (column by column, as a bank that is stored transposed); each
// is copied as it lies, 16 bytes at a time, and load_matrices transposes on the way to the registers where that is
// needed.
#pragma once

#include "lora.cuh"

namespace moerge::cuda {

constexpr int kPad = 8;  // elements behind every row in shared memory: eight rows then lie in different banks

template <class T>
constexpr DType dtype_for = std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;

inline bool is_16_bit(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

// Ranks rounded up to a size that there is a kernel for; 0: none.
inline int padded_ranks(int64_t R) { return R <= 16 ? 16 : R <= 32 ? 32 : R <= 64 ? 64 : R <= 128 ? 128 : 0; }

inline bool ranks_adjacent(const Factors& w) { return w.column != 1; }

// Against 16-byte copies along one of the two axes.
inline Reason against_copies(const Factors& w) {
  const int64_t line = ranks_adjacent(w) ? w.column : w.rank;
  if (!is_16_bit(w.dtype)) return "the factors are not of 16 bits";
  if (w.columns % 8) return "D or O is no multiple of 8";
  if (!padded_ranks(w.ranks)) return "the rank is above 128";
  if (ranks_adjacent(w) && (w.rank != 1 || w.ranks % 8)) return "the ranks lie side by side and are no multiple of 8";
  if (!aligned16(w.data, w.expert * 2) || line * 2 % 16) return "the factors do not begin at multiples of 16 bytes";
  return nullptr;
}

void lora_shrink_mma(const Lora&, const Matrix& x, const Factors& w, bool skip_zero, const Groups&, void* h, Stream);
void lora_expand_mma(const Lora&, const void* prepared, const Factors& w, const Matrix& base, const Matrix& bias,
                     const Matrix& out, Stream);
void lora_outer_mma(const Lora&, const Groups&, const void* q, const Matrix& x, int64_t columns, void* workspace,
                    void* out, DType dtype, Stream);  // where outer_workspace is not 0

// Starts the copy of the tile [ranks, columns) x [R, C) of one expert, which begins at column `first`, to `tile`: rows
// of columns + kPad elements, or with kRanksAdjacent rows of ranks + kPad. What lies outside the factor becomes 0.
template <class T, int kThreads, int ranks, int columns, bool kRanksAdjacent>
MOERGE_DEVICE void copy_tile(const Factors& w, int64_t expert, int64_t first, T* tile) {
  constexpr int kRow = kRanksAdjacent ? ranks : columns, kRows = kRanksAdjacent ? columns : ranks;
  const T* data = static_cast<const T*>(w.data) + expert * w.expert;
  for (int i = thread(); i < kRows * kRow / 8; i += kThreads) {
    const int row = i / (kRow / 8), chunk = i % (kRow / 8) * 8;
    const int64_t rank = kRanksAdjacent ? chunk : row, column = first + (kRanksAdjacent ? row : chunk);
    const bool valid = rank < w.ranks && column < w.columns;
    async_copy16(tile + row * (kRow + kPad) + chunk, valid ? data + rank * w.rank + column * w.column : data, valid);
  }
}

template <int ranks, int columns, bool kRanksAdjacent>
constexpr int kTileElements = kRanksAdjacent ? columns * (ranks + kPad) : ranks * (columns + kPad);

// The right fragments of two neighbouring 16 x 8 pieces: b[0], b[1] for n .. n+7 and b[2], b[3] for n+8 .. n+15, rows
// k .. k+15, of a tile in rows of `stride` elements; kByN: a row of the tile is one n, else one k.
template <bool kByN, class T>
MOERGE_DEVICE void load_right(uint32_t (&b)[4], const T* tile, int stride, int k, int n) {
  const int inner = lane() % 8, low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
  if constexpr (kByN)
    load_matrices<false>(b, tile + (n + high + inner) * stride + k + low);
  else
    load_matrices<true>(b, tile + (k + low + inner) * stride + n + high);
}

}  // namespace moerge::cuda
