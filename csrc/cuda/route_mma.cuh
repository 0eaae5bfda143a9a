// The tensor-core path of route_scores: when it is taken.
#pragma once

#include "launch.h"

namespace moerge::cuda {

int64_t score_parts_mma(const Route&);

// x and gates must allow 16-byte loads, gates be float32.
void route_scores_mma(const Route&, Stream);

}  // namespace moerge::cuda
