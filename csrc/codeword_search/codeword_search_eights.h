// Small codebooks of a tree, eight codewords in a register, the way of AVX-512: the codebook below a vector's own
// parent is read from memory whole, two components of eight codewords at a time, against the same two components of the
// vector, repeated. Included by codeword_search_kernel.h.
//
// So each vector has a register of scores, two sums of every other component for each of eight codewords. What follows
// turns sixteen such registers around step by step, four vectors first, and ranks codewords against each other
// wherever two that compete stand in the same lane, so that half is left to turn.
//
// Beside the arithmetic the cache lines that are wanted next are fetched, a few at a time: in the first layer the next
// group's vectors, in the last the lines that the group's results go to.
//
// Scores are of z itself, with the path's part in the bias: see uncertainty(). The code of a score is kept in its
// lowest three bits. That changes it by less than 8 units in the last place, 16 u, as much as kMarkRoundings more
// roundings do.

// The best two scores of some codewords.
struct Ranked {
  __m512 first, second;
};

VPFAST_INLINE Ranked rank_two(__m512 a, __m512 b) { return {_mm512_max_ps(a, b), _mm512_min_ps(a, b)}; }

VPFAST_INLINE Ranked rank_four(const Ranked& a, const Ranked& b) {
  const __m512 loser = _mm512_min_ps(a.first, b.first);
  return {_mm512_max_ps(a.first, b.first), _mm512_max_ps(loser, _mm512_max_ps(a.second, b.second))};
}

// Adds the pairs up: in each quarter two codewords of vector a and the same two of vector b.
VPFAST_INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

VPFAST_INLINE __m512 mark(__m512 score, __m512i code) {
  constexpr int and_then_or = 0xea;
  const __m512i kept = _mm512_set1_epi32(~7);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(score), kept, code, and_then_or));
}

// Quarters `first` of a and b against quarters `other`.
template <int first, int other>
VPFAST_INLINE Ranked rank_quarters(const Ranked& a, const Ranked& b) {
  return rank_four({_mm512_shuffle_f32x4(a.first, b.first, first), _mm512_shuffle_f32x4(a.second, b.second, first)},
                   {_mm512_shuffle_f32x4(a.first, b.first, other), _mm512_shuffle_f32x4(a.second, b.second, other)});
}

// From the scores of four vectors: codewords 2 k and 2 k + 1 in quarter k.
VPFAST_INLINE Ranked rank_pairs(const __m512* score) {
  const __m512 ab = add_pairs(score[0], score[1]), cd = add_pairs(score[2], score[3]);
  const __m512i even = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
  const __m512i odd = _mm512_set_epi32(7, 7, 7, 7, 5, 5, 5, 5, 3, 3, 3, 3, 1, 1, 1, 1);
  return rank_two(mark(_mm512_shuffle_ps(ab, cd, 0x88), even), mark(_mm512_shuffle_ps(ab, cd, 0xdd), odd));
}

// Eight vectors from `z` on, side by side: as many chains of additions, which the processor overlaps. `offsets` tells,
// in bytes, where each one's codebook lies; without parents all search the first. `known_pairs` is the number of pairs
// of components where the compiler knows it, or 0.
template <int known_pairs, bool below_parents>
VPFAST_INLINE Ranked rank_eight(const float* z, const float* codebooks, const uint32_t* offsets, int64_t dim) {
  const int64_t pairs = known_pairs ? known_pairs : dim / 2;
  const char* memory = reinterpret_cast<const char*>(codebooks);
  const float* codebook[8];
  __m512 score[8];
  for (int v = 0; v < 8; ++v) {
    codebook[v] = below_parents ? reinterpret_cast<const float*>(memory + offsets[v]) : codebooks;
    score[v] = _mm512_load_ps(codebook[v]);
  }
  for (int64_t d = 0; d < pairs; ++d) {
    for (int v = 0; v < 8; ++v) {
      double two;
      std::memcpy(&two, z + 2 * (v * pairs + d), sizeof two);
      const __m512 components = _mm512_load_ps(codebook[v] + 16 * (d + 1));
      score[v] = _mm512_fmadd_ps(components, _mm512_castpd_ps(_mm512_set1_pd(two)), score[v]);
    }
  }
  return rank_quarters<0x44, 0xee>(rank_pairs(score), rank_pairs(score + 4));
}

// What a layer fetches for each vector: `bytes` from `start`, which is for the first of the group. It may lie outside
// every array, where nothing is fetched.
struct Wanted {
  uintptr_t start;
  int64_t bytes;

  VPFAST_INLINE void fetch_sixteen(int64_t first) const {
    const uintptr_t from = start + static_cast<uintptr_t>(first * bytes);
    for (int64_t byte = 0; byte < 16 * bytes; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(byte)));
    }
  }
};

template <class T>
VPFAST_INLINE Wanted wanted(const Problem& p, const Group& group, int64_t layer) {
  const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(T)), code_bytes = p.layers * 8;
  const auto at = [](const void* memory, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes);
  };
  if (layer == 0) return {at(p.z, (group.first + kGroup) * row_bytes), is_dense(p) ? row_bytes : 0};
  if (layer + 1 == p.layers) return {at(p.quantized, group.first * row_bytes), row_bytes};
  if (layer + 2 == p.layers) return {at(p.indices, group.first * code_bytes), code_bytes};
  return {0, 0};
}

template <class T, int known_pairs, bool below_parents>
void scan_layer_by_eights(const Problem& p, Group& group, int64_t layer, double* scratch) {
  const int32_t* parents = below_parents ? group.rows + (layer - 1) * kGroup : nullptr;
  const __m512 margin = _mm512_set1_ps(group.margins[layer]);
  const uint32_t codebook_bytes = static_cast<uint32_t>(32 * (p.dim + 2));
  const __m512i size = _mm512_set1_epi32((int)p.codebook_size);
  alignas(64) uint32_t offsets[kGroup];
  for (int64_t v = 0; below_parents && v < kGroup; ++v) offsets[v] = static_cast<uint32_t>(parents[v]) * codebook_bytes;
  const Wanted soon = wanted<T>(p, group, layer);
  for (int64_t start = 0; start < kGroup; start += 16) {
    soon.fetch_sixteen(start);
    Ranked half[2];
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t v = start + 8 * k;
      half[k] = rank_eight<known_pairs, below_parents>(group.residuals + v * p.dim, p.eights.codebooks[layer],
                                                       offsets + v, p.dim);
    }
    const Ranked best = rank_quarters<0x88, 0xdd>(half[0], half[1]);
    __m512i row = _mm512_and_si512(_mm512_castps_si512(best.first), _mm512_set1_epi32(7));
    if (below_parents) row = _mm512_add_epi32(row, _mm512_mullo_epi32(_mm512_loadu_si512(parents + start), size));
    _mm512_storeu_si512(group.rows + layer * kGroup + start, row);
    uint32_t unsure = _mm512_cmp_ps_mask(best.second, _mm512_sub_ps(best.first, margin), _CMP_NLT_UQ);
    for (; unsure; unsure &= unsure - 1) {
      const int64_t v = start + __builtin_ctz(unsure);
      if (v >= group.count) break;
      group.choose(p, layer, v, exact_code<T, float>(p, group, layer, v, nullptr, p.codebook_size, scratch));
    }
  }
}

template <class T>
VPFAST_INLINE void scan_layer_by_eights(const Problem& p, Group& group, int64_t layer, double* scratch) {
  if (p.dim == 8) {
    return layer > 0 ? scan_layer_by_eights<T, 4, true>(p, group, layer, scratch)
                     : scan_layer_by_eights<T, 4, false>(p, group, layer, scratch);
  }
  return layer > 0 ? scan_layer_by_eights<T, 0, true>(p, group, layer, scratch)
                   : scan_layer_by_eights<T, 0, false>(p, group, layer, scratch);
}
