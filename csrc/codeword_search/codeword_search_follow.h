// What follows from the codes of vectors: their sums of codewords, errors, statistics and gradients. Included by
// codeword_search_kernel.h.
//
// Each function takes a group's vectors with their rows and walks their residuals down the layers, in the same
// steps and so to the same bits. `D` is the dim where the compiler knows it, or 0.

// A row of D numbers in registers, or of p.dim numbers in the working memory that it is given.
template <class W, int D>
struct Row {
  typedef W Numbers __attribute__((vector_size(D * sizeof(W))));
  Numbers own;

  VPFAST_INLINE Row(W*, int64_t) {}
  VPFAST_INLINE static Numbers at(const W* x) {
    Numbers row;
    std::memcpy(&row, x, sizeof row);
    return row;
  }
  VPFAST_INLINE void set(W value) { own = value - Numbers{}; }
  VPFAST_INLINE void copy(const W* x) { own = at(x); }
  VPFAST_INLINE void add(const W* x) { own += at(x); }
  VPFAST_INLINE void subtract(const W* x) { own -= at(x); }
  VPFAST_INLINE void add_scaled(W scale, const W* x) { own += scale * at(x); }
  VPFAST_INLINE void add_scaled(W scale, const Row& x) { own += scale * x.own; }
  VPFAST_INLINE void add_to(W* sum) const { put(at(sum) + own, sum); }
  VPFAST_INLINE void add_squares_to(W* sum) const { put(at(sum) + own * own, sum); }
  VPFAST_INLINE static void put(Numbers row, W* to) { std::memcpy(to, &row, sizeof row); }
  template <class T>
  VPFAST_INLINE void read(const T* from, int64_t stride) {
    if constexpr (std::is_same_v<T, W>) {
      if (stride == 1) return copy(from);
    }
    W row[D];
    read_row(from, stride, D, row);
    own = at(row);
  }
  template <class T>
  VPFAST_INLINE void write(T* to) const {
    for (int d = 0; d < D; ++d) to[d] = static_cast<T>(own[d]);
  }
  VPFAST_INLINE void write(W* to) const { put(own, to); }
  VPFAST_INLINE bool finite() const {
    W row[D];
    put(own, row);
    return is_finite(row, D);
  }
};

template <class W>
struct Row<W, 0> {
  W* own;
  int64_t dim;

  VPFAST_INLINE Row(W* memory, int64_t size) : own(memory), dim(size) {}
  VPFAST_INLINE void set(W value) { fill(own, dim, value); }
  VPFAST_INLINE void copy(const W* x) {
    for (int64_t d = 0; d < dim; ++d) own[d] = x[d];
  }
  VPFAST_INLINE void add(const W* x) {
    for (int64_t d = 0; d < dim; ++d) own[d] += x[d];
  }
  VPFAST_INLINE void subtract(const W* x) {
    for (int64_t d = 0; d < dim; ++d) own[d] -= x[d];
  }
  VPFAST_INLINE void add_scaled(W scale, const W* x) {
    for (int64_t d = 0; d < dim; ++d) own[d] += scale * x[d];
  }
  VPFAST_INLINE void add_scaled(W scale, const Row& x) { add_scaled(scale, x.own); }
  VPFAST_INLINE void add_to(W* sum) const {
    for (int64_t d = 0; d < dim; ++d) sum[d] += own[d];
  }
  VPFAST_INLINE void add_squares_to(W* sum) const {
    for (int64_t d = 0; d < dim; ++d) sum[d] += own[d] * own[d];
  }
  template <class T>
  VPFAST_INLINE void read(const T* from, int64_t stride) {
    read_row(from, stride, dim, own);
  }
  template <class T>
  VPFAST_INLINE void write(T* to) const {
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(own[d]);
  }
  VPFAST_INLINE bool finite() const { return is_finite(own, dim); }
};

template <class W>
VPFAST_INLINE const W* codeword(const Problem& p, int64_t layer, int64_t row, int64_t dim) {
  return static_cast<const W*>(p.rows[layer]) + row * dim;
}

template <class W, int D>
VPFAST_INLINE void collect(Table<W>& table, int64_t row, const Row<W, D>& x, int64_t dim) {
  if (row < table.least || row >= table.end) return;
  x.add_to(table.sums + (row - table.least) * dim);
  ++table.counts[row - table.least];
}

template <class T, class W, int D>
VPFAST_INLINE void read_vector(const Problem& p, int64_t vector, Row<W, D>& x) {
  x.read(static_cast<const T*>(p.z) + vector * p.z_row, p.z_column);
}

template <class T, class W, int D>
VPFAST_INLINE void read_gradient(const Pass<W>& pass, int64_t vector, Row<W, D>& x) {
  x.read(static_cast<const T*>(pass.grad_quantized) + vector * pass.grad_row, pass.grad_column);
}

// quantized = e^1 + ... + e^n
template <class T, class W, int D>
void add_codewords(const Problem& p, Pass<W>& pass, int64_t first, int64_t count, const int32_t* rows, W* memory) {
  const int64_t dim = D ? D : p.dim;
  const bool finite = pass.all_finite || all_finite<T>(p, first, count);
  T* quantized = static_cast<T*>(p.quantized) + first * dim;
  Row<W, D> sum(memory, dim), z(memory + dim, dim);
  for (int64_t v = 0; v < count; ++v) {
    if (p.leaf_sums) {
      sum.copy(static_cast<const W*>(p.leaf_sums) + rows[(p.layers - 1) * kGroup + v] * dim);
    } else {
      sum.copy(codeword<W>(p, 0, rows[v], dim));
      for (int64_t layer = 1; layer < p.layers; ++layer) sum.add(codeword<W>(p, layer, rows[layer * kGroup + v], dim));
    }
    if (!finite) {
      read_vector<T>(p, first + v, z);
      if (!z.finite()) sum.set(static_cast<W>(__builtin_nanf("")));
    }
    sum.write(quantized + v * dim);
  }
}

// The errors of each layer, and the sums of residuals: of a tree those of xi^n at the leaves, else those of xi^(i-1) at
// every layer.
template <class T, class W, int D>
void measure(const Problem& p, Pass<W>& pass, int64_t first, int64_t count, const int32_t* rows, W* memory) {
  const int64_t dim = D ? D : p.dim, size = p.layers * dim;
  const bool finite = pass.all_finite || all_finite<T>(p, first, count);
  Row<W, D> residual(memory, dim);
  W* squares = memory + dim;  // (kTurns, layers, dim): by turns, as a sum waits for the one before it
  fill(squares, kTurns * size, W(0));
  for (int64_t v = 0; v < count; ++v) {
    read_vector<T>(p, first + v, residual);
    if (!finite && !residual.finite()) {
      fill(squares, size, static_cast<W>(__builtin_nanf("")));
      continue;
    }
    W* square = squares + v % kTurns * size;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      const int64_t row = rows[layer * kGroup + v];
      if (!p.strict_tree) collect(pass.table, p.first_row[layer] + row, residual, dim);
      residual.subtract(codeword<W>(p, layer, row, dim));
      residual.add_squares_to(square + layer * dim);
    }
    if (p.strict_tree) {
      collect(pass.table, p.first_row[p.layers - 1] + rows[(p.layers - 1) * kGroup + v], residual, dim);
    }
  }
  for (int64_t k = 0; pass.errors && k < kTurns * size; ++k) pass.errors[k % size / dim] += squares[k];
}

// grad_z = grad_quantized + sum_i weights_z[i] xi^i, and where there are weights_codebooks (no tree), the sum over
// vectors of sum_i weights_codebooks[j, i] xi^i for the rows of each layer j.
template <class T, class W, int D>
void differentiate(const Problem& p, Pass<W>& pass, int64_t first, int64_t count, const int32_t* rows, W* memory) {
  const int64_t dim = D ? D : p.dim, layers = p.layers;
  const bool finite = pass.all_finite || all_finite<T>(p, first, count);
  Row<W, D> residual(memory, dim), gradient(memory + dim, dim);
  W* after = memory + 2 * dim;  // xi^1 .. xi^n
  for (int64_t v = 0; v < count; ++v) {
    read_vector<T>(p, first + v, residual);
    const bool counted = finite || residual.finite();
    if (!counted) residual.set(static_cast<W>(__builtin_nanf("")));
    if (pass.grad_quantized) {
      read_gradient<T>(pass, first + v, gradient);
    } else {
      gradient.set(0);
    }
    for (int64_t layer = 0; layer < layers; ++layer) {
      residual.subtract(codeword<W>(p, layer, rows[layer * kGroup + v], dim));
      gradient.add_scaled(pass.weights_z[layer], residual);
      if (pass.weights_codebooks) residual.write(after + layer * dim);
    }
    if (pass.grad_z) gradient.write(static_cast<T*>(pass.grad_z) + (first + v) * dim);
    for (int64_t layer = 0; pass.weights_codebooks && counted && layer < layers; ++layer) {
      const int64_t row = p.first_row[layer] + rows[layer * kGroup + v];
      if (row < pass.table.least || row >= pass.table.end) continue;
      gradient.set(0);
      for (int64_t other = layer; other < layers; ++other) {
        gradient.add_scaled(pass.weights_codebooks[layer * layers + other], after + other * dim);
      }
      collect(pass.table, row, gradient, dim);
    }
  }
}

// The sums of grad_quantized at the codewords that were added up: of a tree at its leaves.
template <class T, class W, int D>
void scatter(const Problem& p, Pass<W>& pass, int64_t first, int64_t count, const int32_t* rows, W* memory) {
  const int64_t dim = D ? D : p.dim;
  Row<W, D> gradient(memory, dim);
  for (int64_t v = 0; v < count; ++v) {
    read_gradient<T>(pass, first + v, gradient);
    for (int64_t layer = p.strict_tree ? p.layers - 1 : 0; layer < p.layers; ++layer) {
      collect(pass.table, p.first_row[layer] + rows[layer * kGroup + v], gradient, dim);
    }
  }
}

template <class T, class W, int D>
void follow(Step step, const Problem& p, Pass<W>& pass, int64_t first, int64_t count, const int32_t* rows, W* memory) {
  switch (step) {
    case Step::add_codewords:
      return add_codewords<T, W, D>(p, pass, first, count, rows, memory);
    case Step::measure:
      return measure<T, W, D>(p, pass, first, count, rows, memory);
    case Step::differentiate:
      return differentiate<T, W, D>(p, pass, first, count, rows, memory);
    case Step::scatter:
      return scatter<T, W, D>(p, pass, first, count, rows, memory);
  }
}

template <class T, class W>
void follow_codes(Step step, const Problem& p, Pass<W>& pass, int64_t first, int64_t count, const int32_t* rows,
                  W* memory) {
  if (p.dim == 8) return follow<T, W, 8>(step, p, pass, first, count, rows, memory);
  if (p.dim == 4) return follow<T, W, 4>(step, p, pass, first, count, rows, memory);
  follow<T, W, 0>(step, p, pass, first, count, rows, memory);
}
