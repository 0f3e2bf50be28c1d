// What the host side of every CUDA kernel needs: the device and stream of a tensor, and a check of each launch.
//
// A module built here also imports where torch has no CUDA. So the one function of torch that is missing there is a
// weak symbol: it is called only for a CUDA tensor, and where there is one, it exists.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace vpfast {

// Makes the tensor's device current for as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that PyTorch works on now.
inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// After each launch: a wrong configuration, or a GPU that the build holds no code for. Waits for nothing.
inline void check_launch(const char* op) {
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, op, ": the CUDA kernel could not be launched: ", cudaGetErrorString(status));
}

}  // namespace vpfast
