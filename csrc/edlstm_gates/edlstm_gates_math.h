// The arithmetic of one LSTM cell, on whatever a "number" is: a SIMD register on the CPU, a float on a GPU.
//
// Included where `sigmoid`, `tanh`, `value`, `product` and `value_and_slope` exist for that number type V, once for
// each (hence no include guard). The two functions below are the only place where the formulas are written in C++.
//
//   c = sigmoid(f) c' + sigmoid(i) tanh(g)        h = sigmoid(o) tanh(c)            (MSPN paper, Eq. 2-3)

// The four gates before activation.
template <class V>
struct Gates {
  V f, i, o, g;
};

template <class V>
VPFAST_INLINE void cell_forward(const Gates<V>& x, V c_prev, V& h, V& c) {
  c = value(sigmoid(x.f)) * c_prev + product(sigmoid(x.i), tanh(x.g));
  h = product(sigmoid(x.o), tanh(c));
}

// `dx` are the gradients of the gates before activation. h and c are recomputed from the inputs.
template <class V>
VPFAST_INLINE void cell_backward(const Gates<V>& x, V c_prev, V dh, V dc, Gates<V>& dx, V& dc_prev) {
  const auto f = value_and_slope(sigmoid(x.f)), i = value_and_slope(sigmoid(x.i)), o = value_and_slope(sigmoid(x.o));
  const auto g = value_and_slope(tanh(x.g));
  const auto tanh_c = value_and_slope(tanh(f.value * c_prev + i.value * g.value));

  const V d_cell = dh * o.value * tanh_c.slope + dc;
  dx.f = d_cell * c_prev * f.slope;
  dx.i = d_cell * g.value * i.slope;
  dx.o = dh * tanh_c.value * o.slope;
  dx.g = d_cell * i.value * g.slope;
  dc_prev = d_cell * f.value;
}
