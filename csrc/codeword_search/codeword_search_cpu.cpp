// codeword_search on the CPU.
//
// Story. Vectors go in groups of 48 through all layers, a thread a range of groups: z is read once, and what a group
// needs (its residuals, a slice of a codebook) stays in the L1 cache. Three ways to scan, all in float32 by scores
// (codeword_search_math.h), with near-ties decided in float64:
//   by panels   codewords in the lanes of a register, components of a vector broadcast. Where all vectors search one
//               codebook it is a tiled matrix product that keeps the best two scores of each lane in place of the
//               products; where each has its own, a tile is one vector high. Every shape, every instruction set.
//   by eights   a tree of five to eight codewords a codebook on AVX-512: all of a vector's codebook in a register
//               (codeword_search_eights.h).
//   by lookup   sixteen vectors in the lanes, for the top layers of other small trees on AVX-512
//               (codeword_search_lookup.h).
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
#include "common/aligned.h"
#include "common/isa.h"
#include "instruments/seen.h"

namespace vpfast {

template <class T, class W>
int64_t decide(const Problem& p, int64_t vector, int64_t layer, int64_t parent, const int32_t* rows_above,
               const int64_t* candidates, int64_t count, double* residual) {
  const T* z = static_cast<const T*>(p.z) + vector * p.z_row;
  for (int64_t d = 0; d < p.dim; ++d) residual[d] = static_cast<double>(z[d * p.z_column]);
  for (int64_t above = 0; above < layer; ++above) {
    const W* codeword = static_cast<const W*>(p.rows[above]) + rows_above[above * kGroup] * p.dim;
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

// The working type.
template <class W>
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
  PackedEights eights;
  int64_t rows = 0;
  Isa isa = active_isa();  // once: the panels are laid out for it

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
  STD_TORCH_CHECK(p.codebook_size >= 2 && dim >= 1, "codeword_search: needs at least two codewords and one dimension");
  int64_t rows = 1;
  for (int64_t layer = 0; layer < layers; ++layer) {
    rows = strict_tree ? rows * p.codebook_size : p.codebook_size;
    const Tensor& codebook = codebooks[layer];
    STD_TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max(),
                    "codeword_search: more than 2^31 codewords in a layer");
    STD_TORCH_CHECK(codebook.dim() == 2 && codebook.size(0) == rows && codebook.size(1) == dim,
                    "codeword_search: layer ", layer + 1, " must be (", rows, ", ", dim, ")");
    // Either is a call of torch, dear beside a small search, where it has nothing to do.
    const bool as_needed = codebook.scalar_type() == kType<W> && codebook.is_contiguous();
    call.kept.push_back(as_needed ? codebook : torch::stable::contiguous(torch::stable::to(codebook, kType<W>)));
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

// What the scans in float32 need; float64 vectors go without.
template <class W>
void prepare_search(Call& call) {
  if (std::is_same_v<W, double>) return;
  Problem& p = call.p;
  int64_t codebooks = 1;
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    p.lengths[layer] = measure_codewords(static_cast<const float*>(p.rows[layer]), codebooks, p.codebook_size, p.dim);
    if (p.strict_tree) codebooks *= p.codebook_size;
  }
  p.by_eights = call.isa == Isa::avx512 && fits_eights(p);
  if (p.by_eights) {
    call.eights = pack_eights(p);
    return;
  }
  p.lookups.layers = call.isa == Isa::avx512 ? layers_by_lookup(p) : 0;
  call.lookups = pack_lookups(p);
  call.panels = pack_panels(p, lanes_of(call.isa));
}

// Enough groups a thread that waking it pays.
int64_t grain(const Problem& p) {
  const int64_t work = kGroup * p.layers * (p.codebook_size * p.dim / 8 + 64);
  return std::max<int64_t>(1, 400000 / work);
}

int64_t groups(int64_t vectors) { return (vectors + kGroup - 1) / kGroup; }

// One thread's way through groups of vectors, with its working memory.
template <class T, class W>
class Walk {
 public:
  Walk(const Problem& p, Isa isa)
      : p_(p),
        residuals_(kGroup * p.dim),
        scratch_(p.dim),
        rows_(kGroup * p.layers),
        numbers_((2 + kTurns * p.layers) * p.dim) {
    const bool wide = isa == Isa::avx512, narrow = isa == Isa::plain;
    search_ = wide ? avx512::search_group<T> : narrow ? plain::search_group<T> : avx2::search_group<T>;
    look_up_ = wide ? avx512::look_up_rows : narrow ? plain::look_up_rows : avx2::look_up_rows;
    follow_ = wide ? avx512::follow_codes<T, W> : narrow ? plain::follow_codes<T, W> : avx2::follow_codes<T, W>;
  }

  void search(int64_t group) {
    enter(group);
    all_finite_ = search_(p_, first_, count_, rows_.data(), residuals_.data(), scratch_.data());
  }
  void look_up(int64_t group) {
    enter(group);
    all_finite_ = false;
    good_ = look_up_(p_, first_, count_, rows_.data()) && good_;
  }
  // What `step` does with the group that was searched or looked up last.
  void take(Step step, Pass<W>& pass) {
    pass.all_finite = all_finite_;
    follow_(step, p_, pass, first_, count_, rows_.data(), numbers_.data());
  }

  bool good() const { return good_; }

 private:
  void enter(int64_t group) {
    first_ = group * kGroup;
    count_ = std::min(kGroup, p_.vectors - first_);
  }

  const Problem& p_;
  AlignedVector<float> residuals_;
  std::vector<double> scratch_;
  AlignedVector<int32_t> rows_;
  AlignedVector<W> numbers_;
  int64_t first_ = 0, count_ = 0;
  bool good_ = true, all_finite_ = false;
  bool (*search_)(const Problem&, int64_t, int64_t, int32_t*, float*, double*);
  bool (*look_up_)(const Problem&, int64_t, int64_t, int32_t*);
  void (*follow_)(Step, const Problem&, Pass<W>&, int64_t, int64_t, const int32_t*, W*);
};

void refuse_bad_index(bool good) { STD_TORCH_CHECK(good, "codeword_search: an index lies outside its codebook"); }

// --- sums over vectors ---

struct Sums {
  std::vector<double> counts, sums, errors;
};

// Takes all vectors through `visit(walk, group, pass)`, chunk by chunk, each with the table that `table(chunk)` gives.
// The errors are added up in the order of the chunks.
template <class T, class W, class TableOf, class Visit>
std::vector<double> visit_chunks(const Call& call, const Pass<W>& outputs, int64_t chunks, const TableOf& table,
                                 const Visit& visit) {
  const Problem& p = call.p;
  const int64_t all = groups(p.vectors), chunk = (all + chunks - 1) / chunks;
  std::vector<double> errors(chunks * p.layers);
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Walk<T, W> walk(p, call.isa);
    for (int64_t k = begin; k < end; ++k) {
      Pass<W> pass = outputs;
      pass.errors = errors.data() + k * p.layers;
      pass.table = table(k);
      for (int64_t group = k * chunk; group < std::min((k + 1) * chunk, all); ++group) visit(walk, group, pass);
    }
    if (!walk.good()) good = false;
  });
  refuse_bad_index(good);
  std::vector<double> total(p.layers);
  for (int64_t k = 0; k < chunks * p.layers; ++k) total[k % p.layers] += errors[k];
  return total;
}

// Each chunk of vectors collects in a table of its own, and the tables are added in order.
template <class T, class W, class Visit>
Sums collect_by_chunks(const Call& call, const Pass<W>& outputs, int64_t chunks, const Visit& visit) {
  const int64_t rows = call.collected_rows(), first = call.first_collected(), dim = call.p.dim;
  std::vector<W> tables(chunks * rows * dim);
  std::vector<int64_t> counts(chunks * rows);
  Sums total{std::vector<double>(rows), std::vector<double>(rows * dim), {}};
  const auto table = [&](int64_t k) {
    return Table<W>{tables.data() + k * rows * dim, counts.data() + k * rows, first, first + rows};
  };
  total.errors = visit_chunks<T>(call, outputs, chunks, table, visit);
  for (int64_t k = 0; k < chunks; ++k) {
    for (int64_t r = 0; r < rows; ++r) total.counts[r] += counts[k * rows + r];
    for (int64_t e = 0; e < rows * dim; ++e) total.sums[e] += tables[k * rows * dim + e];
  }
  return total;
}

// Tables too large to have many of: after a visit for the outputs alone, each range of rows takes all vectors through
// `step` and collects what is its own.
template <class T, class W, class Visit>
Sums collect_by_rows(const Call& call, const Pass<W>& outputs, int64_t chunks, Step step, const Visit& visit) {
  const Problem& p = call.p;
  const int64_t rows = call.collected_rows(), first = call.first_collected();
  Sums total{std::vector<double>(rows), std::vector<double>(rows * p.dim), {}};
  total.errors = visit_chunks<T>(call, outputs, chunks, [](int64_t) { return Table<W>{}; }, visit);
  constexpr int64_t ranges = 16;
  const int64_t range = (rows + ranges - 1) / ranges;
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    const int64_t least = std::min(begin * range, rows), last = std::min(end * range, rows);
    std::vector<W> sums((last - least) * p.dim);
    std::vector<int64_t> counts(last - least);
    Pass<W> pass = outputs;
    pass.grad_z = nullptr;
    pass.table = {sums.data(), counts.data(), first + least, first + last};
    Walk<T, W> walk(p, call.isa);
    for (int64_t group = 0; group < groups(p.vectors) && least < last; ++group) {
      walk.look_up(group);
      walk.take(step, pass);
    }
    std::copy(counts.begin(), counts.end(), total.counts.begin() + least);
    std::copy(sums.begin(), sums.end(), total.sums.begin() + least * p.dim);
  });
  return total;
}

// `step` is the part of `visit` that collects.
template <class T, class W, class Visit>
Sums collect_sums(const Call& call, const Pass<W>& outputs, Step step, const Visit& visit) {
  const Problem& p = call.p;
  const int64_t table_bytes = call.collected_rows() * (p.dim * sizeof(W) + sizeof(int64_t));
  const int64_t useful = std::clamp<int64_t>(groups(p.vectors) / 16, 1, kChunks),
                affordable = kTableBytes / table_bytes;
  if (affordable >= std::min<int64_t>(useful, 8)) {
    return collect_by_chunks<T>(call, outputs, std::min(useful, affordable), visit);
  }
  return collect_by_rows<T>(call, outputs, useful, step, visit);
}

template <class W>
void convert(const std::vector<double>& from, W* to) {
  std::transform(from.begin(), from.end(), to, [](double x) { return static_cast<W>(x); });
}

// --- the operators ---

template <class T, class W>
std::tuple<Tensor, Tensor> search(const Tensor& z, const std::vector<Tensor>& codebooks, bool strict_tree) {
  Call call = plan<W>(codebooks, z.size(0), z.size(1), strict_tree);
  Problem& p = call.p;
  Tensor quantized = torch::stable::empty({p.vectors, p.dim}, z.scalar_type());
  Tensor indices = torch::stable::empty({p.vectors, p.layers}, ScalarType::Long);
  read_from(p, z);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.quantized = quantized.mutable_data_ptr();
  prepare_search<W>(call);
  const AlignedVector<W> leaf_sums = sum_leaves<W>(p);
  torch::stable::parallel_for(0, groups(p.vectors), grain(p), [&](int64_t begin, int64_t end) {
    Walk<T, W> walk(p, call.isa);
    Pass<W> pass{};
    for (int64_t group = begin; group < end; ++group) {
      walk.search(group);
      walk.take(Step::add_codewords, pass);
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
  read_from(p, z);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.quantized = quantized.mutable_data_ptr();
  prepare_search<W>(call);
  const AlignedVector<W> leaf_sums = sum_leaves<W>(p);
  Sums found = collect_sums<T>(call, Pass<W>{}, Step::measure, [](Walk<T, W>& walk, int64_t group, Pass<W>& pass) {
    walk.search(group);
    walk.take(Step::add_codewords, pass);
    walk.take(Step::measure, pass);
  });
  convert(found.errors, static_cast<W*>(errors.mutable_data_ptr()));
  W* to_counts = static_cast<W*>(counts.mutable_data_ptr());
  W* to_sums = static_cast<W*>(sums.mutable_data_ptr());
  if (strict_tree) {
    statistics_from_leaves(p, std::move(found.counts), std::move(found.sums), to_counts, to_sums);
  } else {
    convert(found.counts, to_counts);
    convert(found.sums, to_sums);
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

void check(const Tensor& t, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  bool right = t.scalar_type() == type && t.dim() == static_cast<int64_t>(shape.size());
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
  Pass<W> outputs{};
  outputs.grad_quantized = grad_quantized.const_data_ptr();
  outputs.grad_row = grad_quantized.stride(0);
  outputs.grad_column = grad_quantized.stride(1);
  Sums found = collect_sums<T>(call, outputs, Step::scatter, [](Walk<T, W>& walk, int64_t group, Pass<W>& pass) {
    walk.look_up(group);
    walk.take(Step::scatter, pass);
  });
  Tensor grad = torch::stable::empty({call.rows, p.dim}, kType<W>);
  W* to = static_cast<W*>(grad.mutable_data_ptr());
  if (strict_tree) {
    gradients_from_leaves(p, std::move(found.sums), to);
  } else {
    convert(found.sums, to);
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
  check(weights_z, "weights_z", kType<W>, {p.layers});
  check(weights_codebooks, "weights_codebooks", kType<W>, {p.layers, p.layers});
  check(counts, "counts", kType<W>, {call.rows});
  check(sums, "sums", kType<W>, {call.rows, p.dim});
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
  Pass<W> outputs{};
  if (grad_quantized) {
    check(*grad_quantized, "grad_quantized", z.scalar_type(), {p.vectors, p.dim});
    outputs.grad_quantized = grad_quantized->const_data_ptr();
    outputs.grad_row = grad_quantized->stride(0);
    outputs.grad_column = grad_quantized->stride(1);
  }
  outputs.grad_z = grad_z.mutable_data_ptr();
  outputs.weights_z = static_cast<const W*>(weights_z.const_data_ptr());
  W* to = static_cast<W*>(grad.mutable_data_ptr());
  const auto visit = [](Walk<T, W>& walk, int64_t group, Pass<W>& pass) {
    walk.look_up(group);
    walk.take(Step::differentiate, pass);
  };
  if (strict_tree) {
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, groups(p.vectors), grain(p), [&](int64_t begin, int64_t end) {
      Walk<T, W> walk(p, call.isa);
      Pass<W> pass = outputs;
      for (int64_t group = begin; group < end; ++group) visit(walk, group, pass);
      if (!walk.good()) good = false;
    });
    refuse_bad_index(good);
    gradients_from_statistics(p, weights, static_cast<const W*>(counts.const_data_ptr()),
                              static_cast<const W*>(sums.const_data_ptr()), to);
  } else {
    outputs.weights_codebooks = weights;
    convert(collect_sums<T>(call, outputs, Step::differentiate, visit).sums, to);
  }
  return {grad_z, split_rows(call, grad, codebooks)};
}

// --- by type ---

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
