// With -DMOERGE_TUNE=ON: the variables of crossovers.h by their names, for bench/gpu_sweep.py.
#include <cstring>

#include "crossovers.h"

// Null: there is none of this name.
extern "C" __attribute__((visibility("default"))) int64_t* moerge_crossover(const char* name) {
  using namespace moerge::cuda;
  const struct {
    const char* name;
    int64_t* value;
  } all[] = {
      {"kDecodeTokens", &kDecodeTokens},
      {"kDecodeLinearTokens", &kDecodeLinearTokens},
      {"kDecodePieces", &kDecodePieces},
      {"kDecodeLeastParts", &kDecodeLeastParts},
      {"kBranchFirstTokens", &kBranchFirstTokens},
      {"kExpandLeastTokens", &kExpandLeastTokens},
      {"kExpandBlocks", &kExpandBlocks},
      {"kShrinkBlocks", &kShrinkBlocks},
      {"kShrinkParts", &kShrinkParts},
      {"kScoresOneGroup", &kScoresOneGroup},
      {"kScoresTwoGroups", &kScoresTwoGroups},
      {"kScoresStart", &kScoresStart},
  };
  for (const auto& one : all)
    if (std::strcmp(one.name, name) == 0) return one.value;
  return nullptr;
}
