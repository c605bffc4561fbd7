// The kernels of the LoRA family. Maths, shapes and the definition of the mask: fastft/ops/lora.py. T tokens, K in-features,
// N out-features, R rank. Rank tiles of 16, 32 or 64; a larger R takes several tiles, each of which reads the activations
// again.
#pragma once

#include "../common/philox.h"
#include "update.cuh"

namespace fastft {

// Blocks that share a multiprocessor: two, unless the 128 registers which that leaves a thread make ptxas (13.0) spill:
// 24 to 56 bytes in grad_sb_kernel for sm_80, 48 to 64 in grad_a_kernel for sm_100.
#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;  // the host's pass over this file compiles no kernel
#endif
constexpr int kGradSbBlocks = kArch >= 900 ? 2 : 1, kGradABlocks = kArch < 1000 ? 2 : 1;

__device__ __forceinline__ int min_int(int a, int b) { return a < b ? a : b; }

// Masked copies of an activation tile that a block of `kRanks` ranks may need.
template <int kRanks>
__host__ __device__ constexpr int max_copies(int groups) {
  return groups < kRanks / kWarpRanks ? groups : kRanks / kWarpRanks;
}

// The slots of this block's rank tile and the groups that they belong to, which follow each other.
template <int kRanks>
struct RankTile {
  static constexpr int kSlots = kRanks / kWarpRanks;
  Slots slots;
  int first_group, copies;

  // The slots go to the padding of `rows`, whose last 4 floats of `pitch` nobody uses.
  __device__ __forceinline__ RankTile(const Groups& groups, float* rows, int pitch) : slots{rows + pitch - 4, pitch} {
    if (threadIdx.x < kSlots) slots[threadIdx.x] = find_slot(groups, blockIdx.y * kSlots + threadIdx.x);
    __syncthreads();
    first_group = slots[0].group;
    copies = slots[kSlots - 1].group - first_group + 1;
  }

  // Where this warp's copy of the activation tile starts, in floats.
  __device__ __forceinline__ int copy_of_warp() const {
    return (slots[threadIdx.x / 32 % kSlots].group - first_group) * kRows * kPitch;
  }
};

// -- S = drop(X) At and the packed masks: one pass over X. Grid: token tiles, rank tiles, parts of K.
template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(Matrix<const T> x, Weights<T> a, Groups groups, const int64_t* seeds, uint32_t threshold, uint8_t* masks,
                  float* partial, int tiles_per_part) {
  SharedMemory shared;
  float* weights = shared.take<float>(kRanks * kPitch);
  const RankTile<kRanks> tile(groups, weights, kPitch);
  float* act = shared.take<float>(max_copies<kRanks>(groups.count) * kRows * kPitch);
  static_assert(RowDot<kRanks>::kBuffer <= kRows * kPitch);
  const int64_t row0 = int64_t(blockIdx.x) * kRows;
  const int begin = blockIdx.z * tiles_per_part;
  const int end = min_int(begin + tiles_per_part, static_cast<int>(ceil_div(x.cols, kCols)));

  TileRegisters<T> ahead;
  unsigned keep[kUnits];
  auto fetch = [&](int col_tile) {
    const int64_t col = int64_t(col_tile) * kCols + unit_col();
    ahead.load(x, row0, int64_t(col_tile) * kCols);
    if (!seeds) return;
    const int64_t left = x.cols - col;
    const unsigned inside = left >= kUnit ? 0xffu : left > 0 ? (1u << left) - 1 : 0u;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) keep[i] = 0;
#pragma unroll 1
    for (int copy = 0; copy < tile.copies; ++copy) {
      const int group = tile.first_group + copy;
      const uint64_t key = static_cast<uint64_t>(seeds[group]);
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int64_t row = row0 + unit_row(i);
        if (row >= x.rows || left <= 0) continue;
        const unsigned bits = inside & philox::keep_byte(key, row, static_cast<uint32_t>(col / kUnit), threshold);
        // Of the rank tiles that a group spans, the one with its first slot writes the mask.
        if (copy > 0 || tile.slots[0].first)
          put(masks, (group * x.rows + row) * ceil_div(x.cols, kUnit) + col / kUnit, static_cast<uint8_t>(bits));
        keep[i] |= bits << 8 * copy;
      }
    }
  };

  RowDot<kRanks> dot;
  fetch(begin);
  for (int col_tile = begin; col_tile < end; ++col_tile) {
    if (!seeds) ahead.store(act);
#pragma unroll 1
    for (int copy = 0; seeds && copy < tile.copies; ++copy) ahead.store_kept(act + copy * kRows * kPitch, keep, copy);
    a.template load<kRanks>(weights, tile.slots, int64_t(col_tile) * kCols);
    __syncthreads();
    if (col_tile + 1 < end) fetch(col_tile + 1);
    dot.add(act + tile.copy_of_warp(), weights);
    __syncthreads();
  }
  dot.publish(act);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
    const int64_t row = row0 + i / kRanks;
    const Slot& slot = tile.slots[i % kRanks / kWarpRanks];
    const int rank = slot.rank + i % kWarpRanks;
    if (row < x.rows && rank < slot.end)
      put(partial, (blockIdx.z * x.rows + row) * a.rows + rank, RowDot<kRanks>::total(act, i));
  }
}

// -- Y += scale S Bt. Grid: update_grid.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(Matrix<T> y, Matrix<const float> s, Weights<T> b, float scale) {
  SharedMemory shared;
  const UpdateTile<T, true> tile(shared, y);
  float sum[kUpdateUnits][kUnit] = {};
  tile.add(sum, s, b, 0, static_cast<int>(s.cols));
#pragma unroll
  for (int i = 0; i < kUpdateUnits; ++i) {
    const int64_t row = tile.row0 + unit_row(i);
    if (row >= y.rows || tile.col >= y.cols) continue;
    Unit<T> unit = load_unit<false, T>(y, row, tile.col);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) unit.v[j] = T(fmaf(scale, sum[i][j], static_cast<float>(unit.v[j])));
    store_unit(y, row, tile.col, unit);
  }
}

// -- dX += scale (dS A), for each group where its mask keeps the element; what all drop stays as it is, bit for bit.
// One pass over dX, float32 sums over all groups. Grid: update_grid.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_x_kernel(Matrix<T> dx, Matrix<const float> ds, Weights<T> a, Groups groups, const uint8_t* masks, float scale) {
  SharedMemory shared;
  const UpdateTile<T, false> tile(shared, dx);
  static_assert(kUpdateUnits * kUnit == 32, "a bit of `changed` per element");
  float sum[kUpdateUnits][kUnit] = {};
  unsigned changed = 0;
  int begin = groups.begin;
  for (int g = 0; g < groups.count; ++g) {
    const int end = groups.end[g];
    if (begin == end) continue;
    float part[kUpdateUnits][kUnit] = {};
    tile.add(part, ds, a, begin, end);
    begin = end;
#pragma unroll
    for (int i = 0; i < kUpdateUnits; ++i) {
      const int64_t row = tile.row0 + unit_row(i);
      if (row >= dx.rows || tile.col >= dx.cols) continue;
      const unsigned bits = masks ? get(masks, (g * dx.rows + row) * ceil_div(dx.cols, kUnit) + tile.col / kUnit) : 0xffu;
      changed |= bits << kUnit * i;
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        if (bits >> j & 1) sum[i][j] += part[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < kUpdateUnits; ++i) {
    const int64_t row = tile.row0 + unit_row(i);
    if (row >= dx.rows || tile.col >= dx.cols) continue;
    Unit<T> unit = load_unit<false, T>(dx, row, tile.col);
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
      if (changed >> (kUnit * i + j) & 1) unit.v[j] = T(fmaf(scale, sum[i][j], static_cast<float>(unit.v[j])));
    store_unit(dx, row, tile.col, unit);
  }
}

// -- dS = dY B and dBt = St dY: one pass over dY. Grid: chunks of column tiles, rank tiles, parts of T.
// A block walks its tokens once per column tile and keeps that tile's dB in registers. Its dS goes to a workspace slice
// that no other block touches, first stored and then added to, always by the same thread.
template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads, kGradSbBlocks)
    grad_sb_kernel(Matrix<const T> dy, Matrix<const float> s, Weights<T> b, float* ds_partial, float* db_partial,
                   int col_tiles_per_chunk, int row_tiles_per_part) {
  SharedMemory shared;
  float* act = shared.take<float>(kRows * kPitch);
  float* weights = shared.take<float>(kRanks * kPitch);
  float* tokens = shared.take<float>(kRows * (kRanks + 4));
  float* buffer = shared.take<float>(RowDot<kRanks>::kBuffer);
  const int rank0 = blockIdx.y * kRanks, first_col = blockIdx.x * col_tiles_per_chunk,
            begin = blockIdx.z * row_tiles_per_part;
  const int end_col = min_int(first_col + col_tiles_per_chunk, static_cast<int>(ceil_div(dy.cols, kCols)));
  const int end = min_int(begin + row_tiles_per_part, static_cast<int>(ceil_div(dy.rows, kRows)));
  const Consecutive slots{rank0, static_cast<int>(s.cols)};

  for (int col_tile = first_col; col_tile < end_col; ++col_tile) {
    const int64_t col0 = int64_t(col_tile) * kCols;
    b.template load_transposed<kRanks>(weights, col0, rank0);
    TokenSum<kRanks> sum;
    for (int row_tile = begin; row_tile < end; ++row_tile) {
      const int64_t row0 = int64_t(row_tile) * kRows;
      load_tile(act, dy, row0, col0);
      load_ranks<kRows, kRanks>(tokens, s, row0, slots);
      __syncthreads();
      sum.add(act, tokens);
      RowDot<kRanks> dot;
      dot.add(act, weights);
      dot.publish(buffer);
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
        const int64_t row = row0 + i / kRanks;
        const int rank = rank0 + i % kRanks;
        if (row >= dy.rows || rank >= s.cols) continue;
        const int64_t target = (blockIdx.x * dy.rows + row) * s.cols + rank;
        const float part = RowDot<kRanks>::total(buffer, i);
        put(ds_partial, target, col_tile == first_col ? part : get(ds_partial, target) + part);
      }
    }
    sum.combine(weights);
#pragma unroll 1
    for (int i = threadIdx.x; i < kCols * kRanks; i += kThreads) {
      const int64_t col = col0 + i / kRanks;
      const int rank = rank0 + i % kRanks;
      if (col < dy.cols && rank < s.cols)
        put(db_partial, (blockIdx.z * dy.cols + col) * s.cols + rank, weights[i % kRanks * kPitch + i / kRanks]);
    }
    __syncthreads();  // before the next column tile's weights; a thread overwrites what it read itself, but only as yet
  }
}

// -- dA = dSt drop(X), group by group. One pass over X. Grid: column tiles, rank tiles, parts of T.
template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads, kGradABlocks)
    grad_a_kernel(Matrix<const T> x, Matrix<const float> ds, Groups groups, const uint8_t* masks, float* partial,
                  int row_tiles_per_part) {
  SharedMemory shared;
  float* tokens = shared.take<float>(kRows * (kRanks + 4));
  const RankTile<kRanks> tile(groups, tokens, kRanks + 4);
  const int act_rows = max_copies<kRanks>(groups.count) * kRows;
  float* act = shared.take<float>((act_rows > kRanks ? act_rows : kRanks) * kPitch);
  const int64_t col0 = int64_t(blockIdx.x) * kCols, col = col0 + unit_col();
  const int begin = blockIdx.z * row_tiles_per_part;
  const int end = min_int(begin + row_tiles_per_part, static_cast<int>(ceil_div(x.rows, kRows)));

  TileRegisters<T> ahead;
  unsigned keep[kUnits];
  auto fetch = [&](int row_tile) {
    const int64_t row0 = int64_t(row_tile) * kRows;
    ahead.load(x, row0, col0);
    if (!masks) return;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int64_t row = row0 + unit_row(i);
      keep[i] = 0;
      if (row >= x.rows || col >= x.cols) continue;
#pragma unroll 1
      for (int copy = 0; copy < tile.copies; ++copy)
        keep[i] |= unsigned(get(masks, ((tile.first_group + copy) * x.rows + row) * ceil_div(x.cols, kUnit) + col / kUnit))
                   << 8 * copy;
    }
  };

  TokenSum<kRanks> sum;
  fetch(begin);
  for (int row_tile = begin; row_tile < end; ++row_tile) {
    if (!masks) ahead.store(act);
#pragma unroll 1
    for (int copy = 0; masks && copy < tile.copies; ++copy) ahead.store_kept(act + copy * kRows * kPitch, keep, copy);
    load_ranks<kRows, kRanks>(tokens, ds, int64_t(row_tile) * kRows, tile.slots);
    __syncthreads();
    if (row_tile + 1 < end) fetch(row_tile + 1);
    sum.add(act + tile.copy_of_warp(), tokens);
    __syncthreads();
  }
  sum.combine(act);
#pragma unroll 1
  for (int i = threadIdx.x; i < kCols * kRanks; i += kThreads) {
    const Slot& slot = tile.slots[i / kCols / kWarpRanks];
    const int rank = slot.rank + i / kCols % kWarpRanks;
    const int64_t target_col = col0 + i % kCols;
    if (rank < slot.end && target_col < x.cols)
      put(partial, (int64_t(blockIdx.z) * ds.cols + rank) * x.cols + target_col, act[i / kCols * kPitch + i % kCols]);
  }
}

}  // namespace fastft
