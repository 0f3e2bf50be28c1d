// The instructions of tile_program on matrix tiles and AVX-512. Included by tile_program_cpu.cpp beside simd.h.
//
// Every function does the share of one of `members` threads. `at` turns addresses into pointers. `pieces`, one to
// three, is how many bfloat16 a number is the sum of: three hold all bits of a float, and six of the nine products of
// two such sums are what float32 keeps; two hold sixteen bits, with three products; one is bfloat16.

#include "edlstm_gates/edlstm_gates_math.h"

struct Worker {
  const Bases& at;
  int64_t rank, members;
  float* scratch;

  // [begin, end) of `count` things of equal work
  VPFAST_INLINE int64_t begin(int64_t count) const { return count * rank / members; }
  VPFAST_INLINE int64_t end(int64_t count) const { return count * (rank + 1) / members; }
};

// --- numbers in pieces ---

constexpr int kLine = 16;       // numbers a register
constexpr int64_t kChunk = 32;  // channels that lie together
constexpr int64_t kChunkBytes = 2 * kChunk;

template <int pieces>
VPFAST_INLINE __m512 load_pieces(const char* from, int64_t piece) {
  __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 3
  for (int p = pieces - 1; p >= 0; --p) {  // from the smallest on, so that the sum is what was split
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + p * piece)));
    sum = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), sum);
  }
  return sum;
}

template <int pieces>
VPFAST_INLINE void store_pieces(char* to, int64_t piece, __m512 x) {
#pragma GCC unroll 3
  for (int p = 0; p < pieces; ++p) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * piece), bits);
    if (p + 1 < pieces) {
      const __m512 kept = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      x = _mm512_sub_ps(x, kept);
    }
  }
}

VPFAST_INLINE __m512 activated(__m512 x, Activation activation) {
  if (activation == Activation::none) return x;
  const __m512 below = activation == Activation::relu ? _mm512_setzero_ps() : _mm512_mul_ps(x, _mm512_set1_ps(kLeak));
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), below);
}

#include "tile_program/tile_program_convolve.h"
#include "tile_program/tile_program_narrow.h"

template <int pieces, bool floats>
void convolve(const Convolve& c, const Part* parts, const Worker& w) {
  const Map& grid = parts[0].from;
  const int64_t pixels = (c.size.batch - 1) * grid.image + c.size.height * grid.row;
  switch (pixels <= kNarrow ? (pixels + 15) / 16 : 0) {
    case 1:
      return NarrowConvolution<pieces, floats, 1>(c, parts, w).run();
    case 2:
      return NarrowConvolution<pieces, floats, 2>(c, parts, w).run();
    case 3:
      return NarrowConvolution<pieces, floats, 3>(c, parts, w).run();
    case 4:
      return NarrowConvolution<pieces, floats, 4>(c, parts, w).run();
    case 5:
      return NarrowConvolution<pieces, floats, 5>(c, parts, w).run();
    case 6:
      return NarrowConvolution<pieces, floats, 6>(c, parts, w).run();
    default:
      return Convolution<pieces, floats>(c, parts, w).run();
  }
}

// --- between the convolutions ---

// Where 32 channels of a pixel lie, from the start of the map.
template <int pieces>
VPFAST_INLINE int64_t offset(const Map& map, int64_t chunk, int64_t image, int64_t y, int64_t x) {
  return chunk * pieces * map.piece + (image * map.image + y * map.row + x) * kChunkBytes;
}

// body(chunk, image, y, x) for this thread's rows of all chunks of 32 channels
template <class Body>
VPFAST_INLINE void for_each_pixel(int64_t chunks, const Size& size, const Worker& w, const Body& body) {
  const int64_t rows = size.batch * size.height;
  for (int64_t i = w.begin(chunks * rows), end = w.end(chunks * rows); i < end; ++i) {
    const int64_t chunk = i / rows, image = i % rows / size.height, y = i % rows % size.height;
    for (int64_t x = 0; x < size.width; ++x) body(chunk, image, y, x);
  }
}

template <int pieces>
void pool(const Pool& c, const Worker& w) {
  const char* from = w.at.read<char>(c.from.address);
  char* to = w.at.write<char>(c.to.address);
  const int64_t right = kChunkBytes, down = right * c.from.row;
  const auto body = [&](int64_t chunk, int64_t image, int64_t y, int64_t x) VPFAST_INLINE_LAMBDA {
    const char* a = from + offset<pieces>(c.from, chunk, image, 2 * y, 2 * x);
    char* b = to + offset<pieces>(c.to, chunk, image, y, x);
    for (int64_t k = 0; k < kChunkBytes; k += 2 * kLine) {
      const __m512 upper =
          _mm512_max_ps(load_pieces<pieces>(a + k, c.from.piece), load_pieces<pieces>(a + k + right, c.from.piece));
      const __m512 lower = _mm512_max_ps(load_pieces<pieces>(a + k + down, c.from.piece),
                                         load_pieces<pieces>(a + k + down + right, c.from.piece));
      store_pieces<pieces>(b + k, c.to.piece, _mm512_max_ps(upper, lower));
    }
  };
  for_each_pixel(c.to.channels / kChunk, c.size, w, body);
}

// Where an output row or column falls among `size` inputs: between `first` and `second`, `weight` of the way.
struct Between {
  int64_t first, second;
  float weight;
};

VPFAST_INLINE Between between(int64_t position, int64_t size) {
  const float at = static_cast<float>(size - 1) / static_cast<float>(2 * size - 1) * static_cast<float>(position);
  const int64_t first = static_cast<int64_t>(at);
  return {first, std::min(first + 1, size - 1), at - static_cast<float>(first)};
}

template <int pieces>
void upsample(const Upsample& c, const Worker& w) {
  const char* from = w.at.read<char>(c.from.address);
  char* to = w.at.write<char>(c.to.address);
  const auto body = [&](int64_t chunk, int64_t image, int64_t y, int64_t x) VPFAST_INLINE_LAMBDA {
    const Between rows = between(y, c.size.height / 2), columns = between(x, c.size.width / 2);
    const char* corner[4] = {
        from + offset<pieces>(c.from, chunk, image, rows.first, columns.first),
        from + offset<pieces>(c.from, chunk, image, rows.first, columns.second),
        from + offset<pieces>(c.from, chunk, image, rows.second, columns.first),
        from + offset<pieces>(c.from, chunk, image, rows.second, columns.second),
    };
    const __m512 right = _mm512_set1_ps(columns.weight), left = _mm512_set1_ps(1 - columns.weight);
    const __m512 down = _mm512_set1_ps(rows.weight), up = _mm512_set1_ps(1 - rows.weight);
    char* b = to + offset<pieces>(c.to, chunk, image, y, x);
    for (int64_t k = 0; k < kChunkBytes; k += 2 * kLine) {
      __m512 v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = load_pieces<pieces>(corner[j] + k, c.from.piece);
      const __m512 upper = _mm512_fmadd_ps(right, v[1], _mm512_mul_ps(left, v[0]));
      const __m512 lower = _mm512_fmadd_ps(right, v[3], _mm512_mul_ps(left, v[2]));
      store_pieces<pieces>(b + k, c.to.piece, _mm512_fmadd_ps(down, lower, _mm512_mul_ps(up, upper)));
    }
  };
  for_each_pixel(c.to.channels / kChunk, c.size, w, body);
}

template <int pieces>
void gate(const Gate& c, const Worker& w) {
  const float* gates = w.at.read<float>(c.gates);
  float* cells = w.at.write<float>(c.cell);
  char* hidden = w.at.write<char>(c.hidden.address);
  const auto body = [&](int64_t chunk, int64_t image, int64_t y, int64_t x) VPFAST_INLINE_LAMBDA {
    const int64_t dense = (image * c.size.height + y) * c.size.width + x;
    char* h = hidden + offset<pieces>(c.hidden, chunk, image, y, x);
    for (int64_t k = chunk * kChunk; k < std::min((chunk + 1) * kChunk, c.channels); k += kLine) {
      const float* row = gates + dense * 4 * c.channels + k;
      float* cell = cells + dense * c.channels + k;
      const auto load = [](const float* from) VPFAST_INLINE_LAMBDA { return F32{(FloatLanes)_mm512_loadu_ps(from)}; };
      const F32 state = cell_state(load(row + c.forget), load(row + c.input), load(row + c.candidate), load(cell));
      _mm512_storeu_ps(cell, (__m512)state.v);
      store_pieces<pieces>(h + 2 * (k % kChunk), c.hidden.piece, (__m512)hidden_state(load(row + c.output), state).v);
    }
  };
  for_each_pixel(c.hidden.channels / kChunk, c.size, w, body);
}

// --- small maps ---

// One number of a (B, C, H, W) tensor, or of what it is when larger or smaller by a power of two.
struct Planes {
  const float* data;
  int64_t channels, height, width;

  VPFAST_INLINE float operator()(int64_t image, int64_t channel, int64_t y, int64_t x) const {
    return data[((image * channels + channel) * height + y) * width + x];
  }
  float shrunk(int64_t image, int64_t channel, int64_t y, int64_t x, int64_t factor, bool average) const {
    if (!average || factor == 1) return (*this)(image, channel, factor * y, factor * x);
    float sum = 0;
    for (int64_t i = 0; i < factor; ++i) {
      for (int64_t j = 0; j < factor; ++j) sum += (*this)(image, channel, factor * y + i, factor * x + j);
    }
    return sum / static_cast<float>(factor * factor);
  }
  float upsampled(int64_t image, int64_t channel, int64_t y, int64_t x) const {
    const Between rows = between(y, height), columns = between(x, width);
    const auto along = [&](int64_t row) {
      return (1 - columns.weight) * (*this)(image, channel, row, columns.first) +
             columns.weight * (*this)(image, channel, row, columns.second);
    };
    return (1 - rows.weight) * along(rows.first) + rows.weight * along(rows.second);
  }
};

template <int pieces>
void gather(const Gather& c, const Worker& w) {
  const auto planes = [&](Address address, int64_t channels, int64_t height, int64_t width) {
    return Planes{address ? w.at.read<float>(address) : nullptr, channels, height, width};
  };
  const int64_t height = c.size.height, width = c.size.width;
  const Planes errors = planes(c.errors, 2 * c.channels, height, width);
  const Planes below = planes(c.below, 2 * c.channels, 2 * height, 2 * width);
  const Planes above = planes(c.above, c.channels, height / 2, width / 2);
  const Planes frame = planes(c.frame, c.channels, height, width);
  const int64_t channels = c.channels * (2 + (below.data ? 2 : 0) + (above.data ? 1 : 0) + (frame.data ? 1 : 0));
  const int64_t border = c.kernel / 2, taken = c.kernel * channels;
  // All channels of a row, its borders 0 and room for a whole register behind.
  AlignedVector<float> row((width + 2 * border) * channels + c.to.channels, 0.0f);
  char* to = w.at.write<char>(c.to.address);
  const int64_t rows = c.size.batch * height;
  for (int64_t i = w.begin(rows), end = w.end(rows); i < end; ++i) {
    const int64_t image = i / height, y = i % height;
    for (int64_t x = 0; x < width; ++x) {
      float* at = row.data() + (x + border) * channels;
      for (int64_t k = 0; k < 2 * c.channels; ++k) *at++ = errors(image, k, y, x);
      for (int64_t k = 0; below.data && k < 2 * c.channels; ++k) *at++ = below.shrunk(image, k, y, x, 2, c.average);
      for (int64_t k = 0; above.data && k < c.channels; ++k) *at++ = above.upsampled(image, k, y, x);
      for (int64_t k = 0; frame.data && k < c.channels; ++k) *at++ = frame(image, k, y, x);
    }
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t k = 0; k < c.to.channels; k += kLine) {
        char* pixel = to + offset<pieces>(c.to, k / kChunk, image, y, x) + 2 * (k % kChunk);
        const int64_t left = std::clamp<int64_t>(taken - k, 0, kLine);
        const __mmask16 some = static_cast<__mmask16>((1 << left) - 1);
        seen_read(row.data() + x * channels + k, 1, 0, 4 * left);
        store_pieces<pieces>(pixel, c.to.piece, _mm512_maskz_loadu_ps(some, row.data() + x * channels + k));
      }
    }
  }
}

template <int pieces>
void patches(const Patches& c, const Worker& w) {
  const Size& size = c.size;
  const int64_t height = 2 * c.lattice * size.height, width = 2 * c.lattice * size.width, padded = width + 2;
  const float gain = static_cast<float>(c.gain);
  const float* frames = w.at.read<float>(c.frames);
  char* to = w.at.write<char>(c.to.address);
  AlignedVector<float> seen(c.channels * 4 * padded);  // four rows of each channel, with their borders
  const int64_t rows = size.batch * height / 2;
  for (int64_t i = w.begin(rows), end = w.end(rows); i < end; ++i) {
    const int64_t image = i / (height / 2), row = i % (height / 2);
    for (int64_t k = 0; k < 4 * c.channels; ++k) {
      const int64_t y = 2 * row - 1 + k % 4;
      float* line = seen.data() + k * padded;
      if (y < 0 || y >= height) {
        std::fill_n(line, padded, 0.0f);
        continue;
      }
      const float* from = frames + ((image * c.channels + k / 4) * height + y) * width;
      line[0] = line[width + 1] = 0;
      for (int64_t x = 0; x < width; ++x) line[x + 1] = (from[x] - 0.5f) * gain;
    }
    for (int64_t x = 0; x < width / 2; ++x) {
      const int64_t place = row % c.lattice * c.lattice + x % c.lattice;
      char* pixel = to + offset<pieces>(c.to, 0, place * size.batch + image, row / c.lattice, x / c.lattice);
      for (int64_t channel = 0; channel < c.channels; ++channel) {
        const float* corner = seen.data() + channel * 4 * padded + 2 * x;
        __m512 patch = _mm512_castps128_ps512(_mm_loadu_ps(corner));
        patch = _mm512_insertf32x4(patch, _mm_loadu_ps(corner + padded), 1);
        patch = _mm512_insertf32x4(patch, _mm_loadu_ps(corner + 2 * padded), 2);
        patch = _mm512_insertf32x4(patch, _mm_loadu_ps(corner + 3 * padded), 3);
        char* half = pixel + channel / 2 * pieces * c.to.piece + channel % 2 * 2 * kLine;
        store_pieces<pieces>(half, c.to.piece, patch);
      }
    }
  }
}

inline void compare(const Compare& c, const Worker& w) {
  const int64_t height = c.size.height, width = c.size.width, factor = int64_t{1} << c.level, area = height * width;
  const Planes frame{w.at.read<float>(c.frame), c.channels, factor * height, factor * width};
  const Planes prediction{w.at.read<float>(c.prediction), c.channels, height, width};
  float* errors = w.at.write<float>(c.errors);
  float* kept = c.kept ? w.at.write<float>(c.kept) : nullptr;
  for_each_pixel(1, c.size, w, [&](int64_t, int64_t image, int64_t y, int64_t x) {
    for (int64_t k = 0; k < c.channels; ++k) {
      const float target = frame.shrunk(image, k, y, x, factor, c.average);
      const float error = target - prediction(image, k, y, x);
      float* to = errors + (image * 2 * c.channels + k) * area + y * width + x;
      to[0] = error < 0 ? 0 : error;
      to[c.channels * area] = error > 0 ? 0 : -error;
      if (kept) kept[(image * c.channels + k) * area + y * width + x] = target;
    }
  });
}

// --- a program ---

template <int pieces>
void run(const int64_t* program, int64_t length, const Worker& w, Barrier& barrier) {
  configure_tiles();
  for (const int64_t* at = program; at < program + length;) {
    const auto opcode = static_cast<Opcode>(at[0]);
    const int64_t* fields = at + 2;
    if (opcode == Opcode::convolve) {
      const auto& c = *reinterpret_cast<const Convolve*>(fields);
      const auto* parts = reinterpret_cast<const Part*>(&c + 1);
      if (pieces == 3 && c.floats) {
        convolve<3, true>(c, parts, w);
      } else {
        convolve<pieces, false>(c, parts, w);
      }
    } else if (opcode == Opcode::pool) {
      pool<pieces>(*reinterpret_cast<const Pool*>(fields), w);
    } else if (opcode == Opcode::upsample) {
      upsample<pieces>(*reinterpret_cast<const Upsample*>(fields), w);
    } else if (opcode == Opcode::gate) {
      gate<pieces>(*reinterpret_cast<const Gate*>(fields), w);
    } else if (opcode == Opcode::gather) {
      gather<pieces>(*reinterpret_cast<const Gather*>(fields), w);
    } else if (opcode == Opcode::patches) {
      patches<pieces>(*reinterpret_cast<const Patches*>(fields), w);
    } else {
      compare(*reinterpret_cast<const Compare*>(fields), w);
    }
    barrier.wait(w.members);
    at += at[1];
  }
  release_tiles();
}
