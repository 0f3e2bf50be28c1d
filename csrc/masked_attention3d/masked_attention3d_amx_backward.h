// Backward of masked_attention3d on matrix tiles: 32 keys in the lanes, 32 queries at a time. Included by
// masked_attention3d_kernel.h for AVX-512.
//
// A step is a block of keys and a block of queries. Its scores, and the gradients of its weights, are products over
// components; the weights, from the saved log-sum-exp, and the gradients of scores follow in registers; then come three
// products over positions: gradients of values and keys, turned (components by keys), and of queries. Rows of work in
// registers are strewn between products that do not wait for them:
//
//   tiles                                                        registers
//   gradients of weights; gradients of keys, queries, a step ago weights
//   gradients of values; scores of the next step                 gradients of scores
//
// What a step writes must find its place in the L1 cache: a line that is driven out and comes back costs ten cycles.
// Scores, weights and their gradients are 26 KB and gradients of keys and values 8; so the 42 KB of faces pass by.
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
  };

  const Backward<float>& p;
  const TileBackward& tiles;
  int64_t chunks, face, taken = 0;
  float unit;
  float *scores, *grad_weights, *grads;  // (32, 32), scores then weights; (32, 32); (blocks, 2, chunks, 32, 32)
  uint16_t *weights, *across, *down;     // a face each: weights and gradients of scores by pairs, the latter by rows
  Step steps[3];

  static int64_t scratch(int64_t dim, int64_t blocks) {
    return 2 * kBlock * kBlock + 3 * pieces * kFace / 2 + blocks * 2 * round_up(dim, 32) * kBlock;
  }

  VPFAST_INLINE BackwardTiles(const Backward<float>& problem, const TileBackward& tiles, float* scratch)
      : p(problem), tiles(tiles) {
    chunks = round_up(p.dim, 32) / 32;
    face = chunks * pieces * kFace;
    unit = p.scale * 1.44269504f;
    scores = scratch;
    grad_weights = scores + kBlock * kBlock;
    weights = reinterpret_cast<uint16_t*>(grad_weights + kBlock * kBlock);
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
    if (taken > 0) {
      advance(nullptr);
      NoRows none;
      finish_scores(before(1), none);
    }
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

  VPFAST_INLINE const Step& before(int64_t steps_ago) const { return steps[(taken - steps_ago) % 3]; }

  VPFAST_INLINE void take(const Bits& visible, int64_t plane, int64_t block, int64_t query_block, float* grad,
                          float* grad_q) {
    Step& now = steps[taken % 3];
    const int64_t start = (plane - tiles.first_plane) * tiles.blocks,
                  row = (plane * tiles.blocks + query_block) * kBlock;
    now.visible = visible;
    now.keys = tiles.keys + (start + block) * TileBackward::kKeyFaces * face;
    now.queries = tiles.queries + (start + query_block) * TileBackward::kQueryFaces * face;
    now.lse = tiles.lse + row;
    now.delta = tiles.delta + row;
    now.grad_keys = grad;
    now.grad_values = grad + chunks * kBlock * kBlock;
    now.grad_queries = grad_q;
    if (taken > 0) {
      advance(&now);
    } else {
      NoRows none;
      score(now, none);
      store_tiles(scores, kBlock);
    }
    ++taken;
  }

  // The step last taken, whose scores are there, as far as the gradients of its scores.
  void advance(const Step* next) {
    if (before(1).visible.all()) {
      advance_rows<false>(next);
    } else {
      advance_rows<true>(next);
    }
  }

  template <bool masked>
  VPFAST_INLINE void advance_rows(const Step* next) {
    const Step& now = before(1);
    const auto weigh = [&](int64_t i) VPFAST_INLINE_LAMBDA { weigh_rows<masked>(now, i); };
    Strewn<decltype(weigh)> weighed(weigh, kBlock / 2, 3 * chunks * kPauses<pieces>);
    zero_tiles();
    multiply_components(now.queries + TileBackward::kGradRows * face, now.keys + TileBackward::kValueLanes * face,
                        weighed);
    store_tiles(grad_weights, kBlock);
    if (taken > 1) finish_scores(before(2), weighed);
    weighed.rest();

    const auto differentiate = [&](int64_t i) VPFAST_INLINE_LAMBDA { differentiate_rows(now, i); };
    Strewn<decltype(differentiate)> differentiated(differentiate, kBlock / 2, 2 * chunks * kPauses<pieces>);
    finish_weights(now, differentiated);
    if (next) score(*next, differentiated);
    differentiated.rest();
    if (next) store_tiles(scores, kBlock);  // not before the weights in its place have been read
  }

  template <class Rows>
  VPFAST_INLINE void score(const Step& step, Rows& rows) {
    zero_tiles();
    multiply_components(step.queries + TileBackward::kQueryRows * face, step.keys + TileBackward::kKeyLanes * face,
                        rows);
  }

  template <class Rows>
  VPFAST_INLINE void multiply_components(const uint16_t* a, const uint16_t* b, Rows& rows) {
    for (int64_t part = 0; part < face; part += pieces * kFace) {
      multiply_faces<pieces>(Passing{a + part}, Passing{b + part}, rows);
    }
  }

  // Weights take the place of their scores.
  template <bool masked>
  VPFAST_INLINE void weigh_row(const Step& step, int64_t row, F32 (&to)[2]) {
    const uint32_t visible = masked ? reinterpret_cast<const uint32_t*>(&step.visible)[row] : ~0u;
    const F32 lse = F32::broadcast(step.lse[row]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* at = scores + row * kBlock + half * 16;
      to[half] = exp2_where(static_cast<__mmask16>(visible >> half * 16), unit * load(at) - lse);
      store(at, to[half]);
    }
  }

  // Rows i and i + 16, which make pairs over queries. Not inlined: there would be a copy at every pause.
  template <bool masked>
  __attribute__((noinline)) void weigh_rows(const Step& step, int64_t i) {
    F32 a[2], b[2];
    weigh_row<masked>(step, i, a);
    weigh_row<masked>(step, i + 16, b);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      store_joined(weights + half * kTileElements + i * 32, split<pieces>(a[half]), split<pieces>(b[half]));
    }
  }

  VPFAST_INLINE Split<pieces> grad_of_scores(const Step& step, int64_t row, int64_t half) {
    const int64_t at = row * kBlock + half * 16;
    return split<pieces>(load(scores + at) * (load(grad_weights + at) - F32::broadcast(step.delta[row])));
  }

  __attribute__((noinline)) void differentiate_rows(const Step& step, int64_t i) {
    const Split<pieces> a0 = grad_of_scores(step, i, 0), a1 = grad_of_scores(step, i, 1);
    const Split<pieces> b0 = grad_of_scores(step, i + 16, 0), b1 = grad_of_scores(step, i + 16, 1);
    store_joined(across + i * 32, a0, b0);
    store_joined(across + kTileElements + i * 32, a1, b1);
    store_joined(down + i * 32, a0, a1);
    store_joined(down + kTileElements + i * 32, b0, b1);
  }

  // Adds the product of two faces to 32 x 32 floats, rows `width` apart.
  template <bool a_passes, bool b_passes, class Rows>
  VPFAST_INLINE void add_product(float* to, int64_t width, Face<a_passes> a, Face<b_passes> b, Rows& rows) {
    load_tiles(to, width);
    multiply_faces<pieces>(a, b, rows);
    store_tiles(to, width);
  }

  // What follows from the weights.
  template <class Rows>
  VPFAST_INLINE void finish_weights(const Step& step, Rows& rows) {
    const uint16_t* grads_out = step.queries + TileBackward::kGradColumns * face;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      add_product(step.grad_values + chunk * kBlock * kBlock, kBlock, Passing{grads_out + chunk * pieces * kFace},
                  Staying{weights}, rows);
    }
  }

  // What follows from the gradients of scores.
  template <class Rows>
  VPFAST_INLINE void finish_scores(const Step& step, Rows& rows) {
    const uint16_t* queries = step.queries + TileBackward::kQueryColumns * face;
    const uint16_t* keys = step.keys + TileBackward::kKeyPairs * face;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t part = chunk * pieces * kFace;
      add_product(step.grad_keys + chunk * kBlock * kBlock, kBlock, Passing{queries + part}, Staying{across}, rows);
      add_product(step.grad_queries + chunk * 32, p.padded_dim, Staying{down}, Passing{keys + part}, rows);
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
