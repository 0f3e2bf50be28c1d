// Convolutions of so few pixels that all of them are one block. Included by tile_program_kernel.h.
//
// Story. What counts here is that every weight comes from memory once, without a break. Up to 32 pixels multiply 32
// output channels at a time; up to 96 take as many as six tiles and 16 output channels, so that sums stay where they
// are while all factors pass. Beside the products of one factor's weights those of the next are split, into room that
// stays in the L1 cache, and some further ahead are asked for.

constexpr int64_t kNarrow = 96;  // pixels
constexpr int64_t kAhead = 8;    // factors

template <int pieces, bool floats, int tiles>
class NarrowConvolution {
  static constexpr bool kHalves = tiles > 2;
  static constexpr int64_t kParts = kHalves ? 2 : 1;  // of 32 output channels
  static constexpr int64_t kRows = kBlock / kParts;   // of a factor's weights, two lines of floats each
  static constexpr int64_t kLines = kWeightBytes<pieces, floats> / 64 / kParts;
  static constexpr int64_t kPiece = 2 * kTileBytes / kParts;  // bytes from one piece's split weights to the next one's
  static constexpr int64_t kTurns = pieces * (pieces + 1) / 2;

 public:
  NarrowConvolution(const Convolve& c, const Part* parts, const Worker& w)
      : grid_(parts[0].from), factors_(factors_of<pieces, floats>(c, parts, w)), ending_(c, grid_, w) {
    for (int64_t i = 0; i < 2; ++i) {
      sums_[i] = w.scratch + i * kNarrow * kBlock;
      split_[i] = reinterpret_cast<char*>(w.scratch + 2 * kNarrow * kBlock) + i * kSplitBytes<3>;
    }
    pixels_ = (c.size.batch - 1) * grid_.image + c.size.height * grid_.row;
    count_ = static_cast<int64_t>(factors_.size());
    first_ = w.begin(c.to.channels / kBlock);
    items_ = (w.end(c.to.channels / kBlock) - first_) * kParts * count_;
    ended_ = (kNarrow + kTurns * count_ * kParts - 1) / (kTurns * count_ * kParts);
  }

  void run() {
    if (items_ == 0) return;
    Item now{first_, 0, 0}, ahead = now;
    for (int64_t n = 0; n < std::min(kAhead, items_); ++n, ahead = after(ahead)) ask(weights_of(ahead), 0, kLines);
    if (floats) split(weights_of(now), split_[0], 0, kRows);
    for (int64_t n = 0; n < items_; ++n) {
      const Item next = after(now);
      multiply_item(now, split_[n % 2],
                    Beside{weights_of(next), split_[(n + 1) % 2], n + 1 < items_ ? kRows : 0, weights_of(ahead),
                           n + kAhead < items_ ? kLines : 0});
      if (now.factor + 1 == count_) keep(now);
      now = next;
      if (n + kAhead < items_) ahead = after(ahead);
    }
    ending_.go_on(kNarrow);
  }

 private:
  struct Item {
    int64_t column, half, factor;
  };
  struct Beside {
    const char* from;  // the next weights
    char* to;
    int64_t rows;
    const char* ahead;  // those some factors ahead
    int64_t lines;
  };

  Item after(const Item& item) const {
    if (item.factor + 1 < count_) return {item.column, item.half, item.factor + 1};
    if (item.half + 1 < kParts) return {item.column, item.half + 1, 0};
    return {item.column + 1, 0, 0};
  }
  const char* weights_of(const Item& item) const {
    const int64_t tile = floats ? 2 * kTileBytes : kTileBytes;
    return factors_[item.factor].weights_of(item.column) + item.half * tile;
  }
  static VPFAST_INLINE void split(const char* from, char* to, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) split_row(from + row * 128, to + row * 64, kPiece);
  }
  static VPFAST_INLINE void ask(const char* from, int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      // Between the pieces of one half lie those of the other.
      const int64_t left_out = kHalves && !floats ? line / 16 * kTileBytes : 0;
      _mm_prefetch(from + line * 64 + left_out, _MM_HINT_T1);
    }
  }

  VPFAST_INLINE void multiply_item(const Item& item, const char* split_weights, const Beside& next) {
    if (item.factor == 0) zero();
    int64_t turn = 0;
    const auto beside = [&]() VPFAST_INLINE_LAMBDA {
      ending_.go_on(ended_);
      if (floats) split(next.from, next.to, next.rows * turn / kTurns, next.rows * (turn + 1) / kTurns);
      ask(next.ahead, next.lines * turn / kTurns, next.lines * (turn + 1) / kTurns);
      ++turn;
    };
    const Factor& factor = factors_[item.factor];
    const char* weights = floats ? split_weights : weights_of(item);
    if constexpr (!kHalves) {
      multiply<pieces, (tiles > 1)>(factor.pixels, factor.piece, weights, beside);
    } else {
      const int64_t piece = floats ? kPiece : 2 * kTileBytes;
      const auto with_piece = [&](int i) VPFAST_INLINE_LAMBDA {
        with_pixels(factor.pixels + i * factor.piece);
        beside();
      };
      // In the order of multiply(): how many pixels there are does not change their sums.
      VPFAST_TILE_LOAD(6, weights, 64);
#pragma GCC unroll 3
      for (int i = pieces - 1; i >= 0; --i) with_piece(i);
#pragma GCC unroll 2
      for (int j = 1; j < pieces; ++j) {
        VPFAST_TILE_LOAD(6, weights + j * piece, 64);
#pragma GCC unroll 2
        for (int i = 0; i < pieces - j; ++i) with_piece(i);
      }
    }
  }

  static VPFAST_INLINE void zero() {
    VPFAST_TILE_ZERO(0);
    VPFAST_TILE_ZERO(1);
    VPFAST_TILE_ZERO(2);
    VPFAST_TILE_ZERO(3);
    if constexpr (tiles > 4) VPFAST_TILE_ZERO(4);
    if constexpr (tiles > 5) VPFAST_TILE_ZERO(5);
  }
  static VPFAST_INLINE void with_pixels(const char* from) {
#define VPFAST_STEP(t)                              \
  if constexpr (tiles > t) {                        \
    VPFAST_TILE_LOAD(7, from + t * kTileBytes, 64); \
    VPFAST_TILE_MULTIPLY(t, 7, 6);                  \
  }
    VPFAST_STEP(0)
    VPFAST_STEP(1)
    VPFAST_STEP(2)
    VPFAST_STEP(3)
    VPFAST_STEP(4)
    VPFAST_STEP(5)
#undef VPFAST_STEP
  }

  // Takes the sums out of the tiles; with those of all 32 channels the block before makes room for this one.
  void keep(const Item& item) {
    float* sums = sums_[item.column % 2] + item.half * kLine;
    if constexpr (!kHalves) {
      VPFAST_TILE_STORE(0, sums, 4 * kBlock);
      VPFAST_TILE_STORE(1, sums + kLine, 4 * kBlock);
      if (tiles > 1) VPFAST_TILE_STORE(2, sums + 16 * kBlock, 4 * kBlock);
      if (tiles > 1) VPFAST_TILE_STORE(3, sums + 16 * kBlock + kLine, 4 * kBlock);
    } else {
      VPFAST_TILE_STORE(0, sums, 4 * kBlock);
      VPFAST_TILE_STORE(1, sums + 16 * kBlock, 4 * kBlock);
      VPFAST_TILE_STORE(2, sums + 32 * kBlock, 4 * kBlock);
      if constexpr (tiles > 3) VPFAST_TILE_STORE(3, sums + 48 * kBlock, 4 * kBlock);
      if constexpr (tiles > 4) VPFAST_TILE_STORE(4, sums + 64 * kBlock, 4 * kBlock);
      if constexpr (tiles > 5) VPFAST_TILE_STORE(5, sums + 80 * kBlock, 4 * kBlock);
    }
    if (item.half + 1 < kParts) return;
    ending_.go_on(kNarrow);
    ending_.begin(sums_[item.column % 2], 0, item.column, pixels_);
  }

  const Map& grid_;
  std::vector<Factor> factors_;
  Ending<pieces> ending_;
  float* sums_[2];
  char* split_[2];
  int64_t pixels_, count_, first_, items_, ended_;
};
