// The loops of masked_attention3d on matrix tiles. Included by masked_attention3d_kernel.h for AVX-512.
//
// Tiles multiply bfloat16 sixteen times as fast as registers multiply floats, and a float is the sum of three bfloat16:
// x = x0 + x1 + x2, eight bits of the mantissa each. Of the nine products of two such sums the six that matter are
// taken, x0 y0, x0 y1, x1 y0, x0 y2, x1 y1 and x2 y0; the others are below 2^-24 of the whole, like the rounding of a
// float. bfloat16 itself needs one piece, half precision two.
//
// Everything lies in blocks of 32 positions, so that a tile is 1 KB in one stretch:
//   by rows      [block][piece][chunk of 32 components][32 positions][32 components]
//   by columns   [block][piece][component][32 positions]
// Blocks count from the start of the sequence, so those of a line that starts in between hold keys of its neighbours:
// masked ones, like what is beyond the last position, which is 0.

// x as a sum of bfloat16 in the upper halves of 32 bits, the next piece each time.
template <int pieces>
VPFAST_INLINE IntLanes next_piece(F32& x) {
  if (pieces == 1) return (IntLanes)x.v + 0x8000;  // rounded; what follows is dropped
  const IntLanes piece = (IntLanes)x.v & (int32_t)0xffff0000;
  x.v = x.v - (FloatLanes)piece;
  return piece;
}

// Neighbours along the dimension that a product sums over, a's in the lower halves.
VPFAST_INLINE IntLanes pair(IntLanes a, IntLanes b) {
  return (IntLanes)((UintLanes)a >> 16) | (b & (int32_t)0xffff0000);
}

VPFAST_INLINE void store_upper_halves(uint16_t* p, IntLanes x) {
  const ShortLanes halves = __builtin_convertvector((UintLanes)x >> 16, ShortLanes);
  std::memcpy(p, &halves, sizeof halves);
}

// Rows `first` .. of one plane (length, d), 32 of them, to one block of pieces: by rows.
template <int pieces>
void block_by_rows(const float* from, int64_t first, int64_t length, int64_t dim, uint16_t* to) {
  const int64_t chunks = round_up(dim, 32) / 32;
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t d = 0; d < chunks * 32; d += 16) {
      const int part = first + i < length && d < dim ? static_cast<int>(least(16, dim - d)) : 0;
      F32 x = load_part(from + (first + i) * dim + d, part);
      for (int s = 0; s < pieces; ++s) {
        store_upper_halves(to + ((s * chunks + d / 32) * kBlock + i) * 32 + d % 32, next_piece<pieces>(x));
      }
    }
  }
}

// The same by columns, with the components rounded up to 16.
template <int pieces>
void block_by_columns(const float* from, int64_t first, int64_t length, int64_t dim, uint16_t* to) {
  const int64_t rows = round_up(dim, 16);
  for (int64_t d = 0; d < rows; ++d) {
    for (int64_t i = 0; i < kBlock; i += 16) {
      F32 x{};
      for (int k = 0; k < 16; ++k) x.v[k] = first + i + k < length && d < dim ? from[(first + i + k) * dim + d] : 0.0f;
      for (int s = 0; s < pieces; ++s) {
        store_upper_halves(to + (s * rows + d) * kBlock + i, next_piece<pieces>(x));
      }
    }
  }
}

// Tiles 0 .. 3 += two tiles of a, at `a` and `a_second` behind it, by two of b, over the products of pieces that
// matter; pieces lie `a_piece` and `b_piece` apart.
template <int pieces>
VPFAST_INLINE void multiply_tiles(const uint16_t* a, int64_t a_second, int64_t a_piece, const uint16_t* b,
                                  int64_t b_second, int64_t b_piece) {
#pragma GCC unroll 3
  for (int s = 0; s < pieces; ++s) {
    VPFAST_TILE_LOAD(4, a + s * a_piece, 64);
    VPFAST_TILE_LOAD(5, a + s * a_piece + a_second, 64);
#pragma GCC unroll 3
    for (int r = 0; r < pieces - s; ++r) {
      VPFAST_TILE_LOAD(6, b + r * b_piece, 64);
      VPFAST_TILE_LOAD(7, b + r * b_piece + b_second, 64);
      VPFAST_TILE_MULTIPLY(0, 4, 6);
      VPFAST_TILE_MULTIPLY(1, 4, 7);
      VPFAST_TILE_MULTIPLY(2, 5, 6);
      VPFAST_TILE_MULTIPLY(3, 5, 7);
    }
  }
}

VPFAST_INLINE void zero_tiles() {
  VPFAST_TILE_ZERO(0);
  VPFAST_TILE_ZERO(1);
  VPFAST_TILE_ZERO(2);
  VPFAST_TILE_ZERO(3);
}

// 32 x 32 floats, row by row.
VPFAST_INLINE void load_tiles(const float* from) {
  VPFAST_TILE_LOAD(0, from, 128);
  VPFAST_TILE_LOAD(1, from + 16, 128);
  VPFAST_TILE_LOAD(2, from + 512, 128);
  VPFAST_TILE_LOAD(3, from + 528, 128);
}

VPFAST_INLINE void store_tiles(float* to) {
  VPFAST_TILE_STORE(0, to, 128);
  VPFAST_TILE_STORE(1, to + 16, 128);
  VPFAST_TILE_STORE(2, to + 512, 128);
  VPFAST_TILE_STORE(3, to + 528, 128);
}

// --- forward: 32 queries in the lanes of two registers, 64 keys at a time ---

template <int pieces>
struct ForwardTiles {
  static constexpr int64_t kWidth = 32, kStep = 32;

  const Forward<float>& p;
  const uint16_t *keys, *values;  // of the plane: by rows, by columns
  int64_t first, count, chunks, rows;
  float *out, *scores, *high, *sum;  // (rows, 32), (64, 32), (32), (32)
  uint16_t *queries, *weights;       // [piece][chunk][2][tile of pairs], [piece][2 x 32 keys][2][tile of pairs]
  Place places[kMaxTile];
  View view;
  float unit;

  VPFAST_INLINE ForwardTiles(const Forward<float>& problem, int64_t first, int64_t count, float* scratch)
      : p(problem), first(first), count(count) {
    chunks = round_up(p.dim, 32) / 32;
    rows = chunks * 32;
    out = scratch;
    scores = out + rows * kWidth;
    high = scores + kStep * kWidth;
    sum = high + kWidth;
    queries = reinterpret_cast<uint16_t*>(sum + kWidth);
    weights = queries + pieces * chunks * 2 * kTileElements;
    for (int64_t i = 0; i < count; ++i) places[i] = place_of(p.mask, first + i);
    for (int64_t i = 0; i < kMaxTile; ++i) view.begin[i] = view.end[i] = 0;
    unit = std::fabs(p.scale) * 1.44269504f;
  }

  void run(int64_t plane) {
    begin(p.plane(p.q, plane) + first * p.dim);
    keys = p.keys + plane * p.blocks * pieces * rows * kBlock;
    values = p.values + plane * p.blocks * pieces * round_up(p.dim, 16) * kBlock;
    bool seen[kMaxTile] = {};
    for_each_line(p.mask, places[0], places[count - 1], [&](int64_t t, int64_t y, int64_t start) {
      look(view, p.mask, places, count, t, y);
      for (int64_t i = 0; i < count; ++i) seen[i] |= view.begin[i] < view.end[i];
      if (view.any.empty()) return;
      const int64_t last = start + view.any.end;
      for (int64_t key = (start + view.any.begin) / kBlock * kBlock; key < last; key += kStep) {
        const int64_t blocks = least(kStep / 32, (last - key + kBlock - 1) / kBlock), offset = key - start;
        if (view.all.begin <= offset && offset + blocks * kBlock <= view.all.end) {
          take<false>(key / kBlock, offset, blocks);
        } else {
          take<true>(key / kBlock, offset, blocks);
        }
      }
    });
    finish(plane, seen);
  }

  void begin(const float* q) {
    const float sign = p.scale < 0 ? -1.0f : 1.0f;
    for (int64_t d = 0; d < rows; d += 2) {
      for (int64_t half = 0; half < 2; ++half) {
        F32 even{}, odd{};
        for (int64_t k = 0; k < 16; ++k) {
          const int64_t i = half * 16 + k;
          even.v[k] = i < count && d < p.dim ? sign * q[i * p.dim + d] : 0.0f;
          odd.v[k] = i < count && d + 1 < p.dim ? sign * q[i * p.dim + d + 1] : 0.0f;
        }
        for (int s = 0; s < pieces; ++s) {
          const IntLanes a = next_piece<pieces>(even), b = next_piece<pieces>(odd);
          const IntLanes both = pair(a, b);
          std::memcpy(queries + ((s * chunks + d / 32) * 2 + half) * kTileElements + d % 32 * 16, &both, sizeof both);
        }
      }
    }
    for (int64_t i = 0; i < rows * kWidth; ++i) out[i] = 0;
    for (int64_t i = 0; i < kWidth; ++i) {
      high[i] = -__builtin_huge_valf();
      sum[i] = 0;
    }
  }

  // Blocks of keys: scores, weights, outputs. `offset`: of their first key from the start of the line.
  template <bool masked>
  VPFAST_INLINE void take(int64_t block, int64_t offset, int64_t blocks) {
    const int64_t key_block = pieces * rows * kBlock;
    for (int64_t b = 0; b < blocks; ++b) {
      zero_tiles();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        multiply_tiles<pieces>(keys + (block + b) * key_block + chunk * 2 * kTileElements, kTileElements,
                               chunks * 2 * kTileElements, queries + chunk * 2 * kTileElements, kTileElements,
                               chunks * 2 * kTileElements);
      }
      store_tiles(scores + b * kBlock * kWidth);
    }
    weigh<masked>(offset, blocks * kBlock);
    const int64_t value_rows = round_up(p.dim, 16), value_block = pieces * value_rows * kBlock;
    for (int64_t d = 0; d < value_rows; d += 32) {
      load_tiles(out + d * kWidth);
      // The last 16 components may be half a pair of tiles: the second is then the first again, and its sums are not
      // used.
      const int64_t second = d + 16 < value_rows ? kTileElements : 0;
      for (int64_t b = 0; b < blocks; ++b) {
        multiply_tiles<pieces>(values + (block + b) * value_block + d * kBlock, second, value_rows * kBlock,
                               weights + b * 2 * kTileElements, kTileElements, 4 * kTileElements);
      }
      store_tiles(out + d * kWidth);
    }
  }

  template <bool masked>
  VPFAST_INLINE void weigh(int64_t offset, int64_t keys) {
    const F32 nothing = F32::broadcast(-__builtin_huge_valf());
    F32 highest[2] = {nothing, nothing}, base[2], total[2], scale[2];
    for (int64_t row = 0; row < keys; ++row) {
      const IntLanes index = Integers<F32>::broadcast(static_cast<int32_t>(offset + row));
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        float* at = scores + row * kWidth + c * 16;
        F32 score = load(at);
        if (masked) {
          score = choose(index, Integers<F32>::load(view.begin + c * 16), Integers<F32>::load(view.end + c * 16), score,
                         nothing);
          store(at, score);
        }
        highest[c] = maximum(highest[c], score);
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const F32 before = load(high + c * 16);
      highest[c] = maximum(before, F32::broadcast(unit) * highest[c]);
      base[c] = where_equal(highest[c], nothing, F32::broadcast(0), highest[c]);
      scale[c] = exp2(before - base[c]);
      total[c] = load(sum + c * 16) * scale[c];
      store(high + c * 16, highest[c]);
    }
    for (int64_t row = 0; row < keys; row += 2) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const float* at = scores + row * kWidth + c * 16;
        F32 even = exp2(F32::broadcast(unit) * load(at) - base[c]);
        F32 odd = exp2(F32::broadcast(unit) * load(at + kWidth) - base[c]);
        total[c] = total[c] + even + odd;
        uint16_t* to = weights + (row / kBlock * 2 + c) * kTileElements + row % kBlock * 16;
#pragma GCC unroll 3
        for (int s = 0; s < pieces; ++s) {
          const IntLanes a = next_piece<pieces>(even), b = next_piece<pieces>(odd);
          const IntLanes both = pair(a, b);
          std::memcpy(to + s * 4 * kTileElements, &both, sizeof both);
        }
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) store(sum + c * 16, total[c]);
    if (all_ones(scale[0], scale[1])) return;  // no maximum has moved
    for (int64_t d = 0; d < p.dim; ++d) {
      store(out + d * kWidth, load(out + d * kWidth) * scale[0]);
      store(out + d * kWidth + 16, load(out + d * kWidth + 16) * scale[1]);
    }
  }

  static VPFAST_INLINE bool all_ones(F32 a, F32 b) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return (_mm512_cmp_ps_mask((__m512)a.v, one, _CMP_EQ_OQ) & _mm512_cmp_ps_mask((__m512)b.v, one, _CMP_EQ_OQ)) ==
           0xffff;
  }

  VPFAST_INLINE void finish(int64_t plane, const bool* seen) {
    float* to = p.out + (plane * p.mask.length() + first) * p.dim;
    float* lse = p.lse + plane * p.mask.length() + first;
    for (int64_t i = 0; i < count; ++i) {
      const float share = 1.0f / sum[i];
      for (int64_t d = 0; d < p.dim; ++d) to[i * p.dim + d] = seen[i] ? out[d * kWidth + i] * share : 0.0f;
      lse[i] = (high[i] + std::log2(sum[i])) * 0.69314718f;
    }
  }
};

template <int pieces>
void forward_on_tiles(const Forward<float>& p, int64_t plane, int64_t first, int64_t count, float* scratch) {
  ForwardTiles<pieces>(p, first, count, scratch).run(plane);
}
