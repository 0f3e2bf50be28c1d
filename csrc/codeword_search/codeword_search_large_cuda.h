// The search where codebooks or vectors are too large for codeword_search_small_cuda.h.
//
// Story. First `measure_codewords` takes each codeword's bias -|e|^2 / 2 and each layer's Lengths, on the device. Then
// one of two ways:
//   scan_tiles   Every vector searches the same codebook (one layer, or layers without a tree). A matrix product of 128
//                vectors with 128 codewords at a time, 8 x 8 a thread in float32, that keeps of each column of threads
//                the best two scores in place of the products. Codewords may be split among blocks where vectors are
//                few. `settle` (a warp a vector) then takes the nearest, or has float64 decide: between two, or among
//                all where more than two are near. A launch of each a layer, for residuals wait for codes; they are
//                formed from z and the codewords above as tiles are read. FFMA limits it: 128 a cycle a
//                multiprocessor; a tile reads 8 bytes a cycle from L2 meanwhile.
//   walk         A warp a vector through all layers, lanes over the codewords of the vector's own codebook: trees of
//   any
//                size. The reading of codewords limits it. In float64 every code is decided, none scanned for.
//
// Never TF32: its scores are a thousand times less certain, and most vectors would need deciding.
#pragma once

#include "codeword_search/codeword_search_common_cuda.h"

namespace vpfast::gpu {

// --- biases and lengths ---

constexpr int kMeasured = 64;  // codewords of one codebook that a block measures

// Codebooks are numbered through all layers. Lengths of all of them, as bits for atomics: `shortest` starts as
// 0x7f7f..., longer than any finite float32 vector that can be scanned for, `longest` as 0.
struct Measures {
  float* biases;  // by row of all layers
  unsigned* shortest;
  unsigned* longest;
  LengthsOf<float>* lengths;  // by layer
};

// Grid: parts of kMeasured codewords of every codebook of the layer. A warp a codeword.
__global__ void __launch_bounds__(kThreads)
    measure_codewords(const __grid_constant__ Problem p, const __grid_constant__ Measures m, int layer,
                      int64_t first_codebook) {
  __shared__ unsigned shortest, longest;
  if (threadIdx.x == 0) {
    shortest = __float_as_uint(infinity());
    longest = 0;
  }
  __syncthreads();
  const int64_t size = p.codebook_size, parts = (size + kMeasured - 1) / kMeasured;
  const int64_t codebook = blockIdx.x / parts, begin = blockIdx.x % parts * kMeasured;
  const int64_t end = min(begin + kMeasured, size);
  for (int64_t code = begin + warp_id(); code < end; code += kWarps) {
    const int64_t row = codebook * size + code;
    const float* codeword = static_cast<const float*>(p.rows[layer]) + row * p.dim;
    double square = 0;
    for (int64_t d = lane_id(); d < p.dim; d += kWarp) {
      const double x = static_cast<double>(codeword[d]);
      square += x * x;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) square += __shfl_xor_sync(kAll, square, step);
    if (lane_id() != 0) continue;
    m.biases[p.first_row[layer] + row] = is_finite(square) ? static_cast<float>(-square / 2) : -infinity();
    if (!is_finite(square)) continue;
    const unsigned length = __float_as_uint(static_cast<float>(sqrt(square)));
    atomicMin(&shortest, length);
    atomicMax(&longest, length);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  atomicMin(m.shortest + first_codebook + codebook, shortest);
  atomicMax(m.longest + first_codebook + codebook, longest);
}

// One block a layer.
__global__ void __launch_bounds__(kThreads)
    gather_lengths(const __grid_constant__ Problem p, const __grid_constant__ Measures m) {
  __shared__ unsigned shortest, longest;
  if (threadIdx.x == 0) shortest = longest = 0;
  __syncthreads();
  const int layer = blockIdx.x;
  int64_t first = 0, codebooks = 1;
  for (int k = 0; k < layer; ++k) {
    first += codebooks;
    if (p.strict_tree) codebooks *= p.codebook_size;
  }
  unsigned own_shortest = 0, own_longest = 0;
  for (int64_t k = threadIdx.x; k < codebooks; k += blockDim.x) {
    own_shortest = max(own_shortest, m.shortest[first + k]);
    own_longest = max(own_longest, m.longest[first + k]);
  }
  atomicMax(&shortest, own_shortest);
  atomicMax(&longest, own_longest);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const bool none = shortest >= 0x7f7f7f7fu;
  m.lengths[layer] = {__uint_as_float(longest), none ? infinity() : __uint_as_float(shortest)};
}

// --- what is known of the best ---

// The best three scores and the codes of two; a code may be unknown (-1).
struct Podium {
  float score[3];
  int32_t code[2];

  __device__ void reset() {
    for (int k = 0; k < 3; ++k) score[k] = -infinity();
    code[0] = 0;
    code[1] = -1;
  }
  __device__ void challenge(float x, int from) {
    if (x > score[0]) {
      score[2] = score[1];
      score[1] = score[0];
      code[1] = code[0];
      score[0] = x;
      code[0] = from;
    } else if (x > score[1]) {
      score[2] = score[1];
      score[1] = x;
      code[1] = from;
    } else if (x > score[2]) {
      score[2] = x;
    }
  }
  __device__ void challenge(const Podium& other) {
    challenge(other.score[0], other.code[0]);
    challenge(other.score[1], other.code[1]);
    challenge(other.score[2], -1);
  }
};

// The code that a warp takes: the best, or what float64 decides.
template <class W>
__device__ inline int settle_code(const Problem& p, int64_t vector, int layer, Above above, const Podium& found,
                                  float margin) {
  const float bar = found.score[0] - margin;
  if (found.score[1] < bar) return found.code[0];
  const bool two = found.score[2] < bar && found.code[1] >= 0;
  return decide<W>(p, vector, layer, above, two ? found.code[0] : 0, two ? found.code[1] : -1);
}

__device__ inline float margin_at(const Problem& p, const LengthsOf<float>* lengths, int layer, float length) {
  for (int a = 0; a < layer; ++a) length += reach(length, lengths[a]);
  return uncertainty(p.dim, layer, length, lengths[layer]);
}

// Of one vector, by a warp: is it finite, and the largest |z|.
template <class W>
struct Extent {
  bool finite = true;
  float length;

  __device__ Extent(const Problem& p, int64_t vector) {
    float largest = 0;
    for (int64_t d = lane_id(); d < p.dim; d += kWarp) {
      const W x = read<W>(p.z, vector, d);
      finite = finite && is_finite(x);
      largest = fmaxf(largest, fabsf(static_cast<float>(x)));
    }
    finite = __all_sync(kAll, finite);
    largest = __uint_as_float(__reduce_max_sync(kAll, __float_as_uint(largest)));
    length = sqrtf(static_cast<float>(p.dim)) * largest * 1.00001f;
  }
};

// quantized = e^1 + ... + e^n of one vector, by a warp; NaN where z is not finite.
template <class W>
__device__ void write_sum(const Problem& p, int64_t vector, bool finite, Above codes) {
  for (int64_t d = lane_id(); d < p.dim; d += kWarp) {
    W sum = 0;
    int64_t row = 0;
    for (int layer = 0; layer < p.layers; ++layer) {
      row = row_of(p.strict_tree, p.codebook_size, row, codes.codes[layer * codes.step]);
      sum += static_cast<const W*>(p.rows[layer])[row * p.dim + d];
    }
    write(p.quantized, vector * p.dim + d, p.z.type, finite ? sum : static_cast<W>(not_a_number()));
  }
}

// --- walking ---

// The best scores of a vector's own codebook, from the residual in shared memory.
__device__ inline Podium scan_codebook(const Problem& p, const float* biases, int layer, int64_t parent,
                                       const float* residual) {
  Podium best;
  best.reset();
  const int size = p.codebook_size;
  for (int code = lane_id(); code < size; code += kWarp) {
    const int64_t row = row_of(p.strict_tree, size, parent, code);
    const float* codeword = static_cast<const float*>(p.rows[layer]) + row * p.dim;
    float score = biases[p.first_row[layer] + row];
    if (score == -infinity()) continue;  // not finite: never wins
    for (int64_t d = 0; d < p.dim; ++d) score = fmaf(codeword[d], residual[d], score);
    best.challenge(score, code);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Podium other;
    for (int k = 0; k < 3; ++k) other.score[k] = __shfl_xor_sync(kAll, best.score[k], step);
    for (int k = 0; k < 2; ++k) other.code[k] = __shfl_xor_sync(kAll, best.code[k], step);
    best.challenge(other);
  }
  // Of equals each lane may have kept another; only an unsure search has any.
  for (int k = 0; k < 2; ++k) best.code[k] = __shfl_sync(kAll, best.code[k], 0);
  return best;
}

// With `scan` (for float alone) shared memory holds a residual (dim) by warp; without, every code is decided.
template <class W, bool scan>
__global__ void __launch_bounds__(kThreads, 4)
    walk(const __grid_constant__ Problem p, const __grid_constant__ Measures m) {
  extern __shared__ float4 shared_memory[];
  __shared__ int32_t all_codes[kWarps][kMaxLayers];
  float* residual = reinterpret_cast<float*>(shared_memory) + warp_id() * p.dim;
  int32_t* codes = all_codes[warp_id()];
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  int64_t vector = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp_id();
  for (; vector < p.vectors; vector += warps) {
    const Extent<W> extent(p, vector);
    int64_t row = 0;
    for (int64_t d = lane_id(); scan && d < p.dim; d += kWarp) residual[d] = read<W>(p.z, vector, d);
    for (int layer = 0; layer < p.layers; ++layer) {
      __syncwarp();
      int code = 0;  // what a vector that is not finite takes
      if constexpr (scan) {
        const Podium found = scan_codebook(p, m.biases, layer, row, residual);
        const float margin = margin_at(p, m.lengths, layer, extent.length);
        if (extent.finite) code = settle_code<W>(p, vector, layer, {codes, 1}, found, margin);
        __syncwarp();
        row = row_of(p.strict_tree, p.codebook_size, row, code);
        const W* codeword = static_cast<const W*>(p.rows[layer]) + row * p.dim;
        for (int64_t d = lane_id(); d < p.dim; d += kWarp) residual[d] -= codeword[d];
      } else {
        if (extent.finite) code = decide<W>(p, vector, layer, {codes, 1}, 0, -1);
        __syncwarp();
      }
      if (lane_id() == 0) {
        codes[layer] = code;
        p.indices[vector * p.layers + layer] = code;
      }
    }
    __syncwarp();
    write_sum<W>(p, vector, extent.finite, {codes, 1});
    __syncwarp();
  }
}

// --- tiles ---

constexpr int kTile = 128;    // vectors, and codewords
constexpr int kDepth = 8;     // components at a time
constexpr int kColumns = 16;  // of threads, each with 8 codewords of a tile

// The vectors [first, first + count) of a call against the codebook of one layer, its codewords in `splits` parts.
struct Tiles {
  int64_t first;
  int32_t count, layer, splits;
  Podium* podiums;  // (count, splits)
};

// Eight numbers of a tile's row that each thread holds: four from each half, for threads beside each other to read
// neighbouring banks.
struct Eight {
  float x[8];
  __device__ Eight(const float* row, int place) {
    const float4 low = *reinterpret_cast<const float4*>(row + 4 * place);
    const float4 high = *reinterpret_cast<const float4*>(row + kTile / 2 + 4 * place);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
  __device__ static int index(int place, int k) { return k < 4 ? 4 * place + k : kTile / 2 + 4 * place + k - 4; }
};

// A thread's part of a slice of kDepth components of 128 rows: four components of one row, on their way from global to
// shared memory.
struct Slice {
  float x[4];

  __device__ static int row() { return threadIdx.x % kTile; }
  __device__ static int depth() { return threadIdx.x / kTile * 4; }
  __device__ void put(float (*to)[kTile]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) to[depth() + k][row()] = x[k];
  }
  // Zeros where a codeword never wins.
  __device__ void read_codeword(const Problem& p, const float* codewords, int64_t code, bool wins, int64_t d) {
    const float* from = codewords + code * p.dim + d;
    if (wins && p.dim % 4 == 0 && d < p.dim) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = wins && d + k < p.dim ? from[k] : 0.0f;
    }
  }
  // z less the codewords of the layers above.
  __device__ void read_residual(const Problem& p, int64_t vector, int layer, bool counts, int64_t d) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = counts && d + k < p.dim ? gpu::read<float>(p.z, vector, d + k) : 0.0f;
    for (int a = 0; a < layer && counts; ++a) {
      const float* above = static_cast<const float*>(p.rows[a]) + p.indices[vector * p.layers + a] * p.dim + d;
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] -= d + k < p.dim ? above[k] : 0.0f;
    }
  }
};

// The best of each thread's columns wait here while products take the registers.
struct alignas(sizeof(float4)) TileMemory {
  float vectors[2][kDepth][kTile];
  float codewords[2][kDepth][kTile];
  float first[8][kThreads], second[8][kThreads];
  int32_t code[8][kThreads];
};

// The products of a tile's vectors and codewords, 8 x 8 a thread.
__device__ inline void multiply_tile(const Problem& p, const Tiles& t, const float* biases, int64_t vector, bool counts,
                                     int64_t first_code, int64_t end, TileMemory& memory, float (&score)[8][8]) {
  const int column = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const float* codewords = static_cast<const float*>(p.rows[t.layer]);
  const int64_t code = first_code + Slice::row();
  const bool wins = code < end && biases[code] > -infinity();
  Slice vectors_part, codewords_part;
  const auto fetch = [&](int64_t d) {
    vectors_part.read_residual(p, vector, t.layer, counts, d + Slice::depth());
    codewords_part.read_codeword(p, codewords, code, wins, d + Slice::depth());
  };
  const auto put = [&](int stage) {
    vectors_part.put(memory.vectors[stage]);
    codewords_part.put(memory.codewords[stage]);
  };
  fetch(0);
  put(0);
  __syncthreads();
  int stage = 0;
  for (int64_t d = 0; d < p.dim; d += kDepth, stage ^= 1) {
    const bool more = d + kDepth < p.dim;
    if (more) fetch(d + kDepth);
#pragma unroll 2
    for (int k = 0; k < kDepth; ++k) {
      const Eight a(memory.vectors[stage][k], line), b(memory.codewords[stage][k], column);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) score[i][j] = fmaf(a.x[i], b.x[j], score[i][j]);
      }
    }
    if (more) put(stage ^ 1);
    __syncthreads();  // the other stage is whole, and nobody reads this one any more
  }
}

// Grid: tiles of vectors x splits.
__global__ void __launch_bounds__(kThreads, 2)
    scan_tiles(const __grid_constant__ Problem p, const __grid_constant__ Measures m, const __grid_constant__ Tiles t) {
  __shared__ TileMemory memory;
  const int column = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const int64_t size = p.codebook_size, tiles = (size + kTile - 1) / kTile;
  const int64_t begin = tiles * blockIdx.y / t.splits * kTile;
  const int64_t end = min(tiles * (blockIdx.y + 1) / t.splits * kTile, size);
  const int tile = blockIdx.x * kTile, own = tile + Slice::row();
  const float* biases = m.biases + p.first_row[t.layer];
  for (int i = 0; i < 8; ++i) {
    memory.first[i][threadIdx.x] = memory.second[i][threadIdx.x] = -infinity();
    memory.code[i][threadIdx.x] = 0;
  }
  for (int64_t start = begin; start < end; start += kTile) {
    float score[8][8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t k = start + Eight::index(column, j);
      const float bias = k < end ? biases[k] : -infinity();
#pragma unroll
      for (int i = 0; i < 8; ++i) score[i][j] = bias;
    }
    multiply_tile(p, t, biases, t.first + own, own < t.count, start, end, memory, score);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float first = memory.first[i][threadIdx.x], second = memory.second[i][threadIdx.x];
      int code = memory.code[i][threadIdx.x];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        second = fmaxf(second, fminf(first, score[i][j]));
        code = score[i][j] > first ? static_cast<int>(start) + Eight::index(column, j) : code;
        first = fmaxf(first, score[i][j]);
      }
      memory.first[i][threadIdx.x] = first;
      memory.second[i][threadIdx.x] = second;
      memory.code[i][threadIdx.x] = code;
    }
  }
  for (int i = 0; i < 8; ++i) {
    const float first = memory.first[i][threadIdx.x], second = memory.second[i][threadIdx.x];
    const int code = memory.code[i][threadIdx.x];
    Podium best;
    best.reset();
    // Every thread hears of all columns in the same order.
    for (int c = 0; c < kColumns; ++c) {
      best.challenge(__shfl_sync(kAll, first, c, kColumns), __shfl_sync(kAll, code, c, kColumns));
      best.challenge(__shfl_sync(kAll, second, c, kColumns), -1);
    }
    const int64_t vector = tile + Eight::index(line, i);
    if (column == 0 && vector < t.count) t.podiums[vector * t.splits + blockIdx.y] = best;
  }
}

// A warp a vector: the code of this layer, and after the last the sum of codewords.
__global__ void __launch_bounds__(kThreads, 2)
    settle(const __grid_constant__ Problem p, const __grid_constant__ Measures m, const __grid_constant__ Tiles t) {
  __shared__ int32_t all_codes[kWarps][kMaxLayers];
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(), vector = t.first + place;
  if (place >= t.count) return;
  int32_t* codes = all_codes[warp_id()];
  if (lane_id() < t.layer) codes[lane_id()] = static_cast<int32_t>(p.indices[vector * p.layers + lane_id()]);
  __syncwarp();
  const Extent<float> extent(p, vector);
  int code = 0;
  if (extent.finite) {
    Podium best;
    best.reset();
    for (int k = 0; k < t.splits; ++k) best.challenge(t.podiums[place * t.splits + k]);
    const float margin = margin_at(p, m.lengths, t.layer, extent.length);
    code = settle_code<float>(p, vector, t.layer, {codes, 1}, best, margin);
  }
  if (lane_id() == 0) {
    p.indices[vector * p.layers + t.layer] = code;
    codes[t.layer] = code;
  }
  __syncwarp();
  if (t.layer + 1 == p.layers) write_sum<float>(p, vector, extent.finite, {codes, 1});
}

}  // namespace vpfast::gpu
