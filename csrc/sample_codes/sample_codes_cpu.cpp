// sample_codes on the CPU: one frame of codes from the ST-PixelCNN, position after position.
//
// Story. A position needs every layer of the network, but only at itself: what past frames say is there already (one
// matrix product a layer and frame, in vpfast/models/shrvqvae/cache.py), the present taps find their inputs kept, and
// attention finds keys and values. What is left are products of a vector and a matrix, a hundred of them in a row, each
// far too short to be called by itself from Python. Here a frame is one call.
//
// All keys and values before it are read for a position, 2 L heads head_dim s a layer, which is most of its time at the
// end of a long clip. So a pass evaluates several positions, up to kRun of them, from guesses of the codes between
// them. A choice is right up to the first guess that was wrong, that position included; what comes after it is
// evaluated again, from better guesses. A choice is a function of the logits and of its place
// (vpfast/models/shrvqvae/random.py), and no sum depends on what is evaluated beside it, so the codes are those of one
// position after another, to the last bit of every feature. Wrong guesses cost time and nothing else.
//
// Guesses come from drafts: passes in which the attentions look at no keys. They answer what they answered at these
// positions, or at the last one before them, in the pass before: among thousands of keys a few new ones change little.
// A draft costs a tenth of a pass, and does as a pass does, from the codes of the frame before or what was chosen last,
// until its own choices agree. Of fifteen codes so guessed fourteen come true. How many positions a pass or a draft
// evaluates is judged by how many came true lately.
//
// A network in bfloat16 takes AVX-512's dot products, of twice as many terms as a multiply-add has: factors of products
// and all that is kept are bfloat16, sums and features are float32.
//
// Clips are shared out among the threads. Where there are fewer clips than threads, several threads make a team for one
// clip: each computes its columns of every product and its heads, and they meet at a barrier before a layer that needs
// all of it, some forty times a pass. Waiting threads spin, and give way when it takes long. Who computes what changes
// no sum, so the codes do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "common/text.h"
#include "masked_attention3d/masked_attention3d_mask.h"
#include "masked_attention3d/masked_attention3d_math.h"
#include "sample_codes/sample_codes_math.h"
#include "sample_codes/sample_codes_problem.h"

#define VPFAST_KERNEL_FILE "sample_codes/sample_codes_kernel.h"
#include "common/for_each_isa.h"

namespace vpfast::sample_codes {

namespace {

using masked_attention3d::mask_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- the network, read off the list of tensors that vpfast/models/shrvqvae/compiled.py makes ---

template <class W>
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, ScalarType type) : tensors_(tensors), type_(type) {}

  // The next tensor's memory, once its shape is what it must be.
  W* next(const char* name, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(at_ < tensors_.size(), "sample_codes: ", name, " is missing");
    const Tensor& t = tensors_[at_++];
    bool same = t.scalar_type() == type_ && t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous();
    int64_t d = 0;
    for (int64_t size : shape) same = same && t.size(d++) == size;
    STD_TORCH_CHECK(same, "sample_codes: ", name, " has another shape, type or layout than it must have");
    return static_cast<W*>(t.mutable_data_ptr());
  }

  const W* matrix(const char* name, int64_t in, int64_t out) {
    if constexpr (kTerms<W> == 1) return next(name, {in, out});
    return next(name, {in / kTerms<W>, out, kTerms<W>});
  }

  Affine<W> affine(const char* name, int64_t in, int64_t out) {
    const W* terms = matrix(name, in, out);
    return {terms, next(name, {out}), in, out};
  }

  W* keys(int64_t clips, int64_t heads, int64_t blocks, int64_t head_dim) {
    constexpr int64_t block = kKeyBlock<W>, terms = kTerms<W>;
    if constexpr (terms == 1) return next("keys", {clips, heads, blocks, head_dim, block});
    return next("keys", {clips, heads, blocks, head_dim / terms, block, terms});
  }

  Norm<W> norm(const char* name, int64_t channels) {
    const W* weight = next(name, {channels});
    return {weight, next(name, {channels})};
  }

  void finish() const { STD_TORCH_CHECK(at_ == tensors_.size(), "sample_codes: tensors are left over"); }

 private:
  const std::vector<Tensor>& tensors_;
  ScalarType type_;
  size_t at_ = 0;
};

// What keeps alive what a problem points to.
template <class W>
struct Call {
  Problem<W> p{};
  int64_t clips = 0;
  std::vector<Mask> masks;
  std::vector<Block<W>> blocks;
  std::vector<Attention<W>> attentions;
  std::vector<AlignedVector<W>> heads;
};

// The same map with columns of zeros up to a multiple of 16, so that none is left to be computed by itself.
template <class W>
Affine<W> in_whole_registers(const Affine<W>& map, std::vector<AlignedVector<W>>& memory) {
  const int64_t out = whole_lines(map.out), terms = kTerms<W>;
  AlignedVector<W>& wide = memory.emplace_back((map.in + 1) * out);
  for (int64_t row = 0; row < map.in / terms; ++row) {
    std::copy_n(map.matrix + row * map.out * terms, map.out * terms, wide.data() + row * out * terms);
  }
  std::copy_n(map.bias, map.out, wide.data() + map.in * out);
  return {wide.data(), wide.data() + map.in * out, map.in, out};
}

const int64_t* integers(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool same = t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same = same && t.size(d++) == size;
  STD_TORCH_CHECK(same, "sample_codes: ", name, " has another shape, type or layout than it must have");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Cells of frame `time` that a convolution looks at lie within its inputs.
template <class W>
void check_cells(const Conv<W>& conv, int64_t cells) {
  const auto inside = [&](int64_t cell) { return cell + conv.shift >= 0 && cell + conv.shift < conv.total; };
  for (int64_t i = 0; i < cells * conv.count; ++i) {
    STD_TORCH_CHECK(inside(conv.cells[i]), "sample_codes: a tap lies outside of the inputs");
  }
  for (int64_t i = 0; i < cells; ++i) STD_TORCH_CHECK(inside(conv.own[i]), "sample_codes: a cell lies outside");
}

struct Sizes {
  int64_t channels, blocks, every, heads, head_dim, ffn, hidden, depths, codebook_size, first_depth, last_depth,
      parents, embeddings, time, frame_cells, run;
};

Sizes sizes_of(const std::vector<int64_t>& given) {
  STD_TORCH_CHECK(given.size() == 16, "sample_codes: 16 sizes");
  const Sizes s{given[0], given[1], given[2],  given[3],  given[4],  given[5],  given[6],  given[7],
                given[8], given[9], given[10], given[11], given[12], given[13], given[14], given[15]};
  bool fine = s.depths <= kMaxDepths && s.first_depth >= 0 && s.first_depth < s.last_depth && s.last_depth <= s.depths;
  for (int64_t size : {s.channels, s.heads, s.head_dim, s.ffn, s.hidden, s.depths, s.codebook_size}) {
    fine = fine && size >= 1;
  }
  fine = fine && s.blocks >= 0 && s.every >= 0 && s.parents < s.depths && s.time >= 0 && s.run >= 0 && s.run <= kRun;
  STD_TORCH_CHECK(fine, "sample_codes: sizes that cannot be");
  return s;
}

template <class W>
void read(Call<W>& call, const Sizes& s, const std::vector<Tensor>& tensors, const std::vector<Tensor>& tables,
          ScalarType type) {
  Problem<W>& p = call.p;
  Network<W>& net = p.network;
  Reader<W> from(tensors, type);
  STD_TORCH_CHECK(tables.size() == 4, "sample_codes: 4 tables");
  constexpr int64_t block_of = kKeyBlock<W>, terms = kTerms<W>;
  const int64_t key_blocks = (p.length + block_of - 1) / block_of, inner = s.heads * s.head_dim;
  for (int64_t size : {s.channels, s.head_dim, s.ffn, s.hidden}) {
    STD_TORCH_CHECK(size % terms == 0, "sample_codes: bfloat16 takes even numbers of channels");
  }

  const auto conv = [&](int table) {
    Conv<W> c{};
    c.channels = s.channels;
    c.count = tables[table].size(1);
    STD_TORCH_CHECK(c.count <= kMaxTaps, "sample_codes: more than 16 taps");
    c.cells = integers(tables[table], "a table of taps", {p.cells, c.count});
    c.own = integers(tables[table + 1], "a table of cells", {p.cells});
    c.shift = s.time * s.frame_cells;
    return c;
  };
  STD_TORCH_CHECK(tensors.size() >= 1 && tensors[0].dim() == 3, "sample_codes: the stem's inputs are missing");

  // The stem.
  net.stem = conv(0);
  net.stem.total = tensors[0].size(1);
  net.stem.inputs = from.next("the stem's inputs", {call.clips, net.stem.total, s.channels});
  net.stem.frame = from.next("the stem's frame", {call.clips, p.cells, s.channels});
  net.stem.taps = {from.matrix("the stem's taps", net.stem.count * s.channels, s.channels), nullptr,
                   net.stem.count * s.channels, s.channels};
  for (int64_t depth = 0; depth < s.depths; ++depth) {
    const bool used = s.embeddings < 0 || depth == s.embeddings;
    net.embeddings[depth] = used ? from.next("an embedding", {s.codebook_size, s.channels}) : nullptr;
  }
  net.mix = from.affine("mix", s.channels, s.channels);

  // Blocks and attentions.
  for (int64_t b = 0; b < s.blocks; ++b) {
    Block<W> block{};
    block.norm = from.norm("a block's norm", s.channels);
    block.conv = conv(2);
    block.conv.total = net.stem.total;
    block.conv.inputs = from.next("a block's inputs", {call.clips, block.conv.total, s.channels});
    block.conv.frame = from.next("a block's frame", {call.clips, p.cells, 2 * s.channels});
    block.conv.taps = {from.matrix("a block's taps", block.conv.count * s.channels, 2 * s.channels), nullptr,
                       block.conv.count * s.channels, 2 * s.channels};
    block.out = from.affine("a block's output", s.channels, s.channels);
    call.blocks.push_back(block);
    if (s.every == 0 || (b + 1) % s.every != 0) continue;
    Attention<W> attention{};
    attention.norm1 = from.norm("an attention's norm", s.channels);
    attention.qkv = from.affine("queries, keys and values", s.channels, 3 * inner);
    attention.output = from.affine("an attention's output", inner, s.channels);
    attention.norm2 = from.norm("an attention's norm", s.channels);
    attention.widen = from.affine("ffn", s.channels, s.ffn);
    attention.narrow = from.affine("ffn", s.ffn, s.channels);
    attention.keys = from.keys(call.clips, s.heads, key_blocks, s.head_dim);
    attention.values = from.next("values", {call.clips, s.heads, key_blocks, s.head_dim, block_of});
    attention.heard = static_cast<int64_t>(call.attentions.size()) * whole_lines(inner);
    call.attentions.push_back(attention);
  }
  check_cells(net.stem, p.cells);
  if (!call.blocks.empty()) check_cells(call.blocks[0].conv, p.cells);  // all blocks look at the same
  for (size_t i = 0; i < call.attentions.size(); ++i)
    call.blocks[(i + 1) * s.every - 1].attention = &call.attentions[i];

  // What makes logits of features.
  net.norm = from.norm("norm", s.channels);
  for (int64_t depth = 0; depth < s.depths; ++depth) {
    net.parents[depth] = depth < s.parents ? from.next("parents", {s.codebook_size, s.channels}) : nullptr;
  }
  net.mlp1 = from.affine("mlp", s.channels, s.hidden);
  net.mlp2 = from.affine("mlp", s.hidden, s.channels);
  for (int64_t depth = s.first_depth; depth < s.last_depth; ++depth) {
    net.logits[depth] = in_whole_registers(from.affine("a head", s.channels, s.codebook_size), call.heads);
  }
  from.finish();
  net.channels = s.channels;
  net.depths = s.depths;
  net.first_depth = s.first_depth;
  net.last_depth = s.last_depth;
  net.codebook_size = s.codebook_size;
  net.hidden = std::max({s.channels, s.ffn, s.hidden, inner, whole_lines(s.codebook_size)});
  net.blocks = call.blocks.data();
  net.block_count = s.blocks;
  net.attention_count = static_cast<int64_t>(call.attentions.size());
  net.heads = s.heads;
  net.head_dim = s.head_dim;
}

// --- who does what ---

template <class W>
using Kernel = bool (*)(const Problem<W>&, int64_t, const Member&, const Memory<W>&);

template <class W>
Kernel<W> kernel_of() {
  if constexpr (std::is_same_v<W, BFloat16>) {
#if defined(VPFAST_HAS_X86_ISAS)
    if (bfloat16_is_active()) return avx512::sample_codes::sample_frame<W>;
#endif
    STD_TORCH_CHECK(false, "sample_codes: this processor has no dot products of bfloat16, or they are not selected");
  } else if constexpr (std::is_same_v<W, float>) {
    switch (active_isa()) {
      case Isa::avx512:
        return avx512::sample_codes::sample_frame<W>;
      case Isa::avx2:
        return avx2::sample_codes::sample_frame<W>;
      default:
        break;
    }
  }
  if constexpr (!std::is_same_v<W, BFloat16>) return plain::sample_codes::sample_frame<W>;
}

// Threads of one parallel region. All of them run at the same time if each was given one rank; if not, as within a
// region of the caller's, nobody may wait for anybody, and every rank does whole clips.
template <class W>
bool run(const Call<W>& call, int64_t threads) {
  const Network<W>& net = call.p.network;
  const Kernel<W> kernel = kernel_of<W>();
  const int64_t team = std::max<int64_t>(1, std::min(threads / call.clips, net.heads));
  const int64_t teams = std::min(call.clips, threads), ranks = team * teams;
  const int64_t shared = whole_lines(shared_elements(net)), own = whole_lines(own_elements(net));
  const int64_t factors = whole_lines(factor_elements(net) / kTerms<W>) * kTerms<W>;
  // All of it before the threads start: a rank that fails would leave its team waiting.
  AlignedVector<Worked<W>> memory(ranks * (own + shared));
  AlignedVector<W> factor_memory(ranks * factors);
  AlignedVector<int64_t> verdicts(ranks * kRun);
  AlignedVector<double> scores(ranks * net.codebook_size);
  const auto memory_of = [&](int64_t rank, int64_t team_of) {
    return Memory<W>{memory.data() + team_of * shared, memory.data() + ranks * shared + rank * own,
                     factor_memory.data() + rank * factors, verdicts.data() + team_of * kRun,
                     scores.data() + rank * net.codebook_size};
  };
  std::vector<Barrier> barriers(teams);
  std::atomic<int64_t> claimed{0}, entered{0};
  std::atomic<bool> finite{true};

  torch::stable::parallel_for(0, ranks, 1, [&](int64_t begin, int64_t end) {
    const auto clips_of = [&](int64_t first, int64_t step, const Member& member, const Memory<W>& with) {
      for (int64_t clip = first; clip < call.clips; clip += step) {
        if (!kernel(call.p, clip, member, with)) finite = false;
      }
    };
    bool together = team > 1;
    if (together) {
      entered.fetch_add(1);
      claimed.fetch_add(end - begin);
      while (claimed.load() < ranks) std::this_thread::yield();
      together = entered.load() == ranks;
    }
    if (together) {
      const int64_t with = begin / team;
      clips_of(with, teams, Member{begin % team, team, &barriers[with]}, memory_of(begin, with));
      return;
    }
    for (int64_t rank = begin; rank < end; ++rank) {
      clips_of(rank, ranks, Member{0, 1, &barriers[0]}, memory_of(rank, rank));
    }
  });
  return finite;
}

template <class W>
bool sample(Tensor codes, const std::vector<Tensor>& tensors, const std::vector<Tensor>& tables, Tensor keys,
            const std::vector<int64_t>& grid, const std::vector<Text>& masks, const std::vector<int64_t>& windows,
            const std::vector<int64_t>& sizes, double temperature, int64_t top_k, int64_t threads, ScalarType type) {
  Call<W> call;
  Problem<W>& p = call.p;
  const Sizes s = sizes_of(sizes);
  STD_TORCH_CHECK(!masks.empty() && windows.size() == 3 * masks.size(), "sample_codes: masks and windows");
  for (size_t i = 0; i < masks.size(); ++i) {
    call.masks.push_back(mask_of(grid, masks[i], {windows[3 * i], windows[3 * i + 1], windows[3 * i + 2]}));
  }
  p.length = call.masks[0].length();
  p.cells = call.masks[0].frame();
  p.time = s.time;
  STD_TORCH_CHECK(p.time < grid[0] && codes.dim() == 3, "sample_codes: the frame lies outside of the clip");
  call.clips = codes.size(0);
  p.codes = const_cast<int64_t*>(integers(codes, "codes", {call.clips, p.length, s.depths}));
  p.keys = integers(keys, "keys", {call.clips, 2});
  p.temperature = temperature;
  p.top_k = top_k;
  p.run = s.run;
  read(call, s, tensors, tables, type);
  for (int64_t clip = 0; clip < call.clips; ++clip) {
    for (int64_t i = p.time * p.cells; i < (p.time + 1) * p.cells; ++i) {
      for (int64_t depth = 0; depth < s.first_depth; ++depth) {
        const int64_t code = p.codes[(clip * p.length + i) * s.depths + depth];
        STD_TORCH_CHECK(code >= 0 && code < s.codebook_size, "sample_codes: there is no code ", code);
      }
    }
  }
  p.network.masks = call.masks.data();
  p.network.mask_count = static_cast<int64_t>(call.masks.size());
  return call.clips == 0 ||
         run(call, std::max<int64_t>(1, std::min<int64_t>(threads, torch::stable::get_num_threads())));
}

bool sample_codes(Tensor codes, std::vector<Tensor> tensors, std::vector<Tensor> tables, Tensor keys,
                  std::vector<int64_t> grid, std::vector<Text> masks, std::vector<int64_t> windows,
                  std::vector<int64_t> sizes, double temperature, int64_t top_k, int64_t threads) {
  STD_TORCH_CHECK(!tensors.empty(), "sample_codes: no tensors");
  const ScalarType type = tensors[0].scalar_type();
  const auto sample_in = [&](auto element) {
    using W = decltype(element);
    return sample<W>(codes, tensors, tables, keys, grid, masks, windows, sizes, temperature, top_k, threads, type);
  };
  switch (type) {
    case ScalarType::Double:
      return sample_in(double{});
    case ScalarType::Float:
      return sample_in(float{});
    case ScalarType::BFloat16:
      return sample_in(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "sample_codes: float32, float64 or bfloat16");
  }
}

}  // namespace
}  // namespace vpfast::sample_codes

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) { m.impl("sample_codes", TORCH_BOX(&vpfast::sample_codes::sample_codes)); }
