// From torch's arguments to launch.h's: checks, copies of what no kernel can read as it lies, pointers. Shared by the
// bind files, which alone see torch here.
#pragma once

#include <bind_device.h>

#include <tuple>

#include "../common/check_lora.h"

namespace moerge::cuda {

inline int64_t accumulator_size(bool wide) { return wide ? 8 : 4; }

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

// The map whose arguments check_rows has seen. Values cannot be checked without waiting for the device: kernels take a
// token with a row out of range for one of no row.
inline Rows row_map(Call& call, const std::optional<Tensor>& rows, int64_t n_rows, int64_t tokens_per_row) {
  Rows map;
  map.n = n_rows > 1 ? n_rows : 1;
  map.tokens_per_row = tokens_per_row;
  if (rows && n_rows) map.rows = static_cast<const int32_t*>(call.read(dense(*rows)));
  return map;
}

// The arguments of route as the kernels take them, without workspace. T = 0 leaves nothing to run.
Route route_arguments(const RoutePlan& plan, Call& call, const Tensor& x, const Tensor& gates,
                      const RouteOptions& options);

// Enqueues route into weights and experts on `stream`, the call's own or one forked from it.
void run_route(Route route, Call& call, const Tensor& weights, const Tensor& experts, Stream stream);

}  // namespace moerge::cuda
