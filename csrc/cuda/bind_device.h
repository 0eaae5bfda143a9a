// What bind*.cpp needs of the device: where tensors live, workspace, the stream. csrc/simt/bind_device.h is its twin.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../common/check.h"
#include "launch.h"

#define MOERGE_DISPATCH_KEY CUDA

// Part of torch's stable ABI in every CUDA build; its header declares it only when the CUDA headers are there.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace moerge::cuda {

constexpr Device kDevice = Device::cuda;

// y += a b, by the device's GEMM with beta = 1.
inline void add_product(const Tensor& y, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(y.get(), y.get(), a.get(), b.get(), 1, 1));
}

// One call of an op: kernels run on the current stream of the device of `like`, and workspace is torch's.
class Call {
 public:
  explicit Call(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
  }
  Stream stream() const { return stream_; }

  void* read(const Tensor& tensor) { return keep(tensor); }
  void* write(const Tensor& tensor) { return keep(tensor); }   // the kernels write all of it
  void* update(const Tensor& tensor) { return keep(tensor); }  // the kernels read it and write it
  void* workspace(int64_t bytes) { return keep(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte)); }
  void finish() {}  // after the last launch

 private:
  // Until the call ends: the memory of a copy that died earlier could be handed out again while a kernel reads it.
  void* keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return tensor.data_ptr();
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> kept_;
};

}  // namespace moerge::cuda
