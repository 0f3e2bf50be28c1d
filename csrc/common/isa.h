// Which instruction set the CPU kernels use.
//
// Every CPU kernel is compiled once for each entry of `Isa` (see for_each_isa.h) and kept in a table indexed by it; the
// best one that the processor runs is taken, unless a test selects another.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VPFAST_HAS_X86_ISAS 1
#endif

#include <array>
#include <string>
#include <utility>
#include <vector>

namespace vpfast {

enum class Isa { plain = 0, avx2 = 1, avx512 = 2 };

constexpr int kIsaCount = 3;
constexpr std::array<const char*, kIsaCount> kIsaNames = {"plain", "avx2", "avx512"};

// The one in use: the best that this processor runs, or the one that was selected.
Isa active_isa();

// Whether kernels that have a version on matrix tiles (amx.h) take it: where the processor has them, the operating
// system lets us, and neither is a lower instruction set selected. Then active_isa() is avx512.
bool tiles_are_active();

// Whether kernels that have a version with AVX-512's dot products of bfloat16 take it: where active_isa() is avx512 and
// the processor has them.
bool bfloat16_is_active();

// "plain", "avx2", "avx512" or, where tiles are active, "amx".
std::string active_isa_name();

// Selects one by such a name, for the whole process; "auto" returns to the best. Throws std::invalid_argument for a
// name that is unknown or that this processor does not run.
void select_isa(const std::string& name);

// The processor features that decide, with what was found.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace vpfast
