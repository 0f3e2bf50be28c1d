// Backward of masked_attention3d on matrix tiles: 32 keys in the lanes, 32 queries at a time. Included by
// masked_attention3d_kernel.h for AVX-512.
//
// A step is a block of keys and a block of queries. Its scores and the gradients of its weights are two products over
// components; weights, from the saved log-sum-exp, and the gradients of scores follow in registers; then come three
// products over positions: gradients of values and keys, turned (components by keys), and of queries. The first two
// products of the next step run between the rows of this one.
//
// Keys go by groups of blocks, queries by runs that stay in the L2 cache while all blocks of the group pass. Gradients
// of keys and values are kept for the whole group.

constexpr int64_t kRun = 16;  // blocks of queries

template <int pieces>
struct BackwardTiles {
  struct Step {
    Bits visible;
    const uint16_t *keys, *queries;  // faces: see TileBackward
    const float *lse, *delta;
    float *grad_keys, *grad_values, *grad_queries;
    float *scores, *grad_weights;
  };

  const Backward<float>& p;
  const TileBackward& tiles;
  int64_t chunks, face, taken = 0;
  float unit;
  float *scores, *grads;              // (2, 2, 32, 32); (blocks, keys and values, chunks, 32, 32)
  uint16_t *weights, *across, *down;  // a face each: weights and gradients of scores by pairs, the latter by rows
  Step steps[2];

  static int64_t scratch(int64_t dim, int64_t blocks) {
    return 4 * kBlock * kBlock + 3 * pieces * kFace / 2 + blocks * 2 * round_up(dim, 32) * kBlock;
  }

  VPFAST_INLINE BackwardTiles(const Backward<float>& problem, const TileBackward& tiles, float* scratch)
      : p(problem), tiles(tiles) {
    chunks = round_up(p.dim, 32) / 32;
    face = chunks * pieces * kFace;
    unit = p.scale * 1.44269504f;
    scores = scratch;
    weights = reinterpret_cast<uint16_t*>(scores + 4 * kBlock * kBlock);
    across = weights + pieces * kFace;
    down = across + pieces * kFace;
    grads = reinterpret_cast<float*>(down + pieces * kFace);
  }

  // Key blocks [first, last) of a plane. `grad_q`: the plane's rows of their group.
  void run(int64_t plane, float* grad_q, int64_t first, int64_t last) {
    const int64_t length = p.mask.length(), grad = chunks * kBlock * kBlock;
    std::memset(grads, 0, sizeof(float) * (last - first) * 2 * grad);
    const Interval touched = seen_by(p.mask, first * kBlock, least(length, last * kBlock) - 1);
    for (int64_t start = touched.begin / kBlock; start * kBlock < touched.end; start += kRun) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t key = block * kBlock, end = least(length, key + kBlock) - 1;
        const Interval seen = seen_by(p.mask, key, end);
        const int64_t stop = least(start + kRun, (seen.end + kBlock - 1) / kBlock);
        for (int64_t i = most(start, seen.begin / kBlock); i < stop; ++i) {
          const Bits visible = visible_to(tiles.sights[i], key, end);
          if (visible.none()) continue;
          float* to = grads + (block - first) * 2 * grad;
          take(visible, plane, block, i, to, grad_q + i * kBlock * p.padded_dim);
        }
      }
    }
    if (taken > 0) advance(nullptr, steps[(taken - 1) % 2]);
    for (int64_t block = first; block < last; ++block) finish(plane, block, grads + (block - first) * 2 * grad);
  }

  // A block's keys may be of several lines.
  VPFAST_INLINE Bits visible_to(const Sight& sight, int64_t key, int64_t end) const {
    const int64_t line = p.mask.line_length();
    Bits visible{};
    for (int64_t start = key / line * line; start <= end; start += line) {
      const int64_t t = p.mask.line == Line::sequence ? 0 : start / p.mask.frame();
      const int64_t y = p.mask.line == Line::row ? start / p.mask.columns % p.mask.rows : 0;
      visible.add(bits_of(look(p.mask, sight, t, y), key - start));
    }
    return visible;
  }

  VPFAST_INLINE void take(const Bits& visible, int64_t plane, int64_t block, int64_t query_block, float* grad,
                          float* grad_q) {
    Step& now = steps[taken % 2];
    const int64_t at = plane * tiles.blocks + query_block;
    now.visible = visible;
    now.keys = tiles.keys + (plane * tiles.blocks + block) * TileBackward::kKeyFaces * face;
    now.queries = tiles.queries + at * TileBackward::kQueryFaces * face;
    now.lse = tiles.lse + at * kBlock;
    now.delta = tiles.delta + at * kBlock;
    now.grad_keys = grad;
    now.grad_values = grad + chunks * kBlock * kBlock;
    now.grad_queries = grad_q;
    now.scores = scores + taken % 2 * 2 * kBlock * kBlock;
    now.grad_weights = now.scores + kBlock * kBlock;
    if (taken > 0) {
      advance(&now, steps[(taken - 1) % 2]);
    } else {
      const auto none = [](int64_t) {};
      Strewn<decltype(none)> nothing(none, 0, 1);
      score(now, nothing);
    }
    ++taken;
  }

  void advance(const Step* next, const Step& now) {
    if (now.visible.all()) {
      advance_rows<false>(next, now);
    } else {
      advance_rows<true>(next, now);
    }
  }

  template <bool masked>
  VPFAST_INLINE void advance_rows(const Step* next, const Step& now) {
    const auto row = [&](int64_t i) __attribute__((always_inline)) { weigh_rows<masked>(now, i); };
    Strewn<decltype(row)> rows(row, kBlock / 2, 2 * chunks * kPauses<pieces>);
    if (next) score(*next, rows);
    rows.rest();
    apply(now);
  }

  template <class Rows>
  VPFAST_INLINE void score(const Step& step, Rows& rows) {
    const auto product = [&](const uint16_t* a, const uint16_t* b, float* to) __attribute__((always_inline)) {
      zero_tiles();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        multiply_faces<pieces>(a + chunk * pieces * kFace, b + chunk * pieces * kFace, rows);
      }
      store_tiles(to, kBlock);
    };
    product(step.queries + TileBackward::kQueryRows * face, step.keys + TileBackward::kKeyLanes * face, step.scores);
    product(step.queries + TileBackward::kGradRows * face, step.keys + TileBackward::kValueLanes * face,
            step.grad_weights);
  }

  struct Row {
    F32 weights[2], grads[2];  // of scores
  };

  template <bool masked>
  VPFAST_INLINE Row weigh_row(const Step& step, int64_t row) {
    const uint32_t visible = masked ? reinterpret_cast<const uint32_t*>(&step.visible)[row] : ~0u;
    const F32 lse = F32::broadcast(step.lse[row]), delta = F32::broadcast(step.delta[row]);
    Row to;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const F32 score = load(step.scores + row * kBlock + half * 16);
      const F32 grad = load(step.grad_weights + row * kBlock + half * 16);
      to.weights[half] = exp2_where(static_cast<__mmask16>(visible >> half * 16), unit * score - lse);
      to.grads[half] = to.weights[half] * (grad - delta);
    }
    return to;
  }

  // Rows i and i + 16, which make pairs over queries. Not inlined: there would be a copy at every pause.
  template <bool masked>
  __attribute__((noinline)) void weigh_rows(const Step& step, int64_t i) {
    const Row a = weigh_row<masked>(step, i), b = weigh_row<masked>(step, i + 16);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      store_joined(weights + half * kTileElements + i * 32, split<pieces>(a.weights[half]),
                   split<pieces>(b.weights[half]));
    }
    const Split<pieces> a0 = split<pieces>(a.grads[0]), a1 = split<pieces>(a.grads[1]), b0 = split<pieces>(b.grads[0]),
                        b1 = split<pieces>(b.grads[1]);
    store_joined(across + i * 32, a0, b0);
    store_joined(across + kTileElements + i * 32, a1, b1);
    store_joined(down + i * 32, a0, a1);
    store_joined(down + kTileElements + i * 32, b0, b1);
  }

  VPFAST_INLINE void apply(const Step& step) {
    const auto none = [](int64_t) {};
    Strewn<decltype(none)> nothing(none, 0, 1);
    const auto product = [&](float* to, int64_t width, const uint16_t* a, const uint16_t* b)
                             __attribute__((always_inline)) {
                               load_tiles(to, width);
                               multiply_faces<pieces>(a, b, nothing);
                               store_tiles(to, width);
                             };
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t part = chunk * pieces * kFace, grad = chunk * kBlock * kBlock;
      product(step.grad_values + grad, kBlock, step.queries + TileBackward::kGradColumns * face + part, weights);
      product(step.grad_keys + grad, kBlock, step.queries + TileBackward::kQueryColumns * face + part, across);
      product(step.grad_queries + chunk * 32, p.padded_dim, down, step.keys + TileBackward::kKeyPairs * face + part);
    }
  }

  void finish(int64_t plane, int64_t block, const float* grad) {
    const int64_t first = block * kBlock, count = least(kBlock, p.mask.length() - first);
    const int64_t offset = (plane * p.mask.length() + first) * p.dim;
    turn(grad, count, p.scale * tiles.grad_unit, p.grad_k + offset);
    turn(grad + chunks * kBlock * kBlock, count, tiles.grad_unit, p.grad_v + offset);
  }

  // (components, 32 positions) to rows, times `factor`.
  void turn(const float* from, int64_t count, float factor, float* to) const {
    for (int64_t d = 0; d < p.dim; d += 16) {
      for (int64_t i = 0; i < count; i += 16) {
        IntLanes square[16];
        for (int64_t k = 0; k < 16; ++k) square[k] = (IntLanes)load(from + (d + k) * kBlock + i).v;
        transpose(square);
        for (int64_t k = 0; k < least(16, count - i); ++k) {
          store_components(to + (i + k) * p.dim + d, factor * F32{(FloatLanes)square[k]}, p.dim - d);
        }
      }
    }
  }
};

template <int pieces>
void backward_on_tiles(const Backward<float>& p, const TileBackward& tiles, int64_t plane, float* grad_q, int64_t first,
                       int64_t last, float* scratch) {
  BackwardTiles<pieces>(p, tiles, scratch).run(plane, grad_q, first, last);
}

// A block's keys and values to where backward reads them; the squares of the longest of each.
template <int pieces>
void pack_keys(const Source& keys, const Source& values, uint16_t* to, float* longest_key, float* longest_value) {
  const int64_t face = round_up(keys.dim, 32) / 32 * pieces * kFace;
  pack<pieces, Order::rows, true>(keys, 1.0f, to + TileBackward::kKeyLanes * face);
  pack<pieces, Order::pairs, false>(keys, 1.0f, to + TileBackward::kKeyPairs * face);
  pack<pieces, Order::rows, true>(values, 1.0f, to + TileBackward::kValueLanes * face);
  *longest_key = longest_squared(keys);
  *longest_value = longest_squared(values);
}

// A block's queries and the gradients of its outputs, in units of `unit`; the square of the longest query.
template <int pieces>
void pack_queries(const Source& queries, const Source& grads, float unit, uint16_t* to, float* squared) {
  const int64_t face = round_up(queries.dim, 32) / 32 * pieces * kFace;
  pack<pieces, Order::rows, false>(queries, 1.0f, to + TileBackward::kQueryRows * face);
  pack<pieces, Order::pairs, true>(queries, 1.0f, to + TileBackward::kQueryColumns * face);
  pack<pieces, Order::rows, false>(grads, 1 / unit, to + TileBackward::kGradRows * face);
  pack<pieces, Order::pairs, true>(grads, 1 / unit, to + TileBackward::kGradColumns * face);
  *squared = longest_squared(queries);
}

// Of a block's queries, the sums of grad_out times out, and the square of the longest gradient.
inline void measure_grads(const Source& grads, const Source& out, float* delta, float* squared) {
  for (int64_t first = 0; first < kBlock; first += 16) store(delta + first, row_products(grads, out, first));
  *squared = longest_squared(grads);
}
