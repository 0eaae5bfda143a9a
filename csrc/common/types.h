// What both devices call the type of a tensor and the options of route; plain C++, for kernels too.
#pragma once

namespace moerge {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Normalize : int { standardize, unit, none };
enum class Weighting : int { softmax, softmax_all, sigmoid, score };

}  // namespace moerge
