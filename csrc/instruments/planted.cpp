// Errors made on purpose, for tests that the instruments see what they are there for: each beside the same without the
// error. Only a build with an instrument has them, as operators of the library vpfast_planted.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>

#include "common/amx.h"
#include "common/isa.h"
#include "common/team.h"
#include "instruments/seen.h"

namespace vpfast::planted {
namespace {

using torch::stable::Tensor;

// Writes element `index`, wherever that is.
void write(Tensor memory, int64_t index) { static_cast<volatile float*>(memory.mutable_data_ptr())[index] = 1; }

// Asking is what makes the system let us.
void need_tiles() { STD_TORCH_CHECK(tiles_are_active(), "this processor has no matrix tiles"); }

// Loads a matrix tile of 1024 bytes, `missing` of them beyond the end.
void load_tile(Tensor memory, int64_t missing) {
#if defined(VPFAST_HAS_X86_ISAS)
  need_tiles();
  configure_tiles();
  VPFAST_TILE_LOAD(0, static_cast<const char*>(memory.const_data_ptr()) + memory.numel() * 4 - 1024 + missing, 64);
  release_tiles();
#else
  need_tiles();
#endif
}

// 1 shifted by as many bits as there are elements.
int64_t shift(Tensor memory) {
  volatile int64_t one = 1, bits = memory.numel();
  return one << bits;
}

// Members of a team each write an element, and read the next one's: after they met, or right away. Then all elements
// are read when the team is done. The number of threads that took part.
int64_t team(Tensor memory, int64_t members, bool meet) {
  auto* elements = static_cast<volatile float*>(memory.mutable_data_ptr());
  std::atomic<int64_t> entered{0};
  together(members, [&](int64_t rank, int64_t size, Barrier& barrier) {
    entered.fetch_add(1, std::memory_order_relaxed);
    elements[rank] = 1;
    if (meet) barrier.wait(size);
    (void)elements[(rank + 1) % size];
  });
  for (int64_t i = 0; i < memory.numel(); ++i) (void)elements[i];
  return entered;
}

// Threads of one region all write the same element: with a tile, which the instrument has to be told of.
void store_tiles(Tensor memory, int64_t members, int64_t apart) {
#if defined(VPFAST_HAS_X86_ISAS)
  need_tiles();
  auto* elements = static_cast<float*>(memory.mutable_data_ptr());
  together(members, [&](int64_t rank, int64_t, Barrier&) {
    configure_tiles();
    VPFAST_TILE_ZERO(0);
    VPFAST_TILE_STORE(0, elements + rank * apart, 64);
    release_tiles();
  });
#else
  need_tiles();
#endif
}

}  // namespace
}  // namespace vpfast::planted

STABLE_TORCH_LIBRARY(vpfast_planted, m) {
  m.def("write(Tensor memory, int index) -> ()");
  m.def("load_tile(Tensor memory, int missing) -> ()");
  m.def("shift(Tensor memory) -> int");
  m.def("team(Tensor memory, int members, bool meet) -> int");
  m.def("store_tiles(Tensor memory, int members, int apart) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vpfast_planted, CPU, m) {
  m.impl("write", TORCH_BOX(&vpfast::planted::write));
  m.impl("load_tile", TORCH_BOX(&vpfast::planted::load_tile));
  m.impl("shift", TORCH_BOX(&vpfast::planted::shift));
  m.impl("team", TORCH_BOX(&vpfast::planted::team));
  m.impl("store_tiles", TORCH_BOX(&vpfast::planted::store_tiles));
}
