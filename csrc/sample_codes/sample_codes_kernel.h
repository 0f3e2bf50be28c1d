// One frame of codes for one instruction set. Included by sample_codes_cpu.cpp through for_each_isa.h.

namespace sample_codes {

using namespace vpfast::sample_codes;
using vpfast::masked_attention3d::for_each_line;
using vpfast::masked_attention3d::Interval;
using vpfast::masked_attention3d::Place;

// --- affine maps of one vector ---

// A member's share of `columns`: whole blocks of 16, so that no two write to one cache line.
VPFAST_INLINE Interval share_of(int64_t columns, const Member& member) {
  const int64_t blocks = (columns + 15) / 16, each = (blocks + member.size - 1) / member.size;
  const int64_t begin = member.rank * each * 16, end = begin + each * 16;
  return {begin < columns ? begin : columns, end < columns ? end : columns};
}

// C registers of columns: y = base + x matrix.
template <int C, class W>
VPFAST_INLINE void columns_of(W* y, const W* base, const W* x, const W* matrix, int64_t in, int64_t out) {
  using V = typename Lanes<W>::type;
  V sum[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) sum[c] = load(base + c * V::lanes);
  for (int64_t i = 0; i < in; ++i) {
    const V factor = V::broadcast(x[i]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[c] = sum[c] + factor * load(matrix + i * out + c * V::lanes);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) store(y + c * V::lanes, sum[c]);
}

// Columns [begin, end) of y = base + x matrix; y may be base.
template <class W>
void apply(W* y, const W* base, const W* x, const Affine<W>& map, int64_t begin, int64_t end) {
  using V = typename Lanes<W>::type;
  int64_t c = begin;
  for (; c + 8 * V::lanes <= end; c += 8 * V::lanes) {
    columns_of<8>(y + c, base + c, x, map.matrix + c, map.in, map.out);
  }
  for (; c + 2 * V::lanes <= end; c += 2 * V::lanes) {
    columns_of<2>(y + c, base + c, x, map.matrix + c, map.in, map.out);
  }
  for (; c + V::lanes <= end; c += V::lanes) columns_of<1>(y + c, base + c, x, map.matrix + c, map.in, map.out);
  for (; c < end; ++c) {
    W sum = base[c];
    for (int64_t i = 0; i < map.in; ++i) sum += x[i] * map.matrix[i * map.out + c];
    y[c] = sum;
  }
}

// --- functions of single numbers ---

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
void gelu(W* x, int64_t begin, int64_t end) {
  using V = typename Lanes<W>::type;
  for (int64_t i = begin; i < end; i += V::lanes) {
    const int64_t count = end - i < V::lanes ? end - i : V::lanes;
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

template <class W>
void normalise(W* y, const W* x, const Norm<W>& norm, int64_t count) {
  W mean = 0, variance = 0;
  for (int64_t i = 0; i < count; ++i) mean += x[i];
  mean /= static_cast<W>(count);
  for (int64_t i = 0; i < count; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const W scale = W(1) / std::sqrt(variance / static_cast<W>(count) + W(1e-5));
  for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

// --- attention of one head ---

template <class W>
struct Head {
  using V = typename Lanes<W>::type;
  const W *query, *keys, *values;
  int64_t dim;
  W *out, *weights;
  W high, sum;

  void attend(const Mask& mask, const Place& place) {
    high = -W(__builtin_huge_val());
    sum = 0;
    for (int64_t d = 0; d < dim; ++d) out[d] = 0;
    for_each_line(mask, place, place, [&](int64_t t, int64_t y, int64_t start) {
      const Interval seen = visible(mask, place, t, y);
      const int64_t end = start + seen.end;
      for (int64_t key = start + seen.begin; key < end;) {
        const int64_t stop = key / kKeyBlock * kKeyBlock + kChunk;
        take(key, stop < end ? stop : end);
        key = stop;
      }
    });
    for (int64_t d = 0; d < dim; ++d) out[d] = sum > 0 ? out[d] / sum : W(0);
  }

  // Keys [begin, end), of which blocks are scored whole.
  VPFAST_INLINE void take(int64_t begin, int64_t end) {
    const int64_t first = begin / kKeyBlock * kKeyBlock, count = end - first;
    score(first, (count + kKeyBlock - 1) / kKeyBlock);
    const W nothing = -W(__builtin_huge_val());
    for (int64_t i = 0; i < begin - first; ++i) weights[i] = nothing;
    const int64_t padded = (count + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    for (int64_t i = count; i < padded; ++i) weights[i] = nothing;
    weigh(padded);
    add(first, begin - first, count);
  }

  VPFAST_INLINE void score(int64_t first, int64_t blocks) {
    constexpr int64_t parts = kKeyBlock / V::lanes;
    for (int64_t b = 0; b < blocks; ++b) {
      const W* block = keys + (first / kKeyBlock + b) * dim * kKeyBlock;
      V even[parts], odd[parts];
#pragma GCC unroll 16
      for (int64_t k = 0; k < parts; ++k) even[k] = odd[k] = V::broadcast(0);
      int64_t d = 0;
      for (; d + 2 <= dim; d += 2) {
        const V a = V::broadcast(query[d]), c = V::broadcast(query[d + 1]);
#pragma GCC unroll 16
        for (int64_t k = 0; k < parts; ++k) {
          even[k] = even[k] + a * load(block + d * kKeyBlock + k * V::lanes);
          odd[k] = odd[k] + c * load(block + (d + 1) * kKeyBlock + k * V::lanes);
        }
      }
      if (d < dim) {
        const V a = V::broadcast(query[d]);
#pragma GCC unroll 16
        for (int64_t k = 0; k < parts; ++k) even[k] = even[k] + a * load(block + d * kKeyBlock + k * V::lanes);
      }
#pragma GCC unroll 16
      for (int64_t k = 0; k < parts; ++k) store(weights + b * kKeyBlock + k * V::lanes, even[k] + odd[k]);
    }
  }

  // Scores to weights, against the highest so far.
  VPFAST_INLINE void weigh(int64_t count) {
    V top = V::broadcast(high);
    for (int64_t i = 0; i < count; i += V::lanes) top = maximum(top, load(weights + i));
    W highest = high;
    W lane[V::lanes];
    store(lane, top);
    for (int k = 0; k < V::lanes; ++k) highest = lane[k] > highest ? lane[k] : highest;
    const V base = V::broadcast(highest);
    store_part(lane, exp2(V::broadcast(high) - base), 1);
    const W shrink = lane[0];
    V total_weight = V::broadcast(0);
    for (int64_t i = 0; i < count; i += V::lanes) {
      const V weight = exp2(load(weights + i) - base);
      total_weight = total_weight + weight;
      store(weights + i, weight);
    }
    sum = sum * shrink + total(total_weight);
    high = highest;
    if (shrink != 1) {
      for (int64_t d = 0; d < dim; ++d) out[d] *= shrink;
    }
  }

  VPFAST_INLINE void add(int64_t first, int64_t begin, int64_t end) {
    for (int64_t d = 0; d < dim; d += V::lanes) {
      const int64_t part = dim - d < V::lanes ? dim - d : V::lanes;
      const W* from = values + first * dim + d;
      if (part == V::lanes) {
        V a = load(out + d), b = V::broadcast(0), c = b, e = b;
        int64_t i = begin;
        for (; i + 4 <= end; i += 4) {
          a = a + V::broadcast(weights[i]) * load(from + i * dim);
          b = b + V::broadcast(weights[i + 1]) * load(from + (i + 1) * dim);
          c = c + V::broadcast(weights[i + 2]) * load(from + (i + 2) * dim);
          e = e + V::broadcast(weights[i + 3]) * load(from + (i + 3) * dim);
        }
        for (; i < end; ++i) a = a + V::broadcast(weights[i]) * load(from + i * dim);
        store(out + d, (a + b) + (c + e));
      } else {
        V a = load_part(out + d, part);
        for (int64_t i = begin; i < end; ++i) a = a + V::broadcast(weights[i]) * load_part(from + i * dim, part);
        store_part(out + d, a, part);
      }
    }
  }
};

// --- the choice of a code ---

// Numbered as in vpfast/models/shrvqvae/random.py; -1 where a logit is not finite.
template <class W>
int64_t choose(const Problem<W>& p, const W* logits, double* scores, int64_t clip, int64_t cell, int64_t depth) {
  const int64_t count = p.network.codebook_size;
  int64_t best = 0;
  for (int64_t m = 0; m < count; ++m) {
    if (!(logits[m] - logits[m] == 0)) return -1;
    if (logits[m] > logits[best]) best = m;
  }
  if (p.temperature == 0) return best;
  double least = -__builtin_huge_val();
  if (p.top_k < count) {
    for (int64_t m = 0; m < count; ++m) {
      int64_t above = 0;
      for (int64_t other = 0; other < count; ++other) above += logits[other] > logits[m];
      // The k-th largest is the smallest of those with fewer than k above them.
      if (above < p.top_k && (least == -__builtin_huge_val() || logits[m] < least)) least = logits[m];
    }
  }
  for (int64_t m = 0; m < count; ++m) {
    const Words counter = {{static_cast<uint32_t>(p.time), static_cast<uint32_t>(cell), static_cast<uint32_t>(depth),
                            static_cast<uint32_t>(m / 4)}};
    const Words words =
        philox(counter, static_cast<uint32_t>(p.keys[2 * clip]), static_cast<uint32_t>(p.keys[2 * clip + 1]));
    const double noise = -std::log(-std::log(uniform(words.word[m % 4])));
    scores[m] = logits[m] < least
                    ? -__builtin_huge_val()
                    : noise + (static_cast<double>(logits[m]) - static_cast<double>(logits[best])) / p.temperature;
  }
  best = 0;
  for (int64_t m = 1; m < count; ++m) {
    if (scores[m] > scores[best]) best = m;
  }
  return best;
}

// --- the network at one position after another ---

template <class W>
struct Frame {
  const Problem<W>& p;
  const Network<W>& net;
  const Member& member;
  int64_t clip;
  W *x, *y, *z;                                 // shared: the features, and what layers hand on
  W *own, *gathered, *local, *heads, *weights;  // this member's
  double* scores;

  VPFAST_INLINE Frame(const Problem<W>& problem, int64_t clip, const Member& member, W* shared, W* scratch,
                      double* doubles)
      : p(problem), net(problem.network), member(member), clip(clip) {
    x = shared;
    y = x + net.channels;
    z = y + net.hidden;
    own = scratch;
    gathered = own + net.channels;
    local = gathered + net.hidden * kMaxTaps;
    heads = local + 4 * net.hidden;
    weights = heads + net.hidden;
    scores = doubles;
  }

  void meet() { wait(*member.barrier, member.size); }

  // False where a logit is not finite: nothing more is sampled then.
  bool run() {
    for (int64_t cell = 0; cell < p.cells; ++cell) {
      const Place place = place_of(net.masks[0], p.time * p.cells + cell);
      enter(cell);
      for (int64_t b = 0; b < net.block_count; ++b) {
        gated(net.blocks[b], cell);
        if (net.blocks[b].attention) attend(*net.blocks[b].attention, place);
      }
      if (!leave(cell)) return false;
    }
    return true;
  }

  // What stem and past frames say about the position.
  VPFAST_INLINE void enter(int64_t cell) {
    meet();  // the codes of the position before are known to all
    const Conv<W>& conv = net.stem;
    gather(conv, cell, nullptr);
    const Interval mine = share_of(net.channels, member);
    apply(x, conv.frame + (clip * p.cells + cell) * net.channels, gathered, conv.taps, mine.begin, mine.end);
    meet();
  }

  // The inputs at the present taps, one after another; the last one is `own` where it is given.
  VPFAST_INLINE void gather(const Conv<W>& conv, int64_t cell, const W* own_input) {
    const W* inputs = conv.inputs + clip * conv.total * conv.channels;
    const int64_t known = own_input ? conv.count - 1 : conv.count;
    for (int64_t tap = 0; tap < known; ++tap) {
      const W* from = inputs + (conv.cells[cell * conv.count + tap] + conv.shift) * conv.channels;
      std::memcpy(gathered + tap * conv.channels, from, sizeof(W) * conv.channels);
    }
    if (own_input) std::memcpy(gathered + known * conv.channels, own_input, sizeof(W) * conv.channels);
  }

  VPFAST_INLINE void keep(const Conv<W>& conv, int64_t cell, const W* input) {
    if (member.rank != 0) return;
    W* to = conv.inputs + (clip * conv.total + conv.own[cell] + conv.shift) * conv.channels;
    std::memcpy(to, input, sizeof(W) * conv.channels);
  }

  VPFAST_INLINE void gated(const Block<W>& block, int64_t cell) {
    const int64_t channels = net.channels;
    normalise(own, x, block.norm, channels);
    keep(block.conv, cell, own);
    gather(block.conv, cell, own);
    const W* base = block.conv.frame + (clip * p.cells + cell) * 2 * channels;
    const Interval mine = share_of(channels, member);
    apply(local, base, gathered, block.conv.taps, mine.begin, mine.end);
    apply(local, base, gathered, block.conv.taps, channels + mine.begin, channels + mine.end);
    gate(y + mine.begin, local + mine.begin, local + channels + mine.begin, mine.end - mine.begin);
    meet();
    add(y, block.out, mine);
  }

  // x += bias + from matrix, a member its columns.
  VPFAST_INLINE void add(const W* from, const Affine<W>& map, Interval mine) {
    for (int64_t c = mine.begin; c < mine.end; ++c) local[c] = x[c] + map.bias[c];
    apply(x, local, from, map, mine.begin, mine.end);
    meet();
  }

  VPFAST_INLINE void attend(const Attention<W>& attention, const Place& place) {
    const int64_t dim = net.head_dim, inner = net.heads * dim;
    normalise(own, x, attention.norm1, net.channels);
    for (int64_t head = member.rank; head < net.heads; head += member.size) {
      for (int64_t part = 0; part < 3; ++part) {
        const int64_t first = part * inner + head * dim;
        apply(local, attention.qkv.bias, own, attention.qkv, first, first + dim);
      }
      const int64_t plane = clip * net.heads + head, blocks = (p.length + kKeyBlock - 1) / kKeyBlock;
      W* keys = attention.keys + plane * blocks * dim * kKeyBlock;
      W* values = attention.values + plane * p.length * dim;
      W* key = keys + place.index / kKeyBlock * dim * kKeyBlock + place.index % kKeyBlock;
      const W unit = W(1.4426950408889634) / std::sqrt(static_cast<W>(dim));
      for (int64_t d = 0; d < dim; ++d) {
        key[d * kKeyBlock] = local[inner + head * dim + d];
        values[place.index * dim + d] = local[2 * inner + head * dim + d];
        heads[d] = local[head * dim + d] * unit;
      }
      Head<W> one{heads, keys, values, dim, y + head * dim, weights, 0, 0};
      one.attend(net.masks[head % net.mask_count], place);
    }
    meet();
    const Interval mine = share_of(net.channels, member), wide = share_of(attention.widen.out, member);
    add(y, attention.output, mine);
    normalise(own, x, attention.norm2, net.channels);
    apply(y, attention.widen.bias, own, attention.widen, wide.begin, wide.end);
    gelu(y, wide.begin, wide.end);
    meet();
    add(y, attention.narrow, mine);
  }

  // The codes of all layers of this pass, each seeing those before it.
  VPFAST_INLINE bool leave(int64_t cell) {
    const int64_t channels = net.channels, count = net.codebook_size;
    int64_t* codes = p.codes + (clip * p.length + p.time * p.cells + cell) * net.depths;
    normalise(own, x, net.norm, channels);
    int64_t chosen[kMaxDepths];
    for (int64_t depth = 0; depth < net.depths; ++depth) {
      if (depth < net.first_depth) chosen[depth] = codes[depth];
    }
    const Interval wide = share_of(net.mlp1.out, member), mine = share_of(channels, member);
    for (int64_t depth = 0; depth < net.last_depth; ++depth) {
      if (depth >= net.first_depth) {
        apply(y, net.mlp1.bias, own, net.mlp1, wide.begin, wide.end);
        gelu(y, wide.begin, wide.end);
        meet();
        apply(z, net.mlp2.bias, y, net.mlp2, mine.begin, mine.end);
        meet();
        apply(local, net.logits[depth].bias, z, net.logits[depth], 0, count);
        chosen[depth] = choose(p, local, scores, clip, cell, depth);
        if (chosen[depth] < 0) return false;
      }
      if (net.parents[depth]) {
        for (int64_t c = 0; c < channels; ++c) own[c] += net.parents[depth][chosen[depth] * channels + c];
      }
    }
    meet();  // all have read the codes of the layers before
    if (member.rank == 0) {
      for (int64_t depth = net.first_depth; depth < net.last_depth; ++depth) codes[depth] = chosen[depth];
    }
    show(cell, chosen);
    return true;
  }

  // What later positions see of these codes.
  VPFAST_INLINE void show(int64_t cell, const int64_t* chosen) {
    if (member.rank != 0) return;
    const int64_t channels = net.channels;
    for (int64_t c = 0; c < channels; ++c) local[c] = 0;
    for (int64_t depth = 0; depth < net.depths; ++depth) {
      if (!net.embeddings[depth]) continue;
      for (int64_t c = 0; c < channels; ++c) local[c] += net.embeddings[depth][chosen[depth] * channels + c];
    }
    gelu(local, 0, channels);
    apply(own, net.mix.bias, local, net.mix, 0, channels);
    keep(net.stem, cell, own);
  }
};

// The frame of one clip, by one member of its team.
template <class W>
bool sample_frame(const Problem<W>& p, int64_t clip, const Member& member, W* shared, W* scratch, double* scores) {
  return Frame<W>(p, clip, member, shared, scratch, scores).run();
}

}  // namespace sample_codes
