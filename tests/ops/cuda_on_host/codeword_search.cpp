// The CUDA kernels of codeword_search as operators on CPU tensors, vpfast_on_host::*. Tensors of other devices come to
// them too, as they would where a GPU's kernel is given one of another's.

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(vpfast_on_host, CompositeExplicitAutograd, m, C10_UID)

#include "codeword_search/codeword_search_cuda.cu"

namespace vpfast::gpu {
thread_local float4 shared_memory[(227 << 10) / sizeof(float4)];
}

void cuda_on_host::poison_dynamic_shared_memory(size_t bytes) { std::memset(vpfast::gpu::shared_memory, 0xff, bytes); }

// For ctypes: the order of threads, and the GPU that is played; one for each size of shared memory.
extern "C" __attribute__((visibility("default"))) void configure(bool backwards, int64_t shared_memory_limit,
                                                                 int64_t multiprocessors) {
  cuda_on_host::backwards = backwards;
  cuda_on_host::shared_memory_limit = shared_memory_limit;
  cuda_on_host::device = static_cast<int>(shared_memory_limit >> 10);
  cuda_on_host::multiprocessors = multiprocessors;
}
