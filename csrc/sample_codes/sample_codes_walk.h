// The walk of several queries through the keys of one head. Part of sample_codes_kernel.h.
//
// Keys and values of a long clip are far more than a core's caches hold, so what counts is how often they are read:
// once for all queries of a run. Both lie in blocks, component by component, so that scores, weights and sums are in
// the lanes of registers, and come in chunks, cut at multiples of kChunk in the clip.
//
// Weights are 2^(score - base). A query's base is the highest score of the first keys that it sees; it moves only where
// a later one is 2^kSlack times heavier, so that as a rule nobody looks for a maximum across lanes. What a query sees
// of a chunk decides the order of its sums, and not who looks beside it.

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

// What heads of all types do: the walk through the keys. A Kind takes chunks: take<G>(q, keys of one chunk).
template <class Kind, class W>
struct Walk {
  using X = Worked<W>;
  using V = typename Lanes<W>::type;
  static constexpr int64_t kLine = 64 / sizeof(W);
  static constexpr int64_t kTaken = kChunk<W>;
  static constexpr int64_t kAskFrom = 12;  // queries; fewer have too little work to hide behind

  const W *keys, *values;
  int64_t dim;
  Rows<const W> queries;
  Rows<X> out;
  W* weights;     // kQueriesTogether rows of kChunk
  X* sums;        // of every query, dim registers of values and one of weights
  int64_t lines;  // of keys, and of values, to ask for beside a block's weights
  int64_t ahead;  // where those are; -1: nowhere
  X base[kRun];
  bool fresh[kRun];

  void attend(const Mask& mask, const Place* places, int64_t count) {
    lines = (dim * kKeyBlock<W> / kLine + count - 1) / count;
    std::memset(sums, 0, sizeof(X) * count * (dim + 1) * V::lanes);
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
      for (int64_t first = all.begin / kTaken * kTaken; first < all.end; first += kTaken) {
        const bool last = first + kTaken >= all.end;
        ahead = last || count < kAskFrom ? -1 : (first + kTaken) * dim;
        look_at(first, seen, count);
      }
    });
    for (int64_t q = 0; q < count; ++q) {
      const X weight = total(load(sum_of(q, dim)));
      for (int64_t d = 0; d < dim; ++d) out[q][d] = weight == 0 ? X(0) : total(load(sum_of(q, d))) / weight;
    }
  }

  VPFAST_INLINE X* sum_of(int64_t q, int64_t d) { return sums + (q * (dim + 1) + d) * V::lanes; }

  // The chunk that begins at key `first`, for every query what it sees of it.
  VPFAST_INLINE void look_at(int64_t first, const Interval* seen, int64_t count) {
    const auto part = [&](int64_t q) {
      return Interval{most(seen[q].begin, first), least(seen[q].end, first + kTaken)};
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
          kind().template take<kQueriesTogether>(q, of_q);
        } else if (together == 2) {
          kind().template take<2>(q, of_q);
        } else {
          kind().template take<1>(q, of_q);
        }
      }
      q += together;
    }
  }

  // For a little of the next chunk, which the processor would not ask for before its first key is read.
  VPFAST_INLINE void ask() {
    if (ahead < 0) return;
    for (int64_t i = 0; i < lines; ++i, ahead += kLine) {
      __builtin_prefetch(keys + ahead);
      __builtin_prefetch(values + ahead);
    }
  }

 private:
  VPFAST_INLINE Kind& kind() { return static_cast<Kind&>(*this); }
};
