// All tensors of a call are on one device: a kernel reads addresses, wherever they lead.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace vpfast {

// "cpu", "cuda:1".
inline std::string device_of(const torch::stable::Tensor& t) {
  using torch::headeronly::DeviceType;
  const auto device = t.device();
  const std::string type = device.type() == DeviceType::CPU    ? "cpu"
                           : device.type() == DeviceType::CUDA ? "cuda"
                           : device.type() == DeviceType::Meta ? "meta"
                                                               : "another device";
  return device.index() < 0 ? type : type + ":" + std::to_string(device.index());
}

struct Named {
  const char* name;
  const torch::stable::Tensor& tensor;
};

inline void check_device(const char* op, const Named& first, const Named& other) {
  STD_TORCH_CHECK(first.tensor.device() == other.tensor.device(), op, ": ", first.name, " is on ",
                  device_of(first.tensor), " and ", other.name, " on ", device_of(other.tensor), "; move one of them");
}

}  // namespace vpfast
