// What one call of sample_codes is about, as its kernels see it: the ST-PixelCNN with what is kept of its layers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

#include "common/team.h"
#include "masked_attention3d/masked_attention3d_math.h"

namespace vpfast::sample_codes {

using masked_attention3d::Mask;
using torch::headeronly::BFloat16;

// A network's weights, what is kept of its layers, and the factors of its products are of type W; sums and all that is
// not a factor of this one.
template <class W>
using Worked = std::conditional_t<std::is_same_v<W, BFloat16>, float, W>;

// Products take so many terms of a sum at once: pairs of bfloat16.
template <class W>
constexpr int64_t kTerms = std::is_same_v<W, BFloat16> ? 2 : 1;

// Keys and values lie in blocks of this many: keys (dim / terms, keys, terms), values (dim, keys).
template <class W>
constexpr int64_t kKeyBlock = 16 * kTerms<W>;

// Queries look at this many keys at a time, which the L1 cache holds with their values.
template <class W>
constexpr int64_t kChunk = 128 * kTerms<W>;

// At most so many positions are evaluated together.
constexpr int64_t kRun = 16;

constexpr int64_t kMaxDepths = 16;
constexpr int64_t kMaxTaps = 16;

// y = x matrix + bias, the matrix (in / terms, out, terms).
template <class W>
struct Affine {
  const W *matrix, *bias;
  int64_t in, out;
};

template <class W>
struct Norm {
  const W *weight, *bias;
};

// A masked convolution: its inputs (clips, cells, channels), what past frames say about this one (clips, H W, out), and
// the present taps as a matrix (taps x channels, out), with the cells they are found in (H W, taps), `shift` further.
template <class W>
struct Conv {
  W* inputs;
  const W* frame;
  Affine<W> taps;
  const int64_t *cells, *own;
  int64_t count, channels, total, shift;
};

template <class W>
struct Attention {
  Norm<W> norm1, norm2;
  Affine<W> qkv, output, widen, narrow;
  W *keys, *values;  // (clips, heads, blocks, a block) each
  int64_t heard;     // where its answers are among those of all attentions
};

template <class W>
struct Block {
  Norm<W> norm;
  Conv<W> conv;
  Affine<W> out;
  const Attention<W>* attention;  // null where none follows
};

template <class W>
struct Network {
  int64_t channels, depths, first_depth, last_depth, codebook_size;
  int64_t hidden;                   // the longest vector
  const W* embeddings[kMaxDepths];  // (M, channels) each; null where the stem does not look at that layer
  Affine<W> mix;
  Conv<W> stem;
  const Block<W>* blocks;
  int64_t block_count, attention_count;
  int64_t heads, head_dim;
  const Mask* masks;  // of heads 0 .. in turn
  int64_t mask_count;
  Norm<W> norm;
  const W* parents[kMaxDepths];  // (M, channels); null where deeper layers do not look at that one
  Affine<W> mlp1, mlp2, logits[kMaxDepths];
};

// Members of a team work on one clip together and wait for each other.

struct Member {
  int64_t rank, size;
  Barrier* barrier;
};

template <class W>
struct Problem {
  Network<W> network;
  int64_t length, cells, time;  // T H W, H W, the frame
  int64_t* codes;               // (clips, T H W, n)
  const int64_t* keys;          // (clips, 2), of the random stream
  double temperature;
  int64_t top_k;
  int64_t run;  // positions evaluated together; 0: as many as pay
};

// Working memory: of a team, of a member, and of a member whatever the type.
template <class W>
struct Memory {
  Worked<W>*shared, *own;
  W* factors;
  int64_t* verdicts;  // the team's, kRun
  double* scores;     // codebook_size
};

inline int64_t whole_lines(int64_t elements) { return (elements + 15) / 16 * 16; }

template <class W>
int64_t heard_elements(const Network<W>& net) {
  return net.attention_count * whole_lines(net.heads * net.head_dim);
}

template <class W>
int64_t shared_elements(const Network<W>& net) {
  return kRun * (2 * whole_lines(net.channels) + whole_lines(net.hidden) + heard_elements(net));
}

template <class W>
int64_t own_elements(const Network<W>& net) {
  const int64_t rows = whole_lines(net.channels) + whole_lines(4 * net.hidden);
  return kRun * (rows + (net.head_dim + 1) * 16);
}

// Factors of products that are not kept: inputs at the taps, what was rounded to be multiplied, queries, weights.
template <class W>
int64_t factor_elements(const Network<W>& net) {
  const int64_t rounded = kTerms<W> == 1 ? 0 : whole_lines(net.hidden);
  return kRun * (whole_lines(kMaxTaps * net.channels) + rounded + whole_lines(net.head_dim)) + 4 * kChunk<W>;
}

}  // namespace vpfast::sample_codes
