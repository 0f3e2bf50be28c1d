// The search where all codebooks fit into a multiprocessor's shared memory and vectors into registers (D up to 16).
//
// Story. Blocks stay on their multiprocessors and lay the codebooks out in shared memory once. Then each warp takes
// tiles of 32 * kVectors vectors, kVectors a thread, through all layers: z is read once, by whole rows, and the next
// tile's while results go out. What limits it is shared memory, at 128 bytes a cycle; for a vector of 8 numbers in a
// tree of 3 x 8:
//   layer 1       9 floats of 8 codewords, the same for all lanes and read once for all vectors of a thread
//   layers 2, 3   288 bytes each, from a codebook of the vector's own
//   results       32 bytes of a table of sums of codewords, and the codes' way to neighbouring addresses
// That is about 220 cycles a multiprocessor for 32 vectors; arithmetic takes about 110, and memory's part of the 88
// bytes a vector about 150 on an H200.
//
// Three things keep it there. (1) In a tree no residual is formed: with s the sum of the codewords above, xi . e -
// |e|^2 / 2 = z . e - (s . e + |e|^2 / 2), and the bracket belongs to the codeword. (2) Where lanes read codebooks of
// their own, lane l starts at codeword l and goes round: eight lanes that are served together read eight different
// codewords, each from its own four banks, whatever the codebooks. Biases lie there four times over, once for each
// eight lanes. (3) Codes pass through shared memory, so that whole lines are written.
//
// A tree of two (M = 2) keeps the difference of each pair and the sign of one product.
#pragma once

#include "codeword_search/codeword_search_tables_cuda.h"

namespace vpfast::gpu {

// A tile: kVectors a thread, as many as registers hold.
template <int D>
struct Small {
  static constexpr int kVectors = small_vectors(D);
  static constexpr int kSlots = kWarp * kVectors;
};

// --- reading vectors ---

template <int bytes>
struct alignas(bytes) Piece {
  char raw[bytes];
};

template <class T, int D>
__device__ inline void read_row(const T* from, float (&x)[D]) {
  constexpr int bytes = D * sizeof(T) < 16 ? D * sizeof(T) : 16, count = bytes / sizeof(T);
#pragma unroll
  for (int d = 0; d < D; d += count) {
    const Piece<bytes> piece = *reinterpret_cast<const Piece<bytes>*>(from + d);
    T values[count];
    __builtin_memcpy(values, &piece, bytes);
#pragma unroll
    for (int k = 0; k < count; ++k) x[d + k] = static_cast<float>(values[k]);
  }
}

template <int D>
__device__ inline void read_vector(const Problem& p, bool whole_rows, int64_t vector, float (&x)[D]) {
  if (!whole_rows) {
#pragma unroll
    for (int d = 0; d < D; ++d) x[d] = d < p.dim ? read<float>(p.z, vector, d) : 0.0f;
  } else if (p.z.type == Type::float32) {
    read_row(static_cast<const float*>(p.z.data) + vector * p.z.row, x);
  } else if (p.z.type == Type::float16) {
    read_row(static_cast<const Half*>(p.z.data) + vector * p.z.row, x);
  } else {
    read_row(static_cast<const BFloat16*>(p.z.data) + vector * p.z.row, x);
  }
}

// An upper bound of the lengths of a thread's vectors; those that hold NaN or infinity are told as bits, and made zero.
template <int D, int V>
__device__ inline float bound_lengths(float (&x)[V][D], unsigned& not_finite) {
  float length = 0;
  not_finite = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float square = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) square = fmaf(x[v][d], x[v][d], square);
    if (square < 1e37f) {
      // What squares lose below the range of float32 is less than the second term.
      length = fmaxf(length, sqrtf(square) + 1e-18f);
      continue;
    }
    float largest = 0;
    bool finite = true;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      finite = finite && is_finite(x[v][d]);
      largest = fmaxf(largest, fabsf(x[v][d]));
    }
    if (finite) {
      length = fmaxf(length, sqrtf(static_cast<float>(D)) * largest);
    } else {
      not_finite |= 1u << v;
#pragma unroll
      for (int d = 0; d < D; ++d) x[v][d] = 0;
    }
  }
  return length;
}

// --- scanning ---

struct Best {
  float first, second;
  int code;

  __device__ void reset() {
    first = second = -infinity();
    code = 0;
  }
  __device__ void challenge(float score, int from) {
    second = fmaxf(second, fminf(first, score));
    code = score > first ? from : code;
    first = fmaxf(first, score);
  }
  __device__ bool is_clear(float margin) const { return second < first - margin; }
};

__device__ inline float add_product(float4 e, const float* x, float sum) {
  return fmaf(e.w, x[3], fmaf(e.z, x[2], fmaf(e.y, x[1], fmaf(e.x, x[0], sum))));
}

// `width` is that of the layout. All vectors of all lanes search one codebook: each codeword that is read serves a
// thread's V vectors.
template <int width, int D, int V>
__device__ inline void scan_shared(const SmallLayout& s, const float* codewords, const float* biases,
                                   const float (&x)[V][D], Best (&best)[V]) {
#pragma unroll 1
  for (int k = 0; k < s.blocks * width; k += 4) {
    const int block = k & ~(width - 1), place = k & (width - 1);
    const float4* e = reinterpret_cast<const float4*>(codewords + block * D + place * 4);
    const float4 bias = *reinterpret_cast<const float4*>(biases + block * kBiasCopies + place);
    float score[V][4];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      score[v][0] = bias.x;
      score[v][1] = bias.y;
      score[v][2] = bias.z;
      score[v][3] = bias.w;
    }
#pragma unroll
    for (int c = 0; c < D / 4; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 piece = e[c * width + i];
#pragma unroll
        for (int v = 0; v < V; ++v) score[v][i] = add_product(piece, x[v] + 4 * c, score[v][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) best[v].challenge(score[v][i], k + i);
    }
  }
}

// Each vector in a codebook of its own.
template <int width, int D, int V>
__device__ inline void scan_own(const SmallLayout& s, const float* codewords, const float* biases,
                                const int (&codebook)[V], const float (&x)[V][D], Best (&best)[V]) {
  constexpr int together = D <= 8 ? 4 : 2;  // as registers allow
  const int lane = lane_id(), padded = s.blocks * width;
  const float* own_biases = biases + lane / 8 * width;
#pragma unroll 1
  for (int k = 0; k < padded; k += together) {
    const int block = k & ~(width - 1);
    int place[together];
#pragma unroll
    for (int i = 0; i < together; ++i) place[i] = block + ((k + i + lane) & (width - 1));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float4* e = reinterpret_cast<const float4*>(codewords) + (codebook[v] * padded + block) * (D / 4) - block;
      const float* bias = own_biases + (codebook[v] * padded + block) * kBiasCopies - block;
      float score[together];
#pragma unroll
      for (int i = 0; i < together; ++i) score[i] = bias[place[i]];
#pragma unroll
      for (int c = 0; c < D / 4; ++c) {
#pragma unroll
        for (int i = 0; i < together; ++i) score[i] = add_product(e[c * width + place[i]], x[v] + 4 * c, score[i]);
      }
#pragma unroll
      for (int i = 0; i < together; ++i) best[v].challenge(score[i], place[i]);
    }
  }
}

template <int width, int D, int V>
__device__ inline void scan(const SmallLayout& s, const float* codewords, const float* biases, bool shared,
                            const int (&codebook)[V], const float (&x)[V][D], Best (&best)[V]) {
  if (shared) {
    scan_shared<width>(s, codewords, biases, x, best);
  } else {
    scan_own<width>(s, codewords, biases, codebook, x, best);
  }
}

// Pairs: the score of the second codeword less that of the first.
template <int D>
__device__ inline void scan_pair(const float* differences, const float* biases, int codebook, int codebooks,
                                 const float (&x)[D], Best& best) {
  float score = biases[codebook];
#pragma unroll
  for (int c = 0; c < D / 4; ++c) {
    score = add_product(reinterpret_cast<const float4*>(differences)[c * codebooks + codebook], x + 4 * c, score);
  }
  best.code = score > 0;
  best.first = fabsf(score);
  best.second = 0;
}

// --- a tile ---

// Without a tree: four components of the codeword of `code`. A codeword that is not finite is laid out as zeros, and
// only taken where its codebook holds no other.
template <int D>
__device__ inline float4 piece_of(const Problem& p, const SmallLayout& s, const float* memory, int layer, int code,
                                  int c) {
  const LengthsOf<float> lengths = reinterpret_cast<const LengthsOf<float>*>(memory + s.lengths)[layer];
  if (lengths.shortest > lengths.longest) {
    const float* from = static_cast<const float*>(p.rows[layer]) + code * p.dim;
    const auto at = [&](int64_t d) { return d < p.dim ? from[d] : 0.0f; };
    return make_float4(at(4 * c), at(4 * c + 1), at(4 * c + 2), at(4 * c + 3));
  }
  const int block = code >> s.width_bits, place = code & (s.width - 1);
  return reinterpret_cast<const float4*>(memory + s.codewords[layer])[(block * (D / 4) + c) * s.width + place];
}

// Decides the slots of a tile whose code in this layer was left as -1.
__device__ inline void decide_slots(const Problem& p, int layer, int64_t first, int32_t* staged, int slots) {
  int32_t* codes = staged + layer * slots;
  __syncwarp();
#pragma unroll 1
  for (int start = 0; start < slots; start += kWarp) {
    unsigned unsure = __ballot_sync(kAll, codes[start + lane_id()] < 0);
#pragma unroll 1
    for (; unsure != 0; unsure &= unsure - 1) {
      const int slot = start + __ffs(unsure) - 1;
      const int code = decide<float>(p, first + slot, layer, {staged + slot, slots}, 0, -1);
      if (lane_id() == 0) codes[slot] = code;
    }
  }
  __syncwarp();
}

// The codes of a warp's tile from vector `first`, left in `staged`.
template <int D, int V>
__device__ void search_tile(const Problem& p, const SmallLayout& s, const float* memory, int32_t* staged, int64_t first,
                            float (&x)[V][D]) {
  constexpr int slots = kWarp * V;
  const int lane = lane_id(), size = p.codebook_size;
  const LengthsOf<float>* lengths = reinterpret_cast<const LengthsOf<float>*>(memory + s.lengths);
  unsigned not_finite;
  float length = bound_lengths(x, not_finite);
  int parent[V];
#pragma unroll
  for (int v = 0; v < V; ++v) parent[v] = 0;
  for (int layer = 0, codebooks = 1; layer < p.layers; ++layer) {
    const float* codewords = memory + s.codewords[layer];
    const float* biases = memory + s.biases[layer];
    Best best[V];
#pragma unroll
    for (int v = 0; v < V; ++v) best[v].reset();
    if (s.pairs) {
#pragma unroll
      for (int v = 0; v < V; ++v) scan_pair(codewords, biases, parent[v], codebooks, x[v], best[v]);
    } else if (s.width == 8) {
      scan<8>(s, codewords, biases, codebooks == 1, parent, x, best);
    } else {
      scan<4>(s, codewords, biases, codebooks == 1, parent, x, best);
    }
    const float margin = uncertainty(p.dim, layer, length, lengths[layer]);
    length += reach(length, lengths[layer]);
    bool unsure = false;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool counts = first + v * kWarp + lane < p.vectors && !(not_finite >> v & 1);
      const bool clear = !counts || best[v].is_clear(margin);
      staged[layer * slots + v * kWarp + lane] = clear ? best[v].code : -1;
      unsure = unsure || !clear;
    }
    if (__ballot_sync(kAll, unsure) != 0) {
      decide_slots(p, layer, first, staged, slots);
#pragma unroll
      for (int v = 0; v < V; ++v) best[v].code = staged[layer * slots + v * kWarp + lane];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (p.strict_tree) {
        parent[v] = parent[v] * size + best[v].code;
      } else if (layer + 1 < p.layers) {
#pragma unroll
        for (int c = 0; c < D / 4; ++c) {
          const float4 e = piece_of<D>(p, s, memory, layer, best[v].code, c);
          x[v][4 * c] -= e.x;
          x[v][4 * c + 1] -= e.y;
          x[v][4 * c + 2] -= e.z;
          x[v][4 * c + 3] -= e.w;
        }
      }
    }
    if (p.strict_tree) codebooks *= size;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int slot = v * kWarp + lane;
    staged[p.layers * slots + slot] = not_finite >> v & 1 ? -1 : parent[v];
    if (not_finite >> v & 1) {
      for (int layer = 0; layer < p.layers; ++layer) staged[layer * slots + slot] = 0;
    }
  }
  __syncwarp();
}

// --- results ---

// [layer][slot] -> (count, layers), two numbers at a time.
__device__ inline void write_codes(const Problem& p, const int32_t* staged, int slots, int64_t first, int count) {
  int64_t* to = p.indices + first * p.layers;
  const int numbers = count * p.layers;
  const unsigned reciprocal = (1u << 20) / p.layers + 1;  // exact for the few thousand numbers of a tile
  const auto code = [&](int number) {
    const int slot = static_cast<int>(number * reciprocal >> 20);
    return static_cast<int64_t>(staged[(number - slot * p.layers) * slots + slot]);
  };
#pragma unroll 1
  for (int number = 2 * lane_id(); number < numbers; number += 2 * kWarp) {
    if (number + 1 < numbers) {
      longlong2 two;
      two.x = code(number);
      two.y = code(number + 1);
      *reinterpret_cast<longlong2*>(to + number) = two;
    } else {
      to[number] = code(number);
    }
  }
}

// Four components of the sum of a slot's codewords.
template <int D>
__device__ inline float4 quantized_piece(const Problem& p, const SmallLayout& s, const float* memory,
                                         const int32_t* staged, int slots, int slot, int c) {
  const int leaf = staged[p.layers * slots + slot];
  if (leaf < 0) return make_float4(not_a_number(), not_a_number(), not_a_number(), not_a_number());
  if (p.strict_tree) return reinterpret_cast<const float4*>(memory + s.leaves)[leaf * (D / 4) + c];
  float4 sum = make_float4(0, 0, 0, 0);
  for (int layer = 0; layer < p.layers; ++layer) {
    const float4 e = piece_of<D>(p, s, memory, layer, staged[layer * slots + slot], c);
    sum = make_float4(sum.x + e.x, sum.y + e.y, sum.z + e.z, sum.w + e.w);
  }
  return sum;
}

template <class T>
__device__ inline void write_piece(T* to, float4 x) {
  const T values[4] = {static_cast<T>(x.x), static_cast<T>(x.y), static_cast<T>(x.z), static_cast<T>(x.w)};
  Piece<4 * sizeof(T)> piece;
  __builtin_memcpy(&piece, values, sizeof piece);
  *reinterpret_cast<Piece<4 * sizeof(T)>*>(to) = piece;
}

template <int D>
__device__ inline void write_quantized(const Problem& p, const SmallLayout& s, const float* memory,
                                       const int32_t* staged, int slots, int64_t first, int count) {
  constexpr int pieces = D / 4;
#pragma unroll 1
  for (int k = lane_id(); k < count * pieces; k += kWarp) {
    const int slot = k / pieces, c = k % pieces;
    const float4 x = quantized_piece<D>(p, s, memory, staged, slots, slot, c);
    const int64_t at = (first + slot) * p.dim + 4 * c;
    if (p.dim != D) {
      const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * c + i < p.dim) write(p.quantized, at + i, p.z.type, values[i]);
      }
    } else if (p.z.type == Type::float32) {
      write_piece(static_cast<float*>(p.quantized) + at, x);
    } else if (p.z.type == Type::float16) {
      write_piece(static_cast<Half*>(p.quantized) + at, x);
    } else {
      write_piece(static_cast<BFloat16*>(p.quantized) + at, x);
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 2)
    search_small(const __grid_constant__ Problem p, const __grid_constant__ SmallLayout s) {
  constexpr int V = Small<D>::kVectors, slots = Small<D>::kSlots;
  extern __shared__ float4 shared_memory[];
  float* memory = reinterpret_cast<float*>(shared_memory);
  int32_t* staged = reinterpret_cast<int32_t*>(memory + s.staged) + warp_id() * slots * (p.layers + 1);
  int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp_id()) * slots;
  float x[V][D];
  const auto read_tile = [&] {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t vector = first + v * kWarp + lane_id();
      if (vector < p.vectors) {
        read_vector(p, s.whole_rows, vector, x[v]);
      } else {
#pragma unroll
        for (int d = 0; d < D; ++d) x[v][d] = 0;
      }
    }
  };
  if constexpr (D <= 8) read_tile();  // on its way meanwhile
  lay_out_codebooks<D>(p, s, memory);
  if constexpr (D > 8) read_tile();
  while (first < p.vectors) {
    const int64_t done = first;
    search_tile(p, s, memory, staged, done, x);
    first += static_cast<int64_t>(gridDim.x) * kWarps * slots;
    read_tile();
    const int count = static_cast<int>(p.vectors - done < slots ? p.vectors - done : slots);
    write_quantized<D>(p, s, memory, staged, slots, done, count);
    write_codes(p, staged, slots, done, count);
    __syncwarp();
  }
}

}  // namespace vpfast::gpu
