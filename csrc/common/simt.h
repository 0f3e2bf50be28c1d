// Numbers of one GPU thread and the elementary functions on them: what simd.h is to the CPU kernels.
//
// `Float` is a float, `F64` a double, which is there to check gradients with and takes the library's functions.
// Products and sums of the operators below are rounded each, never fused by the compiler's choice: an element then gets
// the same bits from every kernel that holds this code, whatever surrounds it. Where a fused product is meant, it says
// so.
//
// sigmoid is 1 / (1 + e^-x), with x held where neither e^-x nor its reciprocal leaves the normal numbers. tanh is
// written on 1 - e^-2|x|, computed so that it keeps its relative accuracy near 0. Both come as numerator and
// denominator, so that a product of two costs one division, and their derivatives are written on the same e and need no
// 1 - y, which cancels. NaN passes through.
//
// A GPU has an instruction for 2^y and one for 1 / x. It starts 16 of these a cycle beside 128 others; at the copy rate
// of an H200 that is, for each element of a kernel that moves 14 bytes, 12 of these and 99 in all. So what a function
// costs is counted beside it.
//
// The host compiles the same code for tests without a GPU. There the C library stands in for the two instructions, or
// what a test defines in its place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/everywhere.h"

#if defined(__CUDACC__)
#define VPFAST_INLINE VPFAST_EVERYWHERE __forceinline__
#else
#define VPFAST_INLINE inline __attribute__((always_inline))
#endif

#if !defined(VPFAST_HOST_EXP2)
#define VPFAST_HOST_EXP2(y) std::exp2(y)
#define VPFAST_HOST_RECIPROCAL(x) (1.0f / (x))
#endif

namespace vpfast::simt {

VPFAST_INLINE float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

VPFAST_INLINE float rounded_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

VPFAST_INLINE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

VPFAST_INLINE double rounded_sum(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

VPFAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

VPFAST_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// 2^y to 2 units in the last place; 0 below 2^-126.
VPFAST_INLINE float power_of_two(float y) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  return VPFAST_HOST_EXP2(y);
#endif
}

// 1 / x to 1 unit in the last place, for x from 1 to 2^126.
VPFAST_INLINE float one_over(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return VPFAST_HOST_RECIPROCAL(x);
#endif
}

// The nearer of x and the ends of [least, most]; a NaN stays. Two instructions, or one where an end cannot be met.
VPFAST_INLINE float at_most(float x, float most) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(most));
  return result;
#else
  return x > most ? most : x;
#endif
}
VPFAST_INLINE float at_least(float x, float least) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(least));
  return result;
#else
  return x < least ? least : x;
#endif
}

// How exact the functions of a Float are: to a few units in the last place of float32, also far out in their tails; or
// well within the rounding of results that are stored in 16 bits, which saves almost half of the instructions.
enum class Exact { to_32_bits, to_16_bits };

template <Exact exact>
struct Float {
  float v;

  static VPFAST_INLINE Float broadcast(float x) { return {x}; }
};

using F32 = Float<Exact::to_32_bits>;
using F16 = Float<Exact::to_16_bits>;

template <Exact exact>
VPFAST_INLINE Float<exact> operator+(Float<exact> a, Float<exact> b) {
  return {rounded_sum(a.v, b.v)};
}
template <Exact exact>
VPFAST_INLINE Float<exact> operator*(Float<exact> a, Float<exact> b) {
  return {rounded_product(a.v, b.v)};
}

// 1 / x for x from 1 to 2^126: one instruction, or three with a Newton step, which leaves half a unit.
VPFAST_INLINE float reciprocal(F16 x) { return one_over(x.v); }
VPFAST_INLINE float reciprocal(F32 x) {
  const float estimate = one_over(x.v);
  return fmaf(estimate, fmaf(-x.v, estimate, 1.0f), estimate);
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// e^-v for |v| <= 86: four instructions. Rounding y = -v / ln 2 loses as many digits as v has before its point; what
// was lost is known exactly, and put back as a factor.
VPFAST_INLINE float falling(float v) {
  const float y = rounded_product(v, -kLog2E);
  const float e = power_of_two(y);
  const float lost = fmaf(y, -kLn2, -v);
  return fmaf(e, lost, e);
}

// e^-x for sigmoid, between 2^-125 and 2^125: the first loses digits in its tails, and takes three instructions, not
// six.
VPFAST_INLINE float exponential(F16 x) { return power_of_two(at_most(rounded_product(x.v, -kLog2E), 125.0f)); }
VPFAST_INLINE float exponential(F32 x) { return falling(at_least(at_most(x.v, 86.0f), -86.0f)); }

// What tanh needs of a >= 0: e = e^-2a, 1 - e and 1 + e.
struct Twice {
  float e, rest, bottom;
};

// By the instruction for 2^y; 1 - e is a minimax fit below 1/16, good to 3e-6. Eight instructions.
VPFAST_INLINE Twice twice(F16 a) {
  const float e = power_of_two(rounded_product(a.v, -2.0f * kLog2E));
  const float fit = fmaf(fmaf(1.27237165f, a.v, -1.99857533f), a.v, 1.99999499f);
  return {e, a.v < 0.0625f ? rounded_product(fit, a.v) : rounded_sum(1.0f, -e), rounded_sum(1.0f, e)};
}

// By simd.h's polynomial, which gives e - 1 as such; as many instructions as the other way with its corrections, and
// free of the error of 2^y, which 1 - e would magnify. With 2a = s - n ln 2 it is e^-2a = 2^n (1 - s + s^2 p(s)).
VPFAST_INLINE Twice twice(F32 a) {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23, and what an exponent of 0 looks like in a float
  const float v = at_most(rounded_sum(a.v, a.v), 86.0f);
  const float shifted = fmaf(v, -kLog2E, kRound);
  const float s = fmaf(rounded_sum(shifted, -kRound), kLn2, v);
  const float scale = float_of(bits_of(shifted) << 23);
  const float high = fmaf(fmaf(0.0013814541f, s, -0.0083687454f), s, 0.041668389f);
  const float p = fmaf(fmaf(high, s, -0.16666521f), s, 0.49999994f);
  const float q = rounded_product(fmaf(p, rounded_product(s, s), -s), scale);
  const float rest = rounded_sum(rounded_sum(1.0f, -scale), -q);
  return {rounded_sum(scale, q), rest, rounded_sum(2.0f, -rest)};
}

// sigmoid(x) = 1 / bottom, its derivative slope / bottom^2.
template <Exact exact>
struct Inverse {
  float bottom, slope;
};

// 4 instructions, or 7.
template <Exact exact>
VPFAST_INLINE Inverse<exact> sigmoid(Float<exact> x) {
  const float e = exponential(x);
  return {rounded_sum(1.0f, e), e};
}

// tanh(x) = top / bottom, its derivative slope / bottom^2. This bottom times that of a sigmoid is at most 2^126.
template <Exact exact>
struct Ratio {
  float top, bottom, slope;
};

// 10 instructions, or 17; one or two more with the slope.
template <Exact exact>
VPFAST_INLINE Ratio<exact> tanh(Float<exact> x) {
  const Twice of = twice(Float<exact>{fabsf(x.v)});
  return {copysignf(of.rest, x.v), of.bottom, rounded_product(4.0f, of.e)};
}

template <Exact exact>
VPFAST_INLINE Float<exact> value(Inverse<exact> a) {
  return {reciprocal(Float<exact>{a.bottom})};
}
template <Exact exact>
VPFAST_INLINE Float<exact> product(Inverse<exact> a, Ratio<exact> b) {
  return {rounded_product(b.top, reciprocal(Float<exact>{rounded_product(a.bottom, b.bottom)}))};
}

template <class V>
struct ValueAndSlope {
  V value, slope;
};

template <Exact exact>
VPFAST_INLINE ValueAndSlope<Float<exact>> value_and_slope(Inverse<exact> a) {
  const float r = reciprocal(Float<exact>{a.bottom});
  return {{r}, {rounded_product(rounded_product(a.slope, r), r)}};
}
template <Exact exact>
VPFAST_INLINE ValueAndSlope<Float<exact>> value_and_slope(Ratio<exact> a) {
  const float r = reciprocal(Float<exact>{a.bottom});
  return {{rounded_product(a.top, r)}, {rounded_product(rounded_product(a.slope, r), r)}};
}

struct F64 {
  double v;

  static VPFAST_INLINE F64 broadcast(double x) { return {x}; }
};

VPFAST_INLINE F64 operator+(F64 a, F64 b) { return {rounded_sum(a.v, b.v)}; }
VPFAST_INLINE F64 operator*(F64 a, F64 b) { return {rounded_product(a.v, b.v)}; }

VPFAST_INLINE ValueAndSlope<F64> sigmoid(F64 x) {
  const double e = ::exp(-::fabs(x.v)), bottom = 1.0 + e;
  return {{(x.v < 0 ? e : 1.0) / bottom}, {e / rounded_product(bottom, bottom)}};
}
VPFAST_INLINE ValueAndSlope<F64> tanh(F64 x) {
  const double y = ::tanh(x.v);
  return {{y}, {rounded_product(rounded_sum(1.0, -y), rounded_sum(1.0, y))}};
}
VPFAST_INLINE F64 value(ValueAndSlope<F64> a) { return a.value; }
VPFAST_INLINE F64 product(ValueAndSlope<F64> a, ValueAndSlope<F64> b) { return a.value * b.value; }
VPFAST_INLINE ValueAndSlope<F64> value_and_slope(ValueAndSlope<F64> a) { return a; }

}  // namespace vpfast::simt
