// codeword_search on the CPU.
//
// Story. Vectors go in groups of 48 through all layers, a thread a range of groups: z is read once, and what a group
// needs (its residuals, a slice of a codebook) stays in the L1 cache. Two ways to scan, both in float32 by scores
// (codeword_search_math.h), with near-ties decided in float64:
//   by panels   codewords in the lanes of a register, components of a vector broadcast. Where all vectors search one
//               codebook it is a tiled matrix product that keeps the best two scores of each lane in place of the
//               products; where each has its own, a tile is one vector high. Every shape, every instruction set.
//   by lookup   sixteen vectors in the lanes, for the top layers of small trees on AVX-512 (codeword_search_lookup.h).
// Codes done, a second walk over the group, still in the cache, adds the codewords up and collects what training needs.
//
// Sums over vectors (statistics, gradients of codebooks) are collected in an order that the problem alone decides: by
// chunks of vectors with a table each, added up in order, or, where tables are large, by ranges of rows, each taken
// through all vectors. No result depends on the number of threads. A tree collects at its leaves only
// (codeword_search_tree.h).
//
// Bytes a vector of s each: 2 D s + 8 n forward, 3 D s + 8 n backward. Operations: n M (2 D + 2).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "codeword_search/codeword_search_layout.h"
#include "codeword_search/codeword_search_problem.h"
#include "codeword_search/codeword_search_tree.h"
#include "common/isa.h"

namespace vpfast {

template <class T, class W>
int64_t decide(const Problem& p, int64_t vector, int64_t layer, int64_t parent, const int64_t* codes_so_far,
               const int64_t* candidates, int64_t count, double* residual) {
  const T* z = static_cast<const T*>(p.z) + vector * p.z_row;
  for (int64_t d = 0; d < p.dim; ++d) residual[d] = static_cast<double>(z[d * p.z_column]);
  int64_t row = 0;
  for (int64_t above = 0; above < layer; ++above) {
    row = row_of(p.strict_tree, p.codebook_size, row, codes_so_far[above]);
    const W* codeword = static_cast<const W*>(p.rows[above]) + row * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) residual[d] -= static_cast<double>(codeword[d]);
  }
  double least = std::numeric_limits<double>::infinity();
  int64_t nearest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t code = candidates ? candidates[k] : k;
    const int64_t own = row_of(p.strict_tree, p.codebook_size, parent, code);
    const double distance = squared_distance(residual, static_cast<const W*>(p.rows[layer]) + own * p.dim, p.dim);
    if (distance < least) {
      least = distance;
      nearest = code;
    }
  }
  return nearest;
}

}  // namespace vpfast

#define VPFAST_KERNEL_FILE "codeword_search/codeword_search_kernel.h"
#include "common/for_each_isa.h"

namespace vpfast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTableBytes = int64_t{1} << 23;  // for all chunks' tables together
constexpr int64_t kChunks = 64;

template <class T>
constexpr ScalarType kType = ScalarType::Float;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;

int lanes_of(Isa isa) { return isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4; }

// One call: the problem, and what keeps the memory that it points to alive.
struct Call {
  Problem p{};
  std::vector<Tensor> kept;
  PackedPanels panels;
  PackedLookups lookups;
  int64_t rows = 0;

  int64_t collected_rows() const { return p.strict_tree ? rows - p.first_row[p.layers - 1] : rows; }
  int64_t first_collected() const { return p.strict_tree ? p.first_row[p.layers - 1] : 0; }
};

// Shapes and codewords. The public function has told the user what is wrong; here nothing may read out of bounds.
template <class W>
Call plan(const std::vector<Tensor>& codebooks, int64_t vectors, int64_t dim, bool strict_tree) {
  const int64_t layers = static_cast<int64_t>(codebooks.size());
  STD_TORCH_CHECK(layers >= 1 && layers <= kMaxLayers, "codeword_search: 1 to 16 codebooks, got ", layers);
  Call call;
  Problem& p = call.p;
  p.vectors = vectors;
  p.dim = dim;
  p.layers = layers;
  p.strict_tree = strict_tree;
  p.codebook_size = codebooks[0].size(0);
  STD_TORCH_CHECK(p.codebook_size >= 1 && dim >= 1, "codeword_search: a codebook or the vectors are empty");
  int64_t rows = 1;
  for (int64_t layer = 0; layer < layers; ++layer) {
    rows = strict_tree ? rows * p.codebook_size : p.codebook_size;
    const Tensor& codebook = codebooks[layer];
    STD_TORCH_CHECK(codebook.dim() == 2 && codebook.size(0) == rows && codebook.size(1) == dim,
                    "codeword_search: layer ", layer + 1, " must be (", rows, ", ", dim, ")");
    call.kept.push_back(torch::stable::contiguous(torch::stable::to(codebook, kType<W>)));
    p.rows[layer] = call.kept.back().const_data_ptr();
    p.first_row[layer] = call.rows;
    call.rows += rows;
  }
  return call;
}

void read_from(Problem& p, const Tensor& z) {
  p.z = z.const_data_ptr();
  p.z_row = z.stride(0);
  p.z_column = z.stride(1);
}

template <class W>
void prepare_search(Call& call, Isa isa) {
  Problem& p = call.p;
  int64_t rows = 1;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    rows = p.strict_tree ? rows * p.codebook_size : p.codebook_size;
    p.reach[layer] = reach(static_cast<const W*>(p.rows[layer]), rows, p.dim);
  }
  if (std::is_same_v<W, double>) return;
  p.lookups.layers = isa == Isa::avx512 ? layers_by_lookup(p) : 0;
  call.lookups = pack_lookups(p);
  call.panels = pack_panels(p, 0, lanes_of(isa));
}

// Enough groups a thread that waking it pays.
int64_t grain(const Problem& p) {
  const int64_t work = kGroup * p.layers * (p.codebook_size * p.dim / 8 + 64);
  return std::max<int64_t>(1, 400000 / work);
}

int64_t groups(int64_t vectors) { return (vectors + kGroup - 1) / kGroup; }

template <class T, class W>
struct Kernels {
  void (*search)(const Problem&, int64_t first, int64_t count, float* residuals, double* scratch);
  void (*follow)(const Problem&, Pass<W>&, int64_t begin, int64_t end, W* memory);

  static Kernels of(Isa isa) {
    if (isa == Isa::avx512) return {avx512::search_group<T>, avx512::follow_codes<T, W>};
    if (isa == Isa::avx2) return {avx2::search_group<T>, avx2::follow_codes<T, W>};
    return {plain::search_group<T>, plain::follow_codes<T, W>};
  }
};

// A thread's working memory.
template <class W>
struct Memory {
  std::vector<float> residuals;
  std::vector<double> scratch;
  std::vector<W> rows;

  explicit Memory(const Problem& p) : residuals(kGroup * p.dim), scratch(p.dim), rows((2 + 2 * p.layers) * p.dim) {}
};

// --- sums over vectors
// ------------------------------------------------------------------------------------------------

struct Sums {
  std::vector<double> counts, sums, errors;
};

// Takes all vectors through `visit(pass, begin, end, memory)` once with `outputs` set in the pass, and through as much
// more as it takes to collect the table.
template <class W, class Visit>
Sums collect_sums(const Call& call, Pass<W> outputs, bool with_errors, std::atomic<bool>& bad_index,
                  const Visit& visit) {
  const Problem& p = call.p;
  const int64_t rows = call.collected_rows(), first = call.first_collected();
  const int64_t table_bytes = rows * (p.dim * sizeof(W) + sizeof(int64_t));
  const bool by_chunks = 8 * table_bytes <= kTableBytes;
  const int64_t most = by_chunks ? std::min(kChunks, kTableBytes / table_bytes) : kChunks;
  const int64_t chunk = kGroup * std::max<int64_t>(16, (groups(p.vectors) + most - 1) / most);
  const int64_t chunks = (p.vectors + chunk - 1) / chunk;

  std::vector<W> tables(by_chunks ? chunks * rows * p.dim : 0);
  std::vector<int64_t> counts(by_chunks ? chunks * rows : 0);
  std::vector<double> errors(chunks * p.layers);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Memory<W> memory(p);
    for (int64_t k = begin; k < end; ++k) {
      Pass<W> pass = outputs;
      if (with_errors) pass.errors = errors.data() + k * p.layers;
      if (by_chunks) pass.table = {tables.data() + k * rows * p.dim, counts.data() + k * rows, first, first + rows};
      for (int64_t v = k * chunk; v < std::min((k + 1) * chunk, p.vectors); v += kGroup) {
        visit(pass, v, std::min(v + kGroup, p.vectors), memory, true);
      }
      if (pass.bad_index) bad_index = true;
    }
  });

  Sums total{std::vector<double>(rows), std::vector<double>(rows * p.dim), std::vector<double>(p.layers)};
  for (int64_t k = 0; k < chunks * p.layers; ++k) total.errors[k % p.layers] += errors[k];
  const int64_t range = (rows + 15) / 16;
  torch::stable::parallel_for(0, 16, by_chunks && rows * p.dim < 4096 ? 16 : 1, [&](int64_t begin, int64_t end) {
    const int64_t least = std::min(begin * range, rows), most_row = std::min(end * range, rows);
    if (least >= most_row) return;
    if (by_chunks) {
      for (int64_t k = 0; k < chunks; ++k) {
        for (int64_t r = least; r < most_row; ++r) total.counts[r] += counts[k * rows + r];
        for (int64_t e = least * p.dim; e < most_row * p.dim; ++e) total.sums[e] += tables[k * rows * p.dim + e];
      }
      return;
    }
    Memory<W> memory(p);
    std::vector<W> sums((most_row - least) * p.dim);
    std::vector<int64_t> count(most_row - least);
    Pass<W> pass{};
    pass.weights_codebooks = outputs.weights_codebooks;
    pass.grad_quantized = outputs.grad_z ? nullptr : outputs.grad_quantized;
    pass.grad_row = outputs.grad_row;
    pass.grad_column = outputs.grad_column;
    pass.table = {sums.data(), count.data(), first + least, first + most_row};
    visit(pass, 0, p.vectors, memory, false);
    std::copy(count.begin(), count.end(), total.counts.begin() + least);
    std::copy(sums.begin(), sums.end(), total.sums.begin() + least * p.dim);
  });
  return total;
}

// --- the operators
// ----------------------------------------------------------------------------------------------------

template <class T, class W>
std::tuple<Tensor, Tensor> search(const Tensor& z, const std::vector<Tensor>& codebooks, bool strict_tree) {
  Call call = plan<W>(codebooks, z.size(0), z.size(1), strict_tree);
  Problem& p = call.p;
  Tensor quantized = torch::stable::empty({p.vectors, p.dim}, z.scalar_type());
  Tensor indices = torch::stable::empty({p.vectors, p.layers}, ScalarType::Long);
  if (p.vectors == 0) return {quantized, indices};
  const Isa isa = active_isa();
  read_from(p, z);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  prepare_search<W>(call, isa);
  const auto kernels = Kernels<T, W>::of(isa);
  void* to = quantized.mutable_data_ptr();
  torch::stable::parallel_for(0, groups(p.vectors), grain(p), [&](int64_t begin, int64_t end) {
    Memory<W> memory(p);
    Pass<W> pass{};
    pass.quantized = to;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kGroup, count = std::min(kGroup, p.vectors - first);
      kernels.search(p, first, count, memory.residuals.data(), memory.scratch.data());
      kernels.follow(p, pass, first, first + count, memory.rows.data());
    }
  });
  return {quantized, indices};
}

template <class T, class W>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train(const Tensor& z, const std::vector<Tensor>& codebooks,
                                                         bool strict_tree) {
  Call call = plan<W>(codebooks, z.size(0), z.size(1), strict_tree);
  Problem& p = call.p;
  Tensor quantized = torch::stable::empty({p.vectors, p.dim}, z.scalar_type());
  Tensor indices = torch::stable::empty({p.vectors, p.layers}, ScalarType::Long);
  Tensor errors = torch::stable::empty({p.layers}, kType<W>);
  Tensor counts = torch::stable::empty({call.rows}, kType<W>);
  Tensor sums = torch::stable::empty({call.rows, p.dim}, kType<W>);
  const Isa isa = active_isa();
  read_from(p, z);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  prepare_search<W>(call, isa);
  const auto kernels = Kernels<T, W>::of(isa);
  Pass<W> outputs{};
  outputs.quantized = quantized.mutable_data_ptr();
  std::atomic<bool> bad_index{false};
  Sums found =
      collect_sums<W>(call, outputs, true, bad_index,
                      [&](Pass<W>& pass, int64_t begin, int64_t end, Memory<W>& memory, bool first_visit) {
                        if (first_visit) {
                          kernels.search(p, begin, end - begin, memory.residuals.data(), memory.scratch.data());
                        }
                        kernels.follow(p, pass, begin, end, memory.rows.data());
                      });
  W* to = static_cast<W*>(errors.mutable_data_ptr());
  for (int64_t layer = 0; layer < p.layers; ++layer) to[layer] = static_cast<W>(found.errors[layer]);
  W* to_counts = static_cast<W*>(counts.mutable_data_ptr());
  W* to_sums = static_cast<W*>(sums.mutable_data_ptr());
  if (strict_tree) {
    statistics_from_leaves(p, std::move(found.counts), std::move(found.sums), to_counts, to_sums);
  } else {
    std::transform(found.counts.begin(), found.counts.end(), to_counts, [](double x) { return static_cast<W>(x); });
    std::transform(found.sums.begin(), found.sums.end(), to_sums, [](double x) { return static_cast<W>(x); });
  }
  return {quantized, indices, errors, counts, sums};
}

// The rows of `grad`, in the type of the codebooks.
std::vector<Tensor> split_rows(const Call& call, const Tensor& grad, const std::vector<Tensor>& codebooks) {
  std::vector<Tensor> parts;
  for (int64_t layer = 0; layer < call.p.layers; ++layer) {
    Tensor rows = grad;
    rows = torch::stable::narrow(rows, 0, call.p.first_row[layer], codebooks[layer].size(0));
    parts.push_back(torch::stable::to(rows, codebooks[layer].scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                                      false, /*copy=*/true));
  }
  return parts;
}

Tensor check_indices(const Tensor& indices, int64_t vectors, size_t layers) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 2 && indices.size(0) == vectors &&
                      indices.size(1) == static_cast<int64_t>(layers),
                  "codeword_search: indices must be int64 (", vectors, ", ", layers, ")");
  return torch::stable::contiguous(indices);
}

void refuse_bad_index(const std::atomic<bool>& bad_index) {
  STD_TORCH_CHECK(!bad_index, "codeword_search: an index lies outside its codebook");
}

template <class W>
void check_working(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool right = t.scalar_type() == kType<W> && t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) right = right && t.size(d++) == size;
  STD_TORCH_CHECK(right, "codeword_search: ", name, " has a wrong shape or type");
}

template <class T, class W>
std::vector<Tensor> search_backward(const Tensor& grad_quantized, Tensor indices, const std::vector<Tensor>& codebooks,
                                    bool strict_tree) {
  Call call = plan<W>(codebooks, grad_quantized.size(0), grad_quantized.size(1), strict_tree);
  Problem& p = call.p;
  indices = check_indices(indices, p.vectors, codebooks.size());
  p.indices = static_cast<int64_t*>(const_cast<void*>(indices.const_data_ptr()));
  const auto kernels = Kernels<T, W>::of(active_isa());
  Pass<W> outputs{};
  outputs.grad_quantized = grad_quantized.const_data_ptr();
  outputs.grad_row = grad_quantized.stride(0);
  outputs.grad_column = grad_quantized.stride(1);
  std::atomic<bool> bad_index{false};
  Sums found = collect_sums<W>(call, outputs, false, bad_index,
                               [&](Pass<W>& pass, int64_t begin, int64_t end, Memory<W>& memory, bool) {
                                 kernels.follow(p, pass, begin, end, memory.rows.data());
                               });
  refuse_bad_index(bad_index);
  Tensor grad = torch::stable::empty({call.rows, p.dim}, kType<W>);
  W* to = static_cast<W*>(grad.mutable_data_ptr());
  if (strict_tree) {
    gradients_from_leaves(p, std::move(found.sums), to);
  } else {
    std::transform(found.sums.begin(), found.sums.end(), to, [](double x) { return static_cast<W>(x); });
  }
  return split_rows(call, grad, codebooks);
}

template <class T, class W>
std::tuple<Tensor, std::vector<Tensor>> train_backward(const std::optional<Tensor>& grad_quantized, Tensor weights_z,
                                                       Tensor weights_codebooks, const Tensor& z, Tensor indices,
                                                       const std::vector<Tensor>& codebooks, Tensor counts, Tensor sums,
                                                       bool strict_tree) {
  Call call = plan<W>(codebooks, z.size(0), z.size(1), strict_tree);
  Problem& p = call.p;
  check_working<W>(weights_z, "weights_z", {p.layers});
  check_working<W>(weights_codebooks, "weights_codebooks", {p.layers, p.layers});
  check_working<W>(counts, "counts", {call.rows});
  check_working<W>(sums, "sums", {call.rows, p.dim});
  indices = check_indices(indices, p.vectors, codebooks.size());
  weights_z = torch::stable::contiguous(weights_z);
  weights_codebooks = torch::stable::contiguous(weights_codebooks);
  counts = torch::stable::contiguous(counts);
  sums = torch::stable::contiguous(sums);
  const W* weights = static_cast<const W*>(weights_codebooks.const_data_ptr());

  Tensor grad_z = torch::stable::empty({p.vectors, p.dim}, z.scalar_type());
  Tensor grad = torch::stable::empty({call.rows, p.dim}, kType<W>);
  torch::stable::zero_(grad);
  read_from(p, z);
  p.indices = static_cast<int64_t*>(const_cast<void*>(indices.const_data_ptr()));
  const auto kernels = Kernels<T, W>::of(active_isa());
  Pass<W> outputs{};
  if (grad_quantized) {
    check_working<T>(*grad_quantized, "grad_quantized", {p.vectors, p.dim});
    outputs.grad_quantized = grad_quantized->const_data_ptr();
    outputs.grad_row = grad_quantized->stride(0);
    outputs.grad_column = grad_quantized->stride(1);
  }
  outputs.grad_z = grad_z.mutable_data_ptr();
  outputs.weights_z = static_cast<const W*>(weights_z.const_data_ptr());
  std::atomic<bool> bad_index{false};
  W* to = static_cast<W*>(grad.mutable_data_ptr());
  if (strict_tree) {
    torch::stable::parallel_for(0, groups(p.vectors), std::max<int64_t>(1, grain(p)), [&](int64_t begin, int64_t end) {
      Memory<W> memory(p);
      Pass<W> pass = outputs;
      kernels.follow(p, pass, begin * kGroup, std::min(end * kGroup, p.vectors), memory.rows.data());
      if (pass.bad_index) bad_index = true;
    });
    gradients_from_statistics(p, weights, static_cast<const W*>(counts.const_data_ptr()),
                              static_cast<const W*>(sums.const_data_ptr()), to);
  } else {
    outputs.weights_codebooks = weights;
    Sums found = collect_sums<W>(call, outputs, false, bad_index,
                                 [&](Pass<W>& pass, int64_t begin, int64_t end, Memory<W>& memory, bool) {
                                   kernels.follow(p, pass, begin, end, memory.rows.data());
                                 });
    std::transform(found.sums.begin(), found.sums.end(), to, [](double x) { return static_cast<W>(x); });
  }
  refuse_bad_index(bad_index);
  return {grad_z, split_rows(call, grad, codebooks)};
}

// --- by type
// ----------------------------------------------------------------------------------------------------------

void check_types(const Tensor& z, const std::vector<Tensor>& codebooks) {
  STD_TORCH_CHECK(z.dim() == 2, "codeword_search: z must be (N, D)");
  for (const Tensor& codebook : codebooks) {
    const bool working = z.scalar_type() != ScalarType::Double && codebook.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(working || codebook.scalar_type() == z.scalar_type(),
                    "codeword_search: codebooks must have the type of z, or float32 beside half precision");
  }
}

#define VPFAST_BY_TYPE(TYPE, FUNCTION, ...)                                 \
  switch (TYPE) {                                                           \
    case ScalarType::Float:                                                 \
      return FUNCTION<float, float>(__VA_ARGS__);                           \
    case ScalarType::Double:                                                \
      return FUNCTION<double, double>(__VA_ARGS__);                         \
    case ScalarType::BFloat16:                                              \
      return FUNCTION<BFloat16, float>(__VA_ARGS__);                        \
    case ScalarType::Half:                                                  \
      return FUNCTION<Half, float>(__VA_ARGS__);                            \
    default:                                                                \
      STD_TORCH_CHECK(false, "codeword_search: float64/32/16 or bfloat16"); \
  }

std::tuple<Tensor, Tensor> codeword_search(Tensor z, std::vector<Tensor> codebooks, bool strict_tree) {
  check_types(z, codebooks);
  VPFAST_BY_TYPE(z.scalar_type(), search, z, codebooks, strict_tree)
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> codeword_search_train(Tensor z, std::vector<Tensor> codebooks,
                                                                         bool strict_tree) {
  check_types(z, codebooks);
  VPFAST_BY_TYPE(z.scalar_type(), train, z, codebooks, strict_tree)
}

std::vector<Tensor> codeword_search_backward(Tensor grad_quantized, Tensor indices, std::vector<Tensor> codebooks,
                                             bool strict_tree) {
  check_types(grad_quantized, codebooks);
  VPFAST_BY_TYPE(grad_quantized.scalar_type(), search_backward, grad_quantized, indices, codebooks, strict_tree)
}

std::tuple<Tensor, std::vector<Tensor>> codeword_search_train_backward(std::optional<Tensor> grad_quantized,
                                                                       Tensor weights_z, Tensor weights_codebooks,
                                                                       Tensor z, Tensor indices,
                                                                       std::vector<Tensor> codebooks, Tensor counts,
                                                                       Tensor sums, bool strict_tree) {
  check_types(z, codebooks);
  VPFAST_BY_TYPE(z.scalar_type(), train_backward, grad_quantized, weights_z, weights_codebooks, z, indices, codebooks,
                 counts, sums, strict_tree)
}

}  // namespace
}  // namespace vpfast

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) {
  m.impl("codeword_search", TORCH_BOX(&vpfast::codeword_search));
  m.impl("codeword_search_train", TORCH_BOX(&vpfast::codeword_search_train));
  m.impl("codeword_search_backward", TORCH_BOX(&vpfast::codeword_search_backward));
  m.impl("codeword_search_train_backward", TORCH_BOX(&vpfast::codeword_search_train_backward));
}
