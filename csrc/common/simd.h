// Vectors of one instruction set, and the elementary functions on them. Included by for_each_isa.h, once for each.
//
// `F32` is a register of floats (4, 8 or 16) on the compiler's own vector types, so one source serves every width.
// `F64` is a single double: float64 is there to check gradients with, and takes the C library's functions.
//
// exp(x) = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2. It is handed out in two parts, `scale` = 2^n and
// `q` = 2^n (e^r - 1), because exp = scale + q and expm1 = (scale - 1) + q: the second keeps its relative accuracy near
// 0, where tanh needs it.
//
// sigmoid and tanh are written on e = exp(-|x|) <= 1, so that nothing overflows, both tails keep their relative
// accuracy, and the derivatives need no 1 - y, which cancels. They come as numerator and denominator: a product of two
// of them then costs one division. Below e^-87.7, under the smallest normal number, e is 0. NaN passes through.

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

struct ExpParts {
  F32 scale, q;
};

// exp(x) for x <= 0, in its two parts.
VPFAST_INLINE ExpParts exp_parts(F32 x) {
  constexpr float kLowest = -88.0f;  // n = -127 there, whose bit pattern is zero
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest mantissa bits
  // Minimax fit of (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2; relative error of e^r 3.1e-9.
  constexpr float kP0 = 0.49999994f, kP1 = 0.16666521f, kP2 = 0.041668389f, kP3 = 0.0083687454f, kP4 = 0.0013814541f;

  const FloatLanes v = x.v < kLowest ? F32::broadcast(kLowest).v : x.v;  // a NaN fails the comparison and is kept
  const FloatLanes shifted = v * kLog2E + kRound;
  const FloatLanes n = shifted - kRound;
  const FloatLanes r = (v - n * kLn2High) - n * kLn2Low;
  const FloatLanes p = (((kP4 * r + kP3) * r + kP2) * r + kP1) * r + kP0;
  const FloatLanes em1 = r * r * p + r;
  const IntLanes scale_bits = ((IntLanes)shifted + 127) << 23;
  const FloatLanes scale = (FloatLanes)scale_bits;
  return {{scale}, {em1 * scale}};
}

VPFAST_INLINE F32 minus_magnitude(F32 x) { return {(FloatLanes)((IntLanes)x.v | (int32_t)0x80000000)}; }

VPFAST_INLINE F32 with_sign_of(F32 x, F32 sign) {
  return {(FloatLanes)((IntLanes)x.v | ((IntLanes)sign.v & (int32_t)0x80000000))};
}

// y(x) = top / bottom and dy/dx = slope / bottom^2.
struct Ratio {
  F32 top, bottom, slope;
};

VPFAST_INLINE Ratio sigmoid(F32 x) {
  const ExpParts parts = exp_parts(minus_magnitude(x));
  const F32 e = parts.scale + parts.q;
  const F32 one = F32::broadcast(1.0f);
  return {{x.v < 0.0f ? e.v : one.v}, one + e, e};
}

VPFAST_INLINE Ratio tanh(F32 x) {
  const F32 one = F32::broadcast(1.0f);
  const ExpParts parts = exp_parts(2.0f * minus_magnitude(x));
  const F32 em1 = (parts.scale - one) + parts.q;
  const F32 e = parts.scale + parts.q;
  return {with_sign_of(F32::broadcast(0.0f) - em1, x), one + e, 4.0f * e};
}

VPFAST_INLINE F32 value(Ratio a) { return a.top / a.bottom; }
VPFAST_INLINE F32 product(Ratio a, Ratio b) { return (a.top * b.top) / (a.bottom * b.bottom); }

struct ValueAndSlope {
  F32 value, slope;
};

VPFAST_INLINE ValueAndSlope value_and_slope(Ratio a) {
  const F32 reciprocal = F32::broadcast(1.0f) / a.bottom;
  return {a.top * reciprocal, a.slope * (reciprocal * reciprocal)};
}

struct F64 {
  double v;

  static constexpr int lanes = 1;
  static VPFAST_INLINE F64 broadcast(double x) { return {x}; }
};

VPFAST_INLINE F64 operator+(F64 a, F64 b) { return {a.v + b.v}; }
VPFAST_INLINE F64 operator*(F64 a, F64 b) { return {a.v * b.v}; }

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
VPFAST_INLINE void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 2048); }

template <class T>
struct Lanes;  // the vector that a stored type is worked on in

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
  static VPFAST_INLINE void store(float* p, F32 x, int count) {
    if (count == kLanes) {
      std::memcpy(p, &x.v, sizeof x.v);
    } else {
      std::memcpy(p, &x.v, sizeof(float) * count);
    }
  }
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

template <class T>
VPFAST_INLINE void store_16bit(T* p, ShortLanes bits, int count) {
  if (count == kLanes) {
    std::memcpy(p, &bits, sizeof bits);
  } else {
    std::memcpy(p, &bits, sizeof(T) * count);
  }
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
    store_16bit(p, __builtin_convertvector(x.v == x.v ? rounded : quiet_nan, ShortLanes), count);
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
    store_16bit(p, bits, count);
  }
};
