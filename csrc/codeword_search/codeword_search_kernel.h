// The loops of codeword_search for one instruction set. Included by codeword_search_cpu.cpp through for_each_isa.h.

// --- reading z
// --------------------------------------------------------------------------------------------------------

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

// --- scanning by panels
// ----------------------------------------------------------------------------------------------- Codewords in the
// lanes, a component of a vector in all of them.

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
VPFAST_INLINE int64_t settle(const Problem& p, int64_t vector, int64_t layer, int64_t parent, const Running<W>& running,
                             float margin, double* scratch) {
  const float bar = largest<W>(running.first) - margin;
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
  const bool all = hidden != 0 || count == 0;
  return decide<T, float>(p, vector, layer, parent, p.indices + vector * p.layers, all ? nullptr : candidates,
                          all ? p.codebook_size : count, scratch);
}

// One layer in which every vector of the group searches a codebook of its own.
template <class T, int W>
void scan_tree_layer(const Problem& p, int64_t first, int64_t count, int64_t layer, const float* residuals,
                     const int64_t* parents, float margin, double* scratch) {
  const int64_t lanes = p.panels.blocks * W;
  for (int64_t v = 0; v < count; ++v) {
    Running<W> running;
    running.reset();
    scan_blocks<W, 1>(p, residuals + v * p.dim, p.panels.codewords[layer] + parents[v] * lanes * p.dim,
                      p.panels.biases[layer] + parents[v] * lanes, 0, p.panels.blocks, &running);
    p.indices[(first + v) * p.layers + layer] = settle<T, W>(p, first + v, layer, parents[v], running, margin, scratch);
  }
}

// One layer in which all vectors search the same codebook: tiles of vectors and codewords, as in a matrix product. A
// slice of codewords stays in the L1 cache for the whole group.
template <class T, int W>
void scan_flat_layer(const Problem& p, int64_t first, int64_t count, int64_t layer, const float* residuals,
                     float margin, double* scratch) {
  constexpr int64_t height = 6, slice_bytes = 16384;
  const int64_t block_bytes = p.dim * W * 4, slice = 4 * (slice_bytes / (4 * block_bytes) + 1);
  Running<W> running[kGroup];
  for (int64_t v = 0; v < kGroup; ++v) running[v].reset();
  for (int64_t block = 0; block < p.panels.blocks; block += slice) {
    const int64_t end = block + slice < p.panels.blocks ? block + slice : p.panels.blocks;
    for (int64_t v = 0; v < count; v += height) {
      scan_blocks<W, height>(p, residuals + v * p.dim, p.panels.codewords[layer], p.panels.biases[layer], block, end,
                             running + v);
    }
  }
  for (int64_t v = 0; v < count; ++v) {
    p.indices[(first + v) * p.layers + layer] = settle<T, W>(p, first + v, layer, 0, running[v], margin, scratch);
  }
}

template <class T, int W>
void scan_layer_by_panels(const Problem& p, int64_t first, int64_t count, int64_t layer, const float* residuals,
                          const int64_t* parents, float margin, double* scratch) {
  if (p.strict_tree && layer > 0) {
    scan_tree_layer<T, W>(p, first, count, layer, residuals, parents, margin, scratch);
  } else {
    scan_flat_layer<T, W>(p, first, count, layer, residuals, margin, scratch);
  }
}

template <class T>
void scan_layer_by_panels(const Problem& p, int64_t first, int64_t count, int64_t layer, const float* residuals,
                          const int64_t* parents, float margin, double* scratch) {
  if (p.panels.width == 4) {
    scan_layer_by_panels<T, 4>(p, first, count, layer, residuals, parents, margin, scratch);
  }
#if VPFAST_ISA_LEVEL > 0
  if (p.panels.width == 8) {
    scan_layer_by_panels<T, 8>(p, first, count, layer, residuals, parents, margin, scratch);
  }
#endif
#if VPFAST_ISA_LEVEL == 2
  if (p.panels.width == 16) {
    scan_layer_by_panels<T, 16>(p, first, count, layer, residuals, parents, margin, scratch);
  }
#endif
}

#if VPFAST_ISA_LEVEL == 2
#include "codeword_search/codeword_search_lookup.h"
#endif

// --- the search
// -------------------------------------------------------------------------------------------------------

template <class T, class W>
int64_t exact_code(const Problem& p, int64_t vector, int64_t layer, int64_t parent, double* scratch) {
  return decide<T, W>(p, vector, layer, parent, p.indices + vector * p.layers, nullptr, p.codebook_size, scratch);
}

// The codes of one group; `residuals` (kGroup, dim) and `scratch` (dim) are working memory.
template <class T>
void search_group(const Problem& p, int64_t first, int64_t count, float* residuals, double* scratch) {
  const T* z = static_cast<const T*>(p.z);
  for (int64_t v = 0; v < count; ++v) read_row(z + (first + v) * p.z_row, p.z_column, p.dim, residuals + v * p.dim);
  fill(residuals + count * p.dim, (kGroup - count) * p.dim, 0.0f);

  float largest = largest_magnitude(residuals, count * p.dim);
  const bool all_finite = largest < __builtin_inff();
  bool finite[kGroup];
  for (int64_t v = 0; v < count; ++v) finite[v] = all_finite || is_finite(residuals + v * p.dim, p.dim);
  if (!all_finite) {
    for (int64_t v = 0; v < count; ++v) {
      if (!finite[v]) fill(residuals + v * p.dim, p.dim, 0.0f);
    }
    largest = largest_magnitude(residuals, count * p.dim);
  }
  double length = __builtin_sqrt(static_cast<double>(p.dim)) * largest;

  int64_t parents[kGroup] = {}, layer = 0;
#if VPFAST_ISA_LEVEL == 2
  bool sure = p.lookups.layers > 0;
  double reached = length;
  for (int64_t above = 0; sure && above < p.lookups.layers; ++above) {
    sure = uncertainty(p.dim, above, reached, p.reach[above]) < __builtin_inff();
    reached += p.reach[above];
  }
  if (sure) {
    for (int64_t v = 0; v < count; v += 16) {
      const int some = count - v < 16 ? static_cast<int>(count - v) : 16;
      search_by_lookup<T>(p, first + v, some, residuals + v * p.dim, length, scratch);
    }
  }
  const int64_t looked_up = sure ? p.lookups.layers : 0;
#else
  const int64_t looked_up = 0;
#endif
  for (; layer < p.layers; ++layer) {
    if (layer >= looked_up) {
      const float margin = uncertainty(p.dim, layer, length, p.reach[layer]);
      if (margin < __builtin_inff()) {
        scan_layer_by_panels<T>(p, first, count, layer, residuals, parents, margin, scratch);
      } else {
        for (int64_t v = 0; v < count; ++v) {
          p.indices[(first + v) * p.layers + layer] =
              finite[v] ? exact_code<T, float>(p, first + v, layer, parents[v], scratch) : 0;
        }
      }
    }
    if (layer + 1 == p.layers || looked_up == p.layers) break;
    length += p.reach[layer];
    for (int64_t v = 0; v < count; ++v) {
      const int64_t row = row_of(p.strict_tree, p.codebook_size, parents[v], p.indices[(first + v) * p.layers + layer]);
      const float* codeword = static_cast<const float*>(p.rows[layer]) + row * p.dim;
      float* residual = residuals + v * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) residual[d] -= codeword[d];
      parents[v] = p.strict_tree ? row : 0;
    }
  }
  for (int64_t v = 0; !all_finite && v < count; ++v) {
    if (!finite[v]) fill(p.indices + (first + v) * p.layers, p.layers, int64_t{0});
  }
}

// float64 vectors take the deciding search alone.
template <>
void search_group<double>(const Problem& p, int64_t first, int64_t count, float*, double* scratch) {
  const double* z = static_cast<const double*>(p.z);
  for (int64_t v = first; v < first + count; ++v) {
    int64_t* codes = p.indices + v * p.layers;
    read_row(z + v * p.z_row, p.z_column, p.dim, scratch);
    const bool finite = is_finite(scratch, p.dim);
    int64_t parent = 0;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      codes[layer] = finite ? exact_code<double, double>(p, v, layer, parent, scratch) : 0;
      parent = p.strict_tree ? row_of(true, p.codebook_size, parent, codes[layer]) : 0;
    }
  }
}

// --- everything that follows from the codes
// ---------------------------------------------------------------------------

template <class T, class W>
VPFAST_INLINE void write_row(const W* from, int64_t dim, T* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(from[d]);
}

template <class W>
VPFAST_INLINE void collect(Table<W>& table, int64_t row, const W* x, int64_t dim) {
  if (row < table.least || row >= table.end) return;
  W* sum = table.sums + (row - table.least) * dim;
  for (int64_t d = 0; d < dim; ++d) sum[d] += x[d];
  if (table.counts) ++table.counts[row - table.least];
}

// Vectors [begin, end) once more, now with their codes: outputs, errors, gradients and sums, as `pass` asks for. Two
// such passes over the same vectors give the same residuals bit for bit. `memory` holds (2 + layers) rows and the
// errors by component (layers, dim).
template <class T, class W, int known_dim>
void follow(const Problem& p, Pass<W>& pass, int64_t begin, int64_t end, W* memory) {
  const int64_t dim = known_dim ? known_dim : p.dim, layers = p.layers;
  W* x = memory;                // the residual
  W* y = memory + dim;          // what is written
  W* after = memory + 2 * dim;  // xi^1 .. xi^n
  W* squares = after + layers * dim;
  if (pass.errors) fill(squares, layers * dim, W(0));

  for (int64_t v = begin; v < end; ++v) {
    const W* codeword[kMaxLayers];
    int64_t row[kMaxLayers], parent = 0;
    for (int64_t layer = 0; layer < layers; ++layer) {
      int64_t code = p.indices[v * layers + layer];
      if (static_cast<uint64_t>(code) >= static_cast<uint64_t>(p.codebook_size)) {
        pass.bad_index = true;
        code = 0;
      }
      parent = row_of(p.strict_tree, p.codebook_size, parent, code);
      row[layer] = p.first_row[layer] + parent;
      codeword[layer] = static_cast<const W*>(p.rows[layer]) + parent * dim;
    }

    bool finite = true;
    if (p.z) {
      read_row(static_cast<const T*>(p.z) + v * p.z_row, p.z_column, dim, x);
      finite = is_finite(x, dim);
    }
    if (pass.quantized) {
      for (int64_t d = 0; d < dim; ++d) y[d] = finite ? codeword[0][d] : W(__builtin_nanf(""));
      for (int64_t layer = 1; layer < layers; ++layer) {
        for (int64_t d = 0; d < dim; ++d) y[d] += codeword[layer][d];
      }
      write_row(y, dim, static_cast<T*>(pass.quantized) + v * dim);
    }
    if (pass.grad_quantized) {
      const T* grad = static_cast<const T*>(pass.grad_quantized) + v * pass.grad_row;
      read_row(grad, pass.grad_column, dim, y);
      if (!pass.grad_z) {  // the gradient of the sum of codewords goes to each of them
        if (p.strict_tree) {
          collect(pass.table, row[layers - 1], y, dim);
        } else {
          for (int64_t layer = 0; layer < layers; ++layer) collect(pass.table, row[layer], y, dim);
        }
        continue;
      }
    } else if (pass.grad_z) {
      fill(y, dim, W(0));
    }

    const bool counted = pass.table.end > pass.table.least && finite;
    if (!pass.errors && !pass.grad_z && !counted) continue;
    for (int64_t layer = 0; layer < layers; ++layer) {
      if (counted && !p.strict_tree && !pass.weights_codebooks) collect(pass.table, row[layer], x, dim);
      for (int64_t d = 0; d < dim; ++d) x[d] -= codeword[layer][d];
      if (pass.errors) {
        W* square = squares + layer * dim;
        for (int64_t d = 0; d < dim; ++d) square[d] += finite ? x[d] * x[d] : W(__builtin_nanf(""));
      }
      if (pass.grad_z) {
        const W weight = pass.weights_z[layer];
        for (int64_t d = 0; d < dim; ++d) y[d] += finite ? weight * x[d] : W(__builtin_nanf(""));
      }
      if (pass.weights_codebooks) write_row(x, dim, after + layer * dim);
    }
    if (pass.grad_z) write_row(y, dim, static_cast<T*>(pass.grad_z) + v * dim);
    if (!counted) continue;
    if (!pass.weights_codebooks) {
      if (p.strict_tree) collect(pass.table, row[layers - 1], x, dim);
      continue;
    }
    for (int64_t layer = 0; layer < layers; ++layer) {
      if (row[layer] < pass.table.least || row[layer] >= pass.table.end) continue;
      fill(y, dim, W(0));
      for (int64_t other = layer; other < layers; ++other) {
        const W weight = pass.weights_codebooks[layer * layers + other];
        if (weight == 0) continue;
        for (int64_t d = 0; d < dim; ++d) y[d] += weight * after[other * dim + d];
      }
      collect(pass.table, row[layer], y, dim);
    }
  }
  if (!pass.errors) return;
  for (int64_t layer = 0; layer < layers; ++layer) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += squares[layer * dim + d];
    pass.errors[layer] += sum;
  }
}

template <class T, class W>
void follow_codes(const Problem& p, Pass<W>& pass, int64_t begin, int64_t end, W* memory) {
  if (p.dim == 8) return follow<T, W, 8>(p, pass, begin, end, memory);
  if (p.dim == 4) return follow<T, W, 4>(p, pass, begin, end, memory);
  follow<T, W, 0>(p, pass, begin, end, memory);
}
