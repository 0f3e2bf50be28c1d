// What vpfast/models/_tiles.py writes and the kernels read: instructions of 64-bit integers.
//
// A map is a stack of images in pieces: a number is the sum of one, two or three bfloat16. 32 channels of a pixel lie
// together, a cache line, and pixels follow one another; then comes the next piece, then the next 32 channels. So the
// rows of a tile, 16 pixels, are 16 lines in a row. Rows of pixels lie `row` pixels apart and images `image` pixels,
// further than they are wide and high: what is between them is 0 and is never written, so a convolution needs no other
// border, and the pixels of all images can be counted as one line. Channels beyond the real ones are 0.
//
// Small maps (frames, predictions, errors) are dense float32, (B, C, H, W).
#pragma once

#include <cstdint>

namespace vpfast::tile_program {

enum class Opcode : int64_t { convolve = 0, pool = 1, upsample = 2, gate = 3, gather = 4, compare = 5, patches = 6 };
enum class Activation : int64_t { none = 0, relu = 1, leaky_relu = 2 };
enum class Target : int64_t { map = 0, rows = 1, planes = 2 };

// Where something lies: the number of a tensor of the call in the highest byte, bytes from its start in the others.
using Address = int64_t;

struct Map {
  Address address;     // of the first pixel's first piece
  int64_t channels;    // a multiple of 32
  int64_t row, image;  // pixels
  int64_t piece;       // bytes from one piece to the next, and from the last one to the next channels
};

struct Size {
  int64_t batch, height, width;
};

// One of the maps that a convolution sums over. Its weights: for each 32 output channels, 32 input channels, kernel
// position and piece, two tiles of 16 rows (pairs of input channels) of 16 pairs (an output channel each). Or, in place
// of three pieces, floats: two tiles of 16 rows of 16 even input channels and 16 odd ones.
struct Part {
  Map from;
  int64_t kernel_height, kernel_width;
  Address weights;
};

// to = activation(bias + sum over parts). `to` is a map of pieces; or, in float32, a row of channels a pixel; or a
// plane for each of the first `planes` channels. `also` is a map of the ReLU of `to`, a map too, or has address 0.
struct Convolve {
  Size size;
  Activation activation;
  Target target;
  Map to, also;
  int64_t planes;
  Address bias;
  int64_t floats;  // so the weights are
  int64_t parts;   // so many Parts follow
};

struct Pool {  // the largest of each 2 x 2 pixels; `size` is of the result
  Size size;
  Map from, to;
};

struct Upsample {  // bilinear, corners on corners, twice as large; `size` is of the result
  Size size;
  Map from, to;
};

// LSTM gating (paper, Eq. 2-3): four rows of `channels` a pixel, in the order of the offsets, with the cell state.
struct Gate {
  Size size;
  Address gates, cell;
  int64_t channels;
  int64_t forget, input, output, candidate;  // offsets into a row, in channels
  Map hidden;
};

// What a level looks at besides h: its errors, those of the level below and the prediction of the level above (each
// absent where its address is 0), and the frame. Channel d * n + c of pixel x is channel c of pixel x + d - kernel / 2.
struct Gather {
  Size size;
  int64_t channels;  // of a frame
  int64_t average;   // down-sampling by means in place of every second pixel
  int64_t kernel;
  Address errors, below, above, frame;
  Map to;
};

// Positive and negative errors of a level whose frames are 2^level times smaller; the frame is kept where asked.
struct Compare {
  Size size;
  int64_t channels, level, average;
  Address prediction, frame, errors, kept;
};

// What a 4x4 kernel with stride 2 and a border of one 0 sees of each frame's (value - 0.5) gain: 16 channels of a pixel
// for each of the frame's. Pixel (lattice y + u, lattice x + v) of image i is pixel (y, x) of image
// (lattice u + v) batch + i of the map, so that further strides step from image to image; `size` is of one of these.
struct Patches {
  Size size;
  int64_t channels, lattice;
  double gain;
  Address frames;
  Map to;
};

}  // namespace vpfast::tile_program
