// Attention of one head, for several queries at a time, in float32 and float64. Part of sample_codes_kernel.h.

// Registers of keys, or components of values, that as many queries take at a time: with their sums they fill the
// registers there are.
constexpr int registers_beside(int queries) { return 8 * queries <= 4 * kQueriesTogether ? 8 : 4; }

// 2^x for x up to kSlack or so, 2^-126 for x below -126. As exp2 of simd.h, without the steps that make that 0.
VPFAST_INLINE F32 weight_of(F32 x) {
  constexpr float k1 = 0.6931470f, k2 = 0.24022242f, k3 = 0.05550734f, k4 = 0.009671513f, k5 = 0.0013264718f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its bits shifted by 23 are 0
  const FloatLanes held = maximum(F32::broadcast(-126.0f), x).v;
  const FloatLanes shifted = held + kRound;
  const FloatLanes f = held - (shifted - kRound);
  const FloatLanes y = ((((k5 * f + k4) * f + k3) * f + k2) * f + k1) * f + 1.0f;
  return {(FloatLanes)((IntLanes)y + ((IntLanes)shifted << 23))};
}
VPFAST_INLINE F64 weight_of(F64 x) { return exp2(x); }

template <class W>
struct Head : Walk<Head<W>, W> {
  using Walk<Head<W>, W>::ask;
  using Walk<Head<W>, W>::base;
  using Walk<Head<W>, W>::dim;
  using Walk<Head<W>, W>::fresh;
  using Walk<Head<W>, W>::keys;
  using Walk<Head<W>, W>::queries;
  using Walk<Head<W>, W>::sum_of;
  using Walk<Head<W>, W>::values;
  using Walk<Head<W>, W>::weights;
  using V = typename Lanes<W>::type;
  static constexpr int64_t kRow = kChunk<W>;
  static constexpr int64_t kBlock = kKeyBlock<W>;
  static constexpr int64_t kParts = kBlock / V::lanes;  // registers that a component of a block fills

  // Register r of component d of keys or values from key `first` on.
  VPFAST_INLINE const W* at(const W* of, int64_t first, int64_t d, int64_t r) {
    return of + ((first / kBlock + r / kParts) * dim + d) * kBlock + r % kParts * V::lanes;
  }

  // These keys of one chunk for G queries. Blocks are scored whole.
  template <int G>
  void take(int64_t q, Interval seen) {
    const int64_t first = seen.begin / kBlock * kBlock, blocks = (seen.end - first + kBlock - 1) / kBlock;
    V top[G];
    score<G>(q, first, blocks * kParts, top);
    const Interval inside{seen.begin - first, seen.end - first};
    const bool whole = inside.begin == 0 && inside.end == blocks * kBlock;
    for (int g = 0; g < G; ++g) {
      W* row = weights + g * kRow;
      if (!whole) top[g] = hide(row, inside, blocks * kBlock);
      if (fresh[q + g] || any_above(top[g], kSlack)) rebase(q + g, row, blocks * kBlock, highest_of(top[g]));
      weigh(q + g, row, blocks * kBlock);
    }
    if (whole) {
      add<G>(q, weights, first, 0, blocks * kParts);
      return;
    }
    for (int g = 0; g < G; ++g) add_some(q + g, weights + g * kRow, first, inside);
  }

  template <int G>
  VPFAST_INLINE void score(int64_t q, int64_t first, int64_t registers, V (&top)[G]) {
    constexpr int together = registers_beside(G);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) top[g] = V::broadcast(-W(__builtin_huge_val()));
    int64_t r = 0;
    for (; r + together <= registers; r += together) score_registers<G, together>(q, first, r, top);
    for (; r < registers; ++r) score_registers<G, 1>(q, first, r, top);
  }

  // Scores of registers r .. r + N - 1 of keys from `first` on, less the base.
  template <int G, int N>
  VPFAST_INLINE void score_registers(int64_t q, int64_t first, int64_t r, V (&top)[G]) {
    const W *from[N], *query[G];
    V made[G][N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) from[n] = at(keys, first, 0, r + n);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      query[g] = queries[q + g];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) made[g][n] = V::broadcast(-base[q + g]);
    }
    for (int64_t d = 0; d < dim; ++d) {
      V component[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) component[g] = V::broadcast(query[g][d]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V key = load(from[n] + d * kBlock);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) made[g][n] = multiply_add(component[g], key, made[g][n]);
      }
    }
    W* to = weights + r * V::lanes;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      V highest = made[g][0];
#pragma GCC unroll 16
      for (int n = 1; n < N; ++n) highest = maximum(highest, made[g][n]);
      top[g] = maximum(top[g], highest);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(to + g * kRow + n * V::lanes, made[g][n]);
    }
  }

  // Nothing but keys inside is seen. The highest of those, lane by lane.
  VPFAST_INLINE V hide(W* row, Interval inside, int64_t count) {
    const W nothing = -W(__builtin_huge_val());
    for (int64_t i = 0; i < inside.begin; ++i) row[i] = nothing;
    for (int64_t i = inside.end; i < count; ++i) row[i] = nothing;
    V top = V::broadcast(nothing);
    for (int64_t i = 0; i < count; i += V::lanes) top = maximum(top, load(row + i));
    return top;
  }

  // The query's base becomes `by` higher, for these scores and in its sums.
  void rebase(int64_t q, W* row, int64_t count, W by) {
    for (int64_t i = 0; i < count; ++i) row[i] -= by;
    base[q] += by;
    if (!fresh[q]) {
      W shrink[V::lanes];
      store(shrink, exp2(V::broadcast(-by)));
      for (int64_t i = 0; i < (dim + 1) * V::lanes; ++i) sum_of(q, 0)[i] *= shrink[0];
    }
    fresh[q] = false;
  }

  VPFAST_INLINE void weigh(int64_t q, W* row, int64_t count) {
    V sum = load(sum_of(q, dim));
    for (int64_t i = 0; i < count; i += kBlock) {
      ask();
      V weight[kParts];
#pragma GCC unroll 16
      for (int k = 0; k < kParts; ++k) weight[k] = weight_of(load(row + i + k * V::lanes));
#pragma GCC unroll 16
      for (int k = 0; k < kParts; ++k) {
        sum = sum + weight[k];
        store(row + i + k * V::lanes, weight[k]);
      }
    }
    store(sum_of(q, dim), sum);
  }

  // Values of registers begin .. end - 1 from key `first` on, weighted by G rows.
  template <int G>
  VPFAST_INLINE void add(int64_t q, const W* rows, int64_t first, int64_t begin, int64_t end) {
    constexpr int together = registers_beside(G);
    int64_t d = 0;
    for (; d + together <= dim; d += together) add_components<G, together>(q, d, rows, first, begin, end);
    for (; d < dim; ++d) add_components<G, 1>(q, d, rows, first, begin, end);
  }

  template <int G, int N>
  VPFAST_INLINE void add_components(int64_t q, int64_t d, const W* rows, int64_t first, int64_t begin, int64_t end) {
    V sum[G][N];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[g][n] = load(sum_of(q + g, d + n));
    }
    for (int64_t r = begin; r < end; ++r) {
      const W* from = at(values, first, d, r);
      V weight[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) weight[g] = load(rows + g * kRow + r * V::lanes);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V value = load(from + n * kBlock);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g][n] = multiply_add(weight[g], value, sum[g][n]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(sum_of(q + g, d + n), sum[g][n]);
    }
  }

  // Those of keys inside alone, of one query: beside them may lie anything.
  VPFAST_INLINE void add_some(int64_t q, const W* row, int64_t first, Interval inside) {
    const int64_t begin = (inside.begin + V::lanes - 1) / V::lanes, end = inside.end / V::lanes;
    if (begin > end) return add_part(q, row, first, inside);  // both ends in one register
    if (inside.begin < begin * V::lanes) add_part(q, row, first, {inside.begin, begin * V::lanes});
    if (begin < end) add<1>(q, row, first, begin, end);
    if (end * V::lanes < inside.end) add_part(q, row, first, {end * V::lanes, inside.end});
  }

  // A part of one register.
  void add_part(int64_t q, const W* row, int64_t first, Interval keys) {
    const int64_t r = keys.begin / V::lanes;
    W weight[V::lanes];
    for (int k = 0; k < V::lanes; ++k) {
      const int64_t i = r * V::lanes + k;
      weight[k] = i >= keys.begin && i < keys.end ? row[i] : W(0);
    }
    for (int64_t d = 0; d < dim; ++d) {
      const W* from = at(values, first, d, r);
      W value[V::lanes];
      for (int k = 0; k < V::lanes; ++k) value[k] = weight[k] != 0 ? from[k] : W(0);
      store(sum_of(q, d), multiply_add(load(weight), load(value), load(sum_of(q, d))));
    }
  }
};
