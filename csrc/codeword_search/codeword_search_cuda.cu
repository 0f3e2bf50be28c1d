// codeword_search on CUDA: the host side. What is computed is told in README.md of the operator; how, in the headers:
//   codeword_search_small_cuda.h   the search where the codebooks fit into shared memory
//   codeword_search_large_cuda.h   the search everywhere else
//   codeword_search_sums_cuda.h    sums over vectors in a fixed order: statistics and gradients
//
// Nothing here waits for the GPU, and whatever the kernels need beyond inputs and outputs is allocated by PyTorch on
// its current stream: calls can be captured in a CUDA graph.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "codeword_search/codeword_search_large_cuda.h"
#include "codeword_search/codeword_search_small_cuda.h"
#include "codeword_search/codeword_search_sums_cuda.h"
#include "common/cuda_launch.h"
#include "common/cuda_shared_memory.h"
#include "common/devices.h"

namespace vpfast::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The working type.
template <class W>
constexpr ScalarType kScalar = sizeof(W) == 8 ? ScalarType::Double : ScalarType::Float;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Double:
      return Type::float64;
    default:
      STD_TORCH_CHECK(false, "codeword_search: float64/32/16 or bfloat16");
  }
}

Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), type_of(t)}; }

Tensor empty_beside(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty(std::vector<int64_t>(shape), type, std::nullopt, t.device());
}

template <class X>
X* data_of(Tensor& t) {
  return static_cast<X*>(t.mutable_data_ptr());
}

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// One call: the problem, and what keeps the memory that it points to alive.
struct Call {
  Problem p{};
  std::vector<Tensor> kept;
  int64_t rows = 0;
  cudaStream_t stream = nullptr;

  int64_t rows_of(int layer) const {
    return (layer + 1 < p.layers ? p.first_row[layer + 1] : rows) - p.first_row[layer];
  }
  const Tensor& some() const { return kept.front(); }
};

template <class... Parameters, class... Arguments>
void launch(const Call& call, void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_memory,
            Arguments&&... arguments) {
  if (shared_memory > kFreeSharedMemory) allow_shared_memory(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_memory);
  config.stream = call.stream;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  check_launch("codeword_search");
}

// A grid for kernels that go over their work in steps of the grid.
dim3 grid_for(int64_t threads, int64_t most_blocks) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(parts(threads, kThreads), 1, most_blocks)));
}

// A copy where the address is not one that 16 bytes can be read from.
Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

// Shapes and codewords. The public function has told the user what is wrong; here nothing may read out of bounds.
template <class W>
Call plan(const Tensor& on, const std::vector<Tensor>& codebooks, bool strict_tree) {
  const int64_t vectors = on.size(0), dim = on.size(1);
  const int64_t layers = static_cast<int64_t>(codebooks.size());
  STD_TORCH_CHECK(layers >= 1 && layers <= kMaxLayers, "codeword_search: 1 to 16 codebooks, got ", layers);
  const int64_t size = codebooks[0].size(0);
  STD_TORCH_CHECK(size >= 2 && dim >= 1, "codeword_search: needs at least two codewords and one dimension");
  Call call;
  Problem& p = call.p;
  p.vectors = vectors;
  p.dim = dim;
  p.layers = static_cast<int32_t>(layers);
  p.codebook_size = static_cast<int32_t>(size);
  p.strict_tree = strict_tree;
  call.stream = current_stream(on);
  int64_t rows = 1;
  for (int64_t layer = 0; layer < layers; ++layer) {
    rows = strict_tree ? rows * size : size;
    const Tensor& codebook = codebooks[layer];
    // Kernels go past the last one by less than a tile.
    STD_TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max() - kTile,
                    "codeword_search: too many codewords in a layer: ", rows);
    STD_TORCH_CHECK(codebook.dim() == 2 && codebook.size(0) == rows && codebook.size(1) == dim,
                    "codeword_search: layer ", layer + 1, " must be (", rows, ", ", dim, ")");
    call.kept.push_back(aligned(torch::stable::contiguous(torch::stable::to(codebook, kScalar<W>))));
    p.rows[layer] = call.kept.back().const_data_ptr();
    p.first_row[layer] = call.rows;
    call.rows += rows;
  }
  return call;
}

// --- the search ---

template <int D>
void search_small(const Call& call, const SmallLayout& s) {
  const int64_t bytes = int64_t{s.words} * 4;
  int blocks = 1;
  if (bytes > kFreeSharedMemory) allow_shared_memory(reinterpret_cast<const void*>(gpu::search_small<D>));
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, gpu::search_small<D>, kThreads, static_cast<size_t>(bytes));
  const int64_t most = std::max(blocks, 1) * multiprocessors();
  const int64_t tiles = parts(call.p.vectors, int64_t{kWarps} * Small<D>::kSlots);
  launch(call, gpu::search_small<D>, dim3(static_cast<unsigned>(std::min(tiles, most))), kThreads, bytes, call.p, s);
}

// Can rows of z be read in pieces of up to 16 bytes?
bool reads_whole_rows(const Problem& p) {
  const int64_t element = p.z.type == Type::float32 ? 4 : 2, piece = std::min<int64_t>(p.dim * element, 16);
  return p.dim == padded_dim(p.dim) && p.z.column == 1 && p.z.row * element % piece == 0 &&
         reinterpret_cast<uintptr_t>(p.z.data) % piece == 0;
}

// false where the codebooks do not fit.
bool search_small(const Call& call) {
  const Problem& p = call.p;
  SmallLayout s{};
  if (p.dim > kLargestSmallDim || !lay_out(p, s) || int64_t{s.words} * 4 > most_shared_memory()) return false;
  s.whole_rows = reads_whole_rows(p);
  if (p.dim <= 4) {
    search_small<4>(call, s);
  } else if (p.dim <= 8) {
    search_small<8>(call, s);
  } else {
    search_small<16>(call, s);
  }
  return true;
}

Measures measure(Call& call) {
  const Problem& p = call.p;
  std::vector<int64_t> first{0};
  for (int layer = 0; layer < p.layers; ++layer) {
    first.push_back(first.back() + (p.strict_tree ? call.rows_of(layer) / p.codebook_size : 1));
  }
  const int64_t codebooks = first.back();
  Tensor biases = empty_beside(call.some(), {call.rows}, ScalarType::Float);
  Tensor of_codebooks = empty_beside(call.some(), {2, codebooks}, ScalarType::Int);
  Tensor lengths = empty_beside(call.some(), {kMaxLayers, 2}, ScalarType::Float);
  unsigned* shortest = data_of<unsigned>(of_codebooks);
  const Measures m{data_of<float>(biases), shortest, shortest + codebooks, data_of<LengthsOf<float>>(lengths)};
  cudaMemsetAsync(m.shortest, 0x7f, codebooks * sizeof(unsigned), call.stream);
  cudaMemsetAsync(m.longest, 0, codebooks * sizeof(unsigned), call.stream);
  for (int layer = 0; layer < p.layers; ++layer) {
    const int64_t blocks = (first[layer + 1] - first[layer]) * parts(p.codebook_size, kMeasured);
    launch(call, measure_codewords, dim3(static_cast<unsigned>(blocks)), kThreads, 0, p, m, layer, first[layer]);
  }
  launch(call, gather_lengths, dim3(p.layers), kThreads, 0, p, m);
  call.kept.insert(call.kept.end(), {biases, of_codebooks, lengths});
  return m;
}

void search_tiles(Call& call, const Measures& m) {
  const Problem& p = call.p;
  constexpr int64_t chunk = 1 << 17;
  const int64_t tiles = parts(std::min(p.vectors, chunk), kTile), codeword_tiles = parts(p.codebook_size, kTile);
  const int64_t splits = std::clamp<int64_t>(2 * multiprocessors() / tiles, 1, codeword_tiles);
  const int64_t podium = sizeof(Podium) / sizeof(int32_t);
  Tensor podiums = empty_beside(call.some(), {tiles * kTile, splits, podium}, ScalarType::Int);
  Tiles t{0, 0, 0, static_cast<int32_t>(splits), data_of<Podium>(podiums)};
  for (t.first = 0; t.first < p.vectors; t.first += chunk) {
    t.count = static_cast<int32_t>(std::min(p.vectors - t.first, chunk));
    for (t.layer = 0; t.layer < p.layers; ++t.layer) {
      const dim3 grid(static_cast<unsigned>(parts(t.count, kTile)), static_cast<unsigned>(splits));
      launch(call, scan_tiles, grid, kThreads, 0, p, m, t);
      launch(call, settle, dim3(static_cast<unsigned>(parts(t.count, kWarps))), kThreads, 0, p, m, t);
    }
  }
}

// As many warps a block as have room for a residual each; where there is none for one, every code is decided.
template <class W>
void search_by_walking(const Call& call, const Measures& m) {
  const Problem& p = call.p;
  const int64_t residual = p.dim * static_cast<int64_t>(sizeof(float));
  const int64_t room = sizeof(W) == 4 ? (most_shared_memory() - (1 << 10)) / residual : 0;
  const int64_t warps = room >= 1 ? std::min<int64_t>(room, kWarps) : kWarps;
  const dim3 grid(static_cast<unsigned>(std::min(parts(p.vectors, warps), 8 * multiprocessors())));
  const int threads = static_cast<int>(warps * kWarp);
  if constexpr (sizeof(W) == 4) {
    if (room >= 1) return launch(call, walk<W, true>, grid, threads, warps * residual, p, m);
  }
  launch(call, walk<W, false>, grid, threads, 0, p, m);
}

// Writes p.indices and p.quantized.
template <class W>
void search_codes(Call& call) {
  if (call.p.vectors == 0) return;
  if constexpr (sizeof(W) == 8) {
    search_by_walking<W>(call, Measures{});
  } else if (!search_small(call)) {
    const Measures m = measure(call);
    if (call.p.strict_tree && call.p.layers > 1) {
      search_by_walking<W>(call, m);
    } else {
      search_tiles(call, m);
    }
  }
}

// --- sums over vectors ---

// float64 sums (rows, dim) and counts (rows,).
struct Totals {
  Tensor sums, counts;
};

Totals empty_totals(const Call& call, int64_t rows) {
  return {empty_beside(call.some(), {rows, call.p.dim}, ScalarType::Double),
          empty_beside(call.some(), {rows}, ScalarType::Double)};
}

// Sorts a chunk by its keys, pass by pass between two buffers; returns the one that it ends in.
const int32_t* sort_by_row(const Call& call, const int32_t* keys, int32_t count, int64_t rows, int32_t* buffers,
                           int32_t* places) {
  int bits = 1;
  while ((int64_t{1} << bits) <= rows) ++bits;
  const int passes = (bits + kMostBits - 1) / kMostBits, digit_bits = (bits + passes - 1) / passes;
  const int32_t* order = nullptr;
  for (int k = 0; k < passes; ++k) {
    int32_t* sorted = buffers + (k % 2) * int64_t{count};
    const int blocks = static_cast<int>(parts(count, kSorted));
    const Pass pass{keys, order, sorted, places, count, blocks, k * digit_bits, digit_bits};
    launch(call, count_digits, dim3(blocks), kThreads, 0, pass);
    launch(call, place_blocks, dim3(static_cast<unsigned>(parts(int64_t{1} << digit_bits, kWarps))), kThreads, 0, pass);
    launch(call, place_vectors, dim3(blocks), kThreads, 0, pass);
    order = sorted;
  }
  return order;
}

template <class Source>
int64_t launch_runs(const Call& call, const Source& source, const Sums& s, int64_t entries) {
  const int64_t dim = call.p.dim, width = dim <= 8 ? 8 : kWarp, pieces = parts(entries, kPiece);
  const dim3 grid(static_cast<unsigned>(parts(dim, width)), static_cast<unsigned>(parts(pieces * width, kThreads)));
  launch(call, add_runs<Source>, grid, kThreads, 0, source, s, entries, dim);
  return pieces;
}

// The partial sums that a level leaves, as the next one reads them.
struct Partials {
  Tensor sums, counts, rows;
  Partials(const Call& call, int64_t pieces)
      : sums(empty_beside(call.some(), {2 * pieces, call.p.dim}, ScalarType::Double)),
        counts(empty_beside(call.some(), {2 * pieces}, ScalarType::Double)),
        rows(empty_beside(call.some(), {2 * pieces}, ScalarType::Int)) {}
  void write_from(Sums& s) {
    s.partial_sums = data_of<double>(sums);
    s.partial_counts = data_of<double>(counts);
    s.partial_rows = data_of<int32_t>(rows);
  }
  OfPartials as_source(int64_t dim) {
    return {data_of<int32_t>(rows), data_of<double>(counts), data_of<double>(sums), dim};
  }
};

// What `wanted` says, over all vectors. `finite_only` leaves out vectors that hold NaN or infinity.
template <class W>
Totals collect(const Call& call, const Sums& wanted, bool finite_only) {
  const Problem& p = call.p;
  const int64_t rows = call.rows_of(wanted.slot);
  Totals totals = empty_totals(call, rows);
  cudaMemsetAsync(data_of<double>(totals.sums), 0, rows * p.dim * sizeof(double), call.stream);
  cudaMemsetAsync(data_of<double>(totals.counts), 0, rows * sizeof(double), call.stream);
  if (p.vectors == 0) return totals;
  const int64_t chunk = std::min(p.vectors, std::clamp<int64_t>((1 << 25) / p.dim, 1 << 12, 1 << 20));
  const int64_t blocks = parts(chunk, kSorted), pieces = parts(chunk, kPiece);
  Tensor keys = empty_beside(call.some(), {chunk}, ScalarType::Int);
  Tensor buffers = empty_beside(call.some(), {2, chunk}, ScalarType::Int);
  Tensor places = empty_beside(call.some(), {(1 << kMostBits) * (blocks + 1)}, ScalarType::Int);
  Partials partials[2] = {Partials(call, pieces), Partials(call, parts(2 * pieces, kPiece))};
  Sums s = wanted;
  s.sums = data_of<double>(totals.sums);
  s.counts = data_of<double>(totals.counts);
  s.keys = data_of<int32_t>(keys);
  for (s.first = 0; s.first < p.vectors; s.first += chunk) {
    s.count = static_cast<int32_t>(std::min(p.vectors - s.first, chunk));
    const int64_t width = p.dim <= 8 ? 8 : kWarp;
    launch(call, find_rows<W>, grid_for(s.count * width, 16 * multiprocessors()), kThreads, 0, p, s.first, s.count,
           finite_only, s.slot, data_of<int32_t>(keys));
    s.order = sort_by_row(call, s.keys, s.count, rows, data_of<int32_t>(buffers), data_of<int32_t>(places));
    partials[0].write_from(s);
    int64_t left = launch_runs(call, OfVectors<W>{p, s}, s, s.count);
    for (int level = 1; left > 1; ++level) {
      partials[level % 2].write_from(s);
      left = launch_runs(call, partials[(level + 1) % 2].as_source(p.dim), s, 2 * left);
    }
  }
  return totals;
}

dim3 grid_of_rows(const Call& call, int64_t rows) { return grid_for(rows * call.p.dim, 16 * multiprocessors()); }

// A layer's totals become results; `codewords` and `counts` as in finish_rows.
template <class W>
void finish(const Call& call, int layer, Totals& totals, const W* codewords, Target to, W* counts) {
  const int64_t rows = call.rows_of(layer);
  launch(call, finish_rows<W>, grid_of_rows(call, rows), kThreads, 0, data_of<double>(totals.sums),
         data_of<double>(totals.counts), codewords, rows, call.p.dim, to, counts);
}

// The totals of a tree's layer from those of the layer below it.
Totals fold(const Call& call, int layer, Totals& below) {
  const int64_t rows = call.rows_of(layer);
  Totals totals = empty_totals(call, rows);
  launch(call, fold_children, grid_of_rows(call, rows), kThreads, 0, data_of<double>(below.sums),
         data_of<double>(below.counts), rows, int{call.p.codebook_size}, call.p.dim, data_of<double>(totals.sums),
         data_of<double>(totals.counts));
  return totals;
}

// --- the operators ---

void read_from(Call& call, const Tensor& z) { call.p.z = matrix_of(z); }

// The outputs of a search, in the call's problem.
std::tuple<Tensor, Tensor> make_outputs(Call& call, const Tensor& z) {
  Tensor quantized = empty_beside(z, {call.p.vectors, call.p.dim}, z.scalar_type());
  Tensor indices = empty_beside(z, {call.p.vectors, call.p.layers}, ScalarType::Long);
  call.p.quantized = quantized.mutable_data_ptr();
  call.p.indices = data_of<int64_t>(indices);
  return {quantized, indices};
}

template <class W>
std::tuple<Tensor, Tensor> search(const Tensor& z, const std::vector<Tensor>& codebooks, bool strict_tree) {
  Call call = plan<W>(z, codebooks, strict_tree);
  read_from(call, z);
  auto outputs = make_outputs(call, z);
  search_codes<W>(call);
  return outputs;
}

template <class W>
void measure_all_errors(const Call& call, W* to) {
  const Problem& p = call.p;
  const int64_t width = p.dim <= 8 ? 8 : kWarp;
  const dim3 grid = grid_for(p.vectors * width, kMeasureBlocks);
  Tensor errors = empty_beside(call.some(), {grid.x, p.layers}, ScalarType::Double);
  launch(call, measure_errors<W>, grid, kThreads, 0, p, data_of<double>(errors));
  launch(call, add_errors<W>, dim3(p.layers), kWarp, 0, data_of<double>(errors), static_cast<int>(grid.x),
         int{p.layers}, to);
}

template <class W>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train(const Tensor& z, const std::vector<Tensor>& codebooks,
                                                         bool strict_tree) {
  Call call = plan<W>(z, codebooks, strict_tree);
  const Problem& p = call.p;
  read_from(call, z);
  const auto [quantized, indices] = make_outputs(call, z);
  Tensor errors = empty_beside(z, {p.layers}, kScalar<W>);
  Tensor counts = empty_beside(z, {call.rows}, kScalar<W>);
  Tensor sums = empty_beside(z, {call.rows, p.dim}, kScalar<W>);
  search_codes<W>(call);
  measure_all_errors(call, data_of<W>(errors));
  const auto finish_layer = [&](int layer, Totals& totals) {
    const Target to{data_of<W>(sums) + p.first_row[layer] * p.dim, type_of(sums)};
    const W* codewords = strict_tree ? static_cast<const W*>(p.rows[layer]) : nullptr;
    finish(call, layer, totals, codewords, to, data_of<W>(counts) + p.first_row[layer]);
  };
  Sums wanted{};
  wanted.kind = strict_tree ? Kind::residual_after : Kind::residual_before;
  for (int layer = p.layers - 1; layer >= 0 && !strict_tree; --layer) {
    wanted.slot = layer;
    Totals totals = collect<W>(call, wanted, true);
    finish_layer(layer, totals);
  }
  if (strict_tree) {
    wanted.slot = p.layers - 1;
    Totals totals = collect<W>(call, wanted, true);
    finish_layer(p.layers - 1, totals);
    for (int layer = p.layers - 2; layer >= 0; --layer) {
      totals = fold(call, layer, totals);
      finish_layer(layer, totals);
    }
  }
  return {quantized, indices, errors, counts, sums};
}

Tensor check_indices(const Tensor& indices, int64_t vectors, size_t layers) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 2 && indices.size(0) == vectors &&
                      indices.size(1) == static_cast<int64_t>(layers),
                  "codeword_search: indices must be int64 (", vectors, ", ", layers, ")");
  return torch::stable::contiguous(indices);
}

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  bool right = t.scalar_type() == type && t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) right = right && t.size(d++) == size;
  STD_TORCH_CHECK(right, "codeword_search: ", name, " has a wrong shape or type");
}

// Gradients are written in the type of the codebooks.
struct Gradients {
  std::vector<Tensor> tensors;

  explicit Gradients(const std::vector<Tensor>& codebooks) {
    for (const Tensor& codebook : codebooks) {
      tensors.push_back(empty_beside(codebook, {codebook.size(0), codebook.size(1)}, codebook.scalar_type()));
    }
  }
  Target of(int layer) { return {tensors[layer].mutable_data_ptr(), type_of(tensors[layer])}; }
};

void take_indices(Call& call, const Tensor& indices) {
  const Tensor checked = check_indices(indices, call.p.vectors, call.p.layers);
  call.p.indices = static_cast<int64_t*>(const_cast<void*>(checked.const_data_ptr()));
  call.kept.push_back(checked);
}

template <class W>
std::vector<Tensor> search_backward(const Tensor& grad_quantized, const Tensor& indices,
                                    const std::vector<Tensor>& codebooks, bool strict_tree) {
  Call call = plan<W>(grad_quantized, codebooks, strict_tree);
  const int layers = call.p.layers;
  take_indices(call, indices);
  Gradients gradients(codebooks);
  Sums wanted{};
  wanted.kind = Kind::gradient;
  wanted.gradient = matrix_of(grad_quantized);
  wanted.slot = layers - 1;
  Totals totals = collect<W>(call, wanted, false);
  finish<W>(call, layers - 1, totals, nullptr, gradients.of(layers - 1), nullptr);
  for (int layer = layers - 2; layer >= 0; --layer) {
    wanted.slot = layer;
    totals = strict_tree ? fold(call, layer, totals) : collect<W>(call, wanted, false);
    finish<W>(call, layer, totals, nullptr, gradients.of(layer), nullptr);
  }
  return gradients.tensors;
}

// The gradients of a tree's rows, from the leaves up.
template <class W>
void pull_up_gradients(const Call& call, const W* weights, const W* counts, const W* sums, Gradients& gradients) {
  const Problem& p = call.p;
  Tensor below;
  for (int layer = p.layers - 1; layer >= 0; --layer) {
    const int64_t rows = call.rows_of(layer);
    Tensor own = empty_beside(call.some(), {p.layers - layer, rows, p.dim}, ScalarType::Double);
    const double* from = layer + 1 < p.layers ? data_of<double>(below) : nullptr;
    launch(call, pull_up<W>, grid_of_rows(call, rows), kThreads, 0, p, layer, rows, weights, counts, sums, from,
           data_of<double>(own), gradients.of(layer));
    below = own;
  }
}

template <class W>
std::tuple<Tensor, std::vector<Tensor>> train_backward(const Tensor& z, const std::optional<Tensor>& grad_quantized,
                                                       const Tensor& weights_z, const Tensor& weights_codebooks,
                                                       const Tensor& indices, const std::vector<Tensor>& codebooks,
                                                       const Tensor& counts, const Tensor& sums, bool strict_tree) {
  Call call = plan<W>(z, codebooks, strict_tree);
  const Problem& p = call.p;
  check(weights_z, "weights_z", kScalar<W>, {p.layers});
  check(weights_codebooks, "weights_codebooks", kScalar<W>, {p.layers, p.layers});
  check(counts, "counts", kScalar<W>, {call.rows});
  check(sums, "sums", kScalar<W>, {call.rows, p.dim});
  const auto dense = [&](const Tensor& t) {
    call.kept.push_back(torch::stable::contiguous(t));
    return static_cast<const W*>(call.kept.back().const_data_ptr());
  };
  const W *of_z = dense(weights_z), *of_codebooks = dense(weights_codebooks);
  read_from(call, z);
  take_indices(call, indices);
  Matrix gradient{};
  if (grad_quantized) {
    check(*grad_quantized, "grad_quantized", z.scalar_type(), {p.vectors, p.dim});
    gradient = matrix_of(*grad_quantized);
  }
  Tensor grad_z = empty_beside(z, {p.vectors, p.dim}, z.scalar_type());
  Gradients gradients(codebooks);
  if (p.vectors > 0) {
    const int64_t width = p.dim <= 8 ? 8 : kWarp;
    launch(call, differentiate<W>, grid_for(p.vectors * width, 16 * multiprocessors()), kThreads, 0, p, gradient, of_z,
           grad_z.mutable_data_ptr());
  }
  if (strict_tree) {
    pull_up_gradients(call, of_codebooks, dense(counts), dense(sums), gradients);
    return {grad_z, gradients.tensors};
  }
  Sums wanted{};
  wanted.kind = Kind::pull;
  wanted.weights = of_codebooks;
  for (int layer = 0; layer < p.layers; ++layer) {
    wanted.slot = layer;
    Totals totals = collect<W>(call, wanted, true);
    finish<W>(call, layer, totals, nullptr, gradients.of(layer), nullptr);
  }
  return {grad_z, gradients.tensors};
}

// --- by type ---

// `z`, by that name, is what says where and in which type the call is. Comes before anything asks for its device.
void check_inputs(const char* name, const Tensor& z, const std::vector<Tensor>& codebooks,
                  std::initializer_list<Named> others = {}) {
  STD_TORCH_CHECK(z.dim() == 2, "codeword_search: ", name, " must be (N, D)");
  for (const Named& other : others) check_device("codeword_search", {name, z}, other);
  for (const Tensor& codebook : codebooks) {
    check_device("codeword_search", {name, z}, {"a codebook", codebook});
    const bool working = z.scalar_type() != ScalarType::Double && codebook.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(working || codebook.scalar_type() == z.scalar_type(),
                    "codeword_search: codebooks must have the type of z, or float32 beside half precision");
  }
}

#define VPFAST_BY_TYPE(TENSOR, FUNCTION, ...)                                         \
  const OnDeviceOf device(TENSOR);                                                    \
  if (type_of(TENSOR) == Type::float64) return FUNCTION<double>(TENSOR, __VA_ARGS__); \
  return FUNCTION<float>(TENSOR, __VA_ARGS__);

std::tuple<Tensor, Tensor> codeword_search(Tensor z, std::vector<Tensor> codebooks, bool strict_tree) {
  check_inputs("z", z, codebooks);
  VPFAST_BY_TYPE(z, search, codebooks, strict_tree)
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> codeword_search_train(Tensor z, std::vector<Tensor> codebooks,
                                                                         bool strict_tree) {
  check_inputs("z", z, codebooks);
  VPFAST_BY_TYPE(z, train, codebooks, strict_tree)
}

std::vector<Tensor> codeword_search_backward(Tensor grad_quantized, Tensor indices, std::vector<Tensor> codebooks,
                                             bool strict_tree) {
  check_inputs("grad_quantized", grad_quantized, codebooks, {{"indices", indices}});
  VPFAST_BY_TYPE(grad_quantized, search_backward, indices, codebooks, strict_tree)
}

std::tuple<Tensor, std::vector<Tensor>> codeword_search_train_backward(std::optional<Tensor> grad_quantized,
                                                                       Tensor weights_z, Tensor weights_codebooks,
                                                                       Tensor z, Tensor indices,
                                                                       std::vector<Tensor> codebooks, Tensor counts,
                                                                       Tensor sums, bool strict_tree) {
  check_inputs("z", z, codebooks,
               {{"grad_quantized", grad_quantized ? *grad_quantized : z},
                {"weights_z", weights_z},
                {"weights_codebooks", weights_codebooks},
                {"indices", indices},
                {"counts", counts},
                {"sums", sums}});
  VPFAST_BY_TYPE(z, train_backward, grad_quantized, weights_z, weights_codebooks, indices, codebooks, counts, sums,
                 strict_tree)
}

}  // namespace
}  // namespace vpfast::gpu

STABLE_TORCH_LIBRARY_IMPL(vpfast, CUDA, m) {
  m.impl("codeword_search", TORCH_BOX(&vpfast::gpu::codeword_search));
  m.impl("codeword_search_train", TORCH_BOX(&vpfast::gpu::codeword_search_train));
  m.impl("codeword_search_backward", TORCH_BOX(&vpfast::gpu::codeword_search_backward));
  m.impl("codeword_search_train_backward", TORCH_BOX(&vpfast::gpu::codeword_search_train_backward));
}
