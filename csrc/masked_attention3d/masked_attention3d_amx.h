// The loops of masked_attention3d on matrix tiles: what forward and backward share. Included by
// masked_attention3d_kernel.h for AVX-512.
//
// Tiles multiply bfloat16 sixteen times as fast as registers multiply floats, and a float is the sum of three bfloat16:
// x = x0 + x1 + x2, eight bits of the mantissa each. Of the nine products of two such sums the six that matter are
// taken, x0 y0, x0 y1, x1 y0, x0 y2, x1 y1 and x2 y0; the others are below 2^-24 of the whole, like the rounding of a
// float. Half precision and bfloat16 are taken for two pieces, and all four products.
//
// A face is 32 positions by 32 components in pieces, each two tiles of 16 rows of 16 pairs of bfloat16. Pairs are
// numbers 16 apart, which takes no step across lanes, and any order of a sum will do:
//   by rows    tile: 16 positions; row: a position;         pair: components j, j + 16   left factor, summed over d
//   by pairs   tile: 16 components; row: positions j, j + 16; lane: a component          right factor, summed over L
// Either may be turned, pairs for rows, for the other side of a product. Positions count from the start of the
// sequence, 32 a block; what is beyond the last one, and beyond the last component, is 0.
//
// Tiles run beside the vector units as long as both find work among the 512 instructions in flight, and a step's tiles
// alone are more than that: so the products of one step are strewn between the rows of another.

constexpr int64_t kFace = 2 * kTileElements;
constexpr int32_t kUpperHalf = static_cast<int32_t>(0xffff0000);

// --- pieces ---

template <int pieces>
struct Split {
  IntLanes rest[pieces];  // a piece each, in the upper halves
};

template <int pieces>
VPFAST_INLINE Split<pieces> split(F32 x) {
  Split<pieces> to;
#pragma GCC unroll 3
  for (int s = 0; s < pieces; ++s) {
    to.rest[s] = (IntLanes)x.v;
    x.v = x.v - (FloatLanes)((IntLanes)x.v & kUpperHalf);
  }
  return to;
}

// Upper halves, a's below b's.
VPFAST_INLINE IntLanes join(IntLanes a, IntLanes b) {
  constexpr int kBitsOfFirstWhereSecondOrThird = 0xea;
  return (IntLanes)_mm512_ternarylogic_epi32((__m512i)b, _mm512_set1_epi32(kUpperHalf), (__m512i)((UintLanes)a >> 16),
                                             kBitsOfFirstWhereSecondOrThird);
}

template <int pieces>
VPFAST_INLINE void store_joined(uint16_t* to, const Split<pieces>& a, const Split<pieces>& b) {
#pragma GCC unroll 3
  for (int s = 0; s < pieces; ++s) {
    const IntLanes both = join(a.rest[s], b.rest[s]);
    std::memcpy(to + s * kFace, &both, sizeof both);
  }
}

// --- faces ---

struct Turn {  // of 2 x 2 squares, `size` wide, in two rows `size` apart
  IntLanes upper, lower;
};

VPFAST_INLINE Turn turn_of(int size) {
  Turn turn;
  for (int k = 0; k < 16; ++k) {
    turn.upper[k] = k & size ? 16 + k - size : k;
    turn.lower[k] = k & size ? 16 + k : k + size;
  }
  return turn;
}

VPFAST_INLINE void transpose(IntLanes (&rows)[16]) {
#pragma GCC unroll 4
  for (int size = 1; size < 16; size *= 2) {
    const Turn turn = turn_of(size);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & size) continue;
      const __m512i a = (__m512i)rows[i], b = (__m512i)rows[i + size];
      rows[i] = (IntLanes)_mm512_permutex2var_epi32(a, (__m512i)turn.upper, b);
      rows[i + size] = (IntLanes)_mm512_permutex2var_epi32(a, (__m512i)turn.lower, b);
    }
  }
}

// Rows of `dim` components, the first `count` of them there.
struct Source {
  const float* rows;
  int64_t count, dim;
};

// 16 components of them, from the `first` on.
struct Columns {
  const float* rows;
  int64_t count, dim;
  __mmask16 inside;

  VPFAST_INLINE Columns(const Source& from, int64_t first) : rows(from.rows + first), count(from.count), dim(from.dim) {
    inside = static_cast<__mmask16>((1u << most(0, least(16, dim - first))) - 1);
  }
  VPFAST_INLINE F32 of(int64_t row) const {
    if (row < count) seen_read(rows + row * dim, 1, 0, 4 * __builtin_popcount(inside));
    return {(FloatLanes)_mm512_maskz_loadu_ps(row < count ? inside : __mmask16(0), rows + row * dim)};
  }
};

VPFAST_INLINE void store_components(float* to, F32 x, int64_t left) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << least(16, left)) - 1), (__m512)x.v);
  seen_written(to, 1, 0, 4 * least(16, left));
}

VPFAST_INLINE void turn_tile(uint16_t* tile) {
  IntLanes rows[16];
  std::memcpy(rows, tile, sizeof rows);
  transpose(rows);
  std::memcpy(tile, rows, sizeof rows);
}

enum class Order { rows, pairs };

// A block of 32 rows, times `factor`, to its faces, one for each 32 components.
template <int pieces, Order order, bool turned>
void pack(const Source& from, float factor, uint16_t* to) {
  constexpr bool rows = order == Order::rows;
  for (int64_t d = 0; d < from.dim; d += 32, to += pieces * kFace) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      uint16_t* at = to + tile * kTileElements;
      const Columns a(from, rows ? d : d + tile * 16), b(from, rows ? d + 16 : d + tile * 16);
      for (int64_t i = 0; i < 16; ++i) {
        const F32 first = a.of(rows ? tile * 16 + i : i), second = b.of(rows ? tile * 16 + i : i + 16);
        store_joined(at + i * 32, split<pieces>(factor * first), split<pieces>(factor * second));
      }
#pragma GCC unroll 1
      for (int s = 0; turned && s < pieces; ++s) turn_tile(at + s * kFace);
    }
  }
}

// Of 16 rows, from the `first` on, the sums of x times y.
VPFAST_INLINE F32 row_products(const Source& x, const Source& y, int64_t first) {
  IntLanes sums[16] = {};
  for (int64_t d = 0; d < x.dim; d += 16) {
    const Columns a(x, d), b(y, d);
    for (int64_t i = 0; i < 16; ++i) {
      sums[i] = (IntLanes)(F32{(FloatLanes)sums[i]} + a.of(first + i) * b.of(first + i)).v;
    }
  }
  transpose(sums);
  F32 total{};
  for (int64_t i = 0; i < 16; ++i) total.v = total.v + (FloatLanes)sums[i];
  return total;
}

// The square of the longest of 32 rows. Bits of positive floats are in the floats' order, and after them infinities and
// NaN.
float longest_squared(const Source& from) {
  IntLanes longest{};
  for (int64_t first = 0; first < kBlock; first += 16) {
    const IntLanes bits = (IntLanes)row_products(from, from, first).v & 0x7fffffff;
    longest = bits > longest ? bits : longest;
  }
  int32_t bits = 0;
  for (int k = 0; k < 16; ++k) bits = static_cast<int32_t>(most(bits, longest[k]));
  float squared;
  std::memcpy(&squared, &bits, sizeof squared);
  return squared;
}

// --- products ---

struct Factors {
  int a, b;
};

// Which pieces are multiplied, so that each time one of them is still there.
template <int pieces>
constexpr int kProducts = pieces == 3 ? 6 : 4;
template <int pieces>
constexpr Factors kOrder[6] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}, {2, 0}};
template <>
constexpr Factors kOrder<2>[6] = {{0, 1}, {1, 1}, {1, 0}, {0, 0}};

// Rows of work, spread evenly over the pauses between products.
template <int pieces>
constexpr int kPauses = 3 * kProducts<pieces>;  // of a product of faces

template <class Row>
struct Strewn {
  const Row& row;
  int64_t rows, pauses, next = 0, due = 0;

  VPFAST_INLINE Strewn(const Row& row, int64_t rows, int64_t pauses) : row(row), rows(rows), pauses(pauses) {}
  VPFAST_INLINE void operator()() {
    for (due += rows; due >= pauses && next < rows; due -= pauses) row(next++);
  }
  VPFAST_INLINE void rest() {
    for (; next < rows; ++next) row(next);
  }
};

struct NoRows {
  VPFAST_INLINE void operator()() const {}
};

// A face that is soon read again, or one that passes: of many read in turn, it would only drive others from the cache.
template <bool passes>
struct Face {
  const uint16_t* at;
};
using Staying = Face<false>;
using Passing = Face<true>;

#define VPFAST_TILE_LOAD_OF(face, c, piece, tile)                                    \
  do {                                                                               \
    if constexpr (std::is_same_v<decltype(face), Passing>) {                         \
      VPFAST_TILE_PASS(c, (face).at + (piece) * kFace + (tile) * kTileElements, 64); \
    } else {                                                                         \
      VPFAST_TILE_LOAD(c, (face).at + (piece) * kFace + (tile) * kTileElements, 64); \
    }                                                                                \
  } while (false)

// Tiles 0 .. 3 += the face a by the face b.
template <int pieces, bool a_passes, bool b_passes, class Pause>
VPFAST_INLINE void multiply_faces(Face<a_passes> a, Face<b_passes> b, Pause& pause) {
#pragma GCC unroll 6
  for (int i = 0; i < kProducts<pieces>; ++i) {
    const Factors now = kOrder<pieces>[i];
    if (i == 0 || now.a != kOrder<pieces>[i - 1].a) {
      VPFAST_TILE_LOAD_OF(a, 4, now.a, 0);
      VPFAST_TILE_LOAD_OF(a, 5, now.a, 1);
    }
    if (i == 0 || now.b != kOrder<pieces>[i - 1].b) {
      VPFAST_TILE_LOAD_OF(b, 6, now.b, 0);
      VPFAST_TILE_LOAD_OF(b, 7, now.b, 1);
    }
    VPFAST_TILE_MULTIPLY(0, 4, 6);
    pause();
    VPFAST_TILE_MULTIPLY(1, 4, 7);
    pause();
    VPFAST_TILE_MULTIPLY(2, 5, 6);
    VPFAST_TILE_MULTIPLY(3, 5, 7);
    pause();
  }
}

VPFAST_INLINE void zero_tiles() {
  VPFAST_TILE_ZERO(0);
  VPFAST_TILE_ZERO(1);
  VPFAST_TILE_ZERO(2);
  VPFAST_TILE_ZERO(3);
}

// 32 x 32 floats, rows `width` apart.
VPFAST_INLINE void load_tiles(const float* from, int64_t width) {
  VPFAST_TILE_LOAD(0, from, width * 4);
  VPFAST_TILE_LOAD(1, from + 16, width * 4);
  VPFAST_TILE_LOAD(2, from + 16 * width, width * 4);
  VPFAST_TILE_LOAD(3, from + 16 * width + 16, width * 4);
}

VPFAST_INLINE void store_tiles(float* to, int64_t width) {
  VPFAST_TILE_STORE(0, to, width * 4);
  VPFAST_TILE_STORE(1, to + 16, width * 4);
  VPFAST_TILE_STORE(2, to + 16 * width, width * 4);
  VPFAST_TILE_STORE(3, to + 16 * width + 16, width * 4);
}

// --- weights ---

// 2^x where `some`, else 0. Relative error 1.5e-7: 2^x = 2^n 2^f, 0 <= f < 1, with a minimax fit of 2^f.
VPFAST_INLINE F32 exp2_where(__mmask16 some, F32 x) {
  constexpr float k0 = 0.999999925f, k1 = 0.693153073f, k2 = 0.240153617f, k3 = 0.0558263181f, k4 = 0.00898934002f,
                  k5 = 0.0018775767f;
  const FloatLanes f = (FloatLanes)_mm512_reduce_ps((__m512)x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const FloatLanes y = ((((k5 * f + k4) * f + k3) * f + k2) * f + k1) * f + k0;
  return {(FloatLanes)_mm512_maskz_scalef_ps(some, (__m512)y, (__m512)x.v)};
}

// --- which keys ---

// Of each of 32 queries the keys [begin, end) of one line.
struct Seen {
  IntLanes begin[2], end[2];

  VPFAST_INLINE Interval any() const {
    Interval any{INT32_MAX, 0};
    for (int half = 0; half < 2; ++half) {
      const IntLanes low = begin[half] < end[half] ? begin[half] : INT32_MAX - IntLanes{};
      for (int k = 0; k < 16; ++k) any = {least(any.begin, low[k]), most(any.end, end[half][k])};
    }
    return any;
  }
};

VPFAST_INLINE Seen look(const Mask& mask, const Sight& sight, int64_t t, int64_t y) {
  const int32_t line_t = static_cast<int32_t>(t), line_y = static_cast<int32_t>(y);
  const int32_t before = static_cast<int32_t>(mask.line == Line::row ? y * mask.columns : 0);
  const int32_t radius_t = static_cast<int32_t>(mask.radius_t), radius_y = static_cast<int32_t>(mask.radius_y);
  Seen seen;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const auto of = [&](const int32_t* p) VPFAST_INLINE_LAMBDA { return Integers<F32>::load(p + half * 16); };
    const IntLanes ahead = of(sight.t) - line_t, aside = of(sight.y) - line_y;
    const IntLanes shown = (ahead > 0 ? of(sight.earlier) : of(sight.own)) - before;
    const IntLanes near = (ahead >= 0) & (ahead <= radius_t) & (aside <= radius_y) & (-aside <= radius_y);
    const IntLanes end = of(sight.end);
    seen.begin[half] = of(sight.begin);
    seen.end[half] = (shown < end ? shown : end) & near;
  }
  return seen;
}

// Of each of 32 queries the keys of one block that it sees, a bit each.
struct Bits {
  IntLanes of[2];

  VPFAST_INLINE bool none() const {
    return _mm512_test_epi32_mask((__m512i)(of[0] | of[1]), (__m512i)(of[0] | of[1])) == 0;
  }
  VPFAST_INLINE bool all() const {
    return _mm512_cmpeq_epi32_mask((__m512i)(of[0] & of[1]), _mm512_set1_epi32(-1)) == 0xffff;
  }
  VPFAST_INLINE void add(const Bits& more) {
    of[0] |= more.of[0];
    of[1] |= more.of[1];
  }
};

// Of the block that starts `offset` after the line does.
VPFAST_INLINE Bits bits_of(const Seen& seen, int64_t offset) {
  const __m512i all = _mm512_set1_epi32(-1), start = _mm512_set1_epi32(static_cast<int32_t>(offset));
  const auto from = [&](IntLanes key) VPFAST_INLINE_LAMBDA {  // shifts of 32 and more leave nothing
    const __m512i inside = _mm512_max_epi32(_mm512_sub_epi32((__m512i)key, start), _mm512_setzero_si512());
    return _mm512_sllv_epi32(all, inside);
  };
  Bits bits;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    bits.of[half] = (IntLanes)_mm512_andnot_si512(from(seen.end[half]), from(seen.begin[half]));
  }
  return bits;
}
