// The inner loops of every CPU op, compiled once per instruction set and chosen at run time (dispatch.cpp).
// Plain pointers and plain C++: nothing here knows torch.
//
// Every output element is accumulated in one fixed order whatever the tile it is computed in, so results do not depend
// on the number of threads or on how an op cuts its work.
#pragma once

#include <cstdint>

namespace moerge::cpu {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

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
  // out[m][j] += sum_i h[m][i] * w[i][j]
  void (*axpy)(int64_t M, int64_t I, int64_t J, const Acc* const* h, const void* const* w, Acc* const* out);
};

template <class Acc>
const Micro<Acc>& micro(DType w);

// The loops over one row that do not depend on a stored dtype. Sums are kept in double, so that a mean of 1000 with a
// deviation of 0.5 keeps its digits.
template <class Acc>
struct RowMicro {
  // sum_i x[i]
  double (*sum)(int64_t n, const Acc* x);
  // sum_i (x[i] - mean)^2
  double (*squares)(int64_t n, const Acc* x, double mean);
  // out[i] = (x[i] - shift - rest) * factor; out may be x
  void (*affine)(int64_t n, const Acc* x, Acc shift, Acc rest, Acc factor, Acc* out);
};

template <class Acc>
const RowMicro<Acc>& row_micro();

// "avx512", "avx2" or "portable": what this machine runs.
const char* instruction_set();

}  // namespace moerge::cpu
