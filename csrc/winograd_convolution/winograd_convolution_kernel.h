// The loops of winograd_convolution. Included by for_each_isa.h, once for each instruction set.

using winograd::cell_step;
using winograd::Forward;
using winograd::kCells;
using winograd::kPanel;
using winograd::Range;
using winograd::Shape;
using winograd::WeightGradient;

// Rows by two registers of columns that a product sums at a time: with two of weights and a factor they fill the
// registers there are.
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kColumns = 2 * kLanes;

// Inputs summed in one go. A single chain of all of them would round more than torch's sums do.
constexpr int64_t kChain = 128;

// Where a tile lies: its first row and column of y.
struct Tile {
  int64_t image, row, column;

  VPFAST_INLINE Tile(const Shape& s, int64_t index) {
    column = index % s.tiles_across() * 2;
    index /= s.tiles_across();
    row = index % s.tiles_down() * 2;
    image = index / s.tiles_down();
  }
};

VPFAST_INLINE F32 load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  return count > 0 ? load_part(from, static_cast<int>(count)) : F32{};
}

VPFAST_INLINE void store_some(float* to, F32 x, int64_t count) {
  if (count >= kLanes) {
    store(to, x);
  } else {
    store_part(to, x, static_cast<int>(count));
  }
}

// Some of the channels of maps, and where their transforms go: (cells, tiles, width), zeros from the last one on.
struct Channels {
  const float* maps;
  int64_t all;  // in a pixel
  Range part;
  int64_t width;
};

// B^T d B of the 4x4 pixels around each tile, zeros beyond the edge.
inline void transform_maps(const Shape& s, const Channels& of, Range tiles, float* to) {
  const int64_t step = cell_step(tiles.size(), of.width);
  for (int64_t index = tiles.begin; index < tiles.end; ++index, to += of.width) {
    const Tile tile(s, index);
    const float* from[4][4];
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t row = tile.row + i - 1, column = tile.column + j - 1;
        const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
        const int64_t pixel = (tile.image * s.height + row) * s.width + column;
        from[i][j] = inside ? of.maps + pixel * of.all + of.part.begin : nullptr;
      }
    }
    for (int64_t c = 0; c < of.width; c += kLanes) {
      FloatLanes half[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        FloatLanes d[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          d[i] = from[i][j] ? load_some(from[i][j] + c, of.part.size() - c).v : FloatLanes{};
        }
        half[0][j] = d[0] - d[2];
        half[1][j] = d[1] + d[2];
        half[2][j] = d[2] - d[1];
        half[3][j] = d[1] - d[3];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const FloatLanes* d = half[i];
        float* cell = to + 4 * i * step + c;
        store_some(cell, {d[0] - d[2]}, of.width - c);
        store_some(cell + step, {d[1] + d[2]}, of.width - c);
        store_some(cell + 2 * step, {d[2] - d[1]}, of.width - c);
        store_some(cell + 3 * step, {d[1] - d[3]}, of.width - c);
      }
    }
  }
}

// A g A^T of the 2x2 gradients of each tile, zeros beyond the edge.
inline void transform_gradients(const Shape& s, const Channels& of, Range tiles, float* to) {
  const int64_t step = cell_step(tiles.size(), of.width);
  for (int64_t index = tiles.begin; index < tiles.end; ++index, to += of.width) {
    const Tile tile(s, index);
    const float* first =
        of.maps + ((tile.image * s.height + tile.row) * s.width + tile.column) * of.all + of.part.begin;
    const bool below = tile.row + 1 < s.height, beside = tile.column + 1 < s.width;
    for (int64_t c = 0; c < of.width; c += kLanes) {
      const int64_t count = of.part.size() - c;
      FloatLanes half[4][2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const float* from = first + j * of.all + c;
        const bool inside = j == 0 || beside;
        const FloatLanes upper = inside ? load_some(from, count).v : FloatLanes{};
        const FloatLanes lower = inside && below ? load_some(from + s.width * of.all, count).v : FloatLanes{};
        half[0][j] = upper;
        half[1][j] = upper + lower;
        half[2][j] = upper - lower;
        half[3][j] = -lower;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* cell = to + 4 * i * step + c;
        store_some(cell, {half[i][0]}, of.width - c);
        store_some(cell + step, {half[i][0] + half[i][1]}, of.width - c);
        store_some(cell + 2 * step, {half[i][0] - half[i][1]}, of.width - c);
        store_some(cell + 3 * step, {-half[i][1]}, of.width - c);
      }
    }
  }
}

// What is asked for beside a product: so many bytes from `from` on for each step of its sums.
struct Ahead {
  const char* from;
  int64_t bytes;
};

// A matrix, one of whose two steps is 1.
struct Matrix {
  const float* first;
  int64_t row, column;
};

// `rows` rows of a (rows, depth) times b (depth, columns of a panel), two registers of columns; `more` adds it to y.
template <int rows, bool more>
VPFAST_INLINE void multiply_rows(Matrix a, const float* b, int64_t depth, Ahead ahead, float* y) {
  FloatLanes sum[rows][2] = {};
  for (int64_t k = 0; k < depth; ++k, a.first += a.column, b += kPanel, ahead.from += ahead.bytes) {
    __builtin_prefetch(ahead.from, 0, 2);
    const FloatLanes first = load(b).v, second = load(b + kLanes).v;
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const FloatLanes factor = F32::broadcast(a.first[r * a.row]).v;
      sum[r][0] += factor * first;
      sum[r][1] += factor * second;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    float* to = y + r * kPanel;
    if constexpr (more) {
      sum[r][0] += load(to).v;
      sum[r][1] += load(to + kLanes).v;
    }
    store(to, {sum[r][0]});
    store(to + kLanes, {sum[r][1]});
  }
}

template <int rows, bool more>
VPFAST_INLINE void multiply_some(int64_t count, Matrix a, const float* b, int64_t depth, Ahead ahead, float* y) {
  if constexpr (rows == 1) {
    multiply_rows<1, more>(a, b, depth, ahead, y);
  } else if (count == rows) {
    multiply_rows<rows, more>(a, b, depth, ahead, y);
  } else {
    multiply_some<rows - 1, more>(count, a, b, depth, ahead, y);
  }
}

// y (count, panel) = a (count, depth) b (depth, panel), or that much more; columns from `used` on are left out by whole
// registers. Meanwhile what follows b in memory is asked for: it is needed next.
template <bool more>
void multiply(int64_t count, Matrix a, const float* b, int64_t depth, int64_t used, float* y) {
  const int64_t groups = (count + kRows - 1) / kRows, strips = (used + kColumns - 1) / kColumns;
  const int64_t bytes = sizeof(float) * kPanel / (groups * strips);
  Ahead ahead{reinterpret_cast<const char*>(b + depth * kPanel), bytes};
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int64_t group = 0; group < groups; ++group) {  // of nearly as many rows each
      const int64_t row = group * count / groups, next = (group + 1) * count / groups, column = strip * kColumns;
      const Matrix rows{a.first + row * a.row, a.row, a.column};
      multiply_some<kRows, more>(next - row, rows, b + column, depth, ahead, y + row * kPanel + column);
      ahead.from += bytes * depth;
    }
  }
}

// A^T m A of each tile's cells of one panel, with what is added to it.
inline void finish_tiles(const Forward& p, Range tiles, int64_t panel, const float* sums) {
  const Shape& s = p.shape;
  const int64_t step = cell_step(tiles.size(), kPanel), first = panel * kPanel, used = s.used(panel);
  for (int64_t index = tiles.begin; index < tiles.end; ++index, sums += kPanel) {
    const Tile tile(s, index);
    const int64_t pixel = (tile.image * s.height + tile.row) * s.width + tile.column;
    const int64_t rows = s.height - tile.row < 2 ? 1 : 2, columns = s.width - tile.column < 2 ? 1 : 2;
    for (int64_t c = 0; c < used; c += kLanes) {
      const int64_t count = used - c;
      FloatLanes half[2][4], y[2][2];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        FloatLanes m[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) m[i] = load(sums + (4 * i + j) * step + c).v;
        half[0][j] = m[0] + m[1] + m[2];
        half[1][j] = m[1] - m[2] - m[3];
      }
      const FloatLanes bias = p.bias ? load_some(p.bias + first + c, count).v : FloatLanes{};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        y[i][0] = half[i][0] + half[i][1] + half[i][2] + bias;
        y[i][1] = half[i][1] - half[i][2] - half[i][3] + bias;
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at = (pixel + i * s.width + j) * s.outputs + first + c;
          FloatLanes z = y[i][j];
          if (p.added) z += load_some(p.added + at, count).v;
          if (p.slope != 1.0f) z = z > 0.0f ? z : z * p.slope;
          store_some(p.y + at, {z}, count);
        }
      }
    }
  }
}

// Some tiles of y, the outputs of some panels. Memory: `maps` for kCells inputs a tile, `sums` for kCells kPanel.
inline void convolve_tiles(const Forward& p, Range tiles, Range panels, float* maps, float* sums) {
  const Shape& s = p.shape;
  transform_maps(s, {p.x, s.inputs, {0, s.inputs}, s.inputs}, tiles, maps);
  const float* weights = p.weights + panels.begin * kCells * s.inputs * kPanel;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t cell = 0; cell < kCells; ++cell) {
      float* y = sums + cell * cell_step(tiles.size(), kPanel);
      for (int64_t k = 0; k < s.inputs; k += kChain) {
        const int64_t depth = s.inputs - k < kChain ? s.inputs - k : kChain;
        const Matrix of_cell{maps + cell * cell_step(tiles.size(), s.inputs) + k, s.inputs, 1};
        if (k == 0) {
          multiply<false>(tiles.size(), of_cell, weights, depth, s.used(panel), y);
        } else {
          multiply<true>(tiles.size(), of_cell, weights, depth, s.used(panel), y);
        }
        weights += depth * kPanel;
      }
    }
    finish_tiles(p, tiles, panel, sums);
  }
}

// --- gradients of weights ---

// G^T u G of each output, of one panel of inputs: (outputs, 3, 3, inputs).
inline void finish_weights(const Shape& s, Range outputs, Range inputs, const float* sums, float* to) {
  const int64_t step = cell_step(outputs.size(), kPanel);
  for (int64_t output = outputs.begin; output < outputs.end; ++output, sums += kPanel) {
    for (int64_t c = 0; c < inputs.size(); c += kLanes) {
      FloatLanes half[3][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        FloatLanes u[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) u[i] = load(sums + (4 * i + j) * step + c).v;
        const FloatLanes even = 0.5f * (u[1] + u[2]);
        half[0][j] = u[0] + even;
        half[1][j] = 0.5f * (u[1] - u[2]);
        half[2][j] = even + u[3];
      }
      float* weight = to + output * 9 * s.inputs + inputs.begin + c;
      const int64_t count = inputs.size() - c;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const FloatLanes* u = half[i];
        const FloatLanes even = 0.5f * (u[1] + u[2]);
        store_some(weight + 3 * i * s.inputs, {u[0] + even}, count);
        store_some(weight + (3 * i + 1) * s.inputs, {0.5f * (u[1] - u[2])}, count);
        store_some(weight + (3 * i + 2) * s.inputs, {even + u[3]}, count);
      }
    }
  }
}

// Sums over some tiles, `block` at a time, for some outputs and at most a panel of inputs. Memory: `maps` for kCells
// kPanel a tile of a block, `grads` for kCells outputs, `sums` for kCells outputs kPanel.
inline void add_weight_gradients(const WeightGradient& p, Range tiles, int64_t block, Range outputs, Range inputs,
                                 float* maps, float* grads, float* sums, float* to) {
  const Shape& s = p.shape;
  for (Range part{tiles.begin, tiles.begin}; part.begin < tiles.end; part.begin = part.end) {
    part.end = tiles.end - part.begin < block ? tiles.end : part.begin + block;
    transform_maps(s, {p.x, s.inputs, inputs, kPanel}, part, maps);
    transform_gradients(s, {p.grad, s.outputs, outputs, outputs.size()}, part, grads);
    for (int64_t cell = 0; cell < kCells; ++cell) {
      const Matrix of_cell{grads + cell * cell_step(part.size(), outputs.size()), 1, outputs.size()};
      const float* b = maps + cell * cell_step(part.size(), kPanel);
      float* y = sums + cell * cell_step(outputs.size(), kPanel);
      if (part.begin == tiles.begin) {
        multiply<false>(outputs.size(), of_cell, b, part.size(), inputs.size(), y);
      } else {
        multiply<true>(outputs.size(), of_cell, b, part.size(), inputs.size(), y);
      }
    }
  }
  finish_weights(s, outputs, inputs, sums, to);
}
