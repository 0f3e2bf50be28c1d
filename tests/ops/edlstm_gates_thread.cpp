// The CUDA kernels' threads one after another on the host: what test_edlstm_gates_thread.py compiles and calls.
//
// 2^y and 1 / x are wrong here by as much as a GPU's instructions may be: up to 2 units in the last place and up to 1.

#include <cmath>
#include <cstdint>
#include <cstring>

inline float wrong_by_at_most(int units, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (!std::isnormal(x) || (bits & 0x7fffff) == 0) return x;  // powers of two are exact
  const uint32_t any = (bits * 2654435761u) >> 16;
  bits += any % (2 * units + 1) - units;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

#define VPFAST_HOST_EXP2(y) wrong_by_at_most(2, std::exp2(y))
#define VPFAST_HOST_RECIPROCAL(x) wrong_by_at_most(1, 1.0f / (x))

#include "edlstm_gates/edlstm_gates_thread.h"

namespace vpfast {
namespace {

template <int width, class TG, class TC>
void every_item(const Problem& p, bool backward) {
  const auto work = simt::work_of<TG, TC>(p, width);
  for (int64_t item = 0; item < work.items; ++item) {
    if (backward) {
      simt::backward_item<width>(work, item);
    } else {
      simt::forward_item<width>(work, item);
    }
  }
}

// Returns how many elements a thread took.
template <class TG, class TC>
int run(const Problem& p, bool backward, bool one_by_one) {
  constexpr int forward_width = simt::kForwardWidth<TG>, backward_width = simt::kBackwardWidth<TG>;
  const int width = backward ? backward_width : forward_width;
  if (one_by_one || !simt::fits<TG, TC>(p, width)) {
    every_item<1, TG, TC>(p, backward);
    return 1;
  }
  if (backward) {
    every_item<backward_width, TG, TC>(p, true);
  } else {
    every_item<forward_width, TG, TC>(p, false);
  }
  return width;
}

}  // namespace
}  // namespace vpfast

// `fields` are those of Problem, in order; `types` is 'd', 'f', 'h', 'H', 'b' or 'B', of half and bfloat16 the capital
// one beside a float32 cell.
extern "C" int run_threads(const int64_t* fields, char types, int backward, int one_by_one) {
  using namespace vpfast;
  using simt::BFloat16, simt::Half;
  Problem p;
  std::memcpy(&p, fields, sizeof p);
  switch (types) {
    case 'd':
      return run<double, double>(p, backward, one_by_one);
    case 'f':
      return run<float, float>(p, backward, one_by_one);
    case 'h':
      return run<Half, Half>(p, backward, one_by_one);
    case 'H':
      return run<Half, float>(p, backward, one_by_one);
    case 'b':
      return run<BFloat16, BFloat16>(p, backward, one_by_one);
    default:
      return run<BFloat16, float>(p, backward, one_by_one);
  }
}

extern "C" int64_t divided(int64_t n, int64_t d) { return vpfast::Divisor(d).divide(n); }
