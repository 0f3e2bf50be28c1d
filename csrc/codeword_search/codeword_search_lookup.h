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

constexpr int kSixteens = static_cast<int>(kGroup) / 16;

// A group's vectors, sixteen in the lanes of each register.
struct Lanes16 {
  __m512 residual[kSixteens][kMaxLookupDim];
  __m512i parent[kSixteens], row[kSixteens];
  __mmask16 unsure[kSixteens];
};

// The best two scores of some codewords and the code of the better.
struct Best {
  __m512 first, second;
  __m512i code;
};

VPFAST_INLINE Best better(const Best& a, const Best& b) {
  const __mmask16 b_wins = _mm512_cmp_ps_mask(b.first, a.first, _CMP_GT_OQ);
  const __m512 loser = _mm512_min_ps(a.first, b.first);
  return {_mm512_max_ps(a.first, b.first), _mm512_max_ps(loser, _mm512_max_ps(a.second, b.second)),
          _mm512_mask_mov_epi32(a.code, b_wins, b.code)};
}

// A knock-out tournament of `codes` scores, a power of two: fewer rounds to wait for than one after the other.
template <int codes>
VPFAST_INLINE Best tournament(const __m512* score, int64_t first_code) {
  if constexpr (codes == 1) {
    return {*score, _mm512_set1_ps(-__builtin_inff()), _mm512_set1_epi32((int)first_code)};
  } else if constexpr (codes == 2) {
    const __mmask16 second_wins = _mm512_cmp_ps_mask(score[1], score[0], _CMP_GT_OQ);
    return {_mm512_max_ps(score[0], score[1]), _mm512_min_ps(score[0], score[1]),
            _mm512_mask_set1_epi32(_mm512_set1_epi32((int)first_code), second_wins, (int)first_code + 1)};
  } else {
    return better(tournament<codes / 2>(score, first_code),
                  tournament<codes / 2>(score + codes / 2, first_code + codes / 2));
  }
}

// The scores of `codes` codewords at a time: as many chains of additions, which the processor overlaps.
template <int registers, int codes>
VPFAST_INLINE Best scan_codes(const float* table, int64_t stride, int64_t dim, int64_t first_code, __m512i parent,
                              const __mmask16* bits, const __m512* residual) {
  const int64_t code_stride = (dim + 1) * stride;
  const float* of_code[codes];
  __m512 score[codes];
  for (int k = 0; k < codes; ++k) {
    of_code[k] = table + (first_code + k) * code_stride;
    score[k] = look_up<registers>(of_code[k] + dim * stride, parent, bits);
  }
  for (int64_t d = 0; d < dim; ++d) {
    for (int k = 0; k < codes; ++k) {
      const __m512 component = look_up<registers>(of_code[k] + d * stride, parent, bits);
      score[k] = _mm512_fmadd_ps(component, residual[d], score[k]);
    }
  }
  return tournament<codes>(score, first_code);
}

// Of two codewords the nearer lies on the vector's side of the plane between them: one product in place of two.
template <int registers>
VPFAST_INLINE Best scan_two(const float* table, int64_t stride, int64_t dim, __m512i parent, const __mmask16* bits,
                            const __m512* residual) {
  __m512 side[2] = {look_up<registers>(table + dim * stride, parent, bits), _mm512_setzero_ps()};
  for (int64_t d = 0; d < dim; ++d) {
    side[d % 2] = _mm512_fmadd_ps(look_up<registers>(table + d * stride, parent, bits), residual[d], side[d % 2]);
  }
  const __m512 difference = _mm512_add_ps(side[0], side[1]), zero = _mm512_setzero_ps();
  const __mmask16 second_wins = _mm512_cmp_ps_mask(difference, zero, _CMP_GT_OQ);
  return {_mm512_max_ps(difference, zero), _mm512_min_ps(difference, zero), _mm512_maskz_set1_epi32(second_wins, 1)};
}

template <int registers>
VPFAST_INLINE Best scan_sixteen(const Problem& p, int64_t layer, __m512i parent, const __m512* residual) {
  __mmask16 bits[4];
  index_bits(parent, bits);
  const int64_t stride = registers == 0 ? 1 : 16 * registers, size = p.codebook_size;
  const float* table = p.lookups.by_parent[layer];
  if (size == 2) return scan_two<registers>(table, stride, p.dim, parent, bits, residual);
  int64_t code = 0;
  auto best_of = [&](auto codes) VPFAST_INLINE_LAMBDA {
    constexpr int count = decltype(codes)::value;
    const Best found = scan_codes<registers, count>(table, stride, p.dim, code, parent, bits, residual);
    code += count;
    return found;
  };
  Best best = size >= 8   ? best_of(std::integral_constant<int, 8>{})
              : size >= 4 ? best_of(std::integral_constant<int, 4>{})
                          : best_of(std::integral_constant<int, 2>{});
  while (size - code >= 8) best = better(best, best_of(std::integral_constant<int, 8>{}));
  if (size - code >= 4) best = better(best, best_of(std::integral_constant<int, 4>{}));
  if (size - code >= 2) best = better(best, best_of(std::integral_constant<int, 2>{}));
  if (size - code >= 1) best = better(best, best_of(std::integral_constant<int, 1>{}));
  return best;
}

template <int registers>
void scan_layer(const Problem& p, int64_t layer, float margin, Lanes16& group) {
  for (int k = 0; k < kSixteens; ++k) {
    const Best best = scan_sixteen<registers>(p, layer, group.parent[k], group.residual[k]);
    const __m512 bar = _mm512_sub_ps(best.first, _mm512_set1_ps(margin));
    group.unsure[k] = _mm512_cmp_ps_mask(best.second, bar, _CMP_NLT_UQ);
    group.row[k] = best.code;
  }
}

template <int registers>
void subtract_rows(const Problem& p, int64_t layer, Lanes16& group) {
  const float* table = p.lookups.by_row[layer];
  for (int k = 0; k < kSixteens; ++k) {
    __mmask16 bits[4];
    index_bits(group.row[k], bits);
    for (int64_t d = 0; d < p.dim; ++d) {
      const __m512 component = look_up<registers>(table + d * 16 * registers, group.row[k], bits);
      group.residual[k][d] = _mm512_sub_ps(group.residual[k][d], component);
    }
  }
}

// How many registers hold a table of so many entries: 0 for one entry, else a power of two.
inline int registers_for(int64_t entries) {
  if (entries == 1) return 0;
  int registers = 1;
  while (16 * registers < entries) registers *= 2;
  return registers;
}

inline void scan_layer(const Problem& p, int64_t layer, int64_t parents, float margin, Lanes16& group) {
  switch (registers_for(parents)) {
    case 0:
      return scan_layer<0>(p, layer, margin, group);
    case 1:
      return scan_layer<1>(p, layer, margin, group);
    case 2:
      return scan_layer<2>(p, layer, margin, group);
    case 4:
      return scan_layer<4>(p, layer, margin, group);
    case 8:
      return scan_layer<8>(p, layer, margin, group);
    default:
      return scan_layer<16>(p, layer, margin, group);
  }
}

inline void subtract_rows(const Problem& p, int64_t layer, int64_t rows, Lanes16& group) {
  switch (registers_for(rows)) {
    case 1:
      return subtract_rows<1>(p, layer, group);
    case 2:
      return subtract_rows<2>(p, layer, group);
    case 4:
      return subtract_rows<4>(p, layer, group);
    case 8:
      return subtract_rows<8>(p, layer, group);
    default:
      return subtract_rows<16>(p, layer, group);
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
  for (; d < dim; ++d) {
    seen_read(rows + d, 16, 4 * dim, 4);
    components[d] = _mm512_i32gather_ps(offset, rows + d, 4);
  }
}

// Puts right the codes that the scan of a layer was not sure of.
template <class T>
VPFAST_INLINE void settle_codes(const Problem& p, const Group& group, int64_t layer, Lanes16& lanes, double* scratch) {
  for (int64_t k = 0; k < kSixteens; ++k) {
    const int64_t start = 16 * k;
    for (uint32_t unsure = lanes.unsure[k]; unsure; unsure &= unsure - 1) {
      const int64_t lane = __builtin_ctz(unsure);
      if (start + lane >= group.count) break;
      alignas(64) int32_t code[16];
      _mm512_store_si512(code, lanes.row[k]);
      code[lane] =
          static_cast<int32_t>(exact_code<T, float>(p, group, layer, start + lane, nullptr, p.codebook_size, scratch));
      lanes.row[k] = _mm512_load_si512(code);
    }
  }
}

// The rows of the group's vectors in the layers of p.lookups.
template <class T>
void search_by_lookup(const Problem& p, Group& group, double* scratch) {
  Lanes16 lanes;
  for (int k = 0; k < kSixteens; ++k) {
    transpose(group.residuals + k * 16 * p.dim, p.dim, lanes.residual[k]);
    lanes.parent[k] = _mm512_setzero_si512();
  }
  int64_t parents = 1;
  for (int64_t layer = 0; layer < p.lookups.layers; ++layer) {
    scan_layer(p, layer, parents, group.margins[layer], lanes);
    settle_codes<T>(p, group, layer, lanes, scratch);
    for (int k = 0; k < kSixteens; ++k) {
      if (p.strict_tree) {
        const __m512i above = _mm512_mullo_epi32(lanes.parent[k], _mm512_set1_epi32((int)p.codebook_size));
        lanes.parent[k] = lanes.row[k] = _mm512_add_epi32(above, lanes.row[k]);
      }
      _mm512_storeu_si512(group.rows + layer * kGroup + k * 16, lanes.row[k]);
    }
    if (p.strict_tree) parents *= p.codebook_size;
    if (layer + 1 < p.lookups.layers) subtract_rows(p, layer, p.strict_tree ? parents : p.codebook_size, lanes);
  }
}
