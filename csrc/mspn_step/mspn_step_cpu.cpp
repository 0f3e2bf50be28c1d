// mspn_step on the CPU: what an MSPN does between two frames, in one call, on matrix tiles (AMX).
//
// Story. An MSPN's step is about a hundred convolutions, and little besides. Called one by one they reach some 330
// GFLOP/s on two cores in float32, which is what the vector units give; matrix tiles multiply bfloat16 sixteen times as
// fast, and a float is the sum of three bfloat16. So maps are kept in pieces (mspn_step_program.h), and a convolution
// is a sum of products of tiles: 32 pixels by 32 output channels stay in four tiles while kernel positions and input
// channels pass. Six products of pieces for one of floats leave 2.7 times the vector units' rate, three of two pieces
// (sixteen bits) 5.3 times, and one 16 times.
//
// A sum of several maps costs nothing more, so nothing is concatenated: the residual path of a Bottleneck, a decoder's
// skip, and the parts of a level's input are further parts of the same sum. Bias, activation, and the split into pieces
// come while a block is in the L1 cache. All threads do every instruction together and meet at its end.
//
// Where there are no matrix tiles torch's convolutions serve (vpfast/models/mspn/cpu.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "common/aligned.h"
#include "common/amx.h"
#include "common/isa.h"
#include "common/team.h"
#include "mspn_step/mspn_step_program.h"

namespace vpfast::mspn_step {

constexpr float kLeak = 0.01f;  // slope of every LeakyReLU in MSPN

// The tensors of a call, by the numbers that addresses hold.
class Bases {
 public:
  void add(const torch::stable::Tensor& tensor) { bases_.push_back(static_cast<char*>(tensor.data_ptr())); }
  template <class X>
  const X* read(Address address) const {
    return reinterpret_cast<const X*>(bases_[address >> 56] + (address & kOffset));
  }
  template <class X>
  X* write(Address address) const {
    return reinterpret_cast<X*>(bases_[address >> 56] + (address & kOffset));
  }

 private:
  static constexpr Address kOffset = (Address{1} << 56) - 1;
  std::vector<char*> bases_{nullptr};  // address 0 stands for nothing
};

}  // namespace vpfast::mspn_step

#if defined(VPFAST_HAS_X86_ISAS)

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "torch/headeronly/util/BFloat16.h"
#include "torch/headeronly/util/Half.h"

#define VPFAST_INLINE inline __attribute__((always_inline))
#define VPFAST_INLINE_LAMBDA __attribute__((always_inline))
#define VPFAST_ISA_LEVEL 2
// Every processor with matrix tiles has these.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace vpfast::mspn_step::amx {
#include "common/simd.h"
#include "mspn_step/mspn_step_kernel.h"
}  // namespace vpfast::mspn_step::amx
#pragma GCC pop_options
#undef VPFAST_ISA_LEVEL

#endif

namespace vpfast::mspn_step {
namespace {

using torch::stable::Tensor;

void mspn_step(Tensor program, Tensor arena, Tensor state, Tensor weights, Tensor frame, int64_t pieces,
               int64_t threads) {
#if defined(VPFAST_HAS_X86_ISAS)
  STD_TORCH_CHECK(tiles_are_active(),
                  "mspn_step: this processor, or the instruction set selected, has no matrix tiles");
  STD_TORCH_CHECK(program.scalar_type() == torch::headeronly::ScalarType::Long && program.is_contiguous(),
                  "mspn_step: a program is int64");
  Bases bases;
  for (const Tensor& tensor : {arena, state, weights, frame}) {
    STD_TORCH_CHECK(tensor.is_contiguous(), "mspn_step: memory must be contiguous");
    bases.add(tensor);
  }
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>(threads, torch::stable::get_num_threads()));
  const auto run = pieces == 1 ? amx::run<1> : pieces == 2 ? amx::run<2> : amx::run<3>;
  constexpr int64_t kScratch = amx::kBlock * amx::kBlock;
  AlignedVector<float> scratch(members * kScratch);
  const auto* code = static_cast<const int64_t*>(program.data_ptr());
  together(members, [&](int64_t rank, int64_t size, Barrier& barrier) {
    run(code, program.numel(), amx::Worker{bases, rank, size, scratch.data() + rank * kScratch}, barrier);
  });
#else
  STD_TORCH_CHECK(false, "mspn_step: this processor has no matrix tiles");
#endif
}

}  // namespace
}  // namespace vpfast::mspn_step

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) { m.impl("mspn_step", TORCH_BOX(&vpfast::mspn_step::mspn_step)); }
