// Matrix tiles (AMX): eight registers of 16 rows of 64 bytes, and a product of two of them into a third.
//
// tile(c) += tile(a) tile(b) of bfloat16, summed in float32: a holds 16 rows of 32 numbers; b 16 rows of 16 pairs, row
// i the numbers 2 i and 2 i + 1 of 16 columns; c 16 rows of 16 floats. Written as assembly, since the compiler's own
// functions do not say that they read and write memory.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "instruments/seen.h"

#if defined(VPFAST_HAS_X86_ISAS)

#define VPFAST_TILE_ZERO(c) asm volatile("tilezero %%tmm" #c::: "memory")
#define VPFAST_TILE_LOAD(c, from, bytes) VPFAST_TILE_READ("tileloadd", c, from, bytes)
// The same, of what is not soon read again: it takes no room in the L1 cache.
#define VPFAST_TILE_PASS(c, from, bytes) VPFAST_TILE_READ("tileloaddt1", c, from, bytes)
#define VPFAST_TILE_READ(instruction, c, from, bytes)                                                         \
  do {                                                                                                        \
    vpfast::seen_read(from, 16, bytes, 64);                                                                   \
    asm volatile(instruction " (%0,%1,1), %%tmm" #c::"r"(from), "r"(static_cast<int64_t>(bytes)) : "memory"); \
  } while (false)
#define VPFAST_TILE_STORE(c, to, bytes)                                                                       \
  do {                                                                                                        \
    asm volatile("tilestored %%tmm" #c ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(bytes)) : "memory"); \
    vpfast::seen_written(to, 16, bytes, 64);                                                                  \
  } while (false)
#define VPFAST_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")

namespace vpfast {

// All eight tiles whole, for the thread that calls, until it releases them.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

}  // namespace vpfast

#endif
