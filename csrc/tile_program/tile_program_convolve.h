// Convolutions of tile_program on matrix tiles. Included by tile_program_kernel.h.
//
// Story. An output block is 32 pixels by 32 channels; what it sums up is a list of factors, each the same 32 pixels
// shifted by a kernel position, of 32 channels of one of the maps, times 32 x 32 weights. Where maps are small their
// weights are many: a step of the largest networks reads 450 MB of them, and pixels are too few to hide that behind.
// So weights of three pieces are kept as the 4 bytes of a float and split when they are used, a slab of factors for all
// blocks of a run, while the slab before is multiplied. Beside the products of a slab, which leave most of the
// processor idle, a thread
//
//   - writes the block before (bias, activation, pieces),
//   - splits the next slab's weights,
//   - asks memory for those of the slab after it.

constexpr int64_t kBlock = 32;  // pixels, and output channels, that tiles 0 to 3 sum up
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kSums = kBlock * kBlock;
constexpr int64_t kSlab = 36;  // factors
constexpr int64_t kRun = 32;   // blocks

template <int pieces>
constexpr int64_t kSplitBytes = 2 * pieces * kTileBytes;  // of a factor's weights, in pieces
template <int pieces, bool floats>
constexpr int64_t kWeightBytes = floats ? 4 * kSums : kSplitBytes<pieces>;  // the same, as they are kept

constexpr int64_t kScratch = kRun * kSums + 2 * kSlab * kSplitBytes<3> / 4;  // floats that a thread needs

// 32 input channels of 32 (or, where `whole` is false, 16) pixels times those of 32 output channels. Of two sums of
// pieces the products of pieces i and j with i + j < pieces, in an order in which only one side changes at a time.
// After every four products, `beside()`.
template <int pieces, bool whole, class Beside>
VPFAST_INLINE void multiply(const char* pixels, int64_t piece, const char* weights, const Beside& beside) {
  // A tile is loaded right before its products: the one it takes the place of has then been read for a while.
  const auto with_pixels = [&](int p) VPFAST_INLINE_LAMBDA {
    VPFAST_TILE_LOAD(4, pixels + p * piece, kChunkBytes);
    VPFAST_TILE_MULTIPLY(0, 4, 6);
    VPFAST_TILE_MULTIPLY(1, 4, 7);
    if (whole) {
      VPFAST_TILE_LOAD(5, pixels + p * piece + 16 * kChunkBytes, kChunkBytes);
      VPFAST_TILE_MULTIPLY(2, 5, 6);
      VPFAST_TILE_MULTIPLY(3, 5, 7);
    }
    beside();
  };
  const auto with_weights = [&](int p) VPFAST_INLINE_LAMBDA {
    VPFAST_TILE_LOAD(6, weights + 2 * p * kTileBytes, 64);
    VPFAST_TILE_MULTIPLY(0, 4, 6);
    if (whole) VPFAST_TILE_MULTIPLY(2, 5, 6);
    VPFAST_TILE_LOAD(7, weights + (2 * p + 1) * kTileBytes, 64);
    VPFAST_TILE_MULTIPLY(1, 4, 7);
    if (whole) VPFAST_TILE_MULTIPLY(3, 5, 7);
    beside();
  };
  VPFAST_TILE_LOAD(6, weights, 64);
  VPFAST_TILE_LOAD(7, weights + kTileBytes, 64);
#pragma GCC unroll 3
  for (int p = pieces - 1; p >= 0; --p) with_pixels(p);
  if (pieces > 1) with_weights(1);
  if (pieces > 2) {
    with_pixels(1);
    VPFAST_TILE_LOAD(4, pixels, kChunkBytes);
    if (whole) VPFAST_TILE_LOAD(5, pixels + 16 * kChunkBytes, kChunkBytes);
    with_weights(2);
  }
}

// --- beside the products ---

struct Factor {
  const char* pixels;  // of the first block
  int64_t piece;
  const char* weights;  // of the first 32 output channels
  int64_t column;       // bytes from one 32 output channels' to the next

  const char* weights_of(int64_t output) const { return weights + output * column; }
};

// Writes the sums of a block, some pixels at a time; pixels between the rows and between the images are left out.
template <int pieces>
class Ending {
 public:
  Ending(const Convolve& c, const Map& grid, const Worker& w) : c_(c), grid_(grid), w_(w) {}

  void begin(const float* sums, int64_t pixel, int64_t column, int64_t count) {
    sums_ = sums;
    pixel_ = pixel;
    column_ = column;
    left_ = count;
    image_ = pixel / grid_.image;
    y_ = pixel % grid_.image / grid_.row;
    x_ = pixel % grid_.image % grid_.row;
  }
  VPFAST_INLINE void go_on(int64_t count) {
    for (; count > 0 && left_ > 0; --count, --left_, ++pixel_, ++x_, sums_ += kBlock) {
      if (x_ == grid_.row) {
        x_ = 0;
        if (++y_ == grid_.image / grid_.row) y_ = 0, ++image_;
      }
      if (x_ < c_.size.width && y_ < c_.size.height && image_ < c_.size.batch) write();
    }
  }

 private:
  VPFAST_INLINE void write() const {
    const Size& size = c_.size;
    const float* bias = w_.at.read<float>(c_.bias) + column_ * kBlock;
    const __m512 a = activated(_mm512_add_ps(_mm512_load_ps(sums_), _mm512_loadu_ps(bias)), c_.activation);
    const __m512 b = activated(_mm512_add_ps(_mm512_load_ps(sums_ + 16), _mm512_loadu_ps(bias + 16)), c_.activation);
    const int64_t dense = (image_ * size.height + y_) * size.width + x_;
    if (c_.target == Target::map) {
      store(c_.to, a, b);
      if (c_.also.address) store(c_.also, activated(a, Activation::relu), activated(b, Activation::relu));
    } else if (c_.target == Target::rows) {
      float* to = w_.at.write<float>(c_.to.address) + dense * c_.to.channels + column_ * kBlock;
      _mm512_storeu_ps(to, a);
      _mm512_storeu_ps(to + 16, b);
    } else {
      alignas(64) float channels[kBlock];
      _mm512_store_ps(channels, a);
      _mm512_store_ps(channels + 16, b);
      const int64_t area = size.height * size.width, first = column_ * kBlock;
      float* to = w_.at.write<float>(c_.to.address) + (image_ * c_.planes + first) * area + y_ * size.width + x_;
      for (int64_t j = 0; j < kBlock && first + j < c_.planes; ++j) to[j * area] = channels[j];
    }
  }
  VPFAST_INLINE void store(const Map& map, __m512 a, __m512 b) const {
    char* to = w_.at.write<char>(map.address) + column_ * pieces * map.piece + pixel_ * kChunkBytes;
    store_pieces<pieces>(to, map.piece, a);
    store_pieces<pieces>(to + 2 * kLine, map.piece, b);
  }

  const Convolve& c_;
  const Map& grid_;
  const Worker& w_;
  const float* sums_ = nullptr;
  int64_t pixel_ = 0, column_ = 0, left_ = 0, image_ = 0, y_ = 0, x_ = 0;
};

// Splits a row of float weights, 16 of even input channels and 16 of odd ones, into rows of tiles `piece` bytes apart.
// Pieces are cut off and not rounded, so that they are the upper half of what is left: three hold all bits.
VPFAST_INLINE void split_row(const char* from, char* to, int64_t piece) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512 even = _mm512_loadu_ps(from), odd = _mm512_loadu_ps(from + 64);
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) {
    const __m512i e = _mm512_castps_si512(even), o = _mm512_castps_si512(odd);
    _mm512_store_si512(to + p * piece, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(e, 16), o));
    if (p == 2) break;
    even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_and_si512(e, upper)));
    odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(o, upper)));
  }
}

// Splits the weights of a slab, some rows at a time.
class Splitting {
 public:
  void begin(const Factor* factors, int64_t count, int64_t column, char* to) {
    factor_ = factors;
    column_ = column;
    to_ = to;
    from_ = factors->weights_of(column);
    left_ = count * kBlock;
  }
  VPFAST_INLINE void go_on(int64_t count) {
    for (; count > 0 && left_ > 0; --count) {
      split_row(from_, to_, 2 * kTileBytes);
      from_ += 128;
      to_ += 64;
      if (--left_ % kBlock == 0 && left_ > 0) {
        from_ = (++factor_)->weights_of(column_);
        to_ += kSplitBytes<3> - kBlock * 64;
      }
    }
  }

 private:
  const Factor* factor_ = nullptr;
  const char* from_ = nullptr;
  char* to_ = nullptr;
  int64_t column_ = 0, left_ = 0;  // rows
};

// Asks memory for weights, some lines at a time.
template <int pieces, bool floats>
class Prefetching {
 public:
  void begin(const Factor* factors, int64_t count, int64_t column) {
    factor_ = factors;
    column_ = column;
    at_ = factors->weights_of(column);
    left_ = count * kLines;
  }
  VPFAST_INLINE void go_on(int64_t count) {
    for (; count > 0 && left_ > 0; --count) {
      _mm_prefetch(at_, _MM_HINT_T1);
      at_ += 64;
      if (--left_ % kLines == 0 && left_ > 0) at_ = (++factor_)->weights_of(column_);
    }
  }

 private:
  static constexpr int64_t kLines = kWeightBytes<pieces, floats> / 64;
  const Factor* factor_ = nullptr;
  const char* at_ = nullptr;
  int64_t column_ = 0, left_ = 0;  // lines
};

// --- in which order ---

template <int pieces, bool floats>
std::vector<Factor> factors_of(const Convolve& c, const Part* parts, const Worker& w) {
  std::vector<Factor> factors;
  for (const Part* part = parts; part < parts + c.parts; ++part) {
    const Map& from = part->from;
    const int64_t chunks = from.channels / kChunk;
    const int64_t column = part->kernel_height * part->kernel_width * chunks * kWeightBytes<pieces, floats>;
    const char* weights = w.at.read<char>(part->weights);
    // Kernel positions innermost: their pixels are nearly the same, and stay in the L1 cache.
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t y = 0; y < part->kernel_height; ++y) {
        for (int64_t x = 0; x < part->kernel_width; ++x, weights += kWeightBytes<pieces, floats>) {
          const int64_t shift = (y - part->kernel_height / 2) * from.row + x - part->kernel_width / 2;
          const char* pixels = w.at.read<char>(from.address) + shift * kChunkBytes + chunk * pieces * from.piece;
          factors.push_back({pixels, from.piece, weights, column});
        }
      }
    }
  }
  return factors;
}

// The blocks of an instruction one after the other: those of a group of pixels, column by column, then those of the
// next pixels. Each thread has a range of them.
struct Plan {
  int64_t blocks, columns, group, slabs, factors, end;

  int64_t first_factor(int64_t slab) const { return factors * slab / slabs; }
};

// A slab of factors for a run, blocks of neighbouring pixels in one column.
struct Stage {
  int64_t unit, slab;          // the run's first block
  int64_t block, column, run;  // of pixels; `run` blocks, none at the end of the plan

  static Stage at(const Plan& plan, int64_t unit, int64_t slab) {
    if (unit >= plan.end) return {unit, 0, 0, 0, 0};
    const int64_t first = unit / (plan.group * plan.columns) * plan.group;
    const int64_t blocks = std::min(plan.group, plan.blocks - first), inside = unit - first * plan.columns;
    return {unit, slab, first + inside % blocks, inside / blocks, std::min(blocks - inside % blocks, plan.end - unit)};
  }
  Stage next(const Plan& plan) const {
    return slab + 1 < plan.slabs ? Stage{unit, slab + 1, block, column, run} : at(plan, unit + run, 0);
  }
};

template <int pieces, bool floats>
class Convolution {
  static constexpr int64_t kTurns = pieces * (pieces + 1) / 2;  // times four products in a factor
  static constexpr int64_t kOften = floats ? 2 : 3;             // of them: looking for work more often costs more

 public:
  Convolution(const Convolve& c, const Part* parts, const Worker& w)
      : grid_(parts[0].from),
        factors_(factors_of<pieces, floats>(c, parts, w)),
        sums_(w.scratch),
        ending_(c, grid_, w) {
    pixels_ = (c.size.batch - 1) * grid_.image + c.size.height * grid_.row;
    const int64_t count = static_cast<int64_t>(factors_.size());
    const int64_t blocks = (pixels_ + kBlock - 1) / kBlock, columns = c.to.channels / kBlock;
    // Where the L2 cache holds all weights, pixels stay in the L1 cache from column to column.
    cached_ = count * columns * kSplitBytes<pieces> < (1 << 20);
    const int64_t group = !floats && cached_ ? 1 : kRun;
    const int64_t slabs = floats ? (count + kSlab - 1) / kSlab : 1;
    first_ = w.begin(blocks * columns);
    plan_ = {blocks, columns, group, slabs, count, w.end(blocks * columns)};
    for (int64_t i = 0; i < 2; ++i)
      buffers_[i] = reinterpret_cast<char*>(sums_ + kRun * kSums) + i * kSlab * kSplitBytes<pieces>;
  }

  void run() {
    if (first_ == plan_.end) return;
    Stage stage = Stage::at(plan_, first_, 0);
    begin_weights(stage, 0);
    splitting_.go_on(kSlab * kBlock);
    prefetching_.go_on(kSlab * kWeightBytes<pieces, floats> / 64);
    for (int64_t turn = 0; stage.run > 0; ++turn) {
      const Stage next = stage.next(plan_);
      if (next.run > 0) begin_weights(next, (turn + 1) % 2);
      set_pace(stage);
      for (int64_t i = 0; i < stage.run; ++i) {
        const int64_t pixel = (stage.block + i) * kBlock;
        if (pixels_ - pixel > 16) {
          multiply_slab<true>(stage, turn % 2, i);
        } else {
          multiply_slab<false>(stage, turn % 2, i);
        }
        if (stage.slab + 1 == plan_.slabs) {
          ending_.begin(sums_ + i * kSums, pixel, stage.column, std::min(kBlock, pixels_ - pixel));
        }
      }
      splitting_.go_on(kSlab * kBlock);
      stage = next;
    }
    ending_.go_on(kBlock);
  }

 private:
  // How much is done beside four products, so that it is done in time: a block within a slab of the next, a slab's
  // weights within the one before.
  void set_pace(const Stage& stage) {
    const int64_t turns = size_of(stage) * kTurns, in_all = turns * stage.run;
    const int64_t rows = std::max(kSlab, size_of(stage)) * kBlock;
    period_ = std::clamp<int64_t>(in_all / rows, std::min(kOften, kTurns), kTurns);
    wait_ = period_;
    ended_ = (kBlock * period_ + turns - 1) / turns;
    split_ = (rows * period_ + in_all - 1) / in_all;
  }
  void begin_weights(const Stage& stage, int64_t buffer) {
    if (floats) splitting_.begin(first_of(stage), size_of(stage), stage.column, buffers_[buffer]);
    const Stage after = stage.next(plan_);
    if (after.run > 0 && !cached_) prefetching_.begin(first_of(after), size_of(after), after.column);
  }
  int64_t size_of(const Stage& stage) const {
    return plan_.first_factor(stage.slab + 1) - plan_.first_factor(stage.slab);
  }
  const Factor* first_of(const Stage& stage) const { return factors_.data() + plan_.first_factor(stage.slab); }

  template <bool whole>
  VPFAST_INLINE void multiply_slab(const Stage& stage, int64_t buffer, int64_t i) {
    float* sums = sums_ + i * kSums;
    // The sums of a single block stay in the tiles from slab to slab.
    if (stage.slab == 0) {
      VPFAST_TILE_ZERO(0);
      VPFAST_TILE_ZERO(1);
      if (whole) VPFAST_TILE_ZERO(2);
      if (whole) VPFAST_TILE_ZERO(3);
    } else if (stage.run > 1) {
      VPFAST_TILE_LOAD(0, sums, 4 * kBlock);
      VPFAST_TILE_LOAD(1, sums + 16, 4 * kBlock);
      if (whole) VPFAST_TILE_LOAD(2, sums + 16 * kBlock, 4 * kBlock);
      if (whole) VPFAST_TILE_LOAD(3, sums + 16 * kBlock + 16, 4 * kBlock);
    }
    const int64_t shift = (stage.block + i) * kBlock * kChunkBytes;
    const Factor* end = first_of(stage) + size_of(stage);
    const char* split = buffers_[buffer];
    for (const Factor* factor = first_of(stage); factor < end; ++factor, split += kSplitBytes<pieces>) {
      const char* weights = floats ? split : factor->weights_of(stage.column);
      multiply<pieces, whole>(factor->pixels + shift, factor->piece, weights, [&]() VPFAST_INLINE_LAMBDA {
        if (--wait_ > 0) return;
        wait_ = period_;
        ending_.go_on(ended_);
        if (floats) splitting_.go_on(split_);
        prefetching_.go_on(2 * split_);
      });
    }
    if (stage.run == 1 && stage.slab + 1 < plan_.slabs) return;
    ending_.go_on(kBlock);  // of the block before, whose sums may lie where these go
    VPFAST_TILE_STORE(0, sums, 4 * kBlock);
    VPFAST_TILE_STORE(1, sums + 16, 4 * kBlock);
    if (whole) VPFAST_TILE_STORE(2, sums + 16 * kBlock, 4 * kBlock);
    if (whole) VPFAST_TILE_STORE(3, sums + 16 * kBlock + 16, 4 * kBlock);
  }

  const Map& grid_;
  std::vector<Factor> factors_;
  float* sums_;
  Ending<pieces> ending_;
  Splitting splitting_;
  Prefetching<pieces, floats> prefetching_;
  Plan plan_;
  char* buffers_[2];
  int64_t pixels_, first_;
  bool cached_;
  // After every `period_` times four products: pixels of the block before, rows of the next slab.
  int64_t period_ = 1, wait_ = 1, ended_ = 0, split_ = 0;
};
