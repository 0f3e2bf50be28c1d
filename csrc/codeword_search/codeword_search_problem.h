// What one call of codeword_search is about, as its kernels see it.
#pragma once

#include <cstdint>

#include "codeword_search/codeword_search_math.h"

namespace vpfast {

// Vectors are taken through all layers in groups of this many: a multiple of every tile's height and of the lanes.
constexpr int64_t kGroup = 48;

// The codebooks laid out for scanning. A block is as many codewords as a register has lanes, component by component:
// [codebook][block][dim][width], with the biases -|e|^2 / 2 as [codebook][block][width]; lanes beyond the last codeword
// have a bias of -infinity.
struct Panels {
  int width;  // 4, 8 or 16
  int64_t blocks;
  const float* codewords[kMaxLayers];
  const float* biases[kMaxLayers];
};

// Lookups hold a vector's components in registers, as far as there are any.
constexpr int64_t kMaxLookupDim = 32;

// The top layers of a small tree laid out for looking up by parent, the way of AVX-512: [code][dim + 1][parents] with
// the bias as last component, and [dim][rows] for what is subtracted. Of two codewords by_parent holds the second less
// the first. The last dimension is padded to 1, 16, 32, 64, 128 or 256.
struct Lookups {
  int64_t layers;  // how many layers are searched this way; the others by panels
  const float* by_parent[kMaxLayers];
  const float* by_row[kMaxLayers];
};

// A small tree laid out for scanning codebooks whole, eight codewords in a register: by parent the biases
// -((e^1 + ... + e^(i-1)) . e + |e|^2 / 2), each with a 0 beside it, then the components, two at a time:
// [parents][1 + dim / 2][8][2].
struct Eights {
  const float* codebooks[kMaxLayers];
};

// As many roundings more are scores off that have their code in the lowest three bits.
constexpr int64_t kMarkRoundings = 16;

// Offsets and strides are in elements.
struct Problem {
  int64_t vectors, dim, layers, codebook_size;
  bool strict_tree;
  const void* z;
  int64_t z_row, z_column;        // strides of z
  const void* rows[kMaxLayers];   // of each layer the codewords (rows, dim) in the working type, dense
  const void* leaf_sums;          // of a small tree e^1 + ... + e^n by row of the last layer, (rows, dim); or null
  int64_t first_row[kMaxLayers];  // where a layer's rows start in counts and sums
  Lengths lengths[kMaxLayers];    // of a layer's codewords
  Panels panels;
  Lookups lookups;
  bool by_eights;  // all layers are scanned by eights, and neither panels nor lookups are laid out
  Eights eights;
  int64_t* indices;  // (vectors, layers)
  void* quantized;   // (vectors, dim), where it is wanted
};

// Where sums over vectors are collected: rows [least, end), in the order of the vectors.
template <class W>
struct Table {
  W* sums;  // (end - least, dim)
  int64_t* counts;
  int64_t least, end;
};

constexpr int64_t kTurns = 4;

// What can be done with vectors and their codes: see the functions of these names in codeword_search_follow.h.
enum class Step { add_codewords, measure, differentiate, scatter };

// What a step reads and writes; null where it does not.
template <class W>
struct Pass {
  double* errors;              // (layers,), added to
  const void* grad_quantized;  // (vectors, dim)
  int64_t grad_row, grad_column;
  void* grad_z;                // (vectors, dim)
  const W* weights_z;          // (layers,)
  const W* weights_codebooks;  // (layers, layers)
  Table<W> table;
  bool all_finite;  // known of the group's vectors
};

// In float64 the nearest of `count` codes below row `parent`, of all codes where `candidates` is null: the lowest of
// equals, and never one whose distance is NaN or infinite (0 where there is no other). `rows_above` leads to the rows
// chosen in the layers above, kGroup apart.
template <class T, class W>
int64_t decide(const Problem& p, int64_t vector, int64_t layer, int64_t parent, const int32_t* rows_above,
               const int64_t* candidates, int64_t count, double* residual);

}  // namespace vpfast
