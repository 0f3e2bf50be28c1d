// winograd_convolution on the CPU: 3x3 convolutions of stride 1 with zeros around the maps, in channels_last.
//
// Story. F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), after Winograd: for
// a tile of 2x2 pixels of y, 4x4 pixels of x and the weights are both transformed into 16 cells; a cell of y is the
// product of those two, summed over inputs, and 16 cells transform back into 4 pixels. So 4 pixels take 16 products for
// each input and output where they take 36 in a plain sum, and all transforms together are additions, 5 to 10 % of the
// time from 64 channels on. In float32 the result is about as close to the exact one as a plain sum: the transforms
// round, but sums are shorter by a factor of 9.
//
// A thread transforms some tiles of x, all inputs, 256 KB or at least 24 tiles; then for each panel of 32
// outputs and each cell it multiplies a matrix (tiles, inputs) by one (inputs, panel), and transforms the panel's cells
// back with bias, an addend and LeakyReLU on the way. Weights lie in the order in which they are read; while one cell's
// are multiplied the next one's are asked for. With 512 channels and maps of 8x8 they come from memory, and that is
// half of the time. The gradient of the input is the same convolution with weights that were turned and transposed.
//
// The gradient of weights has the cells of y's gradient and of x as factors, summed over tiles: a matrix (outputs,
// tiles) by one (tiles, panel of inputs). Units of work are panels and blocks of outputs, and where these are few,
// parts of the tiles, summed in order.
//
// Operations: 32 a tile, input and output, in each of the three; bytes: maps twice and weights (16 a pair of channels)
// once a block of tiles. No result depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "common/aligned.h"
#include "common/isa.h"
#include "winograd_convolution/winograd_convolution_problem.h"

#define VPFAST_KERNEL_FILE "winograd_convolution/winograd_convolution_kernel.h"
#include "common/for_each_isa.h"

namespace vpfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using winograd::cell_step;
using winograd::Forward;
using winograd::kCells;
using winograd::kPanel;
using winograd::Range;
using winograd::Shape;
using winograd::WeightGradient;

constexpr int64_t kBlockBytes = 1 << 18;               // of transformed maps: half of a small L2 cache
constexpr int64_t kLeastTiles = 24, kMostTiles = 96;   // of a block; fewer read weights too often
constexpr int64_t kGradTiles = 64, kGradOutputs = 64;  // of a block for gradients of weights
constexpr int64_t kUnits = 16;                         // enough of them for a few threads
constexpr int64_t kWeights = 9;

struct Kernels {
  decltype(&plain::convolve_tiles) convolve;
  decltype(&plain::add_weight_gradients) add;
};

Kernels kernels() {
  constexpr Kernels of_isa[kIsaCount] = {{plain::convolve_tiles, plain::add_weight_gradients},
                                         {avx2::convolve_tiles, avx2::add_weight_gradients},
                                         {avx512::convolve_tiles, avx512::add_weight_gradients}};
  return of_isa[static_cast<int>(active_isa())];
}

int64_t count_parts(int64_t all, int64_t size) { return (all + size - 1) / size; }

// Part `index` of `parts` that are nearly alike.
Range part(int64_t index, int64_t parts, int64_t all) { return {index * all / parts, (index + 1) * all / parts}; }

void convolve(const Forward& p) {
  const Shape& s = p.shape;
  if (s.tiles() == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fitting = kBlockBytes / static_cast<int64_t>(sizeof(float) * kCells) / s.inputs;
  int64_t blocks = count_parts(s.tiles(), std::clamp(fitting, kLeastTiles, kMostTiles));
  if (blocks > 1) blocks = std::min(count_parts(blocks, threads) * threads, s.tiles());
  const int64_t most = count_parts(s.tiles(), blocks);
  const int64_t groups = std::min(s.panels(), count_parts(threads, blocks));  // each transforms the maps for itself
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    AlignedVector<float> maps(kCells * cell_step(most, s.inputs)), sums(kCells * cell_step(most, kPanel));
    for (int64_t unit = begin; unit < end; ++unit) {
      kernels().convolve(p, part(unit / groups, blocks, s.tiles()), part(unit % groups, groups, s.panels()),
                         maps.data(), sums.data());
    }
  });
}

// To (outputs, 3, 3, inputs).
void differentiate(const WeightGradient& p, float* weight) {
  const Shape& s = p.shape;
  const int64_t size = s.outputs * kWeights * s.inputs;
  const int64_t panels = count_parts(s.inputs, kPanel), chunks = count_parts(s.outputs, kGradOutputs);
  const int64_t most = count_parts(s.tiles(), kGradTiles);
  if (most == 0) {
    std::fill_n(weight, size, 0.0f);
    return;
  }
  const int64_t parts = std::clamp<int64_t>(kUnits / (panels * chunks), 1, most);
  AlignedVector<float> tables(parts > 1 ? parts * size : 0);
  torch::stable::parallel_for(0, panels * chunks * parts, 1, [&](int64_t begin, int64_t end) {
    AlignedVector<float> maps(kCells * cell_step(kGradTiles, kPanel)),
        grads(kCells * cell_step(kGradTiles, kGradOutputs)), sums(kCells * cell_step(kGradOutputs, kPanel));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel = unit / parts / chunks, chunk = unit / parts % chunks;
      const Range inputs{panel * kPanel, std::min((panel + 1) * kPanel, s.inputs)};
      kernels().add(p, part(unit % parts, parts, s.tiles()), kGradTiles, part(chunk, chunks, s.outputs), inputs,
                    maps.data(), grads.data(), sums.data(), parts > 1 ? tables.data() + unit % parts * size : weight);
    }
  });
  if (parts == 1) return;
  torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) weight[e] = tables[e];
    for (int64_t k = 1; k < parts; ++k) {
      for (int64_t e = begin; e < end; ++e) weight[e] += tables[k * size + e];
    }
  });
}

// 3x3 weights of 32 outputs, for each of which a register's lane does the same.
struct PanelWeights {
  float cell[3][3][kPanel];
};

// G g G^T, to 16 rows `step` apart.
void transform_weights(const PanelWeights& g, float* to, int64_t step) {
  float half[4][3][kPanel];
  for (int64_t j = 0; j < 3; ++j) {
    for (int64_t o = 0; o < kPanel; ++o) {
      const float even = g.cell[0][j][o] + g.cell[2][j][o], odd = g.cell[1][j][o];
      half[0][j][o] = g.cell[0][j][o];
      half[1][j][o] = 0.5f * (even + odd);
      half[2][j][o] = 0.5f * (even - odd);
      half[3][j][o] = g.cell[2][j][o];
    }
  }
  for (int64_t i = 0; i < 4; ++i, to += 4 * step) {
    for (int64_t o = 0; o < kPanel; ++o) {
      const float even = half[i][0][o] + half[i][2][o], odd = half[i][1][o];
      to[o] = half[i][0][o];
      to[step + o] = 0.5f * (even + odd);
      to[2 * step + o] = 0.5f * (even - odd);
      to[3 * step + o] = half[i][2][o];
    }
  }
}

// --- the operators ---

const float* numbers(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// In dense memory, once type and shape are as they must be.
Tensor checked(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool right = t.scalar_type() == ScalarType::Float && t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) right = right && t.size(d++) == size;
  STD_TORCH_CHECK(right, "winograd_convolution: ", name, " has a wrong shape, or is not float32");
  return torch::stable::contiguous(t);
}

// Maps (B, C, H, W) as (B, H, W, C), the same memory.
Tensor pixels_of(const Tensor& maps) { return torch::stable::transpose(torch::stable::transpose(maps, 1, 2), 2, 3); }

// New maps (B, C, H, W) in channels_last.
Tensor empty_maps(std::initializer_list<int64_t> shape) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

Shape shape_of(const Tensor& x, int64_t outputs) {
  STD_TORCH_CHECK(x.dim() == 4, "winograd_convolution: maps must be (B, C, H, W)");
  STD_TORCH_CHECK(x.size(1) > 0 && outputs > 0,
                  "winograd_convolution: needs at least one input and one output channel");
  return {x.size(0), x.size(2), x.size(3), x.size(1), outputs};
}

Tensor winograd_weights(Tensor weight, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 4, "winograd_weights: weight must be (outputs, inputs, 3, 3)");
  STD_TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == ScalarType::Float,
                  "winograd_weights: weight must be float32 (outputs, inputs, 3, 3)");
  const int64_t of_output = weight.stride(transposed ? 1 : 0), of_input = weight.stride(transposed ? 0 : 1);
  const int64_t of_row = weight.stride(2), of_column = weight.stride(3);
  const Shape s{0, 0, 0, weight.size(transposed ? 0 : 1), weight.size(transposed ? 1 : 0)};
  Tensor made = torch::stable::empty({s.panels(), kCells, s.inputs, kPanel}, ScalarType::Float);
  const float* from = numbers(weight);
  float* to = static_cast<float*>(made.mutable_data_ptr());
  torch::stable::parallel_for(0, s.panels() * s.inputs, 64, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t panel = unit / s.inputs, input = unit % s.inputs;
      const float* first = from + panel * kPanel * of_output + input * of_input;
      PanelWeights given{};
      for (int64_t o = 0; o < s.used(panel); ++o) {
        for (int64_t i = 0; i < 3; ++i) {
          for (int64_t j = 0; j < 3; ++j) {
            const int64_t row = transposed ? 2 - i : i, column = transposed ? 2 - j : j;
            given.cell[i][j][o] = first[o * of_output + row * of_row + column * of_column];
          }
        }
      }
      transform_weights(given, to + (panel * kCells * s.inputs + input) * kPanel, s.inputs * kPanel);
    }
  });
  return made;
}

Tensor winograd_convolution(Tensor x, Tensor weights, std::optional<Tensor> bias, std::optional<Tensor> added,
                            double slope, int64_t outputs) {
  Forward p{};
  p.shape = shape_of(x, outputs);
  const Shape& s = p.shape;
  x = checked(pixels_of(x), "x", {s.images, s.height, s.width, s.inputs});
  weights = checked(weights, "weights", {s.panels(), kCells, s.inputs, kPanel});
  if (bias) bias = checked(*bias, "bias", {outputs});
  STD_TORCH_CHECK(!added || added->dim() == 4, "winograd_convolution: added must be (B, C, H, W)");
  if (added) added = checked(pixels_of(*added), "added", {s.images, s.height, s.width, outputs});
  Tensor y = empty_maps({s.images, outputs, s.height, s.width});
  p.x = numbers(x);
  p.weights = numbers(weights);
  p.bias = bias ? numbers(*bias) : nullptr;
  p.added = added ? numbers(*added) : nullptr;
  p.slope = static_cast<float>(slope);
  p.y = static_cast<float*>(y.mutable_data_ptr());
  convolve(p);
  return y;
}

Tensor winograd_convolution_weight(Tensor grad, Tensor x) {
  STD_TORCH_CHECK(grad.dim() == 4, "winograd_convolution: grad must be (B, C, H, W)");
  WeightGradient p{};
  p.shape = shape_of(x, grad.size(1));
  const Shape& s = p.shape;
  grad = checked(pixels_of(grad), "grad", {s.images, s.height, s.width, s.outputs});
  x = checked(pixels_of(x), "x", {s.images, s.height, s.width, s.inputs});
  p.grad = numbers(grad);
  p.x = numbers(x);
  Tensor weight = empty_maps({s.outputs, s.inputs, 3, 3});
  differentiate(p, static_cast<float*>(weight.mutable_data_ptr()));
  return weight;
}

}  // namespace
}  // namespace vpfast

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) {
  m.impl("winograd_weights", TORCH_BOX(&vpfast::winograd_weights));
  m.impl("winograd_convolution", TORCH_BOX(&vpfast::winograd_convolution));
  m.impl("winograd_convolution_weight", TORCH_BOX(&vpfast::winograd_convolution_weight));
}
