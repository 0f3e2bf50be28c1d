// How a GPU thread reads and writes its elements: a few consecutive ones in accesses of 8 or 16 bytes, or one alone.
//
// The host compiles the same code, for tests without a GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simt.h"
#include "torch/headeronly/util/BFloat16.h"
#include "torch/headeronly/util/Half.h"

namespace vpfast::simt {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The bits of an access: 2 or 4 words, or one element alone.
template <int count>
struct alignas(4 * count) Words {
  uint32_t words[count];
};

template <int bytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = unsigned long long;
};

// The accesses that `count` elements of `size` bytes are read in.
template <int count, int size>
struct AccessOf {
  static_assert(count * size == 8 || count * size % 16 == 0, "accesses are of 8 or 16 bytes");
  using type = Words<count * size == 8 ? 2 : 4>;
};
template <int size>
struct AccessOf<1, size> : BitsOf<size> {};

// `count` elements of type T as they lie in memory, where they must be aligned as `Access` is.
template <class T, int count>
struct Pack {
  using Access = typename AccessOf<count, sizeof(T)>::type;
  static constexpr int accesses = count * sizeof(T) / sizeof(Access);

  Access bits[accesses];
};

#if defined(__CUDA_ARCH__)
template <class Read>
VPFAST_INLINE Words<2> read_words(const Words<2>* p, const Read& read) {
  const uint2 bits = read(reinterpret_cast<const uint2*>(p));
  return {{bits.x, bits.y}};
}
template <class Read>
VPFAST_INLINE Words<4> read_words(const Words<4>* p, const Read& read) {
  const uint4 bits = read(reinterpret_cast<const uint4*>(p));
  return {{bits.x, bits.y, bits.z, bits.w}};
}
template <class Access, class Read>
VPFAST_INLINE Access read_words(const Access* p, const Read& read) {
  return read(p);
}
#endif

template <class Access>
VPFAST_INLINE Access read_streaming(const Access* p) {
#if defined(__CUDA_ARCH__)
  return read_words(p, [](auto from) { return __ldcs(from); });
#else
  return *p;
#endif
}

template <class Access>
VPFAST_INLINE Access read_cached(const Access* p) {
#if defined(__CUDA_ARCH__)
  return read_words(p, [](auto from) { return __ldg(from); });
#else
  return *p;
#endif
}

// Several words are written by an instruction that says so: the compiler takes an assignment apart, and does not always
// put it together again.
VPFAST_INLINE void write(Words<2>* p, Words<2> bits) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.words[0]),
               "r"(bits.words[1])
               : "memory");
#else
  *p = bits;
#endif
}
VPFAST_INLINE void write(Words<4>* p, Words<4> bits) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.words[0]),
               "r"(bits.words[1]), "r"(bits.words[2]), "r"(bits.words[3])
               : "memory");
#else
  *p = bits;
#endif
}
template <class Access>
VPFAST_INLINE void write(Access* p, Access bits) {
  *p = bits;
}

// Elements that this kernel reads once: the caches may give them up first.
template <int count, class T>
VPFAST_INLINE Pack<T, count> load_once(const T* p) {
  Pack<T, count> pack;
  const auto* from = reinterpret_cast<const typename Pack<T, count>::Access*>(p);
#pragma unroll
  for (int k = 0; k < pack.accesses; ++k) pack.bits[k] = read_streaming(from + k);
  return pack;
}

// Elements that others may read again. No one writes them while the kernel runs.
template <int count, class T>
VPFAST_INLINE Pack<T, count> load(const T* p) {
  Pack<T, count> pack;
  const auto* from = reinterpret_cast<const typename Pack<T, count>::Access*>(p);
#pragma unroll
  for (int k = 0; k < pack.accesses; ++k) pack.bits[k] = read_cached(from + k);
  return pack;
}

template <int count, class T>
VPFAST_INLINE void store(T* p, const Pack<T, count>& pack) {
  auto* to = reinterpret_cast<typename Pack<T, count>::Access*>(p);
#pragma unroll
  for (int k = 0; k < pack.accesses; ++k) write(to + k, pack.bits[k]);
}

// The float that the lower or upper 16 bits of `word` stand for.
template <class T>
VPFAST_INLINE float widened(uint32_t word, bool upper) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
#endif
  return T(static_cast<uint16_t>(upper ? word >> 16 : word), T::from_bits());
}

// Two floats rounded to 16 bits each, `lower` in the lower ones. One instruction: rounding them one by one takes the
// unit that the exponentials need.
template <class T>
VPFAST_INLINE uint32_t narrowed(float lower, float upper) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  }
  return word;
#else
  return T(lower).x | static_cast<uint32_t>(T(upper).x) << 16;
#endif
}

// Element k, as a number.
template <class V, class T, int count>
VPFAST_INLINE V element(const Pack<T, count>& pack, int k) {
  if constexpr (sizeof(T) != 2) {
    T x;
    std::memcpy(&x, reinterpret_cast<const char*>(&pack) + k * sizeof(T), sizeof(T));
    return V::broadcast(x);
  } else if constexpr (count == 1) {
    return V::broadcast(widened<T>(pack.bits[0], false));
  } else {
    constexpr int words = sizeof(pack.bits[0]) / 4;
    return V::broadcast(widened<T>(pack.bits[k / 2 / words].words[k / 2 % words], k % 2 == 1));
  }
}

// To be called for every k in order: the even ones wait for their neighbours.
template <class V, class T, int count>
VPFAST_INLINE void set_element(Pack<T, count>& pack, int k, V x) {
  if constexpr (sizeof(T) != 2) {
    const T stored = x.v;
    std::memcpy(reinterpret_cast<char*>(&pack) + k * sizeof(T), &stored, sizeof(T));
  } else if constexpr (count == 1) {
    pack.bits[0] = static_cast<uint16_t>(narrowed<T>(x.v, 0.0f));
  } else {
    constexpr int words = sizeof(pack.bits[0]) / 4;
    uint32_t& word = pack.bits[k / 2 / words].words[k / 2 % words];
    word = k % 2 == 0 ? bits_of(x.v) : narrowed<T>(float_of(word), x.v);
  }
}

}  // namespace vpfast::simt
