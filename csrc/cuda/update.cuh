// The sums of s w for a tile of 64 tokens x 128 columns in registers, for kernels that add them to activations.
#pragma once

#include "reduce.cuh"
#include "tile.cuh"

namespace fastft {

constexpr int kUpdateRows = 64, kUpdateUnits = kUpdateRows * kCols / kUnit / kThreads;

template <class T, bool kColumnMajor>
class UpdateTile {
 public:
  const int64_t row0, col0, col;

  // Blocks are numbered along the columns of `out` first. Takes its shared memory.
  template <class M>
  __device__ __forceinline__ UpdateTile(SharedMemory& shared, const Matrix<M>& out)
      : row0(blockIdx.x / ceil_div(out.cols, kCols) * kUpdateRows),
        col0(blockIdx.x % ceil_div(out.cols, kCols) * kCols),
        col(col0 + unit_col()),
        tokens_(shared.take<float>(kUpdateRows * (kWarpRanks + 4))),
        weights_(shared.take<float>(kWarpRanks * kPitch)) {}

  // sum[i][j] += sum over ranks begin <= r < end of s[t, r] w(r, c), (t, c) being element j of this thread's unit i; w is
  // A [R, K], or B [N, R] when kColumnMajor. Every thread of the block calls it.
  __device__ __forceinline__ void add(float (&sum)[kUpdateUnits][kUnit], const Matrix<const float>& s, const Weights<T>& w,
                                      int begin, int end) const {
    for (int rank = begin; rank < end; rank += kWarpRanks) {
      const Consecutive slot{rank, end};
      load_ranks<kUpdateRows, kWarpRanks>(tokens_, s, row0, slot);
      if (kColumnMajor)
        w.template load_transposed<kWarpRanks>(weights_, col0, rank);
      else
        w.template load<kWarpRanks>(weights_, slot, col0);
      __syncthreads();
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
      __syncthreads();
    }
  }

 private:
  float *tokens_, *weights_;
};

// Grid and shared memory of such a kernel.
inline dim3 update_grid(int64_t rows, int64_t cols) {
  return dim3(unsigned(ceil_div(cols, kCols) * ceil_div(rows, kUpdateRows)));
}
constexpr size_t kUpdateBytes =
    SharedMemory::bytes<float>(kUpdateRows * (kWarpRanks + 4)) + SharedMemory::bytes<float>(kWarpRanks * kPitch);

}  // namespace fastft
