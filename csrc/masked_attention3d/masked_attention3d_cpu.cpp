// masked_attention3d on the CPU.
//
// Story. A mask is, for every query and every line of keys, an interval (masked_attention3d_math.h). Forward takes
// tiles of queries, as many as three registers have lanes, and walks the lines they may see: blocks of 64 keys between
// the first and the last that any of them sees, masked only where not every one sees all. Scores, weights and outputs
// have the queries in their lanes, so running maxima and sums need no step across lanes, keys and values are read where
// they lie, one component broadcast at a time, and any head dimension is native. What a tile needs stays in the L1
// cache.
//
// Backward takes blocks of keys in the lanes and walks the queries that see them: scores, weights and their gradients
// are computed once, from the saved log-sum-exp. The gradients of keys and values stay with their block; that of the
// queries is collected in as many copies as there are groups of blocks, added up at the end in order. How many depends
// on the problem alone, so no result depends on the number of threads, forward or backward.
//
// Where there are matrix tiles they take floats as sums of bfloat16 (masked_attention3d_amx.h), at the same accuracy:
// blocks of 32 by 32, otherwise the same walk. What they are not made for, the registers do.
//
// Operations a visible pair: 4 d and an exponential forward, 10 d and one backward. Bytes: O(L d) both.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "common/aligned.h"
#include "common/amx.h"
#include "common/isa.h"
#include "common/text.h"
#include "masked_attention3d/masked_attention3d_mask.h"
#include "masked_attention3d/masked_attention3d_math.h"
#include "masked_attention3d/masked_attention3d_problem.h"

#define VPFAST_KERNEL_FILE "masked_attention3d/masked_attention3d_kernel.h"
#include "common/for_each_isa.h"

namespace vpfast::masked_attention3d {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class W>
constexpr ScalarType kType = ScalarType::Float;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;

template <class W>
struct Kernels {
  using Forward = void (*)(const masked_attention3d::Forward<W>&, int64_t, int64_t, int64_t, W*);
  using Backward = void (*)(const masked_attention3d::Backward<W>&, int64_t, W*, int64_t, int64_t, int64_t, W*);
  Forward forward;
  Backward backward;
  int64_t lanes, tile;  // of queries, or of keys
};

template <class W>
Kernels<W> kernels();

template <>
Kernels<float> kernels<float>() {
  switch (active_isa()) {
    case Isa::avx512:
      return {avx512::masked_attention3d::forward<float>, avx512::masked_attention3d::backward<float>, 16, 48};
    case Isa::avx2:
      return {avx2::masked_attention3d::forward<float>, avx2::masked_attention3d::backward<float>, 8, 24};
    default:
      return {plain::masked_attention3d::forward<float>, plain::masked_attention3d::backward<float>, 4, 12};
  }
}

// One number at a time gains little from more instructions, and two more sets of kernels took a third of the build.
template <>
Kernels<double> kernels<double>() {
  return {plain::masked_attention3d::forward<double>, plain::masked_attention3d::backward<double>, 1, 6};
}

// --- checks: the public function has told the user what is wrong; here nothing may read out of bounds ---

void check_shape(const char* name, const Tensor& t, const Tensor& like, int64_t length) {
  bool same = t.dim() == 4 && t.scalar_type() == like.scalar_type() && t.size(2) == length;
  for (int64_t d : {0, 1, 3}) same = same && t.size(d) == like.size(d);
  STD_TORCH_CHECK(same, "masked_attention3d: ", name, " must be (B, heads, ", length, ", d) and of the type of q");
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, int64_t length) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(3) >= 1, "masked_attention3d: q must be (B, heads, L, d)");
  check_shape("k", k, q, length);
  check_shape("v", v, q, length);
}

// --- shared by forward and backward ---

// In the working type, every row's components together and the rows one after another; whole heads may lie anywhere.
template <class W>
Tensor dense_rows(Tensor t) {
  t = torch::stable::to(t, kType<W>);
  const bool dense = (t.size(3) == 1 || t.stride(3) == 1) && (t.size(2) == 1 || t.stride(2) == t.size(3));
  return dense ? t : torch::stable::contiguous(t);
}

template <class W>
Rows<W> rows_of(const Tensor& t) {
  return {static_cast<const W*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

template <class W>
bool all_finite(const W* from, int64_t count) {
  using Bits = std::conditional_t<sizeof(W) == 4, uint32_t, uint64_t>;
  constexpr Bits exponent = sizeof(W) == 4 ? Bits(0x7f800000) : Bits(0x7ff0000000000000);
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, from + i, sizeof bits);
    found |= static_cast<Bits>((bits & exponent) == exponent);
  }
  return !found;
}

template <class W>
bool all_finite(const Problem<W>& p, const Rows<W>& rows) {
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, p.planes(), 1 + (1 << 16) / (p.mask.length() * p.dim),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t plane = begin; plane < end; ++plane) {
                                  if (!all_finite(p.plane(rows, plane), p.mask.length() * p.dim)) finite = false;
                                }
                              });
  return finite;
}

template <class W>
void fill(Problem<W>& p, const Mask& mask, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  p.mask = mask;
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.dim = q.size(3);
  p.scale = static_cast<W>(scale);
  p.q = rows_of<W>(q);
  p.k = rows_of<W>(k);
  p.v = rows_of<W>(v);
}

template <class W>
bool inputs_are_finite(const Problem<W>& p) {
  return all_finite(p, p.q) && all_finite(p, p.k) && all_finite(p, p.v);
}

// Units differ in size, so each thread takes the next one when it is done. What a unit computes does not depend on who
// does it. `scratch`: elements of W that a thread works in.
template <class W, class Body>
void share(int64_t units, int64_t threads, int64_t scratch, bool tiles, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(units, threads), 1, [&](int64_t, int64_t) {
    AlignedVector<W> memory(scratch);
    if (tiles) configure_tiles();
    for (int64_t unit = next++; unit < units; unit = next++) body(unit, memory.data());
    if (tiles) release_tiles();
  });
}

// Waking a thread costs about as much as this many products of a query and a key.
int64_t threads_for(const Mask& mask, int64_t planes, int64_t dim) {
  const double work = static_cast<double>(planes) * mask.length() * mask.length() * dim;
  return std::max<int64_t>(1, std::min<double>(torch::stable::get_num_threads(), work / (1 << 20)));
}

// Planes that are worked on at a time.
struct Wave {
  int64_t first, count;
};

// --- forward ---

// A tile's queries are of one frame where lines are frames or rows: what they see is then much the same.
std::vector<Interval> tiles_of(const Mask& mask, int64_t lanes, int64_t tile) {
  const int64_t length = mask.length();
  const int64_t stretch = mask.line == Line::sequence || mask.frame() < lanes ? length : mask.frame();
  std::vector<Interval> tiles;
  for (int64_t start = 0; start < length; start += stretch) {
    for (int64_t i = 0; i < stretch; i += tile) tiles.push_back({start + i, start + std::min(stretch, i + tile)});
  }
  return tiles;
}

// --- backward ---

// Key blocks of one group follow one another; all of them together are seen by the queries `touched`.
struct Blocks {
  const Mask& mask;
  int64_t width, per_line, count, groups, per_group;

  Blocks(const Mask& mask, int64_t width, int64_t planes) : mask(mask), width(width) {
    per_line = (mask.line_length() + width - 1) / width;
    count = mask.length() / mask.line_length() * per_line;
    const int64_t units = std::clamp<int64_t>(mask.length() / 160, 1, 32);
    groups = std::min(count, (units + planes - 1) / planes);
    per_group = (count + groups - 1) / groups;
  }

  int64_t first(int64_t group) const { return group * per_group; }
  int64_t last(int64_t group) const { return std::min(count, first(group) + per_group); }
  int64_t start(int64_t block) const { return block / per_line * mask.line_length(); }
  int64_t key(int64_t block) const { return block % per_line * width; }
  int64_t keys(int64_t block) const { return std::min(width, mask.line_length() - key(block)); }

  Interval touched(int64_t group) const {
    if (first(group) >= last(group)) return {0, 0};
    const int64_t a = first(group), b = last(group) - 1;
    const int64_t end = start(b) + key(b) + keys(b) - 1;
    return {seen_by(mask, start(a) + key(a), end).begin, seen_by(mask, end, end).end};
  }
};

// The gradients of q, in order of the groups, times `factor`.
template <class W>
void add_groups(const Backward<W>& p, const Blocks& blocks, const Wave& wave, W factor) {
  const int64_t length = p.mask.length();
  std::vector<Interval> touched;
  for (int64_t group = 0; group < blocks.groups; ++group) touched.push_back(blocks.touched(group));
  torch::stable::parallel_for(0, wave.count * length, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      W* to = p.grad_q + (wave.first * length + row) * p.dim;
      std::fill(to, to + p.dim, W(0));
      const int64_t plane = row / length, query = row % length;
      for (int64_t group = 0; group < blocks.groups; ++group) {
        if (query < touched[group].begin || query >= touched[group].end) continue;
        const W* from = p.grad_q_groups + ((group * wave.count + plane) * p.padded_length + query) * p.padded_dim;
        for (int64_t d = 0; d < p.dim; ++d) to[d] += from[d];
      }
      for (int64_t d = 0; d < p.dim; ++d) to[d] *= factor;
    }
  });
}

template <class W>
Tensor grad_q_groups(const Backward<W>& p, const Blocks& blocks, int64_t planes) {
  return torch::stable::empty({blocks.groups, planes, p.padded_length, p.padded_dim}, kType<W>);
}

// Calls body(plane, rows for the gradients of its q, first block, last block, memory) for every group and plane of a
// wave, and adds up those rows times `factor`. `scratch`: elements of W, and `scratch_block` more for each block of a
// group.
template <class W, class Body>
void collect(const Backward<W>& p, const Blocks& blocks, const Wave& wave, int64_t scratch, int64_t scratch_block,
             W factor, bool tiles, const Body& body) {
  const int64_t rows = p.padded_length;
  share<W>(blocks.groups * wave.count, threads_for(p.mask, wave.count, p.dim),
           scratch + scratch_block * blocks.per_group, tiles, [&](int64_t unit, W* memory) {
             const int64_t group = unit / wave.count, plane = wave.first + unit % wave.count;
             const Interval touched = blocks.touched(group);
             W* to = p.grad_q_groups + unit * rows * p.padded_dim;
             // Blocks of queries may begin before and end after.
             const int64_t begin = touched.begin / kBlock * kBlock, end = least(rows, round_up(touched.end, kBlock));
             if (begin < end) std::fill(to + begin * p.padded_dim, to + end * p.padded_dim, W(0));
             body(plane, to, blocks.first(group), blocks.last(group), memory);
           });
  add_groups(p, blocks, wave, factor);
}

#include "masked_attention3d/masked_attention3d_tiles.h"

// --- forward ---

template <class W>
std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, const Mask& mask, double scale) {
  const ScalarType type = q.scalar_type();
  const int64_t length = mask.length();
  q = dense_rows<W>(q);
  k = dense_rows<W>(k);
  v = dense_rows<W>(v);
  Forward<W> p{};
  fill<W>(p, mask, q, k, v, scale);
  Tensor out = torch::stable::empty({p.batch, p.heads, length, p.dim}, kType<W>);
  Tensor lse = torch::stable::empty({p.batch, p.heads, length}, kType<W>);
  p.out = static_cast<W*>(out.mutable_data_ptr());
  p.lse = static_cast<W*>(lse.mutable_data_ptr());
  if constexpr (std::is_same_v<W, float>) {
    if (tiles_serve(p) && forward_on_tiles(p, pieces_of(type))) {
      return {torch::stable::to(out, type), lse};
    }
  }

  p.careful = !inputs_are_finite(p);
  const Kernels<W> kernel = kernels<W>();
  const std::vector<Interval> tiles = tiles_of(mask, kernel.lanes, kernel.tile);
  const int64_t count = static_cast<int64_t>(tiles.size()), planes = p.planes();
  const int64_t scratch = kernel.tile * (2 * p.dim + kKeys + 2);
  share<W>(count * planes, threads_for(mask, planes, p.dim), scratch, false, [&](int64_t unit, W* memory) {
    const Interval& tile = tiles[count - 1 - unit / planes];  // the last ones see most, and come first
    kernel.forward(p, unit % planes, tile.begin, tile.end - tile.begin, memory);
  });
  return {torch::stable::to(out, type), lse};
}

// Of each row the sum of grad_out times out: what every weight's gradient is measured from.
template <class W>
Tensor deltas(const Tensor& grad_out, const Tensor& out) {
  Tensor delta = torch::stable::empty({out.size(0), out.size(1), out.size(2)}, kType<W>);
  const int64_t dim = out.size(3);
  const W *a = static_cast<const W*>(grad_out.const_data_ptr()), *b = static_cast<const W*>(out.const_data_ptr());
  W* to = static_cast<W*>(delta.mutable_data_ptr());
  torch::stable::parallel_for(0, delta.numel(), 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      W sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += a[row * dim + d] * b[row * dim + d];
      to[row] = sum;
    }
  });
  return delta;
}

template <class W>
void backward_in_registers(Backward<W>& p, const Tensor& delta) {
  p.delta = static_cast<const W*>(delta.const_data_ptr());
  p.careful =
      !inputs_are_finite(p) || !all_finite(p.grad_out, delta.numel() * p.dim) || !all_finite(p.delta, delta.numel());
  const Kernels<W> kernel = kernels<W>();
  const Blocks blocks(p.mask, kernel.tile, p.planes());
  p.padded_length = p.mask.length();
  p.padded_dim = round_up(p.dim, kernel.lanes);
  const Tensor groups = grad_q_groups(p, blocks, p.planes());
  p.grad_q_groups = static_cast<W*>(groups.mutable_data_ptr());
  const int64_t scratch = kernel.tile * (4 * p.dim + 2 * kQueries + p.padded_dim);
  collect<W>(p, blocks, {0, p.planes()}, scratch, 0, W(1), false,
             [&](int64_t plane, W* grad_q, int64_t first, int64_t last, W* memory) {
               for (int64_t block = first; block < last; ++block) {
                 kernel.backward(p, plane, grad_q, blocks.start(block), blocks.key(block), blocks.keys(block), memory);
               }
             });
}

template <class W>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                            const Mask& mask, double scale) {
  const ScalarType type = q.scalar_type();
  const int64_t length = mask.length();
  q = dense_rows<W>(q);
  k = dense_rows<W>(k);
  v = dense_rows<W>(v);
  grad_out = torch::stable::contiguous(torch::stable::to(grad_out, kType<W>));
  out = torch::stable::contiguous(torch::stable::to(out, kType<W>));
  lse = torch::stable::contiguous(lse);
  Backward<W> p{};
  fill<W>(p, mask, q, k, v, scale);
  Tensor grads[3];
  for (Tensor& grad : grads) grad = torch::stable::empty({p.batch, p.heads, length, p.dim}, kType<W>);
  p.grad_out = static_cast<const W*>(grad_out.const_data_ptr());
  p.lse = static_cast<const W*>(lse.const_data_ptr());
  p.grad_q = static_cast<W*>(grads[0].mutable_data_ptr());
  p.grad_k = static_cast<W*>(grads[1].mutable_data_ptr());
  p.grad_v = static_cast<W*>(grads[2].mutable_data_ptr());
  bool done = false;
  if constexpr (std::is_same_v<W, float>) {
    done = tiles_serve(p) && backward_on_tiles(p, static_cast<const float*>(out.const_data_ptr()), pieces_of(type));
  }
  if (!done) backward_in_registers(p, deltas<W>(grad_out, out));
  return {torch::stable::to(grads[0], type), torch::stable::to(grads[1], type), torch::stable::to(grads[2], type)};
}

// --- decode ---

template <class T, class W>
using DecodeKernel = void (*)(const Decode<W>&, int64_t, int64_t, W*);

template <class T, class W>
DecodeKernel<T, W> decode_kernel() {
  if constexpr (std::is_same_v<W, float>) {
    switch (active_isa()) {
      case Isa::avx512:
        return avx512::masked_attention3d::decode<T, W>;
      case Isa::avx2:
        return avx2::masked_attention3d::decode<T, W>;
      default:
        break;
    }
  }
  return plain::masked_attention3d::decode<T, W>;
}

Stored stored(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

Tensor packed_components(const Tensor& t) {
  return t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

template <class T, class W>
Tensor decode(const Tensor& q, Tensor k, Tensor v, Tensor positions, const Mask& mask, double scale) {
  Tensor out = torch::stable::empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  k = packed_components(k);
  v = packed_components(v);
  positions = torch::stable::contiguous(positions);
  Decode<W> p{mask, q.size(0), q.size(1), q.size(3), q.size(2), static_cast<W>(scale)};
  p.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t i = 0; i < p.count; ++i) {
    STD_TORCH_CHECK(p.positions[i] >= 0 && p.positions[i] < mask.length(), "masked_attention3d: position ",
                    p.positions[i], " is outside the grid");
  }
  p.q = stored(q);
  p.k = stored(k);
  p.v = stored(v);
  p.out = out.mutable_data_ptr();
  const DecodeKernel<T, W> kernel = decode_kernel<T, W>();
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, mask.length() * p.dim));
  torch::stable::parallel_for(0, p.planes() * p.count, grain, [&](int64_t begin, int64_t end) {
    AlignedVector<W> memory(2 * p.dim + kKeys);
    for (int64_t i = begin; i < end; ++i) kernel(p, i / p.count, i % p.count, memory.data());
  });
  return out;
}

// --- by type ---

std::tuple<Tensor, Tensor> masked_attention3d(Tensor q, Tensor k, Tensor v, std::vector<int64_t> grid, Text mask,
                                              std::vector<int64_t> window, double scale) {
  const Mask m = mask_of(grid, mask, window);
  check_inputs(q, k, v, m.length());
  STD_TORCH_CHECK(q.size(2) == m.length(), "masked_attention3d: q must be (B, heads, T*H*W, d)");
  const bool wide = q.scalar_type() == ScalarType::Double;
  if (q.numel() == 0) {
    return {torch::stable::empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type()),
            torch::stable::empty({q.size(0), q.size(1), q.size(2)}, wide ? ScalarType::Double : ScalarType::Float)};
  }
  return wide ? forward<double>(q, k, v, m, scale) : forward<float>(q, k, v, m, scale);
}

std::tuple<Tensor, Tensor, Tensor> masked_attention3d_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                               Tensor out, Tensor lse, std::vector<int64_t> grid,
                                                               Text mask, std::vector<int64_t> window, double scale) {
  const Mask m = mask_of(grid, mask, window);
  check_inputs(q, k, v, m.length());
  check_shape("q", q, q, m.length());
  check_shape("grad_out", grad_out, q, m.length());
  check_shape("out", out, q, m.length());
  const bool wide = q.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(lse.dim() == 3 && lse.numel() * q.size(3) == q.numel() &&
                      lse.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "masked_attention3d: lse must be (B, heads, T*H*W) as the forward pass gave it");
  if (q.numel() == 0) {
    const auto empty = [&] {
      return torch::stable::empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
    };
    return {empty(), empty(), empty()};
  }
  return wide ? backward<double>(grad_out, q, k, v, out, lse, m, scale)
              : backward<float>(grad_out, q, k, v, out, lse, m, scale);
}

Tensor masked_attention3d_decode(Tensor q, Tensor k, Tensor v, Tensor positions, std::vector<int64_t> grid, Text mask,
                                 std::vector<int64_t> window, double scale) {
  const Mask m = mask_of(grid, mask, window);
  check_inputs(q, k, v, m.length());
  STD_TORCH_CHECK(positions.dim() == 1 && positions.size(0) == q.size(2) && positions.scalar_type() == ScalarType::Long,
                  "masked_attention3d: positions must be int64, one for each query");
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return decode<float, float>(q, k, v, positions, m, scale);
    case ScalarType::Double:
      return decode<double, double>(q, k, v, positions, m, scale);
    case ScalarType::BFloat16:
      return decode<BFloat16, float>(q, k, v, positions, m, scale);
    case ScalarType::Half:
      return decode<Half, float>(q, k, v, positions, m, scale);
    default:
      STD_TORCH_CHECK(false, "masked_attention3d: float64/32/16 or bfloat16");
  }
}

}  // namespace
}  // namespace vpfast::masked_attention3d

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) {
  m.impl("masked_attention3d", TORCH_BOX(&vpfast::masked_attention3d::masked_attention3d));
  m.impl("masked_attention3d_backward", TORCH_BOX(&vpfast::masked_attention3d::masked_attention3d_backward));
  m.impl("masked_attention3d_decode", TORCH_BOX(&vpfast::masked_attention3d::masked_attention3d_decode));
}
