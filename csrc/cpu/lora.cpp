// The loops of the grouped low-rank branch (lora.h).
#include "lora.h"

#include <cstring>

namespace moerge::cpu {

LoraArgs::LoraArgs(const Check& check, const Tensor& x_in, int64_t out_features, bool wide_output, const Tensor& lora_a,
                   const Tensor& lora_b, const std::optional<Tensor>& lora_bias_in, bool factored,
                   const std::optional<Tensor>& packed)
    : LoraPlan(check_bank(check, x_in, out_features, wide_output, lora_a, lora_b, lora_bias_in, packed)),
      check(check),
      x(rows_contiguous(x_in)),
      a(lora_a, 1, 2),
      b(lora_b, 2, 1),
      factored(factored) {
  if (lora_bias_in) lora_bias = rows_contiguous(*lora_bias_in);
  if (packed) {
    a = Factors(*packed, 0, R, D, 1, R);
    b = Factors(*packed, R * D, R, O, O, 1);
  }
}

bool LoraArgs::by_tiles(const Matrix& base, const Matrix& out) const {
  for (DType type : {dtype_of(x), a.dtype, b.dtype, base.dtype, out.dtype})
    if (type != DType::bf16) return false;
  return tiles() && T * K >= tiles()->worth * E && R % tiles()->ranks == 0 && R <= kTileRanks && D % 32 == 0 &&
         O % 16 == 0 && a.tall() && b.column_stride == 1 && !lora_bias && !factored;
}

void LoraArgs::set_slots(const Tensor& weights, const Tensor& experts, const std::optional<Tensor>& rows) {
  check_slots(check, weights, experts, rows, *this);
  row = row_map(check, rows, T, N, tokens_per_row);
  experts_ = dense(experts);
  ids = static_cast<const int32_t*>(experts_->data_ptr());
  for (int64_t i = 0; i < N * K; ++i)
    MOERGE_CHECK(check, ids[i] >= 0 && ids[i] < E, "experts must hold ids in [0, E=", E, "), got ", ids[i], " at [",
                 i / K, ", ", i % K, "]");
}

template <class Acc>
void Pairs::sort(const LoraArgs& args, const Acc* weights, bool skip_zero) {
  const int64_t T = args.T, K = args.K, E = args.E, block = args.block();
  const auto each = [&](auto&& visit) {
    for (int64_t t = 0; t < T; ++t)
      for (int64_t k = 0, slot = args.row(t) * K; k < K; ++k, ++slot)
        if (!skip_zero || weights[slot] != 0) visit(args.ids[slot], t * K + k);
  };
  start.assign(E + 1, 0);
  uses.assign(T, 0);
  each([&](int32_t e, int64_t pair) { ++start[e + 1], ++uses[pair / K]; });
  for (int64_t e = 0; e < E; ++e) start[e + 1] += start[e];
  order.resize(start[E]);
  std::pmr::vector<int64_t> at(start.begin(), start.end() - 1, order.get_allocator());
  each([&](int32_t e, int64_t pair) { order[at[e]++] = pair; });
  tasks.reserve(std::min(start[E], E + start[E] / kTaskPairs));
  for (int64_t e = 0; e < E; ++e)
    for (int64_t begin = start[e], end = start[e + 1]; begin < end; begin += kTaskPairs)
      tasks.push_back({e, begin, std::min(end, begin + kTaskPairs)});
  groups.reserve(std::min(start[E], ceil_div(T, block) * E));
  first.reserve(ceil_div(T, block) + 1);
  std::copy(start.begin(), start.end() - 1, at.begin());
  for (int64_t end = block; first.push_back(static_cast<int64_t>(groups.size())), end - block < T; end += block)
    for (int64_t e = 0; e < E; ++e) {
      const int64_t begin = at[e];
      while (at[e] < start[e + 1] && order[at[e]] < end * K) ++at[e];
      if (begin < at[e]) groups.push_back({e, begin, at[e]});
    }
}

template <class Acc>
void Shrink<Acc>::operator()(int64_t index) const {
  const Group& task = pairs.tasks[index / parts];
  const int64_t part = index % parts, count = task.end - task.begin, R = w.ranks, C = w.columns;
  const int64_t c = parts == 1 ? 0 : part * kDepth, depth = parts == 1 ? C : std::min(kDepth, C - c);
  const int64_t e = task.expert;
  const bool in_place = by_tiles || x.dtype == dtype_as<Acc>;
  Acc* loaded = scratch<Acc>(0, in_place ? 0 : count * depth);
  const void* stored[kTaskPairs];
  const Acc* token[kTaskPairs];
  Acc* out[kTaskPairs];
  for (int64_t p = 0; p < count; ++p) {
    const int64_t pair = pairs.order[task.begin + p];
    stored[p] = x.at(pair / args.K, c);
    if (!by_tiles) token[p] = row_as<Acc>(x, pair / args.K, depth, loaded + p * depth, c);
    out[p] = h + (part * args.T * args.K + pair) * R;
  }
  if (by_tiles) {
    if constexpr (std::is_same_v<Acc, float>) tiles()->shrink(count, C, R, stored, w.at(e, 0, 0), w.column_stride, out);
  } else if (w.tall()) {
    for (int64_t p = 0; p < count; ++p) std::fill(out[p], out[p] + R, Acc(0));
    micro<Acc>(w.dtype).tall(count, depth, R, token, w.at(e, 0, c), w.column_stride, out);
  } else {
    Acc* buffer = scratch<Acc>(1, w.column_stride == 1 ? 0 : R * depth + R);
    const void** rows = scratch<const void*>(2, R);
    const DType dtype = expert_rows<Acc>(w, e, c, depth, buffer, rows);
    micro<Acc>(dtype).dot(count, R, depth, token, rows, out);
  }
  if (!weights) return;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t pair = pairs.order[task.begin + p];
    row_micro<Acc>().multiply(R, out[p], weights[args.row(pair / args.K) * args.K + pair % args.K], out[p]);
  }
}

template <class Acc>
void combine(const LoraArgs& args, const Acc* weights, int64_t parts, int64_t block, Acc* h) {
  const int64_t K = args.K, R = args.R, plane = args.T * K * R;
  Acc* mean = scratch<Acc>(0, R);
  for (int64_t t = block * kBlock; t < std::min(args.T, (block + 1) * kBlock); ++t) {
    const Acc* w = weights + args.row(t) * K;
    Acc* slots = h + t * K * R;
    std::fill(mean, mean + R, Acc(0));
    for (int64_t k = 0; k < K; ++k) {
      if (w[k] == 0) continue;
      Acc* slot = slots + k * R;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t r = 0; r < R; ++r) slot[r] += slot[part * plane + r];
      for (int64_t r = 0; r < R; ++r) mean[r] += w[k] * slot[r];
    }
    for (int64_t k = 0; k < K; ++k)
      for (int64_t r = 0; w[k] != 0 && r < R; ++r)
        slots[k * R + r] = w[k] * (args.factored ? mean[r] : slots[k * R + r]);
  }
}

// Columns [c, c+count) of one block of tokens, added to `sums`.
template <class Acc>
void Expand<Acc>::add(int64_t block, int64_t c, int64_t count, const Rows& sums) const {
  Acc* buffer = scratch<Acc>(1, w.column_stride == 1 ? 0 : w.ranks * count + w.ranks);
  const void** rows = scratch<const void*>(2, 2 * w.ranks);
  Acc* bias_row = scratch<Acc>(3, bias ? count : 0);
  for (int64_t g = pairs.first[block]; g < pairs.first[block + 1]; ++g) {
    const Group& group = pairs.groups[g];
    const DType dtype = expert_rows<Acc>(w, group.expert, c, count, buffer, rows);
    if (bias) {
      const Matrix values(*bias);
      micro<Acc>(values.dtype).load(count, values.at(group.expert, c), bias_row);
    }
    const void** next = nullptr;
    if (w.column_stride == 1 && g + 1 < pairs.first[block + 1]) {
      next = rows + w.ranks;
      for (int64_t r = 0; r < w.ranks; ++r) next[r] = w.at(pairs.groups[g + 1].expert, r, c);
    }
    add_group(group, block * args.block(), rows, dtype, bias_row, count, sums, next);
  }
}

template <class Acc>
void Expand<Acc>::add_group(const Group& group, int64_t first_token, const void* const* rows, DType dtype,
                            const Acc* bias_row, int64_t count, const Rows& sums, const void* const* next) const {
  const Acc* hidden[kTaskPairs];
  const Acc* weight[kTaskPairs];
  const Acc* from[kTaskPairs];
  Acc* to[kTaskPairs];
  for (int64_t begin = group.begin, n; begin < group.end; begin += n) {
    // a token that names this expert twice ends the batch: axpy must not see one output row twice
    int64_t last = -1;
    for (n = 0; n < kTaskPairs && begin + n < group.end; ++n) {
      const int64_t pair = pairs.order[begin + n], t = pair / args.K;
      if (t == last) break;
      last = t;
      hidden[n] = h + pair * w.ranks;
      weight[n] = weights + args.row(t) * args.K + pair % args.K;
      const int64_t i = t - first_token;
      from[n] = sums.from[i];
      to[n] = --sums.left[i] == 0 ? sums.last[i] : sums.partial[i];
      sums.from[i] = to[n];
    }
    micro<Acc>(dtype).axpy(n, w.ranks, count, hidden, rows, from, to, begin == group.begin ? next : nullptr);
    const void* line = bias_row;
    if (bias) micro<Acc>(dtype_as<Acc>).axpy(n, 1, count, weight, &line, to, to, nullptr);
  }
}

// A task by tiles: rows of bfloat16 are read at a token's first pair and written at its last, sums between are float.
template <class Acc>
void Expand<Acc>::tile_block(int64_t block, int64_t c, int64_t count) const {
  const int64_t begin = block * args.block(), tokens = std::min(args.block(), args.T - begin);
  Acc* sums = scratch<Acc>(0, tokens * count);
  const void** rows = scratch<const void*>(2, w.ranks);
  TileRow* now = scratch<TileRow>(3, tokens);
  int32_t* left = scratch<int32_t>(0, tokens);
  std::copy_n(pairs.uses.begin() + begin, tokens, left);
  for (int64_t t = 0; t < tokens; ++t) now[t] = {base->at(begin + t, c), true};
  for (int64_t g = pairs.first[block]; g < pairs.first[block + 1]; ++g) {
    const Group& group = pairs.groups[g];
    for (int64_t r = 0; r < w.ranks; ++r) rows[r] = w.at(group.expert, r, c);
    for (int64_t from = group.begin, n; from < group.end; from += n) {
      const Acc* hidden[kTaskPairs];
      TileRow source[kTaskPairs], target[kTaskPairs];
      int64_t last = -1;  // a token that names this expert twice ends the batch
      for (n = 0; n < kTaskPairs && from + n < group.end; ++n) {
        const int64_t pair = pairs.order[from + n], t = pair / args.K - begin;
        if (t == last) break;
        last = t;
        hidden[n] = h + pair * w.ranks;
        source[n] = now[t];
        target[n] = --left[t] == 0 ? TileRow{out.at(begin + t, c), true} : TileRow{sums + t * count, false};
        now[t] = target[n];
      }
      if constexpr (std::is_same_v<Acc, float>) tiles()->expand(n, w.ranks, count, hidden, rows, source, target);
    }
  }
  for (int64_t t = 0; t < tokens; ++t)  // a token without pairs is where it was
    if (now[t].data != out.at(begin + t, c)) std::memcpy(out.at(begin + t, c), now[t].data, count * size_of(out.dtype));
}

template <class Acc>
void Expand<Acc>::operator()(int64_t task) const {
  const int64_t width = chunk(), chunks = ceil_div(w.columns, width), block = task / chunks;
  const int64_t c = task % chunks * width, count = std::min(width, w.columns - c);
  const int64_t begin = block * args.block(), tokens = std::min(args.block(), args.T - begin);
  if (by_tiles) return tile_block(block, c, count);
  const bool read_there = base && base->dtype == dtype_as<Acc>, write_there = out.dtype == dtype_as<Acc>;
  // of many rows, those of 2^n bytes would meet in a few sets of the cache
  const bool direct = write_there && tokens <= kDirectRows;
  Acc* own = scratch<Acc>(0, direct ? 0 : tokens * count);
  Rows sums{scratch<const Acc*>(4, tokens), scratch<Acc*>(5, 2 * tokens), nullptr, nullptr};
  sums.last = sums.partial + tokens;
  sums.left = scratch<int32_t>(0, tokens);
  std::copy_n(pairs.uses.begin() + begin, tokens, sums.left);
  for (int64_t t = 0; t < tokens; ++t) {
    Acc* result = write_there ? static_cast<Acc*>(out.at(begin + t, c)) : own + t * count;
    sums.last[t] = result;
    sums.partial[t] = direct ? result : own + t * count;
    sums.from[t] = read_there ? static_cast<const Acc*>(base->at(begin + t, c)) : sums.partial[t];
    if (!base)
      std::fill(sums.partial[t], sums.partial[t] + count, Acc(0));
    else if (!read_there)
      micro<Acc>(base->dtype).load(count, base->at(begin + t, c), sums.partial[t]);
  }
  add(block, c, count, sums);
  for (int64_t t = 0; t < tokens; ++t) {
    // a token without pairs is where it was
    void* result = out.at(begin + t, c);
    if (sums.from[t] != result) micro<Acc>(out.dtype).store(count, sums.from[t], result);
  }
}

#define MOERGE_INSTANTIATE(Acc)                                      \
  template void Pairs::sort<Acc>(const LoraArgs&, const Acc*, bool); \
  template struct Shrink<Acc>;                                       \
  template struct Expand<Acc>;                                       \
  template void combine<Acc>(const LoraArgs&, const Acc*, int64_t, int64_t, Acc*);
MOERGE_INSTANTIATE(float)
MOERGE_INSTANTIATE(double)
#undef MOERGE_INSTANTIATE

}  // namespace moerge::cpu
