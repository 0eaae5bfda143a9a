// The base layer inside of routed_linear, y_to = x_t . w_o + b_o, for so few tokens that reading w is what it costs.
//
// torch 2.13's own product falls behind what memory gives there: always in 16 bit, and in float32 from two tokens on.
// The 210 layers of SmolLM2 with E = 8, R = 16, K = 2, ms, with this (with torch's product; the layers alone by torch,
// of which a second row is 0.98 to 1.05), Sapphire Rapids; AVX-512 and AVX2 with torch held to it as well:
//   one thread           T = 1             2                 4                 8                  16
//   bfloat16, AMX        21.7 (38.9; 32.1) 25.5 (43.7; 33.9) 29.8 (48.2; 35.6) 34.9 (51.7; 34.2)  40.4 (57.5; 36.4)
//   bfloat16, AVX-512    28.9 (41.5; 33.6) 31.5 (44.9; 35.1) 35.7 (51.0; 38.8) 47.9 (61.4; 46.0)  75.0 (81.6; 60.3)
//   bfloat16, AVX2       30.0 (37.2; 33.9) 33.3 (49.0; 47.0) 44.4 (81.7; 76.3) 62.6 (136; 106)    103 (215; 193)
//   float16, AVX-512     25.5 (36.3; 32.4) 28.5 (54.8; 47.6) 32.7 (59.3; 48.9) 43.7 (68.5; 52.2)  63.8 (82.5; 59.7)
//   float32, AVX-512     37.5 (39.1; 31.4) 42.1 (45.6; 34.9) 50.4 (68.8; 53.4) 61.7 (89.1; 69.3)  83.7 (106; 75.7)
//   float32, AVX2        41.8 (41.7; 34.1) 49.9 (71.8; 56.0) 58.1 (87.2; 66.7) 70.4 (89.9; 70.5)  107 (113; 90.0)
//   two threads
//   bfloat16, AMX        15.5 (26.2; 20.5) 17.0 (27.9; 19.9) 20.0 (29.3; 20.1) 23.3 (32.9; 20.4)  27.5 (36.2; 21.6)
//   float16, AVX-512     16.4 (23.1; 17.7) 19.8 (35.9; 27.2) 20.7 (37.0; 27.2) 28.3 (44.0; 31.1)  39.0 (52.9; 37.3)
//   float32, AVX-512     24.3 (23.7; 17.0) 25.9 (27.7; 17.8) 32.6 (39.9; 27.0) 39.2 (47.9; 31.7)  50.3 (57.7; 39.4)
// Zen 4, by vectors of bfloat16 (by widening; the layers alone by torch), one thread: T = 1 24.5 (26.0; 30), 4 31 (31;
// 32), 8 37 (41; 36), 16 48 (60; 44); two threads: 15.4 (16.1; 18.5), 19 (19; 20), 23.3 (25.4; 22), 29 (35; 26).
// One token in the model, over plain, by this (by torch's product), one and two threads: float32 1.17 and 1.30 (1.23
// and 1.34), held to AVX2 1.20 and 1.32 (1.23 and 1.32), bfloat16 0.81 and 0.93 (1.23 and 1.29).
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
    if (!tiles() || x_.dtype != DType::bf16 || D_ % 32 != 0) return;
    by_rows_ = tiles()->rows;
    if (tiles()->linear) pair(workspace);
  }

  int64_t count() const { return ceil_div(O_, rows_); }
  // of numbers that come from memory, each as much as four multiplications: k_proj and v_proj of SmolLM2 are worth a
  // second thread (one token in the model, two threads: float32 1.30 against 1.35 of plain, bfloat16 0.93 against 0.98)
  int64_t cost() const { return 4 * T_ * D_ * O_; }

  void operator()(int64_t task) const {
    const int64_t o = task * rows_, count = std::min(rows_, O_ - o);
    const Micro<float>& kernels = micro<float>(weight_.dtype);
    float* sums = scratch<float>(0, T_ * count);
    float* out[kFewLinear];
    for (int64_t t = 0; t < T_; ++t) out[t] = sums + t * count;
    if (pairs_) {
      tiles()->linear(T_, count, D_, pairs_, weight_.at(o), stride_, out);
    } else if (by_rows_) {
      const void* rows[kFewLinear];
      for (int64_t t = 0; t < T_; ++t) rows[t] = x_.at(t);
      tiles()->rows(T_, count, D_, rows, weight_.at(o), stride_, out);
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
  bool by_rows_ = false;
  uint32_t* pairs_ = nullptr;
};

}  // namespace moerge::cpu
