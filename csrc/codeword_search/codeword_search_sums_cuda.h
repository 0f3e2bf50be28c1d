// Sums over vectors by the rows that they chose (statistics, gradients of codebooks), and what else follows from codes.
//
// Story. Floating-point atomics would add in whatever order threads arrive. Here the order is fixed: a chunk of vectors
// is sorted by row (a stable radix sort of their numbers, integers all the way), and each run of equal rows is added up
// from its first vector to its last, in float64. A walker takes kPiece sorted vectors, whatever rows they belong to, so
// one row that has all the vectors costs what many rows do; runs that reach beyond a piece are left as partial sums,
// which the next level adds up the same way, until one walker is left. Any number of rows; no result depends on how
// many multiprocessors there are.
//
// It costs, for a chunk of N vectors: z (or the gradient) read once more in the order of rows, the codes once or twice,
// 8 N bytes of row numbers and order a sort pass (up to 1,023 rows take one, 1,048,575 two). Of a tree the leaves alone
// are summed; `fold_children` and `pull_up` take their sums up, a launch a layer (see codeword_search_tree.h).
#pragma once

#include "codeword_search/codeword_search_common_cuda.h"

namespace vpfast::gpu {

// What is added up for a row.
enum class Kind : int32_t { residual_before, residual_after, gradient, pull };

// The sums of one slot: of a tree the leaves, else the rows of layer `slot`. Vectors count from `first`.
struct Sums {
  int64_t first;
  int32_t count, slot;
  Kind kind;
  Matrix gradient;
  const void* weights;     // (layers, layers) in the working type, for `pull`
  const int32_t* keys;     // (count,): the row, or -1 of a vector that is not counted
  const int32_t* order;    // (count,): sorted by row
  double* sums;            // (rows, dim), added to
  double* counts;          // (rows,)
  double* partial_sums;    // (2 * pieces, dim)
  double* partial_counts;  // (2 * pieces,)
  int32_t* partial_rows;   // (2 * pieces,), -1 for none
};

// The rows that a vector chose, layer after layer. A code outside its codebook, which only a caller of the bare
// operator can hand in, is read as 0 and remembered.
struct Rows {
  const Problem& p;
  const int64_t* codes;
  int64_t row = 0;
  bool good = true;

  __device__ Rows(const Problem& problem, int64_t vector)
      : p(problem), codes(problem.indices + vector * problem.layers) {}
  __device__ int64_t next(int layer) {
    int64_t code = codes[layer];
    if (static_cast<uint64_t>(code) >= static_cast<uint64_t>(p.codebook_size)) {
      good = false;
      code = 0;
    }
    row = row_of(p.strict_tree, p.codebook_size, row, code);
    return row;
  }
};

// --- walks over vectors: some lanes a vector, lanes along its components ---

struct Lanes {
  int bits, width, lane;  // 8 or 32 lanes a vector
  unsigned mask;          // of a warp's lanes, those of this vector
  __device__ explicit Lanes(int64_t dim) : bits(dim <= 8 ? 3 : 5), width(1 << bits), lane(threadIdx.x & (width - 1)) {
    mask = width == kWarp ? kAll : 0xffu << (threadIdx.x % kWarp / 8 * 8);
  }
  __device__ int64_t first() const { return first(blockIdx.x); }
  __device__ int64_t first(unsigned block) const {
    return (static_cast<int64_t>(block) * blockDim.x + threadIdx.x) >> bits;
  }
  __device__ int64_t step() const { return static_cast<int64_t>(gridDim.x) * blockDim.x >> bits; }
  __device__ bool all(bool x) const { return __all_sync(mask, x); }
};

template <class W>
__device__ inline bool vector_is_finite(const Problem& p, int64_t vector, const Lanes& lanes) {
  bool finite = true;
  for (int64_t d = lanes.lane; d < p.dim; d += lanes.width) finite = finite && is_finite(read<W>(p.z, vector, d));
  return lanes.all(finite);
}

// The rows of `slot` that a chunk's vectors are summed at: keys (count,), -1 for a vector that is not counted.
template <class W>
__global__ void __launch_bounds__(kThreads) find_rows(const __grid_constant__ Problem p, int64_t first, int32_t count,
                                                      bool finite_only, int32_t slot, int32_t* keys) {
  const Lanes lanes(p.dim);
  for (int64_t k = lanes.first(); k < count; k += lanes.step()) {
    const bool counts = !finite_only || vector_is_finite<W>(p, first + k, lanes);
    if (lanes.lane != 0) continue;
    Rows rows(p, first + k);
    const int last = p.strict_tree ? p.layers - 1 : slot;
    int64_t row = 0;
    for (int layer = p.strict_tree ? 0 : slot; layer <= last; ++layer) row = rows.next(layer);
    keys[k] = counts ? static_cast<int32_t>(row) : -1;
  }
}

constexpr int kMeasureBlocks = 1024;  // at most, whatever the GPU: the order of sums depends on it

// errors (blocks, layers): the sums of |xi^i|^2.
template <class W>
__global__ void __launch_bounds__(kThreads) measure_errors(const __grid_constant__ Problem p, double* errors) {
  __shared__ double of_warp[kWarps][kMaxLayers];
  const Lanes lanes(p.dim);
  double total[kMaxLayers];
#pragma unroll
  for (int layer = 0; layer < kMaxLayers; ++layer) total[layer] = 0;
  for (int64_t v = lanes.first(); v < p.vectors; v += lanes.step()) {
    W square[kMaxLayers];
#pragma unroll
    for (int layer = 0; layer < kMaxLayers; ++layer) square[layer] = 0;
    bool finite = true;
    for (int64_t d = lanes.lane; d < p.dim; d += lanes.width) {
      W x = read<W>(p.z, v, d);
      finite = finite && is_finite(x);
      Rows rows(p, v);
#pragma unroll
      for (int layer = 0; layer < kMaxLayers; ++layer) {
        if (layer >= p.layers) break;
        x -= static_cast<const W*>(p.rows[layer])[rows.next(layer) * p.dim + d];
        square[layer] += x * x;
      }
    }
    finite = lanes.all(finite);
#pragma unroll
    for (int layer = 0; layer < kMaxLayers; ++layer) {
      total[layer] += finite ? static_cast<double>(square[layer]) : static_cast<double>(not_a_number());
    }
  }
#pragma unroll
  for (int layer = 0; layer < kMaxLayers; ++layer) {
    if (layer >= p.layers) break;
    double sum = total[layer];
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (lane_id() == 0) of_warp[warp_id()][layer] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= p.layers) return;
  double sum = 0;
  for (int k = 0; k < kWarps; ++k) sum += of_warp[k][threadIdx.x];
  errors[static_cast<int64_t>(blockIdx.x) * p.layers + threadIdx.x] = sum;
}

// One warp a layer.
template <class W>
__global__ void add_errors(const double* errors, int blocks, int layers, W* to) {
  double sum = 0;
  for (int k = lane_id(); k < blocks; k += kWarp) sum += errors[static_cast<int64_t>(k) * layers + blockIdx.x];
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (lane_id() == 0) to[blockIdx.x] = static_cast<W>(sum);
}

// grad_z = grad_quantized + sum_i weights_z[i] xi^i; `gradient.data` may be null.
template <class W>
__global__ void __launch_bounds__(kThreads)
    differentiate(const __grid_constant__ Problem p, const __grid_constant__ Matrix gradient, const W* weights_z,
                  void* grad_z) {
  const Lanes lanes(p.dim);
  for (int64_t v = lanes.first(); v < p.vectors; v += lanes.step()) {
    const bool finite = vector_is_finite<W>(p, v, lanes);
    for (int64_t d = lanes.lane; d < p.dim; d += lanes.width) {
      W x = finite ? read<W>(p.z, v, d) : static_cast<W>(not_a_number());
      W sum = gradient.data ? read<W>(gradient, v, d) : W(0);
      Rows rows(p, v);
      for (int layer = 0; layer < p.layers; ++layer) {
        x -= static_cast<const W*>(p.rows[layer])[rows.next(layer) * p.dim + d];
        sum += weights_z[layer] * x;
      }
      write(grad_z, v * p.dim + d, p.z.type, rows.good ? sum : static_cast<W>(not_a_number()));
    }
  }
}

// --- sorting ---

constexpr int kSorted = 4096;  // vectors that a block sorts
constexpr int kMostBits = 10;  // of a digit

// One pass of the radix sort: `order` (null: as they come) is sorted by `bits` bits of the keys from `shift`.
struct Pass {
  const int32_t* keys;
  const int32_t* order;
  int32_t* sorted;
  int32_t*
      places;  // (digits + 1, blocks): how many, then where a block's vectors of a digit go; totals in the last row
  int32_t count, blocks, shift, bits;

  __device__ int digits() const { return 1 << bits; }
  __device__ int32_t vector(int place) const { return order ? order[place] : place; }
  // -1, a vector that is not counted, has all bits set and goes last.
  __device__ int digit(int32_t vector) const {
    return static_cast<int>(static_cast<uint32_t>(keys[vector]) >> shift & (digits() - 1u));
  }
};

__global__ void __launch_bounds__(kThreads) count_digits(const __grid_constant__ Pass pass) {
  __shared__ int32_t counts[1 << kMostBits];
  for (int k = threadIdx.x; k < pass.digits(); k += blockDim.x) counts[k] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSorted;
  const int end = static_cast<int>(min(begin + kSorted, static_cast<int64_t>(pass.count)));
  for (int k = static_cast<int>(begin) + threadIdx.x; k < end; k += blockDim.x) {
    atomicAdd(counts + pass.digit(pass.vector(k)), 1);
  }
  __syncthreads();
  for (int k = threadIdx.x; k < pass.digits(); k += blockDim.x) {
    pass.places[static_cast<int64_t>(k) * pass.blocks + blockIdx.x] = counts[k];
  }
}

// Exclusive sums of a warp's numbers; `total` becomes the sum of all.
__device__ inline int32_t sum_before(int32_t x, int32_t& total) {
  int32_t sum = x;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t below = __shfl_up_sync(kAll, sum, step);
    if (lane_id() >= step) sum += below;
  }
  total = __shfl_sync(kAll, sum, kWarp - 1);
  return sum - x;
}

// A warp a digit: from the blocks' counts to where each block starts among the vectors of that digit.
__global__ void __launch_bounds__(kThreads) place_blocks(const __grid_constant__ Pass pass) {
  const int digit = blockIdx.x * kWarps + warp_id();
  if (digit >= pass.digits()) return;
  int32_t* places = pass.places + static_cast<int64_t>(digit) * pass.blocks;
  int32_t sum = 0;
  for (int start = 0; start < pass.blocks; start += kWarp) {
    const int k = start + lane_id();
    int32_t total;
    const int32_t before = sum_before(k < pass.blocks ? places[k] : 0, total);
    if (k < pass.blocks) places[k] = sum + before;
    sum += total;
  }
  if (lane_id() == 0) pass.places[static_cast<int64_t>(pass.digits()) * pass.blocks + digit] = sum;
}

// The warps take parts of a block's vectors, one after another; within a round of 32 the lanes' order stands.
__global__ void __launch_bounds__(kThreads) place_vectors(const __grid_constant__ Pass pass) {
  __shared__ int32_t next[kWarps][1 << kMostBits];
  __shared__ int32_t starts[1 << kMostBits];
  const int digits = pass.digits(), lane = lane_id();
  int32_t* own = next[warp_id()];
  for (int k = threadIdx.x; k < kWarps * digits; k += blockDim.x) next[k / digits][k % digits] = 0;
  if (warp_id() == 0) {
    const int32_t* totals = pass.places + static_cast<int64_t>(digits) * pass.blocks;
    int32_t sum = 0;
    for (int start = 0; start < digits; start += kWarp) {
      const int k = start + lane;
      int32_t total;
      const int32_t before = sum_before(k < digits ? totals[k] : 0, total);
      if (k < digits) starts[k] = sum + before;
      sum += total;
    }
  }
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSorted + warp_id() * (kSorted / kWarps);
  const auto take_rounds = [&](auto&& take) {
    for (int k = 0; k < kSorted / kWarps; k += kWarp) {
      const int64_t place = begin + k + lane;
      const bool counts = place < pass.count;
      const int32_t vector = counts ? pass.vector(static_cast<int>(place)) : 0;
      const int digit = counts ? pass.digit(vector) : digits;
      const unsigned peers = __match_any_sync(kAll, digit);
      const int before = __popc(peers & ((1u << lane) - 1));
      if (counts) take(vector, digit, before);
      __syncwarp();
      if (counts && before == 0) own[digit] += __popc(peers);
      __syncwarp();
    }
  };
  take_rounds([](int32_t, int, int) {});
  __syncthreads();
  for (int k = threadIdx.x; k < digits; k += blockDim.x) {
    int32_t sum = starts[k] + pass.places[static_cast<int64_t>(k) * pass.blocks + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = next[w][k];
      next[w][k] = sum;
      sum += count;
    }
  }
  __syncthreads();
  take_rounds([&](int32_t vector, int digit, int before) { pass.sorted[own[digit] + before] = vector; });
}

// --- adding up runs ---

constexpr int kPiece = 64;

// The first level: vectors in the order of their rows.
template <class W>
struct OfVectors {
  Problem p;
  Sums s;

  __device__ int32_t row(int64_t k) const { return s.keys[s.order[k]]; }
  __device__ double count(int64_t) const { return 1; }
  __device__ double value(int64_t k, int64_t d) const {
    const int64_t vector = s.first + s.order[k];
    Rows rows(p, vector);
    if (s.kind == Kind::gradient) {
      for (int layer = 0; layer < p.layers; ++layer) rows.next(layer);
      return rows.good ? static_cast<double>(read<W>(s.gradient, vector, d)) : static_cast<double>(not_a_number());
    }
    W x = read<W>(p.z, vector, d), pull = 0;
    const int end = s.kind == Kind::residual_before ? s.slot : p.layers;
    for (int layer = 0; layer < end; ++layer) {
      x -= static_cast<const W*>(p.rows[layer])[rows.next(layer) * p.dim + d];
      if (s.kind != Kind::pull || layer < s.slot) continue;
      pull += static_cast<const W*>(s.weights)[s.slot * p.layers + layer] * x;
    }
    if (!rows.good) return static_cast<double>(not_a_number());
    return static_cast<double>(s.kind == Kind::pull ? pull : x);
  }
};

// The levels after it.
struct OfPartials {
  const int32_t* rows;
  const double *counts, *sums;
  int64_t dim;

  __device__ int32_t row(int64_t k) const { return rows[k]; }
  __device__ double count(int64_t k) const { return counts[k]; }
  __device__ double value(int64_t k, int64_t d) const { return sums[k * dim + d]; }
};

// Grid: walkers x parts of the dim. Some lanes a walker, a component each. What lies wholly within a piece, and all
// that the last walker has, goes to the totals; the first and last run of a piece to its two partial sums.
template <class Source>
__global__ void __launch_bounds__(kThreads, 2)
    add_runs(const __grid_constant__ Source source, const __grid_constant__ Sums s, int64_t entries, int64_t dim) {
  const Lanes lanes(dim);
  // Pieces are few, components may be more than a grid has in its second dimension.
  const int64_t piece = lanes.first(blockIdx.y), pieces = (entries + kPiece - 1) / kPiece;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * lanes.width + lanes.lane;
  const bool counts = d == 0;
  if (piece >= pieces || d >= dim) return;
  const int64_t end = min((piece + 1) * kPiece, entries);
  int32_t row = -1;
  int runs = 0;
  double sum = 0, count = 0;
  const auto add_to_totals = [&] {
    s.sums[static_cast<int64_t>(row) * dim + d] += sum;
    if (counts) s.counts[row] += count;
  };
  const auto leave_partial = [&](int64_t place, int32_t of_row) {
    s.partial_sums[place * dim + d] = sum;
    if (!counts) return;
    s.partial_rows[place] = of_row;
    s.partial_counts[place] = count;
  };
  const auto close_run = [&](bool last) {
    if (row >= 0) {
      if (pieces == 1 || (runs > 0 && !last)) {
        add_to_totals();
      } else {
        leave_partial(2 * piece + (runs > 0), row);
      }
      ++runs;
    }
    sum = count = 0;
  };
  constexpr int ahead = 4;  // entries are read four at a time, for their latencies to overlap
  for (int64_t k = piece * kPiece; k < end; k += ahead) {
    int32_t next_row[ahead];
    double next_value[ahead], next_count[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      next_row[i] = k + i < end ? source.row(k + i) : -1;
      next_value[i] = next_row[i] >= 0 ? source.value(k + i, d) : 0;
      next_count[i] = next_row[i] >= 0 && counts ? source.count(k + i) : 0;
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (next_row[i] < 0) continue;
      if (next_row[i] != row) {
        close_run(false);
        row = next_row[i];
      }
      sum += next_value[i];
      count += next_count[i];
    }
  }
  close_run(true);
  for (; pieces > 1 && runs < 2; ++runs) leave_partial(2 * piece + runs, -1);
}

// --- up the tree ---

// Rows of one layer as a kernel writes them: in the type of the codebooks.
struct Target {
  void* data;
  Type type;
};

// From the sums of a layer's rows to its results. With `codewords` (statistics) the sums are of xi^i and become those
// of xi^(i-1), count e more. `sums` keeps what was written.
template <class W>
__global__ void __launch_bounds__(kThreads) finish_rows(double* sums, const double* counts, const W* codewords,
                                                        int64_t rows, int64_t dim, Target to, W* to_counts) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < rows * dim; k += step) {
    const double count = counts[k / dim];
    double sum = sums[k];
    if (codewords && count > 0) sum += count * static_cast<double>(codewords[k]);
    sums[k] = sum;
    write(to.data, k, to.type, static_cast<W>(sum));
    if (to_counts && k % dim == 0) to_counts[k / dim] = static_cast<W>(count);
  }
}

// The sums and counts of a layer's rows from those of their `size` children each.
__global__ void __launch_bounds__(kThreads)
    fold_children(const double* child_sums, const double* child_counts, int64_t rows, int size, int64_t dim,
                  double* sums, double* counts) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < rows * dim; k += step) {
    const int64_t row = k / dim, d = k % dim;
    double sum = 0, count = 0;
    for (int child = 0; child < size; ++child) sum += child_sums[(row * size + child) * dim + d];
    sums[k] = sum;
    if (d != 0) continue;
    for (int child = 0; child < size; ++child) count += child_counts[row * size + child];
    counts[row] = count;
  }
}

// Gradients of the rows of layer j of a tree, j = `layer`, from the training statistics. `below` (layers - j - 1, M^(j
// + 2), dim) holds for each layer i > j the sums of xi^i over the vectors of the rows below; `own` (layers - j, M^(j +
// 1), dim) becomes the same of this layer, i = j first.
template <class W>
__global__ void __launch_bounds__(kThreads)
    pull_up(const __grid_constant__ Problem p, int layer, int64_t rows, const W* weights, const W* counts,
            const W* sums, const double* below, double* own, Target to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, dim = p.dim, size = p.codebook_size;
  const W* codewords = static_cast<const W*>(p.rows[layer]);
  const int64_t first = p.first_row[layer];
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < rows * dim; k += step) {
    const int64_t row = k / dim, d = k % dim;
    const double count = static_cast<double>(counts[first + row]);
    double residual = 0, gradient = 0;
    if (count != 0) {
      residual = static_cast<double>(sums[(first + row) * dim + d]) - count * static_cast<double>(codewords[k]);
    }
    for (int i = layer; i < p.layers; ++i) {
      if (i > layer) {
        const double* children = below + (i - layer - 1) * rows * size * dim + row * size * dim + d;
        residual = 0;
        for (int64_t child = 0; child < size; ++child) residual += children[child * dim];
      }
      own[(i - layer) * rows * dim + k] = residual;
      const double weight = static_cast<double>(weights[layer * p.layers + i]);
      if (weight != 0) gradient += weight * residual;
    }
    write(to.data, k, to.type, static_cast<W>(gradient));
  }
}

}  // namespace vpfast::gpu
