// The grouped low-rank branch on the CPU: shared by lora_apply, routed_lora and their backward.
//
// A "pair" is one (token, slot). Pairs are sorted by expert, so that shrink reads an expert's factor once for all its
// tokens. Expand owns blocks of tokens: a block's pairs of one expert are a "group", a piece of the expert's range. The
// loops are the forward and, with other arguments, the backward:
//   Shrink  h[pair,r]   = sum_c x[token,c] * w[expert,r,c]
//   Expand  y[token,c] += sum_pairs sum_r h[pair,r] * w[expert,r,c]
//   outer   g[e,r,c]    = sum over pairs of e of q[pair,r] * x[token,c]        (lora_backward.cpp)
//
// Tried (lora_apply_ 2048 -> 2048, K=2 R=16 T=1024, float32, two AVX-512 cores, cold, medians of interleaved
// processes):
//   one sort over all tokens for shrink, against one per 256 tokens: E=166 15.2 against 19.3 ms
//   tokens x columns of an expand task: E=166 1024 x 128 9.5 ms, 512 x 128 10.1, 1024 x 64 11.0, 256 x 256 11.7;
//   E=36 256 x 512 7.3 ms, 256 x 256 8.1
//   fetching the next expert's rows of B during expand: T=1024 15.6 against 17.8 ms, kept
//   fetching the next tile's rows of x during shrink: no difference beyond the noise, left out
//   shrink by parts of the depth over all experts, so that a part of x stays in the second-level cache: no difference
//   factors and gates of a model in huge pages (madvise), T = 1, from memory: SmolLM2's layers, E = 8, 0.94 to 1.0 of
//   the time of each tensor by itself, 2048 -> 2048 0.96 (E = 36) and 1.1 (E = 166): left out
//   the branch first and the base product added to it (beta = 1): 8.4 against 8.4 ms
//   expand without passes of its own over the result (float32, T = 512, E = 8, beside other load): 576 -> 576 304
//   against 334 us, 576 -> 1536 566 against 668
//   float32 by the tiles of AMX, each number as three of bfloat16 and six of their products, which is as exact:
//   lora_apply_ of SmolLM2's 210 layers (T = 512, E = 8, one thread) 188 to 206 ms against 136 to 140. Taking numbers
//   apart costs what the tiles save: 48 rows x 576 to R = 16 10.1 against 10.5 us, 8 rows 3.9 against 2.0
// All in bfloat16, shrink and expand go by the tiles of AMX (micro_amx.h). lora_apply_, T = 512, E = 8, K = 2, R = 16,
// two cores beside other load, us against AVX-512: 576 -> 576 326 (509), 576 -> 1536 587 (945), 1536 -> 576 410 (791).
// So do the scores (route.h). Without AMX they go by vectors of bfloat16 where there are such (micro_bf16.h).
//
// What a patched layer cannot do here (Sapphire Rapids, two cores, float32 2048 -> 2048, K = 2, R = 16):
//   T = 256, E = 166: A and B of 158 experts are 41 MB, at the 25 GB/s of the plain layer's own weights 1.65 ms, and
//   the scores 0.87 ms at the 200 GFLOP/s of its product: 1.24 of the 10.4 ms that it takes T = 1: an op that computes
//   nothing takes 37 us once a layer has passed through the caches (torch's add_ of 8 numbers 45, its linear 23), 1.05
//   of 680 us, before the 0.8 MB of E = 36 are read, 33 us on both cores and 60 to 80 on one
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory_resource>

#include "../common/check_lora.h"
#include "view.h"

namespace moerge::cpu {

constexpr int64_t kBlock = 256;      // tokens of one task, of expand where experts have enough of them
constexpr int64_t kMaxBlock = 1024;  // tokens of one expand task otherwise
constexpr int64_t kGroup = 8;        // pairs of a group that make reading the expert's rows worth it
constexpr int64_t kTaskPairs = 48;   // pairs of one expert in one shrink task
constexpr int64_t kChunk = 512;      // columns of one expand or outer task of kBlock tokens
constexpr int64_t kDirectRows = 16;  // up to so many tokens, expand keeps partial sums in the result itself
constexpr int64_t kFewPairs = 4;     // up to so many pairs, shrink cuts its sum over the threads

struct LoraArgs : LoraPlan {
  const Check& check;
  Tensor x;
  Factors a, b;                     // [E,R,D] and, transposed, [E,R,O]
  std::optional<Tensor> lora_bias;  // [E,O]
  bool factored;

  // the slots: experts [N,K] and which of the N rows a token belongs to
  const int32_t* ids = nullptr;
  RowMap row;

  LoraArgs(const Check& check, const Tensor& x, int64_t out_features, bool wide_output, const Tensor& lora_a,
           const Tensor& lora_b, const std::optional<Tensor>& lora_bias, bool factored,
           const std::optional<Tensor>& packed);

  // Tokens of one expand task: enough for groups of kGroup pairs when all experts are used alike.
  int64_t block() const {
    int64_t tokens = kBlock;
    while (tokens < std::min(T, kMaxBlock) && tokens * K < kGroup * E) tokens *= 2;
    return tokens;
  }

  // Whether the branch, added to `base`, is computed by `tiles()`.
  bool by_tiles(const Matrix& base, const Matrix& out) const;

  // what the caller chose; checked, and kept alive
  void set_slots(const Tensor& weights, const Tensor& experts, const std::optional<Tensor>& rows);
  // what the router will choose: one row per token
  void set_slots(int64_t top_k, const int32_t* experts) { N = T, K = top_k, ids = experts; }

 private:
  std::optional<Tensor> experts_;
};

// The pairs of one block of tokens with one expert: order[begin..end) are pair indices t*K+k.
struct Group {
  int64_t expert, begin, end;
};

// Pairs sorted by (expert, pair). With `skip_zero`, pairs of weight exactly 0 are left out: their expert is never read.
class Pairs {
  // A call of few tokens takes no memory of the heap for them. glibc keeps seven freed pieces of a size at hand
  // (tcache), and torch's boxing of five tensors alone is ten of the smallest. Each further one is put aside, and
  // merged with its neighbours in memory when the next layer's result is allocated: reads that miss every cache. A call
  // of one token, 576 -> 576, E = 8, is 23 allocations; with vectors of the heap, and empty tensors in the arguments,
  // it was 40.
  std::array<std::byte, 4096> few_;
  std::pmr::monotonic_buffer_resource memory_{few_.data(), few_.size()};

 public:
  std::pmr::vector<int64_t> order{&memory_};
  std::pmr::vector<int64_t> start{&memory_};  // order[start[e]..start[e+1]) are expert e's
  std::pmr::vector<Group> tasks{&memory_};    // by expert: up to kTaskPairs pairs each
  std::pmr::vector<Group> groups{&memory_};   // by (block, expert)
  std::pmr::vector<int64_t> first{&memory_};  // first[b]: index of block b's first group
  std::pmr::vector<int32_t> uses{&memory_};   // how many of each token's pairs are among them

  template <class Acc>
  void sort(const LoraArgs& args, const Acc* weights, bool skip_zero);
};

// h [T*K,R]; the tasks are to run in any order. `weights`, if given, are multiplied in.
template <class Acc>
struct Shrink {
  const LoraArgs& args;
  const Pairs& pairs;
  Matrix x;
  const Factors& w;
  const Acc* weights;
  Acc* h;
  int64_t parts = 1;  // pieces of the sum, [parts,T*K,R] in h, to be added by `combine`
  bool by_tiles = false;

  int64_t count() const { return static_cast<int64_t>(pairs.tasks.size()) * parts; }
  int64_t cost() const { return ceil_div(args.T * args.K * w.ranks * w.columns, std::max<int64_t>(1, count())); }
  void operator()(int64_t task) const;
};

// out = base + ... ; base may be null (zero) and may be out itself. bias [E,C] is added with `weights` of the pair.
template <class Acc>
struct Expand {
  const LoraArgs& args;
  const Pairs& pairs;
  const Acc* h;
  const Factors& w;
  const Matrix* base;
  const std::optional<Tensor>& bias;
  const Acc* weights;
  Matrix out;
  bool by_tiles = false;

  // the sums of a task stay in the second-level cache: more tokens, fewer columns
  int64_t chunk() const { return kChunk * kBlock / std::max(kBlock, args.block()); }
  int64_t count() const { return ceil_div(args.T, args.block()) * ceil_div(w.columns, chunk()); }
  int64_t cost() const { return std::min(args.T, args.block()) * chunk() * (1 + args.K * w.ranks); }
  void operator()(int64_t task) const;

 private:
  // The rows of a task's tokens, of [c, c+count): pairs are added to `from`, and the sum is kept in `partial`, or in
  // `last` once it is whole. `left` pairs are to come.
  struct Rows {
    const Acc** from;
    Acc **partial, **last;
    int32_t* left;
  };
  void add(int64_t block, int64_t c, int64_t count, const Rows& sums) const;
  void add_group(const Group& group, int64_t first_token, const void* const* rows, DType dtype, const Acc* bias_row,
                 int64_t count, const Rows& sums, const void* const* next) const;
  void tile_block(int64_t block, int64_t c, int64_t count) const;
};

// The tokens of one block: h[pair,:] <- w * (sum of h's parts) (output), or w * the sum of that over the token's slots
// (factored).
template <class Acc>
void combine(const LoraArgs& args, const Acc* weights, int64_t parts, int64_t block, Acc* h);

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

}  // namespace moerge::cpu
