// How the expand on tensor cores cuts its work, and what lora_expand_sort.cu leaves in the workspace for
// lora_expand_mma.cu to read:
//
//   hidden [T, K, ranks]   H in the type of w; what is not used, and what lies behind the last rank, is 0
//   of each chunk of tokens, one after the other:
//     rows [K, tokens]     the chunk's tokens sorted by their expert of slot k, counted from the chunk's first; 16 bits
//     tiles [K, tiles, 2]  up to kTileRows neighbours in that order that share an expert: the expert, or -1 where the
//                          slot is not used; where they begin, and in the upper 16 bits how many they are. 0 of them:
//                          the end
//   weights [T, K]         0 where the slot is not used
#pragma once

#include "lora_mma.cuh"

namespace moerge::cuda {

constexpr int kTileRows = 16;
constexpr int kExpandColumns = 32;  // of a block
constexpr int64_t kMostExperts = 4096, kMostSlots = 64;

struct ExpandPlan {
  int K, ranks;       // ranks as padded
  int tokens, tiles;  // of a chunk, and of a slot of it at most
  int rows_bytes, list_bytes;
  int64_t chunks;
  int64_t lists, weights, bytes;  // where they begin in the workspace, and its size

  ExpandPlan(const Lora& p, const Factors& w) : K(static_cast<int>(p.K)), ranks(padded_ranks(p.R)) {
    const int64_t across = ceil_div(w.columns, kExpandColumns);
    cut(kExpandMostTokens, p);
    while (tokens > kExpandLeastTokens && (chunks * across < kExpandBlocks || shared() > kMostShared))
      cut(tokens / 2, p);
    lists = p.T * p.K * ranks * 2;
    weights = lists + chunks * list_bytes;
    bytes = weights + p.T * p.K * 4;
  }

  // Of a block: its lists and, between the slots, its sums.
  size_t shared() const { return list_bytes + (K > 1 ? tokens * kExpandColumns * sizeof(float) : 0); }

 private:
  void cut(int64_t tokens_wanted, const Lora& p) {
    tokens = static_cast<int>(tokens_wanted);
    chunks = ceil_div(p.T, tokens);
    // every group of tokens, by their expert or for having none, ends in a tile that it may not fill
    const int64_t most = tokens / kTileRows + p.E + 1;
    tiles = static_cast<int>(most < tokens ? most : tokens);
    rows_bytes = static_cast<int>(shared_size(K * tokens * 2));
    list_bytes = rows_bytes + static_cast<int>(shared_size(K * tiles * 8));
  }
};

}  // namespace moerge::cuda
