// Vectors of one instruction set, and the elementary functions on them. Included by for_each_isa.h, once for each,
// and by what is compiled for one alone.
//
// `F32` is a register of floats (4, 8 or 16) on the compiler's own vector types, so one source serves every width.
// `F64` is a single double: float64 is there to check gradients with, and takes the C library's functions.
//
// e^-v = 2^n e^-s with n = round(-v / ln 2) and s = v + n ln 2, |s| <= ln 2 / 2; e^-s is a polynomial.
//
// sigmoid is 1 / (1 + e^-x), with x held within +-88, where e^88 is still finite. tanh alone is x P(x^2) / Q(x^2); with
// its slope it is written on e^-2|x| - 1, computed as such, which keeps its relative accuracy near 0 too and gives the
// slope without 1 - y^2, which cancels. All come as numerator and denominator: a product of two then costs one
// division. NaN passes through.

constexpr int kBytes = VPFAST_ISA_LEVEL == 2 ? 64 : VPFAST_ISA_LEVEL == 1 ? 32 : 16;
constexpr int kLanes = kBytes / 4;

typedef float FloatLanes __attribute__((vector_size(kBytes)));
typedef int32_t IntLanes __attribute__((vector_size(kBytes)));
typedef uint32_t UintLanes __attribute__((vector_size(kBytes)));
typedef uint16_t ShortLanes __attribute__((vector_size(kBytes / 2)));

struct F32 {
  FloatLanes v;

  static constexpr int lanes = kLanes;
  static VPFAST_INLINE F32 broadcast(float x) { return {x - FloatLanes{}}; }
};

VPFAST_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
VPFAST_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
VPFAST_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
VPFAST_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
VPFAST_INLINE F32 operator*(float a, F32 b) { return {a * b.v}; }

// 1 / x for x from 2^-10 on. Where a division takes as long as ten multiplications (512-bit registers), an estimate
// good to 14 bits and a Newton step give the same to within one unit in the last place.
VPFAST_INLINE F32 reciprocal(F32 x) {
#if VPFAST_ISA_LEVEL == 2
  const FloatLanes estimate = (FloatLanes)_mm512_rcp14_ps((__m512)x.v);
  return {estimate + estimate * (1.0f - x.v * estimate)};
#else
  return {1.0f / x.v};
#endif
}

// The nearer of x and the ends of [least, most]; a NaN stays.
VPFAST_INLINE F32 clamp(F32 x, float least, float most) {
#if VPFAST_ISA_LEVEL == 2
  return {(FloatLanes)_mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(least), (__m512)x.v))};
#elif VPFAST_ISA_LEVEL == 1
  return {(FloatLanes)_mm256_min_ps(_mm256_set1_ps(most), _mm256_max_ps(_mm256_set1_ps(least), (__m256)x.v))};
#else
  const FloatLanes above = x.v < least ? F32::broadcast(least).v : x.v;
  return {above > most ? F32::broadcast(most).v : above};
#endif
}

// v = -n ln 2 + s, for |v| <= 88.
struct Reduced {
  FloatLanes shifted, n, s;
};

VPFAST_INLINE Reduced reduce(F32 v) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest mantissa bits
  const FloatLanes shifted = kRound - v.v * kLog2E;
  const FloatLanes n = shifted - kRound;
#if VPFAST_ISA_LEVEL > 0
  const FloatLanes s = v.v + n * 0.693147182f;  // fused: the product is not rounded
#else
  const FloatLanes s = (v.v + n * 0.693359375f) - n * 2.12194440e-4f;  // the first product is exact
#endif
  return {shifted, n, s};
}

// x 2^n
VPFAST_INLINE FloatLanes scaled(FloatLanes x, const Reduced& by) {
#if VPFAST_ISA_LEVEL == 2
  return (FloatLanes)_mm512_scalef_ps((__m512)x, (__m512)by.n);
#else
  const IntLanes bits = ((IntLanes)by.shifted + 127) << 23;
  return x * (FloatLanes)bits;
#endif
}

// Minimax fit of (e^-s - 1 + s) / s^2 on |s| <= ln 2 / 2; relative error of e^-s 3.1e-9.
constexpr float kP0 = 0.49999994f, kP1 = -0.16666521f, kP2 = 0.041668389f, kP3 = -0.0083687454f, kP4 = 0.0013814541f;

VPFAST_INLINE FloatLanes polynomial(FloatLanes s) { return (((kP4 * s + kP3) * s + kP2) * s + kP1) * s + kP0; }

// b where one is NaN. One instruction, of which the compiler makes two: it may not assume that there is no NaN.
VPFAST_INLINE F32 maximum(F32 a, F32 b) {
#if VPFAST_ISA_LEVEL == 2
  return {(FloatLanes)_mm512_max_ps((__m512)a.v, (__m512)b.v)};
#elif VPFAST_ISA_LEVEL == 1
  return {(FloatLanes)_mm256_max_ps((__m256)a.v, (__m256)b.v)};
#else
  return {a.v > b.v ? a.v : b.v};
#endif
}

// x where a = b, else y.
VPFAST_INLINE F32 where_equal(F32 a, F32 b, F32 x, F32 y) { return {a.v == b.v ? x.v : y.v}; }

VPFAST_INLINE float total(F32 x) {
  float sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += x.v[k];
  return sum;
}

// Of each of as many vectors as there are lanes, the sum of its lanes. `x` is overwritten.
VPFAST_INLINE F32 totals(F32* x) {
  IntLanes even{}, odd{};
  for (int k = 0; k < kLanes; ++k) {
    even[k] = 2 * k;
    odd[k] = 2 * k + 1;
  }
#pragma GCC unroll 4
  for (int count = kLanes / 2; count >= 1; count /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k) {
      const FloatLanes a = x[2 * k].v, b = x[2 * k + 1].v;
      x[k] = {__builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd)};
    }
  }
  return x[0];
}

// 2^x for x <= 127; exactly 0 below -126. Relative error 1.1e-7: 2^x = 2^n 2^f, |f| <= 1/2, with a minimax fit of 2^f.
VPFAST_INLINE F32 exp2(F32 x) {
  constexpr float k1 = 0.6931470f, k2 = 0.24022242f, k3 = 0.05550734f, k4 = 0.009671513f, k5 = 0.0013264718f;
#if VPFAST_ISA_LEVEL == 2
  const FloatLanes n = (FloatLanes)_mm512_roundscale_ps((__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float kRound = 12582912.0f;
  const FloatLanes shifted = x.v + kRound;
  const FloatLanes n = shifted - kRound;
#endif
  const FloatLanes f = x.v - n;
  const FloatLanes y = ((((k5 * f + k4) * f + k3) * f + k2) * f + k1) * f + 1.0f;
#if VPFAST_ISA_LEVEL == 2
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {(FloatLanes)_mm512_maskz_scalef_ps(some, (__m512)y, (__m512)n)};
#else
  const IntLanes bits = ((IntLanes)shifted + 127) << 23;
  return {x.v < -126.0f ? FloatLanes{} : y * (FloatLanes)bits};
#endif
}

VPFAST_INLINE F32 magnitude(F32 x) { return {(FloatLanes)((IntLanes)x.v & (int32_t)0x7fffffff)}; }

VPFAST_INLINE F32 with_sign_of(F32 x, F32 sign) {
  return {(FloatLanes)((IntLanes)x.v | ((IntLanes)sign.v & (int32_t)0x80000000))};
}

// y(x) = top / bottom and dy/dx = slope / bottom^2. Bottoms multiply to less than the largest float.
struct Ratio {
  F32 top, bottom, slope;
};

VPFAST_INLINE Ratio sigmoid(F32 x) {
  const Reduced v = reduce(clamp(x, -88.0f, 88.0f));
  const F32 e = {scaled((polynomial(v.s) * v.s - 1.0f) * v.s + 1.0f, v)};
  return {F32::broadcast(1.0f), F32::broadcast(1.0f) + e, e};
}

// tanh(x), not yet worked out: its value alone takes half the instructions of value and slope.
struct Tanh {
  F32 x;
};

VPFAST_INLINE Tanh tanh(F32 x) { return {x}; }

// Minimax fit on |x| <= 9.02, from where tanh rounds to 1; there both are 1, exactly. Relative error 3.8e-8, with every
// rounding at most 2.7 units in the last place, which may go past 1 by one. The bottom is at least 2^-9.
VPFAST_INLINE Ratio without_slope(Tanh y) {
  const FloatLanes x = clamp(y.x, -9.02f, 9.02f).v, u = x * x;
  const FloatLanes p =
      (((3.16300215e-11f * u + 4.88817093e-08f) * u + 8.29763758e-06f) * u + 3.17741680e-04f) * u + 2.37480109e-03f;
  const FloatLanes q =
      (((1.84332405e-09f * u + 7.79669620e-07f) * u + 6.14386518e-05f) * u + 1.10934163e-03f) * u + 2.37480109e-03f;
  return {F32{x * p}, F32{q}, F32{}};
}

VPFAST_INLINE Ratio with_slope(Tanh y) {
  const Reduced v = reduce(clamp(2.0f * magnitude(y.x), 0.0f, 88.0f));
  const F32 scale = {scaled(F32::broadcast(1.0f).v, v)};
  const F32 q = F32{polynomial(v.s) * (v.s * v.s) - v.s} * scale;
  const F32 em1 = q + (scale - F32::broadcast(1.0f));  // e^-2|x| - 1
  return {with_sign_of(F32::broadcast(0.0f) - em1, y.x), F32::broadcast(2.0f) + em1, 4.0f * (scale + q)};
}

VPFAST_INLINE F32 value(Ratio a) { return a.top * reciprocal(a.bottom); }
VPFAST_INLINE F32 product(Ratio a, Tanh b) {
  const Ratio c = without_slope(b);
  return (a.top * c.top) * reciprocal(a.bottom * c.bottom);
}

struct ValueAndSlope {
  F32 value, slope;
};

VPFAST_INLINE ValueAndSlope value_and_slope(Ratio a) {
  const F32 r = reciprocal(a.bottom);
  return {a.top * r, (a.slope * r) * r};
}
VPFAST_INLINE ValueAndSlope value_and_slope(Tanh a) { return value_and_slope(with_slope(a)); }

struct F64 {
  double v;

  static constexpr int lanes = 1;
  static VPFAST_INLINE F64 broadcast(double x) { return {x}; }
};

VPFAST_INLINE F64 operator+(F64 a, F64 b) { return {a.v + b.v}; }
VPFAST_INLINE F64 operator-(F64 a, F64 b) { return {a.v - b.v}; }
VPFAST_INLINE F64 operator*(F64 a, F64 b) { return {a.v * b.v}; }
VPFAST_INLINE F64 maximum(F64 a, F64 b) { return a.v > b.v ? a : b; }
VPFAST_INLINE F64 where_equal(F64 a, F64 b, F64 x, F64 y) { return a.v == b.v ? x : y; }
VPFAST_INLINE double total(F64 x) { return x.v; }
VPFAST_INLINE F64 totals(F64* x) { return x[0]; }
VPFAST_INLINE F64 exp2(F64 x) { return {std::exp2(x.v)}; }

struct ValueAndSlope64 {
  F64 value, slope;
};

VPFAST_INLINE ValueAndSlope64 sigmoid(F64 x) {
  const double e = std::exp(-std::fabs(x.v)), y = (x.v < 0 ? e : 1.0) / (1.0 + e);
  return {{y}, {e / ((1.0 + e) * (1.0 + e))}};
}
VPFAST_INLINE ValueAndSlope64 tanh(F64 x) {
  const double y = std::tanh(x.v);
  return {{y}, {(1.0 - y) * (1.0 + y)}};
}
VPFAST_INLINE F64 value(ValueAndSlope64 a) { return a.value; }
VPFAST_INLINE F64 product(ValueAndSlope64 a, ValueAndSlope64 b) { return a.value * b.value; }
VPFAST_INLINE ValueAndSlope64 value_and_slope(ValueAndSlope64 a) { return a; }

// Memory. `count` <= lanes elements are read or written; lanes beyond it are zero. One load serves the full and the
// partial vector, so that an element's arithmetic is the same instruction sequence wherever the row happens to be cut.

// A kernel reads more arrays side by side than the processor's own prefetchers follow well: 2 KB ahead is 10 % of the
// time of a large problem (benchmarks/NOTES.md). Reading ahead of the end is harmless.
VPFAST_INLINE void prefetch(const void* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 2048));
}

// A store to memory that no cache holds waits for it. Asked for ahead it is there: another 10 %.
VPFAST_INLINE void prefetch_to_write(void* p) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(p) + 2048;
#if defined(__x86_64__)
  asm volatile("prefetchw (%0)" ::"r"(ahead));
#else
  __builtin_prefetch(reinterpret_cast<const void*>(ahead), 1);
#endif
}

template <class T>
struct Lanes;  // the vector that a stored type is worked on in

template <class Bits>
VPFAST_INLINE void write(void* p, Bits bits, size_t bytes) {
  if (bytes == sizeof(Bits)) {
    std::memcpy(p, &bits, sizeof(Bits));
  } else {
    std::memcpy(p, &bits, bytes);
  }
}

template <>
struct Lanes<double> {
  using type = F64;
  static VPFAST_INLINE F64 load(const double* p, int) { return {*p}; }
  static VPFAST_INLINE void store(double* p, F64 x, int) { *p = x.v; }
};

template <>
struct Lanes<float> {
  using type = F32;
  static VPFAST_INLINE F32 load(const float* p, int count) {
    prefetch(p);
    F32 x{};
    if (count == kLanes) {
      std::memcpy(&x.v, p, sizeof x.v);
    } else {
      std::memcpy(&x.v, p, sizeof(float) * count);
    }
    return x;
  }
  static VPFAST_INLINE void store(float* p, F32 x, int count) { write(p, x.v, sizeof(float) * count); }
};

template <class T>
VPFAST_INLINE ShortLanes load_16bit(const T* p, int count) {
  prefetch(p);
  ShortLanes bits{};
  if (count == kLanes) {
    std::memcpy(&bits, p, sizeof bits);
  } else {
    std::memcpy(&bits, p, sizeof(T) * count);
  }
  return bits;
}

template <>
struct Lanes<torch::headeronly::BFloat16> {
  using T = torch::headeronly::BFloat16;
  using type = F32;
  static VPFAST_INLINE F32 load(const T* p, int count) {
    return {(FloatLanes)(__builtin_convertvector(load_16bit(p, count), UintLanes) << 16)};
  }
  static VPFAST_INLINE void store(T* p, F32 x, int count) {
    const UintLanes bits = (UintLanes)x.v;
    const UintLanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const UintLanes quiet_nan = (bits >> 16) | 0x40;
    write(p, __builtin_convertvector(x.v == x.v ? rounded : quiet_nan, ShortLanes), sizeof(T) * count);
  }
};

template <>
struct Lanes<torch::headeronly::Half> {
  using T = torch::headeronly::Half;
  using type = F32;
  static VPFAST_INLINE F32 load(const T* p, int count) {
    const ShortLanes bits = load_16bit(p, count);
#if VPFAST_ISA_LEVEL == 2
    return {(FloatLanes)_mm512_cvtph_ps((__m256i)bits)};
#elif VPFAST_ISA_LEVEL == 1
    return {(FloatLanes)_mm256_cvtph_ps((__m128i)bits)};
#else
    F32 x;
    for (int k = 0; k < kLanes; ++k) x.v[k] = static_cast<float>(T(bits[k], T::from_bits()));
    return x;
#endif
  }
  static VPFAST_INLINE void store(T* p, F32 x, int count) {
#if VPFAST_ISA_LEVEL == 2
    const ShortLanes bits = (ShortLanes)_mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT);
#elif VPFAST_ISA_LEVEL == 1
    const ShortLanes bits = (ShortLanes)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT);
#else
    ShortLanes bits;
    for (int k = 0; k < kLanes; ++k) bits[k] = T(x.v[k]).x;
#endif
    write(p, bits, sizeof(T) * count);
  }
};

// Of the working type itself, and with nothing fetched ahead: what is small and stays in the cache.
VPFAST_INLINE F32 load(const float* p) {
  F32 x;
  std::memcpy(&x.v, p, sizeof x.v);
  return x;
}
VPFAST_INLINE F64 load(const double* p) { return {*p}; }
VPFAST_INLINE void store(float* p, F32 x) { std::memcpy(p, &x.v, sizeof x.v); }
VPFAST_INLINE void store(double* p, F64 x) { *p = x.v; }

VPFAST_INLINE F32 load_part(const float* p, int count) {
  if (count == kLanes) return load(p);
  F32 x{};
  std::memcpy(&x.v, p, sizeof(float) * count);
  return x;
}
VPFAST_INLINE F64 load_part(const double* p, int) { return {*p}; }
VPFAST_INLINE void store_part(float* p, F32 x, int count) { write(p, x.v, sizeof(float) * count); }
VPFAST_INLINE void store_part(double* p, F64 x, int) { *p = x.v; }
