// Philox4x32-7 (Salmon et al. 2011): the dropout mask as a pure function of (seed, token, feature).
// Plain C++ for one mask byte; vectorised twins in cpu/ and cuda/ give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTFT_HD __host__ __device__ __forceinline__
#else
#define FASTFT_HD inline
#endif

namespace fastft::philox {

constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;
constexpr int rounds = 7;

// 16-bit lanes below it are dropped; half to even, as Python rounds.
inline uint32_t threshold(double p) { return static_cast<uint32_t>(std::nearbyint(p * 65536.0)); }

// The factor of what is kept.
inline float inverse_keep(double p) { return p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f; }

// Keep bits of elements 8 i ... 8 i + 7 of token t, element 8 i in the lowest bit.
FASTFT_HD uint8_t keep_byte(uint64_t seed, uint64_t t, uint32_t i, uint32_t threshold) {
  uint32_t c[4] = {static_cast<uint32_t>(t), static_cast<uint32_t>(t >> 32), i, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < rounds; ++round) {
    uint64_t p0 = static_cast<uint64_t>(M0) * c[0], p1 = static_cast<uint64_t>(M1) * c[2];
    uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[0] = n0, c[1] = static_cast<uint32_t>(p1), c[2] = n2, c[3] = static_cast<uint32_t>(p0);
    k0 += W0, k1 += W1;
  }
  uint32_t byte = 0;
  for (int m = 0; m < 4; ++m) {
    byte |= static_cast<uint32_t>((c[m] & 0xffffu) >= threshold) << (2 * m);
    byte |= static_cast<uint32_t>((c[m] >> 16) >= threshold) << (2 * m + 1);
  }
  return static_cast<uint8_t>(byte);
}

}  // namespace fastft::philox
