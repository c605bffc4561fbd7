// The kernels of the LoRA family. Maths, shapes and the definition of the mask: fastft/ops/lora.py. T tokens, K in-features,
// N out-features, R rank. Rank tiles of 16, 32 or 64; a larger R takes several tiles, each of which reads the activations
// again. kParts: see Arithmetic.
#pragma once

#include "../common/philox.h"
#include "products.cuh"
#include "update.cuh"

namespace fastft {

// Blocks that share a multiprocessor. What streams activations past 16 ranks on tensor cores has registers for three, which
// each keep 8 KiB of loads in flight.
template <int kRanks, int kParts>
constexpr int kStreaming = kRanks == 16 && kParts > 0 ? 3 : 2;

// Two otherwise, unless the 128 registers which that leaves a thread make ptxas (13.0) spill: 24 to 56 bytes in
// grad_sb_kernel for sm_80, 48 to 64 in grad_a_kernel for sm_100.
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

  // The slots go to the padding of `rows`, whose last 16 bytes of `pitch` nobody uses.
  template <class E>
  __device__ __forceinline__ RankTile(const Groups& groups, E* rows, int pitch)
      : slots{reinterpret_cast<float*>(rows + pitch) - 4, pitch * int(sizeof(E)) / 4} {
    if (threadIdx.x < kSlots) slots[threadIdx.x] = find_slot(groups, blockIdx.y * kSlots + threadIdx.x);
    __syncthreads();
    first_group = slots[0].group;
    copies = slots[kSlots - 1].group - first_group + 1;
  }

  // This warp's copy of the activation tile.
  __device__ __forceinline__ int copy_of_warp() const { return slots[threadIdx.x / 32 % kSlots].group - first_group; }
};

// -- S = drop(X) At and the packed masks: one pass over X. Grid: token tiles, rank tiles, parts of K.
template <class T, int kRanks, int kParts>
struct Shrink : Arithmetic<T, kParts> {
  using E = typename Shrink::Element;
  using Dot = RowDot<T, kRanks, kParts, false>;
  static constexpr int kTileSize = kRows * pitch_of<E>(kCols), kWeights = Shrink::kTiles * Dot::kTile;
  __host__ __device__ static constexpr int act_size(int groups) {
    const int tiles = max_copies<kRanks>(groups) * kTileSize, buffer = Dot::kBuffer * int(sizeof(float) / sizeof(E));
    return tiles > buffer ? tiles : buffer;
  }
  static constexpr size_t bytes(int groups) {
    return SharedMemory::bytes<E>(kWeights) + SharedMemory::bytes<E>(act_size(groups));
  }
};

template <class T, int kRanks, int kParts>
__global__ void __launch_bounds__(kThreads, kStreaming<kRanks, kParts>)
    shrink_kernel(Matrix<const T> x, Matrix<const typename Arithmetic<T, kParts>::Adapter> a, Groups groups,
                  const int64_t* seeds, uint32_t threshold, uint8_t* masks, float* partial, int tiles_per_part) {
  using P = Shrink<T, kRanks, kParts>;
  using E = typename P::E;
  SharedMemory shared;
  E* weights = shared.take<E>(P::kWeights);
  const RankTile<kRanks> tile(groups, weights, pitch_of<E>(kCols));
  E* act = shared.take<E>(P::act_size(groups.count));
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

  typename P::Dot dot;
  fetch(begin);
  for (int col_tile = begin; col_tile < end; ++col_tile) {
    if (!seeds) ahead.store(act);
#pragma unroll 1
    for (int copy = 0; seeds && copy < tile.copies; ++copy) ahead.store_kept(act + copy * P::kTileSize, keep, copy);
    load_rows<kRanks, P::kTiles>(weights, a, tile.slots, int64_t(col_tile) * kCols);
    __syncthreads();
    if (col_tile + 1 < end) fetch(col_tile + 1);
    dot.add(act + tile.copy_of_warp() * P::kTileSize, weights);
    __syncthreads();
  }
  float* buffer = reinterpret_cast<float*>(act);
  dot.publish(buffer);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
    const int64_t row = row0 + i / kRanks;
    const Slot& slot = tile.slots[i % kRanks / kWarpRanks];
    const int rank = slot.rank + i % kWarpRanks;
    if (row < x.rows && rank < slot.end) put(partial, (blockIdx.z * x.rows + row) * a.rows + rank, P::Dot::total(buffer, i));
  }
}

// -- Y += scale S Bt. Grid: update_grid.
template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(Matrix<T> y, Matrix<const float> s, Matrix<const typename Arithmetic<T, kParts>::Adapter> b, float scale) {
  using Tile = UpdateTile<T, kParts, true>;
  SharedMemory shared;
  const Tile tile(shared, y);
  Unit<T> ahead[kUpdateUnits];
  if constexpr (Tile::kFetchAhead) tile.fetch(ahead, y);
  float sum[kUpdateUnits][kUnit] = {};
  tile.add(sum, s, b, 0, static_cast<int>(s.cols));
  if constexpr (!Tile::kFetchAhead) tile.fetch(ahead, y);
#pragma unroll
  for (int i = 0; i < kUpdateUnits; ++i) {
    const int64_t row = tile.row(i), col = tile.col(i / Tile::kGroupUnits);
    if (row >= y.rows || col >= y.cols) continue;
    Unit<T>& unit = ahead[i];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) unit.v[j] = T(fmaf(scale, sum[i][j], static_cast<float>(unit.v[j])));
    store_unit(y, row, col, unit);
  }
}

// -- dX += scale (dS A), for each group where its mask keeps the element; what all drop stays as it is, bit for bit.
// One pass over dX, float32 sums over all groups. Grid: update_grid.
template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 2)
    grad_x_kernel(Matrix<T> dx, Matrix<const float> ds, Matrix<const typename Arithmetic<T, kParts>::Adapter> a,
                  Groups groups, const uint8_t* masks, float scale) {
  using Tile = UpdateTile<T, kParts, false>;
  SharedMemory shared;
  const Tile tile(shared, dx);
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
      const int64_t row = tile.row(i), col = tile.col(i / Tile::kGroupUnits);
      if (row >= dx.rows || col >= dx.cols) continue;
      const unsigned bits = masks ? get(masks, (g * dx.rows + row) * ceil_div(dx.cols, kUnit) + col / kUnit) : 0xffu;
      changed |= bits << kUnit * i;
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        if (bits >> j & 1) sum[i][j] += part[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < kUpdateUnits; ++i) {
    const int64_t row = tile.row(i), col = tile.col(i / Tile::kGroupUnits);
    if (row >= dx.rows || col >= dx.cols) continue;
    Unit<T> unit = load_unit<false, T>(dx, row, col);
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
      if (changed >> (kUnit * i + j) & 1) unit.v[j] = T(fmaf(scale, sum[i][j], static_cast<float>(unit.v[j])));
    store_unit(dx, row, col, unit);
  }
}

// -- dS = dY B and dBt = St dY: one pass over dY. Grid: chunks of column tiles, rank tiles, parts of T.
// A block walks its tokens once per column tile and keeps that tile's dB in registers. Its dS goes to a workspace slice
// that no other block touches, first stored and then added to, always by the same thread.
template <class T, int kRanks, int kParts>
struct GradSb : Arithmetic<T, kParts> {
  using E = typename GradSb::Element;
  using Dot = RowDot<T, kRanks, kParts, true>;
  using Sum = TokenSum<T, kRanks, kParts>;
  static constexpr int kAct = kRows * pitch_of<E>(kCols), kTokens = GradSb::kTiles * kRows * pitch_of<E>(kRanks);
  static constexpr int kWeights = GradSb::kTiles * Dot::kTile;  // and scratch
  static_assert(Sum::kScratch <= kWeights);
  // Tensor cores leave registers to hold the next tile in, except at 64 ranks.
  static constexpr bool kFetchAhead = kParts > 0 && kRanks < 64;
  static constexpr size_t kBytes = SharedMemory::bytes<E>(kAct) + SharedMemory::bytes<E>(kWeights) +
                                   SharedMemory::bytes<E>(kTokens) + SharedMemory::bytes<float>(Dot::kBuffer);
};

template <class T, int kRanks, int kParts>
__global__ void __launch_bounds__(kThreads, kRanks == 16 && kParts == 1 ? 3 : kGradSbBlocks)
    grad_sb_kernel(Matrix<const T> dy, Matrix<const float> s, Matrix<const typename Arithmetic<T, kParts>::Adapter> b,
                   float* ds_partial, float* db_partial, int col_tiles_per_chunk, int row_tiles_per_part) {
  using P = GradSb<T, kRanks, kParts>;
  using E = typename P::E;
  SharedMemory shared;
  E* act = shared.take<E>(P::kAct);
  E* weights = shared.take<E>(P::kWeights);
  E* tokens = shared.take<E>(P::kTokens);
  float* buffer = shared.take<float>(P::Dot::kBuffer);
  const int rank0 = blockIdx.y * kRanks;
  const int begin = blockIdx.z * row_tiles_per_part;
  const int first_col = blockIdx.x * col_tiles_per_chunk;
  const int end_col = min_int(first_col + col_tiles_per_chunk, static_cast<int>(ceil_div(dy.cols, kCols)));
  const int end = min_int(begin + row_tiles_per_part, static_cast<int>(ceil_div(dy.rows, kRows)));
  const Consecutive slots{rank0, static_cast<int>(s.cols)};

  for (int col_tile = first_col; col_tile < end_col; ++col_tile) {
    const int64_t col0 = int64_t(col_tile) * kCols;
    if constexpr (kParts > 0)
      load_columns<kRanks, P::kTiles>(weights, b, col0, rank0);
    else
      load_transposed<kRanks>(weights, b, col0, rank0);
    typename P::Sum sum;
    TileRegisters<T> ahead;
    if constexpr (P::kFetchAhead) ahead.load(dy, int64_t(begin) * kRows, col0);
    for (int row_tile = begin; row_tile < end; ++row_tile) {
      const int64_t row0 = int64_t(row_tile) * kRows;
      if constexpr (P::kFetchAhead)
        ahead.store(act);
      else
        load_tile(act, dy, row0, col0);
      load_ranks<kRows, kRanks, P::kTiles>(tokens, s, row0, slots);
      __syncthreads();
      if (P::kFetchAhead && row_tile + 1 < end) ahead.load(dy, row0 + kRows, col0);
      sum.add(act, tokens);
      typename P::Dot dot;
      dot.multiply(act, weights);
      dot.publish(buffer);
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
        const int64_t row = row0 + i / kRanks;
        const int rank = rank0 + i % kRanks;
        if (row >= dy.rows || rank >= s.cols) continue;
        const int64_t target = (blockIdx.x * dy.rows + row) * s.cols + rank;
        const float part = P::Dot::total(buffer, i);
        put(ds_partial, target, col_tile == first_col ? part : get(ds_partial, target) + part);
      }
    }
    sum.template each<true>(reinterpret_cast<float*>(weights), [&](int r, int c, float value) {
      const int64_t rank = rank0 + r, col = col0 + c;
      if (col < dy.cols && rank < s.cols) put(db_partial, (blockIdx.z * dy.cols + col) * s.cols + rank, value);
    });
  }
}

// -- dA = dSt drop(X), group by group. One pass over X. Grid: column tiles, rank tiles, parts of T.
template <class T, int kRanks, int kParts>
struct GradA : Arithmetic<T, kParts> {
  using E = typename GradA::Element;
  using Sum = TokenSum<T, kRanks, kParts>;
  static constexpr int kTileSize = kRows * pitch_of<E>(kCols), kTokens = GradA::kTiles * kRows * pitch_of<E>(kRanks);
  __host__ __device__ static constexpr int act_size(int groups) {
    const int tiles = max_copies<kRanks>(groups) * kTileSize;
    return tiles > Sum::kScratch ? tiles : Sum::kScratch;
  }
  static constexpr size_t bytes(int groups) {
    return SharedMemory::bytes<E>(kTokens) + SharedMemory::bytes<E>(act_size(groups));
  }
};

template <class T, int kRanks, int kParts>
__global__ void __launch_bounds__(kThreads, kRanks == 16 && kParts > 0 ? 3 : kGradABlocks)
    grad_a_kernel(Matrix<const T> x, Matrix<const float> ds, Groups groups, const uint8_t* masks, float* partial,
                  int row_tiles_per_part) {
  using P = GradA<T, kRanks, kParts>;
  using E = typename P::E;
  SharedMemory shared;
  E* tokens = shared.take<E>(P::kTokens);
  const RankTile<kRanks> tile(groups, tokens, pitch_of<E>(kRanks));
  E* act = shared.take<E>(P::act_size(groups.count));
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

  typename P::Sum sum;
  fetch(begin);
  for (int row_tile = begin; row_tile < end; ++row_tile) {
    if (!masks) ahead.store(act);
#pragma unroll 1
    for (int copy = 0; masks && copy < tile.copies; ++copy) ahead.store_kept(act + copy * P::kTileSize, keep, copy);
    load_ranks<kRows, kRanks, P::kTiles>(tokens, ds, int64_t(row_tile) * kRows, tile.slots);
    __syncthreads();
    if (row_tile + 1 < end) fetch(row_tile + 1);
    sum.add(act + tile.copy_of_warp() * P::kTileSize, tokens);
    __syncthreads();
  }
  sum.template each<false>(reinterpret_cast<float*>(act), [&](int r, int c, float value) {
    const Slot& slot = tile.slots[r / kWarpRanks];
    const int rank = slot.rank + r % kWarpRanks;
    if (rank < slot.end && col0 + c < x.cols)
      put(partial, (int64_t(blockIdx.z) * ds.cols + rank) * x.cols + col0 + c, value);
  });
}

}  // namespace fastft
