#include "common/isa.h"

#include <atomic>
#include <stdexcept>

namespace vpfast {
namespace {

bool has(const std::string& feature) {
#if defined(VPFAST_HAS_X86_ISAS)
  // __builtin_cpu_supports takes only literals; it also asks whether the operating system saves the registers.
  if (feature == "avx2") return __builtin_cpu_supports("avx2");
  if (feature == "fma") return __builtin_cpu_supports("fma");
  if (feature == "f16c") return __builtin_cpu_supports("f16c");
  if (feature == "avx512f") return __builtin_cpu_supports("avx512f");
  if (feature == "avx512bw") return __builtin_cpu_supports("avx512bw");
  if (feature == "avx512dq") return __builtin_cpu_supports("avx512dq");
  if (feature == "avx512vl") return __builtin_cpu_supports("avx512vl");
#endif
  (void)feature;
  return false;
}

bool runs(Isa isa) {
  const bool avx2 = has("avx2") && has("fma") && has("f16c");
  const bool avx512 = avx2 && has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl");
  switch (isa) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return true;
  }
}

Isa best() {
  if (runs(Isa::avx512)) return Isa::avx512;
  if (runs(Isa::avx2)) return Isa::avx2;
  return Isa::plain;
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa active_isa() { return selected().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) {
  if (name == "auto") {
    selected() = best();
    return;
  }
  for (int k = 0; k < kIsaCount; ++k) {
    if (name != kIsaNames[k]) continue;
    if (!runs(static_cast<Isa>(k)))
      throw std::invalid_argument("this processor does not run the '" + name + "' kernels");
    selected() = static_cast<Isa>(k);
    return;
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown; choose 'auto', 'plain', 'avx2' or 'avx512'");
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  std::vector<std::pair<std::string, bool>> found;
  for (const char* feature : {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}) {
    found.emplace_back(feature, has(feature));
  }
  return found;
}

}  // namespace vpfast
