// W of routed_decode.cu: how its rows come to a block, and their product with the tokens.
//
// A block has kColumns rows of W at a time and goes through D in groups of 32 * kSteps columns per warp. A group is
// fetched to the second-level cache, loaded to one of kStaged places in shared memory, where no thread reads what
// another one has loaded, and multiplied by tensor cores: 32 rows of W by 8 or 16 columns of tokens. k can be dealt to
// the fragments in any order, so each lane takes 16 bytes of a row of W and of a row of x, and uses them for two
// products. Where shared memory is too small, W goes to registers directly.
#pragma once

#include "lora_mma.cuh"

namespace moerge::cuda {

constexpr int kColumns = 32;  // of y per block at a time: rows of W
constexpr int kSteps = 2;     // of 32 columns of D each per warp: a group
constexpr int kStaged = 2;    // groups that shared memory has room for

template <class T>
MOERGE_DEVICE void unpack(const Bytes16& words, float (&out)[8]) {
  for (int j = 0; j < 4; ++j) out[2 * j] = low_half<T>(words.word[j]), out[2 * j + 1] = high_half<T>(words.word[j]);
}

template <class T, int kTokens, int kThreads>
struct DecodeWeight {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = kColumns / 8;                // of W per lane
  static constexpr int kStage = kSteps * kRows * kThreads;  // pieces of 16 bytes of a group
  static constexpr int kTiles = (kTokens + 7) / 8;          // of 8 columns of tokens
  using Product = float[kRows / 2][kTiles][4];              // one lane's part of W x
  const Decode& p;
  int64_t blocks;  // of the launch
  int staged;      // kStaged, or 0: straight to registers
  Bytes16* stage;  // [staged, kSteps, kRows, kThreads]

  MOERGE_DEVICE const T* token(int64_t t) const { return static_cast<const T*>(p.route.x.data) + t * p.route.x.stride; }

  // How many blocks of 32 columns of D a warp has, and which: two neighbours at a time, 128 bytes of a row.
  MOERGE_DEVICE int steps() const { return static_cast<int>((p.route.D + 64 * kWarps - 1) / (64 * kWarps) * 2); }
  MOERGE_DEVICE int column(int i) const { return ((i / 2 * kWarps + warp()) * 2 + i % 2) * 32 + lane() % 4 * 8; }

  // Whether there are rows i * 8 .. i * 8 + 7 of W for the block of y, and this lane's of them. O is a multiple of 8.
  MOERGE_DEVICE bool has_rows(int64_t block, int i) const { return block * kColumns + i * 8 < p.b.columns; }
  MOERGE_DEVICE const T* weight_row(int64_t block, int i) const {
    return static_cast<const T*>(p.weight.data) + (block * kColumns + i * 8) * p.weight.stride +
           lane() / 4 * p.weight.stride;
  }

  MOERGE_DEVICE int groups() const { return (steps() + kSteps - 1) / kSteps; }

  // Asks for group g of the block's first columns of y to be brought to the second-level cache.
  MOERGE_DEVICE void fetch(int g) const {
    const int c = (g * kWarps + warp()) * 64 + lane() % 4 * 16;
    for (int i = 0; g < groups() && i < kRows; ++i)
      if (has_rows(block_x(), i) && c < p.route.D) prefetch(weight_row(block_x(), i) + c);
  }

  // Starts to load a group to shared memory: group g of the block of y, or of the next ones if it has no more.
  MOERGE_DEVICE void issue(int64_t block, int g, Bytes16* to) const {
    for (; g >= groups(); g -= groups()) block += blocks;
    for (int j = 0; has_rows(block, 0) && j < kSteps; ++j) {
      const int c = column(g * kSteps + j);
      for (int i = 0; i < kRows; ++i) {
        const bool valid = has_rows(block, i) && c < p.route.D;
        async_copy16(to + (j * kRows + i) * kThreads, valid ? weight_row(block, i) + c : p.weight.data, valid);
      }
    }
    async_commit();
  }

  // Multiplies group g by the tokens, and starts to load the one that takes its place, the `number`-th of all.
  MOERGE_DEVICE void take(int64_t block, int g, int number, Product& sum) const {
    Bytes16* staged_at = stage + number % kStaged * kStage + thread();
    Bytes16 right[kSteps][kTiles];
    for (int j = 0; j < kSteps; ++j) {
      const int c = column(g * kSteps + j);
      for (int tile = 0; tile < kTiles; ++tile) {
        const int t = tile * 8 + lane() / 4;
        right[j][tile] = c < p.route.D && t < p.route.T ? load16_once(token(t) + c) : Bytes16{};
      }
    }
    if (staged) async_wait<kStaged - 1>();
    for (int j = 0; j < kSteps; ++j) {
      Bytes16 words[kRows];
      for (int i = 0; i < kRows; ++i) {
        const int c = column(g * kSteps + j);
        if (staged)
          words[i] = load16(staged_at + (j * kRows + i) * kThreads);
        else if (has_rows(block, i) && c < p.route.D)
          words[i] = load16_once(weight_row(block, i) + c);
        else
          words[i] = {};
      }
      for (int i = 0; i < kRows; i += 2)
        for (int tile = 0; tile < kTiles; ++tile)
          for (int k = 0; k < 4; k += 2)
            mma<T>(sum[i / 2][tile],
                   {words[i].word[k], words[i + 1].word[k], words[i].word[k + 1], words[i + 1].word[k + 1]},
                   {right[j][tile].word[k], right[j][tile].word[k + 1]});
    }
    if (staged) issue(block, g + kStaged, staged_at);
  }

  // products [kWarps, kColumns, kTokens]
  MOERGE_DEVICE static void keep(const Product& sum, float* products) {
    for (int i = 0; i < kRows / 2; ++i)
      for (int tile = 0; tile < kTiles; ++tile)
        for (int j = 0; j < 4; ++j) {
          const int column = i * 16 + lane() / 4 + j / 2 * 8, t = tile * 8 + lane() % 4 * 2 + j % 2;
          if (t < kTokens) products[(warp() * kColumns + column) * kTokens + t] = sum[i][tile][j];
        }
  }
};

}  // namespace moerge::cuda
