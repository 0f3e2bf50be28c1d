// Pairs of bfloat16, sixteen in a register: what is multiplied and summed two by two. Part of sample_codes_kernel.h.
//
// They are handed on as F32, whose bits they are.

// c + what each pair of a gives with that of b, first with first and second with second. As assembly, since the
// compiler is not allowed the instruction where the rest of the AVX-512 kernels runs.
VPFAST_INLINE F32 add_products(F32 a, F32 b, F32 c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(b.v));
  return c;
}

// Thirty-two numbers, rounded: those of `first`, then those of `second`.
VPFAST_INLINE F32 packed(F32 first, F32 second) {
  F32 pairs;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs.v) : "v"(first.v), "v"(second.v));
  return pairs;
}

VPFAST_INLINE F32 load_pairs(const BFloat16* p) {
  F32 pairs;
  std::memcpy(&pairs.v, p, sizeof pairs.v);
  return pairs;
}
VPFAST_INLINE void store_pairs(BFloat16* p, F32 pairs) { std::memcpy(p, &pairs.v, sizeof pairs.v); }

VPFAST_INLINE F32 broadcast_pair(const BFloat16* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return {(FloatLanes)_mm512_set1_epi32(bits)};
}

VPFAST_INLINE F32 ones() { return {(FloatLanes)_mm512_set1_epi32(0x3f803f80)}; }

// Zeros in place of all but these.
VPFAST_INLINE F32 shown(__mmask32 which, F32 pairs) {
  return {(FloatLanes)_mm512_maskz_mov_epi16(which, (__m512i)pairs.v)};
}
