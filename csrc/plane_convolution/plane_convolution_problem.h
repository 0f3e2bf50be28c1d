// What one call of plane_convolution is about, as its kernels see it.
#pragma once

#include <cstdint>

namespace vpfast::planes {

// Maps (images, channels, height, width), dense float32. A kernel is odd both ways, and a border of zeros around every
// plane keeps maps at their size.
struct Shape {
  int64_t images, inputs, outputs, height, width, kernel_height, kernel_width;

  int64_t pixels() const { return height * width; }
  int64_t positions() const { return kernel_height * kernel_width; }
  int64_t above() const { return kernel_height / 2; }
  int64_t before() const { return kernel_width / 2; }
  int64_t padded_width() const { return width + kernel_width - 1; }
};

// Output channels that are computed side by side: 8, 4 or 1.
struct Block {
  int64_t first, count;
  const float* weights;  // (inputs, positions, count)
};

// y = bias + sum over inputs and positions of weight times x. A block may overlap the one before: the same sums are
// written again.
struct Forward {
  Shape shape;
  const float* x;
  const Block* blocks;
  int64_t block_count;
  const float* bias;  // or null
  float* y;
};

// The gradients of weight (outputs, inputs, positions) and bias (outputs).
struct WeightGradient {
  Shape shape;
  const float *grad, *x;
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// Some rows of each input, with what a kernel reaches around them; so far apart lie the inputs' planes.
struct Band {
  const float* padded;
  int64_t plane;
};

}  // namespace vpfast::planes
