// Where one kernel takes over from another, and how finely work is cut: the one table to tune, for an H200 with
// D = O = 4096. bench/README.md has what other values cost there; kScoresOneGroup, kScoresTwoGroups, kShrinkSearches
// and what concerns routed_lora's one launch are guesses.
//
// A build with -DMOERGE_TUNE=ON makes variables of the MOERGE_TUNED, for bench/gpu_sweep.py; the others are sizes in
// kernels.
#pragma once

#include <cstdint>

#ifdef MOERGE_TUNE
#define MOERGE_TUNED inline int64_t
#else
#define MOERGE_TUNED constexpr int64_t
#endif

namespace moerge::cuda {

// Up to how many tokens routed_lora and, with the base layer in it, routed_linear are one launch (routed_decode.cu); it
// cuts D into so many parts for A as give kDecodePieces pieces of work, within these limits.
MOERGE_TUNED kDecodeTokens = 16, kDecodeLinearTokens = 1, kDecodePieces = 128, kDecodeLeastParts = 4;
constexpr int64_t kDecodeParts = 16;

// From how many tokens on routed_linear adds the base layer's product to the branch, rather than the other way round.
MOERGE_TUNED kBranchFirstTokens = 512;

// Up to how many pairs the blocks of the shrink on tensor cores look for their own, rather than having them sorted.
constexpr int64_t kShrinkSearches = 512;

// Tokens of a block of the expand: the most, halved until there are so many blocks or only the least are left.
constexpr int64_t kExpandMostTokens = 512;
MOERGE_TUNED kExpandLeastTokens = 32, kExpandBlocks = 256;

// With fewer blocks than this the sums over D are split, into so many parts at most.
MOERGE_TUNED kShrinkBlocks = 512, kShrinkParts = 16;

// The scores on tensor cores: up to how many tokens all warps of a block have the same 32, and up to how many there are
// two such groups, not four; the most parts of D (at most 32), and what a block costs besides its chunks of 32
// features, counted in those. kProcessors is how many the launches are cut for.
MOERGE_TUNED kScoresOneGroup = 256, kScoresTwoGroups = 1024, kScoresStart = 2;
constexpr int64_t kScoresParts = 16, kProcessors = 132;

// How many parts: the fewest that give so many blocks, each with two tiles of the sum or more.
constexpr int64_t parts_for(int64_t blocks_wanted, int64_t blocks, int64_t tiles, int64_t most) {
  int64_t parts = (blocks_wanted + blocks - 1) / blocks;
  if (parts > most) parts = most;
  if (parts > tiles / 2) parts = tiles / 2;
  return parts > 1 ? parts : 1;
}

}  // namespace moerge::cuda
