// What one thread of the CUDA kernels of edlstm_gates does. Without CUDA the host compiles it too, for tests.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/divisor.h"
#include "common/simt.h"
#include "common/simt_memory.h"
#include "edlstm_gates/edlstm_gates_problem.h"

namespace vpfast::simt {

#include "edlstm_gates/edlstm_gates_math.h"

// The number that gates of type TG beside a cell of type TC are worked on in.
template <class TG, class TC>
using NumberFor = std::conditional_t<std::is_same_v<TG, double>, F64, std::conditional_t<sizeof(TC) == 2, F16, F32>>;

// Where the tensors of one call lie; strides from row to row in elements. Outputs are dense.
template <class TG, class TC>
struct Work {
  int64_t items, items_in_row, row_length;
  Divisor by_items_in_row;
  const TG *f, *i, *o, *g;
  const TC* c_prev;
  int64_t gates_stride, c_prev_stride;
  TG* h;
  TC* c;
  const TG* grad_h;  // null: a gradient of zeros
  const TC* grad_c;
  int64_t grad_h_stride, grad_c_stride;
  TG *grad_f, *grad_i, *grad_o, *grad_g;
  TC* grad_c_prev;
};

// How many elements a thread takes at once: 16 bytes of each gate. Backward has 12 packs of them to keep; with 16-bit
// gates that are more registers than four blocks' threads have, so there it takes 8 bytes, of twice as many threads.
// Doubles are for checks, and go alone.
template <class TG>
constexpr int kForwardWidth = std::is_same_v<TG, double> ? 1 : 16 / sizeof(TG);
template <class TG>
constexpr int kBackwardWidth = std::is_same_v<TG, double> ? 1 : 4;

// Do rows and pointers allow accesses of `width` elements? Outputs do, being newly allocated.
template <class TG, class TC>
bool fits(const Problem& p, int width) {
  const auto aligned = [&](const void* pointer, int64_t stride, size_t size) {
    const int64_t access = width * size < 16 ? width * size : 16;
    const bool rows_too = p.rows == 1 || stride * static_cast<int64_t>(size) % access == 0;
    return rows_too && reinterpret_cast<uintptr_t>(pointer) % access == 0;  // a null pointer is aligned
  };
  return p.row_length % width == 0 && aligned(p.gates, p.gates_stride, sizeof(TG)) &&
         aligned(p.c_prev, p.c_prev_stride, sizeof(TC)) && aligned(p.grad_h, p.grad_h_stride, sizeof(TG)) &&
         aligned(p.grad_c, p.grad_c_stride, sizeof(TC));
}

template <class TG, class TC>
Work<TG, TC> work_of(const Problem& p, int width) {
  const int64_t items_in_row = p.row_length / width, items = p.rows * items_in_row;
  const TG* gates = static_cast<const TG*>(p.gates);
  TG* grad_gates = static_cast<TG*>(p.grad_gates);
  return {items,
          items_in_row,
          p.row_length,
          Divisor(items_in_row),
          gates + p.offset_f,
          gates + p.offset_i,
          gates + p.offset_o,
          gates + p.offset_g,
          static_cast<const TC*>(p.c_prev),
          p.gates_stride,
          p.c_prev_stride,
          static_cast<TG*>(p.h),
          static_cast<TC*>(p.c),
          static_cast<const TG*>(p.grad_h),
          static_cast<const TC*>(p.grad_c),
          p.grad_h_stride,
          p.grad_c_stride,
          grad_gates + p.offset_f,
          grad_gates + p.offset_i,
          grad_gates + p.offset_o,
          grad_gates + p.offset_g,
          static_cast<TC*>(p.grad_c_prev)};
}

// An item is `width` consecutive elements of a row: where its first one is.
struct Place {
  int64_t row, column;
};

template <int width, class TG, class TC>
VPFAST_INLINE Place place_of(const Work<TG, TC>& w, int64_t item) {
  const int64_t row = w.by_items_in_row.divide(item);
  return {row, (item - row * w.items_in_row) * width};
}

template <int width, class TG, class TC>
VPFAST_INLINE void forward_item(const Work<TG, TC>& w, int64_t item) {
  using V = NumberFor<TG, TC>;
  const Place at = place_of<width>(w, item);
  const int64_t in_gates = at.row * w.gates_stride + at.column;
  const auto f = load_once<width>(w.f + in_gates), i = load_once<width>(w.i + in_gates);
  const auto g = load_once<width>(w.g + in_gates), o = load_once<width>(w.o + in_gates);
  const auto c_prev = load<width>(w.c_prev + at.row * w.c_prev_stride + at.column);

  Pack<TG, width> h;
  Pack<TC, width> c;
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const V cell = cell_state(element<V>(f, k), element<V>(i, k), element<V>(g, k), element<V>(c_prev, k));
    set_element(c, k, cell);
    set_element(h, k, hidden_state(element<V>(o, k), cell));
  }
  store(w.h + item * width, h);
  store(w.c + item * width, c);
}

template <int width, class TG, class TC>
VPFAST_INLINE void backward_item(const Work<TG, TC>& w, int64_t item) {
  using V = NumberFor<TG, TC>;
  const Place at = place_of<width>(w, item);
  const int64_t in_gates = at.row * w.gates_stride + at.column;
  const auto f = load_once<width>(w.f + in_gates), i = load_once<width>(w.i + in_gates);
  const auto g = load_once<width>(w.g + in_gates), o = load_once<width>(w.o + in_gates);
  const auto c_prev = load<width>(w.c_prev + at.row * w.c_prev_stride + at.column);
  // All bits 0 is a gradient of 0 in every type.
  Pack<TG, width> grad_h{};
  Pack<TC, width> grad_c{};
  if (w.grad_h) grad_h = load_once<width>(w.grad_h + at.row * w.grad_h_stride + at.column);
  if (w.grad_c) grad_c = load_once<width>(w.grad_c + at.row * w.grad_c_stride + at.column);

  Pack<TG, width> grad_f, grad_i, grad_o, grad_g;
  Pack<TC, width> grad_c_prev;
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const auto x = recompute(element<V>(f, k), element<V>(i, k), element<V>(g, k), element<V>(c_prev, k));
    const auto d = gradients(x, element<V>(o, k), element<V>(grad_h, k), element<V>(grad_c, k));
    set_element(grad_f, k, d.f);
    set_element(grad_i, k, d.i);
    set_element(grad_o, k, d.o);
    set_element(grad_g, k, d.g);
    set_element(grad_c_prev, k, d.c_prev);
  }
  const int64_t in_grad_gates = at.row * 4 * w.row_length + at.column;
  store(w.grad_f + in_grad_gates, grad_f);
  store(w.grad_i + in_grad_gates, grad_i);
  store(w.grad_o + in_grad_gates, grad_o);
  store(w.grad_g + in_grad_gates, grad_g);
  store(w.grad_c_prev + item * width, grad_c_prev);
}

}  // namespace vpfast::simt
