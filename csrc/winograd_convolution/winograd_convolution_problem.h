// What one call of winograd_convolution is about, as its kernels see it.
#pragma once

#include <cstdint>

namespace vpfast::winograd {

// A tile is 2x2 pixels of y, made of 4x4 pixels of x. Transformed it has so many cells.
constexpr int64_t kCells = 16;

// Transformed weights lie in panels of so many outputs, the last one filled up with zeros: (panels, cells, inputs, 32).
constexpr int64_t kPanel = 32;

// From one cell of `rows` rows to the next: a cache line more than they take. Else the 16 cells of a row, written side
// by side, would often fall on the same few sets of the cache.
constexpr int64_t cell_step(int64_t rows, int64_t columns) { return rows * columns + 16; }

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// Maps (images, height, width, channels), dense float32.
struct Shape {
  int64_t images, height, width, inputs, outputs;

  int64_t tiles_down() const { return (height + 1) / 2; }
  int64_t tiles_across() const { return (width + 1) / 2; }
  int64_t tiles() const { return images * tiles_down() * tiles_across(); }
  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t used(int64_t panel) const { return outputs < (panel + 1) * kPanel ? outputs - panel * kPanel : kPanel; }
};

// y = f(bias + x * weights + added), where f lets numbers below 0 pass `slope` times as large.
struct Forward {
  Shape shape;
  const float *x, *weights;
  const float *bias, *added;  // each may be null
  float slope;
  float* y;
};

// The gradient of weights (outputs, 3, 3, inputs), not transformed.
struct WeightGradient {
  Shape shape;
  const float *x, *grad;
};

}  // namespace vpfast::winograd
