// One frame of codes for one instruction set. Included by sample_codes_cpu.cpp through for_each_isa.h.

namespace sample_codes {

using namespace vpfast::sample_codes;
using vpfast::masked_attention3d::for_each_line;
using vpfast::masked_attention3d::Interval;
using vpfast::masked_attention3d::least;
using vpfast::masked_attention3d::most;
using vpfast::masked_attention3d::Place;

#if VPFAST_ISA_LEVEL == 2
#include "sample_codes/sample_codes_pairs.h"
#endif

#include "sample_codes/sample_codes_maps.h"

// Queries that share keys and values in registers. Four sums of each fill those there are: 16 of 32, or 12 of 16, both
// more than a multiply-add takes cycles on two ports.
constexpr int kQueriesTogether = kLanes == 16 ? 4 : 3;

#include "sample_codes/sample_codes_walk.h"

// The k-th largest of `count` finite numbers, which change places: by quickselect.
inline double largest(double* of, int64_t count, int64_t k) {
  int64_t begin = 0, end = count - 1;
  while (begin < end) {
    const double pivot = of[(begin + end) / 2];
    int64_t i = begin, j = end;
    while (i <= j) {
      while (of[i] > pivot) ++i;
      while (of[j] < pivot) --j;
      if (i > j) break;
      const double other = of[i];
      of[i++] = of[j];
      of[j--] = other;
    }
    // From the largest on: [begin, j] not below the pivot, [i, end] not above it, and between them the pivot.
    if (k - 1 <= j) {
      end = j;
    } else if (k - 1 >= i) {
      begin = i;
    } else {
      break;
    }
  }
  return of[k - 1];
}

// Numbered as in vpfast/models/shrvqvae/random.py; -1 where a logit is not finite.
template <class W>
int64_t choose(const Problem<W>& p, const Worked<W>* logits, double* scores, int64_t clip, int64_t cell,
               int64_t depth) {
  const int64_t count = p.network.codebook_size;
  int64_t best = 0;
  for (int64_t m = 0; m < count; ++m) {
    if (!(logits[m] - logits[m] == 0)) return -1;
    if (logits[m] > logits[best]) best = m;
  }
  if (p.temperature == 0) return best;
  double least = -__builtin_huge_val();
  if (p.top_k < count) {
    for (int64_t m = 0; m < count; ++m) scores[m] = logits[m];
    least = largest(scores, count, p.top_k);
  }
  Words words{};
  for (int64_t m = 0; m < count; ++m) {
    if (m % 4 == 0) {
      const Words counter = {{static_cast<uint32_t>(p.time), static_cast<uint32_t>(cell), static_cast<uint32_t>(depth),
                              static_cast<uint32_t>(m / 4)}};
      words = philox(counter, static_cast<uint32_t>(p.keys[2 * clip]), static_cast<uint32_t>(p.keys[2 * clip + 1]));
    }
    const double noise = -std::log(-std::log(uniform(words.word[m % 4])));
    scores[m] = logits[m] < least
                    ? -__builtin_huge_val()
                    : noise + (static_cast<double>(logits[m]) - static_cast<double>(logits[best])) / p.temperature;
  }
  best = 0;
  for (int64_t m = 1; m < count; ++m) {
    if (scores[m] > scores[best]) best = m;
  }
  return best;
}

#include "sample_codes/sample_codes_attention.h"

#if VPFAST_ISA_LEVEL == 2
#include "sample_codes/sample_codes_attention_bfloat16.h"
#endif

// How many positions a pass evaluates: twice as many as passes made known lately. Wrong guesses come in clusters, so
// that a model of odds judges long runs too low; and rows past the first wrong guess are not lost, as guesses to come.
class Pace {
 public:
  explicit Pace(int64_t always) : always_(always) {}

  int64_t next() const {
    if (always_ > 0) return always_;
    const auto rows = static_cast<int64_t>(2 * known_ + 0.999);
    if (rows <= 2) return 2;
    constexpr int64_t group = kQueriesTogether;  // fills the registers
    return least((rows + group - 1) / group * group, kRun / group * group);
  }

  void saw(int64_t known) { known_ += 0.1 * (static_cast<double>(known) - known_); }

 private:
  int64_t always_;
  double known_ = 4;
};

// What became of a guess.
constexpr int64_t kWrong = 1, kNotFinite = 2;

// In place of a row of what was heard: nothing will do but to ask.
constexpr int64_t kAsk = -1;

template <class W>
struct Frame {
  using X = Worked<W>;

  const Problem<W>& p;
  const Network<W>& net;
  const Member& member;
  int64_t clip;
  Rows<X> x, y, z;     // shared: the features, and what layers hand on
  Rows<X> heard;       // shared: what the attentions answered, side by side
  int64_t* verdicts;   // shared, one a row
  Rows<X> own, local;  // this member's
  X* sums;
  Rows<W> gathered, rounded, queries;
  W* weights;
  double* scores;

  VPFAST_INLINE Frame(const Problem<W>& problem, int64_t clip, const Member& member, const Memory<W>& memory)
      : p(problem), net(problem.network), member(member), clip(clip), verdicts(memory.verdicts), scores(memory.scores) {
    X* shared = memory.shared;
    x = rows_from(shared, net.channels);
    y = rows_from(shared, net.hidden);
    z = rows_from(shared, net.channels);
    heard = rows_from(shared, heard_elements(net));
    X* mine = memory.own;
    own = rows_from(mine, net.channels);
    local = rows_from(mine, 4 * net.hidden);
    sums = mine;
    W* factors = memory.factors;
    gathered = rows_from(factors, kMaxTaps * net.channels);
    if (kTerms<W> > 1) rounded = rows_from(factors, net.hidden);
    queries = rows_from(factors, net.head_dim);
    weights = factors;
  }

  template <class Element>
  static Rows<Element> rows_from(Element*& next, int64_t columns) {
    const Rows<Element> taken{next, whole_lines(columns)};
    next += kRun * taken.step;
    return taken;
  }

  void meet() { member.barrier->wait(member.size); }

  template <class Element>
  static Rows<const Element> read(const Rows<Element>& rows) {
    return {rows.first, rows.step};
  }
  static Rows<const W> same(const W* row) { return {row, 0}; }

  // These rows as factors of a product.
  VPFAST_INLINE Rows<const W> factors_of(const Rows<X>& rows, int64_t columns, int64_t count) {
    if constexpr (kTerms<W> == 1) {
      return read(rows);
    } else {
      for (int64_t row = 0; row < count; ++row) convert(rounded[row], rows[row], columns);
      return read(rounded);
    }
  }

  // The member's share of rows.
  Interval rows_of(int64_t rows) const {
    return {rows * member.rank / member.size, rows * (member.rank + 1) / member.size};
  }

  int64_t* codes_at(int64_t cell) { return p.codes + (clip * p.length + p.time * p.cells + cell) * net.depths; }

  // False where a logit is not finite: nothing more is sampled then.
  bool run() {
    if (member.rank == 0) guess();
    meet();
    Pace of_passes(p.run), of_drafts(p.run);
    for (int64_t cell = 0; cell < p.cells;) {
      const int64_t rows = least(of_passes.next(), p.cells - cell);
      if (cell > 0 && net.attention_count > 0) draft(cell, rows, of_drafts);
      evaluate(cell, rows, kAsk);
      const int64_t known = known_of(rows);
      if (verdicts[known - 1] & kNotFinite) return false;
      if (member.rank == 0) keep_in_mind(known, rows);
      of_passes.saw(known);
      cell += known;
    }
    show({p.cells - 1, p.cells});
    return true;
  }

  // Better guesses for a pass of `rows` positions from `cell` on; nobody looks at that of the last.
  VPFAST_INLINE void draft(int64_t cell, int64_t rows, Pace& pace) {
    for (int64_t row = 0; row < rows - 1;) {
      const int64_t together = least(pace.next(), rows - 1 - row);
      evaluate(cell + row, together, row);
      const int64_t known = known_of(together);
      pace.saw(known);
      row += known;
    }
  }

  // The rows up to the first wrong guess, and that one.
  int64_t known_of(int64_t rows) const {
    int64_t known = 1;
    while (known < rows && verdicts[known - 1] == 0) ++known;
    return known;
  }

  // What was heard at the positions from the next one on; the last one's stands for those nobody has asked at.
  void keep_in_mind(int64_t known, int64_t rows) {
    const int64_t last = rows - 1;
    for (int64_t row = 0; row < kRun; ++row) {
      const int64_t from = least(row + known, last);
      std::memmove(heard[row], heard[from], sizeof(X) * heard.step);
    }
  }

  // Until they are known, the codes of the frame before stand for the frame's.
  void guess() {
    for (int64_t cell = 0; cell < p.cells; ++cell) {
      int64_t* codes = codes_at(cell);
      for (int64_t depth = net.first_depth; depth < net.last_depth; ++depth) {
        const int64_t before = p.time > 0 ? codes[depth - p.cells * net.depths] : 0;
        codes[depth] = before >= 0 && before < net.codebook_size ? before : 0;
      }
    }
  }

  // The network at `rows` positions from `cell` on, from the codes that are known or guessed of those before each.
  // Their codes become what is chosen, which is right up to the first one that was guessed wrong, that one included.
  // Attentions ask keys and values, or take for their answers what was heard, from row `heard_from` on.
  VPFAST_INLINE void evaluate(int64_t cell, int64_t rows, int64_t heard_from) {
    show({cell > 0 ? cell - 1 : 0, cell + rows - 1});
    meet();
    enter(cell, rows);
    for (int64_t b = 0; b < net.block_count; ++b) {
      gated(net.blocks[b], cell, rows);
      if (net.blocks[b].attention) attend(*net.blocks[b].attention, cell, rows, heard_from);
    }
    leave(cell, rows);
  }

  // What later positions see of the codes at these cells: embeddings, and the linear layer after them.
  VPFAST_INLINE void show(Interval cells) {
    const Interval mine = rows_of(cells.end - cells.begin);
    const int64_t channels = net.channels;
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t* codes = codes_at(cells.begin + row);
      X* sum = own[row];
      for (int64_t c = 0; c < channels; ++c) sum[c] = 0;
      for (int64_t depth = 0; depth < net.depths; ++depth) {
        if (!net.embeddings[depth]) continue;
        const W* embedding = net.embeddings[depth] + codes[depth] * channels;
        for (int64_t c = 0; c < channels; ++c) sum[c] += embedding[c];
      }
      gelu(sum, {0, channels});
    }
    const Rows<X> from{own[mine.begin], own.step}, to{local[mine.begin], local.step};
    const int64_t count = mine.end - mine.begin;
    apply(to, same(net.mix.bias), factors_of(from, channels, count), net.mix, {0, channels}, count);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      convert(input_at(net.stem, cells.begin + row), local[row], channels);
    }
  }

  W* input_at(const Conv<W>& conv, int64_t cell) {
    return conv.inputs + (clip * conv.total + conv.own[cell] + conv.shift) * conv.channels;
  }

  // What stem and past frames say about the positions.
  VPFAST_INLINE void enter(int64_t cell, int64_t rows) {
    const Conv<W>& conv = net.stem;
    gather(conv, cell, rows);
    apply(x, said_before(conv, cell), read(gathered), conv.taps, share_of(net.channels, member), rows);
    meet();
  }

  VPFAST_INLINE Rows<const W> said_before(const Conv<W>& conv, int64_t cell) {
    return {conv.frame + (clip * p.cells + cell) * conv.taps.out, conv.taps.out};
  }

  // The inputs at the present taps, one after another.
  VPFAST_INLINE void gather(const Conv<W>& conv, int64_t cell, int64_t rows) {
    const W* inputs = conv.inputs + (clip * conv.total + conv.shift) * conv.channels;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t* cells = conv.cells + (cell + row) * conv.count;
      for (int64_t tap = 0; tap < conv.count; ++tap) {
        std::memcpy(gathered[row] + tap * conv.channels, inputs + cells[tap] * conv.channels,
                    sizeof(W) * conv.channels);
      }
    }
  }

  VPFAST_INLINE void gated(const Block<W>& block, int64_t cell, int64_t rows) {
    const int64_t channels = net.channels;
    const Interval some = rows_of(rows), mine = share_of(channels, member);
    for (int64_t row = some.begin; row < some.end; ++row) {
      normalise(input_at(block.conv, cell + row), x[row], block.norm, channels);
    }
    meet();
    gather(block.conv, cell, rows);
    const Rows<const W> base = said_before(block.conv, cell);
    apply(local, base, read(gathered), block.conv.taps, mine, rows);
    apply(local, base, read(gathered), block.conv.taps, {channels + mine.begin, channels + mine.end}, rows);
    for (int64_t row = 0; row < rows; ++row) {
      gate(y[row] + mine.begin, local[row] + mine.begin, local[row] + channels + mine.begin, mine.end - mine.begin);
    }
    meet();
    add(y, block.out, mine, rows);
  }

  // x += bias + from matrix, a member its columns.
  VPFAST_INLINE void add(const Rows<X>& from, const Affine<W>& map, Interval mine, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = mine.begin; c < mine.end; ++c) x[row][c] += map.bias[c];
    }
    apply(x, read(x), factors_of(from, map.in, rows), map, mine, rows);
    meet();
  }

  VPFAST_INLINE void attend(const Attention<W>& attention, int64_t cell, int64_t rows, int64_t heard_from) {
    const bool asks = heard_from == kAsk;
    const Rows<X> answers{heard[asks ? 0 : heard_from] + attention.heard, heard.step};
    if (asks) {
      ask(attention, cell, rows, answers);
      meet();
    }
    const Interval mine = share_of(net.channels, member), wide = share_of(attention.widen.out, member);
    add(answers, attention.output, mine, rows);
    for (int64_t row = 0; row < rows; ++row) normalise(own[row], x[row], attention.norm2, net.channels);
    apply(y, same(attention.widen.bias), factors_of(own, net.channels, rows), attention.widen, wide, rows);
    for (int64_t row = 0; row < rows; ++row) gelu(y[row], wide);
    meet();
    add(y, attention.narrow, mine, rows);
  }

  // The member's heads.
  VPFAST_INLINE void ask(const Attention<W>& attention, int64_t cell, int64_t rows, Rows<X> answers) {
    Place places[kRun];
    for (int64_t row = 0; row < rows; ++row) {
      places[row] = place_of(net.masks[0], p.time * p.cells + cell + row);
      normalise(own[row], x[row], attention.norm1, net.channels);
    }
    const Rows<const W> factors = factors_of(own, net.channels, rows);
    for (int64_t head = member.rank; head < net.heads; head += member.size) {
      look(attention, head, factors, places, rows, answers);
    }
  }

  // One head at these places, whose keys and values are kept first.
  VPFAST_INLINE void look(const Attention<W>& attention, int64_t head, Rows<const W> factors, const Place* places,
                          int64_t rows, Rows<X> answers) {
    constexpr int64_t block = kKeyBlock<W>, terms = kTerms<W>;
    const int64_t dim = net.head_dim, inner = net.heads * dim;
    for (int64_t part = 0; part < 3; ++part) {
      const Interval columns{part * inner + head * dim, part * inner + head * dim + dim};
      apply(local, same(attention.qkv.bias), factors, attention.qkv, columns, rows);
    }
    const int64_t plane = (clip * net.heads + head) * ((p.length + block - 1) / block * block) * dim;
    W *keys = attention.keys + plane, *values = attention.values + plane;
    const X unit = X(1.4426950408889634) / std::sqrt(static_cast<X>(dim));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = places[row].index / block * block * dim, key = places[row].index % block;
      const X* made = local[row] + head * dim;
      for (int64_t d = 0; d < dim; ++d) {
        keys[begin + (d / terms * block + key) * terms + d % terms] = static_cast<W>(made[inner + d]);
        values[begin + d * block + key] = static_cast<W>(made[2 * inner + d]);
        queries[row][d] = static_cast<W>(made[d] * unit);
      }
    }
    const Rows<X> out{answers[0] + head * dim, answers.step};
    Head<W> one{{keys, values, dim, read(queries), out, weights, sums, 0, -1, {}, {}}};
    one.attend(net.masks[head % net.mask_count], places, rows);
  }

  // The codes of all layers of this pass, each seeing those before it.
  VPFAST_INLINE void leave(int64_t cell, int64_t rows) {
    const int64_t channels = net.channels;
    for (int64_t row = 0; row < rows; ++row) normalise(own[row], x[row], net.norm, channels);
    const Interval wide = share_of(net.mlp1.out, member), mine = share_of(channels, member);
    for (int64_t depth = 0; depth < net.last_depth; ++depth) {
      if (depth >= net.first_depth) {
        apply(y, same(net.mlp1.bias), factors_of(own, channels, rows), net.mlp1, wide, rows);
        for (int64_t row = 0; row < rows; ++row) gelu(y[row], wide);
        meet();
        apply(z, same(net.mlp2.bias), factors_of(y, net.mlp1.out, rows), net.mlp2, mine, rows);
        meet();
        settle(cell, depth, rows_of(rows));
        meet();
      }
      if (!net.parents[depth]) continue;
      for (int64_t row = 0; row < rows; ++row) {
        const W* parent = net.parents[depth] + codes_at(cell + row)[depth] * channels;
        for (int64_t c = 0; c < channels; ++c) own[row][c] += parent[c];
      }
    }
  }

  // The codes of one layer in these rows, which the member chooses.
  VPFAST_INLINE void settle(int64_t cell, int64_t depth, Interval rows) {
    const Affine<W>& map = net.logits[depth];
    const Rows<X> from{z[rows.begin], z.step}, to{local[rows.begin], local.step};
    const int64_t count = rows.end - rows.begin;
    apply(to, same(map.bias), factors_of(from, net.channels, count), map, {0, map.out}, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t chosen = choose(p, local[row], scores, clip, cell + row, depth);
      int64_t& code = codes_at(cell + row)[depth];
      if (depth == net.first_depth) verdicts[row] = 0;
      if (chosen != code) verdicts[row] |= chosen < 0 ? kNotFinite : kWrong;
      code = chosen < 0 ? 0 : chosen;
    }
  }
};

// The frame of one clip, by one member of its team.
template <class W>
bool sample_frame(const Problem<W>& p, int64_t clip, const Member& member, const Memory<W>& memory) {
  return Frame<W>(p, clip, member, memory).run();
}

}  // namespace sample_codes
