// What one call of masked_attention3d is about, as its kernels see it.
#pragma once

#include <cstdint>

#include "masked_attention3d/masked_attention3d_math.h"

namespace vpfast::masked_attention3d {

// A block of keys, and of queries in the backward pass, is at most this long: what is kept of it stays in the L1 cache.
constexpr int64_t kKeys = 64;
constexpr int64_t kQueries = 32;

// Lanes of a tile: no instruction set has more than 3 registers of 16.
constexpr int64_t kMaxTile = 48;

// Elements of a matrix tile: 16 rows of 32.
constexpr int64_t kTileElements = 512;

// (B, heads, L, d) in the working type, with rows of d elements one after another; strides in elements.
template <class W>
struct Rows {
  const W* data;
  int64_t batch, head;
};

template <class W>
struct Problem {
  Mask mask;
  int64_t batch, heads, dim;
  W scale;
  Rows<W> q, k, v;
  bool careful;  // something is not finite, so that 0 times it must be kept from spreading

  int64_t planes() const { return batch * heads; }
  const W* plane(const Rows<W>& rows, int64_t i) const {
    return rows.data + i / heads * rows.batch + i % heads * rows.head;
  }
};

// Forward: out (B, heads, L, d) and lse (B, heads, L), dense.
template <class W>
struct Forward : Problem<W> {
  W *out, *lse;
  // On matrix tiles, of the planes from `first_plane` on: blocks of 32 keys in each, their keys and values (planes,
  // blocks, 2, faces), and the square of the longest key (planes,).
  int64_t first_plane, blocks;
  const uint16_t* packed;
  const float* longest_key_squared;
};

// Backward: everything (B, heads, L, d) dense but q, k, v; lse and delta (B, heads, L). The gradient of q is collected
// by groups of key blocks first, each in rows of its own: (groups, planes, padded_length, padded_dim), some planes at a
// time.
template <class W>
struct Backward : Problem<W> {
  const W *grad_out, *lse, *delta;
  W *grad_q, *grad_k, *grad_v, *grad_q_groups;
  int64_t padded_length, padded_dim;
};

// What backward reads on matrix tiles, in blocks of 32 positions (see masked_attention3d_amx.h): of each block of keys,
// and of queries, so many faces.
struct TileBackward {
  static constexpr int64_t kKeyLanes = 0, kKeyPairs = 1, kValueLanes = 2, kKeyFaces = 3;
  static constexpr int64_t kQueryRows = 0, kGradRows = 1, kQueryColumns = 2, kGradColumns = 3, kQueryFaces = 4;

  int64_t blocks;                  // of a plane
  const Sight* sights;             // of the queries of a block
  int64_t first_plane;             // of those whose faces are here
  const uint16_t *keys, *queries;  // (planes, blocks, faces)
  const float *lse, *delta;        // (B x heads, blocks, 32), the former in powers of 2
  float grad_unit;                 // what gradients are measured in, a power of 2 near the largest
};

// Decode: `count` queries at `positions`, keys and values where they lie in their caches, of the stored type.
struct Stored {
  const void* data;
  int64_t batch, head, row, column;
};

template <class W>
struct Decode {
  Mask mask;
  int64_t batch, heads, dim, count;
  W scale;
  const int64_t* positions;
  Stored q, k, v;  // k, v: column is 1
  void* out;       // (B, heads, count, d), dense

  int64_t planes() const { return batch * heads; }
  template <class T>
  const T* plane(const Stored& from, int64_t i) const {
    return static_cast<const T*>(from.data) + i / heads * from.batch + i % heads * from.head;
  }
};

}  // namespace vpfast::masked_attention3d
