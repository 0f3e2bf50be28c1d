// Statistics and gradients of a whole tree from those of its leaves.
//
// A vector of a leaf belongs to every node above it, and its residuals differ by the codewords between: with
// A_i[node] = sum of xi^i over the vectors of a node of layer i, and count_i[node] their number,
//   sum of xi^(i-1) over the node          S_i[node] = A_i[node] + count_i[node] e_i[node]
//   of the parent's own sum                A_(i-1)[parent] = sum over its children of S_i
// so the leaves' counts and A_n give every node's, in a pass over the codebooks in place of one over the vectors.
#pragma once

#include <vector>

#include "codeword_search/codeword_search_problem.h"

namespace vpfast {

// The sum over the M children of every parent; `children` is (parents * M, dim).
inline std::vector<double> sum_children(const std::vector<double>& children, int64_t size, int64_t dim) {
  std::vector<double> parents(children.size() / size);
  for (size_t k = 0; k < children.size(); ++k) parents[k / (size * dim) * dim + k % dim] += children[k];
  return parents;
}

// counts (rows,) and sums (rows, dim) of all layers from the leaves' counts and sums of xi^n.
template <class W>
void statistics_from_leaves(const Problem& p, std::vector<double> leaf_counts, std::vector<double> leaf_sums, W* counts,
                            W* sums) {
  std::vector<double> count = std::move(leaf_counts), sum = std::move(leaf_sums);
  for (int64_t layer = p.layers; layer-- > 0;) {
    const W* codewords = static_cast<const W*>(p.rows[layer]);
    const int64_t first = p.first_row[layer], rows = static_cast<int64_t>(count.size());
    for (int64_t row = 0; row < rows; ++row) {
      counts[first + row] = static_cast<W>(count[row]);
      for (int64_t d = 0; d < p.dim; ++d) {
        double& entry = sum[row * p.dim + d];
        if (count[row] > 0) entry += count[row] * static_cast<double>(codewords[row * p.dim + d]);
        sums[(first + row) * p.dim + d] = static_cast<W>(entry);
      }
    }
    if (layer == 0) break;
    sum = sum_children(sum, p.codebook_size, p.dim);
    count = sum_children(count, p.codebook_size, 1);
  }
}

// The gradient of every row: of layer j, sum_i weights[j, i] (sum of xi^i over the vectors below the row).
template <class W>
void gradients_from_statistics(const Problem& p, const W* weights, const W* counts, const W* sums, W* grad) {
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const W* codewords = static_cast<const W*>(p.rows[layer]);
    const int64_t first = p.first_row[layer];
    bool used = false;
    for (int64_t above = 0; above <= layer; ++above) used |= weights[above * p.layers + layer] != 0;
    if (!used) continue;
    int64_t rows = 1;
    for (int64_t k = 0; k <= layer; ++k) rows *= p.codebook_size;
    std::vector<double> residual(rows * p.dim);
    for (int64_t row = 0; row < rows; ++row) {
      const double count = static_cast<double>(counts[first + row]);
      if (count == 0) continue;
      for (int64_t d = 0; d < p.dim; ++d) {
        residual[row * p.dim + d] = static_cast<double>(sums[(first + row) * p.dim + d]) -
                                    count * static_cast<double>(codewords[row * p.dim + d]);
      }
    }
    for (int64_t above = layer;; --above) {
      const double weight = static_cast<double>(weights[above * p.layers + layer]);
      W* to = grad + p.first_row[above] * p.dim;
      for (size_t k = 0; weight != 0 && k < residual.size(); ++k) to[k] += static_cast<W>(weight * residual[k]);
      if (above == 0) break;
      residual = sum_children(residual, p.codebook_size, p.dim);
    }
  }
}

// The gradient of a sum of codewords: a row's is the sum of its children's.
template <class W>
void gradients_from_leaves(const Problem& p, std::vector<double> leaf_sums, W* grad) {
  std::vector<double> sum = std::move(leaf_sums);
  for (int64_t layer = p.layers; layer-- > 0;) {
    W* to = grad + p.first_row[layer] * p.dim;
    for (size_t k = 0; k < sum.size(); ++k) to[k] = static_cast<W>(sum[k]);
    if (layer > 0) sum = sum_children(sum, p.codebook_size, p.dim);
  }
}

}  // namespace vpfast
