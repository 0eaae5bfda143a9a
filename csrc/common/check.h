// Argument checks. One message format for every op:
//   moerge::<op>: <argument> must be <what, with values>, got <what>
// The Python wrappers turn these errors into ValueError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace moerge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class Values>
inline std::string listed(const Tensor& tensor, const Values& of_axis) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << of_axis(i);
  out << ']';
  return out.str();
}

inline std::string shape_of(const Tensor& tensor) {
  return listed(tensor, [&](int64_t i) { return tensor.size(i); });
}

inline std::string strides_of(const Tensor& tensor) {
  return listed(tensor, [&](int64_t i) { return tensor.stride(i); });
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// The name a user of torch knows: "float32", not "Float".
inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return torch::headeronly::toString(type);
  }
}

enum class Device { cpu, cuda };

// The checks of one op; `op` is its name without the namespace, and its tensors live on `device`.
struct Check {
  const char* op;
  Device device;
  mutable int64_t index = -1;  // of the GPU, once a tensor has told it

  template <class... Parts>
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) const {
    throw std::runtime_error(text("moerge::", op, ": ", parts...));
  }

  // Shape check; -1 in `sizes` matches anything. `wanted` is how the message spells the shape, with values.
  template <class... Parts>
  void shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
             const Parts&... wanted) const {
    bool ok = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t axis = 0;
    for (int64_t size : sizes) {
      if (ok && size >= 0) ok = tensor.size(axis) == size;
      ++axis;
    }
    if (!ok) fail(name, " must be ", wanted..., ", got ", shape_of(tensor));
  }

  // Torch hands the op of the CPU no tensor from elsewhere; that of a GPU may get tensors of the CPU beside its own.
  void here(const Tensor& tensor, const char* name) const {
    if (device == Device::cpu) return;
    if (!tensor.is_cuda())
      fail(name, " must be on a CUDA device like the others, got one on ",
           tensor.is_cpu() ? "the CPU" : "another device");
    const int64_t its = tensor.get_device_index();
    if (index < 0) index = its;
    if (its != index) fail(name, " must be on cuda:", index, " like the others, got one on cuda:", its);
  }

  void floating(const Tensor& tensor, const char* name) const {
    here(tensor, name);
    if (!is_floating(tensor.scalar_type()))
      fail(name, " must be float16, bfloat16, float32 or float64, got ", name_of(tensor.scalar_type()));
  }

  void dtype(const Tensor& tensor, const char* name, ScalarType type, const char* why = "") const {
    here(tensor, name);
    if (tensor.scalar_type() != type)
      fail(name, " must be ", name_of(type), why, ", got ", name_of(tensor.scalar_type()));
  }
};

}  // namespace moerge

// Fails unless `ok`. A macro, so that the parts of the message are made only then: texts cost more than the checks.
#define MOERGE_CHECK(check, ok, ...) ((ok) ? void() : (check).fail(__VA_ARGS__))
