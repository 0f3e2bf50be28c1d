// What the current device has, and leave for kernels to use its shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

namespace vpfast {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Of a block, in bytes: what it can have, and what needs no leave: 48 KiB, less what kernels declare.
inline int64_t most_shared_memory() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
constexpr int64_t kFreeSharedMemory = 40 << 10;

// Gives `kernel` leave for all that the current device has, once for each of its devices. Leave belongs to the kernel,
// not to a launch: were each launch to set what it needs, one thread could lower what another is about to launch with.
// Where no leave is given the launch fails, and tells.
inline void allow_shared_memory(const void* kernel) {
  static std::mutex one_at_a_time;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  cudaFuncAttributes attributes{};
  if (cudaGetDevice(&device) != cudaSuccess) return;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (allowed.count({kernel, device}) != 0) return;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return;
  const int dynamic = static_cast<int>(most_shared_memory() - static_cast<int64_t>(attributes.sharedSizeBytes));
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic) != cudaSuccess) return;
  allowed.insert({kernel, device});
}

}  // namespace vpfast
