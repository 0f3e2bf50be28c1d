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

// Selects one by name, for the whole process; "auto" returns to the best. Throws std::invalid_argument for a name that
// is unknown or that this processor does not run.
void select_isa(const std::string& name);

// The processor features that decide, with what was found.
std::vector<std::pair<std::string, bool>> cpu_features();

}  // namespace vpfast
