// Affine maps of several vectors, and functions of single numbers. Part of sample_codes_kernel.h.
//
// Every sum runs over its terms in one order, whatever rows and columns stand beside it: a vector gives the same
// numbers alone and among others.

// a b + c. Where products are fused they are all: left to itself the compiler fuses some and leaves others, by what
// stands beside them.
#if VPFAST_ISA_LEVEL == 0
template <class X>
VPFAST_INLINE X multiply_add(X a, X b, X c) {
  return c + a * b;
}
#else
VPFAST_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
VPFAST_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
VPFAST_INLINE F64 multiply_add(F64 a, F64 b, F64 c) { return {__builtin_fma(a.v, b.v, c.v)}; }
#if VPFAST_ISA_LEVEL == 2
VPFAST_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
  return {(FloatLanes)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
}
#else
VPFAST_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
  return {(FloatLanes)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
}
#endif
#endif

// Vectors, each `step` elements after the one before; 0 is one vector for all.
template <class W>
struct Rows {
  W* first;
  int64_t step;
  VPFAST_INLINE W* operator[](int64_t row) const { return first + row * step; }
};

// As many rows as share what is read of a matrix: with two registers of columns they fill the registers there are.
constexpr int64_t kRowsTogether = kLanes == 16 ? 8 : 6;

// A member's share of `columns`: whole blocks of 16, so that no two write to one cache line.
VPFAST_INLINE Interval share_of(int64_t columns, const Member& member) {
  const int64_t blocks = (columns + 15) / 16, each = (blocks + member.size - 1) / member.size;
  const int64_t begin = member.rank * each * 16, end = begin + each * 16;
  return {begin < columns ? begin : columns, end < columns ? end : columns};
}

// What one step of a sum multiplies: a vector's factor for all columns, and a register of columns.
VPFAST_INLINE F32 factor_at(const float* x) { return F32::broadcast(*x); }
VPFAST_INLINE F64 factor_at(const double* x) { return F64::broadcast(*x); }
VPFAST_INLINE F32 columns_at(const float* matrix) { return load(matrix); }
VPFAST_INLINE F64 columns_at(const double* matrix) { return load(matrix); }
template <class W, class V>
VPFAST_INLINE V add_step(V factor, V columns, V sum) {
#if VPFAST_ISA_LEVEL == 2
  if constexpr (kTerms<W> == 2) return add_products(factor, columns, sum);
#endif
  return multiply_add(factor, columns, sum);
}
#if VPFAST_ISA_LEVEL == 2
VPFAST_INLINE F32 factor_at(const BFloat16* x) { return broadcast_pair(x); }
VPFAST_INLINE F32 columns_at(const BFloat16* matrix) { return load_pairs(matrix); }
#endif

// Where sums begin.
VPFAST_INLINE F32 base_at(const float* base) { return load(base); }
VPFAST_INLINE F64 base_at(const double* base) { return load(base); }
VPFAST_INLINE F32 base_at(const BFloat16* base) { return Lanes<BFloat16>::load(base, kLanes); }

// R rows from row `r` on by C registers of columns from column `c` on: y = base + x matrix.
template <int R, int C, class W, class B>
VPFAST_INLINE void tile_of(const Rows<Worked<W>>& y, const Rows<const B>& base, const Rows<const W>& x,
                           const Affine<W>& map, int64_t r, int64_t c) {
  using V = typename Lanes<W>::type;
  V sum[R][C];
  const W* from[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    from[i] = x[r + i];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sum[i][j] = base_at(base[r + i] + c + j * V::lanes);
  }
  constexpr int64_t terms = kTerms<W>;
  const W* matrix = map.matrix + c * terms;
  for (int64_t k = 0; k < map.in; k += terms, matrix += map.out * terms) {
    V column[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) column[j] = columns_at(matrix + j * V::lanes * terms);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V factor = factor_at(from[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sum[i][j] = add_step<W>(factor, column[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) store(y[r + i] + c + j * V::lanes, sum[i][j]);
  }
}

// C registers of columns of all rows.
template <int C, class W, class B>
VPFAST_INLINE void strip_of(const Rows<Worked<W>>& y, const Rows<const B>& base, const Rows<const W>& x,
                            const Affine<W>& map, int64_t rows, int64_t c) {
  int64_t r = 0;
  for (; r + kRowsTogether <= rows; r += kRowsTogether) tile_of<kRowsTogether, C>(y, base, x, map, r, c);
  if (r + 4 <= rows) {
    tile_of<4, C>(y, base, x, map, r, c);
    r += 4;
  }
  if (r + 3 == rows) tile_of<3, C>(y, base, x, map, r, c);
  if (r + 2 == rows) tile_of<2, C>(y, base, x, map, r, c);
  if (r + 1 == rows) tile_of<1, C>(y, base, x, map, r, c);
}

// Columns [begin, end) of y = base + x matrix; y may be base.
template <class W, class B>
void apply(Rows<Worked<W>> y, Rows<const B> base, Rows<const W> x, const Affine<W>& map, Interval columns,
           int64_t rows) {
  using X = Worked<W>;
  using V = typename Lanes<W>::type;
  constexpr int64_t terms = kTerms<W>;
  int64_t c = columns.begin;
  if (rows == 1) {
    for (; c + 8 * V::lanes <= columns.end; c += 8 * V::lanes) tile_of<1, 8>(y, base, x, map, 0, c);
  }
  for (; c + 2 * V::lanes <= columns.end; c += 2 * V::lanes) strip_of<2>(y, base, x, map, rows, c);
  for (; c + V::lanes <= columns.end; c += V::lanes) strip_of<1>(y, base, x, map, rows, c);
  for (; c < columns.end; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      X sum = base[r][c];
      for (int64_t i = 0; i < map.in; ++i) {
        const X factor = x[r][i], column = map.matrix[(i / terms * map.out + c) * terms + i % terms];
        sum = multiply_add(factor, column, sum);
      }
      y[r][c] = sum;
    }
  }
}

template <class W>
VPFAST_INLINE void convert(W* to, const W* from, int64_t count) {
  std::memcpy(to, from, sizeof(W) * count);
}
#if VPFAST_ISA_LEVEL == 2
VPFAST_INLINE void convert(BFloat16* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) store_pairs(to + i, packed(load(from + i), load(from + i + 16)));
  for (; i < count; i += 16) {
    const int64_t part = count - i < 16 ? count - i : 16;
    Lanes<BFloat16>::store(to + i, load_part(from + i, part), part);
  }
}
#endif

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
VPFAST_INLINE F32 error_function(F32 x) {
  const F32 one = F32::broadcast(1.0f), size = magnitude(x);
  const F32 t = one / (one + 0.3275911f * size);
  const F32 p =
      ((((F32::broadcast(1.061405429f) * t - F32::broadcast(1.453152027f)) * t + F32::broadcast(1.421413741f)) * t -
        F32::broadcast(0.284496736f)) *
           t +
       F32::broadcast(0.254829592f)) *
      t;
  return with_sign_of(one - p * exp2(F32::broadcast(-1.44269504f) * size * size), x);
}
VPFAST_INLINE F64 error_function(F64 x) { return {std::erf(x.v)}; }

template <class W>
void gelu(W* x, Interval columns) {
  using V = typename Lanes<W>::type;
  for (int64_t i = columns.begin; i < columns.end; i += V::lanes) {
    const int64_t count = columns.end - i < V::lanes ? columns.end - i : V::lanes;
    const V v = load_part(x + i, count);
    const V half = V::broadcast(W(0.5)) * v;
    store_part(x + i, half + half * error_function(V::broadcast(W(0.70710678118654752)) * v), count);
  }
}

// y = tanh(a) sigmoid(b)
template <class W>
void gate(W* y, const W* a, const W* b, int64_t count) {
  using V = typename Lanes<W>::type;
  for (int64_t i = 0; i < count; i += V::lanes) {
    const int64_t part = count - i < V::lanes ? count - i : V::lanes;
    store_part(y + i, product(sigmoid(load_part(b + i, part)), tanh(load_part(a + i, part))), part);
  }
}

template <class Y, class X, class W>
void normalise(Y* y, const X* x, const Norm<W>& norm, int64_t count) {
  using V = typename Lanes<X>::type;
  const int64_t whole = count / V::lanes * V::lanes;
  V sums = V::broadcast(0);
  for (int64_t i = 0; i < whole; i += V::lanes) sums = sums + load(x + i);
  X mean = total(sums);
  for (int64_t i = whole; i < count; ++i) mean += x[i];
  mean /= static_cast<X>(count);
  V squares = V::broadcast(0);
  for (int64_t i = 0; i < whole; i += V::lanes) {
    const V away = load(x + i) - V::broadcast(mean);
    squares = squares + away * away;
  }
  X variance = total(squares);
  for (int64_t i = whole; i < count; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const X scale = X(1) / std::sqrt(variance / static_cast<X>(count) + X(1e-5));
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<Y>((x[i] - mean) * scale * norm.weight[i] + norm.bias[i]);
}
