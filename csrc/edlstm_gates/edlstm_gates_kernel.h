// The loops of edlstm_gates for one instruction set. Included by edlstm_gates_cpu.cpp through for_each_isa.h.

#include "edlstm_gates/edlstm_gates_math.h"

// Elements [begin, end) of the flattened cell state, which may start and stop anywhere within a row. Body is called
// with (row, column, count): `count` elements, at most `step`, of one row.
template <int step, class Body>
VPFAST_INLINE void for_each_piece(int64_t begin, int64_t end, int64_t row_length, const Body& body) {
  int64_t row = begin / row_length, column = begin % row_length;
  while (begin < end) {
    const int64_t stop = column + (end - begin) < row_length ? column + (end - begin) : row_length;
    begin += stop - column;
    for (; column < stop; column += step) {
      body(row, column, stop - column < step ? static_cast<int>(stop - column) : step);
    }
    ++row;
    column = 0;
  }
}

// A vector's arithmetic is one long chain: a processor that meets it whole fills up with instructions that wait.
//
// h needs c, a chain of two exponentials and two divisions. So a piece of a row gets all its c first, which wait in the
// L1 cache, and then all its h. And vectors go in pairs, two chains side by side.
constexpr int kPiece = 256;

// step(k, count) for each vector of a piece: `count` elements from k on, as many as there are lanes but for the last.
template <int lanes, class Step>
VPFAST_INLINE void for_each_vector(int count, const Step& step) {
  int k = 0;
  for (; k + 2 * lanes <= count; k += 2 * lanes) {
    step(k, lanes);
    step(k + lanes, lanes);
  }
  for (; k < count; k += lanes) step(k, count - k < lanes ? count - k : lanes);
}

template <class TG, class TC>
struct ForwardBody {
  const Problem& p;

  VPFAST_INLINE void operator()(int64_t row, int64_t column, int count) const {
    using V = typename Lanes<TG>::type;
    const TG* gates = static_cast<const TG*>(p.gates) + row * p.gates_stride + column;
    const TC* c_prev = static_cast<const TC*>(p.c_prev) + row * p.c_prev_stride + column;
    TG* h = static_cast<TG*>(p.h) + row * p.row_length + column;
    TC* c = static_cast<TC*>(p.c) + row * p.row_length + column;

    V cell[kPiece / V::lanes];
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      const V state =
          cell_state(Lanes<TG>::load(gates + p.offset_f + k, part), Lanes<TG>::load(gates + p.offset_i + k, part),
                     Lanes<TG>::load(gates + p.offset_g + k, part), Lanes<TC>::load(c_prev + k, part));
      cell[k / V::lanes] = state;
      prefetch_to_write(c + k);
      Lanes<TC>::store(c + k, state, part);
    });
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      prefetch_to_write(h + k);
      Lanes<TG>::store(h + k, hidden_state(Lanes<TG>::load(gates + p.offset_o + k, part), cell[k / V::lanes]), part);
    });
  }
};

template <class TG, class TC>
struct BackwardBody {
  const Problem& p;

  VPFAST_INLINE void operator()(int64_t row, int64_t column, int count) const {
    using V = typename Lanes<TG>::type;
    const TG* gates = static_cast<const TG*>(p.gates) + row * p.gates_stride + column;
    const TC* c_prev = static_cast<const TC*>(p.c_prev) + row * p.c_prev_stride + column;
    const TG* grad_h = p.grad_h ? static_cast<const TG*>(p.grad_h) + row * p.grad_h_stride + column : nullptr;
    const TC* grad_c = p.grad_c ? static_cast<const TC*>(p.grad_c) + row * p.grad_c_stride + column : nullptr;
    TG* grad_gates = static_cast<TG*>(p.grad_gates) + row * 4 * p.row_length + column;
    TC* grad_c_prev = static_cast<TC*>(p.grad_c_prev) + row * p.row_length + column;

    Recomputed<V> recomputed[kPiece / V::lanes];
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      recomputed[k / V::lanes] =
          recompute(Lanes<TG>::load(gates + p.offset_f + k, part), Lanes<TG>::load(gates + p.offset_i + k, part),
                    Lanes<TG>::load(gates + p.offset_g + k, part), Lanes<TC>::load(c_prev + k, part));
    });
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      const V dh = grad_h ? Lanes<TG>::load(grad_h + k, part) : V::broadcast(0);
      const V dc = grad_c ? Lanes<TC>::load(grad_c + k, part) : V::broadcast(0);
      const Gradients<V> d = gradients(recomputed[k / V::lanes], Lanes<TG>::load(gates + p.offset_o + k, part), dh, dc);
      prefetch_to_write(grad_gates + p.offset_f + k);
      prefetch_to_write(grad_gates + p.offset_i + k);
      prefetch_to_write(grad_gates + p.offset_o + k);
      prefetch_to_write(grad_gates + p.offset_g + k);
      prefetch_to_write(grad_c_prev + k);
      Lanes<TG>::store(grad_gates + p.offset_f + k, d.f, part);
      Lanes<TG>::store(grad_gates + p.offset_i + k, d.i, part);
      Lanes<TG>::store(grad_gates + p.offset_o + k, d.o, part);
      Lanes<TG>::store(grad_gates + p.offset_g + k, d.g, part);
      Lanes<TC>::store(grad_c_prev + k, d.c_prev, part);
    });
  }
};

template <class TG, class TC>
void forward(const Problem& p, int64_t begin, int64_t end) {
  for_each_piece<kPiece>(begin, end, p.row_length, ForwardBody<TG, TC>{p});
}

template <class TG, class TC>
void backward(const Problem& p, int64_t begin, int64_t end) {
  for_each_piece<kPiece>(begin, end, p.row_length, BackwardBody<TG, TC>{p});
}
