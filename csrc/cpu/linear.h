// The base layer inside of routed_linear, y_to = x_t . w_o + b_o, for so few tokens that reading w is what it costs.
//
// torch 2.13's own product falls behind what memory gives there: always in 16 bit, and in float32 from two tokens on.
// The 210 layers of SmolLM2 with E = 8, R = 16, K = 2, ms, with this (with torch's product; the layers alone by torch),
// Sapphire Rapids; AVX2 with torch held to it as well:
//   one thread           T = 1             2                 4                 8                  16
//   bfloat16, AMX        24.9 (41.9; 33.4) 28.0 (45.7; 36.0) 31.2 (49.2; 36.3) 36.1 (53.6; 36.5)  41.7 (58.2; 36.7)
//   bfloat16, AVX-512    29.9 (43.1; 35.1) 35.1 (47.6; 37.4) 41.7 (54.2; 42.7) 55.6 (66.4; 50.0)  85.4 (89.8; 66.7)
//   bfloat16, AVX2       33.3 (39.7; 32.1) 38.3 (51.5; 41.5) 47.8 (73.6; 66.6) 66.3 (131.7; 103.4) 109 (216; 192)
//   float16, AVX-512     29.7 (38.4; 32.4) 35.2 (61.8; 51.6) 39.4 (63.7; 51.3) 47.6 (69.2; 53.7)  70.4 (80.9; 62.0)
//   float32, AVX-512     41.8 (40.9; 33.2) 46.7 (51.9; 40.7) 58.9 (77.0; 61.0) 67.3 (94.7; 74.6)  88.7 (105; 74.0)
//   float32, AVX2        52.9 (53.2; 43.4) 60.8 (84.0; 66.6) 67.0 (96.3; 73.8) 82.6 (96.8; 76.6)  123 (123; 95.4)
//   two threads
//   bfloat16, AMX        15.0 (25.4; 19.9) 18.1 (28.3; 20.8) 21.8 (31.2; 21.5) 23.7 (33.9; 22.3)  30.2 (37.2; 22.8)
//   float32, AVX-512     24.0 (23.2; 16.7) 27.1 (30.4; 20.6) 35.5 (43.1; 29.9) 42.3 (50.8; 34.8)  52.4 (58.1; 40.5)
// One token in float32 is left to torch where the caller can choose: in the model it costs 1.24 against 1.20 of plain.
// Tried: tasks of this in the time that a thread waits for the router's, with two threads: T = 1 float32 25.9 against
// 24.0, bfloat16 17.4 against 15.0, since the rows are then read in short pieces. Up to 48 tokens by three tiles of x:
// T = 32 72.3 against 69.3.
#pragma once

#include <cstring>

#include "../common/linear.h"
#include "view.h"

namespace moerge::cpu {

constexpr int64_t kFewLinear = 16;  // tokens up to which this is faster

// As tasks: y [T,O] is written, rounded to its type.
class FewLinear {
 public:
  static bool takes(const Tensor& x, const Tensor& weight) {
    return x.size(0) <= kFewLinear && !is_double(x) && (weight.stride(1) == 1 || weight.size(1) == 1) &&
           micro<float>(dtype_of(weight)).linear;
  }

  // x [T,D] with contiguous rows
  FewLinear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y,
            Workspace& workspace)
      : x_(x), weight_(weight), y_(y), stride_(weight.stride(0)), T_(x.size(0)), D_(x.size(1)), O_(weight.size(0)) {
    if (bias) bias_ = dense(*bias);
    // long pieces: each begins with reads that nothing has asked for early
    rows_ = std::max<int64_t>(16, ceil_div(ceil_div(O_, 2 * torch::stable::get_num_threads()), 16) * 16);
    if (tiles() && x_.dtype == DType::bf16 && D_ % 32 == 0) pair(workspace);
  }

  int64_t count() const { return ceil_div(O_, rows_); }
  int64_t cost() const { return T_ * D_ * O_; }

  void operator()(int64_t task) const {
    const int64_t o = task * rows_, count = std::min(rows_, O_ - o);
    const Micro<float>& kernels = micro<float>(weight_.dtype);
    float* sums = scratch<float>(0, T_ * count);
    float* out[kFewLinear];
    for (int64_t t = 0; t < T_; ++t) out[t] = sums + t * count;
    if (pairs_) {
      tiles()->linear(T_, count, D_, pairs_, weight_.at(o), stride_, out);
    } else {
      const float* token[kFewLinear];
      float* loaded = scratch<float>(1, x_.dtype == DType::f32 ? 0 : T_ * D_);
      for (int64_t t = 0; t < T_; ++t) token[t] = row_as<float>(x_, t, D_, loaded + t * D_);
      kernels.linear(T_, count, D_, token, weight_.at(o), stride_, out);
    }
    if (bias_) add_bias(o, count, out);
    for (int64_t t = 0; t < T_; ++t) micro<float>(y_.dtype).store(count, out[t], y_.at(t, o));
  }

 private:
  void add_bias(int64_t o, int64_t count, float* const* out) const {
    float* row = scratch<float>(2, count);
    micro<float>(weight_.dtype).load(count, static_cast<char*>(bias_->data_ptr()) + o * size_of(weight_.dtype), row);
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t i = 0; i < count; ++i) out[t][i] += row[i];
  }

  // x as the tiles take it: two features side by side, [D/2,T]
  void pair(Workspace& workspace) {
    pairs_ = workspace.get<uint32_t>(D_ / 2 * T_);
    for (int64_t t = 0; t < T_; ++t) {
      const char* row = static_cast<const char*>(x_.at(t));
      for (int64_t i = 0; i < D_ / 2; ++i) std::memcpy(pairs_ + i * T_ + t, row + 4 * i, 4);
    }
  }

  Matrix x_, weight_, y_;
  std::optional<Tensor> bias_;
  int64_t stride_, T_, D_, O_, rows_ = 0;
  uint32_t* pairs_ = nullptr;
};

}  // namespace moerge::cpu
