// masked_attention3d on matrix tiles, as seen from outside: what is packed for them, what they are spared, and how the
// work is shared. Included by masked_attention3d_cpu.cpp.

#if defined(VPFAST_HAS_X86_ISAS)

namespace on_tiles = avx512::masked_attention3d;

// Components come by 32: where fewer than five eighths of them are there, registers are faster.
bool tiles_serve(const Problem<float>& p) {
  return tiles_are_active() && p.scale != 0 && 8 * p.dim >= 5 * round_up(p.dim, 32);
}

// How many bfloat16 a number of this type is taken for. bfloat16 is one itself, but weights rounded to one would be
// less accurate than those of PyTorch's own kernel.
int pieces_of(ScalarType type) { return type == ScalarType::Float ? 3 : 2; }

// Whether products of such numbers, with weights too, stay well within the range of floats, their third pieces
// included; what is not finite does not. Tiles take nothing else.
bool in_range(const std::vector<float>& squared) {
  constexpr float kMost = 0x1p60f;
  float longest = 0;
  for (const float x : squared) {
    if (!(x <= kMost)) return false;
    longest = std::max(longest, x);
  }
  return longest == 0 || longest >= 1 / kMost;
}

float largest(const std::vector<float>& numbers) { return *std::max_element(numbers.begin(), numbers.end()); }

struct Packing {
  int64_t length, dim, planes, blocks, face;  // elements in a face

  Packing(const Problem<float>& p, int pieces)
      : length(p.mask.length()),
        dim(p.dim),
        planes(p.planes()),
        blocks((length + kBlock - 1) / kBlock),
        face(round_up(dim, 32) / 32 * pieces * 2 * kTileElements) {}

  Tensor faces(int64_t of_block) const {
    return torch::stable::empty({planes * blocks * of_block * face}, ScalarType::Short);
  }

  // Calls body(plane, block, plane * blocks + block) for every one.
  template <class Body>
  void each(const Body& body) const {
    torch::stable::parallel_for(0, planes * blocks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / blocks, i % blocks, i);
    });
  }

  on_tiles::Source block(const float* plane, int64_t i) const {
    return {plane + i * kBlock * dim, least(kBlock, length - i * kBlock), dim};
  }
};

uint16_t* data_of(const Tensor& faces) { return static_cast<uint16_t*>(faces.mutable_data_ptr()); }

template <int pieces>
bool forward_on_tiles(Forward<float>& p) {
  const Packing packing(p, pieces);
  const Tensor packed = packing.faces(2);
  std::vector<float> keys(packing.planes * packing.blocks), values(keys.size());
  packing.each([&](int64_t plane, int64_t block, int64_t i) {
    on_tiles::pack_for_forward<pieces>(packing.block(p.plane(p.k, plane), block),
                                       packing.block(p.plane(p.v, plane), block),
                                       data_of(packed) + i * 2 * packing.face, &keys[i], &values[i]);
  });
  if (!in_range(keys) || !in_range(values)) return false;
  p.blocks = packing.blocks;
  p.packed = data_of(packed);
  p.longest_key_squared = largest(keys);
  const std::vector<Interval> tiles = tiles_of(p.mask, 16, kBlock);
  const int64_t count = static_cast<int64_t>(tiles.size());
  const int64_t scratch = std::max(on_tiles::ForwardTiles<pieces>::scratch(p.dim), kBlock * (2 * p.dim + kKeys + 2));
  share<float>(count * packing.planes, threads_for(p.mask, packing.planes, p.dim), scratch, true,
               [&](int64_t unit, float* memory) {
                 // A plane's keys and values stay in the L2 cache while all its queries pass.
                 const int64_t plane = unit / count;
                 const Interval& tile = tiles[count - 1 - unit % count];
                 on_tiles::forward_on_tiles<pieces>(p, plane, tile.begin, tile.end - tile.begin, memory);
               });
  return true;
}

bool forward_on_tiles(Forward<float>& p, int pieces) {
  return pieces == 2 ? forward_on_tiles<2>(p) : forward_on_tiles<3>(p);
}

// `out`: of the forward pass.
template <int pieces>
bool backward_on_tiles(Backward<float>& p, const float* out) {
  const Packing packing(p, pieces);
  const int64_t length = packing.length, planes = packing.planes, positions = planes * packing.blocks * kBlock;
  std::vector<float> lse(positions), delta(positions), keys(planes * packing.blocks), values(keys.size()),
      queries(keys.size()), grads(keys.size());
  const auto grads_of = [&](const float* from, int64_t plane, int64_t block) {
    return packing.block(from + plane * length * p.dim, block);
  };
  packing.each([&](int64_t plane, int64_t block, int64_t i) {
    on_tiles::measure_grads(grads_of(p.grad_out, plane, block), grads_of(out, plane, block), &delta[i * kBlock],
                            &grads[i]);
  });
  const float longest = largest(grads);
  if (!all_finite(grads.data(), grads.size()) || !(longest >= std::numeric_limits<float>::min())) return false;
  TileBackward tiles{};
  tiles.grad_unit = std::ldexp(1.0f, std::ilogb(longest) / 2);

  const Tensor key_faces = packing.faces(TileBackward::kKeyFaces);
  const Tensor query_faces = packing.faces(TileBackward::kQueryFaces);
  packing.each([&](int64_t plane, int64_t block, int64_t i) {
    on_tiles::pack_keys<pieces>(packing.block(p.plane(p.k, plane), block), packing.block(p.plane(p.v, plane), block),
                                data_of(key_faces) + i * TileBackward::kKeyFaces * packing.face, &keys[i], &values[i]);
    on_tiles::pack_queries<pieces>(packing.block(p.plane(p.q, plane), block), grads_of(p.grad_out, plane, block),
                                   tiles.grad_unit, data_of(query_faces) + i * TileBackward::kQueryFaces * packing.face,
                                   &queries[i]);
    for (int64_t row = 0; row < least(kBlock, length - block * kBlock); ++row) {
      lse[i * kBlock + row] = p.lse[plane * length + block * kBlock + row] * 1.44269504f;
      delta[i * kBlock + row] /= tiles.grad_unit;
    }
  });
  if (!in_range(keys) || !in_range(values) || !in_range(queries)) return false;
  std::vector<Sight> sights;
  for (int64_t first = 0; first < length; first += kBlock) {
    sights.push_back(sight_of(p.mask, first, least(kBlock, length - first)));
  }
  tiles.blocks = packing.blocks;
  tiles.sights = sights.data();
  tiles.keys = data_of(key_faces);
  tiles.queries = data_of(query_faces);
  tiles.lse = lse.data();
  tiles.delta = delta.data();

  p.padded_length = packing.blocks * kBlock;
  p.padded_dim = round_up(p.dim, 32);
  Mask whole = p.mask;
  whole.line = Line::sequence;
  collect(p, Blocks(whole, kBlock, planes), on_tiles::BackwardTiles<pieces>::scratch(p.dim, 0),
          on_tiles::BackwardTiles<pieces>::scratch(p.dim, 1), p.scale * tiles.grad_unit, true,
          [&](int64_t plane, float* grad_q, int64_t first, int64_t last, float* memory) {
            on_tiles::backward_on_tiles<pieces>(p, tiles, plane, grad_q, first, last, memory);
          });
  return true;
}

bool backward_on_tiles(Backward<float>& p, const float* out, int pieces) {
  return pieces == 2 ? backward_on_tiles<2>(p, out) : backward_on_tiles<3>(p, out);
}

#else

bool tiles_serve(const Problem<float>&) { return false; }
int pieces_of(ScalarType) { return 3; }
bool forward_on_tiles(Forward<float>&, int) { return false; }
bool backward_on_tiles(Backward<float>&, const float*, int) { return false; }

#endif
