// The branch of few experts as two products over all of them, by the tiles of AMX (micro_amx_few.h): no token is
// sorted, x is read where it lies, and y is read and written once. It is more arithmetic, E / K times the shrink and up
// to that the expand, of which the tiles have plenty.
//
// SmolLM2's 210 layers, routed_lora_, T = 512, one thread (Sapphire Rapids), ms against a sort and tiles for each
// expert's tokens, minima of two interleaved runs:
//   R = 16   E = 8 K = 2  90 (126)   E = 2 K = 1  50 (64)     E = 8 K = 1  85 (85)   E = 16 K = 1  134 (110)
//   R = 64   E = 4 K = 2  127 (218)  R = 32 E = 8 K = 2  132 (160)
//   T = 32, 64, 128 of the first: 18.6 (19.2), 25.5 (26.2), 34 (38)
// The branch alone, the first case, 60 (92): of that the products 35 (by themselves, from the second-level cache, 28;
// the unit's rate is 14), tiles of the factors, which come from memory, 8, y 12. Asking for y while the products run:
// 60 against 69, of which the rounding to bfloat16 by one instruction is 2. Router and branch by turns, 32 tokens each:
// routed_lora_ 88 against 92. Tried: 64 rows in a call, no difference; four tiles of rows by one of columns, asking for
// the factors, slower.
#pragma once

#include <atomic>
#include <cstring>

#include "lora.h"

namespace moerge::cpu {

static_assert(kFewRows == kScoreRows, "a block of the router is one of the branch");
constexpr int64_t kFewTimes = 4;  // as many experts as a token chooses, at most

class FewExperts {
 public:
  // Whether this is the way of a branch that goes by tiles.
  static bool takes(const LoraArgs& args, const Matrix& out) {
    return tiles()->few && args.E <= kFewTimes * args.K && args.E * args.R <= kFewRanks && args.T >= kFewRows &&
           apart(args, out);
  }

  FewExperts(const LoraArgs& args, const float* weights, const Matrix& base, const Matrix& out, Workspace& workspace)
      : args_(args), weights_(weights), x_(args.x), base_(base), out_(out), ranks_(ceil_div(args.E * args.R, 32) * 32) {
    a_ = workspace.get<uint32_t>(args.D / 2 * ranks_);
    b_ = workspace.get<uint32_t>(args.O / 2 * ranks_);
  }

  // All factors as tiles, by a phase of a team.
  void prepare(Team& team, int phase) {
    team.run(phase, args_.E + (args_.E * args_.R < ranks_), [&](int64_t e) { lay(e); });
  }

  // Whether zero times any number of B is zero; known when all is prepared.
  bool finite() const { return finite_.load(); }

  int64_t count() const { return ceil_div(args_.T, kFewRows); }
  void operator()(int64_t block) const {
    const int64_t begin = block * kFewRows, tokens = std::min(kFewRows, args_.T - begin);
    const float* weights[kFewRows];
    const int32_t* experts[kFewRows];
    const void* base[kFewRows];
    void* out[kFewRows];
    for (int64_t m = 0; m < tokens; ++m) {
      const int64_t slot = args_.row(begin + m) * args_.K;
      weights[m] = weights_ + slot, experts[m] = args_.ids + slot;
      base[m] = base_.at(begin + m), out[m] = out_.at(begin + m);
    }
    const void* x = x_.at(begin);
    int64_t x_bytes = x_.row_bytes;
    if (tokens < kFewRows) {  // rows behind the last token are not to be read
      x_bytes = args_.D * size_of(DType::bf16);
      char* rows = scratch<char>(0, kFewRows * x_bytes);
      for (int64_t m = 0; m < kFewRows; ++m)
        std::memcpy(rows + m * x_bytes, x_.at(begin + std::min(m, tokens - 1)), x_bytes);
      x = rows;
    }
    tiles()->few({args_.D, args_.O, args_.K, args_.R, ranks_, a_, b_}, tokens, x, x_bytes, weights, experts, base, out);
  }

 private:
  // Whether no block writes what another still has to read: x and `out` share no memory, or are the same rows, or
  // columns of the same rows.
  static bool apart(const LoraArgs& args, const Matrix& out) {
    const Matrix x(args.x);
    const int64_t width = args.D * size_of(x.dtype), written = args.O * size_of(out.dtype), at = x.data - out.data;
    if (x.row_bytes >= width && x.row_bytes == out.row_bytes)
      if (at == 0 ||
          (at > 0 ? at >= written && at + width <= out.row_bytes : -at >= width && written - at <= x.row_bytes))
        return true;
    return at >= (args.T - 1) * out.row_bytes + written || -at >= (args.T - 1) * x.row_bytes + width;
  }

  // The factors of one expert, or the zeros behind those of the last.
  void lay(int64_t e) {
    const int64_t R = args_.R, D = args_.D, O = args_.O, panel = ranks_ / 2 * kTileWidth;
    uint32_t* a = a_ + e * R / kTileWidth * (D / 2 * kTileWidth);
    uint32_t* b = b_ + e * R / 2 * kTileWidth;
    if (e == args_.E) {
      std::memset(a, 0, (ranks_ - e * R) * (D / 2) * sizeof(uint32_t));
      for (int64_t c = 0; c < O; c += kTileWidth, b += panel)
        std::memset(b, 0, (ranks_ - e * R) / 2 * kTileWidth * sizeof(uint32_t));
      return;
    }
    tiles()->interleave(D, R, args_.a.at(e, 0, 0), args_.a.column_stride, a, D / 2 * kTileWidth);
    if (!tiles()->interleave(R, O, args_.b.at(e, 0, 0), args_.b.rank_stride, b, panel)) finite_.store(false);
  }

  const LoraArgs& args_;
  const float* weights_;
  Matrix x_, base_, out_;
  int64_t ranks_;  // of all experts, rounded up
  uint32_t *a_, *b_;
  std::atomic<bool> finite_{true};
};

}  // namespace moerge::cpu
