// edlstm_gates on the CPU.
//
// Story. Both layouts are the same shape of work: `rows` independent rows, each of four gate blocks of `row_length`
// elements one after another, beside a cell row of `row_length`.
//   contiguous (B, 4C, *):   B rows of length C*S       (S = product of the trailing dims)
//   channels_last:           B*S rows of length C
// Rows may lie any distance apart, so a slice over the batch (one time step of a clip) and a batch-expanded state are
// read where they are; any other layout is copied once. The flattened cell elements are cut into ranges, a thread each;
// a thread walks its range in pieces of a row. Nothing is exchanged between elements, so the result does not depend on
// the number of threads.
//
// Bytes an element of s: forward 7 s (4 gates and c' read, h and c written), backward 12 s (4 gates, c', dh, dc read,
// 4 dgates and dc' written). Nothing is saved but the inputs. The five exponentials take longer than the bytes, on two
// AVX-512 cores by half: what counts is how many instructions they are, and how well they overlap.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/isa.h"
#include "common/layout.h"

namespace vpfast {
namespace {

// One call. Offsets and strides are in elements of the tensor they belong to; outputs are dense.
struct Problem {
  int64_t rows, row_length;
  int64_t offset_f, offset_i, offset_o, offset_g;
  const void *gates, *c_prev;
  int64_t gates_stride, c_prev_stride;
  void *h, *c;
  const void *grad_h, *grad_c;  // null: a gradient of zeros
  int64_t grad_h_stride, grad_c_stride;
  void *grad_gates, *grad_c_prev;
};

}  // namespace
}  // namespace vpfast

#define VPFAST_KERNEL_FILE "edlstm_gates/edlstm_gates_kernel.h"
#include "common/for_each_isa.h"

namespace vpfast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using RangeKernel = void (*)(const Problem&, int64_t begin, int64_t end);

struct KernelPair {
  RangeKernel forward[kIsaCount], backward[kIsaCount];
};

template <class TG, class TC>
constexpr KernelPair kernels() {
  return {{plain::forward<TG, TC>, avx2::forward<TG, TC>, avx512::forward<TG, TC>},
          {plain::backward<TG, TC>, avx2::backward<TG, TC>, avx512::backward<TG, TC>}};
}

KernelPair kernels_for(ScalarType gates, ScalarType cell) {
  if (gates == ScalarType::Float && cell == gates) return kernels<float, float>();
  if (gates == ScalarType::Double && cell == gates) return kernels<double, double>();
  if (gates == ScalarType::Half && cell == gates) return kernels<Half, Half>();
  if (gates == ScalarType::Half && cell == ScalarType::Float) return kernels<Half, float>();
  if (gates == ScalarType::BFloat16 && cell == gates) return kernels<BFloat16, BFloat16>();
  if (gates == ScalarType::BFloat16 && cell == ScalarType::Float) return kernels<BFloat16, float>();
  STD_TORCH_CHECK(false,
                  "edlstm_gates: gates must be float64/32/16 or bfloat16, with c_prev of the same type, or float32 ",
                  "beside half-precision gates");
}

void check_shapes(const Tensor& gates, const Tensor& c_prev, const std::string& order) {
  STD_TORCH_CHECK(gates.dim() >= 2 && gates.dim() == c_prev.dim(),
                  "edlstm_gates: gates (B, 4C, *) and c_prev (B, C, *)");
  for (int64_t d = 0; d < gates.dim(); ++d) {
    const int64_t parts = d == 1 ? 4 : 1;
    STD_TORCH_CHECK(gates.size(d) == parts * c_prev.size(d), "edlstm_gates: dim ", d, " of gates is ", gates.size(d),
                    ", of c_prev ", c_prev.size(d));
  }
  STD_TORCH_CHECK(order.size() == 4, "edlstm_gates: order must be a permutation of 'fiog'");
  for (char gate : {'f', 'i', 'o', 'g'}) {
    STD_TORCH_CHECK(order.find(gate) != std::string::npos, "edlstm_gates: order must be a permutation of 'fiog'");
  }
}

void check_gradient(const char* name, const Tensor& grad, const Tensor& like, ScalarType dtype) {
  bool same = grad.dim() == like.dim() && grad.scalar_type() == dtype;
  for (int64_t d = 0; same && d < like.dim(); ++d) same = grad.size(d) == like.size(d);
  STD_TORCH_CHECK(same, name, " has another shape or type than the output it belongs to");
}

// The common part of forward and backward: which layout, how many rows of which length, where each gate lies.
Problem plan(const Tensor& gates, const Tensor& c_prev, const std::string& order, Layout layout) {
  Problem p{};
  p.rows = layout == Layout::contiguous ? c_prev.size(0) : c_prev.numel() / c_prev.size(1);
  p.row_length = c_prev.numel() / p.rows;
  p.offset_f = static_cast<int64_t>(order.find('f')) * p.row_length;
  p.offset_i = static_cast<int64_t>(order.find('i')) * p.row_length;
  p.offset_o = static_cast<int64_t>(order.find('o')) * p.row_length;
  p.offset_g = static_cast<int64_t>(order.find('g')) * p.row_length;
  p.gates = gates.const_data_ptr();
  p.gates_stride = row_stride(gates, layout);
  p.c_prev = c_prev.const_data_ptr();
  p.c_prev_stride = row_stride(c_prev, layout);
  return p;
}

// Small problems stay on one thread: waking another costs about as much as 16 thousand elements.
constexpr int64_t kGrain = 16384;

void run(RangeKernel kernel, const Problem& p) {
  torch::stable::parallel_for(0, p.rows * p.row_length, kGrain,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor> forward(Tensor gates, Tensor c_prev, std::string order) {
  check_shapes(gates, c_prev, order);
  const KernelPair kernel = kernels_for(gates.scalar_type(), c_prev.scalar_type());
  const Layout layout = layout_of(gates);
  Tensor h = empty_as(c_prev, gates.scalar_type(), layout);
  Tensor c = empty_as(c_prev, c_prev.scalar_type(), layout);
  if (c_prev.numel() == 0) return {h, c};

  gates = in_rows(gates, layout);
  c_prev = in_rows(c_prev, layout);
  Problem p = plan(gates, c_prev, order, layout);
  p.h = h.mutable_data_ptr();
  p.c = c.mutable_data_ptr();
  run(kernel.forward[static_cast<int>(active_isa())], p);
  return {h, c};
}

std::tuple<Tensor, Tensor> backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_c, Tensor gates,
                                    Tensor c_prev, std::string order) {
  check_shapes(gates, c_prev, order);
  const KernelPair kernel = kernels_for(gates.scalar_type(), c_prev.scalar_type());
  const Layout layout = layout_of(gates);
  Tensor grad_gates = empty_as(gates, gates.scalar_type(), layout);
  Tensor grad_c_prev = empty_as(c_prev, c_prev.scalar_type(), layout);
  if (c_prev.numel() == 0) return {grad_gates, grad_c_prev};

  gates = in_rows(gates, layout);
  c_prev = in_rows(c_prev, layout);
  Problem p = plan(gates, c_prev, order, layout);
  if (grad_h) {
    check_gradient("grad_h", *grad_h, c_prev, gates.scalar_type());
    grad_h = in_rows(*grad_h, layout);
    p.grad_h = grad_h->const_data_ptr();
    p.grad_h_stride = row_stride(*grad_h, layout);
  }
  if (grad_c) {
    check_gradient("grad_c", *grad_c, c_prev, c_prev.scalar_type());
    grad_c = in_rows(*grad_c, layout);
    p.grad_c = grad_c->const_data_ptr();
    p.grad_c_stride = row_stride(*grad_c, layout);
  }
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_c_prev = grad_c_prev.mutable_data_ptr();
  run(kernel.backward[static_cast<int>(active_isa())], p);
  return {grad_gates, grad_c_prev};
}

}  // namespace
}  // namespace vpfast

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) {
  m.impl("edlstm_gates", TORCH_BOX(&vpfast::forward));
  m.impl("edlstm_gates_backward", TORCH_BOX(&vpfast::backward));
}
