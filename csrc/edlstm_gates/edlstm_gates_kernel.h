// The loops of edlstm_gates for one instruction set. Included by edlstm_gates_cpu.cpp through for_each_isa.h.

#include "edlstm_gates/edlstm_gates_math.h"

// Elements [begin, end) of the flattened cell state, which may start and stop anywhere within a row. Body is called
// with (row, column, count): `count` elements, at most a vector, of one row.
template <int lanes, class Body>
VPFAST_INLINE void for_each_vector(int64_t begin, int64_t end, int64_t row_length, const Body& body) {
  int64_t row = begin / row_length, column = begin % row_length;
  while (begin < end) {
    const int64_t stop = column + (end - begin) < row_length ? column + (end - begin) : row_length;
    begin += stop - column;
    for (; column < stop; column += lanes) {
      body(row, column, stop - column < lanes ? static_cast<int>(stop - column) : lanes);
    }
    ++row;
    column = 0;
  }
}

template <class TG, class TC>
struct ForwardBody {
  const Problem& p;

  VPFAST_INLINE void operator()(int64_t row, int64_t column, int count) const {
    using V = typename Lanes<TG>::type;
    const TG* gates = static_cast<const TG*>(p.gates) + row * p.gates_stride + column;
    const TC* c_prev = static_cast<const TC*>(p.c_prev) + row * p.c_prev_stride + column;
    const int64_t out = row * p.row_length + column;

    const Gates<V> x = {Lanes<TG>::load(gates + p.offset_f, count), Lanes<TG>::load(gates + p.offset_i, count),
                        Lanes<TG>::load(gates + p.offset_o, count), Lanes<TG>::load(gates + p.offset_g, count)};
    V h, c;
    cell_forward(x, Lanes<TC>::load(c_prev, count), h, c);
    Lanes<TG>::store(static_cast<TG*>(p.h) + out, h, count);
    Lanes<TC>::store(static_cast<TC*>(p.c) + out, c, count);
  }
};

template <class TG, class TC>
struct BackwardBody {
  const Problem& p;

  VPFAST_INLINE void operator()(int64_t row, int64_t column, int count) const {
    using V = typename Lanes<TG>::type;
    const TG* gates = static_cast<const TG*>(p.gates) + row * p.gates_stride + column;
    const TC* c_prev = static_cast<const TC*>(p.c_prev) + row * p.c_prev_stride + column;
    const TG* grad_h = static_cast<const TG*>(p.grad_h) + row * p.grad_h_stride + column;
    const TC* grad_c = static_cast<const TC*>(p.grad_c) + row * p.grad_c_stride + column;
    TG* grad_gates = static_cast<TG*>(p.grad_gates) + row * 4 * p.row_length + column;
    TC* grad_c_prev = static_cast<TC*>(p.grad_c_prev) + row * p.row_length + column;

    const Gates<V> x = {Lanes<TG>::load(gates + p.offset_f, count), Lanes<TG>::load(gates + p.offset_i, count),
                        Lanes<TG>::load(gates + p.offset_o, count), Lanes<TG>::load(gates + p.offset_g, count)};
    const V dh = p.grad_h ? Lanes<TG>::load(grad_h, count) : V::broadcast(0);
    const V dc = p.grad_c ? Lanes<TC>::load(grad_c, count) : V::broadcast(0);
    Gates<V> dx;
    V dc_prev;
    cell_backward(x, Lanes<TC>::load(c_prev, count), dh, dc, dx, dc_prev);
    Lanes<TG>::store(grad_gates + p.offset_f, dx.f, count);
    Lanes<TG>::store(grad_gates + p.offset_i, dx.i, count);
    Lanes<TG>::store(grad_gates + p.offset_o, dx.o, count);
    Lanes<TG>::store(grad_gates + p.offset_g, dx.g, count);
    Lanes<TC>::store(grad_c_prev, dc_prev, count);
  }
};

template <class TG, class TC>
void forward(const Problem& p, int64_t begin, int64_t end) {
  for_each_vector<Lanes<TG>::type::lanes>(begin, end, p.row_length, ForwardBody<TG, TC>{p});
}

template <class TG, class TC>
void backward(const Problem& p, int64_t begin, int64_t end) {
  for_each_vector<Lanes<TG>::type::lanes>(begin, end, p.row_length, BackwardBody<TG, TC>{p});
}
