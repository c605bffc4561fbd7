// The chosen entries of leftᵀ right by a GEMM of which only they are written: tiles of 128 x 128 of the product, of which a
// block holds the sums in registers. 16-bit operands on tensor cores, float32 by fmaf.
#pragma once

#include "entries.cuh"

namespace fastft {

template <class T>
struct SampledTile {
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr int kSide = 128, kTokens = kTensorCores ? 32 : 16, kStages = 4;  // tokens of a stage
  static constexpr int kPitch = pitch_of<T>(kSide), kOperand = kTokens * kPitch, kSumsPitch = kSide + 4;
  static constexpr int kUnits = kTokens * kSide / kUnit / kThreads;  // of an operand, by a thread
  // Stages first, then sums; and where the entries of each row of the tile begin and end.
  static constexpr size_t kHeld =
      std::max(SharedMemory::bytes<T>(kStages * 2 * kOperand), SharedMemory::bytes<float>(kSide* kSumsPitch));
  static constexpr size_t kBytes = kHeld + SharedMemory::bytes<int64_t>(2 * kSide);
  static_assert(kBytes <= kMostShared);

  // A stage of one operand, of which the columns from col0 on. Asynchronous where its rows are 16-byte aligned.
  __device__ __forceinline__ static void fetch(T* to, const Matrix<const T>& from, int64_t token0, int64_t col0) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int64_t token = token0 + unit_row(i), col = col0 + unit_col();
      T* target = to + unit_row(i) * kPitch + unit_col();
      if (from.vectors) {
        const bool inside = token < from.rows && col < from.cols;
        const T* source = inside ? from.data + token * from.stride + col : from.data;
        if (inside) note_load(from.data, sizeof(Unit<T>));
#pragma unroll
        for (int j = 0; j < int(sizeof(Unit<T>) / 16); ++j)
          ptx::copy_async(target + j * (16 / sizeof(T)), source + j * (16 / sizeof(T)), inside);
      } else {
        put_unit(target, load_unit<true, T>(from, token, col));
      }
    }
  }
};

// The sums of a tile on tensor cores: a warp has 64 x 32 of them.
template <class T>
struct TileSums {
  using Tile = SampledTile<T>;
  float acc[4][4][4] = {};  // rows 16 i, columns 8 n of the warp's

  __device__ __forceinline__ static int row0() { return threadIdx.x / 32 % 2 * 64; }
  __device__ __forceinline__ static int col0() { return threadIdx.x / 64 * 32; }

  // A stage is summed up on the tensor cores, the stages here (mma.cuh), a block of 16 rows after another.
  __device__ __forceinline__ void add(const T* left, const T* right) {
    uint32_t b[2][2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        load_block<true, false>(b[k][n], right + 16 * k * Tile::kPitch + col0() + 16 * n, Tile::kPitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[2][4];
      float sum[4][4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        load_block<true, true>(a[k], left + 16 * k * Tile::kPitch + row0() + 16 * i, Tile::kPitch);
#pragma unroll
        for (int n = 0; n < 4; ++n) mma<T>(sum[n], a[k], b[k][n / 2][n % 2 * 2], b[k][n / 2][n % 2 * 2 + 1]);
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) acc[i][j / 4][j % 4] += sum[j / 4][j % 4];
    }
  }
  __device__ __forceinline__ void fold() {}

  __device__ __forceinline__ void publish(float* sums) const {
    const int lane = threadIdx.x % 32;
    sums += (row0() + lane / 4) * Tile::kSumsPitch + col0() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; ++i)
      sums[(i / 16 * 16 + i % 4 / 2 * 8) * Tile::kSumsPitch + i / 4 % 4 * 8 + i % 2] = acc[i / 16][i / 4 % 4][i % 4];
  }
};

// In float32: a thread has four rows and four columns of each quarter of the tile.
template <>
struct TileSums<float> {
  using Tile = SampledTile<float>;
  float total[8][8] = {}, acc[8][8] = {};

  __device__ __forceinline__ static int at(int i) { return i / 4 * 64 + i % 4; }

  __device__ __forceinline__ void add(const float* left, const float* right) {
    left += threadIdx.x / 16 * 4, right += threadIdx.x % 16 * 4;
#pragma unroll 2
    for (int t = 0; t < Tile::kTokens; ++t, left += Tile::kPitch, right += Tile::kPitch) {
      float a[8], b[8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<float4*>(a + 4 * i) = *reinterpret_cast<const float4*>(left + 64 * i);
        *reinterpret_cast<float4*>(b + 4 * i) = *reinterpret_cast<const float4*>(right + 64 * i);
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[i / 8][i % 8] = fmaf(a[i / 8], b[i % 8], acc[i / 8][i % 8]);
    }
  }

  // One running sum over thousands of tokens would err more than PyTorch's, which are sums of blocks.
  __device__ __forceinline__ void fold() {
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i / 8][i % 8] += acc[i / 8][i % 8], acc[i / 8][i % 8] = 0.0f;
  }

  __device__ __forceinline__ void publish(float* sums) const {
    sums += threadIdx.x / 16 * 4 * Tile::kSumsPitch + threadIdx.x % 16 * 4;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; j += 4)
        *reinterpret_cast<float4*>(sums + at(i) * Tile::kSumsPitch + at(j)) =
            make_float4(total[i][j], total[i][j + 1], total[i][j + 2], total[i][j + 3]);
  }
};

// Stages between folds: 256 tokens of float32.
constexpr int kFold = 16;

// Blocks of 16 x n tiles follow each other, so that those that run at once read few columns of both operands.
constexpr int kGroupTiles = 16;

// out[part, entry] (+)= the sum over the part's tokens. Grid: tiles, parts of T.
template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, SampledTile<T>::kTensorCores ? 2 : 1)
    sampled_tiles_kernel(Matrix<const T> left, Matrix<const T> right, Entries entries, float* out, int stages_per_part) {
  using Tile = SampledTile<T>;
  SharedMemory shared;
  char* held = shared.take<char>(int(Tile::kHeld));
  T* stages = reinterpret_cast<T*>(held);
  int64_t* bounds = shared.take<int64_t>(2 * Tile::kSide);

  const int64_t down = ceil_div(left.cols, Tile::kSide), across = ceil_div(right.cols, Tile::kSide), tile = blockIdx.x;
  const int64_t group = tile / (kGroupTiles * across) * kGroupTiles, in_group = tile % (kGroupTiles * across);
  const int64_t high = down - group < kGroupTiles ? down - group : kGroupTiles;
  const int64_t row0 = (group + in_group % high) * Tile::kSide, col0 = in_group / high * Tile::kSide;
  const int begin = blockIdx.y * stages_per_part;
  const int all = static_cast<int>(ceil_div(left.rows, Tile::kTokens));
  const int count = (all - begin < stages_per_part ? all - begin : stages_per_part);

  auto fetch = [&](int stage) {
    if (stage < count) {
      T* to = stages + stage % Tile::kStages * 2 * Tile::kOperand;
      const int64_t token0 = int64_t(begin + stage) * Tile::kTokens;
      Tile::fetch(to, left, token0, row0);
      Tile::fetch(to + Tile::kOperand, right, token0, col0);
    }
    ptx::commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch(stage);

  // Meanwhile: the entries of each of the tile's rows that are in its columns.
  {
    const int64_t row = row0 + threadIdx.x % Tile::kSide;
    int64_t bound = 0;
    if (row < entries.rows)
      bound = lower_bound(entries.columns, get(entries.starts, row), get(entries.starts, row + 1),
                          col0 + threadIdx.x / Tile::kSide * Tile::kSide);
    bounds[threadIdx.x] = bound;
  }

  TileSums<T> sums;
  for (int stage = 0; stage < count; ++stage) {
    ptx::wait_for_copies<Tile::kStages - 2>();
    __syncthreads();  // this stage is there, and nobody reads any more what the next one overwrites
    fetch(stage + Tile::kStages - 1);
    const T* from = stages + stage % Tile::kStages * 2 * Tile::kOperand;
    sums.add(from, from + Tile::kOperand);
    if (stage % kFold == kFold - 1) sums.fold();
  }
  sums.fold();
  ptx::wait_for_copies<0>();
  __syncthreads();
  float* staged = reinterpret_cast<float*>(held);
  sums.publish(staged);
  __syncthreads();

  // Eight lanes a row: of 128 columns at 5 % there are six.
  out += blockIdx.y * entries.size;
  for (int row = threadIdx.x / 8; row < Tile::kSide; row += kThreads / 8) {
    const int64_t end = bounds[Tile::kSide + row];
    for (int64_t i = bounds[row] + threadIdx.x % 8; i < end; i += 8) {
      const float sum = staged[row * Tile::kSumsPitch + get(entries.columns, i) - col0];
      put(out, i, kAdd ? get(out, i) + sum : sum);
    }
  }
}

}  // namespace fastft
