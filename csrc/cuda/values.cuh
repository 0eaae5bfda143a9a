// Values in memory and sums over threads: what every kernel needs besides the vocabulary.
#pragma once

#include <device.cuh>
#include <type_traits>

namespace moerge::cuda {

MOERGE_DEVICE int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Element i of an array of any type.
template <class Acc>
MOERGE_DEVICE Acc load_as(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<Acc>(static_cast<const float*>(data)[i]);
    case DType::f64:
      return static_cast<Acc>(static_cast<const double*>(data)[i]);
    case DType::bf16:
      return static_cast<Acc>(to_float(static_cast<const bf16*>(data)[i]));
    default:
      return static_cast<Acc>(to_float(static_cast<const f16*>(data)[i]));
  }
}

template <class Acc>
MOERGE_DEVICE void store_as(void* data, DType dtype, int64_t i, Acc value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case DType::f64:
      static_cast<double*>(data)[i] = static_cast<double>(value);
      break;
    case DType::bf16:
      from_float(static_cast<float>(value), static_cast<bf16*>(data)[i]);
      break;
    default:
      from_float(static_cast<float>(value), static_cast<f16*>(data)[i]);
  }
}

// V adjacent elements at element i, as Acc. Any: of whatever type `dtype` says, V = 1; else V = 8 of a known type,
// whose address is a multiple of 16.
struct Any {};

template <class T, int V, class Acc>
MOERGE_DEVICE void load_vector(const void* data, [[maybe_unused]] DType dtype, int64_t i, Acc (&out)[V]) {
  if constexpr (std::is_same_v<T, Any>) {
    static_assert(V == 1);
    out[0] = load_as<Acc>(data, dtype, i);
  } else if constexpr (std::is_same_v<T, float>) {
    static_assert(V == 8);
    const Bytes16 low = load16(static_cast<const float*>(data) + i),
                  high = load16(static_cast<const float*>(data) + i + 4);
    for (int j = 0; j < 4; ++j) out[j] = as_float(low.word[j]), out[j + 4] = as_float(high.word[j]);
  } else {
    static_assert(V == 8);
    const Bytes16 words = load16(static_cast<const T*>(data) + i);
    for (int j = 0; j < 4; ++j) out[2 * j] = low_half<T>(words.word[j]), out[2 * j + 1] = high_half<T>(words.word[j]);
  }
}

template <class T, int V, class Acc>
MOERGE_DEVICE void store_vector(void* data, [[maybe_unused]] DType dtype, int64_t i, const Acc (&value)[V]) {
  if constexpr (std::is_same_v<T, Any>) {
    store_as<Acc>(data, dtype, i, value[0]);
  } else if constexpr (std::is_same_v<T, float>) {
    float* to = static_cast<float*>(data) + i;
    store16(to, {{as_bits(value[0]), as_bits(value[1]), as_bits(value[2]), as_bits(value[3])}});
    store16(to + 4, {{as_bits(value[4]), as_bits(value[5]), as_bits(value[6]), as_bits(value[7])}});
  } else {
    Bytes16 words;
    for (int j = 0; j < 4; ++j) words.word[j] = pack<T>(value[2 * j], value[2 * j + 1]);
    store16(static_cast<T*>(data) + i, words);
  }
}

// All lanes get the same bits.
template <class T>
MOERGE_DEVICE T warp_sum(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <class T>
MOERGE_DEVICE T warp_max(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value = fmax(value, shuffle_xor(value, mask));
  return value;
}

// The sum (or the maximum) over the block for all of its threads; `slots` is shared, one per warp.
template <int threads, class T>
MOERGE_DEVICE T block_sum(T value, T* slots) {
  value = warp_sum(value);
  if (lane() == 0) slots[warp()] = value;
  sync_block();
  T sum = 0;
  for (int i = 0; i < threads / 32; ++i) sum += slots[i];
  sync_block();
  return sum;
}
template <int threads, class T>
MOERGE_DEVICE T block_max(T value, T* slots) {
  value = warp_max(value);
  if (lane() == 0) slots[warp()] = value;
  sync_block();
  T highest = slots[0];
  for (int i = 1; i < threads / 32; ++i) highest = fmax(highest, slots[i]);
  sync_block();
  return highest;
}

// Of the block's threads that vote, how many there are and how many come before this one; `slots` as above.
struct Rank {
  int before, all;
};
template <int threads>
MOERGE_DEVICE Rank block_rank(bool vote, int32_t* slots) {
  const uint32_t votes = ballot(vote);
  if (lane() == 0) slots[warp()] = count_bits(votes);
  sync_block();
  Rank rank{count_bits(votes & ((1u << lane()) - 1)), 0};
  for (int i = 0; i < threads / 32; ++i) {
    if (i < warp()) rank.before += slots[i];
    rank.all += slots[i];
  }
  sync_block();
  return rank;
}

// Who adds up together: the threads of a block, or the lanes of a warp. `rank` is one's place among `kSize`.
template <int threads, class T>
struct BlockTeam {
  static constexpr int kSize = threads;
  T* slots;
  MOERGE_DEVICE static int rank() { return thread(); }
  MOERGE_DEVICE T sum(T value) const { return block_sum<threads>(value, slots); }
  MOERGE_DEVICE T max(T value) const { return block_max<threads>(value, slots); }
};
template <class T>
struct WarpTeam {
  static constexpr int kSize = 32;
  MOERGE_DEVICE static int rank() { return lane(); }
  MOERGE_DEVICE T sum(T value) const { return warp_sum(value); }
  MOERGE_DEVICE T max(T value) const { return warp_max(value); }
};

// -1: the token belongs to no row
MOERGE_DEVICE int64_t row_of(const Rows& map, int64_t token) {
  const int64_t row = map.rows ? map.rows[token] : token / map.tokens_per_row;
  return row < 0 || row >= map.n ? -1 : row;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr size_t shared_size(size_t bytes) { return (bytes + 15) / 16 * 16; }
constexpr size_t kMostShared = 96 * 1024;  // what every architecture from sm_80 on can give a block

inline bool aligned16(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

}  // namespace moerge::cuda
