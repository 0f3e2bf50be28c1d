// edlstm_gates on the CPU.
//
// Story. Rows as edlstm_gates_problem.h describes them: the flattened cell elements are cut into ranges, a thread each;
// a thread walks its range in pieces of a row. Nothing is exchanged between elements, so the result does not depend on
// the number of threads.
//
// Bytes an element of s: forward 7 s (4 gates and c' read, h and c written), backward 12 s (4 gates, c', dh, dc read,
// 4 dgates and dc' written). Nothing is saved but the inputs. The five exponentials take longer than the bytes, on two
// AVX-512 cores by half: what counts is how many instructions they are, and how well they overlap.

#include "common/isa.h"
#include "edlstm_gates/edlstm_gates_host.h"

#define VPFAST_KERNEL_FILE "edlstm_gates/edlstm_gates_kernel.h"
#include "common/for_each_isa.h"

namespace vpfast {
namespace {

using RangeKernel = void (*)(const Problem&, int64_t begin, int64_t end);

// Small problems stay on one thread: waking another costs about as much as 16 thousand elements.
constexpr int64_t kGrain = 16384;

void run(RangeKernel kernel, const Problem& p) {
  torch::stable::parallel_for(0, p.rows * p.row_length, kGrain,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class TG, class TC>
  void forward(const Problem& p) const {
    constexpr RangeKernel kernels[kIsaCount] = {plain::forward<TG, TC>, avx2::forward<TG, TC>, avx512::forward<TG, TC>};
    run(kernels[static_cast<int>(active_isa())], p);
  }

  template <class TG, class TC>
  void backward(const Problem& p) const {
    constexpr RangeKernel kernels[kIsaCount] = {plain::backward<TG, TC>, avx2::backward<TG, TC>,
                                                avx512::backward<TG, TC>};
    run(kernels[static_cast<int>(active_isa())], p);
  }
};

}  // namespace
}  // namespace vpfast

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) {
  m.impl("edlstm_gates", TORCH_BOX(&vpfast::forward<vpfast::Cpu>));
  m.impl("edlstm_gates_backward", TORCH_BOX(&vpfast::backward<vpfast::Cpu>));
}
