// Tiles of 32 tokens x 128 columns, and the two products that the skinny matrices of a family need of them.
//
//   RowDot    partial[t, r] = sum_c act[t, c] w[r, c]      (S = X At, dS = dY B)
//   TokenSum  partial[r, c] = sum_t s[t, r] act[t, c]      (dA = dSt X, dBt = St dY)
//
// A block of 256 threads reads each activation once: 8 consecutive elements (a unit) per thread and load, widened to
// float32 in shared memory, from where both products take it. Rank tiles are 16, 32 or 64 wide; a warp always works on
// 16 ranks (a slot, groups.cuh), and the warps left over split the inner dimension. Their sums are combined in a fixed
// order at the end. fmaf is written out where it matters: nvcc would contract a product and a sum, the host build would not.
#pragma once

#include "groups.cuh"
#include "launch.cuh"
#include "ptx.cuh"

#include <cmath>

namespace fastft {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 32, kCols = 128;
constexpr int kPitch = kCols + 4;  // floats; 16 bytes of padding spread rows over the banks
constexpr int kUnit = 8, kUnits = kRows * kCols / kUnit / kThreads;
constexpr int kUnitsPerRow = kCols / kUnit;

// A matrix whose rows are contiguous and lie `stride` elements apart. `vectors`: every row starts on a 16-byte boundary and
// no unit crosses a row's end.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;
  bool vectors;
};

template <class T>
Matrix<T> matrix(T* data, int64_t rows, int64_t cols, int64_t stride) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows < 2 || stride * sizeof(T) % 16 == 0);
  return {data, rows, cols, stride, aligned && cols % kUnit == 0};
}

template <class T>
struct alignas(16) Unit {
  T v[kUnit];
};

// Eight elements at (row, col); those outside the matrix are 0. `kOnce`: nothing writes the matrix during the kernel.
template <bool kOnce, class T, class M>
__device__ __forceinline__ Unit<T> load_unit(const Matrix<M>& m, int64_t row, int64_t col) {
  Unit<T> unit{};
  if (row >= m.rows || col >= m.cols) return unit;
  const T* source = m.data + row * m.stride + col;
  note_load(m.data, (m.cols - col < kUnit ? m.cols - col : kUnit) * sizeof(T));
  if (m.vectors) {
    constexpr int chunks = sizeof(unit) / 16;
    uint4* target = reinterpret_cast<uint4*>(&unit);
#pragma unroll
    for (int i = 0; i < chunks; ++i)
      target[i] =
          kOnce ? ptx::load_once(reinterpret_cast<const uint4*>(source) + i) : reinterpret_cast<const uint4*>(source)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (col + i < m.cols) unit.v[i] = source[i];
  }
  return unit;
}

template <class T>
__device__ __forceinline__ void store_unit(const Matrix<T>& m, int64_t row, int64_t col, const Unit<T>& unit) {
  T* target = m.data + row * m.stride + col;
  note_store(m.data, (m.cols - col < kUnit ? m.cols - col : kUnit) * sizeof(T));
  if (m.vectors) {
#pragma unroll
    for (int i = 0; i < int(sizeof(unit) / 16); ++i)
      reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(&unit)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (col + i < m.cols) target[i] = unit.v[i];
  }
}

// Row and column, within a tile, of the i-th unit of this thread.
__device__ __forceinline__ int unit_row(int i) { return (threadIdx.x + i * kThreads) / kUnitsPerRow; }
__device__ __forceinline__ int unit_col() { return threadIdx.x % kUnitsPerRow * kUnit; }

template <class T>
__device__ __forceinline__ void widen(float* target, const Unit<T>& unit) {
  float4* out = reinterpret_cast<float4*>(target);
  out[0] = make_float4(unit.v[0], unit.v[1], unit.v[2], unit.v[3]);
  out[1] = make_float4(unit.v[4], unit.v[5], unit.v[6], unit.v[7]);
}

// The part of an activation tile that this thread holds between its load from global and its store to shared memory.
template <class T>
struct TileRegisters {
  Unit<T> units[kUnits];

  __device__ __forceinline__ void load(const Matrix<const T>& m, int64_t row0, int64_t col0) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units[i] = load_unit<true, T>(m, row0 + unit_row(i), col0 + unit_col());
  }

  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) widen(tile + unit_row(i) * kPitch + unit_col(), units[i]);
  }

  // The same as one group sees it: elements whose bit in byte `copy` of keep[i] is 0 are 0, also where they are NaN.
  __device__ __forceinline__ void store_kept(float* tile, const unsigned (&keep)[kUnits], int copy) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const unsigned bits = keep[i] >> 8 * copy;
      Unit<T> unit = units[i];
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        if (!(bits >> j & 1)) unit.v[j] = T(0.0f);
      widen(tile + unit_row(i) * kPitch + unit_col(), unit);
    }
  }
};

// A whole tile straight into shared memory, for kernels whose sums leave no registers to hold the next tile in.
template <class T>
__device__ __forceinline__ void load_tile(float* tile, const Matrix<const T>& m, int64_t row0, int64_t col0) {
  if (m.vectors) {
    TileRegisters<T> held;
    held.load({m.data, m.rows, m.cols, m.stride, true}, row0, col0);
    held.store(tile);
  } else {
    // Unit by unit: the element-wise loads of two units at once spilled 16 bytes in grad_sb_kernel.
#pragma unroll 1
    for (int i = 0; i < kUnits; ++i)
      widen(tile + unit_row(i) * kPitch + unit_col(), load_unit<true, T>(m, row0 + unit_row(i), col0 + unit_col()));
  }
}

// An adapter matrix, in the activations' dtype or in float32: small, read from cache, so the branch costs little.
template <class T>
struct Weights {
  const void* data;
  int64_t rows, cols;
  bool vectors, wide;

  __device__ __forceinline__ float at(int64_t row, int64_t col) const {
    if (row >= rows || col >= cols) return 0.0f;
    int64_t i = row * cols + col;
    note_load(data, wide ? sizeof(float) : sizeof(T));
    return wide ? static_cast<const float*>(data)[i] : static_cast<float>(static_cast<const T*>(data)[i]);
  }

  // tile[16 i + r][c] = this[slots[i].rank + r, col0 + c] for kRanks rows of kCols columns, 0 beyond a slot's ranks.
  template <int kRanks, class S>
  __device__ __forceinline__ void load(float* tile, const S& slots, int64_t col0) const {
    static_assert(kThreads / kUnitsPerRow == kWarpRanks, "the i-th units of all threads are slot i");
#pragma unroll
    for (int i = 0; i < kRanks / kWarpRanks; ++i) {
      const int64_t row = slots[i].rank + unit_row(0), end = slots[i].end, col = col0 + unit_col();
      float* target = tile + unit_row(i) * kPitch + unit_col();
      if (wide)
        widen(target, load_unit<false, float>(Matrix<const float>{static_cast<const float*>(data), end, cols, cols, vectors},
                                              row, col));
      else
        widen(target, load_unit<false, T>(Matrix<const T>{static_cast<const T*>(data), end, cols, cols, vectors}, row, col));
    }
  }

  // tile[r][c] = this[row0 + c, col0 + r]: the transpose, for kTileRows ranks.
  template <int kTileRows>
  __device__ __forceinline__ void load_transposed(float* tile, int64_t row0, int64_t col0) const {
#pragma unroll 4
    for (int i = threadIdx.x; i < kTileRows * kCols; i += kThreads)
      tile[i % kTileRows * kPitch + i / kTileRows] = at(row0 + i / kTileRows, col0 + i % kTileRows);
  }
};

// tile[t][16 i + r] = s[row0 + t, slots[i].rank + r] of the float32 matrix s for kTileRows rows, 0 beyond a slot's ranks;
// rows lie kRanks + 4 apart. Here s.vectors says that every row of s starts on a 16-byte boundary.
template <int kTileRows, int kRanks, class S>
__device__ __forceinline__ void load_ranks(float* tile, const Matrix<const float>& s, int64_t row0, const S& slots) {
  constexpr int quads = kRanks / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileRows * quads; i += kThreads) {
    const int64_t row = row0 + i / quads;
    const int rank = slots[i % quads / 4].rank + i % 4 * 4, end = slots[i % quads / 4].end;
    const float* source = s.data + row * s.stride + rank;
    alignas(16) float v[4] = {};
    if (row < s.rows && rank < end) note_load(s.data, (end - rank < 4 ? end - rank : 4) * sizeof(float));
    if (row < s.rows && s.vectors && rank % 4 == 0 && rank + 4 <= end) {
      *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(source);
    } else if (row < s.rows) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (rank + j < end) v[j] = source[j];
    }
    *reinterpret_cast<float4*>(tile + i / quads * (kRanks + 4) + i % quads * 4) = make_float4(v[0], v[1], v[2], v[3]);
  }
}

template <int kRanks>
struct RowDot {
  static constexpr int kSlots = kRanks / kWarpRanks, kSlices = kWarps / kSlots, kSliceCols = kCols / kSlices;
  static constexpr int kBuffer = kSlices * kRows * kRanks;  // floats of shared memory for `publish`

  float acc[4][4] = {};  // tokens lane / 4 + 8 i, ranks lane % 4 + 4 j of the warp's 16

  __device__ __forceinline__ void add(const float* act, const float* w) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    act += lane / 4 * kPitch + warp / kSlots * kSliceCols;
    w += (warp % kSlots * kWarpRanks + lane % 4) * kPitch + warp / kSlots * kSliceCols;
#pragma unroll 1
    for (int c = 0; c < kSliceCols; c += 4) {
      float4 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const float4*>(act + i * 8 * kPitch + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 b = *reinterpret_cast<const float4*>(w + j * 4 * kPitch + c);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          acc[i][j] = fmaf(a[i].w, b.w, fmaf(a[i].z, b.z, fmaf(a[i].y, b.y, fmaf(a[i].x, b.x, acc[i][j]))));
      }
    }
  }

  // Each warp's sums into `buffer`; after a barrier `total` adds them up.
  __device__ __forceinline__ void publish(float* buffer) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    buffer += (warp / kSlots * kRows + lane / 4) * kRanks + warp % kSlots * kWarpRanks + lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) buffer[i * 8 * kRanks + 4 * j] = acc[i][j];
  }

  // Element `i` = t * kRanks + r of the block's 32 x kRanks sums, the warps' parts in ascending order.
  __device__ __forceinline__ static float total(const float* buffer, int i) {
    float sum = buffer[i];
#pragma unroll
    for (int slice = 1; slice < kSlices; ++slice) sum += buffer[slice * kRows * kRanks + i];
    return sum;
  }
};

template <int kRanks>
struct TokenSum {
  static constexpr int kSlots = kRanks / kWarpRanks, kSlices = kWarps / kSlots, kSliceRows = kRows / kSlices;

  float acc[kWarpRanks][4] = {};  // the warp's 16 ranks, columns 4 lane + j

  __device__ __forceinline__ void add(const float* act, const float* s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    act += warp / kSlots * kSliceRows * kPitch + 4 * lane;
    s += warp / kSlots * kSliceRows * (kRanks + 4) + warp % kSlots * kWarpRanks;
#pragma unroll 1
    for (int t = 0; t < kSliceRows; ++t) {
      float4 a = *reinterpret_cast<const float4*>(act + t * kPitch);
#pragma unroll
      for (int r = 0; r < kWarpRanks; r += 4) {
        float4 b = *reinterpret_cast<const float4*>(s + t * (kRanks + 4) + r);
        const float ranks[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[r + i][0] = fmaf(ranks[i], a.x, acc[r + i][0]);
          acc[r + i][1] = fmaf(ranks[i], a.y, acc[r + i][1]);
          acc[r + i][2] = fmaf(ranks[i], a.z, acc[r + i][2]);
          acc[r + i][3] = fmaf(ranks[i], a.w, acc[r + i][3]);
        }
      }
    }
  }

  // buffer[r][c], rows kPitch apart: the block's sums, the warps' parts added in ascending order. Ends with a barrier.
  __device__ __forceinline__ void combine(float* buffer) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    buffer += warp % kSlots * kWarpRanks * kPitch + 4 * lane;
    for (int slice = 0; slice < kSlices; ++slice) {
      if (warp / kSlots == slice) {
#pragma unroll
        for (int r = 0; r < kWarpRanks; ++r) {
          float4* target = reinterpret_cast<float4*>(buffer + r * kPitch);
          float4 sum = slice ? *target : make_float4(0, 0, 0, 0);
          *target = make_float4(sum.x + acc[r][0], sum.y + acc[r][1], sum.z + acc[r][2], sum.w + acc[r][3]);
        }
      }
      __syncthreads();
    }
  }
};

}  // namespace fastft
