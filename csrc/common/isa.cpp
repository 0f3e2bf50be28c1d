#include "common/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(VPFAST_HAS_X86_ISAS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
  if (feature == "avx512_bf16") return __builtin_cpu_supports("avx512bf16");
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

// AMX with bfloat16: the processor's word (leaf 7: bits 22 and 24 of edx), and Linux's leave to use the large
// registers, which is asked for once and holds for the whole process.
bool runs_tiles() {
#if defined(VPFAST_HAS_X86_ISAS) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!runs(Isa::avx512) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::atomic<bool>& tiles() {
  static std::atomic<bool> active{runs_tiles()};
  return active;
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa active_isa() { return selected().load(std::memory_order_relaxed); }

bool tiles_are_active() { return tiles().load(std::memory_order_relaxed); }

bool bfloat16_is_active() {
  static const bool found = has("avx512_bf16");
  return found && active_isa() == Isa::avx512;
}

std::string active_isa_name() { return tiles_are_active() ? "amx" : kIsaNames[static_cast<int>(active_isa())]; }

void select_isa(const std::string& name) {
  if (name == "auto") {
    selected() = best();
    tiles() = runs_tiles();
    return;
  }
  if (name == "amx") {
    if (!runs_tiles()) throw std::invalid_argument("this processor does not run the 'amx' kernels");
    selected() = Isa::avx512;
    tiles() = true;
    return;
  }
  for (int k = 0; k < kIsaCount; ++k) {
    if (name != kIsaNames[k]) continue;
    if (!runs(static_cast<Isa>(k)))
      throw std::invalid_argument("this processor does not run the '" + name + "' kernels");
    selected() = static_cast<Isa>(k);
    tiles() = false;
    return;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is unknown; choose 'auto', 'plain', 'avx2', 'avx512' or 'amx'");
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  std::vector<std::pair<std::string, bool>> found;
  for (const char* feature : {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}) {
    found.emplace_back(feature, has(feature));
  }
  found.emplace_back("amx_bf16", runs_tiles());
  return found;
}

}  // namespace vpfast
