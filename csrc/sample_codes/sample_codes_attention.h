// Attention of one head, for several queries at a time. Part of sample_codes_kernel.h.
//
// Keys and values of a long clip are far more than a core's caches hold, so what counts is how often they are read:
// once for all queries of a run. Both lie in blocks of sixteen, component by component, so that scores, weights and
// sums are in the lanes of registers, and come in chunks, cut at multiples of kChunk in the clip.
//
// Weights are 2^(score - base). A query's base is the highest score of the first chunk that it sees; it moves only
// where a later one is 2^kSlack times heavier, so that as a rule nobody looks for a maximum across lanes. What a query
// sees of a chunk decides the order of its sums, and not who looks beside it.

// Registers of keys, or components of values, that as many queries take at a time: with their sums they fill the
// registers there are.
constexpr int registers_beside(int queries) { return 8 * queries <= 4 * kQueriesTogether ? 8 : 4; }

constexpr float kSlack = 16;

VPFAST_INLINE bool any_above(F32 x, float limit) {
#if VPFAST_ISA_LEVEL == 2
  return _mm512_cmp_ps_mask((__m512)x.v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif VPFAST_ISA_LEVEL == 1
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x.v, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (int k = 0; k < kLanes; ++k) any = any || x.v[k] > limit;
  return any;
#endif
}
VPFAST_INLINE bool any_above(F64 x, float limit) { return x.v > limit; }

VPFAST_INLINE float highest_of(F32 x) {
  float highest = x.v[0];
  for (int k = 1; k < kLanes; ++k) highest = x.v[k] > highest ? x.v[k] : highest;
  return highest;
}
VPFAST_INLINE double highest_of(F64 x) { return x.v; }

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
struct Head {
  using V = typename Lanes<W>::type;
  static constexpr int64_t kLine = 64 / sizeof(W);
  static constexpr int64_t kAskFrom = 12;                  // queries; fewer have too little work to hide behind
  static constexpr int64_t kParts = kKeyBlock / V::lanes;  // registers that a component of a block fills

  const W *keys, *values;
  int64_t dim;
  Rows<const W> queries;
  Rows<W> out;
  W* weights;     // kQueriesTogether rows of kChunk
  W* sums;        // of every query, dim registers of values and one of weights
  int64_t lines;  // of keys, and of values, to ask for beside a register of weights
  int64_t ahead;  // where those are; -1: nowhere
  W base[kRun];
  bool fresh[kRun];

  void attend(const Mask& mask, const Place* places, int64_t count) {
    lines = (dim * kKeyBlock / kLine + count - 1) / count;
    std::memset(sums, 0, sizeof(W) * count * (dim + 1) * V::lanes);
    for (int64_t q = 0; q < count; ++q) {
      base[q] = 0;
      fresh[q] = true;
    }
    for_each_line(mask, places[0], places[count - 1], [&](int64_t t, int64_t y, int64_t start) {
      Interval seen[kRun], all{INT64_MAX, 0};
      for (int64_t q = 0; q < count; ++q) {
        const Interval of_line = visible(mask, places[q], t, y);
        seen[q] = {start + of_line.begin, start + of_line.end};
        if (seen[q].empty()) continue;
        all = {least(all.begin, seen[q].begin), most(all.end, seen[q].end)};
      }
      for (int64_t first = all.begin / kChunk * kChunk; first < all.end; first += kChunk) {
        const bool last = first + kChunk >= all.end;
        ahead = last || count < kAskFrom ? -1 : (first + kChunk) * dim;
        look_at(first, seen, count);
      }
    });
    for (int64_t q = 0; q < count; ++q) {
      const W weight = total(load(sum_of(q, dim)));
      for (int64_t d = 0; d < dim; ++d) out[q][d] = weight == 0 ? W(0) : total(load(sum_of(q, d))) / weight;
    }
  }

  VPFAST_INLINE W* sum_of(int64_t q, int64_t d) { return sums + (q * (dim + 1) + d) * V::lanes; }

  // Register r of component d of keys or values from key `first` on.
  VPFAST_INLINE const W* at(const W* of, int64_t first, int64_t d, int64_t r) {
    return of + ((first / kKeyBlock + r / kParts) * dim + d) * kKeyBlock + r % kParts * V::lanes;
  }

  // The chunk that begins at key `first`, for every query what it sees of it.
  VPFAST_INLINE void look_at(int64_t first, const Interval* seen, int64_t count) {
    const auto part = [&](int64_t q) {
      return Interval{most(seen[q].begin, first), least(seen[q].end, first + kChunk)};
    };
    for (int64_t q = 0; q < count;) {
      const Interval of_q = part(q);
      int64_t alike = 1;
      while (alike < kQueriesTogether && q + alike < count && part(q + alike).begin == of_q.begin &&
             part(q + alike).end == of_q.end) {
        ++alike;
      }
      const int64_t together = alike == kQueriesTogether ? alike : alike >= 2 ? 2 : 1;
      if (!of_q.empty()) {
        if (together == kQueriesTogether) {
          take<kQueriesTogether>(q, of_q);
        } else if (together == 2) {
          take<2>(q, of_q);
        } else {
          take<1>(q, of_q);
        }
      }
      q += together;
    }
  }

  // These keys of one chunk for G queries. Blocks are scored whole.
  template <int G>
  void take(int64_t q, Interval seen) {
    const int64_t first = seen.begin / kKeyBlock * kKeyBlock, blocks = (seen.end - first + kKeyBlock - 1) / kKeyBlock;
    V top[G];
    score<G>(q, first, blocks * kParts, top);
    const Interval inside{seen.begin - first, seen.end - first};
    const bool whole = inside.begin == 0 && inside.end == blocks * kKeyBlock;
    for (int g = 0; g < G; ++g) {
      W* row = weights + g * kChunk;
      if (!whole) top[g] = hide(row, inside, blocks * kKeyBlock);
      if (fresh[q + g] || any_above(top[g], kSlack)) rebase(q + g, row, blocks * kKeyBlock, highest_of(top[g]));
      weigh(q + g, row, blocks * kKeyBlock);
    }
    if (whole) {
      add<G>(q, weights, first, 0, blocks * kParts);
      return;
    }
    for (int g = 0; g < G; ++g) add_some(q + g, weights + g * kChunk, first, inside);
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
        const V key = load(from[n] + d * kKeyBlock);
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
      for (int n = 0; n < N; ++n) store(to + g * kChunk + n * V::lanes, made[g][n]);
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

  // For a little of the next chunk, which the processor would not ask for before its first key is read.
  VPFAST_INLINE void ask() {
    if (ahead < 0) return;
    for (int64_t i = 0; i < lines; ++i, ahead += kLine) {
      __builtin_prefetch(keys + ahead);
      __builtin_prefetch(values + ahead);
    }
  }

  VPFAST_INLINE void weigh(int64_t q, W* row, int64_t count) {
    V sum = load(sum_of(q, dim));
    for (int64_t i = 0; i < count; i += kKeyBlock) {
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
      for (int g = 0; g < G; ++g) weight[g] = load(rows + g * kChunk + r * V::lanes);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V value = load(from + n * kKeyBlock);
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
