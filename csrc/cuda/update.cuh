// The sums of s w for a tile of 64 tokens x 128 columns in registers, for kernels that add them to activations.
#pragma once

#include "reduce.cuh"
#include "tile.cuh"

namespace fastft {

constexpr int kUpdateRows = 64, kUpdateUnits = kUpdateRows * kCols / kUnit / kThreads;

// A thread has kUpdateUnits units (8 consecutive columns of a row) of the tile: one of every 16th row, or, with tensor
// cores, those of which the warp's fragments hold the sums: of two rows, in two groups of 32 columns.
template <class T, int kParts, bool kColumnMajor>
class UpdateTile {
  using E = typename Arithmetic<T, kParts>::Element;
  using W = typename Arithmetic<T, kParts>::Adapter;
  static constexpr int kTiles = Arithmetic<T, kParts>::kTiles;
  static constexpr int kTokens = kUpdateRows * pitch_of<E>(kWarpRanks);
  static constexpr int kWeights =
      kColumnMajor && kParts > 0 ? kCols * pitch_of<E>(kWarpRanks) : kWarpRanks * pitch_of<E>(kCols);

 public:
  static constexpr int kGroups = kParts > 0 ? 2 : 1, kGroupUnits = kUpdateUnits / kGroups;  // units of the same columns
  static constexpr size_t kBytes = SharedMemory::bytes<E>(kTiles * kTokens) + SharedMemory::bytes<E>(kTiles * kWeights);

  // Blocks are numbered along the columns of `out` first. Takes its shared memory.
  template <class M>
  __device__ __forceinline__ UpdateTile(SharedMemory& shared, const Matrix<M>& out)
      : row0_(blockIdx.x / ceil_div(out.cols, kCols) * kUpdateRows),
        col0_(blockIdx.x % ceil_div(out.cols, kCols) * kCols),
        tokens_(shared.take<E>(kTiles * kTokens)),
        weights_(shared.take<E>(kTiles * kWeights)) {}

  // Row of unit i, and its first column, the same for all units of a group: i / kGroupUnits.
  __device__ __forceinline__ int64_t row(int i) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return row0_ + (kParts > 0 ? warp % 4 * 16 + lane / 4 + i % 2 * 8 : unit_row(i));
  }
  __device__ __forceinline__ int64_t col(int group) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return col0_ + (kParts > 0 ? warp / 4 * 64 + group * 32 + lane % 4 * 8 : unit_col());
  }

  // This thread's units. Before `add`, which they arrive during, where registers allow it.
  static constexpr bool kFetchAhead = kParts > 0;
  __device__ __forceinline__ void fetch(Unit<T> (&units)[kUpdateUnits], const Matrix<T>& out) const {
#pragma unroll
    for (int i = 0; i < kUpdateUnits; ++i) units[i] = load_unit<false, T>(out, row(i), col(i / kGroupUnits));
  }

  // sum[i][j] += sum over ranks begin <= r < end of s[t, r] w(r, c), (t, c) being element j of this thread's unit i; w is
  // A [R, K], or B [N, R] when kColumnMajor. Every thread of the block calls it.
  __device__ __forceinline__ void add(float (&sum)[kUpdateUnits][kUnit], const Matrix<const float>& s,
                                      const Matrix<const W>& w, int begin, int end) const {
    for (int rank = begin; rank < end; rank += kWarpRanks) {
      const Consecutive slot{rank, end};
      load_ranks<kUpdateRows, kWarpRanks, kTiles>(tokens_, s, row0_, slot);
      if constexpr (kParts > 0)
        load_spread(w, rank, end);
      else if constexpr (kColumnMajor)
        load_transposed<kWarpRanks>(weights_, w, col0_, rank);
      else
        load_rows<kWarpRanks, kTiles>(weights_, w, slot, col0_);
      __syncthreads();
      if constexpr (kParts > 0)
        multiply(sum);
      else
        multiply_float32(sum);
      __syncthreads();
    }
  }

 private:
  // The columns of w in an order that gives a lane's fragments 8 consecutive columns of a row: of every 32, column
  // 8 t + 2 j + e is column 2 t + e of the j-th product.
  __device__ __forceinline__ void load_spread(const Matrix<const W>& w, int rank, int end) const {
    if constexpr (kColumnMajor) {
      const int col = threadIdx.x / 2, at = col / 32 * 32 + col % 8 / 2 * 8 + col % 32 / 8 * 2 + col % 2;
      const int first = threadIdx.x % 2 * kUnit;
      put_parts<kTiles>(weights_ + at * pitch_of<E>(kWarpRanks) + first, kWeights,
                        load_unit<false, W>(w, col0_ + col, rank + first));
    } else {
      const Matrix<const W> group{w.data, end, w.cols, w.stride, w.vectors};
      const Unit<W> unit = load_unit<false, W>(group, rank + unit_row(0), col0_ + unit_col());
      E* target = weights_ + unit_row(0) * pitch_of<E>(kCols) + unit_col() / 32 * 32 + unit_col() % 32 / 4;
      struct alignas(4) Pair {
        E v[2];
      } pairs[kTiles];
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        E of[kTiles];
        if constexpr (kTiles == 1)
          of[0] = unit.v[j];
        else
          split(unit.v[j], of);
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          pairs[k].v[j % 2] = of[k];
          if (j % 2) *reinterpret_cast<Pair*>(target + k * kWeights + j / 2 * 8) = pairs[k];
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&sum)[kUpdateUnits][kUnit]) const {
    const int warp = threadIdx.x / 32;
    uint32_t a[kTiles][4];
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      load_block<false, false>(a[k], tokens_ + k * kTokens + warp % 4 * 16 * pitch_of<E>(kWarpRanks),
                               pitch_of<E>(kWarpRanks));
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // of products, 8 columns each
      const int col = warp / 4 * 64 + pair * 16;
      uint32_t b[kTiles][4];
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        if constexpr (kColumnMajor)
          load_block<false, true>(b[k], weights_ + k * kWeights + col * pitch_of<E>(kWarpRanks), pitch_of<E>(kWarpRanks));
        else
          load_block<true, false>(b[k], weights_ + k * kWeights + col, pitch_of<E>(kCols));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float* upper = &sum[pair / 2 * 2][4 * (pair % 2) + 2 * j];
        float* lower = &sum[pair / 2 * 2 + 1][4 * (pair % 2) + 2 * j];
        float c[4] = {upper[0], upper[1], lower[0], lower[1]};
        // Of two float32 all but the three smallest products of parts, below 2^-21 of the whole; the smallest ones first.
#pragma unroll
        for (int order = kTiles - 1; order >= 0; --order)
#pragma unroll
          for (int k = 0; k <= order; ++k) mma<T>(c, a[k], b[order - k][2 * j], b[order - k][2 * j + 1]);
        upper[0] = c[0], upper[1] = c[1], lower[0] = c[2], lower[1] = c[3];
      }
    }
  }

  __device__ __forceinline__ void multiply_float32(float (&sum)[kUpdateUnits][kUnit]) const {
#pragma unroll 2
    for (int r = 0; r < kWarpRanks; ++r) {
      const float4* row = reinterpret_cast<const float4*>(weights_ + r * kPitch + unit_col());
      const float4 low = row[0], high = row[1];
#pragma unroll
      for (int i = 0; i < kUpdateUnits; ++i) {
        const float factor = tokens_[unit_row(i) * (kWarpRanks + 4) + r];
        const float w8[kUnit] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < kUnit; ++j) sum[i][j] = fmaf(factor, w8[j], sum[i][j]);
      }
    }
  }

  int64_t row0_, col0_;
  E *tokens_, *weights_;
};

inline dim3 update_grid(int64_t rows, int64_t cols) {
  return dim3(unsigned(ceil_div(cols, kCols) * ceil_div(rows, kUpdateRows)));
}

}  // namespace fastft
