// torch's parallel_for on threads of our own, in place of torch's while ThreadSanitizer looks.
//
// torch's is OpenMP's, which is not instrumented: what its threads hand each other by starting and ending a region
// would not be seen, and every region would look like a race. A std::thread's start and end are seen, and order just
// what those of a region order: what comes before it, its threads, what comes after. How a range is shared out is
// torch's way too (ATen/ParallelOpenMP.h), so kernels meet the same numbers of threads and the same nested regions.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

thread_local bool in_region = false;

void run(int64_t begin, int64_t end, ParallelFunc body, void* context) {
  const bool before = in_region;
  in_region = true;
  body(begin, end, context);
  in_region = before;
}

int64_t threads_for(int64_t count, int64_t grain) {
  uint32_t threads = 1;
  if (in_region || count <= grain || torch_get_num_threads(&threads) != AOTI_TORCH_SUCCESS) return 1;
  return grain > 0 ? std::min<int64_t>(threads, (count + grain - 1) / grain) : threads;
}

}  // namespace

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body,
                                             void* context) {
  if (begin >= end) return AOTI_TORCH_SUCCESS;
  const int64_t threads = threads_for(end - begin, grain), chunk = (end - begin + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t from = begin + chunk; from < end; from += chunk) {
    others.emplace_back(run, from, std::min(end, from + chunk), body, context);
  }
  run(begin, std::min(end, begin + chunk), body, context);
  for (std::thread& other : others) other.join();
  return AOTI_TORCH_SUCCESS;
}
