// Rows of dropout's packed keep masks: Philox on VL byte numbers at a time (common/philox.h has the plain form).
#pragma once

#include "common/philox.h"
#include "vec.h"

#include <algorithm>
#include <cstring>

namespace fastft {

#if defined(__AVX512BW__)

// Philox of 8 counters, each in the low half of a lane of 64 bits: a product of those is what a round is made of, and
// nothing ever looks at the high halves. Half of the instructions that 16 lanes of 32 bits take.
struct Counters8 {
  __m512i c0, c1, c2, c3;
  void round(__m512i k0, __m512i k1) {
    const __m512i first = _mm512_mul_epu32(c0, _mm512_set1_epi64(philox::M0));
    const __m512i second = _mm512_mul_epu32(c2, _mm512_set1_epi64(philox::M1));
    c0 = _mm512_ternarylogic_epi32(high(second), c1, k0, 0x96);  // exclusive or of all three
    c2 = _mm512_ternarylogic_epi32(high(first), c3, k1, 0x96);
    c1 = second, c3 = first;
  }
  static __m512i high(__m512i product) { return _mm512_shuffle_epi32(product, _MM_PERM_DDBB); }
};

// Bits 2 m and 2 m + 1 of byte i: are the low and the high half of word m of counter i at least the threshold?
inline __m512i with_word(__m512i bytes, int m, __m512i even, __m512i odd, __m512i threshold) {
  const __m512i word = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  const __mmask32 kept = _mm512_cmpge_epu16_mask(word, threshold);
  return _mm512_or_si512(bytes, _mm512_maskz_mov_epi16(kept, _mm512_set1_epi32((2 << (2 * m + 16)) | (1 << (2 * m)))));
}

// The 16 mask bytes from number `first` on of token t.
inline __m128i mask_bytes(uint64_t seed, int64_t t, uint32_t first, uint32_t threshold) {
  const __m512i low = _mm512_set1_epi64(static_cast<uint32_t>(t)), high = _mm512_set1_epi64(static_cast<uint32_t>(t >> 32));
  const __m512i numbers = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
  Counters8 even{low, high, numbers, _mm512_setzero_si512()};
  Counters8 odd{low, high, _mm512_add_epi64(numbers, _mm512_set1_epi64(1)), _mm512_setzero_si512()};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox::rounds; ++round, k0 += philox::W0, k1 += philox::W1) {
    const __m512i first_key = _mm512_set1_epi32(static_cast<int>(k0)), second_key = _mm512_set1_epi32(static_cast<int>(k1));
    even.round(first_key, second_key);
    odd.round(first_key, second_key);
  }
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  __m512i bytes = with_word(_mm512_setzero_si512(), 0, even.c0, odd.c0, least);
  bytes = with_word(bytes, 1, even.c1, odd.c1, least);
  bytes = with_word(bytes, 2, even.c2, odd.c2, least);
  bytes = with_word(bytes, 3, even.c3, odd.c3, least);
  return _mm512_cvtepi32_epi8(_mm512_or_si512(bytes, _mm512_srli_epi32(bytes, 16)));
}

#else

// Full 32 x 32 -> 64 bit products of every lane with one constant.
inline void mul_hilo(vu c, uint32_t m, vu& hi, vu& lo) {
#if defined(__AVX2__)
  __m256i x = (__m256i)c, k = _mm256_set1_epi32(m);
  __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
  lo = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  hi = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int l = 0; l < VL; ++l) {
    uint64_t product = static_cast<uint64_t>(c[l]) * m;
    lo[l] = static_cast<uint32_t>(product), hi[l] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

inline vu8 mask_bytes(uint64_t seed, int64_t t, uint32_t first, uint32_t threshold) {
  vu c0 = vu{} + static_cast<uint32_t>(t), c1 = vu{} + static_cast<uint32_t>(t >> 32);
  vu c2 = lane_numbers() + first, c3 = {};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox::rounds; ++round, k0 += philox::W0, k1 += philox::W1) {
    vu hi0, lo0, hi1, lo1;
    mul_hilo(c0, philox::M0, hi0, lo0);
    mul_hilo(c2, philox::M1, hi1, lo1);
    c0 = hi1 ^ c1 ^ k0, c1 = lo1, c2 = hi0 ^ c3 ^ k1, c3 = lo0;
  }
  vu byte = {};
  const vu words[4] = {c0, c1, c2, c3};
  for (int m = 0; m < 4; ++m) {
    byte |= reinterpret_cast<vu>((words[m] & 0xffffu) >= threshold) & (1u << 2 * m);
    byte |= reinterpret_cast<vu>((words[m] >> 16) >= threshold) & (2u << 2 * m);
  }
  return __builtin_convertvector(byte, vu8);
}

#endif

// The mask bytes of token t. A threshold of 65536 keeps nothing.
inline void write_mask_row(uint64_t seed, int64_t t, int64_t features, uint32_t threshold, uint8_t* row) {
  const int64_t bytes = (features + 7) / 8;
  if (threshold > 0xffff) return static_cast<void>(std::memset(row, 0, bytes));
  for (int64_t i = 0; i < bytes; i += VL) {
    const auto packed = mask_bytes(seed, t, static_cast<uint32_t>(i), threshold);
    std::memcpy(row + i, &packed, std::min<int64_t>(VL, bytes - i));
  }
  if (features % 8) row[bytes - 1] &= (1u << features % 8) - 1u;
}

}  // namespace fastft
