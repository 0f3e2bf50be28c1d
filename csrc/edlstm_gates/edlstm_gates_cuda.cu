// edlstm_gates on a GPU.
//
// Story. Rows as edlstm_gates_problem.h describes them, cut into items of a few consecutive elements: 16 bytes of each
// gate where rows and pointers allow (8 in backward with 16-bit gates), else one element. A thread has one item: it
// finds the item's row by a multiplication, issues every load, computes, stores. Nothing is exchanged between threads,
// and an element's arithmetic is the same instructions in every kernel, so results depend neither on the launch nor on
// the element's place.
//
// Bytes an element of s: forward 7 s (4 gates and c' read, h and c written), backward 12 s (4 gates, c', dh, dc read,
// 4 dgates and dc' written), each once, and that should be the time. What could be longer are the exponentials: at the
// copy rate of an H200 (4.3 TB/s, 132 multiprocessors of 1.8 GHz) an element has
//                            instructions  of which exponentials and reciprocals
//   forward, 32 bits         90 of 198      6 of 25
//   forward, 16 bits         57 of  99      8 of 12
//   backward, 32 bits       132 of 339      8 of 42
//   backward, 16 bits       105 of 170     10 of 21
// as compiled for sm_90a; hence simt.h's two degrees of exactness. To keep memory busy a multiprocessor needs about
// 40 KB on their way: 1,024 threads of at most 64 registers load 80 KB (forward) or 56 to 112 KB (backward) at once.
//
// Gates and gradients are read with the hint that nobody reads them again; c' may be one state for a whole batch, and h
// and c are what the next kernel reads: those go the ordinary way. Not measured on a GPU.

#include "common/cuda_launch.h"
#include "edlstm_gates/edlstm_gates_host.h"
#include "edlstm_gates/edlstm_gates_thread.h"

namespace vpfast {
namespace {

using simt::Work;

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // on one multiprocessor: at most 64 registers a thread

template <int width, class TG, class TC>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(const __grid_constant__ Work<TG, TC> w) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item < w.items) simt::forward_item<width>(w, item);
}

template <int width, class TG, class TC>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_kernel(const __grid_constant__ Work<TG, TC> w) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item < w.items) simt::backward_item<width>(w, item);
}

class Cuda {
 public:
  explicit Cuda(const Tensor& t) : on_device_(t), stream_(current_stream(t)) {}

  template <class TG, class TC>
  void forward(const Problem& p) const {
    constexpr int width = simt::kForwardWidth<TG>;
    if (simt::fits<TG, TC>(p, width)) {
      launch(forward_kernel<width, TG, TC>, simt::work_of<TG, TC>(p, width));
    } else {
      launch(forward_kernel<1, TG, TC>, simt::work_of<TG, TC>(p, 1));
    }
  }

  template <class TG, class TC>
  void backward(const Problem& p) const {
    constexpr int width = simt::kBackwardWidth<TG>;
    if (simt::fits<TG, TC>(p, width)) {
      launch(backward_kernel<width, TG, TC>, simt::work_of<TG, TC>(p, width));
    } else {
      launch(backward_kernel<1, TG, TC>, simt::work_of<TG, TC>(p, 1));
    }
  }

 private:
  template <class TG, class TC>
  void launch(void (*kernel)(Work<TG, TC>), const Work<TG, TC>& work) const {
    const int64_t blocks = (work.items + kThreads - 1) / kThreads;
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(work);
    check_launch("edlstm_gates");
  }

  OnDeviceOf on_device_;
  cudaStream_t stream_;
};

}  // namespace
}  // namespace vpfast

STABLE_TORCH_LIBRARY_IMPL(vpfast, CUDA, m) {
  m.impl("edlstm_gates", TORCH_BOX(&vpfast::forward<vpfast::Cuda>));
  m.impl("edlstm_gates_backward", TORCH_BOX(&vpfast::backward<vpfast::Cuda>));
}
