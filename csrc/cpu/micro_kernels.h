// Implementation of micro.h for one instruction set: included by micro_<set>.cpp, each compiled with its own flags and
// its own MOERGE_ISA namespace, so that no code built for one set can be linked into another. Only <cstdint> types and
// compiler vectors are used here, for the same reason.
//
// dot:  tiles of 4 x 4 outputs, one vector accumulator each: 16 independent FMA chains per 8 loads.
// axpy: tiles of 4 rows x 2 vectors: 8 chains per 2 vector loads and 4 broadcasts.
#pragma once

#include "micro.h"

namespace moerge::cpu::MOERGE_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

template <class Acc>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int n = 16;
  typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  static constexpr int n = 8;
  typedef double vec __attribute__((vector_size(64), aligned(8), may_alias));
};
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef f16 f16x16 __attribute__((vector_size(32), aligned(2), may_alias));

template <class Acc>
using Vec = typename Lanes<Acc>::vec;

inline float widen(bf16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16); }
inline float widen(f16 value) { return static_cast<float>(value); }
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

template <class Acc, class T>
inline Vec<Acc> load_vec(const T* p) {
  if constexpr (__is_same(Acc, T)) {
    return *reinterpret_cast<const Vec<Acc>*>(p);
  } else if constexpr (__is_same(Acc, float) && __is_same(T, bf16)) {
    u32x16 wide = __builtin_convertvector(*reinterpret_cast<const u16x16*>(p), u32x16);
    return reinterpret_cast<Vec<float>>(wide << 16);
  } else if constexpr (__is_same(Acc, float) && __is_same(T, f16)) {
    return __builtin_convertvector(*reinterpret_cast<const f16x16*>(p), Vec<float>);
  } else {
    Vec<Acc> result;
    for (int i = 0; i < Lanes<Acc>::n; ++i) result[i] = static_cast<Acc>(widen(p[i]));
    return result;
  }
}

// Pairwise, so that the order does not depend on the instruction set's shuffle.
template <class Acc>
inline Acc reduce(Vec<Acc> v) {
  constexpr int n = Lanes<Acc>::n;
  Acc lane[n];
  for (int i = 0; i < n; ++i) lane[i] = v[i];
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
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
  int64_t i = 0;
  for (; i + Lanes<Acc>::n <= n; i += Lanes<Acc>::n) *reinterpret_cast<Vec<Acc>*>(dst + i) = load_vec<Acc>(in + i);
  for (; i < n; ++i) dst[i] = static_cast<Acc>(widen(in[i]));
}

template <class Acc, class T>
void store(int64_t n, const Acc* src, void* dst) {
  T* out = static_cast<T*>(dst);
  for (int64_t i = 0; i < n; ++i) narrow(src[i], out + i);
}

template <class Acc, class T, int M, int N>
inline void dot_tile(int64_t D, const Acc* const* x, const void* const* w, Acc* const* out, int64_t n0) {
  constexpr int lanes = Lanes<Acc>::n;
  Vec<Acc> sum[M][N] = {};
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
    Vec<Acc> a[M], b[N];
    for (int m = 0; m < M; ++m) a[m] = load_vec<Acc>(x[m] + d);
    for (int n = 0; n < N; ++n) b[n] = load_vec<Acc>(static_cast<const T*>(w[n]) + d);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sum[m][n] += a[m] * b[n];
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      Acc tail = 0;
      for (int64_t i = d; i < D; ++i) tail += x[m][i] * static_cast<Acc>(widen(static_cast<const T*>(w[n])[i]));
      out[m][n0 + n] = reduce<Acc>(sum[m][n]) + tail;
    }
}

template <class Acc, class T, int M>
inline void dot_rows(int64_t N, int64_t D, const Acc* const* x, const void* const* w, Acc* const* out) {
  int64_t n = 0;
  for (; n + 4 <= N; n += 4) dot_tile<Acc, T, M, 4>(D, x, w + n, out, n);
  for (; n < N; ++n) dot_tile<Acc, T, M, 1>(D, x, w + n, out, n);
}

template <class Acc, class T>
void dot(int64_t M, int64_t N, int64_t D, const Acc* const* x, const void* const* w, Acc* const* out) {
  // w in groups that stay in the first-level cache while every row of x passes
  constexpr int64_t group = 8;
  for (int64_t n = 0; n < N; n += group) {
    const int64_t count = N - n < group ? N - n : group;
    int64_t m = 0;
    for (; m < M; m += M - m >= 4 ? 4 : 1) {
      Acc* shifted[4];
      const int rows = M - m >= 4 ? 4 : 1;
      for (int i = 0; i < rows; ++i) shifted[i] = out[m + i] + n;
      if (rows == 4)
        dot_rows<Acc, T, 4>(count, D, x + m, w + n, shifted);
      else
        dot_rows<Acc, T, 1>(count, D, x + m, w + n, shifted);
    }
  }
}

template <class Acc, class T, int M, int V>
inline void axpy_tile(int64_t I, int64_t j, const Acc* const* h, const void* const* w, Acc* const* out) {
  constexpr int lanes = Lanes<Acc>::n;
  Vec<Acc> sum[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sum[m][v] = load_vec<Acc>(out[m] + j + v * lanes);
  for (int64_t i = 0; i < I; ++i) {
    Vec<Acc> row[V];
    for (int v = 0; v < V; ++v) row[v] = load_vec<Acc>(static_cast<const T*>(w[i]) + j + v * lanes);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) sum[m][v] += h[m][i] * row[v];
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vec<Acc>*>(out[m] + j + v * lanes) = sum[m][v];
}

template <class Acc, class T, int M>
inline void axpy_rows(int64_t I, int64_t J, const Acc* const* h, const void* const* w, Acc* const* out) {
  constexpr int lanes = Lanes<Acc>::n;
  int64_t j = 0;
  for (; j + 2 * lanes <= J; j += 2 * lanes) axpy_tile<Acc, T, M, 2>(I, j, h, w, out);
  for (; j + lanes <= J; j += lanes) axpy_tile<Acc, T, M, 1>(I, j, h, w, out);
  for (; j < J; ++j)
    for (int m = 0; m < M; ++m) {
      Acc sum = out[m][j];
      for (int64_t i = 0; i < I; ++i) sum += h[m][i] * static_cast<Acc>(widen(static_cast<const T*>(w[i])[j]));
      out[m][j] = sum;
    }
}

template <class Acc, class T>
void axpy(int64_t M, int64_t I, int64_t J, const Acc* const* h, const void* const* w, Acc* const* out) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) axpy_rows<Acc, T, 4>(I, J, h + m, w, out + m);
  for (; m < M; ++m) axpy_rows<Acc, T, 1>(I, J, h + m, w, out + m);
}

inline Vec<double> load_double(const float* p) {
  typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const f32x8*>(p), Vec<double>);
}
inline Vec<double> load_double(const double* p) { return load_vec<double>(p); }

template <class Acc>
double sum(int64_t n, const Acc* x) {
  Vec<double> sums[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int k = 0; k < 4; ++k) sums[k] += load_double(x + i + 8 * k);
  double total = reduce<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += x[i];
  return total;
}

template <class Acc>
double squares(int64_t n, const Acc* x, double mean) {
  Vec<double> sums[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int k = 0; k < 4; ++k) {
      const Vec<double> centred = load_double(x + i + 8 * k) - mean;
      sums[k] += centred * centred;
    }
  double total = reduce<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += (x[i] - mean) * (x[i] - mean);
  return total;
}

template <class Acc>
void affine(int64_t n, const Acc* x, Acc shift, Acc rest, Acc factor, Acc* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - shift - rest) * factor;
}

template <class Acc, class T>
constexpr Micro<Acc> make() {
  return {load<Acc, T>, store<Acc, T>, dot<Acc, T>, axpy<Acc, T>};
}

}  // namespace

// Indexed by DType.
extern const Micro<float> table_f32[4] = {make<float, float>(), make<float, double>(), make<float, bf16>(),
                                          make<float, f16>()};
extern const Micro<double> table_f64[4] = {make<double, float>(), make<double, double>(), make<double, bf16>(),
                                           make<double, f16>()};
extern const RowMicro<float> rows_f32 = {sum<float>, squares<float>, affine<float>};
extern const RowMicro<double> rows_f64 = {sum<double>, squares<double>, affine<double>};

}  // namespace moerge::cpu::MOERGE_ISA
