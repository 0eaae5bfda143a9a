// What the kernels are asked for, in raw pointers and plain C++: the border between bind*.cpp (torch) and *.cu
// (device).
//
// T tokens, D in features, O out features, E experts, K selected per token, R rank, N rows (sequences).
// Every function only enqueues on `stream`, allocates nothing, waits for nothing, and its grid depends on shapes alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/types.h"
#include "crossovers.h"

namespace moerge::cuda {

using Stream = void*;

// Why a kernel is not taken, in words; null where it is. Who decides asks the same function as who explains.
using Reason = const char*;

struct Grid {
  int64_t x, y = 1, z = 1;
};

// Rows of contiguous elements, `stride` elements apart.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
};

// A stack of factors seen as [E, R, C] (C is D for A and O for B) in whatever strides it has, counted in elements.
struct Factors {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t expert = 0, rank = 0, column = 0;
  int64_t ranks = 0, columns = 0;
};

// Which of n rows a token belongs to; a row out of range belongs to nobody.
struct Rows {
  const int32_t* rows = nullptr;  // [T], or null: tokens of a row are adjacent
  int64_t tokens_per_row = 1, n = 1;
};

// ---- a second stream ------------------------------------------------------------------------------------------------

// Whether what `stream` gets is recorded into a graph.
bool recording(Stream stream);
// A stream that begins when all is done that `stream` has got by now, and runs beside what it gets after.
Stream fork(Stream stream);
// From here on `stream` waits for what `forked` has got.
void join(Stream stream, Stream forked);

// ---- route ----------------------------------------------------------------------------------------------------------

// norm(x) = (x - shift - rest) * factor; `clamped` is 1 where "unit" met its floor. Four per token, in the accumulator.
constexpr int kStatistics = 4;
constexpr int kMoments = 3;

struct Route {
  int64_t T, D, E, K;
  Matrix x, gates;
  Normalize normalize;
  Weighting weighting;
  bool absolute;
  double scale, top_p;  // top_p 0: no cut
  const void* bias;     // [N,E] in the accumulator, or null
  const bool* mask;     // [E] or [N,E], or null
  bool mask_per_row;
  Rows row;
  bool wide;         // the accumulator is double
  void* statistics;  // [T, kStatistics]
  int64_t parts;     // of the sums over D in similarity, see score_parts
  void* similarity;  // [parts,T,E]: norm(x) . g; route_select adds the parts up
  float* moments;    // [parts,T,kMoments] and
  float* gate_sums;  // [parts,E], where score_moments: what route_scores leaves of the normalization to its readers
  void* weights;     // [T,K]
  int32_t* experts;  // [T,K]
};

Reason scores_against_tensor_cores(const Route&);
// How many parts let the scores use the whole device.
int64_t score_parts(const Route&);
// Whether tokens have been taken around a pivot, and moments (pivot, sum and sum of squares around it) say the rest.
bool score_moments(const Route&);
void route_scores(const Route&, Stream);     // statistics and similarity, but for what readers do
void route_add_parts(const Route&, Stream);  // does that, without selecting
void route_select(const Route&, Stream);     // weights and experts from similarity

struct RouteGradient {
  Route forward;
  const void* grad;       // [T,K] in the accumulator
  void* score_gradient;   // [T,E]: d/d score
  Matrix x, gates, bias;  // where the gradients go; data null: not wanted
};

void route_backward(const RouteGradient&, Stream);  // after route_scores and route_add_parts

// ---- lora_apply -----------------------------------------------------------------------------------------------------

struct Lora {
  int64_t T, E, K, R;
  const void* weights;     // [N,K] in the accumulator
  const int32_t* experts;  // [N,K]; an id outside [0,E) is skipped
  Rows row;
  bool factored;
  bool wide;          // the accumulator is double
  int64_t parts = 1;  // of the sums in h, see shrink_parts
};

// The pairs t*K+k of each expert in ascending order: those of e are order[offsets[e] .. offsets[e+1]). They are cut
// into tiles of kTilePairs, which never hold two experts: the first of e is tile offsets[e] / kTilePairs + e, and tile
// i belongs to tile_expert[i], -1 when it holds nothing.
constexpr int64_t kTilePairs = 64;
struct Groups {
  int32_t *order, *offsets, *tile_expert;  // [T*K], [E+1], [most_tiles]
};
inline int64_t most_tiles(const Lora& p) { return (p.T * p.K + kTilePairs - 1) / kTilePairs + p.E; }

// Pairs of weight 0 are left out when skip_zero.
void group_pairs(const Lora&, bool skip_zero, const Groups&, Stream);

// h[parts,pair,r] = sum_c x[token,c] w[expert,r,c] in the accumulator, in parts that the readers of h add up; a pair
// that is left out (see above) is not written.
Reason shrink_against_tensor_cores(const Lora&, const Matrix& x, const Factors& w);
// Where shrink_uses_groups, `groups` must be those of the same skip_zero; else it is not looked at.
bool shrink_uses_groups(const Lora&, const Matrix& x, const Factors& w);
// How many parts let the shrink use the whole device; where it does not use groups, one is all there can be.
int64_t shrink_parts(const Lora&, const Matrix& x, const Factors& w);
void lora_shrink(const Lora&, const Matrix& x, const Factors& w, bool skip_zero, const Groups& groups, void* h, Stream);

// out[t,c] = base[t,c] + sum_k H[t,k,:] . w[e,:,c] + sum_k w_tk bias[e,c]; base and bias may be absent (null data),
// base may be out. H = w_tk h[t,k] , or w_tk sum_j w_tj h[t,j] when factored.
Reason expand_against_tensor_cores(const Lora&, const Factors& w, const Matrix& base, const Matrix& out);
// The tensor cores read what expand_prepare makes of ids, weights and h, in a workspace of so many bytes; 0: out is of
// a type, or the rest of such sizes, that they are not used.
int64_t expand_workspace(const Lora&, const Factors& w, DType out);
void expand_prepare(const Lora&, const void* h, const Factors& w, void* workspace, Stream);
// prepared: null where expand_workspace is 0.
void lora_expand(const Lora&, const void* h, const void* prepared, const Factors& w, const Matrix& base,
                 const Matrix& bias, const Matrix& out, Stream);

// out[e,r,c] = sum over the pairs of e, in order, of Q[pair,r] x[token,c], with Q made of q as H of h; out is
// contiguous. q null: Q is the pair's weight, R is 1, and no workspace is needed.
void lora_outer(const Lora&, const Groups&, const void* q, int64_t R, const Matrix& x, int64_t columns, void* workspace,
                void* out, DType dtype, Stream);
// The bytes of workspace that the tensor cores need; 0: they are not used.
int64_t outer_workspace(const Lora&, const Matrix& x, int64_t columns, DType dtype);

// grad[n,k] of the weights: q . h (factored: q . mean h + h . mean q) + dy . bias, summed over the tokens of row n in
// order. per_pair is a workspace [T,K] in the accumulator.
void lora_weight_gradient(const Lora&, const void* h, const void* q, const Matrix& dy, int64_t O, const Matrix& bias,
                          void* per_pair, void* out, DType dtype, Stream);

// ---- routed_lora and routed_linear for few tokens, in one launch ----------------------------------------------------

struct Decode {
  Route route;   // its statistics are not used, and it has two moments
  Factors a, b;  // [E,R,D] and [E,R,O]
  bool factored;
  Matrix weight;            // [O,D]; data null: base is given instead
  const void* linear_bias;  // [O] of weight's type, or null
  Matrix base;              // may be out
  Matrix lora_bias, out;    // lora_bias may be absent (null data)
  int64_t pieces;           // that D is cut into where A is multiplied
  float* parts;             // [pieces, T*K, R]
};

Reason against_decode(const Decode&);
// Sets how the work is cut, and says how many floats of workspace it takes, which set_workspace deals out.
int64_t plan_decode(Decode&);
void set_workspace(Decode&, float* workspace);
// False: nothing is done, since there is a reason against it.
bool routed_decode(const Decode&, Stream);

// ---- mix_log_probs --------------------------------------------------------------------------------------------------

struct Mix {
  int64_t K, N, V;
  const void* logits;  // [K,N,V]
  DType dtype;
  const void* weights;  // [N,K] in the accumulator
  bool wide;
  void* offset;  // [N,K]: log w - logsumexp(logits), in the accumulator
};

void mix_forward(const Mix&, void* out, Stream);
void mix_backward(const Mix&, const void* grad, const void* result, void* grad_logits, void* grad_weights,
                  DType weights_dtype, Stream);  // null: not wanted

}  // namespace moerge::cuda
