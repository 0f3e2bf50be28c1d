// Division by a number that all threads of a kernel divide by, known on the host.
//
// GPUs have no instruction for it: a 64-bit division is a subroutine of about 80, whose call also makes the compiler
// put registers aside in memory. With 2^(63 + s) / d worked out beforehand, 2^s being the power of two not below d, it
// is a multiplication and a shift (Granlund and Montgomery, "Division by invariant integers using multiplication").
#pragma once

#include <cstdint>

#include "common/everywhere.h"

namespace vpfast {

class Divisor {
 public:
  explicit Divisor(int64_t d) {  // d >= 1
    while ((int64_t{1} << shift_) < d) ++shift_;
    magic_ = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (63 + shift_)) / d) + 1;
  }

  // n / d for n >= 0
  VPFAST_EVERYWHERE int64_t divide(int64_t n) const {
    const uint64_t twice = static_cast<uint64_t>(n) << 1;
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(twice, magic_);
#else
    const uint64_t high = static_cast<uint64_t>((static_cast<unsigned __int128>(twice) * magic_) >> 64);
#endif
    return static_cast<int64_t>(high >> shift_);
  }

 private:
  uint64_t magic_;
  int shift_ = 0;
};

}  // namespace vpfast
