// Compiles one kernel file once for each instruction set.
//
//   #define VPFAST_KERNEL_FILE "my_op/my_op_kernel.h"
//   #include "common/for_each_isa.h"
//
// includes my_op_kernel.h three times, inside the namespaces vpfast::plain, vpfast::avx2 and vpfast::avx512, each with
// simd.h for that width and with the compiler allowed those instructions. The kernel file has no include guard,
// includes nothing but parts of itself, and defines everything it uses there: code shared between the three would be
// compiled for only one of them. On other processors, and with compilers that lack the pragma, only `plain` exists.

#include "common/isa.h"

#if defined(VPFAST_HAS_X86_ISAS)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "torch/headeronly/util/BFloat16.h"
#include "torch/headeronly/util/Half.h"

#define VPFAST_INLINE inline __attribute__((always_inline))
#define VPFAST_INLINE_LAMBDA __attribute__((always_inline))

#define VPFAST_ISA_LEVEL 0
namespace vpfast::plain {
#include "common/simd.h"
#include VPFAST_KERNEL_FILE
}  // namespace vpfast::plain
#undef VPFAST_ISA_LEVEL

#if defined(VPFAST_HAS_X86_ISAS)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define VPFAST_ISA_LEVEL 1
namespace vpfast::avx2 {
#include "common/simd.h"
#include VPFAST_KERNEL_FILE
}  // namespace vpfast::avx2
#undef VPFAST_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define VPFAST_ISA_LEVEL 2
namespace vpfast::avx512 {
#include "common/simd.h"
#include VPFAST_KERNEL_FILE
}  // namespace vpfast::avx512
#undef VPFAST_ISA_LEVEL
#pragma GCC pop_options

#else

namespace vpfast {
namespace avx2 = plain;
namespace avx512 = plain;
}  // namespace vpfast

#endif
