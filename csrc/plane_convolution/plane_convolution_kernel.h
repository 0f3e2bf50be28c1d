// The loops of plane_convolution. Included by for_each_isa.h, once for each instruction set.

using planes::Band;
using planes::Block;
using planes::Forward;
using planes::Range;
using planes::Shape;

// Registers of pixels in a band of rows of one plane. A register holds pixels of one row; or, where it is twice as wide
// as a row, of two.
struct Registers {
  int64_t width, padded_width;
  bool two_rows;

  explicit VPFAST_INLINE Registers(const Shape& s)
      : width(s.width), padded_width(s.padded_width()), two_rows(s.width < kLanes) {}
  VPFAST_INLINE int64_t in_rows(int64_t rows) const { return rows * width / kLanes; }
  // Where a register's pixels begin in a padded plane.
  VPFAST_INLINE int64_t padded(int64_t index) const {
    if (two_rows) return 2 * index * padded_width;
    const int64_t in_a_row = width / kLanes;
    return index / in_a_row * padded_width + index % in_a_row * kLanes;
  }
};

// A register of a padded plane.
template <bool two_rows>
VPFAST_INLINE FloatLanes load_padded(const float* from, int64_t padded_width) {
  if constexpr (!two_rows) return load(from).v;
  typedef float Half __attribute__((vector_size(kBytes / 2)));
  Half halves[2];
  std::memcpy(&halves[0], from, sizeof(Half));
  std::memcpy(&halves[1], from + padded_width, sizeof(Half));
  FloatLanes x;
  std::memcpy(&x, halves, sizeof x);
  return x;
}

// Rows of the planes of `channels` of an image, with the rows and columns around them that a kernel reaches.
inline void pad_rows(const Shape& s, const float* image, Range channels, Range rows, float* to) {
  const int64_t padded_width = s.padded_width(), before = s.before();
  for (int64_t channel = channels.begin; channel < channels.end; ++channel) {
    const float* plane = image + channel * s.pixels();
    for (int64_t row = rows.begin - s.above(); row < rows.end + s.above(); ++row, to += padded_width) {
      const bool inside = row >= 0 && row < s.height;
      if (!inside) {
        std::memset(to, 0, padded_width * sizeof(float));
        continue;
      }
      for (int64_t k = 0; k < before; ++k) to[k] = to[padded_width - 1 - k] = 0;
      const float* from = plane + row * s.width;
      // Not memcpy: rows are short, and a call for each would take a tenth of the time of a convolution.
      if (Registers(s).two_rows) {
        for (int64_t k = 0; k < kLanes / 2; ++k) to[before + k] = from[k];
      } else {
        for (int64_t k = 0; k < s.width; k += kLanes) store(to + before + k, load(from + k));
      }
    }
  }
}

// --- y ---

constexpr int64_t kChain = 8;

// With 32 registers the sums of eight outputs fit side by side; with 16, those of four.
constexpr bool kEightTogether = kLanes == 16;

// Some planes of a block of `of_block`, `outputs` from `first` on, by `registers` registers, summed over all inputs and
// positions. `origin` is where each register begins in an input's padded rows, `y` where it goes in the first of these
// planes.
template <int of_block, int outputs, int registers, bool two_rows>
VPFAST_INLINE void sum_inputs(const Forward& p, const Block& block, int64_t first, const Band& band,
                              const int64_t* origin, float* const* y) {
  const Shape& s = p.shape;
  const int64_t padded_width = s.padded_width();
  FloatLanes total[outputs][registers];
  for (int o = 0; o < outputs; ++o) {
    for (int r = 0; r < registers; ++r) total[o][r] = F32::broadcast(p.bias ? p.bias[block.first + first + o] : 0.0f).v;
  }
  const float* weight = block.weights + first;
  // Sums of some inputs at a time: long ones in a single chain would round more than torch's do.
  for (int64_t input = 0; input < s.inputs;) {
    const int64_t end = input + kChain < s.inputs ? input + kChain : s.inputs;
    FloatLanes sum[outputs][registers] = {};
    for (; input < end; ++input) {
      for (int64_t row = 0; row < s.kernel_height; ++row) {
        const float* x = band.padded + input * band.plane + row * padded_width;
        for (int64_t column = 0; column < s.kernel_width; ++column, ++x, weight += of_block) {
          FloatLanes seen[registers];
#pragma GCC unroll 8
          for (int r = 0; r < registers; ++r) seen[r] = load_padded<two_rows>(x + origin[r], padded_width);
#pragma GCC unroll 8
          for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 8
            for (int r = 0; r < registers; ++r) sum[o][r] += weight[o] * seen[r];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 8
      for (int r = 0; r < registers; ++r) total[o][r] += sum[o][r];
    }
  }
  for (int o = 0; o < outputs; ++o) {
    for (int r = 0; r < registers; ++r) store(y[r] + o * s.pixels(), {total[o][r]});
  }
}

// Some planes of a block: tiles of `registers` of a band's `count` registers, the last of which may overlap the one
// before.
template <int of_block, int outputs, int registers, bool two_rows>
void fill_planes(const Forward& p, const Block& block, int64_t plane, const Band& band, int64_t count, float* y) {
  if constexpr (registers > 1) {
    if (count < registers) return fill_planes<of_block, outputs, 1, two_rows>(p, block, plane, band, count, y);
  }
  const Registers layout(p.shape);
  for (int64_t next = 0; next < count; next += registers) {
    const int64_t first = next < count - registers ? next : count - registers;
    int64_t origin[registers];
    float* to[registers];
    for (int r = 0; r < registers; ++r) {
      origin[r] = layout.padded(first + r);
      to[r] = y + plane * p.shape.pixels() + (first + r) * kLanes;
    }
    sum_inputs<of_block, outputs, registers, two_rows>(p, block, plane, band, origin, to);
  }
}

// All planes of a band of `rows` of an image.
template <bool two_rows>
void convolve_band(const Forward& p, const Band& band, int64_t image, Range rows) {
  const Shape& s = p.shape;
  const int64_t count = Registers(s).in_rows(rows.size());
  for (const Block* block = p.blocks; block < p.blocks + p.block_count; ++block) {
    float* y = p.y + (image * s.outputs + block->first) * s.pixels() + rows.begin * s.width;
    constexpr int of_four = kEightTogether ? 4 : 3;
    if (block->count == 8 && kEightTogether) {
      fill_planes<8, 8, 2, two_rows>(p, *block, 0, band, count, y);
    } else if (block->count == 8) {
      fill_planes<8, 4, of_four, two_rows>(p, *block, 0, band, count, y);
      fill_planes<8, 4, of_four, two_rows>(p, *block, 4, band, count, y);
    } else if (block->count == 4) {
      fill_planes<4, 4, of_four, two_rows>(p, *block, 0, band, count, y);
    } else {
      fill_planes<1, 1, 8, two_rows>(p, *block, 0, band, count, y);
    }
  }
}

inline void convolve_planes(const Forward& p, const Band& band, int64_t image, Range rows) {
  if (Registers(p.shape).two_rows) {
    convolve_band<true>(p, band, image, rows);
  } else {
    convolve_band<false>(p, band, image, rows);
  }
}

// --- gradients of weights ---

// Rows of `outputs` planes of gradients, register by register side by side: (registers, outputs, lanes). Adds what they
// come to in each plane to `bias`.
inline void pack_gradients(const Shape& s, const float* grad, int64_t rows, int64_t outputs, float* to, float* bias) {
  const int64_t count = rows * s.width / kLanes;
  for (int64_t o = 0; o < outputs; ++o) {
    FloatLanes sum{};
    for (int64_t r = 0; r < count; ++r) {
      const F32 x = load(grad + o * s.pixels() + r * kLanes);
      store(to + (r * outputs + o) * kLanes, x);
      sum += x.v;
    }
    bias[o] += total({sum});
  }
}

// Adds to `sums` (taps, of_block, lanes) the products of `outputs` of the packed gradients of a band with as many maps
// as there are taps. A tap is where a position of the kernel sees an input's padded rows.
template <int of_block, int outputs, int taps, bool two_rows>
VPFAST_INLINE void add_products(const Shape& s, const float* grad, const float* const* tap, int64_t rows, float* sums) {
  const int64_t padded_width = s.padded_width();
  const int64_t row_step = two_rows ? 2 : 1, row_pixels = row_step * s.width;
  const float* from[taps];
  FloatLanes sum[taps][outputs];
#pragma GCC unroll 8
  for (int t = 0; t < taps; ++t) {
    from[t] = tap[t];
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) sum[t][o] = load(sums + (t * of_block + o) * kLanes).v;
  }
  for (int64_t row = 0; row < rows; row += row_step) {
    const int64_t begin = row * padded_width;
    for (int64_t pixel = begin; pixel < begin + row_pixels; pixel += kLanes, grad += of_block * kLanes) {
      FloatLanes seen[taps];
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) seen[t] = load_padded<two_rows>(from[t] + pixel, padded_width);
#pragma GCC unroll 8
      for (int o = 0; o < outputs; ++o) {
        const FloatLanes g = load(grad + o * kLanes).v;
#pragma GCC unroll 8
        for (int t = 0; t < taps; ++t) sum[t][o] += g * seen[t];
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < taps; ++t) {
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) store(sums + (t * of_block + o) * kLanes, {sum[t][o]});
  }
}

// The same for all of `count` taps, some at a time.
template <int of_block, int outputs, int taps, bool two_rows>
void add_taps(const Shape& s, const float* grad, const float* const* tap, int64_t count, int64_t rows, float* sums) {
  int64_t first = 0;
  for (; first + taps <= count; first += taps) {
    add_products<of_block, outputs, taps, two_rows>(s, grad, tap + first, rows, sums + first * of_block * kLanes);
  }
  for (; first < count; ++first) {
    add_products<of_block, outputs, 1, two_rows>(s, grad, tap + first, rows, sums + first * of_block * kLanes);
  }
}

template <bool two_rows>
void add_block(const Shape& s, const float* grad, const float* const* tap, int64_t count, int64_t rows, int64_t outputs,
               float* sums) {
  constexpr int64_t half = 4 * kLanes;
  constexpr int of_four = kEightTogether ? 5 : 3;
  if (outputs == 8 && kEightTogether) {
    add_taps<8, 8, 3, two_rows>(s, grad, tap, count, rows, sums);
  } else if (outputs == 8) {
    add_taps<8, 4, of_four, two_rows>(s, grad, tap, count, rows, sums);
    add_taps<8, 4, of_four, two_rows>(s, grad + half, tap, count, rows, sums + half);
  } else if (outputs == 4) {
    add_taps<4, 4, of_four, two_rows>(s, grad, tap, count, rows, sums);
  } else {
    add_taps<1, 1, 8, two_rows>(s, grad, tap, count, rows, sums);
  }
}

// Of 8, 4 or 1 outputs.
inline void add_weight_gradients(const Shape& s, const float* grad, const float* const* tap, int64_t count,
                                 int64_t rows, int64_t outputs, float* sums) {
  if (Registers(s).two_rows) {
    add_block<true>(s, grad, tap, count, rows, outputs, sums);
  } else {
    add_block<false>(s, grad, tap, count, rows, outputs, sums);
  }
}

inline float sum_lanes(const float* lanes) { return total(load(lanes)); }
