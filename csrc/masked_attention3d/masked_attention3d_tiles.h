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

struct Packing {
  int64_t length, dim, planes, blocks, face;  // elements in a face

  Packing(const Problem<float>& p, int pieces)
      : length(p.mask.length()),
        dim(p.dim),
        planes(p.planes()),
        blocks((length + kBlock - 1) / kBlock),
        face(round_up(dim, 32) / 32 * pieces * 2 * kTileElements) {}

  // Planes go in waves, so that what is packed of them is read before memory has long forgotten it, and takes little of
  // it: as few as keep all threads busy, and no less than 1 MB. Results do not depend on it.
  int64_t at_once(int64_t units_of_plane, int64_t faces_of_block) const {
    const auto over = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t busy = over(2 * torch::stable::get_num_threads(), units_of_plane);
    const int64_t worth_it = over(1 << 19, blocks * faces_of_block * face);
    return least(planes, most(busy, worth_it));
  }

  Tensor faces(int64_t planes_at_once, int64_t of_block) const {
    return torch::stable::empty({planes_at_once * blocks * of_block * face}, ScalarType::Short);
  }

  // Calls body(plane, block, block of the wave) for every one.
  template <class Body>
  void each(const Wave& wave, const Body& body) const {
    torch::stable::parallel_for(0, wave.count * blocks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(wave.first + i / blocks, i % blocks, i);
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
  const std::vector<Interval> tiles = tiles_of(p.mask, 16, kBlock);
  const int64_t count = static_cast<int64_t>(tiles.size()), at_once = packing.at_once(count, 2);
  const int64_t scratch = std::max(on_tiles::ForwardTiles<pieces>::scratch(p.dim), kBlock * (2 * p.dim + kKeys + 2));
  const Tensor packed = packing.faces(at_once, 2);
  std::vector<float> keys(at_once * packing.blocks), values(keys.size()), longest_keys(at_once);
  p.blocks = packing.blocks;
  p.packed = data_of(packed);
  p.longest_key_squared = longest_keys.data();
  for (Wave wave{0, at_once}; wave.first < packing.planes; wave.first += at_once) {
    wave.count = least(at_once, packing.planes - wave.first);
    packing.each(wave, [&](int64_t plane, int64_t block, int64_t i) {
      on_tiles::pack_for_forward<pieces>(packing.block(p.plane(p.k, plane), block),
                                         packing.block(p.plane(p.v, plane), block),
                                         data_of(packed) + i * 2 * packing.face, &keys[i], &values[i]);
    });
    if (!in_range(keys) || !in_range(values)) return false;
    for (int64_t i = 0; i < wave.count; ++i) {
      longest_keys[i] = *std::max_element(&keys[i * packing.blocks], &keys[i * packing.blocks] + packing.blocks);
    }
    p.first_plane = wave.first;
    share<float>(count * wave.count, threads_for(p.mask, wave.count, p.dim), scratch, true,
                 [&](int64_t unit, float* memory) {
                   // A plane's keys and values stay in the L2 cache while all its queries pass.
                   const int64_t plane = wave.first + unit / count;
                   const Interval& tile = tiles[count - 1 - unit % count];
                   on_tiles::forward_on_tiles<pieces>(p, plane, tile.begin, tile.end - tile.begin, memory);
                 });
  }
  return true;
}

bool forward_on_tiles(Forward<float>& p, int pieces) {
  return pieces == 2 ? forward_on_tiles<2>(p) : forward_on_tiles<3>(p);
}

// What a wave's faces are packed into, and the squares of the longest of each block.
struct BackwardFaces {
  Tensor keys, queries;
  std::vector<float> longest_keys, longest_values, longest_queries;

  BackwardFaces(const Packing& packing, int64_t at_once)
      : keys(packing.faces(at_once, TileBackward::kKeyFaces)),
        queries(packing.faces(at_once, TileBackward::kQueryFaces)),
        longest_keys(at_once * packing.blocks),
        longest_values(longest_keys.size()),
        longest_queries(longest_keys.size()) {}

  template <int pieces>
  bool pack(const Backward<float>& p, const Packing& packing, const Wave& wave, float grad_unit) {
    packing.each(wave, [&](int64_t plane, int64_t block, int64_t i) {
      on_tiles::pack_keys<pieces>(packing.block(p.plane(p.k, plane), block), packing.block(p.plane(p.v, plane), block),
                                  data_of(keys) + i * TileBackward::kKeyFaces * packing.face, &longest_keys[i],
                                  &longest_values[i]);
      on_tiles::pack_queries<pieces>(
          packing.block(p.plane(p.q, plane), block), packing.block(p.grad_out + plane * packing.length * p.dim, block),
          grad_unit, data_of(queries) + i * TileBackward::kQueryFaces * packing.face, &longest_queries[i]);
    });
    return in_range(longest_keys) && in_range(longest_values) && in_range(longest_queries);
  }
};

// `out`: of the forward pass.
template <int pieces>
bool backward_on_tiles(Backward<float>& p, const float* out) {
  const Packing packing(p, pieces);
  const int64_t length = packing.length, positions = packing.planes * packing.blocks * kBlock;
  std::vector<float> lse(positions), delta(positions), grads(packing.planes * packing.blocks);
  packing.each({0, packing.planes}, [&](int64_t plane, int64_t block, int64_t i) {
    on_tiles::measure_grads(packing.block(p.grad_out + plane * length * p.dim, block),
                            packing.block(out + plane * length * p.dim, block), &delta[i * kBlock], &grads[i]);
  });
  const float longest = *std::max_element(grads.begin(), grads.end());
  if (!all_finite(grads.data(), grads.size()) || !(longest >= std::numeric_limits<float>::min())) return false;
  const float grad_unit = std::ldexp(1.0f, std::ilogb(longest) / 2);
  packing.each({0, packing.planes}, [&](int64_t plane, int64_t block, int64_t i) {
    for (int64_t row = 0; row < least(kBlock, length - block * kBlock); ++row) {
      lse[i * kBlock + row] = p.lse[plane * length + block * kBlock + row] * 1.44269504f;
      delta[i * kBlock + row] /= grad_unit;
    }
  });
  std::vector<Sight> sights;
  for (int64_t first = 0; first < length; first += kBlock) {
    sights.push_back(sight_of(p.mask, first, least(kBlock, length - first)));
  }

  p.padded_length = packing.blocks * kBlock;
  p.padded_dim = round_up(p.dim, 32);
  Mask whole = p.mask;
  whole.line = Line::sequence;
  const Blocks blocks(whole, kBlock, packing.planes);
  const int64_t at_once = packing.at_once(blocks.groups, TileBackward::kKeyFaces + TileBackward::kQueryFaces);
  const Tensor groups = grad_q_groups(p, blocks, at_once);
  p.grad_q_groups = static_cast<float*>(groups.mutable_data_ptr());
  BackwardFaces faces(packing, at_once);
  TileBackward tiles{packing.blocks, sights.data(), 0,        data_of(faces.keys), data_of(faces.queries),
                     lse.data(),     delta.data(),  grad_unit};
  for (Wave wave{0, at_once}; wave.first < packing.planes; wave.first += at_once) {
    wave.count = least(at_once, packing.planes - wave.first);
    if (!faces.pack<pieces>(p, packing, wave, grad_unit)) return false;
    tiles.first_plane = wave.first;
    collect(p, blocks, wave, on_tiles::BackwardTiles<pieces>::scratch(p.dim, 0),
            on_tiles::BackwardTiles<pieces>::scratch(p.dim, 1), p.scale * grad_unit, true,
            [&](int64_t plane, float* grad_q, int64_t first, int64_t last, float* memory) {
              on_tiles::backward_on_tiles<pieces>(p, tiles, plane, grad_q, first, last, memory);
            });
  }
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
