// The loops of codeword_search for one instruction set. Included by codeword_search_cpu.cpp through for_each_isa.h.

// --- reading z ---

template <class X>
VPFAST_INLINE void fill(X* to, int64_t count, X value) {
  for (int64_t k = 0; k < count; ++k) to[k] = value;
}

template <class T>
VPFAST_INLINE void read_row(const T* from, int64_t stride, int64_t dim, float* to) {
  if (stride == 1) {
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d]);
  } else {
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d * stride]);
  }
}

template <class T>
VPFAST_INLINE void read_row(const T* from, int64_t stride, int64_t dim, double* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<double>(from[d * stride]);
}

// Are the rows of z one after another, with nothing between?
VPFAST_INLINE bool is_dense(const Problem& p) { return p.z_column == 1 && p.z_row == p.dim; }

// The largest |x|; infinity where one is NaN or infinite. As integers, magnitudes order as floats do, NaN above all.
VPFAST_INLINE float largest_magnitude(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    int32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  if (largest >= 0x7f800000) return __builtin_inff();
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

template <class W>
VPFAST_INLINE bool is_finite(const W* x, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (!(x[d] - x[d] == 0)) return false;
  }
  return true;
}

// Quickly told of dense float32; elsewhere each vector is looked at when its turn comes.
template <class T>
VPFAST_INLINE bool all_finite(const Problem& p, int64_t first, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    if (is_dense(p)) {
      return largest_magnitude(static_cast<const T*>(p.z) + first * p.dim, count * p.dim) < __builtin_inff();
    }
  }
  return false;
}

// Vectors on their way down the layers together.
struct Group {
  int64_t first, count;
  const float* residuals;     // (kGroup, dim), zeros beyond `count`
  int32_t* rows;              // (layers, kGroup): the chosen rows so far
  uint64_t not_finite;        // a bit a vector
  float margins[kMaxLayers];  // `uncertainty` at each layer

  VPFAST_INLINE int64_t parent(const Problem& p, int64_t layer, int64_t v) const {
    return p.strict_tree && layer > 0 ? rows[(layer - 1) * kGroup + v] : 0;
  }
  VPFAST_INLINE void choose(const Problem& p, int64_t layer, int64_t v, int64_t code) {
    const int64_t row = row_of(p.strict_tree, p.codebook_size, parent(p, layer, v), code);
    rows[layer * kGroup + v] = static_cast<int32_t>(row);
  }
};

// The code of a group's vector by the deciding search, among `candidates` or all codes.
template <class T, class W>
int64_t exact_code(const Problem& p, const Group& group, int64_t layer, int64_t v, const int64_t* candidates,
                   int64_t count, double* scratch) {
  return decide<T, W>(p, group.first + v, layer, group.parent(p, layer, v), group.rows + v, candidates, count, scratch);
}

// --- scanning by panels ---
// Codewords in the lanes, a component of a vector in all of them.

template <int W>
struct Wide {
  typedef float Floats __attribute__((vector_size(4 * W)));
  typedef int32_t Ints __attribute__((vector_size(4 * W)));
};

template <int W>
VPFAST_INLINE typename Wide<W>::Floats load(const float* p) {
  typename Wide<W>::Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <int W>
VPFAST_INLINE float largest(typename Wide<W>::Floats x) {
  float top = x[0];
  for (int k = 1; k < W; ++k) top = x[k] > top ? x[k] : top;
  return top;
}

// The lanes that do not lie below the bar; a NaN does not.
template <int W>
VPFAST_INLINE uint32_t not_below(typename Wide<W>::Floats x, float bar) {
  uint32_t mask = 0;
  for (int k = 0; k < W; ++k) mask |= static_cast<uint32_t>(!(x[k] < bar)) << k;
  return mask;
}

#if VPFAST_ISA_LEVEL > 0
template <>
VPFAST_INLINE float largest<4>(Wide<4>::Floats x) {
  __m128 top = _mm_max_ps((__m128)x, _mm_movehl_ps((__m128)x, (__m128)x));
  top = _mm_max_ss(top, _mm_shuffle_ps(top, top, 1));
  return _mm_cvtss_f32(top);
}
template <>
VPFAST_INLINE float largest<8>(Wide<8>::Floats x) {
  const __m256 all = (__m256)x;
  return largest<4>((Wide<4>::Floats)_mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
template <>
VPFAST_INLINE uint32_t not_below<4>(Wide<4>::Floats x, float bar) {
  return _mm_movemask_ps(_mm_cmp_ps((__m128)x, _mm_set1_ps(bar), _CMP_NLT_UQ));
}
template <>
VPFAST_INLINE uint32_t not_below<8>(Wide<8>::Floats x, float bar) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(bar), _CMP_NLT_UQ));
}
#endif
#if VPFAST_ISA_LEVEL == 2
template <>
VPFAST_INLINE float largest<16>(Wide<16>::Floats x) {
  const __m512 all = (__m512)x;
  return largest<8>((Wide<8>::Floats)_mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1)));
}
template <>
VPFAST_INLINE uint32_t not_below<16>(Wide<16>::Floats x, float bar) {
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bar), _CMP_NLT_UQ);
}
#endif

// The best two scores that each lane has seen, and the block that the better came from.
template <int W>
struct Running {
  typename Wide<W>::Floats first, second;
  typename Wide<W>::Ints block;

  VPFAST_INLINE void reset() {
    first = second = -__builtin_inff() - typename Wide<W>::Floats{};
    block = typename Wide<W>::Ints{};
  }
  VPFAST_INLINE void challenge(typename Wide<W>::Floats score, int from) {
    const auto better = score > first;
    const auto lower = better ? first : score;
    second = lower > second ? lower : second;
    block = better ? from - typename Wide<W>::Ints{} : block;
    first = better ? score : first;
  }
};

// A tile: `height` vectors against `blocks` blocks.
template <int W, int height, int blocks>
VPFAST_INLINE void scan_tile(const float* residuals, int64_t dim, const float* codewords, const float* biases,
                             int first_block, Running<W>* running) {
  typename Wide<W>::Floats score[height][blocks];
  for (int b = 0; b < blocks; ++b) {
    const auto bias = load<W>(biases + b * W);
    for (int v = 0; v < height; ++v) score[v][b] = bias;
  }
  for (int64_t d = 0; d < dim; ++d) {
    typename Wide<W>::Floats component[blocks];
    for (int b = 0; b < blocks; ++b) component[b] = load<W>(codewords + (b * dim + d) * W);
    for (int v = 0; v < height; ++v) {
      for (int b = 0; b < blocks; ++b) score[v][b] += residuals[v * dim + d] * component[b];
    }
  }
  for (int v = 0; v < height; ++v) {
    for (int b = 0; b < blocks; ++b) running[v].challenge(score[v][b], first_block + b);
  }
}

template <int W, int height>
VPFAST_INLINE void scan_blocks(const Problem& p, const float* residuals, const float* codewords, const float* biases,
                               int64_t begin, int64_t end, Running<W>* running) {
  constexpr int wide = 4;
  int64_t block = begin;
  for (; block + wide <= end; block += wide) {
    scan_tile<W, height, wide>(residuals, p.dim, codewords + block * p.dim * W, biases + block * W, (int)block,
                               running);
  }
  for (; block < end; ++block) {
    scan_tile<W, height, 1>(residuals, p.dim, codewords + block * p.dim * W, biases + block * W, (int)block, running);
  }
}

template <class T, int W>
VPFAST_INLINE int64_t settle(const Problem& p, const Group& group, int64_t layer, int64_t v, const Running<W>& running,
                             double* scratch) {
  const float bar = largest<W>(running.first) - group.margins[layer];
  uint32_t near = not_below<W>(running.first, bar);
  const uint32_t hidden = not_below<W>(running.second, bar);
  int32_t block[W];
  std::memcpy(block, &running.block, sizeof block);
  const int lane = __builtin_ctz(near | 1u << (W - 1));
  if (near != 0 && (near & (near - 1)) == 0 && hidden == 0) return static_cast<int64_t>(block[lane]) * W + lane;

  int64_t candidates[W], count = 0;
  for (; near; near &= near - 1) {
    const int64_t code = static_cast<int64_t>(block[__builtin_ctz(near)]) * W + __builtin_ctz(near);
    if (code >= p.codebook_size) continue;
    int64_t place = count++;  // in rising order, for the lowest of equals to come first
    for (; place > 0 && candidates[place - 1] > code; --place) candidates[place] = candidates[place - 1];
    candidates[place] = code;
  }
  if (hidden != 0 || count == 0) {
    return exact_code<T, float>(p, group, layer, v, nullptr, p.codebook_size, scratch);
  }
  return exact_code<T, float>(p, group, layer, v, candidates, count, scratch);
}

// One layer in which every vector of the group searches a codebook of its own.
template <class T, int W>
void scan_tree_layer(const Problem& p, Group& group, int64_t layer, double* scratch) {
  const int64_t lanes = p.panels.blocks * W;
  for (int64_t v = 0; v < group.count; ++v) {
    const int64_t parent = group.parent(p, layer, v);
    Running<W> running;
    running.reset();
    scan_blocks<W, 1>(p, group.residuals + v * p.dim, p.panels.codewords[layer] + parent * lanes * p.dim,
                      p.panels.biases[layer] + parent * lanes, 0, p.panels.blocks, &running);
    group.choose(p, layer, v, settle<T, W>(p, group, layer, v, running, scratch));
  }
}

// One layer in which all vectors search the same codebook: tiles of vectors and codewords, as in a matrix product. A
// slice of codewords stays in the L1 cache for the whole group.
template <class T, int W>
void scan_flat_layer(const Problem& p, Group& group, int64_t layer, double* scratch) {
  constexpr int64_t height = 6, slice_bytes = 16384;
  const int64_t block_bytes = p.dim * W * 4, slice = 4 * (slice_bytes / (4 * block_bytes) + 1);
  Running<W> running[kGroup];
  for (int64_t v = 0; v < kGroup; ++v) running[v].reset();
  for (int64_t block = 0; block < p.panels.blocks; block += slice) {
    const int64_t end = block + slice < p.panels.blocks ? block + slice : p.panels.blocks;
    for (int64_t v = 0; v < group.count; v += height) {
      scan_blocks<W, height>(p, group.residuals + v * p.dim, p.panels.codewords[layer], p.panels.biases[layer], block,
                             end, running + v);
    }
  }
  for (int64_t v = 0; v < group.count; ++v) {
    group.choose(p, layer, v, settle<T, W>(p, group, layer, v, running[v], scratch));
  }
}

template <class T, int W>
void scan_layer_by_panels(const Problem& p, Group& group, int64_t layer, double* scratch) {
  if (p.strict_tree && layer > 0) {
    scan_tree_layer<T, W>(p, group, layer, scratch);
  } else {
    scan_flat_layer<T, W>(p, group, layer, scratch);
  }
}

template <class T>
void scan_layer_by_panels(const Problem& p, Group& group, int64_t layer, double* scratch) {
  if (p.panels.width == 4) scan_layer_by_panels<T, 4>(p, group, layer, scratch);
#if VPFAST_ISA_LEVEL > 0
  if (p.panels.width == 8) scan_layer_by_panels<T, 8>(p, group, layer, scratch);
#endif
#if VPFAST_ISA_LEVEL == 2
  if (p.panels.width == 16) scan_layer_by_panels<T, 16>(p, group, layer, scratch);
#endif
}

#if VPFAST_ISA_LEVEL == 2
#include "codeword_search/codeword_search_eights.h"
#include "codeword_search/codeword_search_lookup.h"
#endif

// --- the search ---

template <class T>
VPFAST_INLINE void scan_layer(const Problem& p, Group& group, int64_t layer, double* scratch) {
#if VPFAST_ISA_LEVEL == 2
  if (p.by_eights) return scan_layer_by_eights<T>(p, group, layer, scratch);
#endif
  scan_layer_by_panels<T>(p, group, layer, scratch);
}

// For vectors of components up to `largest`.
VPFAST_INLINE void set_margins(const Problem& p, Group& group, float largest) {
  double length = __builtin_sqrt(static_cast<double>(p.dim)) * largest;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const int64_t marks = p.by_eights ? kMarkRoundings : 0;
    group.margins[layer] = uncertainty(p.dim + marks, layer, length, p.lengths[layer]);
    length += reach(length, p.lengths[layer]);
  }
}

// How many leading layers go by lookups: none where a scan could overflow.
VPFAST_INLINE int64_t layers_to_look_up(const Problem& p, const Group& group) {
  for (int64_t layer = 0; layer < p.lookups.layers; ++layer) {
    if (!(group.margins[layer] < __builtin_inff())) return 0;
  }
  return p.lookups.layers;
}

// Vectors with NaN or infinity are searched as zeros, and given codes 0 at the end.
template <class T>
VPFAST_INLINE void read_group(const Problem& p, Group& group, float* memory) {
  const T* z = static_cast<const T*>(p.z) + group.first * p.z_row;
  const int64_t size = group.count * p.dim;
  bool finite = false;
  if constexpr (std::is_same_v<T, float>) {
    const float largest = is_dense(p) ? largest_magnitude(z, size) : __builtin_inff();
    finite = largest < __builtin_inff();
    if (finite) set_margins(p, group, largest);
    // Where all layers go by what changes nothing in place, the vectors are searched where they lie.
    const bool in_place = p.by_eights || layers_to_look_up(p, group) == p.layers;
    if (finite && group.count == kGroup && in_place) {
      group.residuals = z;
      return;
    }
  }
  for (int64_t v = 0; v < group.count; ++v) read_row(z + v * p.z_row, p.z_column, p.dim, memory + v * p.dim);
  fill(memory + size, kGroup * p.dim - size, 0.0f);
  if (finite) return;
  for (int64_t v = 0; v < group.count; ++v) {
    if (is_finite(memory + v * p.dim, p.dim)) continue;
    group.not_finite |= uint64_t{1} << v;
    fill(memory + v * p.dim, p.dim, 0.0f);
  }
  set_margins(p, group, largest_magnitude(memory, size));
}

// From xi^(i-1) to xi^i.
VPFAST_INLINE void step_down(const Problem& p, const Group& group, int64_t layer, float* residuals) {
  for (int64_t v = 0; v < group.count; ++v) {
    const float* codeword = static_cast<const float*>(p.rows[layer]) + group.rows[layer * kGroup + v] * p.dim;
    float* residual = residuals + v * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) residual[d] -= codeword[d];
  }
}

// (layers, kGroup) -> (count, layers). The number of layers is told to the compiler, for it to write whole registers.
template <int layers>
VPFAST_INLINE void interleave(int64_t known_layers, const int32_t* codes, int64_t count, int64_t* to) {
  if (known_layers == layers) {
    for (int64_t v = 0; v < count; ++v) {
      for (int layer = 0; layer < layers; ++layer) to[v * layers + layer] = codes[layer * kGroup + v];
    }
  } else if constexpr (layers < kMaxLayers) {
    interleave<layers + 1>(known_layers, codes, count, to);
  }
}

// The group's codes, from its rows.
VPFAST_INLINE void write_codes(const Problem& p, const Group& group) {
  const int32_t size = static_cast<int32_t>(p.codebook_size);
  const int64_t layers = p.layers;
  for (int64_t v = 0; group.not_finite && v < group.count; ++v) {
    for (int64_t layer = 0; group.not_finite >> v & 1 && layer < layers; ++layer) group.rows[layer * kGroup + v] = 0;
  }
  int32_t codes[kMaxLayers * kGroup];
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int32_t* row = group.rows + layer * kGroup;
    const bool own_codebooks = p.strict_tree && layer > 0;
    for (int64_t v = 0; v < kGroup; ++v) {
      codes[layer * kGroup + v] = own_codebooks ? row[v] - row[v - kGroup] * size : row[v];
    }
  }
  interleave<1>(layers, codes, group.count, p.indices + group.first * layers);
}

// The codes of `count` vectors from `first`, also told as `rows` (layers, kGroup); `residuals` (kGroup, dim) and
// `scratch` (dim) are working memory. Returns whether all vectors are finite.
template <class T>
bool search_group(const Problem& p, int64_t first, int64_t count, int32_t* rows, float* residuals, double* scratch) {
  Group group{first, count, residuals, rows, 0, {}};
  read_group<T>(p, group, residuals);
  int64_t looked_up = 0;
#if VPFAST_ISA_LEVEL == 2
  looked_up = layers_to_look_up(p, group);
  if (looked_up > 0) search_by_lookup<T>(p, group, scratch);
#endif
  for (int64_t layer = 0; layer < p.layers && looked_up < p.layers; ++layer) {
    if (layer >= looked_up && group.margins[layer] < __builtin_inff()) {
      scan_layer<T>(p, group, layer, scratch);
    } else if (layer >= looked_up) {
      for (int64_t v = 0; v < count; ++v) {
        group.choose(p, layer, v, exact_code<T, float>(p, group, layer, v, nullptr, p.codebook_size, scratch));
      }
      fill(group.rows + layer * kGroup + count, kGroup - count, 0);  // the next scan may read them
    }
    if (layer + 1 < p.layers && !p.by_eights) step_down(p, group, layer, residuals);
  }
  write_codes(p, group);
  return group.not_finite == 0;
}

// float64 vectors take the deciding search alone.
template <>
bool search_group<double>(const Problem& p, int64_t first, int64_t count, int32_t* rows, float*, double* scratch) {
  Group group{first, count, nullptr, rows, 0, {}};
  const double* z = static_cast<const double*>(p.z) + first * p.z_row;
  for (int64_t v = 0; v < count; ++v) {
    read_row(z + v * p.z_row, p.z_column, p.dim, scratch);
    if (!is_finite(scratch, p.dim)) group.not_finite |= uint64_t{1} << v;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      group.choose(p, layer, v, exact_code<double, double>(p, group, layer, v, nullptr, p.codebook_size, scratch));
    }
  }
  write_codes(p, group);
  return group.not_finite == 0;
}

// `rows` of codes that were found before. False where one of them lies outside its codebook: it is taken for 0.
inline bool look_up_rows(const Problem& p, int64_t first, int64_t count, int32_t* rows) {
  bool good = true;
  for (int64_t v = 0; v < count; ++v) {
    int64_t parent = 0;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      int64_t code = p.indices[(first + v) * p.layers + layer];
      if (static_cast<uint64_t>(code) >= static_cast<uint64_t>(p.codebook_size)) {
        good = false;
        code = 0;
      }
      parent = row_of(p.strict_tree, p.codebook_size, parent, code);
      rows[layer * kGroup + v] = static_cast<int32_t>(parent);
    }
  }
  return good;
}

#include "codeword_search/codeword_search_follow.h"
