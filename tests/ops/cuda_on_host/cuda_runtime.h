// CUDA on the host: enough of the language and runtime for a .cu file to be compiled by g++ and run where no GPU is.
//
// A block's threads are fibers of one host thread, run in turn from one barrier or warp instruction to the next,
// upwards or downwards (`backwards`): what one thread reads before another has written, for want of a barrier, is wrong
// in one of the two orders. Blocks run one after another. Barriers that some threads never reach, and warp instructions
// whose mask names a lane that has left, end the process with a message. Dynamic shared memory starts as NaN in every
// block.
//
// What it cannot show: speed, hardware's memory order, and what only happens when threads truly run at the same time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // at block scope: one for all fibers

struct float4 {
  float x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct Index {
  unsigned x;
};
inline dim3 blockIdx, blockDim, gridDim;
inline Index threadIdx;

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_on_host {

inline bool backwards = false;
inline int64_t shared_memory_limit = 227 << 10, multiprocessors = 3;
inline int device = 0;
inline std::map<std::pair<const void*, int>, int> dynamic_shared_memory;  // that a kernel may have on a device

constexpr int kFreeSharedMemory = 48 << 10;  // of a block, with no leave

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Fiber {
  int thread = 0;
  bool started = false, finished = false;
  ucontext_t first;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

// What lanes of a warp hand each other; by turns in two places, for the quicker may already be at the next instruction.
struct Exchange {
  Barrier barrier;
  uint64_t values[2][kWarp];
};

struct Block {
  std::vector<Fiber>& fibers;
  std::function<void()> body;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  Barrier all;
  std::map<std::pair<int, unsigned>, Exchange> exchanges;
  int finished = 0;
  int64_t progress = 0;
};

inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

inline void yield() {
  if (_setjmp(block->running->at) == 0) _longjmp(block->scheduler, 1);
}

inline void wait(Barrier& barrier, const std::function<int()>& expected) {
  const int64_t generation = barrier.generation;
  ++barrier.arrived;
  ++block->progress;
  while (barrier.generation == generation) {
    if (barrier.arrived >= expected()) {
      barrier.arrived = 0;
      ++barrier.generation;
      ++block->progress;
    } else {
      yield();
    }
  }
}

inline void enter() {
  block->body();
  block->running->finished = true;
  ++block->finished;
  ++block->progress;
  _longjmp(block->scheduler, 1);
}

inline void resume(Fiber& fiber) {
  block->running = &fiber;
  threadIdx.x = static_cast<unsigned>(fiber.thread);
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack.get();
  fiber.first.uc_stack.ss_size = kStack;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, enter, 0);
  setcontext(&fiber.first);
}

inline void run_block(Block& b) {
  block = &b;
  const int threads = static_cast<int>(blockDim.x);
  b.all = {};
  b.exchanges.clear();
  b.finished = 0;
  for (int k = 0; k < threads; ++k) {
    b.fibers[k].thread = k;
    b.fibers[k].started = b.fibers[k].finished = false;
  }
  while (b.finished < threads) {
    const int64_t before = b.progress;
    for (int k = 0; k < threads; ++k) {
      Fiber& fiber = b.fibers[backwards ? threads - 1 - k : k];
      if (!fiber.finished) resume(fiber);
    }
    if (b.progress == before) fail("threads wait for others that never come");
  }
}

inline int lane() { return block->running->thread % kWarp; }

// All lanes of `mask` hand in a value, and get everybody's.
template <class T>
inline const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8);
  const int warp = block->running->thread / kWarp;
  if (!(mask >> lane() & 1)) fail("a lane calls a warp instruction whose mask does not name it");
  Exchange& e = block->exchanges[{warp, mask}];
  uint64_t* values = e.values[e.barrier.generation & 1];
  values[lane()] = 0;
  std::memcpy(&values[lane()], &value, sizeof value);
  const int lanes = __builtin_popcount(mask);
  wait(e.barrier, [lanes] { return lanes; });
  return values;
}

template <class T>
inline T as(uint64_t value) {
  T x;
  std::memcpy(&x, &value, sizeof x);
  return x;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::Block* b = cuda_on_host::block;
  cuda_on_host::wait(b->all, [b] { return static_cast<int>(blockDim.x) - b->finished; });
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_host::exchange(mask, 0); }

template <class T>
inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  const uint64_t* values = cuda_on_host::exchange(mask, x);
  return cuda_on_host::as<T>(values[cuda_on_host::lane() / width * width + from % width]);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int step) {
  return cuda_on_host::as<T>(cuda_on_host::exchange(mask, x)[cuda_on_host::lane() ^ step]);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, int step) {
  const uint64_t* values = cuda_on_host::exchange(mask, x);
  const int from = cuda_on_host::lane() - step;
  return from < 0 ? x : cuda_on_host::as<T>(values[from]);
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  const uint64_t* values = cuda_on_host::exchange(mask, x);
  unsigned found = 0;
  for (int k = 0; k < 32; ++k) found |= mask >> k & 1 && values[k] ? 1u << k : 0;
  return found;
}
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == mask; }
inline unsigned __match_any_sync(unsigned mask, int x) {
  const uint64_t* values = cuda_on_host::exchange(mask, x);
  unsigned found = 0;
  for (int k = 0; k < 32; ++k) found |= mask >> k & 1 && cuda_on_host::as<int>(values[k]) == x ? 1u << k : 0;
  return found;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  const uint64_t* values = cuda_on_host::exchange(mask, x);
  unsigned most = x;
  for (int k = 0; k < 32; ++k) most = mask >> k & 1 && values[k] > most ? static_cast<unsigned>(values[k]) : most;
  return most;
}

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline T atomicAdd(T* to, T x) {
  return std::exchange(*to, *to + x);
}
template <class T>
inline T atomicMin(T* to, T x) {
  return std::exchange(*to, min(*to, x));
}
template <class T>
inline T atomicMax(T* to, T x) {
  return std::exchange(*to, max(*to, x));
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned x) { return cuda_on_host::as<float>(x); }
template <class T>
inline T __ldg(const T* from) {
  return *from;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

// --- the runtime ---

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_on_host::device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool memory = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = static_cast<int>(memory ? cuda_on_host::shared_memory_limit : cuda_on_host::multiprocessors);
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->sharedSizeBytes = 0, cudaSuccess;  // what they declare is not known here
}
// Leave that is taken back could be what another thread is about to launch with.
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  using namespace cuda_on_host;
  if (bytes > shared_memory_limit) return cudaErrorInvalidValue;
  int& allowed = dynamic_shared_memory[{kernel, device}];
  if (bytes < allowed) fail("a kernel may have less dynamic shared memory than before");
  return allowed = bytes, cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, bytes);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

namespace cuda_on_host {
void poison_dynamic_shared_memory(size_t bytes);  // defined beside the kernels, who name that memory
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_host;
  const auto bytes = static_cast<int64_t>(config->dynamicSmemBytes);
  const int allowed = dynamic_shared_memory[{reinterpret_cast<const void*>(kernel), device}];
  if (bytes > shared_memory_limit) fail("more shared memory than there is");
  if (bytes > std::max(kFreeSharedMemory, allowed)) fail("more shared memory than the kernel has leave for");
  static std::vector<Fiber> fibers(1024);
  Block b{fibers};
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  b.body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y);
      poison_dynamic_shared_memory(config->dynamicSmemBytes);
      run_block(b);
    }
  }
  return cudaSuccess;
}
