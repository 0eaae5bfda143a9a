// The inner loops of every CPU op, compiled once per instruction set and chosen at run time (dispatch.cpp).
// Plain pointers and plain C++: nothing here knows torch.
//
// Every output element is accumulated in one fixed order whatever the tile it is computed in, so results do not depend
// on the number of threads or on how an op cuts its work.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace moerge::cpu {

inline int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// Acc is float or double; `w` tensors are of the dtype the table was asked for.
template <class Acc>
struct Micro {
  // dst[i] = src[i]
  void (*load)(int64_t n, const void* src, Acc* dst);
  // dst[i] = src[i], rounded to nearest even
  void (*store)(int64_t n, const Acc* src, void* dst);
  // out[m][n] = sum_d x[m][d] * w[n][d]
  void (*dot)(int64_t M, int64_t N, int64_t D, const Acc* const* x, const void* const* w, Acc* const* out);
  // out[m][j] = base[m][j] + sum_i h[m][i] * w[i][j], for few i; base[m] may be out[m]. `next`, if not null, are I rows
  // of the same kind that a later call will read: they are fetched meanwhile.
  void (*axpy)(int64_t M, int64_t I, int64_t J, const Acc* const* h, const void* const* w, const Acc* const* base,
               Acc* const* out, const void* const* next);
  // out[m][j] += sum_d x[m][d] * w[d * stride + j], for many d and few j; stride >= J
  void (*tall)(int64_t M, int64_t D, int64_t J, const Acc* const* x, const void* w, int64_t stride, Acc* const* out);
  // out[m][n] = sum_d x[m][d] * w[n * stride + d], for few m and a w that is read from memory; may be null
  void (*linear)(int64_t M, int64_t N, int64_t D, const Acc* const* x, const void* w, int64_t stride, Acc* const* out);
};

// A call of `tall` over D is the same, bit for bit, as calls over its parts of kDepth one after the other.
constexpr int64_t kDepth = 256;

template <class Acc>
const Micro<Acc>& micro(DType w);

struct Moments {
  double sum, squares;  // sum_i v_i and sum_i v_i^2
};

// The loops over one row that do not depend on a stored dtype. Sums run in Acc over 1024 elements at a time and in
// double over those.
template <class Acc>
struct RowMicro {
  double (*sum)(int64_t n, const Acc* x);
  // the moments of x
  Moments (*moments)(int64_t n, const Acc* x);
  // out[i] = x[i] - shift, and the moments of out; out may be x
  Moments (*centre)(int64_t n, const Acc* x, Acc shift, Acc* out);
  // out[i] = x[i] * factor; out may be x
  void (*multiply)(int64_t n, const Acc* x, Acc factor, Acc* out);
  // The best two of E scores of n rows, ids[n][2], and the softmax of their scores, weights[n][2]; found[i]:
  // whether two are above -infinity, else what the row gets means nothing. A NaN is not chosen; of equals the lower id.
  // Null for double.
  void (*two)(int64_t n, int64_t E, const Acc* scores, Acc* weights, int32_t* ids, bool* found);
};

template <class Acc>
const RowMicro<Acc>& row_micro();

// One row of float, or of bfloat16.
struct TileRow {
  void* data;
  bool narrow;
};
constexpr int64_t kTileColumns = 512, kTileRanks = 64;
constexpr int64_t kTileWidth = 16;  // rows and columns of the sums of one tile
constexpr int64_t kScoreRows = 32;  // tokens of one call of `scores`
constexpr int64_t kGateParts = 3;   // numbers of bfloat16 that hold one of float32

constexpr int64_t kFewRows = 32;    // tokens of one call of `few`
constexpr int64_t kFewRanks = 256;  // of all experts together

// What calls of `few` have in common: `ranks` of all experts, a multiple of 32, R of each; the factors by `interleave`.
struct FewBranch {
  int64_t D, O, K, R, ranks;
  const uint32_t *a, *b;
};

// The products of a branch whose tensors are all bfloat16, and those of tokens of bfloat16 with gates, where a machine
// multiplies numbers of bfloat16: by tiles, or by vectors, which have shrink, expand and rows alone. R is at most
// kTileRanks.
struct Tiles {
  int64_t ranks;  // of which R is a multiple
  int64_t worth;  // pairs of an expert, if all are used alike, from which on this is faster than float32

  // out[m][r] = sum_d x[m][d] * w[d * stride + r]; D a multiple of 32
  void (*shrink)(int64_t M, int64_t D, int64_t R, const void* const* x, const void* w, int64_t stride,
                 float* const* out);
  // to[m][j] = from[m][j] + sum_r h[m][r] * w[r][j], h rounded to bfloat16; J a multiple of 16, at most kTileColumns;
  // from[m] may be to[m]
  void (*expand)(int64_t M, int64_t R, int64_t J, const float* const* h, const void* const* w, const TileRow* from,
                 const TileRow* to);
  // out[m][n] = sum_d x[m][d] * w[n * stride + d] for M <= 16 and D a multiple of 32; pairs[d / 2][m] are x[m][d] and
  // x[m][d + 1]
  void (*linear)(int64_t M, int64_t N, int64_t D, const uint32_t* pairs, const void* w, int64_t stride,
                 float* const* out) = nullptr;
  // the same of rows of x as they lie
  void (*rows)(int64_t M, int64_t N, int64_t D, const void* const* x, const void* w, int64_t stride,
               float* const* out) = nullptr;

  // Gates of float32 as three parts of bfloat16 each: pairs[d / 2][p * E + e], `width` apart, is part p of features d
  // and d + 1 of gate e; sums[e] = sum_d of gate e. One of the strides is 1; D a multiple of 32.
  void (*split)(int64_t D, int64_t E, const float* gates, int64_t feature_stride, int64_t expert_stride, int64_t width,
                uint32_t* pairs, float* sums) = nullptr;
  // sums[m][c] = sum_d x[m * stride + d] * pairs[d / 2][c][d % 2] for kScoreRows rows, width a multiple of kTileWidth;
  // adds the moments of each row to moments[m], if not null
  void (*scores)(int64_t D, int64_t width, const void* x, int64_t stride, const uint32_t* pairs, float* sums,
                 Moments* moments) = nullptr;

  // pairs[c / 16 * panel + r / 2 * 16 + c % 16] = w[r * stride + c] and w[(r + 1) * stride + c]; rows even, columns a
  // multiple of 16. Returns whether all are finite.
  bool (*interleave)(int64_t rows, int64_t columns, const void* w, int64_t stride, uint32_t* pairs,
                     int64_t panel) = nullptr;
  // out[m] = base[m] + the branch of row m of x, which is chosen by weights[m][K] and experts[m][K]. M is at most
  // kFewRows; x has kFewRows rows, `x_bytes` apart; base[m] may be out[m]
  void (*few)(const FewBranch& branch, int64_t M, const void* x, int64_t x_bytes, const float* const* weights,
              const int32_t* const* experts, const void* const* base, void* const* out) = nullptr;
};

// Null where this machine has none, or may not use them.
const Tiles* tiles();

// The instruction set in use: "avx512 with amx" or "avx512 with bf16" (and Tiles), "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace moerge::cpu
