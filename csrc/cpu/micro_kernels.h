// Implementation of micro.h for one instruction set: included by micro_<set>.cpp, each compiled with its own flags and
// its own MOERGE_ISA namespace, so that no code built for one set can be linked into another. Only <cstdint> types
// and compiler vectors are used here, for the same reason.
//
// dot:  tiles of 4 x 4 outputs, one vector accumulator each: 16 independent FMA chains per 8 loads; where there are 16
//       registers, of 3 x 2 outputs with two vectors each (T = 256, E = 36, D = 2048, float32, us against 4 x 4 with 64
//       bytes each: AVX2 835 (3750), portable 1250 (2880)).
// axpy: tiles of 8 rows x 2 vectors: 16 chains per 2 vector loads and 8 broadcasts; of 4 x 2 where there are 16
//       registers. Of four rows on, their next columns are asked for early (routed_lora_, T = 512, float32, one thread,
//       Zen 4, ms: AVX2 SmolLM2's layers 175 against 180, three of 2048 -> 2048 with E = 36 89 against 94; AVX-512 84
//       against 85 there).
// tall: micro_tall.h.
#pragma once

#include "micro.h"

namespace moerge::cpu::MOERGE_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

// Lanes<Acc, N>::vec: N numbers; the other vectors are what N stored numbers look like.
template <class Acc, int N>
struct Lanes;
#define MOERGE_LANES(Acc, N)                                                                         \
  template <>                                                                                        \
  struct Lanes<Acc, N> {                                                                             \
    typedef Acc vec __attribute__((vector_size(N * sizeof(Acc)), aligned(alignof(Acc)), may_alias)); \
    typedef float f32 __attribute__((vector_size(N * 4), aligned(4), may_alias));                    \
    typedef uint32_t u32 __attribute__((vector_size(N * 4)));                                        \
    typedef uint16_t u16 __attribute__((vector_size(N * 2), aligned(2), may_alias));                 \
    typedef f16 half __attribute__((vector_size(N * 2), aligned(2), may_alias));                     \
  };
MOERGE_LANES(float, 16)
MOERGE_LANES(float, 8)
MOERGE_LANES(float, 4)
MOERGE_LANES(double, 8)
MOERGE_LANES(double, 4)
MOERGE_LANES(double, 2)
#undef MOERGE_LANES

template <class Acc, int N>
using Vec = typename Lanes<Acc, N>::vec;
template <class Acc>
constexpr int kWide = kVectorBytes / sizeof(Acc);  // numbers in one register
// dot sums 64 bytes of lanes on every machine, so that its order does not depend on the width of a register
template <class Acc>
constexpr int kDotLanes = 64 / sizeof(Acc);
template <class Acc>
constexpr int kDotParts = kDotLanes<Acc> / kWide<Acc>;  // registers that hold them

inline float widen(bf16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16); }
inline float widen(f16 value) { return static_cast<float>(value); }
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

#ifdef __F16C__
// One instruction: GCC 12 makes one for each number of __builtin_convertvector here, and a branch of T = 8 over float16
// factors (SmolLM2's layers, E = 8, one thread) took 4 times as long.
template <int N>
inline Vec<float, N> widen_halves(const typename Lanes<float, N>::half& halves) {
  Vec<float, N> wide;
#ifdef __AVX512F__
  asm("vcvtph2ps %1, %0" : "=v"(wide) : "m"(halves));
#else
  asm("vcvtph2ps %1, %0" : "=x"(wide) : "m"(halves));
#endif
  return wide;
}
#endif

// bfloat16 in the lower halves of 32 bits. One instruction, of which GCC 12 makes five where a register holds them.
template <int N>
inline typename Lanes<float, N>::u32 lower_halves(const bf16* from) {
  const typename Lanes<float, N>::u16& bits = *reinterpret_cast<const typename Lanes<float, N>::u16*>(from);
#ifdef __AVX2__
  if constexpr (N == kWide<float>) {
    typename Lanes<float, N>::u32 wide;
    asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(bits));
    return wide;
  }
#endif
  return __builtin_convertvector(bits, typename Lanes<float, N>::u32);
}

template <class Acc, int N, class T>
inline Vec<Acc, N> load_vec(const T* p) {
  using L = Lanes<Acc, N>;
  if constexpr (__is_same(Acc, T)) {
    return *reinterpret_cast<const Vec<Acc, N>*>(p);
  } else if constexpr (__is_same(Acc, float) && __is_same(T, bf16)) {
    return reinterpret_cast<Vec<float, N>>(lower_halves<N>(p) << 16);
  } else if constexpr (__is_same(Acc, float) && __is_same(T, f16)) {
    const auto& halves = *reinterpret_cast<const typename L::half*>(p);
#ifdef __F16C__
    if constexpr (N == kWide<float>) return widen_halves<N>(halves);
#endif
    return __builtin_convertvector(halves, Vec<float, N>);
  } else if constexpr (__is_same(Acc, double) && __is_same(T, float)) {
    return __builtin_convertvector(*reinterpret_cast<const typename L::f32*>(p), Vec<double, N>);
  } else {
    Vec<Acc, N> result;
    for (int i = 0; i < N; ++i) result[i] = static_cast<Acc>(widen(p[i]));
    return result;
  }
}

template <class Acc, int N>
inline void store_vec(Vec<Acc, N> value, Acc* p) {
  *reinterpret_cast<Vec<Acc, N>*>(p) = value;
}

// Keeps a vector in its register: GCC would load a tile's row of w again for every multiplication, and the loads are
// what bounds a tile (1.35 times the time of a 3 x 2 tile of `tall`).
template <class V>
inline void pin(V& vector) {
#ifdef __AVX512F__
  asm("" : "+v"(vector));
#elif defined(__AVX2__)
  asm("" : "+x"(vector));
#else
  (void)vector;
#endif
}

// Asks for the cache lines of `bytes` from p on.
template <int bytes>
[[gnu::always_inline]] inline void fetch(const void* p) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
}

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

// f(0), ..., f(N-1) with constants: what a loop variable indexes, GCC may leave in memory (2.5 times the time of a
// tile).
template <int N, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(Index<N - 1>{});
  }
}
// f(m, n) for all m < M and n < N
template <int M, int N, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  unrolled<M>([&](auto m) __attribute__((always_inline)) {
    unrolled<N>([&](auto n) __attribute__((always_inline)) { f(m, n); });
  });
}
#define MOERGE_INLINE __attribute__((always_inline))

// The sum of all lanes, pairwise: the order does not depend on how wide a register is.
template <class Acc, int n>
[[gnu::always_inline]] inline Acc reduce(Vec<Acc, n> v) {
  if constexpr (n * sizeof(Acc) > 16) {
    Vec<Acc, n / 2> half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return reduce<Acc, n / 2>(half[0] + half[1]);
  } else if constexpr (n == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return v[0] + v[1];
  }
}

// The same of the 64 bytes of lanes that these registers are.
template <class Acc>
[[gnu::always_inline]] inline Acc reduce_parts(Vec<Acc, kWide<Acc>> (&part)[kDotParts<Acc>]) {
  for (int half = kDotParts<Acc> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return reduce<Acc, kWide<Acc>>(part[0]);
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }
inline void narrow(double value, float* out) { *out = static_cast<float>(value); }
inline void narrow(float value, double* out) { *out = value; }
inline void narrow(float value, f16* out) { *out = static_cast<f16>(value); }
inline void narrow(double value, f16* out) { *out = static_cast<f16>(value); }
inline void narrow(float value, bf16* out) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}
inline void narrow(double value, bf16* out) { narrow(static_cast<float>(value), out); }

template <class Acc, class T>
void load(int64_t n, const void* src, Acc* dst) {
  const T* in = static_cast<const T*>(src);
  constexpr int lanes = kWide<Acc>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_vec<Acc, lanes>(load_vec<Acc, lanes>(in + i), dst + i);
  for (; i < n; ++i) dst[i] = static_cast<Acc>(widen(in[i]));
}

template <class Acc, class T>
void store(int64_t n, const Acc* src, void* dst) {
  T* out = static_cast<T*>(dst);
  for (int64_t i = 0; i < n; ++i) narrow(src[i], out + i);
}

constexpr int64_t kAhead = 1024;  // bytes of a row of w that are asked for early

// The lanes of an output are P registers' worth at a time, and the sums of a tile fit the registers. With `fetching`,
// the rows of w come from memory and those of `next` are read after them.
template <class Acc, class T, int M, int N, bool fetching = false>
inline void dot_tile(int64_t D, const Acc* const* x, const void* const* w, Acc* const* out, int64_t n0,
                     const void* const* next = nullptr) {
  constexpr int lanes = kDotLanes<Acc>, wide = kWide<Acc>, P = kDotParts<Acc> < 2 ? 1 : 2;
  const int64_t whole = D / lanes * lanes;
  Vec<Acc, wide> total[M][N][kDotParts<Acc>];
  for (int part = 0; part < kDotParts<Acc>; part += P) {
    Vec<Acc, wide> sum[P][M][N] = {};
    for (int64_t d = part * wide; d < whole; d += lanes)
      unrolled<P>([&](auto p) MOERGE_INLINE {
        Vec<Acc, wide> b[N];
        unrolled<N>([&](auto n)
                        MOERGE_INLINE { pin(b[n] = load_vec<Acc, wide>(static_cast<const T*>(w[n]) + d + p * wide)); });
        if constexpr (fetching) {
          const int64_t at = d + p * wide + kAhead / static_cast<int64_t>(sizeof(T)), from = at < D ? 0 : D;
          const void* const* soon = at < D ? w : next;
          unrolled<N>([&](auto n) MOERGE_INLINE { __builtin_prefetch(static_cast<const T*>(soon[n]) + (at - from)); });
        }
        unrolled<M>([&](auto m) MOERGE_INLINE {
          const Vec<Acc, wide> a = load_vec<Acc, wide>(x[m] + d + p * wide);
          unrolled<N>([&](auto n) MOERGE_INLINE { sum[p][m][n] += a * b[n]; });
        });
      });
    unrolled<M, N>([&](auto m, auto n) MOERGE_INLINE {
      unrolled<P>([&](auto p) MOERGE_INLINE { total[m][n][part + p] = sum[p][m][n]; });
    });
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      Acc tail = 0;
      for (int64_t d = whole; d < D; ++d) tail += x[m][d] * static_cast<Acc>(widen(static_cast<const T*>(w[n])[d]));
      out[m][n0 + n] = reduce_parts<Acc>(total[m][n]) + tail;
    }
}

template <class Acc, class T, int M>
inline void dot_rows(int64_t N, int64_t D, const Acc* const* x, const void* const* w, Acc* const* out) {
  constexpr int columns = kRegisters == 32 ? 4 : 2;
  int64_t n = 0;
  for (; n + columns <= N; n += columns) dot_tile<Acc, T, M, columns>(D, x, w + n, out, n);
  for (; n < N; ++n) dot_tile<Acc, T, M, 1>(D, x, w + n, out, n);
}

template <class Acc, class T>
void dot(int64_t M, int64_t N, int64_t D, const Acc* const* x, const void* const* w, Acc* const* out) {
  // w in groups that stay in the first-level cache while every row of x passes
  constexpr int64_t group = 8;
  constexpr int rows = kRegisters == 32 ? 4 : 3;
  for (int64_t n = 0; n < N; n += group) {
    const int64_t count = N - n < group ? N - n : group;
    for (int64_t m = 0, taken; m < M; m += taken) {
      taken = M - m >= rows ? rows : 1;
      Acc* shifted[rows];
      for (int64_t i = 0; i < taken; ++i) shifted[i] = out[m + i] + n;
      if (taken == rows)
        dot_rows<Acc, T, rows>(count, D, x + m, w + n, shifted);
      else
        dot_rows<Acc, T, 1>(count, D, x + m, w + n, shifted);
    }
  }
}

template <class Acc, class T, int M, int V, int N>
inline void axpy_tile(int64_t I, int64_t j, const Acc* const* h, const void* const* w, const Acc* const* base,
                      Acc* const* out, const void* const* next) {
  Vec<Acc, N> sum[M][V];
  unrolled<M, V>([&](auto m, auto v) MOERGE_INLINE {
    sum[m][v] = load_vec<Acc, N>(base[m] + j + v * N);
    if constexpr (M >= 4) __builtin_prefetch(base[m] + j + v * N + 2 * V * N);
  });
  for (int64_t i = 0; i < I; ++i) {
    Vec<Acc, N> row[V];
    const T* from = static_cast<const T*>(w[i]) + j;
    unrolled<V>([&](auto v) MOERGE_INLINE { pin(row[v] = load_vec<Acc, N>(from + v * N)); });
    if (next) fetch<V * N * sizeof(T)>(static_cast<const T*>(next[i]) + j);
    unrolled<M, V>([&](auto m, auto v) MOERGE_INLINE { sum[m][v] += h[m][i] * row[v]; });
  }
  unrolled<M, V>([&](auto m, auto v) MOERGE_INLINE { store_vec<Acc, N>(sum[m][v], out[m] + j + v * N); });
}

template <class Acc, class T, int M>
inline void axpy_rows(int64_t I, int64_t J, const Acc* const* h, const void* const* w, const Acc* const* base,
                      Acc* const* out, const void* const* next) {
  constexpr int lanes = kWide<Acc>;
  int64_t j = 0;
  for (; j + 2 * lanes <= J; j += 2 * lanes) axpy_tile<Acc, T, M, 2, lanes>(I, j, h, w, base, out, next);
  for (; j + lanes <= J; j += lanes) axpy_tile<Acc, T, M, 1, lanes>(I, j, h, w, base, out, next);
  for (; j < J; ++j)
    for (int m = 0; m < M; ++m) {
      Acc sum = base[m][j];
      for (int64_t i = 0; i < I; ++i) sum += h[m][i] * static_cast<Acc>(widen(static_cast<const T*>(w[i])[j]));
      out[m][j] = sum;
    }
}

template <class Acc, class T>
void axpy(int64_t M, int64_t I, int64_t J, const Acc* const* h, const void* const* w, const Acc* const* base,
          Acc* const* out, const void* const* next) {
  int64_t m = 0;
  const auto rows = [&]<int Count>() {
    for (; m + Count <= M; m += Count)
      axpy_rows<Acc, T, Count>(I, J, h + m, w, base + m, out + m, m == 0 ? next : nullptr);
  };
  if constexpr (kRegisters == 32) rows.template operator()<8>();
  rows.template operator()<4>();
  rows.template operator()<2>();
  rows.template operator()<1>();
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA

#include "micro_linear.h"
#include "micro_rows.h"
#include "micro_tall.h"
#include "micro_two.h"

namespace moerge::cpu::MOERGE_ISA {
namespace {

template <class Acc, class T>
constexpr Micro<Acc> make() {
  return {load<Acc, T>, store<Acc, T>, dot<Acc, T>, axpy<Acc, T>, tall<Acc, T>, few_linear<Acc, T>()};
}

}  // namespace

// Indexed by DType.
extern const Micro<float> table_f32[4] = {make<float, float>(), make<float, double>(), make<float, bf16>(),
                                          make<float, f16>()};
extern const Micro<double> table_f64[4] = {make<double, float>(), make<double, double>(), make<double, bf16>(),
                                           make<double, f16>()};
extern const RowMicro<float> rows_f32 = {sum<float>, moments<float>, centre<float>, multiply<float>, two};
extern const RowMicro<double> rows_f64 = {sum<double>, moments<double>, centre<double>, multiply<double>, nullptr};

}  // namespace moerge::cpu::MOERGE_ISA
