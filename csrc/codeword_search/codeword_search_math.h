// The rules of codeword_search that every kernel shares: rows of a tree, and what "nearest" means.
//
//   k = argmin_j |xi^(i-1) - e^i_j|        xi^i = xi^(i-1) - e^i_k        (S-HR-VQVAE paper, Eq. 3)
//
// A kernel scans in float32 by the score s_j = xi . e_j - |e_j|^2 / 2, largest where the distance is smallest, at one
// multiplication a term. Scores lie within `uncertainty` of the true ones. Where the best is clear of all others by
// twice that, it is the nearest; where it is not, `squared_distance` decides in float64, from z itself. So the codes
// are those of a float64 search on every processor, however the scan rounds.
//
// Included once, outside the instruction sets: all of them call the very same float64 code. Lengths are float64 on the
// CPU and float32 on a GPU, where float64 may be slow: the bounds have room for either.
#pragma once

#include <cstdint>

#include "common/everywhere.h"

namespace vpfast {

constexpr int64_t kMaxLayers = 16;

// The row of code `code` in its layer, below row `parent` of the layer before.
VPFAST_EVERYWHERE inline int64_t row_of(bool strict_tree, int64_t codebook_size, int64_t parent, int64_t code) {
  return strict_tree ? parent * codebook_size + code : code;
}

template <class W>
inline double squared_distance(const double* residual, const W* codeword, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = residual[d] - static_cast<double>(codeword[d]);
    sum += difference * difference;
  }
  return sum;
}

// The lengths of a layer's codewords, but for those that are not finite and never win.
template <class F>
struct LengthsOf {
  F longest;
  F shortest;  // the shortest of a codebook, where that is longest; infinite where a codebook has none
};

using Lengths = LengthsOf<double>;

// No codeword longer than this comes near being the nearest to a residual of at most `length`: one beyond 4 |xi| + 2
// |m|, with m the shortest of its codebook, scores below -|e|^2 / 4, and m above -|e|^2 / 8. So a codeword gone astray
// makes no scan unsure. Infinite where a vector may have to take a codeword that is not finite.
template <class F>
VPFAST_EVERYWHERE inline F reach(F length, const LengthsOf<F>& codewords) {
  const F far = 4 * length + 2 * codewords.shortest;
  return far < codewords.longest || codewords.shortest > codewords.longest ? far : codewords.longest;
}

// How far apart two float32 scores must be for float64 distances to have the same order, at layer `layer` (from 0), for
// residuals no longer than `length`. Every rounding of the scan is relative, by u, to a partial sum of at most
// |xi||e| + |e|^2 / 2; dim products, the bias, and the subtractions of the layers before are rounded. Those of the
// distances, in float64, are relative to (|xi| + |e|)^2 and count where codewords are far shorter than the residuals.
// Infinite where the scan could overflow.
//
// It also holds for xi . e - |e|^2 / 2 taken as z . e - ((e^1 + ... + e^(i-1)) . e + |e|^2 / 2) with the bracket
// rounded once: `length` bounds |z| + |e^1| + ..., so the terms are no larger.
template <class F>
VPFAST_EVERYWHERE inline float uncertainty(int64_t dim, int64_t layer, F length, const LengthsOf<F>& codewords) {
  constexpr F u = F(5.97e-8), u64 = F(1.12e-16), smallest_normal = F(1.2e-38);
  const F longest = codewords.longest, e = reach(length, codewords);
  if (!(length * longest + longest * longest / 2 < F(1e37) && e <= longest)) return __builtin_inff();
  const F largest = length * e + e * e / 2, distance = (length + e) * (length + e);
  const F roundings = static_cast<F>(dim + layer + 3);
  return static_cast<float>(F(2.2) * roundings * (u * largest + u64 * distance + smallest_normal));
}

}  // namespace vpfast
