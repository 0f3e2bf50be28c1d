// plane_convolution on the CPU: 2-D convolutions of stride 1 between maps of few channels, for training.
//
// Story. Maps are planes, (B, C, H, W): lanes hold neighbouring pixels, so eight channels fill a register as well as
// eight hundred do, where kernels with channels in the lanes leave half of it empty. A thread takes a band of rows of
// an image, copies all inputs' rows into working memory with the border of zeros around them, and sums eight outputs by
// two registers at a time over all inputs and positions: two loads of pixels and eight of weights for sixteen
// multiplications; where there are but 16 registers (AVX2), four outputs by three. The gradient of the input is the
// same sum with outputs and inputs, and first and last position, changed about: only the order differs in which the
// weights are packed.
//
// The gradient of weights takes eight outputs (AVX2: four) by three positions as sums of registers over a band's
// pixels, and adds lanes up at the very end. Units of work are ranges of outputs and inputs, and where these are few,
// of images with a table of sums each, added up in order: no result depends on the number of threads.
//
// Operations: 2 outputs inputs positions a pixel, in each of the three; multiplications limit it, at 60 to 75 % of what
// the processor can, but for 1x1 kernels, where copying does. Bytes: maps once, and twice in the cache.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/aligned.h"
#include "common/isa.h"
#include "plane_convolution/plane_convolution_problem.h"

#define VPFAST_KERNEL_FILE "plane_convolution/plane_convolution_kernel.h"
#include "common/for_each_isa.h"

namespace vpfast {
namespace {

using planes::Band;
using planes::Block;
using planes::Forward;
using planes::Range;
using planes::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostLanes = 16;
constexpr int64_t kBandBytes = 40000;  // of padded rows: most of the L1 cache
constexpr int64_t kLeastBandRows = 8;
constexpr int64_t kOutputs = 8, kInputs = 8;  // of a unit of work for gradients of weights
constexpr int64_t kUnits = 8;                 // enough of them for a few threads
constexpr int64_t kGrain = 1 << 21;           // operations that waking a thread pays for

Range part(int64_t index, int64_t size, int64_t all) { return {index * size, std::min((index + 1) * size, all)}; }

int64_t count_parts(int64_t all, int64_t size) { return (all + size - 1) / size; }

int64_t grain(const Shape& s, int64_t units) {
  const int64_t work = 2 * s.images * s.inputs * s.outputs * s.positions() * s.pixels();
  return std::max<int64_t>(1, kGrain * units / std::max<int64_t>(work, 1));
}

// Rows of a band: an even number.
int64_t band_rows(const Shape& s, int64_t inputs) {
  const int64_t fitting = kBandBytes / (4 * inputs * s.padded_width()) - (s.kernel_height - 1);
  return std::min(s.height, std::max(kLeastBandRows, fitting & ~int64_t{1}));
}

struct Kernels {
  decltype(&plain::convolve_planes) convolve;
  decltype(&plain::pad_rows) pad;
  decltype(&plain::pack_gradients) pack;
  decltype(&plain::add_weight_gradients) add;
  decltype(&plain::sum_lanes) sum_lanes;
  int64_t lanes;
};

Kernels kernels() {
#define VPFAST_KERNELS(ISA)                                                                                          \
  {                                                                                                                  \
    ISA::convolve_planes, ISA::pad_rows, ISA::pack_gradients, ISA::add_weight_gradients, ISA::sum_lanes, ISA::kLanes \
  }
  constexpr Kernels of_isa[kIsaCount] = {VPFAST_KERNELS(plain), VPFAST_KERNELS(avx2), VPFAST_KERNELS(avx512)};
#undef VPFAST_KERNELS
  return of_isa[static_cast<int>(active_isa())];
}

int64_t memory_of_band(const Shape& s, int64_t inputs, int64_t rows) {
  return s.positions() == 1 ? 0 : inputs * (rows + s.kernel_height - 1) * s.padded_width();
}

// Rows of some inputs of an image: copied to `memory`, or where a kernel reaches nothing around them, as they lie.
Band read_band(const Kernels& kernel, const Shape& s, const float* x, int64_t image, Range inputs, Range rows,
               float* memory) {
  const float* first = x + image * s.inputs * s.pixels();
  if (s.positions() == 1) return {first + inputs.begin * s.pixels() + rows.begin * s.width, s.pixels()};
  kernel.pad(s, first, inputs, rows, memory);
  return {memory, (rows.size() + s.kernel_height - 1) * s.padded_width()};
}

// --- y ---

// Where the weight of an output, an input and a position lies.
struct Weights {
  const float* first;
  int64_t of_output, of_input, of_position;
};

// A convolution's outputs in blocks, with their weights in the order in which they are read.
struct Blocks {
  AlignedVector<float> weights;
  std::vector<Block> blocks;
};

Blocks pack_weights(const Shape& s, const Weights& given) {
  Blocks packed;
  int64_t size = 0;
  for (int64_t next = 0; next < s.outputs;) {
    const int64_t left = s.outputs - next;
    const bool eight = left >= 8 || (left > 4 && s.outputs >= 8), four = left >= 4 || (left > 1 && s.outputs >= 4);
    const int64_t count = eight ? 8 : four ? 4 : 1, first = std::min(next, s.outputs - count);
    packed.blocks.push_back({first, count, nullptr});
    size += count * s.inputs * s.positions();
    next = first + count;
  }
  packed.weights.resize(size);
  float* to = packed.weights.data();
  for (Block& block : packed.blocks) {
    block.weights = to;
    for (int64_t input = 0; input < s.inputs; ++input) {
      const float* from = given.first + block.first * given.of_output + input * given.of_input;
      for (int64_t position = 0; position < s.positions(); ++position, from += given.of_position) {
        for (int64_t output = 0; output < block.count; ++output) *to++ = from[output * given.of_output];
      }
    }
  }
  return packed;
}

void convolve(const Forward& p) {
  const Shape& s = p.shape;
  const Kernels kernel = kernels();
  const int64_t rows = band_rows(s, s.inputs), bands = count_parts(s.height, rows), units = s.images * bands;
  torch::stable::parallel_for(0, units, grain(s, units), [&](int64_t begin, int64_t end) {
    AlignedVector<float> memory(memory_of_band(s, s.inputs, rows));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / bands;
      const Range seen = part(unit % bands, rows, s.height);
      kernel.convolve(p, read_band(kernel, s, p.x, image, {0, s.inputs}, seen, memory.data()), image, seen);
    }
  });
}

// --- gradients of weights ---

// Sums over the bands of some images.
class Gradient {
 public:
  Gradient(const planes::WeightGradient& p, Range outputs, Range inputs)
      : p_(p),
        kernel_(kernels()),
        outputs_(outputs),
        inputs_(inputs),
        rows_(band_rows(p.shape, kInputs)),
        padded_(memory_of_band(p.shape, inputs.size(), rows_)),
        grad_(kOutputs * rows_ * p.shape.width),
        sums_(outputs.size() * inputs.size() * p.shape.positions() * kMostLanes),
        bias_(outputs.size()),
        taps_(inputs.size() * p.shape.positions()) {}

  void add(Range images) {
    const Shape& s = p_.shape;
    for (int64_t image = images.begin; image < images.end; ++image) {
      for (int64_t first = 0; first < s.height; first += rows_) add(image, {first, std::min(first + rows_, s.height)});
    }
  }

  // To (outputs, inputs, positions) and (outputs,) of the whole convolution.
  void finish(float* weight, float* bias) const {
    const Shape& s = p_.shape;
    const int64_t taps = static_cast<int64_t>(taps_.size());
    for_blocks([&](int64_t first, int64_t count) {
      for (int64_t k = 0; k < taps * count; ++k) {
        const int64_t output = outputs_.begin + first + k % count;
        weight[(output * s.inputs + inputs_.begin) * s.positions() + k / count] =
            kernel_.sum_lanes(sums_.data() + (first * taps + k) * kernel_.lanes);
      }
    });
    if (inputs_.begin == 0) std::copy(bias_.begin(), bias_.end(), bias + outputs_.begin);
  }

 private:
  // Blocks of 8, 4 and 1 outputs.
  template <class Visit>
  void for_blocks(const Visit& visit) const {
    for (int64_t first = 0, count; first < outputs_.size(); first += count) {
      const int64_t left = outputs_.size() - first;
      count = left >= 8 ? 8 : left >= 4 ? 4 : 1;
      visit(first, count);
    }
  }

  void add(int64_t image, Range rows) {
    const Shape& s = p_.shape;
    const Band band = read_band(kernel_, s, p_.x, image, inputs_, rows, padded_.data());
    size_t tap = 0;
    for (int64_t input = 0; input < inputs_.size(); ++input) {
      for (int64_t row = 0; row < s.kernel_height; ++row) {
        for (int64_t column = 0; column < s.kernel_width; ++column) {
          taps_[tap++] = band.padded + input * band.plane + row * s.padded_width() + column;
        }
      }
    }
    const int64_t taps = static_cast<int64_t>(taps_.size());
    const float* grad = p_.grad + (image * s.outputs + outputs_.begin) * s.pixels() + rows.begin * s.width;
    for_blocks([&](int64_t first, int64_t count) {
      kernel_.pack(s, grad + first * s.pixels(), rows.size(), count, grad_.data(), bias_.data() + first);
      kernel_.add(s, grad_.data(), taps_.data(), taps, rows.size(), count, sums_.data() + first * taps * kernel_.lanes);
    });
  }

  const planes::WeightGradient& p_;
  const Kernels kernel_;
  const Range outputs_, inputs_;
  const int64_t rows_;
  AlignedVector<float> padded_, grad_, sums_;  // sums: blocks of outputs, taps, outputs of the block, lanes
  std::vector<float> bias_;
  std::vector<const float*> taps_;
};

void differentiate(const planes::WeightGradient& p, float* weight, float* bias) {
  const Shape& s = p.shape;
  const int64_t blocks = count_parts(s.outputs, kOutputs), groups = count_parts(s.inputs, kInputs);
  const int64_t chunks = std::clamp<int64_t>(count_parts(kUnits, blocks * groups), 1, std::max<int64_t>(s.images, 1));
  const int64_t chunk = count_parts(s.images, chunks), units = chunks * blocks * groups;
  const int64_t weights = s.outputs * s.inputs * s.positions();
  std::vector<float> tables(chunks > 1 ? chunks * (weights + s.outputs) : 0);
  torch::stable::parallel_for(0, units, grain(s, units), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t k = unit / (blocks * groups);
      Gradient gradient(p, part(unit / groups % blocks, kOutputs, s.outputs), part(unit % groups, kInputs, s.inputs));
      gradient.add(part(k, chunk, s.images));
      float* table = tables.data() + k * (weights + s.outputs);
      gradient.finish(chunks > 1 ? table : weight, chunks > 1 ? table + weights : bias);
    }
  });
  if (chunks == 1) return;
  std::fill(weight, weight + weights, 0.0f);
  std::fill(bias, bias + s.outputs, 0.0f);
  for (int64_t k = 0; k < chunks; ++k) {
    const float* table = tables.data() + k * (weights + s.outputs);
    for (int64_t e = 0; e < weights; ++e) weight[e] += table[e];
    for (int64_t e = 0; e < s.outputs; ++e) bias[e] += table[weights + e];
  }
}

// --- the operators ---

const float* numbers(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// In dense memory, once type and shape are as they must be.
Tensor checked(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool right = t.scalar_type() == ScalarType::Float && t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) right = right && t.size(d++) == size;
  STD_TORCH_CHECK(right, "plane_convolution: ", name, " has a wrong shape, or is not float32");
  return torch::stable::contiguous(t);
}

// Of maps with `inputs` channels. Rows are whole registers, or two of them are one.
Shape shape_of(const Tensor& maps, int64_t inputs, int64_t outputs, int64_t kernel_height, int64_t kernel_width) {
  STD_TORCH_CHECK(maps.dim() == 4, "plane_convolution: maps must be (B, C, H, W)");
  STD_TORCH_CHECK(kernel_height % 2 == 1 && kernel_width % 2 == 1, "plane_convolution: kernels must be odd");
  STD_TORCH_CHECK(inputs > 0 && outputs > 0, "plane_convolution: needs at least one input and one output channel");
  const Shape s{maps.size(0), inputs, outputs, maps.size(2), maps.size(3), kernel_height, kernel_width};
  const bool whole = s.width > 0 && s.width % kMostLanes == 0, halves = s.width == kMostLanes / 2 && s.height % 2 == 0;
  STD_TORCH_CHECK(s.height > 0 && (whole || halves),
                  "plane_convolution: W must be a multiple of 16, or 8 with an even H; got H = ", s.height,
                  " and W = ", s.width);
  return s;
}

Tensor plane_convolution(Tensor x, Tensor weight, std::optional<Tensor> bias, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 4, "plane_convolution: weight must be (outputs, inputs, kh, kw)");
  const int64_t first = weight.size(0), second = weight.size(1), positions = weight.size(2) * weight.size(3);
  Forward p{};
  p.shape = shape_of(x, transposed ? first : second, transposed ? second : first, weight.size(2), weight.size(3));
  const Shape& s = p.shape;
  x = checked(x, "x", {s.images, s.inputs, s.height, s.width});
  weight = checked(weight, "weight", {first, second, s.kernel_height, s.kernel_width});
  if (bias) bias = checked(*bias, "bias", {s.outputs});
  Tensor y = torch::stable::empty({s.images, s.outputs, s.height, s.width}, ScalarType::Float);
  const Blocks packed =
      pack_weights(s, transposed ? Weights{numbers(weight) + positions - 1, positions, second * positions, -1}
                                 : Weights{numbers(weight), second * positions, positions, 1});
  p.x = numbers(x);
  p.blocks = packed.blocks.data();
  p.block_count = static_cast<int64_t>(packed.blocks.size());
  p.bias = bias ? numbers(*bias) : nullptr;
  p.y = static_cast<float*>(y.mutable_data_ptr());
  convolve(p);
  return y;
}

std::tuple<Tensor, Tensor> plane_convolution_weight(Tensor grad, Tensor x, int64_t kernel_height,
                                                    int64_t kernel_width) {
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4, "plane_convolution: maps must be (B, C, H, W)");
  planes::WeightGradient p{};
  p.shape = shape_of(x, x.size(1), grad.size(1), kernel_height, kernel_width);
  const Shape& s = p.shape;
  grad = checked(grad, "grad", {s.images, s.outputs, s.height, s.width});
  x = checked(x, "x", {s.images, s.inputs, s.height, s.width});
  p.grad = numbers(grad);
  p.x = numbers(x);
  Tensor weight = torch::stable::empty({s.outputs, s.inputs, kernel_height, kernel_width}, ScalarType::Float);
  Tensor bias = torch::stable::empty({s.outputs}, ScalarType::Float);
  differentiate(p, static_cast<float*>(weight.mutable_data_ptr()), static_cast<float*>(bias.mutable_data_ptr()));
  return {weight, bias};
}

}  // namespace
}  // namespace vpfast

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) {
  m.impl("plane_convolution", TORCH_BOX(&vpfast::plane_convolution));
  m.impl("plane_convolution_weight", TORCH_BOX(&vpfast::plane_convolution_weight));
}
