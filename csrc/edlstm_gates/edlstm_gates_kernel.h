// The loops of edlstm_gates for one instruction set. Included by edlstm_gates_cpu.cpp through for_each_isa.h.

#include "edlstm_gates/edlstm_gates_math.h"

// Elements [begin, end) of the flattened cell state, which may start and stop anywhere within a row. Body is called
// with (row, column, count): `count` elements, at most `step`, of one row.
template <int step, class Body>
VPFAST_INLINE void for_each_piece(int64_t begin, int64_t end, int64_t row_length, const Body& body) {
  int64_t row = begin / row_length, column = begin % row_length;
  while (begin < end) {
    const int64_t stop = column + (end - begin) < row_length ? column + (end - begin) : row_length;
    begin += stop - column;
    for (; column < stop; column += step) {
      body(row, column, stop - column < step ? static_cast<int>(stop - column) : step);
    }
    ++row;
    column = 0;
  }
}

// A vector's arithmetic is one long chain: a processor that meets it whole fills up with instructions that wait.
//
// h needs c, a chain of two exponentials and two divisions. So a piece of a row gets all its c first, which wait in the
// L1 cache, and then all its h. And vectors go in pairs, two chains side by side.
constexpr int kPiece = 256;

// step(k, count) for each vector of a piece: `count` elements from k on, as many as there are lanes but for the last.
template <int lanes, class Step>
VPFAST_INLINE void for_each_vector(int count, const Step& step) {
  int k = 0;
  for (; k + 2 * lanes <= count; k += 2 * lanes) {
    step(k, lanes);
    step(k + lanes, lanes);
  }
  for (; k < count; k += lanes) step(k, count - k < lanes ? count - k : lanes);
}

template <class TG, class TC>
struct ForwardBody {
  const Problem& p;

  VPFAST_INLINE void operator()(int64_t row, int64_t column, int count) const {
    using V = typename Lanes<TG>::type;
    const TG* gates = static_cast<const TG*>(p.gates) + row * p.gates_stride + column;
    const TC* c_prev = static_cast<const TC*>(p.c_prev) + row * p.c_prev_stride + column;
    TG* h = static_cast<TG*>(p.h) + row * p.row_length + column;
    TC* c = static_cast<TC*>(p.c) + row * p.row_length + column;

    V cell[kPiece / V::lanes];
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      const V state =
          cell_state(Lanes<TG>::load(gates + p.offset_f + k, part), Lanes<TG>::load(gates + p.offset_i + k, part),
                     Lanes<TG>::load(gates + p.offset_g + k, part), Lanes<TC>::load(c_prev + k, part));
      cell[k / V::lanes] = state;
      prefetch_to_write(c + k);
      Lanes<TC>::store(c + k, state, part);
    });
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      prefetch_to_write(h + k);
      Lanes<TG>::store(h + k, hidden_state(Lanes<TG>::load(gates + p.offset_o + k, part), cell[k / V::lanes]), part);
    });
  }
};

template <class TG, class TC>
struct BackwardBody {
  const Problem& p;

  VPFAST_INLINE void operator()(int64_t row, int64_t column, int count) const {
    using V = typename Lanes<TG>::type;
    const TG* gates = static_cast<const TG*>(p.gates) + row * p.gates_stride + column;
    const TC* c_prev = static_cast<const TC*>(p.c_prev) + row * p.c_prev_stride + column;
    const TG* grad_h = p.grad_h ? static_cast<const TG*>(p.grad_h) + row * p.grad_h_stride + column : nullptr;
    const TC* grad_c = p.grad_c ? static_cast<const TC*>(p.grad_c) + row * p.grad_c_stride + column : nullptr;
    TG* grad_gates = static_cast<TG*>(p.grad_gates) + row * 4 * p.row_length + column;
    TC* grad_c_prev = static_cast<TC*>(p.grad_c_prev) + row * p.row_length + column;

    Recomputed<V> recomputed[kPiece / V::lanes];
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      recomputed[k / V::lanes] =
          recompute(Lanes<TG>::load(gates + p.offset_f + k, part), Lanes<TG>::load(gates + p.offset_i + k, part),
                    Lanes<TG>::load(gates + p.offset_g + k, part), Lanes<TC>::load(c_prev + k, part));
    });
    for_each_vector<V::lanes>(count, [&](int k, int part) VPFAST_INLINE_LAMBDA {
      const V dh = grad_h ? Lanes<TG>::load(grad_h + k, part) : V::broadcast(0);
      const V dc = grad_c ? Lanes<TC>::load(grad_c + k, part) : V::broadcast(0);
      const Gradients<V> d = gradients(recomputed[k / V::lanes], Lanes<TG>::load(gates + p.offset_o + k, part), dh, dc);
      prefetch_to_write(grad_gates + p.offset_f + k);
      prefetch_to_write(grad_gates + p.offset_i + k);
      prefetch_to_write(grad_gates + p.offset_o + k);
      prefetch_to_write(grad_gates + p.offset_g + k);
      prefetch_to_write(grad_c_prev + k);
      Lanes<TG>::store(grad_gates + p.offset_f + k, d.f, part);
      Lanes<TG>::store(grad_gates + p.offset_i + k, d.i, part);
      Lanes<TG>::store(grad_gates + p.offset_o + k, d.o, part);
      Lanes<TG>::store(grad_gates + p.offset_g + k, d.g, part);
      Lanes<TC>::store(grad_c_prev + k, d.c_prev, part);
    });
  }
};

// --- short rows ---
//
// Few channels, channels_last: a row is less than a register. Whole rows, as many as a piece has room for, are put
// one behind the other, gate by gate, and are one row then; outputs lie like that already but for gradients of gates.

constexpr int64_t kShortRow = 15;

template <size_t unit>
VPFAST_INLINE void move_rows(const char* from, int64_t from_stride, char* to, int64_t to_stride, int64_t rows,
                             int64_t bytes) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    for (int64_t k = 0; k < bytes; k += unit) __builtin_memcpy(to + k, from + k, unit);
  }
}

// `rows` rows of `length`, from some elements apart to some elements apart.
template <class T>
VPFAST_INLINE void move_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
                             int64_t length) {
  constexpr int64_t size = sizeof(T);
  const int64_t bytes = length * size;
  const auto move = bytes % 32 == 0   ? move_rows<32>
                    : bytes % 16 == 0 ? move_rows<16>
                    : bytes % 8 == 0  ? move_rows<8>
                                      : move_rows<sizeof(T)>;
  move(reinterpret_cast<const char*>(from), from_stride * size, reinterpret_cast<char*>(to), to_stride * size, rows,
       bytes);
}

// A problem of one row in place of `rows` rows of `p` from `first` on, in room of its own.
template <class TG, class TC>
class RowOfRows {
 public:
  RowOfRows(const Problem& p, int64_t first, int64_t rows) : p_(p), q_(p), first_(first), rows_(rows) {
    const int64_t length = p.row_length;
    q_.row_length = rows * length;
    q_.offset_f = 0;
    q_.offset_i = kPiece;
    q_.offset_o = 2 * kPiece;
    q_.offset_g = 3 * kPiece;
    for (int64_t k = 0; k < 4; ++k) {
      const TG* gate = static_cast<const TG*>(p.gates) + first * p.gates_stride + offset(k);
      move_rows(gate, p.gates_stride, gates_ + k * kPiece, length, rows, length);
    }
    q_.gates = gates_;
    q_.c_prev = in_a_row(static_cast<const TC*>(p.c_prev), p.c_prev_stride, c_prev_);
  }

  void forward() {
    q_.h = static_cast<TG*>(p_.h) + first_ * p_.row_length;
    q_.c = static_cast<TC*>(p_.c) + first_ * p_.row_length;
    ForwardBody<TG, TC>{q_}(0, 0, static_cast<int>(q_.row_length));
  }
  void backward() {
    const int64_t length = p_.row_length;
    q_.grad_h = in_a_row(static_cast<const TG*>(p_.grad_h), p_.grad_h_stride, grad_h_);
    q_.grad_c = in_a_row(static_cast<const TC*>(p_.grad_c), p_.grad_c_stride, grad_c_);
    q_.grad_gates = grad_gates_;
    q_.grad_c_prev = static_cast<TC*>(p_.grad_c_prev) + first_ * length;
    BackwardBody<TG, TC>{q_}(0, 0, static_cast<int>(q_.row_length));
    for (int64_t k = 0; k < 4; ++k) {
      TG* gate = static_cast<TG*>(p_.grad_gates) + first_ * 4 * length + offset(k);
      move_rows(grad_gates_ + k * kPiece, length, gate, 4 * length, rows_, length);
    }
  }

 private:
  int64_t offset(int64_t k) const {
    return k == 0 ? p_.offset_f : k == 1 ? p_.offset_i : k == 2 ? p_.offset_o : p_.offset_g;
  }
  template <class T>
  const T* in_a_row(const T* from, int64_t stride, T* room) const {
    if (!from) return nullptr;
    from += first_ * stride;
    if (stride == p_.row_length) return from;
    move_rows(from, stride, room, p_.row_length, rows_, p_.row_length);
    return room;
  }

  const Problem& p_;
  Problem q_;
  int64_t first_, rows_;
  alignas(64) TG gates_[4 * kPiece];
  alignas(64) TG grad_gates_[4 * kPiece];
  alignas(64) TG grad_h_[kPiece];
  alignas(64) TC grad_c_[kPiece];
  alignas(64) TC c_prev_[kPiece];
};

// whole(first, rows) for the whole rows of [begin, end) where they are short, part(begin, end) for everything else.
template <class Whole, class Part>
VPFAST_INLINE void split_by_rows(const Problem& p, int64_t begin, int64_t end, const Whole& whole, const Part& part) {
  const int64_t length = p.row_length;
  int64_t first = (begin + length - 1) / length, last = end / length;
  if (length > kShortRow || first >= last) return part(begin, end);
  part(begin, first * length);
  for (const int64_t many = kPiece / length; first < last; first += many) whole(first, std::min(many, last - first));
  part(last * length, end);
}

template <class TG, class TC>
void forward(const Problem& p, int64_t begin, int64_t end) {
  split_by_rows(
      p, begin, end, [&](int64_t first, int64_t rows) { RowOfRows<TG, TC>(p, first, rows).forward(); },
      [&](int64_t from, int64_t to) { for_each_piece<kPiece>(from, to, p.row_length, ForwardBody<TG, TC>{p}); });
}

template <class TG, class TC>
void backward(const Problem& p, int64_t begin, int64_t end) {
  split_by_rows(
      p, begin, end, [&](int64_t first, int64_t rows) { RowOfRows<TG, TC>(p, first, rows).backward(); },
      [&](int64_t from, int64_t to) { for_each_piece<kPiece>(from, to, p.row_length, BackwardBody<TG, TC>{p}); });
}
