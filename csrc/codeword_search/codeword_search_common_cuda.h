// What the CUDA kernels of codeword_search share: the problem as they see it, reading and writing every type, and the
// deciding search in float64 by a warp.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "codeword_search/codeword_search_math.h"
#include "common/simt.h"

namespace vpfast::gpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;

// How numbers lie in memory. Kernels are compiled for the working type W alone, float or double, and ask for this where
// they read and write: one branch, the same for all threads.
enum class Type : int32_t { float32, float16, bfloat16, float64 };

// Rows and columns in elements.
struct Matrix {
  const void* data;
  int64_t row, column;
  Type type;
};

template <class W>
__device__ inline W read(const void* from, int64_t at, Type type) {
  if constexpr (sizeof(W) == 8) {
    return static_cast<const double*>(from)[at];
  } else {
    if (type == Type::float32) return static_cast<const float*>(from)[at];
    if (type == Type::float16) return static_cast<float>(static_cast<const Half*>(from)[at]);
    return static_cast<float>(static_cast<const BFloat16*>(from)[at]);
  }
}

template <class W>
__device__ inline W read(const Matrix& m, int64_t row, int64_t column) {
  return read<W>(m.data, row * m.row + column * m.column, m.type);
}

template <class W>
__device__ inline void write(void* to, int64_t at, Type type, W value) {
  if constexpr (sizeof(W) == 8) {
    static_cast<double*>(to)[at] = value;
  } else {
    if (type == Type::float32) {
      static_cast<float*>(to)[at] = value;
    } else if (type == Type::float16) {
      static_cast<Half*>(to)[at] = static_cast<Half>(value);
    } else {
      static_cast<BFloat16*>(to)[at] = static_cast<BFloat16>(value);
    }
  }
}

template <class W>
__device__ inline bool is_finite(W x) {
  return x - x == 0;
}

__device__ inline float infinity() { return __builtin_inff(); }
__device__ inline float not_a_number() { return __builtin_nanf(""); }

// One call. `rows` are the codewords of each layer (rows, dim) in the working type, dense; `first_row` says where a
// layer's rows start among those of all layers.
struct Problem {
  int64_t vectors, dim;
  int32_t layers, codebook_size;
  bool strict_tree;
  Matrix z;
  const void* rows[kMaxLayers];
  int64_t first_row[kMaxLayers];
  int64_t* indices;  // (vectors, layers)
  void* quantized;   // (vectors, dim)
};

__device__ inline int lane_id() { return threadIdx.x % kWarp; }
__device__ inline int warp_id() { return threadIdx.x / kWarp; }

// Of a vector the codes of the layers above, `step` apart.
struct Above {
  const int32_t* codes;
  int step;
};

// The deciding search, by all lanes of a warp for one vector: in float64 the nearest of two codes or, where `second` is
// negative, of all: the lowest of equals, and never one whose distance is NaN or infinite (0 where there is no other).
// Distances are those of the CPU's `decide`, term by term and rounded alike: fused products would part distances that
// are equal but for the order of their terms.
template <class W>
__device__ inline int decide(const Problem& p, int64_t vector, int layer, Above above, int first, int second) {
  const W* codewords[kMaxLayers];
  int64_t parent = 0;
  for (int a = 0; a < layer; ++a) {
    parent = row_of(p.strict_tree, p.codebook_size, parent, above.codes[a * above.step]);
    codewords[a] = static_cast<const W*>(p.rows[a]) + parent * p.dim;
  }
  const int candidates = second < 0 ? p.codebook_size : 2;
  double least = infinity();
  int nearest = 0;
  for (int k = lane_id(); k < candidates; k += kWarp) {
    const int code = second < 0 ? k : k == 0 ? min(first, second) : max(first, second);
    const int64_t row = row_of(p.strict_tree, p.codebook_size, parent, code);
    const W* codeword = static_cast<const W*>(p.rows[layer]) + row * p.dim;
    double distance = 0;
#pragma unroll 1
    for (int64_t d = 0; d < p.dim; ++d) {
      double residual = static_cast<double>(read<W>(p.z, vector, d));
      for (int a = 0; a < layer; ++a) residual -= static_cast<double>(codewords[a][d]);
      const double difference = residual - static_cast<double>(codeword[d]);
      distance = simt::rounded_sum(distance, simt::rounded_product(difference, difference));
    }
    if (distance < least) {
      least = distance;
      nearest = code;
    }
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double distance = __shfl_xor_sync(kAll, least, step);
    const int code = __shfl_xor_sync(kAll, nearest, step);
    if (distance < least || (distance == least && code < nearest)) {
      least = distance;
      nearest = code;
    }
  }
  return nearest;
}

}  // namespace vpfast::gpu
