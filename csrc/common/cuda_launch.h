// What the host side of every CUDA kernel needs: the device and stream of a tensor, and a check of each launch.
//
// A module built here also imports where torch has no CUDA. So the one function of torch that is missing there is asked
// for by name, in the library that holds it. A weak symbol would not do: Python loads torch's libraries each for
// itself, and this module depends on none that leads to libtorch_cuda.so, so the loader would not look there.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace vpfast {

// Makes the tensor's device current for as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// torch's aoti_torch_get_current_cuda_stream; null where torch has no CUDA.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);
inline CurrentStream find_current_stream() {
  void* loaded = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = dlsym(loaded ? loaded : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(found);
}

// The stream that PyTorch works on now.
inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  static const CurrentStream current = find_current_stream();
  STD_TORCH_CHECK(current, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// After each launch: a wrong configuration, or a GPU that the build holds no code for. Waits for nothing.
inline void check_launch(const char* op) {
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, op, ": the CUDA kernel could not be launched: ", cudaGetErrorString(status));
}

}  // namespace vpfast
