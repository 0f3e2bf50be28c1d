// In the place of csrc/common/cuda_launch.h: tensors are on the CPU, and there is neither device nor stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace vpfast {

struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
};

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

inline void check_launch(const char*) {}

}  // namespace vpfast
