// tile_program on the CPU: a convolutional network, or a step of one, in one call, on matrix tiles (AMX).
//
// Story. What an MSPN does between two frames is about a hundred convolutions, and little besides; an HR-VQVAE's
// encoder is nothing else. Called one by one they reach some 330 GFLOP/s on two cores in float32, which is what the
// vector units give; matrix tiles multiply bfloat16 sixteen times as fast, and a float is the sum of three bfloat16. So
// maps are kept in pieces (tile_program.h), and a convolution is a sum of products of tiles: 32 pixels by 32 output
// channels stay in four tiles while kernel positions and input channels pass. Six products of pieces for one of floats
// leave 2.7 times the vector units' rate, three of two pieces (sixteen bits) 5.3 times, and one 16 times.
//
// A sum of several maps costs nothing more, so nothing is concatenated: the residual path of a block, a decoder's skip,
// and the parts of a level's input are further parts of the same sum, and so are the pixels that a stride leaves out
// for others. Bias, activation, and the split into pieces of one block come between the products of the next, for which
// the vector units are idle. All threads do every instruction together and meet at its end.
//
// Where there are no matrix tiles an MSPN has vpfast.nn.convolution (vpfast/models/mspn/cpu.py), an encoder torch's
// convolutions (vpfast/models/shrvqvae/fused.py).

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
#include "tile_program/tile_program.h"

namespace vpfast::tile_program {

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

}  // namespace vpfast::tile_program

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
namespace vpfast::tile_program::amx {
#include "common/simd.h"
#include "tile_program/tile_program_kernel.h"
}  // namespace vpfast::tile_program::amx
#pragma GCC pop_options
#undef VPFAST_ISA_LEVEL

#endif

namespace vpfast::tile_program {
namespace {

using torch::stable::Tensor;

void tile_program(Tensor program, Tensor arena, Tensor state, Tensor weights, Tensor frame, int64_t pieces,
                  int64_t threads) {
#if defined(VPFAST_HAS_X86_ISAS)
  STD_TORCH_CHECK(tiles_are_active(),
                  "tile_program: this processor, or the instruction set selected, has no matrix tiles");
  STD_TORCH_CHECK(program.scalar_type() == torch::headeronly::ScalarType::Long && program.is_contiguous(),
                  "tile_program: a program is contiguous int64");
  Bases bases;
  for (const Tensor& tensor : {arena, state, weights, frame}) {
    STD_TORCH_CHECK(tensor.is_contiguous(), "tile_program: memory must be contiguous");
    bases.add(tensor);
  }
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>(threads, torch::stable::get_num_threads()));
  const auto run = pieces == 1 ? amx::run<1> : pieces == 2 ? amx::run<2> : amx::run<3>;
  const auto* code = static_cast<const int64_t*>(program.data_ptr());
  together(members, [&](int64_t rank, int64_t size, Barrier& barrier) {
    thread_local AlignedVector<float> scratch(amx::kScratch);  // kept: giving pages back costs more than a small step
    run(code, program.numel(), amx::Worker{bases, rank, size, scratch.data()}, barrier);
  });
#else
  STD_TORCH_CHECK(false, "tile_program: this processor has no matrix tiles");
#endif
}

}  // namespace
}  // namespace vpfast::tile_program

STABLE_TORCH_LIBRARY_IMPL(vpfast, CPU, m) { m.impl("tile_program", TORCH_BOX(&vpfast::tile_program::tile_program)); }
