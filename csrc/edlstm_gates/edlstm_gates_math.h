// The arithmetic of one LSTM cell, on whatever a "number" is: a SIMD register on the CPU, a float on a GPU.
//
// Included where `sigmoid`, `tanh`, `value`, `product` and `value_and_slope` exist for that number type V, once for
// each (hence no include guard). The functions below are the only place where the formulas are written in C++.
//
//   c = sigmoid(f) c' + sigmoid(i) tanh(g)        h = sigmoid(o) tanh(c)            (MSPN paper, Eq. 2-3)
//
// Both directions go in two steps with the new cell state between them: see kPiece in edlstm_gates_kernel.h.

template <class V>
VPFAST_INLINE V cell_state(V f, V i, V g, V c_prev) {
  return value(sigmoid(f)) * c_prev + product(sigmoid(i), tanh(g));
}

template <class V>
VPFAST_INLINE V hidden_state(V o, V c) {
  return product(sigmoid(o), tanh(c));
}

// What backward recomputes first: activated gates with their derivatives, and the cell state that they give.
template <class V>
struct Recomputed {
  decltype(value_and_slope(tanh(V{}))) f, i, g;
  V c_prev, c;
};

template <class V>
VPFAST_INLINE Recomputed<V> recompute(V f, V i, V g, V c_prev) {
  const auto fs = value_and_slope(sigmoid(f)), is = value_and_slope(sigmoid(i)), gs = value_and_slope(tanh(g));
  return {fs, is, gs, c_prev, fs.value * c_prev + is.value * gs.value};
}

// Gradients of the four gates before activation and of the cell state before.
template <class V>
struct Gradients {
  V f, i, o, g, c_prev;
};

template <class V>
VPFAST_INLINE Gradients<V> gradients(const Recomputed<V>& x, V o, V dh, V dc) {
  const auto os = value_and_slope(sigmoid(o)), tanh_c = value_and_slope(tanh(x.c));
  const V d_cell = dh * os.value * tanh_c.slope + dc;
  return {d_cell * x.c_prev * x.f.slope, d_cell * x.g.value * x.i.slope, dh * tanh_c.value * os.slope,
          d_cell * x.i.value * x.g.slope, d_cell * x.f.value};
}
