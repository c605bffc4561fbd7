// One vector type for four builds: GCC/Clang vector extensions of the width that the compile flags allow
// (-mavx512*: 16 floats, -mavx2: 8, otherwise 4), with the conversions that need an instruction of their own.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace fastft {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

using vf = float __attribute__((vector_size(VL * 4)));
using vi = int32_t __attribute__((vector_size(VL * 4)));
using vu = uint32_t __attribute__((vector_size(VL * 4)));
using vu16 = uint16_t __attribute__((vector_size(VL * 2)));
using vu8 = uint8_t __attribute__((vector_size(VL)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct bf16x2 {
  uint32_t bits;
};  // two neighbouring terms of a sum, the first in the low half

template <class V, class T>
inline V load_bytes(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vf load(const float* p) { return load_bytes<vf>(p); }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// 16 bits of each lane, the others 0. GCC widens a vector that fills a register of AVX-512 in two halves and joins them.
inline vu widen(vu16 v) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#else
  return __builtin_convertvector(v, vu);
#endif
}

// The low 16 bits of each lane.
inline vu16 narrow(vu v) {
#if defined(__AVX512F__)
  return (vu16)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, vu16);
#endif
}

inline vu load_bits(const bf16* p) { return widen(load_bytes<vu16>(p)); }
inline vf load(const bf16* p) { return reinterpret_cast<vf>(load_bits(p) << 16); }

// Nearest bfloat16, ties to even, in the low half of each lane; a NaN stays a (quiet) NaN.
inline vu bf16_bits(vf v) {
  vu u = reinterpret_cast<vu>(v);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  return (u & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  // One instruction that rounds the same way but flushes denormals: those take the way of the other builds.
  if (!_mm512_fpclass_ps_mask((__m512)v, 0x20)) [[likely]]
    return _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#endif
  vu16 h = narrow(bf16_bits(v));
  std::memcpy(p, &h, sizeof h);
}

inline void store(bf16x2* p, vu words) { std::memcpy(p, &words, sizeof words); }

// sum + x · p for one term, or for the two terms of a pair, whose bits p holds, in one instruction.
inline vf multiply_add(vf sum, float x, vf p) { return sum + x * p; }
#if defined(__AVX512BF16__)
constexpr bool has_pairs = true;
inline vf multiply_add(vf sum, bf16x2 x, vf p) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)p, (__m512bh)_mm512_set1_epi32(x.bits));
}
#else
constexpr bool has_pairs = false;
#endif

#if defined(__AVX512F__)
inline vf load(const fp16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(fp16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline vf load(const fp16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(fp16* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline vf load(const fp16* p) {
  vf v;
  for (int l = 0; l < VL; ++l) {
    _Float16 h;
    std::memcpy(&h, p + l, sizeof h);
    v[l] = static_cast<float>(h);
  }
  return v;
}
inline void store(fp16* p, vf v) {
  for (int l = 0; l < VL; ++l) {
    _Float16 h = static_cast<_Float16>(v[l]);
    std::memcpy(p + l, &h, sizeof h);
  }
}
#endif

// The first n of a vector's elements; the rest reads as 0 and is not written.
template <class T>
inline vf load(const T* p, int64_t n) {
  if (n >= VL) return load(p);
  T buffer[VL] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store(T* p, vf v, int64_t n) {
  if (n >= VL) return store(p, v);
  T buffer[VL];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

inline vf square_root(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int l = 0; l < VL; ++l) v[l] = __builtin_sqrtf(v[l]);
  return v;
#endif
}

inline vu lane_numbers() {
  vu v;
  for (int l = 0; l < VL; ++l) v[l] = l;
  return v;
}

// All ones where the packed mask keeps element `e` ... `e + VL - 1` of a row (e a multiple of VL), else 0.
inline vi keep_lanes(const uint8_t* row, int64_t e, int64_t row_bytes) {
  uint32_t bits = row[e / 8];
  if (VL == 16 && e / 8 + 1 < row_bytes) bits |= static_cast<uint32_t>(row[e / 8 + 1]) << 8;
#if defined(__AVX512DQ__)
  return (vi)_mm512_movm_epi32(static_cast<__mmask16>(bits));
#else
  if (VL == 4) bits >>= e % 8;
  return ((vu{} + bits) & ((vu{} + 1u) << lane_numbers())) != 0u;
#endif
}

inline vf select(vi keep, vf v) { return reinterpret_cast<vf>(reinterpret_cast<vi>(v) & keep); }

}  // namespace fastft
