// How the expand on tensor cores cuts its work, and what lora_expand_sort.cu leaves in the workspace for
// lora_expand_mma.cu to read:
//
//   hidden [T, K, ranks]      H in the type of w; what is not used, and what lies behind the last rank, is 0
//   lists, for each chunk of tokens and slot in turn the tiles: up to kTileRows of the chunk's tokens that share the
//   slot's expert; every token is in one
//     experts [K, tiles + kExpandWarps]   -1: of no expert, kNoTile: there is none from here on
//     rows [K, tiles, kTileRows]          tokens, counted from the chunk's first, in 16 bits; from where there are no
//                                         more: the last one again, with kAgain
//   weights [T, K]            0 where the slot is not used
#pragma once

#include "lora_mma.cuh"

namespace moerge::cuda {

constexpr int kTileRows = 16;
constexpr int kNoTile = -2;
constexpr int kAgain = -0x8000;
constexpr int kExpandColumns = 32;  // of a block
constexpr int kExpandWarps = 8;
constexpr int64_t kMostExperts = 4096, kMostSlots = 64;

struct ExpandPlan {
  int K, ranks;                   // ranks as padded
  int tokens, tiles;              // of a chunk, and of a slot of it at most
  int experts_bytes, list_bytes;  // of a chunk
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

  // Of a block: its sums between the slots, and its lists.
  size_t shared() const { return (K > 1 ? tokens * kExpandColumns * sizeof(float) : 0) + list_bytes; }

 private:
  void cut(int64_t tokens_wanted, const Lora& p) {
    tokens = static_cast<int>(tokens_wanted);
    chunks = ceil_div(p.T, tokens);
    // every group of tokens, by their expert or for having none, ends in a tile that it may not fill
    const int64_t most = tokens / kTileRows + p.E + 1;
    tiles = static_cast<int>(most < tokens ? most : tokens);
    experts_bytes = static_cast<int>(shared_size(K * (tiles + kExpandWarps) * 4));
    list_bytes = experts_bytes + K * tiles * kTileRows * 2;
  }
};

}  // namespace moerge::cuda
