// The twin of csrc/cuda/bind_device.h for the emulator: every tensor that a kernel sees is copied into guarded memory,
// so that an access beside it is caught; what the kernels must write starts as NaN and is copied back at the end.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>
#include <memory>
#include <vector>

#include "../common/check.h"
#include "../cuda/launch.h"
#include "guarded.h"

#define MOERGE_DISPATCH_KEY CPU

namespace moerge::cuda {

constexpr Device kDevice = Device::cpu;

inline void add_product(const Tensor& y, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), y.get(), a.get(), b.get(), 1, 1));
}

class Call {
 public:
  explicit Call(const Tensor&) {}
  Stream stream() const { return nullptr; }

  void* read(const Tensor& tensor) { return hold(tensor, true, false); }
  void* write(const Tensor& tensor) { return hold(tensor, false, true); }
  void* update(const Tensor& tensor) { return hold(tensor, true, true); }
  void* workspace(int64_t bytes) {
    held_.push_back({std::make_unique<simt::Guarded>(bytes), nullptr});
    return held_.back().memory->data();
  }
  void finish() {
    for (const Held& held : held_) {
      if (!held.memory->intact()) throw std::runtime_error("simt: a kernel wrote outside the bounds of a tensor");
      if (held.copy_to) std::memcpy(held.copy_to, held.memory->data(), held.memory->size());
    }
  }

 private:
  struct Held {
    std::unique_ptr<simt::Guarded> memory;
    void* copy_to;
  };

  // From the first element to the last, with what lies between them.
  static size_t span(const Tensor& tensor) {
    if (tensor.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    return static_cast<size_t>(last + 1) * tensor.element_size();
  }

  void* hold(const Tensor& tensor, bool copied, bool returned) {
    const size_t bytes = span(tensor);
    held_.push_back({std::make_unique<simt::Guarded>(bytes), returned && bytes ? tensor.data_ptr() : nullptr});
    if (copied && bytes) std::memcpy(held_.back().memory->data(), tensor.data_ptr(), bytes);
    return held_.back().memory->data();
  }

  std::vector<Held> held_;
};

}  // namespace moerge::cuda
