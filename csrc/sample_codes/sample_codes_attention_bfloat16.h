// Attention of one head by dot products of bfloat16, which take two terms at once. Part of sample_codes_kernel.h.
//
// Half as much to read as in float32, and half as many multiply-adds: queries, keys, values and weights are rounded to
// bfloat16, sums are not. A score's terms are components, so keys lie in pairs of them: a block is (dim / 2, keys, 2).
// An answer's are keys, so a line of 32 keys is a register of each component of the values: a block is (dim, keys).
//
// Weights are rounded before they leave the registers, so bases are looked at for two lines at a time. A base is a
// whole number: what was rounded below another one is moved without being rounded again.

// 2^x for x up to kSlack or so, 2^-126 for x below -126. Relative error 1.0e-4: a fortieth of what rounding costs.
VPFAST_INLINE F32 rough_weight_of(F32 x) {
  constexpr float k1 = 0.69328292f, k2 = 0.24221099f, k3 = 0.05500896f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its bits shifted by 23 are 0
  const FloatLanes held = maximum(F32::broadcast(-126.0f), x).v;
  const FloatLanes shifted = held + kRound;
  const FloatLanes f = held - (shifted - kRound);
  const FloatLanes y = ((k3 * f + k2) * f + k1) * f + 1.0f;
  return {(FloatLanes)((IntLanes)y + ((IntLanes)shifted << 23))};
}

template <>
struct Head<BFloat16> : Walk<Head<BFloat16>, BFloat16> {
  static constexpr int64_t kBlock = kKeyBlock<BFloat16>;
  static constexpr int64_t kRow = kChunk<BFloat16>;
  static constexpr int kLines = 2;       // whose scores, of four queries, fill half of the registers
  static constexpr int kComponents = 4;  // whose sums do

  // These keys of one chunk for G queries.
  template <int G>
  void take(int64_t q, Interval seen) {
    const int64_t first = seen.begin / kBlock, end = (seen.end + kBlock - 1) / kBlock;
    __mmask32 visible[kRow / kBlock];
    for (int64_t line = first; line < end; ++line) {
      visible[line - first] =
          lanes_between(most(seen.begin - line * kBlock, 0), least(seen.end - line * kBlock, kBlock));
    }
    int64_t line = first;
    for (; line + kLines <= end; line += kLines) weigh<G, kLines>(q, line, line - first, visible);
    for (; line < end; ++line) weigh<G, 1>(q, line, line - first, visible);
    int64_t d = 0;
    for (; d + kComponents <= dim; d += kComponents) add<G, kComponents>(q, d, first, end, visible);
    for (; d < dim; ++d) add<G, 1>(q, d, first, end, visible);
  }

  static VPFAST_INLINE __mmask32 lanes_between(int64_t begin, int64_t end) {
    return static_cast<__mmask32>((uint64_t{1} << end) - (uint64_t{1} << begin));
  }

  VPFAST_INLINE BFloat16* weights_at(int64_t g, int64_t nth) { return weights + g * kRow + nth * kBlock; }

  // Weights of L lines of keys from `line` on, which is the `nth` of those that the chunk shows.
  template <int G, int L>
  VPFAST_INLINE void weigh(int64_t q, int64_t line, int64_t nth, const __mmask32* visible) {
    F32 made[G][2 * L];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int n = 0; n < 2 * L; ++n) made[g][n] = F32::broadcast(-base[q + g]);
    }
    const BFloat16* from = keys + line * kBlock * dim;
    for (int64_t d = 0; d < dim; d += 2) {
      F32 pair[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) pair[g] = broadcast_pair(queries[q + g] + d);
#pragma GCC unroll 4
      for (int n = 0; n < 2 * L; ++n) {
        const F32 key = load_pairs(from + n / 2 * kBlock * dim + d * kBlock + n % 2 * 32);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) made[g][n] = add_products(pair[g], key, made[g][n]);
      }
    }
    bool whole = true;
#pragma GCC unroll 2
    for (int l = 0; l < L; ++l) whole = whole && visible[nth + l] == ~__mmask32{0};
    if (!whole) {
      for (int g = 0; g < G; ++g) {
        for (int n = 0; n < 2 * L; ++n) {
          const auto lanes = static_cast<__mmask16>(visible[nth + n / 2] >> n % 2 * 16);
          made[g][n] = {(FloatLanes)_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), lanes, (__m512)made[g][n].v)};
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      F32 top = made[g][0];
#pragma GCC unroll 4
      for (int n = 1; n < 2 * L; ++n) top = maximum(top, made[g][n]);
      if (__builtin_expect(fresh[q + g] || any_above(top, kSlack), 0)) {
        const F32 by = F32::broadcast(rebase(q + g, highest_of(top), weights_at(g, 0), nth * kBlock));
#pragma GCC unroll 4
        for (int n = 0; n < 2 * L; ++n) made[g][n] = made[g][n] - by;
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      F32 sum = load(sum_of(q + g, dim));
#pragma GCC unroll 2
      for (int l = 0; l < L; ++l) {
        ask();
        F32 line_of = packed(rough_weight_of(made[g][2 * l]), rough_weight_of(made[g][2 * l + 1]));
        if (!whole) line_of = shown(visible[nth + l], line_of);
        sum = add_products(line_of, ones(), sum);
        store_pairs(weights_at(g, nth + l), line_of);
      }
      store(sum_of(q + g, dim), sum);
    }
  }

  // The query's base becomes higher, in its sums and in `count` weights. By how much.
  __attribute__((noinline)) float rebase(int64_t q, float highest, BFloat16* row, int64_t count) {
    const float by = std::ceil(highest);
    base[q] += by;
    if (!fresh[q]) {
      float shrink[kLanes];
      store(shrink, exp2(F32::broadcast(-by)));
      for (int64_t i = 0; i < (dim + 1) * kLanes; ++i) sum_of(q, 0)[i] *= shrink[0];
      for (int64_t i = 0; i < count; ++i) row[i] = static_cast<BFloat16>(static_cast<float>(row[i]) * shrink[0]);
    }
    fresh[q] = false;
    return by;
  }

  // N components of values from `d` on, of lines first .. end - 1, weighted. Beside what is visible may lie anything.
  template <int G, int N>
  VPFAST_INLINE void add(int64_t q, int64_t d, int64_t first, int64_t end, const __mmask32* visible) {
    F32 sum[G][N];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[g][n] = load(sum_of(q + g, d + n));
    }
    for (int64_t line = first; line < end; ++line) {
      F32 weight[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) weight[g] = load_pairs(weights_at(g, line - first));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const F32 value = shown(visible[line - first], load_pairs(values + (line * dim + d + n) * kBlock));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g][n] = add_products(weight[g], value, sum[g][n]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(sum_of(q + g, d + n), sum[g][n]);
    }
  }
};
