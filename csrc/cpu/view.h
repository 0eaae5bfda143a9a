// Between tensors and micro.h: typed strided views, the map from tokens to rows, per-thread scratch, parallel loops.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/tensors.h"
#include "micro.h"
#include "team.h"

namespace moerge::cpu {

// The tensor itself when its last axis has stride 1 (or one element), else a contiguous copy.
inline Tensor rows_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A matrix whose rows are contiguous.
struct Matrix {
  DType dtype;
  char* data;
  int64_t row_bytes;

  Matrix(const Tensor& tensor)
      : dtype(dtype_of(tensor)),
        data(static_cast<char*>(tensor.data_ptr())),
        row_bytes(tensor.stride(0) * size_of(dtype)) {}

  void* at(int64_t row, int64_t column = 0) const { return data + row * row_bytes + column * size_of(dtype); }
};

// A stack of factors seen as [E,R,C] (C is D for A and O for B), in whatever strides they came.
struct Factors {
  DType dtype;
  char* data;
  int64_t expert_stride, rank_stride, column_stride;  // in elements
  int64_t ranks, columns;

  // axis_r, axis_c: which axes of `tensor` are R and C
  Factors(const Tensor& tensor, int axis_r, int axis_c)
      : dtype(dtype_of(tensor)),
        data(static_cast<char*>(tensor.data_ptr())),
        expert_stride(tensor.stride(0)),
        rank_stride(tensor.stride(axis_r)),
        column_stride(tensor.size(axis_c) <= 1 ? 1 : tensor.stride(axis_c)),
        ranks(tensor.size(axis_r)),
        columns(tensor.size(axis_c)) {}

  // One half of the result of pack_experts.
  Factors(const Tensor& packed, int64_t offset, int64_t ranks, int64_t columns, int64_t rank_stride,
          int64_t column_stride)
      : dtype(dtype_of(packed)),
        data(static_cast<char*>(packed.data_ptr()) + offset * size_of(dtype)),
        expert_stride(packed.stride(0)),
        rank_stride(rank_stride),
        column_stride(column_stride),
        ranks(ranks),
        columns(columns) {}

  // Whether the ranks of a column lie side by side and the columns one after the other, as `tall` reads them.
  bool tall() const { return rank_stride == 1 && column_stride != 1 && column_stride >= ranks; }

  const char* at(int64_t expert, int64_t rank, int64_t column) const {
    return data + (expert * expert_stride + rank * rank_stride + column * column_stride) * size_of(dtype);
  }
};

// Which of the N rows token t belongs to.
struct RowMap {
  const int32_t* rows = nullptr;  // [T], or null: tokens of a row are adjacent
  int64_t tokens_per_row = 1;
  std::optional<Tensor> held = {};  // where `rows` lie

  int64_t operator()(int64_t token) const { return rows ? rows[token] : token / tokens_per_row; }
};

// The map whose arguments check_rows has seen. `n_rows` 0: nothing is per row, and rows do not matter.
inline RowMap row_map(const Check& check, const std::optional<Tensor>& rows, int64_t tokens, int64_t n_rows,
                      int64_t tokens_per_row) {
  RowMap map;
  map.tokens_per_row = tokens_per_row;
  if (!rows || !n_rows) return map;
  map.held = dense(*rows);
  map.rows = static_cast<const int32_t*>(map.held->data_ptr());
  for (int64_t t = 0; t < tokens; ++t)
    MOERGE_CHECK(check, map.rows[t] >= 0 && map.rows[t] < n_rows, "rows must hold values in [0, N=", n_rows, "), got ",
                 map.rows[t], " for token ", t);
  return map;
}

constexpr int kSharedSlot = 6;  // of scratch: what Workspace hands out

// Memory of one thread that is kept between calls; `slot` tells apart buffers that live at the same time.
template <class T>
T* scratch(int slot, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[kSharedSlot + 1];
  Buffer& buffer = buffers[slot];
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, bytes);
    buffer.bytes = buffer.data ? bytes : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return static_cast<T*>(buffer.data);
}

// Memory that all threads of one call share: kept by the calling thread up to kKept bytes, the rest freed at the end.
class Workspace {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (used_ + bytes <= kKept) {
      char* start = scratch<char>(kSharedSlot, kKept) + used_;
      used_ += bytes;
      return reinterpret_cast<T*>(start);
    }
    extra_.emplace_back(std::aligned_alloc(64, bytes), &std::free);
    if (!extra_.back()) throw std::bad_alloc();
    return static_cast<T*>(extra_.back().get());
  }

 private:
  static constexpr size_t kKept = size_t{1} << 22;
  size_t used_ = 0;
  std::vector<std::unique_ptr<void, decltype(&std::free)>> extra_;
};

// Rounded up; a division by nothing counts as by one (E may be 0).
inline int64_t ceil_div(int64_t a, int64_t b) { return b > 0 ? (a + b - 1) / b : a; }

template <class Acc>
constexpr ScalarType scalar_type = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;

template <class Acc>
constexpr DType dtype_as = std::is_same_v<Acc, double> ? DType::f64 : DType::f32;

// The address of columns [c, c+columns) of row `t` as Acc: in place when they are stored so, else loaded into `buffer`.
template <class Acc>
const Acc* row_as(const Matrix& x, int64_t t, int64_t columns, Acc* buffer, int64_t c = 0) {
  if (x.dtype == dtype_as<Acc>) return static_cast<Acc*>(x.at(t, c));
  micro<Acc>(x.dtype).load(columns, x.at(t, c), buffer);
  return buffer;
}

}  // namespace moerge::cpu
