// Tensor cores: D[16, 8] += A[16, 16] B[16, 8] by the 32 lanes of a warp together, operands 16-bit, sums float32. The same
// instruction on compute capability 8.0, 9.0 and 10.0 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
//
// Each lane holds a fragment of every matrix. With g = lane / 4, t = lane % 4 and two elements to a register, the first one
// in its low half:
//
//   a[0]  A[g][2t, 2t + 1]        a[2]  A[g][2t + 8, 2t + 9]        c[0], c[1]  D[g][2t, 2t + 1]
//   a[1]  A[g + 8][2t, 2t + 1]    a[3]  A[g + 8][2t + 8, 2t + 9]    c[2], c[3]  D[g + 8][2t, 2t + 1]
//   b[0]  B[2t, 2t + 1][g]        b[1]  B[2t + 8, 2t + 9][g]
//
// Products are exact. Sums are not rounded to nearest but cut off, at about float32's last bit (Fasi, Higham, Mikaitis and
// Pranesh 2021, doi:10.7717/peerj-cs.330), which over a long axis adds up to a bias: long sums are added up by float32
// additions outside. The host's twins exchange fragments between fibers and cut off too.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "launch.cuh"

// Where a warp came together, which the host build compares between its lanes.
#ifdef FASTFT_HOSTCUDA
#define FASTFT_SITE , hostcuda::Site site = hostcuda::Site::current()
#define FASTFT_SAME_SITE , site
#else
#define FASTFT_SITE
#define FASTFT_SAME_SITE
#endif

namespace fastft {

#ifdef FASTFT_HOSTCUDA

inline float cut_to_float(double value) {
  const float nearest = static_cast<float>(value);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

template <class T>
void mma_twin(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, hostcuda::Site site) {
  struct Operands {
    float a[4][2], b[2][2];
  } mine;
  auto unpack = [](float (&pair)[2], uint32_t bits) {
    T values[2];
    std::memcpy(values, &bits, sizeof(bits));
    pair[0] = values[0], pair[1] = values[1];
  };
  for (int i = 0; i < 4; ++i) unpack(mine.a[i], a[i]);
  unpack(mine.b[0], b0), unpack(mine.b[1], b1);
  const hostcuda::Gathered brought = hostcuda::gather(&mine, sizeof(mine), site);
  const unsigned g = hostcuda::lane() / 4, t = hostcuda::lane() % 4;
  double sum[4] = {c[0], c[1], c[2], c[3]};
  for (unsigned k = 0; k < 16; ++k) {
    const auto& left = brought.of<Operands>(4 * g + k % 8 / 2);
    for (unsigned j = 0; j < 2; ++j) {
      const auto& right = brought.of<Operands>(4 * (2 * t + j) + k % 8 / 2);
      const double b = right.b[k / 8][k % 2];
      sum[j] += b * left.a[k / 8 * 2][k % 2];
      sum[2 + j] += b * left.a[k / 8 * 2 + 1][k % 2];
    }
  }
  for (int i = 0; i < 4; ++i) c[i] = cut_to_float(sum[i]);
}

#endif

// c += a b.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 FASTFT_SITE) {
  static_assert(std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>);
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(FASTFT_HOSTCUDA)
  mma_twin<T>(c, a, b0, b1, site);
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 i + r names row r of matrix i: 8 elements from a 16-byte
// boundary. m[i] receives elements [g][2t, 2t + 1] of matrix i, or, transposed, [2t, 2t + 1][g].
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row FASTFT_SITE) {
#if defined(__CUDA_ARCH__)
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
#elif defined(FASTFT_HOSTCUDA)
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("a row of a matrix is not 16-byte aligned");
  const hostcuda::Gathered rows = hostcuda::gather(&row, sizeof(row), site);
  const unsigned g = hostcuda::lane() / 4, t = hostcuda::lane() % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned j = 0; j < 2; ++j) {
      const void* source = rows.of<const void*>(8 * i + (kTransposed ? 2 * t + j : g));
      const unsigned element = static_cast<const uint16_t*>(source)[kTransposed ? g : 2 * t + j];
      m[i] = j ? m[i] | element << 16 : element;
    }
#endif
}

// The 16 x 16 block that starts at `block`, rows `pitch` elements apart, as four matrices: in the order of its columns
// (upper left, lower left, upper right, lower right) or of its rows (upper left, upper right, lower left, lower right).
//   a fragment of A   from A[m][k]: by columns.   From its transpose [k][m]: transposed, by rows.
//   two fragments of B, for columns 0 to 7 and 8 to 15, {m[0], m[1]} and {m[2], m[3]}
//                     from B[k][n]: transposed, by columns.   From its transpose [n][k]: by rows.
template <bool kTransposed, bool kByRows, class T>
__device__ __forceinline__ void load_block(uint32_t (&m)[4], const T* block, int pitch FASTFT_SITE) {
  const int lane = threadIdx.x % 32;
  const int row = kByRows ? lane % 8 + lane / 16 * 8 : lane % 16, col = kByRows ? lane / 8 % 2 * 8 : lane / 16 * 8;
  load_matrices<kTransposed>(m, block + row * pitch + col FASTFT_SAME_SITE);
}

// One part: the value rounded to E. Three bfloat16 together are the value: each takes the next 8 of its 24 bits, cut off,
// which costs half the instructions of rounding them. Infinity is in the first part alone.
template <int kParts, class E>
__device__ __forceinline__ void split(float value, E (&parts)[kParts]) {
  if constexpr (kParts == 1) {
    parts[0] = E(value);
  } else {
    static_assert(kParts == 3 && std::is_same_v<E, c10::BFloat16>);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      parts[i] = E(static_cast<uint16_t>(bits >> 16), E::from_bits());
      bits &= 0xffff0000u;
      float part;
      std::memcpy(&part, &bits, sizeof(part));
      value = i == 0 && fabsf(value) == INFINITY ? 0.0f : value - part;
    }
  }
}

}  // namespace fastft
