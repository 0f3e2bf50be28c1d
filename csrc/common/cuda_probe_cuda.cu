// One thread writes one number that the host reads back: the smallest proof that kernels of this build run here.

#include <cuda_runtime.h>

#include "common/cuda_probe.h"

namespace vpfast {
namespace {

constexpr int kAnswer = 42;

__global__ void write_answer(int* out) { *out = kAnswer; }

cudaError_t run_probe(int* answer) {
  int* device = nullptr;
  cudaError_t status = cudaMalloc(&device, sizeof(int));
  if (status != cudaSuccess) return status;
  write_answer<<<1, 1>>>(device);
  status = cudaGetLastError();
  if (status == cudaSuccess) status = cudaMemcpy(answer, device, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(device);
  return status;
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string cuda_version() { return version(CUDART_VERSION); }

std::string cuda_of_driver() {
  int found = 0;
  return cudaDriverGetVersion(&found) == cudaSuccess ? version(found) : version(0);
}

std::string cuda_probe() {
  int answer = 0;
  const cudaError_t status = run_probe(&answer);
  if (status != cudaSuccess) {
    cudaGetLastError();  // told here: no later launch is to tell it again
    return cudaGetErrorString(status);
  }
  return answer == kAnswer ? "ok" : "the kernel ran but wrote nothing";
}

}  // namespace vpfast
