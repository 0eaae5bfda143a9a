// Small words over torch's stable tensors, for both devices.
#pragma once

#include <cstring>

#include "check.h"
#include "types.h"

namespace moerge {

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

// The tensor itself when it is so already (a call into torch costs microseconds), else a copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline Tensor dense(const Tensor& tensor, ScalarType type) {
  return dense(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// A text as an op may return it: uint8 on the CPU. (A `str` would be kept for ever: torch copies it out of a string
// that nobody deletes, 80 bytes a call.)
inline Tensor bytes_of(const std::string& said) {
  const Tensor bytes = torch::stable::empty({static_cast<int64_t>(said.size())}, ScalarType::Byte);
  std::memcpy(bytes.data_ptr(), said.data(), said.size());
  return bytes;
}

// [..., C] -> [T, C] ([C] is one token), as a view: a contiguous tensor, or a slice of its columns, whose rows lie at
// equal distances. Without a call of the dispatcher, which costs as much as the rest of a small op.
inline Tensor flattened(const Check& check, const Tensor& tensor, const char* name) {
  const int64_t dims = tensor.dim();
  if (dims == 2) return tensor;
  const bool dense = dims > 0 && tensor.is_contiguous();
  const int64_t columns = dims > 0 ? tensor.size(dims - 1) : 0;
  int64_t rows = 1, distance = columns;
  bool even = dims > 0;
  for (int64_t i = dims - 2; i >= 0; --i) {
    const int64_t size = tensor.size(i);
    if (!dense && size != 1) {
      if (rows == 1) distance = tensor.stride(i);
      even = even && tensor.stride(i) == rows * distance;
    }
    rows *= size;
  }
  MOERGE_CHECK(check, even, name, " must be [T, ", *name == 'x' ? 'D' : 'O',
               "], or with another number of dimensions have its rows at equal distances, got ", shape_of(tensor),
               " with strides ", strides_of(tensor));
  const int64_t sizes[] = {rows, columns}, strides[] = {distance, dense ? 1 : tensor.stride(dims - 1)};
  AtenTensorHandle flat;
  const int64_t further = 0;  // than the tensor's own offset
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, further, &flat));
  return Tensor(flat);
}

}  // namespace moerge
