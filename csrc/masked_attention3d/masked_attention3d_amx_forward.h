// Forward of masked_attention3d on matrix tiles: 32 queries, 32 keys at a time. Included by masked_attention3d_kernel.h
// for AVX-512.
//
// A step is the scores of one block of keys, their weights, and the outputs of the block before: scores of the next
// block and outputs of the previous one are multiplied between the rows of this one's weights.
//
// No running maximum is kept. |q k| <= |q| |k|, and as long as that is at most kMostBits bits for the longest of 32
// queries and the plane's longest key, 2^score is within the range of floats as it is and loses nothing: weights are
// relative. Tiles of queries longer than that go the way of registers.

constexpr float kMostBits = 50;

template <int pieces>
struct ForwardTiles {
  static constexpr bool kScaled = pieces == 3;  // queries by the scale: fewer pieces would not hold the product

  struct Step {
    int64_t block;
    Bits visible;
    const uint16_t *keys, *values;
    float* scores;
    uint16_t* weights;
  };

  const Forward<float>& p;
  const uint16_t* blocks;  // of the plane
  int64_t first, count, chunks, taken = 0;
  float unit;
  float *out, *sum;  // (chunks, 32, 32), (32, 16)
  float* scores;     // (2, 32, 32)
  uint16_t* queries;
  uint16_t* weights;  // (2, a face)
  Step steps[3], next;

  static int64_t scratch(int64_t dim) {
    const int64_t chunks = round_up(dim, 32) / 32;
    return (chunks + 2) * kBlock * kBlock + kBlock * 16 + (chunks + 2) * pieces * kFace / 2;
  }

  VPFAST_INLINE ForwardTiles(const Forward<float>& problem, int64_t plane, int64_t first, int64_t count, float* scratch)
      : p(problem), first(first), count(count) {
    chunks = round_up(p.dim, 32) / 32;
    blocks = p.packed + (plane - p.first_plane) * p.blocks * 2 * chunks * pieces * kFace;
    unit = p.scale * 1.44269504f;
    out = scratch;
    sum = out + chunks * kBlock * kBlock;
    scores = sum + kBlock * 16;
    queries = reinterpret_cast<uint16_t*>(scores + 2 * kBlock * kBlock);
    weights = queries + chunks * pieces * kFace;
    next.block = -1;
  }

  void run(int64_t plane) {
    const Source from = {p.plane(p.q, plane) + first * p.dim, count, p.dim};
    const float longest_key_squared = p.longest_key_squared[plane - p.first_plane];
    if (!(longest_squared(from) * longest_key_squared * (unit * unit) <= kMostBits * kMostBits)) {
      return forward<float>(p, plane, first, count, out);
    }
    pack<pieces, Order::rows, false>(from, kScaled ? unit : 1.0f, queries);
    std::memset(out, 0, sizeof(float) * (chunks * kBlock * kBlock + kBlock * 16));
    const Sight sight = sight_of(p.mask, first, count);
    for_each_line(p.mask, place_of(p.mask, first), place_of(p.mask, first + count - 1),
                  [&](int64_t t, int64_t y, int64_t start) {
                    const Seen seen = look(p.mask, sight, t, y);
                    const Interval any = seen.any();
                    for (int64_t key = (start + any.begin) / kBlock * kBlock; key < start + any.end; key += kBlock) {
                      offer(key / kBlock, bits_of(seen, key - start));
                    }
                  });
    if (next.block >= 0) take();
    if (taken > 0) {
      advance(nullptr, &steps[(taken - 1) % 3], taken > 1 ? &steps[(taken - 2) % 3] : nullptr);
      advance(nullptr, nullptr, &steps[(taken - 1) % 3]);
    }
    finish(plane);
  }

  // Lines that share a block make one step of it.
  VPFAST_INLINE void offer(int64_t block, const Bits& visible) {
    if (block == next.block) return next.visible.add(visible);
    if (next.block >= 0) take();
    next.block = block;
    next.visible = visible;
  }

  VPFAST_INLINE void take() {
    if (next.visible.none()) return;
    Step& now = steps[taken % 3];
    now = next;
    now.keys = blocks + now.block * 2 * chunks * pieces * kFace;
    now.values = now.keys + chunks * pieces * kFace;
    now.scores = scores + taken % 2 * kBlock * kBlock;
    now.weights = weights + taken % 2 * pieces * kFace;
    advance(&now, taken > 0 ? &steps[(taken - 1) % 3] : nullptr, taken > 1 ? &steps[(taken - 2) % 3] : nullptr);
    ++taken;
  }

  void advance(const Step* score, const Step* weigh, const Step* apply) {
    if (weigh && weigh->visible.all()) {
      advance_rows<false>(score, weigh, apply);
    } else {
      advance_rows<true>(score, weigh, apply);
    }
  }

  template <bool masked>
  VPFAST_INLINE void advance_rows(const Step* score, const Step* weigh, const Step* apply) {
    const auto row = [&](int64_t i) VPFAST_INLINE_LAMBDA { weigh_row<masked>(*weigh, i); };
    Strewn<decltype(row)> rows(row, weigh ? kBlock : 0, 2 * chunks * kPauses<pieces>);
    if (apply) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* to = out + chunk * kBlock * kBlock;
        load_tiles(to, kBlock);
        multiply_faces<pieces>(Staying{apply->weights}, Passing{apply->values + chunk * pieces * kFace}, rows);
        store_tiles(to, kBlock);
      }
    }
    if (score) {
      zero_tiles();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        multiply_faces<pieces>(Staying{queries + chunk * pieces * kFace}, Passing{score->keys + chunk * pieces * kFace},
                               rows);
      }
      store_tiles(score->scores, kBlock);
    }
    rows.rest();
  }

  template <bool masked>
  VPFAST_INLINE void weigh_row(const Step& step, int64_t row) {
    const uint32_t visible = masked ? reinterpret_cast<const uint32_t*>(&step.visible)[row] : ~0u;
    F32 a = load(step.scores + row * kBlock), b = load(step.scores + row * kBlock + 16);
    if (!kScaled) {
      a = unit * a;
      b = unit * b;
    }
    a = exp2_where(static_cast<__mmask16>(visible), a);
    b = exp2_where(static_cast<__mmask16>(visible >> 16), b);
    store(sum + row * 16, load(sum + row * 16) + (a + b));
    store_joined(step.weights + row * 32, split<pieces>(a), split<pieces>(b));
  }

  VPFAST_INLINE void finish(int64_t plane) {
    float* to = p.out + (plane * p.mask.length() + first) * p.dim;
    float* lse = p.lse + plane * p.mask.length() + first;
    for (int64_t i = 0; i < count; ++i) {
      const float weight = total(load(sum + i * 16));
      const F32 share = F32::broadcast(weight > 0 ? 1.0f / weight : 0.0f);
      for (int64_t d = 0; d < p.dim; d += 16) {
        const F32 x = load(out + (d / 32 * kBlock + i) * kBlock + d % 32);
        store_components(to + i * p.dim + d, x * share, p.dim - d);
      }
      lse[i] = std::log2(weight) * 0.69314718f;
    }
  }
};

template <int pieces>
void forward_on_tiles(const Forward<float>& p, int64_t plane, int64_t first, int64_t count, float* scratch) {
  ForwardTiles<pieces>(p, plane, first, count, scratch).run(plane);
}

// Keys and values of a block to where forward reads them; the squares of the longest of each.
template <int pieces>
void pack_for_forward(const Source& keys, const Source& values, uint16_t* to, float* longest_key,
                      float* longest_value) {
  pack<pieces, Order::rows, true>(keys, 1.0f, to);
  pack<pieces, Order::pairs, false>(values, 1.0f, to + round_up(keys.dim, 32) / 32 * pieces * kFace);
  *longest_key = longest_squared(keys);
  *longest_value = longest_squared(values);
}
