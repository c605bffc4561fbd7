// The two products of tile.cuh, on tensor cores and (kParts = 0, see Arithmetic) in float32.
#pragma once

#include "tile.cuh"

namespace fastft {

// What both forms of RowDot share: a warp has a slot and a slice of the tile's columns.
template <int kRanks>
struct Slices {
  static constexpr int kSlots = kRanks / kWarpRanks, kSlices = kWarps / kSlots, kSliceCols = kCols / kSlices;
  static constexpr int kBuffer = kSlices * kRows * kRanks;  // floats of shared memory for `publish`

  // Element `i` = t * kRanks + r of the block's 32 x kRanks sums, the warps' parts in ascending order.
  __device__ __forceinline__ static float total(const float* buffer, int i) {
    float sum = buffer[i];
#pragma unroll
    for (int slice = 1; slice < kSlices; ++slice) sum += buffer[slice * kRows * kRanks + i];
    return sum;
  }
};

// Of the adapter's tile: kColumns, tile[c][r] (load_columns), or tile[r][c] (load_rows).
template <class T, int kRanks, int kParts, bool kColumns>
struct RowDot : Slices<kRanks> {
  using S = Slices<kRanks>;
  static constexpr int kTile = kColumns ? kCols * pitch_of<T>(kRanks) : kRanks * pitch_of<T>(kCols);

  float acc[2][2][4] = {};  // tokens 16 i, ranks 8 j of the warp's 16

  // A tile's products are summed up on the tensor cores, the tiles here (mma.cuh).
  __device__ __forceinline__ void add(const T* act, const T* w) {
    RowDot tile;
    tile.multiply(act, w);
#pragma unroll
    for (int i = 0; i < 16; ++i) acc[i / 8][i / 4 % 2][i % 4] += tile.acc[i / 8][i / 4 % 2][i % 4];
  }

  // The same for one tile only. The smallest parts come first.
  __device__ __forceinline__ void multiply(const T* act, const T* w) {
    const int warp = threadIdx.x / 32, slot = warp % S::kSlots;
    act += warp / S::kSlots * S::kSliceCols;
    w += kColumns ? warp / S::kSlots * S::kSliceCols * pitch_of<T>(kRanks) + slot * kWarpRanks
                  : slot * kWarpRanks * pitch_of<T>(kCols) + warp / S::kSlots * S::kSliceCols;
#pragma unroll 2
    for (int c = 0; c < S::kSliceCols; c += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_block<false, false>(a[i], act + 16 * i * pitch_of<T>(kCols) + c, pitch_of<T>(kCols));
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part) {
        uint32_t b[4];
        if constexpr (kColumns)
          load_block<true, false>(b, w + part * kTile + c * pitch_of<T>(kRanks), pitch_of<T>(kRanks));
        else
          load_block<false, true>(b, w + part * kTile + c, pitch_of<T>(kCols));
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) mma<T>(acc[i][j], a[i], b[2 * j], b[2 * j + 1]);
      }
    }
  }

  // Each warp's sums into `buffer`; after a barrier `total` adds them up.
  __device__ __forceinline__ void publish(float* buffer) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    buffer += (warp / S::kSlots * kRows + lane / 4) * kRanks + warp % S::kSlots * kWarpRanks + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) buffer[(16 * i + k / 2 * 8) * kRanks + 8 * j + k % 2] = acc[i][j][k];
  }
};

template <class T, int kRanks, bool kColumns>
struct RowDot<T, kRanks, 0, kColumns> : Slices<kRanks> {
  using S = Slices<kRanks>;
  static constexpr int kTile = kRanks * kPitch;  // tile[r][c] in any case

  float acc[4][4] = {};  // tokens lane / 4 + 8 i, ranks lane % 4 + 4 j of the warp's 16

  __device__ __forceinline__ void add(const float* act, const float* w) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    act += lane / 4 * kPitch + warp / S::kSlots * S::kSliceCols;
    w += (warp % S::kSlots * kWarpRanks + lane % 4) * kPitch + warp / S::kSlots * S::kSliceCols;
#pragma unroll 1
    for (int c = 0; c < S::kSliceCols; c += 4) {
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

  __device__ __forceinline__ void multiply(const float* act, const float* w) { add(act, w); }

  __device__ __forceinline__ void publish(float* buffer) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    buffer += (warp / S::kSlots * kRows + lane / 4) * kRanks + warp % S::kSlots * kWarpRanks + lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) buffer[i * 8 * kRanks + 4 * j] = acc[i][j];
  }
};

// On tensor cores a warp has a slot, a slice of the columns and all tokens, so that its sums are whole.
template <class T, int kRanks, int kParts>
struct TokenSum {
  static constexpr int kSlots = kRanks / kWarpRanks, kSliceCols = kCols * kSlots / kWarps, kBlocks = kSliceCols / 16;
  static constexpr int kScratch = 0;

  float acc[kBlocks][2][4] = {};  // the warp's 16 ranks, columns 16 i + 8 j of its slice

  __device__ __forceinline__ void add(const T* act, const T* s) {
    const int warp = threadIdx.x / 32;
    act += warp / kSlots * kSliceCols;
    s += warp % kSlots * kWarpRanks;
    uint32_t a[2][kParts][4];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        load_block<true, true>(a[k][part], s + (part * kRows + 16 * k) * pitch_of<T>(kRanks), pitch_of<T>(kRanks));
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      uint32_t b[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        load_block<true, false>(b[k], act + 16 * k * pitch_of<T>(kCols) + 16 * i, pitch_of<T>(kCols));
      float sum[2][4] = {};
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part)
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int j = 0; j < 2; ++j) mma<T>(sum[j], a[k][part], b[k][2 * j], b[k][2 * j + 1]);
#pragma unroll
      for (int k = 0; k < 8; ++k) acc[i][k / 4][k % 4] += sum[k / 4][k % 4];
    }
  }

  // Calls f(r, c, sum) for the block's sums that this thread has: rank r of the tile, column c.
  template <bool kAlongRanks, class F>
  __device__ __forceinline__ void each(float*, F&& f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int rank = warp % kSlots * kWarpRanks + lane / 4, col = warp / kSlots * kSliceCols + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int k = 0; k < 8; ++k) f(rank + k % 4 / 2 * 8, col + 16 * i + k / 4 * 8 + k % 2, acc[i][k / 4][k % 4]);
  }
};

template <class T, int kRanks>
struct TokenSum<T, kRanks, 0> {
  static constexpr int kSlots = kRanks / kWarpRanks, kSlices = kWarps / kSlots, kSliceRows = kRows / kSlices;
  static constexpr int kScratch = kRanks * kPitch;  // floats of shared memory for `each`

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

  // The same; neighbouring threads have neighbouring ranks if kAlongRanks, else columns. Ends with a barrier.
  template <bool kAlongRanks, class F>
  __device__ __forceinline__ void each(float* scratch, F&& f) const {
    combine(scratch);
#pragma unroll 1
    for (int i = threadIdx.x; i < kCols * kRanks; i += kThreads) {
      const int rank = kAlongRanks ? i % kRanks : i / kCols, col = kAlongRanks ? i / kRanks : i % kCols;
      f(rank, col, scratch[rank * kPitch + col]);
    }
    __syncthreads();
  }

 private:
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
