// From torch's arguments to launch.h's: checks, copies of what no kernel can read as it lies, pointers. Shared by the
// bind files, which alone see torch here.
#pragma once

#include <bind_device.h>

#include <cmath>
#include <tuple>

namespace moerge::cuda {

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      return DType::f16;
  }
}

inline bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }
inline ScalarType accumulator(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }
inline int64_t accumulator_size(bool wide) { return wide ? 8 : 4; }

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor dense(const Tensor& tensor, ScalarType type) {
  return dense(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// The matrix itself when its rows are contiguous, and begin at multiples of 16 bytes where their size is one (so that
// which kernel runs depends on sizes and types alone); else a copy.
inline Tensor readable_rows(const Tensor& tensor) {
  const int64_t size = tensor.element_size(), columns = tensor.size(1);
  if (columns > 1 && tensor.stride(1) != 1) return torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 &&
                       (tensor.size(0) < 2 || tensor.stride(0) * size % 16 == 0);
  if (columns * size % 16 || aligned) return tensor;
  return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
}

inline Matrix matrix(const Tensor& tensor, void* data) {
  return {data, dtype_of(tensor), tensor.size(0) < 2 ? tensor.size(1) : tensor.stride(0)};
}

// Checks `rows` (or that T divides evenly); n_rows 0: nothing is per row. Values cannot be checked without waiting for
// the device: kernels take a token with a row out of range for one of no row.
inline Rows row_map(const Check& check, Call& call, const std::optional<Tensor>& rows, int64_t tokens, int64_t n_rows) {
  Rows map;
  if (rows) {
    MOERGE_CHECK(check, on_device(*rows), "rows must be on ", kDevice);
    check.dtype(*rows, "rows", ScalarType::Int);
    check.shape(*rows, "rows", {tokens}, "[T=", tokens, "]");
  }
  map.n = n_rows > 1 ? n_rows : 1;
  if (rows && n_rows) {
    map.rows = static_cast<const int32_t*>(call.read(dense(*rows)));
    return map;
  }
  MOERGE_CHECK(check, tokens % map.n == 0, "the number of tokens T=", tokens, " must be a multiple of N=", map.n,
               " rows, or rows [T] must say which row each token belongs to");
  map.tokens_per_row = tokens > map.n ? tokens / map.n : 1;
  return map;
}

// The options of route, as the ops take them.
struct RouteOptions {
  int64_t top_k;
  std::string normalize;
  bool absolute;
  std::optional<double> scale;
  std::optional<Tensor> bias, rows, mask;
  std::optional<double> top_p;
  std::string weighting;
};

// Checked arguments of route, with workspace. T = 0 leaves nothing to run.
Route route_arguments(const Check& check, Call& call, const Tensor& x, const Tensor& gates,
                      const RouteOptions& options);

// Runs route into weights and experts.
void run_route(Route route, Call& call, const Tensor& weights, const Tensor& experts);

}  // namespace moerge::cuda
