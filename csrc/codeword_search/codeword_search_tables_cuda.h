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

constexpr int small_vectors(int dim) { return dim <= 8 ? 4 : 2; }  // of a thread
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

// Codewords start at 16 bytes.
template <int D>
__device__ inline void read_codeword(const Problem& p, int layer, int row, float (&x)[D]) {
  const float* from = static_cast<const float*>(p.rows[layer]) + static_cast<int64_t>(row) * p.dim;
  if (p.dim == D) {
#pragma unroll
    for (int d = 0; d < D; d += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + d));
      x[d] = four.x, x[d + 1] = four.y, x[d + 2] = four.z, x[d + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int d = 0; d < D; ++d) x[d] = d < p.dim ? __ldg(from + d) : 0.0f;
  }
}

// A codeword as it is laid out: zeros and a bias of -infinity where it is not finite and never wins.
template <int D>
struct Entry {
  float codeword[D], sum[D];  // `sum`: of the codewords down to it, added in the order of the layers
  double bias, length;

  __device__ Entry(const Problem& p, int layer, int row) {
    float above[D] = {};
    double product = 0, square = 0;
    read_codeword(p, layer, row, codeword);
#pragma unroll
    for (int d = 0; d < D; ++d) sum[d] = 0;
    int fan = 1;
    for (int a = 0; p.strict_tree && a < layer; ++a) fan *= p.codebook_size;
#pragma unroll(D <= 8 ? 2 : 1)
    for (int a = 0; p.strict_tree && a < layer; ++a, fan /= p.codebook_size) {
      read_codeword(p, a, row / fan, above);
#pragma unroll
      for (int d = 0; d < D; ++d) {
        sum[d] += above[d];
        product += static_cast<double>(above[d]) * static_cast<double>(codeword[d]);
      }
    }
#pragma unroll
    for (int d = 0; d < D; ++d) {
      sum[d] += codeword[d];
      square += static_cast<double>(codeword[d]) * static_cast<double>(codeword[d]);
    }
    length = sqrt(square);
    bias = -square / 2 - product;
    if (is_finite(bias)) return;
    bias = -infinity();
#pragma unroll
    for (int d = 0; d < D; ++d) codeword[d] = 0;
  }
};

// Lengths are not negative, and so order as their bits do.
__device__ inline void lower(float* to, float x) { atomicMin(reinterpret_cast<unsigned*>(to), __float_as_uint(x)); }
__device__ inline void raise(float* to, float x) { atomicMax(reinterpret_cast<unsigned*>(to), __float_as_uint(x)); }

// Which codeword a thread lays out: one of all layers' with what fills the blocks up.
struct Laid {
  int layer = 0, codebooks = 1, first_codebook = 0, place;

  __device__ Laid(const Problem& p, int padded, int index) : place(index) {
    for (; layer < p.layers && place >= codebooks * padded; ++layer) {
      place -= codebooks * padded;
      first_codebook += codebooks;
      if (p.strict_tree) codebooks *= p.codebook_size;
    }
  }
};

// Beside each other lie the two of a pair: the second lane takes the difference. All lanes of a warp come here.
template <int D>
__device__ void place_pair(const SmallLayout& s, const Laid& at, bool exists, const Entry<D>& entry, float* memory) {
  const double less = __shfl_xor_sync(kAll, entry.bias, 1),
               bias = entry.bias > -infinity() ? entry.bias - less : entry.bias;
  const bool second = exists && at.place % 2 == 1;
  const int codebook = at.place / 2;
  if (second) memory[s.biases[at.layer] + codebook] = static_cast<float>(bias);
#pragma unroll
  for (int d = 0; d < D; ++d) {
    const float difference = entry.codeword[d] - __shfl_xor_sync(kAll, entry.codeword[d], 1);
    if (second) memory[s.codewords[at.layer] + (d / 4 * at.codebooks + codebook) * 4 + d % 4] = difference;
  }
}

template <int D>
__device__ void place_codeword(const SmallLayout& s, const Laid& at, bool exists, const Entry<D>& entry,
                               float* memory) {
  const int block = at.place >> s.width_bits, place = at.place & (s.width - 1);
  float* to = memory + s.codewords[at.layer] + block * s.width * D + place * 4;
#pragma unroll
  for (int d = 0; d < D; ++d) to[d / 4 * s.width * 4 + d % 4] = exists ? entry.codeword[d] : 0.0f;
  float* biases = memory + s.biases[at.layer] + block * s.width * kBiasCopies + place;
  const float bias = exists ? static_cast<float>(entry.bias) : -infinity();
  for (int copy = 0; copy < kBiasCopies; ++copy) biases[copy * s.width] = bias;
}

// By all threads of a block, from the codewords in global memory. All layers in one go, for their latencies to overlap.
template <int D>
__device__ void lay_out_codebooks(const Problem& p, const SmallLayout& s, float* memory) {
  LengthsOf<float>* lengths = reinterpret_cast<LengthsOf<float>*>(memory + s.lengths);
  float* shortest = memory + s.staged;
  const int size = p.codebook_size, padded = s.pairs ? 2 : s.blocks * s.width;
  int codewords = 0, all_codebooks = 0;
  for (int layer = 0, codebooks = 1; layer < p.layers; ++layer) {
    codewords += codebooks * padded;
    all_codebooks += codebooks;
    if (p.strict_tree) codebooks *= size;
  }
  for (int k = threadIdx.x; k < all_codebooks; k += blockDim.x) shortest[k] = infinity();
  for (int k = threadIdx.x; k < 2 * kMaxLayers; k += blockDim.x) memory[s.lengths + k] = 0;
  __syncthreads();
  for (int start = 0; start < codewords; start += blockDim.x) {
    const int index = start + threadIdx.x;
    const Laid at(p, padded, min(index, codewords - 1));
    const int codebook = at.place / padded, code = at.place % padded, row = codebook * size + code;
    const bool mine = index < codewords, exists = mine && code < size;
    const Entry<D> entry(p, at.layer, exists ? row : 0);
    if (exists && is_finite(entry.length)) {
      raise(&lengths[at.layer].longest, static_cast<float>(entry.length));
      lower(shortest + at.first_codebook + codebook, static_cast<float>(entry.length));
    }
    if (s.pairs) {
      place_pair(s, at, exists, entry, memory);
    } else if (mine) {
      place_codeword(s, at, exists, entry, memory);
    }
    if (!exists || !p.strict_tree || at.layer + 1 < p.layers) continue;
#pragma unroll
    for (int d = 0; d < D; ++d) memory[s.leaves + row * D + d] = entry.sum[d];
  }
  __syncthreads();
  for (int layer = 0, codebooks = 1, first = 0; layer < p.layers; ++layer) {
    for (int k = threadIdx.x; k < codebooks; k += blockDim.x) raise(&lengths[layer].shortest, shortest[first + k]);
    first += codebooks;
    if (p.strict_tree) codebooks *= size;
  }
  __syncthreads();
}

}  // namespace vpfast::gpu
