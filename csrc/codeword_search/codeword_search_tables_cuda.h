// The codebooks of a small problem laid out in a block's shared memory: where, and by whom. What for, see
// codeword_search_small_cuda.h.
#pragma once

#include "codeword_search/codeword_search_common_cuda.h"

namespace vpfast::gpu {

constexpr int kLargestSmallDim = 16;
constexpr int kBiasCopies = 4;

// Where things lie in shared memory, in words of four bytes.
//   codewords   by layer [codebook][block of `width`][dim / 4][width][4]; of pairs [dim / 4][codebook][4]
//   biases      by layer [codebook][block][copy][width]; of pairs [codebook]
//   leaves      of a tree: [leaf][dim], sums of the codewords down to it
//   lengths     by layer LengthsOf<float>
//   staged      by warp [layer][slot]: codes; then [slot]: the leaf, 0 without a tree, -1 where z is not finite
// `shortest`, by codebook of all layers, is only needed while codewords are laid out, and lies where codes will.
struct SmallLayout {
  int32_t codewords[kMaxLayers], biases[kMaxLayers];
  int32_t leaves, lengths, staged, words;
  int32_t width_bits, width, blocks;  // of a codebook; codewords beyond M never win
  bool pairs;
  bool whole_rows;  // z can be read and quantized written in pieces of up to 16 bytes
};

inline int small_vectors(int dim) { return dim <= 8 ? 4 : 2; }
inline int padded_dim(int64_t dim) { return dim <= 4 ? 4 : dim <= 8 ? 8 : 16; }

// false where 32-bit offsets end: far beyond any shared memory.
inline bool lay_out(const Problem& p, SmallLayout& s) {
  const int64_t size = p.codebook_size, dim = padded_dim(p.dim);
  s.pairs = p.strict_tree && size == 2;
  s.width_bits = size > 4 ? 3 : 2;
  s.width = 1 << s.width_bits;
  s.blocks = static_cast<int32_t>((size + s.width - 1) / s.width);
  int64_t words = 0, codebooks = 1, all_codebooks = 0;
  for (int layer = 0; layer < p.layers; ++layer) {
    const int64_t floats = s.pairs ? codebooks * dim : codebooks * s.blocks * s.width * dim;
    const int64_t biases = s.pairs ? codebooks : codebooks * s.blocks * s.width * kBiasCopies;
    s.codewords[layer] = static_cast<int32_t>(words);
    s.biases[layer] = static_cast<int32_t>(words + floats);
    words += (floats + biases + 31) / 32 * 32;
    all_codebooks += codebooks;
    if (p.strict_tree) codebooks *= size;
    if (words > (1 << 24) || codebooks > (1 << 24)) return false;
  }
  s.leaves = static_cast<int32_t>(words);
  if (p.strict_tree) words += codebooks * dim;
  s.lengths = static_cast<int32_t>(words);
  words += 2 * kMaxLayers;
  s.staged = static_cast<int32_t>(words);
  const int64_t staged = int64_t{kThreads} * small_vectors(static_cast<int>(dim)) * (p.layers + 1);
  words += staged > all_codebooks ? staged : all_codebooks;
  s.words = static_cast<int32_t>(words);
  return words <= (1 << 24);
}

__device__ inline const float* codeword_at(const Problem& p, int layer, int row) {
  return static_cast<const float*>(p.rows[layer]) + static_cast<int64_t>(row) * p.dim;
}

// What a codeword adds to its scores, -infinity where it is not finite and never wins, and its length.
template <int D>
struct Entry {
  double bias, length;

  __device__ Entry(const Problem& p, int layer, int row) {
    double above[D];
#pragma unroll
    for (int d = 0; d < D; ++d) above[d] = 0;
    for (int a = layer - 1; p.strict_tree && a >= 0; --a) {
      const int ancestor = ancestor_of(p, layer - a, row);
      const float* from = codeword_at(p, a, ancestor);
#pragma unroll
      for (int d = 0; d < D; ++d) above[d] += d < p.dim ? static_cast<double>(from[d]) : 0;
    }
    const float* from = codeword_at(p, layer, row);
    double square = 0, product = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const double x = d < p.dim ? static_cast<double>(from[d]) : 0;
      square += x * x;
      product += above[d] * x;
    }
    length = sqrt(square);
    bias = -square / 2 - product;
    if (!is_finite(bias)) bias = -static_cast<double>(infinity());
  }
  __device__ bool wins() const { return bias > -infinity(); }

  // The row `up` layers above.
  __device__ static int ancestor_of(const Problem& p, int up, int row) {
    for (int k = 0; k < up; ++k) row /= p.codebook_size;
    return row;
  }
};

// Lengths are not negative, and so order as their bits do.
__device__ inline void lower(float* to, float x) { atomicMin(reinterpret_cast<unsigned*>(to), __float_as_uint(x)); }
__device__ inline void raise(float* to, float x) { atomicMax(reinterpret_cast<unsigned*>(to), __float_as_uint(x)); }

template <int D>
__device__ void place_pair(const Problem& p, const SmallLayout& s, int layer, int codebook, int codebooks,
                           float* memory) {
  const Entry<D> first(p, layer, 2 * codebook), second(p, layer, 2 * codebook + 1);
  const float* codewords = codeword_at(p, layer, 2 * codebook);
  float* to = memory + s.codewords[layer] + 4 * codebook;
  for (int d = 0; d < D; ++d) {
    const float less = first.wins() && d < p.dim ? codewords[d] : 0.0f;
    const float more = second.wins() && d < p.dim ? codewords[p.dim + d] : 0.0f;
    to[d / 4 * codebooks * 4 + d % 4] = more - less;
  }
  const double bias = second.wins() ? second.bias - first.bias : -infinity();
  memory[s.biases[layer] + codebook] = static_cast<float>(bias);
}

template <int D>
__device__ void place_codeword(const Problem& p, const SmallLayout& s, int layer, int row, double bias, int place,
                               float* memory) {
  const float* codeword = codeword_at(p, layer, row);
  float* to = memory + s.codewords[layer] + place / s.width * s.width * D + place % s.width * 4;
  for (int d = 0; d < D; ++d) {
    to[d / 4 * s.width * 4 + d % 4] = bias > -infinity() && d < p.dim ? codeword[d] : 0.0f;
  }
  float* biases = memory + s.biases[layer] + place / s.width * s.width * kBiasCopies + place % s.width;
  for (int copy = 0; copy < kBiasCopies; ++copy) biases[copy * s.width] = static_cast<float>(bias);
}

template <int D>
__device__ void lay_out_layer(const Problem& p, const SmallLayout& s, int layer, int codebooks, float* memory,
                              float* shortest) {
  const int size = p.codebook_size, padded = s.blocks * s.width;
  LengthsOf<float>* lengths = reinterpret_cast<LengthsOf<float>*>(memory + s.lengths);
  for (int k = threadIdx.x; k < codebooks * padded; k += blockDim.x) {
    const int codebook = k / padded, code = k % padded;
    const bool exists = code < size;
    const int row = codebook * size + (exists ? code : 0);
    const Entry<D> entry(p, layer, row);
    if (exists && is_finite(entry.length)) {
      raise(&lengths[layer].longest, static_cast<float>(entry.length));
      lower(shortest + codebook, static_cast<float>(entry.length));
    }
    const double never = -infinity();
    if (!s.pairs) place_codeword<D>(p, s, layer, row, exists ? entry.bias : never, k, memory);
  }
  for (int k = threadIdx.x; s.pairs && k < codebooks; k += blockDim.x) {
    place_pair<D>(p, s, layer, k, codebooks, memory);
  }
}

// The sums of codewords down to each leaf, added in the order of the layers.
template <int D>
__device__ void lay_out_leaves(const Problem& p, const SmallLayout& s, int leaves, float* memory) {
  for (int k = threadIdx.x; k < leaves * D; k += blockDim.x) {
    const int leaf = k / D, d = k % D;
    float sum = 0;
    for (int layer = 0; layer < p.layers && d < p.dim; ++layer) {
      sum += codeword_at(p, layer, Entry<D>::ancestor_of(p, p.layers - 1 - layer, leaf))[d];
    }
    memory[s.leaves + k] = sum;
  }
}

// By all threads of a block, from the codewords in global memory.
template <int D>
__device__ void lay_out_codebooks(const Problem& p, const SmallLayout& s, float* memory) {
  LengthsOf<float>* lengths = reinterpret_cast<LengthsOf<float>*>(memory + s.lengths);
  float* shortest = memory + s.staged;
  int all_codebooks = 0;
  for (int layer = 0, codebooks = 1; layer < p.layers; ++layer) {
    all_codebooks += codebooks;
    if (p.strict_tree) codebooks *= p.codebook_size;
  }
  for (int k = threadIdx.x; k < all_codebooks; k += blockDim.x) shortest[k] = infinity();
  for (int k = threadIdx.x; k < 2 * kMaxLayers; k += blockDim.x) memory[s.lengths + k] = 0;
  __syncthreads();
  for (int layer = 0, codebooks = 1, first = 0; layer < p.layers; ++layer) {
    lay_out_layer<D>(p, s, layer, codebooks, memory, shortest + first);
    first += codebooks;
    if (p.strict_tree) codebooks *= p.codebook_size;
    if (p.strict_tree && layer + 1 == p.layers) lay_out_leaves<D>(p, s, codebooks, memory);
  }
  __syncthreads();
  for (int layer = 0, codebooks = 1, first = 0; layer < p.layers; ++layer) {
    for (int k = threadIdx.x; k < codebooks; k += blockDim.x) raise(&lengths[layer].shortest, shortest[first + k]);
    first += codebooks;
    if (p.strict_tree) codebooks *= p.codebook_size;
  }
  __syncthreads();
}

}  // namespace vpfast::gpu
