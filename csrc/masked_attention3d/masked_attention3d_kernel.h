// The loops of masked_attention3d for one instruction set. Included by masked_attention3d_cpu.cpp through
// for_each_isa.h.

namespace masked_attention3d {

using namespace vpfast::masked_attention3d;

template <class W>
struct Shape;  // of a tile of the product: rows high, up to `panels` registers wide

template <>
struct Shape<float> {
  using V = F32;
  static constexpr int rows = VPFAST_ISA_LEVEL == 2 ? 8 : 4, panels = 3;
};

template <>
struct Shape<double> {
  using V = F64;
  static constexpr int rows = 2, panels = 6;
};

template <class W>
using VectorOf = typename Shape<W>::V;

template <class W>
constexpr int64_t kLanesOf = VectorOf<W>::lanes;

template <int n>
struct Constant {
  static constexpr int value = n;
};

VPFAST_INLINE float power_of_2(float x) { return exp2(F32::broadcast(x)).v[0]; }
VPFAST_INLINE double power_of_2(double x) { return std::exp2(x); }

constexpr int32_t kCounting[kMaxTile] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                         16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                         32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47};

// x where begin <= index < end, else y. One of the three differs from lane to lane.
VPFAST_INLINE F32 choose(IntLanes index, IntLanes begin, IntLanes end, F32 x, F32 y) {
  return {((index >= begin) & (index < end)) ? x.v : y.v};
}
VPFAST_INLINE F64 choose(int32_t index, int32_t begin, int32_t end, F64 x, F64 y) {
  return index >= begin && index < end ? x : y;
}

template <class V>
struct Integers;
template <>
struct Integers<F32> {
  using type = IntLanes;
  static VPFAST_INLINE IntLanes load(const int32_t* p) {
    IntLanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static VPFAST_INLINE IntLanes broadcast(int32_t x) { return x - IntLanes{}; }
};
template <>
struct Integers<F64> {
  using type = int32_t;
  static VPFAST_INLINE int32_t load(const int32_t* p) { return *p; }
  static VPFAST_INLINE int32_t broadcast(int32_t x) { return x; }
};

// --- the product: every step of attention is one of these ---

template <class V, int R, int C>
struct Tile {
  V v[R][C];
};

// Which factor, being 0, makes a product 0 whatever the other one is.
enum class Zero { neither, left, right };

// tile[r][c] += sum over s of a[r a_row + s a_step] b[s b_row + c], c counted in lanes.
template <Zero zero, class W, class V, int R, int C>
VPFAST_INLINE void multiply_add(Tile<V, R, C>& tile, const W* a, int64_t a_row, int64_t a_step, const W* b,
                                int64_t b_row, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    V right[C];
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) right[c] = load(b + s * b_row + c * V::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V left = V::broadcast(a[r * a_row + s * a_step]);
#pragma GCC unroll 6
      for (int c = 0; c < C; ++c) {
        const V sum = tile.v[r][c] + left * right[c];
        if (zero == Zero::neither) tile.v[r][c] = sum;
        if (zero == Zero::left) tile.v[r][c] = where_equal(left, V::broadcast(0), tile.v[r][c], sum);
        if (zero == Zero::right) tile.v[r][c] = where_equal(right[c], V::broadcast(0), tile.v[r][c], sum);
      }
    }
  }
}

// Calls body(Constant<R>, row) so that all rows are done, R at a time.
template <class W, class Body>
VPFAST_INLINE void by_rows(int64_t rows, const Body& body) {
  constexpr int R = Shape<W>::rows;
  int64_t row = 0;
  for (; row + R <= rows; row += R) body(Constant<R>{}, row);
  for (; row < rows; ++row) body(Constant<1>{}, row);
}

template <class V, int R, int C>
VPFAST_INLINE Tile<V, R, C> zero_tile() {
  Tile<V, R, C> tile;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) tile.v[r][c] = V::broadcast(0);
  }
  return tile;
}

// rows of c += a b, of C registers each: c[r] += sum over s of a[r a_row + s a_step] b[s].
template <Zero zero, int C, class W>
VPFAST_INLINE void accumulate(W* c, int64_t c_row, int64_t rows, const W* a, int64_t a_row, int64_t a_step, const W* b,
                              int64_t b_row, int64_t steps) {
  using V = VectorOf<W>;
  by_rows<W>(rows, [&](auto height, int64_t row) VPFAST_INLINE_LAMBDA {
    constexpr int R = decltype(height)::value;
    Tile<V, R, C> tile;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
      for (int k = 0; k < C; ++k) tile.v[r][k] = load(c + (row + r) * c_row + k * V::lanes);
    }
    multiply_add<zero>(tile, a + row * a_row, a_row, a_step, b, b_row, steps);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
      for (int k = 0; k < C; ++k) store(c + (row + r) * c_row + k * V::lanes, tile.v[r][k]);
    }
  });
}

// --- which keys ---

// What the queries of a tile see of one line: of each its interval, and of all together. Keys of `all` are seen by
// every one, keys outside `any` by none.
struct View {
  int32_t begin[kMaxTile], end[kMaxTile];
  Interval any, all;
};

VPFAST_INLINE void look(View& view, const Mask& mask, const Place* places, int64_t count, int64_t t, int64_t y) {
  view.any = {INT32_MAX, 0};
  view.all = {0, INT32_MAX};
  for (int64_t i = 0; i < count; ++i) {
    const Interval seen = visible(mask, places[i], t, y);
    view.begin[i] = static_cast<int32_t>(seen.begin);
    view.end[i] = static_cast<int32_t>(seen.end);
    if (!seen.empty()) view.any = {least(view.any.begin, seen.begin), most(view.any.end, seen.end)};
    view.all =
        seen.empty() ? Interval{0, 0} : Interval{most(view.all.begin, seen.begin), least(view.all.end, seen.end)};
  }
}

// --- forward: a tile of queries in the lanes, its keys one after another ---

// out is kept unnormalised with the running maximum `high` and the sum of weights `sum`, both in powers of 2.
template <class W, int C, bool careful>
struct ForwardTile {
  using V = VectorOf<W>;
  using I = Integers<V>;
  static constexpr int64_t lanes = V::lanes, width = C * lanes;
  static constexpr Zero kZero = careful ? Zero::right : Zero::neither;

  const Forward<W>& p;
  int64_t first, count;
  W *queries, *out, *weights, *high, *sum;  // (d, width), (d, width), (kKeys, width), (width), (width)
  Place places[kMaxTile];
  View view;

  VPFAST_INLINE ForwardTile(const Forward<W>& problem, int64_t first, int64_t count, W* scratch)
      : p(problem), first(first), count(count) {
    queries = scratch;
    out = queries + p.dim * width;
    weights = out + p.dim * width;
    high = weights + kKeys * width;
    sum = high + width;
    for (int64_t i = 0; i < count; ++i) places[i] = place_of(p.mask, first + i);
    for (int64_t i = 0; i < kMaxTile; ++i) view.begin[i] = view.end[i] = 0;
  }

  void run(int64_t plane) {
    begin(p.plane(p.q, plane) + first * p.dim);
    const W *k = p.plane(p.k, plane), *v = p.plane(p.v, plane);
    bool seen[kMaxTile] = {};
    for_each_line(p.mask, places[0], places[count - 1], [&](int64_t t, int64_t y, int64_t start) {
      look(view, p.mask, places, count, t, y);
      for (int64_t i = 0; i < count; ++i) seen[i] |= view.begin[i] < view.end[i];
      for (int64_t key = view.any.begin; key < view.any.end; key += kKeys) {
        const int64_t keys = least(kKeys, view.any.end - key);
        const W *k_rows = k + (start + key) * p.dim, *v_rows = v + (start + key) * p.dim;
        if (view.all.begin <= key && key + keys <= view.all.end) {
          take<false>(k_rows, v_rows, key, keys);
        } else {
          take<true>(k_rows, v_rows, key, keys);
        }
      }
    });
    finish(plane, seen);
  }

  VPFAST_INLINE void begin(const W* q) {
    const W unit = p.scale * static_cast<W>(1.4426950408889634);
    for (int64_t d = 0; d < p.dim; ++d) {
      for (int64_t i = 0; i < width; ++i) {
        queries[d * width + i] = i < count ? q[i * p.dim + d] * unit : W(0);
        out[d * width + i] = 0;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      high[i] = -W(__builtin_huge_val());
      sum[i] = 0;
    }
  }

  template <bool masked>
  VPFAST_INLINE void take(const W* k, const W* v, int64_t key, int64_t keys) {
    V scale[C];
    weigh<masked>(k, key, keys, scale);
    by_rows<W>(p.dim, [&](auto height, int64_t row) VPFAST_INLINE_LAMBDA {
      constexpr int R = decltype(height)::value;
      Tile<V, R, C> tile;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) tile.v[r][c] = load(out + (row + r) * width + c * lanes) * scale[c];
      }
      multiply_add<kZero>(tile, v + row, 1, p.dim, weights, width, keys);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) store(out + (row + r) * width + c * lanes, tile.v[r][c]);
      }
    });
  }

  // Weights of these keys against the new maximum, and by how much everything before shrinks.
  template <bool masked>
  VPFAST_INLINE void weigh(const W* k, int64_t key, int64_t keys, V* scale) {
    const V nothing = V::broadcast(-W(__builtin_huge_val()));
    V highest[C];
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) highest[c] = load(high + c * lanes);
    by_rows<W>(keys, [&](auto height, int64_t row) VPFAST_INLINE_LAMBDA {
      constexpr int R = decltype(height)::value;
      Tile<V, R, C> tile = zero_tile<V, R, C>();
      multiply_add<Zero::neither>(tile, k + row * p.dim, p.dim, 1, queries, width, p.dim);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto index = I::broadcast(static_cast<int32_t>(key + row + r));
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) {
          V score = tile.v[r][c];
          if (masked) {
            score = choose(index, I::load(view.begin + c * lanes), I::load(view.end + c * lanes), score, nothing);
          }
          highest[c] = maximum(highest[c], score);
          store(weights + (row + r) * width + c * lanes, score);
        }
      }
    });
    V base[C], total[C];
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) {
      base[c] = where_equal(highest[c], nothing, V::broadcast(0), highest[c]);
      scale[c] = exp2(load(high + c * lanes) - base[c]);
      total[c] = load(sum + c * lanes) * scale[c];
      store(high + c * lanes, highest[c]);
    }
    for (int64_t row = 0; row < keys; ++row) {
#pragma GCC unroll 6
      for (int c = 0; c < C; ++c) {
        W* at = weights + row * width + c * lanes;
        const V weight = exp2(load(at) - base[c]);
        total[c] = total[c] + weight;
        store(at, weight);
      }
    }
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) store(sum + c * lanes, total[c]);
  }

  VPFAST_INLINE void finish(int64_t plane, const bool* seen) {
    W* to = p.out + (plane * p.mask.length() + first) * p.dim;
    W* lse = p.lse + plane * p.mask.length() + first;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < p.dim; ++d) to[i * p.dim + d] = seen[i] ? out[d * width + i] / sum[i] : W(0);
      lse[i] = (high[i] + std::log2(sum[i])) * static_cast<W>(0.6931471805599453);
    }
  }
};

template <class W, int C>
void forward_in(const Forward<W>& p, int64_t plane, int64_t first, int64_t count, W* scratch) {
  if (p.careful) {
    ForwardTile<W, C, true>(p, first, count, scratch).run(plane);
  } else {
    ForwardTile<W, C, false>(p, first, count, scratch).run(plane);
  }
}

// Queries [first, first + count), at most panels x lanes of them.
template <class W>
void forward(const Forward<W>& p, int64_t plane, int64_t first, int64_t count, W* scratch) {
  constexpr int most_panels = Shape<W>::panels;
  const int64_t panels = (count + kLanesOf<W> - 1) / kLanesOf<W>;
  if (panels == 1) return forward_in<W, 1>(p, plane, first, count, scratch);
  if (panels == 2) return forward_in<W, 2>(p, plane, first, count, scratch);
  forward_in<W, most_panels>(p, plane, first, count, scratch);
}

// --- backward: a block of keys in the lanes, its queries one after another ---

template <class W, int C, bool careful>
struct BackwardBlock {
  using V = VectorOf<W>;
  using I = Integers<V>;
  static constexpr int64_t lanes = V::lanes, width = C * lanes;

  const Backward<W>& p;
  int64_t count;
  W *k_columns, *v_columns, *grad_k, *grad_v;  // (d, width)
  W* k_rows;                                   // (width, padded d), scaled
  W *weights, *grad_scores;                    // (kQueries, width)
  View view;                                   // of queries

  VPFAST_INLINE BackwardBlock(const Backward<W>& problem, int64_t count, W* scratch) : p(problem), count(count) {
    k_columns = scratch;
    v_columns = k_columns + p.dim * width;
    grad_k = v_columns + p.dim * width;
    grad_v = grad_k + p.dim * width;
    weights = grad_v + p.dim * width;
    grad_scores = weights + kQueries * width;
    k_rows = grad_scores + kQueries * width;
  }

  void run(int64_t plane, W* grad_q, int64_t start, int64_t key) {
    const Mask& mask = p.mask;
    const int64_t length = mask.length(), dim = p.dim;
    begin(p.plane(p.k, plane) + (start + key) * dim, p.plane(p.v, plane) + (start + key) * dim);
    const Place line = place_of(mask, start);
    const W* q = p.plane(p.q, plane);
    const Interval seen = seen_by(mask, start + key, start + key + count - 1);
    for (int64_t first = seen.begin; first < seen.end; first += kQueries) {
      const int64_t queries = least(kQueries, seen.end - first);
      Place places[kQueries];
      for (int64_t i = 0; i < queries; ++i) places[i] = place_of(mask, first + i);
      look(view, mask, places, queries, line.t, line.y);
      if (view.any.begin >= key + count || view.any.end <= key) continue;
      const int64_t row = plane * length + first;
      const bool full = view.all.begin <= key && key + count <= view.all.end;
      const W *q_rows = q + first * dim, *out_rows = p.grad_out + row * dim;
      if (full) {
        take<false>(q_rows, out_rows, p.lse + row, p.delta + row, queries, key);
      } else {
        take<true>(q_rows, out_rows, p.lse + row, p.delta + row, queries, key);
      }
      to_queries(grad_q + first * p.padded_dim, queries);
    }
    finish((plane * length + start + key) * dim);
  }

  VPFAST_INLINE void begin(const W* k, const W* v) {
    const W unit = p.scale * static_cast<W>(1.4426950408889634);
    for (int64_t d = 0; d < p.dim; ++d) {
      for (int64_t i = 0; i < width; ++i) {
        k_columns[d * width + i] = i < count ? k[i * p.dim + d] * unit : W(0);
        v_columns[d * width + i] = i < count ? v[i * p.dim + d] : W(0);
        grad_k[d * width + i] = grad_v[d * width + i] = 0;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t d = 0; d < p.padded_dim; ++d) {
        k_rows[i * p.padded_dim + d] = i < count && d < p.dim ? k[i * p.dim + d] * p.scale : W(0);
      }
    }
  }

  template <bool masked>
  VPFAST_INLINE void take(const W* q, const W* grad_out, const W* lse, const W* delta, int64_t queries, int64_t key) {
    const V zero = V::broadcast(0);
    by_rows<W>(queries, [&](auto height, int64_t row) VPFAST_INLINE_LAMBDA {
      constexpr int R = decltype(height)::value;
      Tile<V, R, C> tile = zero_tile<V, R, C>();
      multiply_add<Zero::neither>(tile, q + row * p.dim, p.dim, 1, k_columns, width, p.dim);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V base = V::broadcast(lse[row + r] * static_cast<W>(1.4426950408889634));
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) {
          V weight = exp2(tile.v[r][c] - base);
          if (masked) {
            const auto index = I::load(kCounting + c * lanes) + I::broadcast(static_cast<int32_t>(key));
            weight = choose(index, I::broadcast(view.begin[row + r]), I::broadcast(view.end[row + r]), weight, zero);
          }
          store(weights + (row + r) * width + c * lanes, weight);
        }
      }
    });
    by_rows<W>(queries, [&](auto height, int64_t row) VPFAST_INLINE_LAMBDA {
      constexpr int R = decltype(height)::value;
      Tile<V, R, C> tile = zero_tile<V, R, C>();
      multiply_add<Zero::neither>(tile, grad_out + row * p.dim, p.dim, 1, v_columns, width, p.dim);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V mean = V::broadcast(delta[row + r]);
#pragma GCC unroll 6
        for (int c = 0; c < C; ++c) {
          const V weight = load(weights + (row + r) * width + c * lanes);
          const V grad = weight * (tile.v[r][c] - mean);
          store(grad_scores + (row + r) * width + c * lanes, careful ? where_equal(weight, zero, zero, grad) : grad);
        }
      }
    });
    accumulate<careful ? Zero::right : Zero::neither, C>(grad_v, width, p.dim, grad_out, 1, p.dim, weights, width,
                                                         queries);
    accumulate<careful ? Zero::right : Zero::neither, C>(grad_k, width, p.dim, q, 1, p.dim, grad_scores, width,
                                                         queries);
  }

  // The contraction over lanes goes by broadcasts of the scores' gradients instead.
  VPFAST_INLINE void to_queries(W* grad_q, int64_t queries) {
    constexpr Zero kZero = careful ? Zero::left : Zero::neither;
    int64_t d = 0;
    for (; d + 2 * lanes <= p.padded_dim; d += 2 * lanes) {
      accumulate<kZero, 2>(grad_q + d, p.padded_dim, queries, grad_scores, width, 1, k_rows + d, p.padded_dim, count);
    }
    for (; d < p.padded_dim; d += lanes) {
      accumulate<kZero, 1>(grad_q + d, p.padded_dim, queries, grad_scores, width, 1, k_rows + d, p.padded_dim, count);
    }
  }

  VPFAST_INLINE void finish(int64_t offset) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < p.dim; ++d) {
        p.grad_k[offset + i * p.dim + d] = grad_k[d * width + i] * p.scale;
        p.grad_v[offset + i * p.dim + d] = grad_v[d * width + i];
      }
    }
  }
};

template <class W, int C>
void backward_in(const Backward<W>& p, int64_t plane, W* grad_q, int64_t start, int64_t key, int64_t count,
                 W* scratch) {
  if (p.careful) {
    BackwardBlock<W, C, true>(p, count, scratch).run(plane, grad_q, start, key);
  } else {
    BackwardBlock<W, C, false>(p, count, scratch).run(plane, grad_q, start, key);
  }
}

// Keys [key, key + count) of the line that starts at `start`, at most panels x lanes of them. `grad_q`: this plane's
// rows (L, padded d) of the group that they belong to.
template <class W>
void backward(const Backward<W>& p, int64_t plane, W* grad_q, int64_t start, int64_t key, int64_t count, W* scratch) {
  constexpr int most_panels = Shape<W>::panels;
  const int64_t panels = (count + kLanesOf<W> - 1) / kLanesOf<W>;
  if (panels == 1) return backward_in<W, 1>(p, plane, grad_q, start, key, count, scratch);
  if (panels == 2) return backward_in<W, 2>(p, plane, grad_q, start, key, count, scratch);
  backward_in<W, most_panels>(p, plane, grad_q, start, key, count, scratch);
}

// --- decode: one query, the components in the lanes ---

// Of one query the output, from keys and values where they lie in a cache of any strides. `scratch`: 2 d + kKeys.
template <class T, class W>
void decode(const Decode<W>& p, int64_t plane, int64_t position, W* scratch) {
  using V = VectorOf<W>;
  constexpr int64_t lanes = V::lanes;
  const int64_t dim = p.dim;
  W *query = scratch, *out = query + dim, *weights = out + dim;
  const T* q = p.template plane<T>(p.q, plane) + position * p.q.row;
  const T *k = p.template plane<T>(p.k, plane), *v = p.template plane<T>(p.v, plane);
  const W unit = p.scale * static_cast<W>(1.4426950408889634);
  for (int64_t d = 0; d < dim; ++d) {
    query[d] = static_cast<W>(q[d * p.q.column]) * unit;
    out[d] = 0;
  }
  W high = -W(__builtin_huge_val()), sum = 0;
  bool any = false;
  const Place place = place_of(p.mask, p.positions[position]);
  for_each_line(p.mask, place, place, [&](int64_t t, int64_t y, int64_t start) {
    const Interval seen = visible(p.mask, place, t, y);
    for (int64_t first = seen.begin; first < seen.end; first += kKeys) {
      const int64_t keys = least(kKeys, seen.end - first), padded = round_up(keys, lanes);
      any = true;
      V highest = V::broadcast(high);
      for (int64_t i = 0; i < padded; i += lanes) {
        V products[lanes];
        for (int64_t j = 0; j < lanes; ++j) products[j] = V::broadcast(0);
        for (int64_t j = 0; j < least(lanes, keys - i); ++j) {
          const T* key = k + (start + first + i + j) * p.k.row;
          for (int64_t d = 0; d < dim; d += lanes) {
            const int part = static_cast<int>(least(lanes, dim - d));
            products[j] = products[j] + load_part(query + d, part) * Lanes<T>::load(key + d, part);
          }
        }
        store(weights + i, totals(products));
        for (int64_t j = keys - i; j < lanes; ++j) weights[i + j] = -W(__builtin_huge_val());
        highest = maximum(load(weights + i), highest);
      }
      W lane[lanes];
      store(lane, highest);
      W top = high;
      for (int64_t j = 0; j < lanes; ++j) top = lane[j] > top ? lane[j] : top;
      const W base = top == -W(__builtin_huge_val()) ? W(0) : top, scale = power_of_2(high - base);
      high = top;
      V weight_sum = V::broadcast(0);
      for (int64_t i = 0; i < padded; i += lanes) {
        const V weight = exp2(load(weights + i) - V::broadcast(base));
        weight_sum = weight_sum + weight;
        store(weights + i, weight);
      }
      sum = sum * scale + total(weight_sum);
      for (int64_t d = 0; d < dim; d += lanes) {
        const int part = static_cast<int>(least(lanes, dim - d));
        V sums[4] = {load_part(out + d, part) * V::broadcast(scale), V::broadcast(0), V::broadcast(0), V::broadcast(0)};
        const T* values = v + (start + first) * p.v.row + d;
        int64_t i = 0;
        for (; i + 4 <= keys; i += 4) {
#pragma GCC unroll 4
          for (int64_t j = 0; j < 4; ++j) {
            sums[j] = sums[j] + V::broadcast(weights[i + j]) * Lanes<T>::load(values + (i + j) * p.v.row, part);
          }
        }
        for (; i < keys; ++i) sums[0] = sums[0] + V::broadcast(weights[i]) * Lanes<T>::load(values + i * p.v.row, part);
        store_part(out + d, (sums[0] + sums[1]) + (sums[2] + sums[3]), part);
      }
    }
  });
  T* to = static_cast<T*>(p.out) + (plane * p.count + position) * dim;
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(any ? out[d] / sum : W(0));
}

#if VPFAST_ISA_LEVEL == 2
#include "masked_attention3d/masked_attention3d_amx.h"
#include "masked_attention3d/masked_attention3d_amx_backward.h"
#include "masked_attention3d/masked_attention3d_amx_forward.h"
#endif

}  // namespace masked_attention3d
