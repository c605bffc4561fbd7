// Tiles of 32 tokens x 128 columns, and the two products that the skinny matrices of a family need of them.
//
//   RowDot    partial[t, r] = sum_c act[t, c] w[r, c]      (S = X At, dS = dY B)
//   TokenSum  partial[r, c] = sum_t s[t, r] act[t, c]      (dA = dSt X, dBt = St dY)
//
// A block of 256 threads reads each activation once: 8 consecutive elements (a unit) per thread and load, into shared
// memory, from where both products take it. Rank tiles are 16, 32 or 64 wide; a warp always works on 16 ranks (a slot,
// groups.cuh), and the warps left over split the inner dimension of RowDot and the columns of TokenSum (without tensor
// cores: the tokens). Sums are combined in a fixed order at the end. fmaf is written out where it matters: nvcc would
// contract a product and a sum, the host build would not.
#pragma once

#include "groups.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "ptx.cuh"

namespace fastft {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 32, kCols = 128;
constexpr int kPitch = kCols + 4;  // floats, see pitch_of
constexpr int kUnit = 8, kUnits = kRows * kCols / kUnit / kThreads;
constexpr int kUnitsPerRow = kCols / kUnit;

// Elements from row to row in shared memory: 16 bytes of padding spread rows over the banks.
template <class E>
__host__ __device__ constexpr int pitch_of(int cols) {
  return cols + 16 / int(sizeof(E));
}

// How products with activations T are formed.
//   kParts = 0  float32 on both sides, fmaf: float32 activations, and float16 with float32 adapters, which may lie outside
//               the range of float16.
//   kParts = 1  tensor cores; adapters have the activations' dtype, to which S and dS are rounded.
//   kParts = 3  tensor cores; bfloat16 activations, exact as they are, times float32 in three parts.
template <class T_, int kParts_>
struct Arithmetic {
  using T = T_;
  static constexpr int kParts = kParts_, kTiles = kParts > 0 ? kParts : 1;  // tiles that hold a float32 operand
  using Element = std::conditional_t<kParts == 0, float, T>;                // of operands in shared memory
  using Adapter = std::conditional_t<kParts == 1, T, float>;
};

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

// kAtOnce: by ptx::store. Not everywhere: nvcc leaves other kernels' stores whole, and with it dora_expand spilled on 10.0.
template <bool kAtOnce = false, class T>
__device__ __forceinline__ void store_unit(const Matrix<T>& m, int64_t row, int64_t col, const Unit<T>& unit) {
  T* target = m.data + row * m.stride + col;
  note_store(m.data, (m.cols - col < kUnit ? m.cols - col : kUnit) * sizeof(T));
  if (m.vectors) {
#pragma unroll
    for (int i = 0; i < int(sizeof(unit) / 16); ++i) {
      const uint4& part = reinterpret_cast<const uint4*>(&unit)[i];
      if constexpr (kAtOnce)
        ptx::store(reinterpret_cast<uint4*>(target) + i, part);
      else
        reinterpret_cast<uint4*>(target)[i] = part;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (col + i < m.cols) target[i] = unit.v[i];
  }
}

// Row and column, within a tile, of the i-th unit of this thread.
__device__ __forceinline__ int unit_row(int i) { return (threadIdx.x + i * kThreads) / kUnitsPerRow; }
__device__ __forceinline__ int unit_col() { return threadIdx.x % kUnitsPerRow * kUnit; }

// Into shared memory; 16-bit elements as they are or widened.
template <class T, class E>
__device__ __forceinline__ void put_unit(E* target, const Unit<T>& unit) {
  if constexpr (sizeof(E) == 2) {
    static_assert(std::is_same_v<E, T>);
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&unit);
  } else {
    float4* out = reinterpret_cast<float4*>(target);
    out[0] = make_float4(unit.v[0], unit.v[1], unit.v[2], unit.v[3]);
    out[1] = make_float4(unit.v[4], unit.v[5], unit.v[6], unit.v[7]);
  }
}

// The unit in kTiles parts (mma.cuh), `apart` elements apart; a single one takes it as it is.
template <int kTiles, class W, class E>
__device__ __forceinline__ void put_parts(E* target, int apart, const Unit<W>& unit) {
  if constexpr (kTiles == 1) {
    put_unit(target, unit);
  } else {
    Unit<E> parts[kTiles];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      E of[kTiles];
      split(unit.v[j], of);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) parts[i].v[j] = of[i];
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) put_unit(target + i * apart, parts[i]);
  }
}

// The part of an activation tile that this thread holds between its load from global and its store to shared memory.
template <class T>
struct TileRegisters {
  Unit<T> units[kUnits];

  __device__ __forceinline__ void load(const Matrix<const T>& m, int64_t row0, int64_t col0) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units[i] = load_unit<true, T>(m, row0 + unit_row(i), col0 + unit_col());
  }

  template <class E>
  __device__ __forceinline__ void store(E* tile) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) put_unit(tile + unit_row(i) * pitch_of<E>(kCols) + unit_col(), units[i]);
  }

  // The same as one group sees it: elements whose bit in byte `copy` of keep[i] is 0 are 0, also where they are NaN.
  template <class E>
  __device__ __forceinline__ void store_kept(E* tile, const unsigned (&keep)[kUnits], int copy) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const unsigned bits = keep[i] >> 8 * copy;
      Unit<T> unit = units[i];
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        if (!(bits >> j & 1)) unit.v[j] = T(0.0f);
      put_unit(tile + unit_row(i) * pitch_of<E>(kCols) + unit_col(), unit);
    }
  }
};

// A whole tile straight into shared memory, for kernels whose sums leave no registers to hold the next tile in.
template <class T, class E>
__device__ __forceinline__ void load_tile(E* tile, const Matrix<const T>& m, int64_t row0, int64_t col0) {
  if (m.vectors) {
    TileRegisters<T> held;
    held.load({m.data, m.rows, m.cols, m.stride, true}, row0, col0);
    held.store(tile);
  } else {
    // Unit by unit: the element-wise loads of two units at once spilled 16 bytes in grad_sb_kernel.
#pragma unroll 1
    for (int i = 0; i < kUnits; ++i)
      put_unit(tile + unit_row(i) * pitch_of<E>(kCols) + unit_col(),
               load_unit<true, T>(m, row0 + unit_row(i), col0 + unit_col()));
  }
}

// Adapters are small and read from cache.
//
// tile[16 i + r][c] = a[slots[i].rank + r, col0 + c] for kRanks rows of kCols columns, 0 beyond a slot's ranks.
template <int kRanks, int kTiles, class W, class E, class S>
__device__ __forceinline__ void load_rows(E* tile, const Matrix<const W>& a, const S& slots, int64_t col0) {
  static_assert(kThreads / kUnitsPerRow == kWarpRanks, "the i-th units of all threads are slot i");
#pragma unroll
  for (int i = 0; i < kRanks / kWarpRanks; ++i) {
    const Matrix<const W> slot{a.data, slots[i].end, a.cols, a.stride, a.vectors};
    put_parts<kTiles>(tile + unit_row(i) * pitch_of<E>(kCols) + unit_col(), kRanks * pitch_of<E>(kCols),
                      load_unit<false, W>(slot, slots[i].rank + unit_row(0), col0 + unit_col()));
  }
}

// tile[c][r] = b[col0 + c, rank0 + r] for kCols rows of kRanks ranks.
template <int kRanks, int kTiles, class W, class E>
__device__ __forceinline__ void load_columns(E* tile, const Matrix<const W>& b, int64_t col0, int64_t rank0) {
  constexpr int units = kRanks / kUnit;
#pragma unroll 1  // two units at once spilled in grad_sb_kernel
  for (int k = 0; k < kCols * units / kThreads; ++k) {
    const int i = threadIdx.x + k * kThreads, rank = i % units * kUnit;
    put_parts<kTiles>(tile + i / units * pitch_of<E>(kRanks) + rank, kCols * pitch_of<E>(kRanks),
                      load_unit<false, W>(b, col0 + i / units, rank0 + rank));
  }
}

// The transpose, tile[r][c] = b[col0 + c, rank0 + r].
template <int kRanks, class W>
__device__ __forceinline__ void load_transposed(float* tile, const Matrix<const W>& b, int64_t col0, int64_t rank0) {
#pragma unroll 4
  for (int i = threadIdx.x; i < kRanks * kCols; i += kThreads) {
    const int64_t col = col0 + i / kRanks, rank = rank0 + i % kRanks;
    tile[i % kRanks * kPitch + i / kRanks] =
        col < b.rows && rank < b.cols ? static_cast<float>(get(b.data, col * b.stride + rank)) : 0.0f;
  }
}

// tile[t][16 i + r] = s[row0 + t, slots[i].rank + r] of the float32 matrix s for kTileRows rows, 0 beyond a slot's ranks;
// in kTiles parts. Here s.vectors says that every row of s starts on a 16-byte boundary.
template <int kTileRows, int kRanks, int kTiles, class E, class S>
__device__ __forceinline__ void load_ranks(E* tile, const Matrix<const float>& s, int64_t row0, const S& slots) {
  constexpr int quads = kRanks / 4, pitch = pitch_of<E>(kRanks);
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
    struct alignas(4 * sizeof(E)) Quad {
      E v[4];
    } parts[kTiles];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      E of[kTiles];
      split(v[j], of);
#pragma unroll
      for (int k = 0; k < kTiles; ++k) parts[k].v[j] = of[k];
    }
    E* target = tile + i / quads * pitch + i % quads * 4;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) *reinterpret_cast<Quad*>(target + k * kTileRows * pitch) = parts[k];
  }
}

}  // namespace fastft
