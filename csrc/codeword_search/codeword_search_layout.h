// Laying the codebooks out for the scans: see Panels, Lookups and Eights; and the sums of a small tree's leaves.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "codeword_search/codeword_search_problem.h"
#include "common/aligned.h"

namespace vpfast {

// Four chains of additions, which the processor overlaps.
template <class X>
double product(const X* x, const float* y, int64_t dim) {
  double sums[4] = {};
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4) {
    for (int k = 0; k < 4; ++k) sums[k] += static_cast<double>(x[d + k]) * y[d + k];
  }
  for (; d < dim; ++d) sums[0] += static_cast<double>(x[d]) * y[d];
  return sums[0] + sums[1] + sums[2] + sums[3];
}

inline double squared_length(const float* x, int64_t dim) { return product(x, x, dim); }

// The bias of a codeword that never wins. Its components are laid out as zeros, for the score to be this one.
constexpr float kNeverWins = -std::numeric_limits<float>::infinity();

inline float bias_of(const float* codeword, int64_t dim) {
  const double square = squared_length(codeword, dim);
  return std::isfinite(square) ? static_cast<float>(-square / 2) : kNeverWins;
}

// Of the second codeword less the first.
inline float bias_between(const float* first, const float* second, int64_t dim) {
  const double square = squared_length(first, dim), other = squared_length(second, dim);
  if (!std::isfinite(other)) return kNeverWins;
  return std::isfinite(square) ? static_cast<float>((square - other) / 2) : -kNeverWins;
}

// Of codebooks of `size` codewords each. Squares of float32 do not overflow float64.
inline Lengths measure_codewords(const float* codewords, int64_t codebooks, int64_t size, int64_t dim) {
  double longest = 0, shortest = 0;
  for (int64_t codebook = 0; codebook < codebooks; ++codebook) {
    double shortest_here = std::numeric_limits<double>::infinity();
    for (int64_t code = 0; code < size; ++code) {
      const double square = squared_length(codewords + (codebook * size + code) * dim, dim);
      if (!std::isfinite(square)) continue;
      longest = std::max(longest, square);
      shortest_here = std::min(shortest_here, square);
    }
    shortest = std::max(shortest, shortest_here);
  }
  return {std::sqrt(longest), std::sqrt(shortest)};
}

struct PackedPanels {
  std::vector<AlignedVector<float>> codewords, biases;
};

// In registers of at most `lanes` floats.
inline PackedPanels pack_panels(Problem& p, int lanes) {
  Panels& panels = p.panels;
  panels.width = 4;
  while (panels.width < lanes && panels.width < p.codebook_size) panels.width *= 2;
  const int width = panels.width;
  panels.blocks = (p.codebook_size + width - 1) / width;
  PackedPanels packed;
  packed.codewords.resize(p.layers);
  packed.biases.resize(p.layers);
  int64_t parents = 1;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const int64_t blocks = parents * panels.blocks;
    AlignedVector<float>&codewords = packed.codewords[layer], &biases = packed.biases[layer];
    codewords.resize(blocks * p.dim * width);
    biases.resize(blocks * width);
    const float* rows = static_cast<const float*>(p.rows[layer]);
    const int64_t grain = std::max<int64_t>(1, 16384 / (p.dim * width));
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t parent = block / panels.blocks, first = block % panels.blocks * width;
        for (int lane = 0; lane < width; ++lane) {
          const int64_t code = first + lane;
          const float* row = rows + (parent * p.codebook_size + code) * p.dim;
          const float bias = code < p.codebook_size ? bias_of(row, p.dim) : kNeverWins;
          biases[block * width + lane] = bias;
          for (int64_t d = 0; d < p.dim; ++d)
            codewords[(block * p.dim + d) * width + lane] = bias > kNeverWins ? row[d] : 0.0f;
        }
      }
    });
    panels.codewords[layer] = codewords.data();
    panels.biases[layer] = biases.data();
    if (p.strict_tree) parents *= p.codebook_size;
  }
  return packed;
}

// How many instructions it takes to pick one of so many parents' entries in each lane.
inline int64_t picks(int64_t entries) { return entries == 1 ? 0 : entries <= 32 ? 1 : entries / 16 - 1; }

// How many leading layers are cheaper to search by lookups than by panels, counted in instructions a vector.
inline int64_t layers_by_lookup(const Problem& p) {
  if (p.dim > kMaxLookupDim) return 0;
  int64_t parents = 1, layer = 0;
  for (; layer < p.layers; ++layer) {
    const int64_t rows = p.strict_tree ? parents * p.codebook_size : p.codebook_size;
    if (parents > 256 || (layer + 1 < p.layers && rows > 256)) break;
    const int64_t blocks = (p.codebook_size + 15) / 16;
    const int64_t by_panels = blocks * (p.dim * (parents > 1 ? 2 : 1) + 5) + 25;
    const int64_t scores = p.codebook_size == 2 ? 1 : p.codebook_size;
    const int64_t by_lookup = (scores * (p.dim * (picks(parents) + 1) + 5) + p.dim * (picks(rows) + 1)) / 16;
    if (by_lookup > by_panels) break;
    if (p.strict_tree) parents = rows;
  }
  return layer;
}

struct PackedLookups {
  std::vector<AlignedVector<float>> by_parent, by_row;
};

inline int64_t padded(int64_t entries) {
  if (entries == 1) return 1;
  int64_t size = 16;
  while (size < entries) size *= 2;
  return size;
}

inline PackedLookups pack_lookups(Problem& p) {
  PackedLookups packed;
  packed.by_parent.resize(p.lookups.layers);
  packed.by_row.resize(p.lookups.layers);
  int64_t parents = 1;
  for (int64_t layer = 0; layer < p.lookups.layers; ++layer) {
    const int64_t rows = parents * p.codebook_size, parent_stride = padded(parents), row_stride = padded(rows);
    AlignedVector<float>&by_parent = packed.by_parent[layer], &by_row = packed.by_row[layer];
    const bool two = p.codebook_size == 2;
    by_parent.resize((two ? 1 : p.codebook_size) * (p.dim + 1) * parent_stride);
    by_row.resize(p.dim * row_stride);
    const float* codewords = static_cast<const float*>(p.rows[layer]);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t parent = row / p.codebook_size, code = row % p.codebook_size;
      const float* codeword = codewords + row * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) by_row[d * row_stride + row] = codeword[d];
      if (two && code == 0) continue;
      const float* rival = two ? codeword - p.dim : nullptr;
      float* entry = by_parent.data() + (two ? 0 : code) * (p.dim + 1) * parent_stride + parent;
      float& bias = entry[p.dim * parent_stride];
      bias = two ? bias_between(rival, codeword, p.dim) : bias_of(codeword, p.dim);
      for (int64_t d = 0; d < p.dim && std::isfinite(bias); ++d)
        entry[d * parent_stride] = two ? codeword[d] - rival[d] : codeword[d];
    }
    p.lookups.by_parent[layer] = by_parent.data();
    p.lookups.by_row[layer] = by_row.data();
    if (p.strict_tree) parents = rows;
  }
  return packed;
}

struct PackedEights {
  std::vector<AlignedVector<float>> codebooks;
};

// Floats of a codebook that is scanned by eights.
inline int64_t eight_size(const Problem& p) { return 8 * (p.dim + 2); }

// Whether a tree's codebooks are to be scanned by eights: those of each layer stay in the cache.
inline bool fits_eights(const Problem& p) {
  constexpr int64_t most_dims = 32, most_floats = 1 << 18;
  const bool eight = p.codebook_size > 4 && p.codebook_size <= 8, even = p.dim % 2 == 0;
  if (!p.strict_tree || !eight || !even || p.dim > most_dims) return false;
  int64_t parents = 1;
  for (int64_t layer = 1; layer < p.layers && parents <= most_floats; ++layer) parents *= p.codebook_size;
  return parents * eight_size(p) <= most_floats;
}

inline PackedEights pack_eights(Problem& p) {
  // Of a codeword that never wins: finite, as a score with its code in the lowest bits would be NaN.
  constexpr float never_wins = -3e38f;
  PackedEights packed;
  packed.codebooks.resize(p.layers);
  const int64_t stride = eight_size(p);
  int64_t parents = 1;
  std::vector<double> paths(p.dim), above;  // by row the sum of codewords that leads to it, itself included
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    AlignedVector<float>& codebooks = packed.codebooks[layer];
    codebooks.resize(parents * stride);
    above.swap(paths);
    const bool leads_on = layer + 1 < p.layers;
    paths.resize(leads_on ? parents * p.codebook_size * p.dim : 0);
    const float* codeword = static_cast<const float*>(p.rows[layer]);
    for (int64_t parent = 0, row = 0; parent < parents; ++parent) {
      float* codebook = codebooks.data() + parent * stride;
      const double* path = above.data() + parent * p.dim;
      for (int64_t code = 0; code < 8; ++code) codebook[2 * code] = never_wins;
      for (int64_t code = 0; code < p.codebook_size; ++code, ++row, codeword += p.dim) {
        for (int64_t d = 0; leads_on && d < p.dim; ++d) paths[row * p.dim + d] = path[d] + codeword[d];
        const double bias = squared_length(codeword, p.dim) / 2 + product(path, codeword, p.dim);
        if (!std::isfinite(bias)) continue;
        codebook[2 * code] = static_cast<float>(-bias);
        for (int64_t d = 0; d < p.dim; ++d) codebook[16 * (1 + d / 2) + 2 * code + d % 2] = codeword[d];
      }
    }
    p.eights.codebooks[layer] = codebooks.data();
    parents *= p.codebook_size;
  }
  return packed;
}

// Sums of codewords, added up from the first layer on, of a tree whose leaves are few enough to stay in the cache and
// to be met several times each.
template <class W>
AlignedVector<W> sum_leaves(Problem& p) {
  constexpr int64_t bytes = 1 << 17, meetings = 8;
  int64_t rows = 1;
  for (int64_t layer = 0; layer < p.layers && rows <= p.vectors; ++layer) rows *= p.codebook_size;
  AlignedVector<W> sums;
  const bool few = rows * p.dim * static_cast<int64_t>(sizeof(W)) <= bytes && rows * meetings <= p.vectors;
  if (!p.strict_tree || p.layers == 1 || !few) return sums;
  sums.resize(rows * p.dim);
  for (int64_t layer = 0, below = rows; layer < p.layers; ++layer) {
    below /= p.codebook_size;  // leaves of a row
    const W* codewords = static_cast<const W*>(p.rows[layer]);
    for (int64_t leaf = 0; leaf < rows; ++leaf) {
      const W* codeword = codewords + leaf / below * p.dim;
      W* sum = sums.data() + leaf * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) sum[d] = layer == 0 ? codeword[d] : sum[d] + codeword[d];
    }
  }
  p.leaf_sums = sums.data();
  return sums;
}

}  // namespace vpfast
