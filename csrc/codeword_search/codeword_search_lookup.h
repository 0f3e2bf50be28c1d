// Sixteen vectors at a time through the top layers of a small tree, the way of AVX-512: a register holds one component
// of sixteen vectors, and as each of them may stand below another parent, a component of "the k-th codeword of one's
// own codebook" is looked up by parent, in tables that are registers themselves. Included by codeword_search_kernel.h.

// bits[j] tells which lanes have bit 4 + j of their index set.
template <int registers>
VPFAST_INLINE __m512 look_up(const float* table, __m512i index, const __mmask16* bits) {
  if constexpr (registers == 0) return _mm512_set1_ps(*table);
  if constexpr (registers == 1) return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
  if constexpr (registers == 2) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
  }
  if constexpr (registers > 2) {
    constexpr int half = registers / 2, bit = half == 2 ? 1 : half == 4 ? 2 : 3;
    return _mm512_mask_blend_ps(bits[bit], look_up<half>(table, index, bits),
                                look_up<half>(table + 16 * half, index, bits));
  }
}

VPFAST_INLINE void index_bits(__m512i index, __mmask16 (&bits)[4]) {
  for (int j = 0; j < 4; ++j) bits[j] = _mm512_test_epi32_mask(index, _mm512_set1_epi32(16 << j));
}

// The best two scores so far and the code of the better.
struct Best {
  __m512 first, second;
  __m512i code;
};

VPFAST_INLINE void challenge(Best& best, __m512 score, int64_t code) {
  best.second = _mm512_max_ps(best.second, _mm512_min_ps(best.first, score));
  best.code = _mm512_mask_set1_epi32(best.code, _mm512_cmp_ps_mask(score, best.first, _CMP_GT_OQ), (int)code);
  best.first = _mm512_max_ps(best.first, score);
}

// Scores of `codes` codewords at a time: as many chains of additions, which the processor overlaps.
template <int registers, int codes>
VPFAST_INLINE void challenge_block(Best& best, const float* table, int64_t stride, int64_t dim, int64_t first_code,
                                   __m512i parent, const __mmask16* bits, const __m512* residual) {
  const int64_t code_stride = (dim + 1) * stride;
  __m512 score[codes];
  for (int k = 0; k < codes; ++k) {
    score[k] = look_up<registers>(table + (first_code + k) * code_stride + dim * stride, parent, bits);
  }
  for (int64_t d = 0; d < dim; ++d) {
    for (int k = 0; k < codes; ++k) {
      const __m512 component = look_up<registers>(table + (first_code + k) * code_stride + d * stride, parent, bits);
      score[k] = _mm512_fmadd_ps(component, residual[d], score[k]);
    }
  }
  for (int k = 0; k < codes; ++k) challenge(best, score[k], first_code + k);
}

template <int registers>
Best scan_layer(const Problem& p, int64_t layer, __m512i parent, const __m512* residual) {
  __mmask16 bits[4];
  index_bits(parent, bits);
  const int64_t stride = registers == 0 ? 1 : 16 * registers;
  const float* table = p.lookups.by_parent[layer];
  const __m512 least = _mm512_set1_ps(-__builtin_inff());
  Best best = {least, least, _mm512_setzero_si512()};
  int64_t code = 0;
  for (; code + 4 <= p.codebook_size; code += 4) {
    challenge_block<registers, 4>(best, table, stride, p.dim, code, parent, bits, residual);
  }
  for (; code + 2 <= p.codebook_size; code += 2) {
    challenge_block<registers, 2>(best, table, stride, p.dim, code, parent, bits, residual);
  }
  for (; code < p.codebook_size; ++code) {
    challenge_block<registers, 1>(best, table, stride, p.dim, code, parent, bits, residual);
  }
  return best;
}

template <int registers>
void subtract_rows(const Problem& p, int64_t layer, __m512i row, __m512* residual) {
  __mmask16 bits[4];
  index_bits(row, bits);
  const float* table = p.lookups.by_row[layer];
  for (int64_t d = 0; d < p.dim; ++d) {
    residual[d] = _mm512_sub_ps(residual[d], look_up<registers>(table + d * 16 * registers, row, bits));
  }
}

// How many registers hold a table of so many entries: 0 for one entry, else a power of two.
inline int registers_for(int64_t entries) {
  if (entries == 1) return 0;
  int registers = 1;
  while (16 * registers < entries) registers *= 2;
  return registers;
}

VPFAST_INLINE Best scan_layer(const Problem& p, int64_t layer, int64_t parents, __m512i parent,
                              const __m512* residual) {
  switch (registers_for(parents)) {
    case 0:
      return scan_layer<0>(p, layer, parent, residual);
    case 1:
      return scan_layer<1>(p, layer, parent, residual);
    case 2:
      return scan_layer<2>(p, layer, parent, residual);
    case 4:
      return scan_layer<4>(p, layer, parent, residual);
    case 8:
      return scan_layer<8>(p, layer, parent, residual);
    default:
      return scan_layer<16>(p, layer, parent, residual);
  }
}

VPFAST_INLINE void subtract_rows(const Problem& p, int64_t layer, int64_t rows, __m512i row, __m512* residual) {
  switch (registers_for(rows)) {
    case 1:
      return subtract_rows<1>(p, layer, row, residual);
    case 2:
      return subtract_rows<2>(p, layer, row, residual);
    case 4:
      return subtract_rows<4>(p, layer, row, residual);
    case 8:
      return subtract_rows<8>(p, layer, row, residual);
    default:
      return subtract_rows<16>(p, layer, row, residual);
  }
}

// Sixteen rows of the group's residuals, one component a register.
VPFAST_INLINE void transpose(const float* rows, int64_t dim, __m512* components) {
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4) {
    __m512 four[4];  // four[j] holds, in its quarters, components d .. d + 3 of rows j, j + 4, j + 8, j + 12
    for (int j = 0; j < 4; ++j) {
      const float* row = rows + j * dim + d;
      four[j] = _mm512_castps128_ps512(_mm_loadu_ps(row));
      four[j] = _mm512_insertf32x4(four[j], _mm_loadu_ps(row + 4 * dim), 1);
      four[j] = _mm512_insertf32x4(four[j], _mm_loadu_ps(row + 8 * dim), 2);
      four[j] = _mm512_insertf32x4(four[j], _mm_loadu_ps(row + 12 * dim), 3);
    }
    const __m512d low01 = (__m512d)_mm512_unpacklo_ps(four[0], four[1]);
    const __m512d low23 = (__m512d)_mm512_unpacklo_ps(four[2], four[3]);
    const __m512d high01 = (__m512d)_mm512_unpackhi_ps(four[0], four[1]);
    const __m512d high23 = (__m512d)_mm512_unpackhi_ps(four[2], four[3]);
    components[d] = (__m512)_mm512_unpacklo_pd(low01, low23);
    components[d + 1] = (__m512)_mm512_unpackhi_pd(low01, low23);
    components[d + 2] = (__m512)_mm512_unpacklo_pd(high01, high23);
    components[d + 3] = (__m512)_mm512_unpackhi_pd(high01, high23);
  }
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)dim));
  for (; d < dim; ++d) components[d] = _mm512_i32gather_ps(offset, rows + d, 4);
}

// The codes of the group's vectors from `start`, sixteen or as many as there are, in the layers of p.lookups.
template <class T>
void search_by_lookup(const Problem& p, const Group& group, int64_t start, double* scratch) {
  const int64_t first = group.first + start, layers = p.layers;
  const int count = group.count - start < 16 ? static_cast<int>(group.count - start) : 16;
  __m512 residual[kMaxLookupDim];
  transpose(group.residuals + start * p.dim, p.dim, residual);
  __m512i parent = _mm512_setzero_si512();
  alignas(64) int32_t codes[kMaxLayers][16];
  int64_t parents = 1;
  for (int64_t layer = 0; layer < p.lookups.layers; ++layer) {
    Best best = scan_layer(p, layer, parents, parent, residual);
    const __m512 bar = _mm512_sub_ps(best.first, _mm512_set1_ps(group.margins[layer]));
    _mm512_store_si512(codes[layer], best.code);
    uint32_t unsure = _mm512_cmp_ps_mask(best.second, bar, _CMP_NLT_UQ) & ((1u << count) - 1);
    if (unsure) {
      alignas(64) int32_t above[16];
      _mm512_store_si512(above, parent);
      for (; unsure; unsure &= unsure - 1) {
        const int lane = __builtin_ctz(unsure);
        int64_t so_far[kMaxLayers];
        for (int64_t earlier = 0; earlier < layer; ++earlier) so_far[earlier] = codes[earlier][lane];
        codes[layer][lane] = static_cast<int32_t>(
            decide<T, float>(p, first + lane, layer, above[lane], so_far, nullptr, p.codebook_size, scratch));
      }
      best.code = _mm512_load_si512(codes[layer]);
    }
    __m512i row = best.code;
    if (p.strict_tree) {
      row = _mm512_add_epi32(_mm512_mullo_epi32(parent, _mm512_set1_epi32((int)p.codebook_size)), row);
      parent = row;
      parents *= p.codebook_size;
    }
    _mm512_storeu_si512(group.rows + layer * kGroup + start, row);
    if (layer + 1 < p.lookups.layers) {
      subtract_rows(p, layer, p.strict_tree ? parents : p.codebook_size, row, residual);
    }
  }
  int64_t* const indices = p.indices + first * layers;
  for (int64_t layer = 0; layer < p.lookups.layers; ++layer) {
    int64_t* to = indices + layer;
    if (count == 16) {
      for (int lane = 0; lane < 16; ++lane, to += layers) *to = codes[layer][lane];
    } else {
      for (int lane = 0; lane < count; ++lane, to += layers) *to = codes[layer][lane];
    }
  }
}
