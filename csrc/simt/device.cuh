// The device vocabulary of csrc/cuda/device.cuh, for the host: the same words with the same meaning, so that the
// kernels compile as plain C++ and run in the emulator. What each word promises is written there.
#pragma once

#include <math.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <typeinfo>

#include "../cuda/launch.h"
#include "emulator.h"

#define MOERGE_DEVICE inline
#define MOERGE_UNROLL

namespace moerge::cuda {

using simt::Place;

// ---- threads ------------------------------------------------------------------------------------------------------

inline int thread() { return simt::thread(); }
inline int lane() { return simt::thread() % 32; }
inline int warp() { return simt::thread() / 32; }
inline int64_t block_x() { return simt::block().x; }
inline int64_t block_y() { return simt::block().y; }
inline int64_t block_z() { return simt::block().z; }

inline void sync_block(const Place& place = Place::current()) { simt::block_barrier(place); }
inline void sync_warp(const Place& place = Place::current()) {
  simt::warp_operation(place, nullptr, [](void**) {});
}
inline uint32_t grid_arrive(const Place& place = Place::current()) { return simt::grid_arrive(place); }
inline void grid_wait(uint32_t arrival, const Place& place = Place::current()) { simt::grid_wait(arrival, place); }

template <class T>
T shuffle(T value, int from, const Place& place = Place::current()) {
  struct Mine {
    T in, out;
    int from;
  } mine{value, value, from & 31};
  simt::warp_operation(place, &mine, [](void** all) {
    for (int i = 0; i < 32; ++i) {
      Mine* m = static_cast<Mine*>(all[i]);
      m->out = static_cast<Mine*>(all[m->from])->in;
    }
  });
  return mine.out;
}

template <class T>
T shuffle_xor(T value, int mask, const Place& place = Place::current()) {
  return shuffle(value, lane() ^ mask, place);
}

template <bool most>
uint32_t extreme_of_warp(uint32_t value, const Place& place) {
  simt::warp_operation(place, &value, [](void** all) {
    uint32_t found = *static_cast<uint32_t*>(all[0]);
    for (int i = 1; i < 32; ++i)
      if (const uint32_t its = *static_cast<uint32_t*>(all[i]); most ? its > found : its < found) found = its;
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(all[i]) = found;
  });
  return value;
}
inline uint32_t warp_most(uint32_t value, const Place& place = Place::current()) {
  return extreme_of_warp<true>(value, place);
}
inline uint32_t warp_least(uint32_t value, const Place& place = Place::current()) {
  return extreme_of_warp<false>(value, place);
}

inline uint32_t ballot(bool vote, const Place& place = Place::current()) {
  struct Mine {
    bool vote;
    uint32_t out;
  } mine{vote, 0};
  simt::warp_operation(place, &mine, [](void** all) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= uint32_t(static_cast<Mine*>(all[i])->vote) << i;
    for (int i = 0; i < 32; ++i) static_cast<Mine*>(all[i])->out = bits;
  });
  return mine.out;
}

inline uint32_t warp_highest(uint32_t value, const Place& place = Place::current()) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(value, mask, place);
    value = other > value ? other : value;
  }
  return value;
}

inline int count_bits(uint32_t bits) { return std::popcount(bits); }
inline int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }

// ---- shared memory ------------------------------------------------------------------------------------------------

struct Shared {
  template <class T>
  T* take(int64_t count, const Place& place = Place::current()) {
    return static_cast<T*>(simt::shared_array(count * sizeof(T), place));
  }
};

inline int32_t atomic_add(int32_t* at, int32_t value) {
  const int32_t before = *at;
  *at += value;
  return before;
}

// ---- 16-bit types -------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }
inline float to_float(f16 value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }

inline void from_float(float value, bf16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  out.bits = value != value ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float value, f16& out) { out.bits = std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }

// Two elements in a word, the first in its low half.
template <class T>
float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <class T>
float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <class T>
uint32_t pack(float low, float high) {
  T a, b;
  from_float(low, a), from_float(high, b);
  return a.bits | uint32_t(b.bits) << 16;
}

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

template <class T>
inline uint32_t load_pair(const T* from) {  // from: a multiple of 4
  return uint32_t(from[0].bits) | uint32_t(from[1].bits) << 16;
}

// ---- 16 bytes at once ---------------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

inline void check_aligned(const void* at, const Place& place) {
  if (reinterpret_cast<uintptr_t>(at) % 16) simt::fail("an address is not a multiple of 16", place);
}

inline Bytes16 load16(const void* from, const Place& place = Place::current()) {
  check_aligned(from, place);
  return *static_cast<const Bytes16*>(from);
}
inline void store16(void* to, Bytes16 value, const Place& place = Place::current()) {
  check_aligned(to, place);
  *static_cast<Bytes16*>(to) = value;
}

template <int n>
void load_words(uint32_t (&out)[n], const void* from, const Place& place = Place::current()) {
  static_assert(n == 1 || n == 2 || n == 4);
  if (reinterpret_cast<uintptr_t>(from) % (4 * n)) simt::fail("an address is not a multiple of its words' size", place);
  std::memcpy(out, from, 4 * n);
}
template <int n>
void store_words(void* to, const uint32_t (&words)[n], const Place& place = Place::current()) {
  static_assert(n == 1 || n == 2 || n == 4);
  if (reinterpret_cast<uintptr_t>(to) % (4 * n)) simt::fail("an address is not a multiple of its words' size", place);
  std::memcpy(to, words, 4 * n);
}

inline Bytes16 load16_once(const void* from, const Place& place = Place::current()) { return load16(from, place); }
inline void prefetch(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }

inline uint32_t load_shared(const void* from) { return *static_cast<const uint32_t*>(from); }

inline void async_copy16(void* shared, const void* global, bool valid, const Place& place = Place::current()) {
  check_aligned(shared, place);
  if (valid) check_aligned(global, place);
  simt::async_copy(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}
inline void async_commit() { simt::async_commit(); }
template <int groups_left>
void async_wait() {
  simt::async_wait(groups_left);
}

// ---- tensor cores -------------------------------------------------------------------------------------------------

template <bool transposed>
void load_matrices(uint32_t (&out)[4], const void* row, const Place& place = Place::current()) {
  struct Mine {
    const uint16_t* row;
    uint32_t* out;
  } mine{static_cast<const uint16_t*>(row), out};
  check_aligned(row, place);
  simt::warp_operation(place, &mine, [](void** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int i, int j) { return static_cast<Mine*>(all[8 * matrix + i])->row[j]; };
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? element(j, i) : element(i, j);
        const uint32_t high = transposed ? element(j + 1, i) : element(i, j + 1);
        static_cast<Mine*>(all[lane])->out[matrix] = low | high << 16;
      }
  });
}

struct Fragments {
  float* c;
  const uint32_t *a, *b;
};

// As tensor cores round their sums: toward zero.
inline float toward_zero(double value) {
  const float near = static_cast<float>(value);
  return fabs(static_cast<double>(near)) > fabs(value) && !isinf(near) ? std::nextafterf(near, 0.0f) : near;
}

// c [16,8] += a [16,K] b [K,8] over the fragments of 32 lanes; `at` picks element `part` of a register.
template <int K, class At>
void multiply(void** all, const At& at) {
  constexpr int kParts = K / 8;  // elements per register: 1 (tf32) or 2
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(all[lane]);
    const int group = lane / 4, place = lane % 4;
    for (int part = 0; part < kParts; ++part)
      for (int half = 0; half < 2; ++half) {
        const int k = (half * 4 + place) * kParts + part;
        a[group][k] = at(f.a[half * 2], part);
        a[group + 8][k] = at(f.a[half * 2 + 1], part);
        b[k][group] = at(f.b[half], part);
      }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& c = static_cast<Fragments*>(all[lane])->c[i];
      double sum = c;
      for (int k = 0; k < K; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      c = toward_zero(sum);
    }
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Place& place = Place::current()) {
  Fragments mine{c, a, b};
  simt::warp_operation(place, &mine, [](void** all) {
    multiply<16>(all, [](uint32_t word, int part) { return to_float(T{static_cast<uint16_t>(word >> (16 * part))}); });
  });
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return value != value || isinf(value) ? bits : (bits + 0x1000) & ~0x1FFFu;
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const Place& place = Place::current()) {
  Fragments mine{c, a, b};
  simt::warp_operation(place, &mine, [](void** all) {
    multiply<8>(all, [](uint32_t word, int) { return std::bit_cast<float>(word & ~0x1FFFu); });
  });
}

inline uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// ---- launch -------------------------------------------------------------------------------------------------------

template <class Kernel>
void launch(const Grid& grid, size_t shared_bytes, Stream, const Kernel& kernel, bool together = false) {
  const auto body = [](const void* arguments) { (*static_cast<const Kernel*>(arguments))(); };
  simt::launch({static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)}, Kernel::kThreads,
               shared_bytes, together, {Kernel::kName, typeid(Kernel).name()}, body, &kernel);
}

// Few, so that blocks have more than one piece of work each, as on a GPU with large layers; with the shared memory of
// an A100.
template <class Kernel>
int64_t most_together(size_t shared_bytes) {
  return shared_bytes <= 163 * 1024 ? 3 : 0;
}
template <class Kernel>
void launch_together(int64_t blocks, size_t shared_bytes, Stream stream, const Kernel& kernel) {
  launch({blocks}, shared_bytes, stream, kernel, true);
}

}  // namespace moerge::cuda
