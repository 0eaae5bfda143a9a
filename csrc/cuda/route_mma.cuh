// The tensor-core path of route_scores: when it is taken.
#pragma once

#include "launch.h"

namespace moerge::cuda {

constexpr int64_t kScoresMmaStride = int64_t(1) << 26;  // of gates: 56 of them are within 32 bits

int64_t score_parts_mma(const Route&);

// x and gates must allow 16-byte loads, gates be float32.
void route_scores_mma(const Route&, Stream);

}  // namespace moerge::cuda
