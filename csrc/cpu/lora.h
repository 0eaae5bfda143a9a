// The grouped low-rank branch on the CPU: shared by lora_apply, routed_lora and their backward.
//
// A "pair" is one (token, slot). Pairs are cut into blocks of kBlock tokens and sorted by expert within a block, so
// that an expert's rows are read once for all its tokens there. The three loops are the forward and, with other
// arguments, the backward:
//   shrink  h[pair,r]   = sum_c x[token,c] * w[expert,r,c]
//   expand  y[token,c] += sum_pairs sum_r h[pair,r] * w[expert,r,c]
//   outer   g[e,r,c]    = sum over pairs of e of q[pair,r] * x[token,c]
#pragma once

#include <algorithm>

#include "view.h"

namespace moerge::cpu {

constexpr int64_t kBlock = 256;     // tokens whose pairs are sorted together
constexpr int64_t kTaskPairs = 32;  // pairs of one expert in one shrink task
constexpr int64_t kChunk = 256;     // columns of one expand or outer task

struct LoraArgs {
  const Check& check;
  Tensor x, weights, experts;
  Factors a, b;                     // [E,R,D] and, transposed, [E,R,O]
  std::optional<Tensor> lora_bias;  // [E,O]
  bool factored;
  RowMap row;
  int64_t T, D, O, E, R, K, N;
  bool wide;  // accumulate in double
  Tensor rows_storage;

  LoraArgs(const Check& check, const Tensor& x, int64_t out_features, bool wide, const Tensor& lora_a,
           const Tensor& lora_b, const Tensor& weights, const Tensor& experts, std::optional<Tensor> lora_bias,
           std::optional<Tensor> rows, bool factored, std::optional<Tensor> packed);

  const int32_t* ids() const { return static_cast<const int32_t*>(experts.data_ptr()); }
};

// The pairs of one block of tokens with one expert: order[begin..end) are pair indices t*K+k.
struct Group {
  int64_t block, expert, begin, end;
};

// Pairs sorted by (block, expert, pair). With `skip_zero`, pairs of weight exactly 0 are left out: their expert is
// never read. `block` is the number of tokens per block.
template <class Acc>
struct Pairs {
  std::vector<int64_t> order;
  std::vector<Group> groups;
  std::vector<int64_t> first;  // first[b]: index of block b's first group
  Pairs(const LoraArgs& args, const Acc* weights, int64_t block, bool skip_zero);
};

template <class Acc>
void shrink(const LoraArgs& args, const Pairs<Acc>& pairs, const Matrix& x, const Factors& w, Acc* h);

// out = base + ... ; base may be null (zero) and may be out itself. bias [E,C] is added with `weights` of the pair.
template <class Acc>
void expand(const LoraArgs& args, const Pairs<Acc>& pairs, const Acc* h, const Factors& w, const Matrix* base,
            const std::optional<Tensor>& bias, const Acc* weights, const Matrix& out);

// h[pair,:] <- w * h (output), or w * sum over the token's slots of w * h (factored), for all slots of a token.
template <class Acc>
void combine(const LoraArgs& args, const Acc* weights, Acc* h);

// The whole forward into `out` (which may be base); h is [T,K,R].
template <class Acc>
void lora_forward(const LoraArgs& args, const Matrix& base, const Matrix& out);

// Pointers to ranks [0,R) of expert `e` over columns [c, c+count), with their dtype; columns that are not adjacent in
// memory are loaded into `buffer` ([R, count]) first.
template <class Acc>
DType expert_rows(const Factors& w, int64_t e, int64_t c, int64_t count, Acc* buffer, const void** rows) {
  if (w.column_stride == 1) {
    for (int64_t r = 0; r < w.ranks; ++r) rows[r] = w.at(e, r, c);
    return w.dtype;
  }
  const auto& load = micro<Acc>(w.dtype).load;
  if (w.rank_stride == 1) {
    Acc* line = buffer + w.ranks * count;
    for (int64_t i = 0; i < count; ++i) {
      load(w.ranks, w.at(e, 0, c + i), line);
      for (int64_t r = 0; r < w.ranks; ++r) buffer[r * count + i] = line[r];
    }
  } else {
    for (int64_t r = 0; r < w.ranks; ++r)
      for (int64_t i = 0; i < count; ++i) load(1, w.at(e, r, c + i), buffer + r * count + i);
  }
  for (int64_t r = 0; r < w.ranks; ++r) rows[r] = buffer + r * count;
  return std::is_same_v<Acc, double> ? DType::f64 : DType::f32;
}

inline Tensor as_accumulator(const Tensor& tensor, bool wide) {
  return dense(tensor, wide ? ScalarType::Double : ScalarType::Float);
}

}  // namespace moerge::cpu
