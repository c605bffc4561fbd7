// Token-contiguous copies of activations, for kernels that need single features of many tokens: out [F, tokens] from
// x [T, F], a slab of tokens at a time, so that what is read again and again stays in L2.
#pragma once

#include "operands.cuh"

namespace fastft {

// A warp reads a feature of a slab in up to kVectors vectors of 16 bytes a lane.
constexpr int kVectors = 4;
template <class T>
constexpr int kLaneTokens = 16 / int(sizeof(T));
template <class T>
constexpr int kVectorTokens = 32 * kLaneTokens<T>;

template <class T>
struct alignas(16) Vector {
  T v[kLaneTokens<T>];
};

// The v-th vector of this lane of feature `i`.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* features, int64_t i, int tokens, int v) {
  note_load(features, sizeof(Vector<T>));
  Vector<T> vector;
  *reinterpret_cast<uint4*>(&vector) =
      *reinterpret_cast<const uint4*>(features + i * tokens + v * kVectorTokens<T> + threadIdx.x % 32 * kLaneTokens<T>);
  return vector;
}

// Tokens of a slab of `features` features: a multiple of a warp's vector, as many as 32 MiB hold (H100 and H200 have 50 MiB
// of L2). The last slab is padded with zeros.
template <class T>
int64_t slab_tokens(int64_t tokens, int64_t features) {
  const int64_t fit = (int64_t(32) << 20) / (features * kVectorTokens<T> * int64_t(sizeof(T)));
  const int64_t wanted = ceil_div(tokens, kVectorTokens<T>);
  return std::min(std::clamp<int64_t>(fit, 1, kVectors), wanted) * kVectorTokens<T>;
}

constexpr int kTransposed = 64;  // tokens and features of a block

template <class T>
__device__ __forceinline__ void transpose_tile(const Matrix<const T>& from, T* to, int64_t token0, int tokens,
                                               int64_t tile) {
  constexpr int units = kTransposed / kUnit;
  SharedMemory shared;
  Unit<T>* held = shared.take<Unit<T>>(kTransposed * units);
  const int64_t across = tokens / kTransposed, first = tile % across * kTransposed, feature0 = tile / across * kTransposed;
  // Units of a row change places with the row's number, so that neither rows nor columns meet in one bank.
#pragma unroll
  for (int i = threadIdx.x; i < kTransposed * units; i += kThreads)
    held[i / units * units + (i % units ^ i / units / kUnit % units)] =
        load_unit<true, T>(from, token0 + first + i / units, feature0 + i % units * kUnit);
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kTransposed * units; i += kThreads) {
    const int feature = i / units, unit = i % units;
    if (feature0 + feature >= from.cols) continue;
    Unit<T> out;
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
      out.v[j] = held[(unit * kUnit + j) * units + (feature / kUnit ^ unit)].v[feature % kUnit];
    note_store(to, sizeof(out));
    auto* target = reinterpret_cast<uint4*>(to + (feature0 + feature) * tokens + first + unit * kUnit);
#pragma unroll
    for (int j = 0; j < int(sizeof(out) / 16); ++j) ptx::store(target + j, reinterpret_cast<const uint4*>(&out)[j]);
  }
}

// Of two matrices, of which the second may have no features. Both results start on 16-byte boundaries.
template <class T>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(Matrix<const T> first, T* first_to, Matrix<const T> second, T* second_to, int64_t token0, int tokens) {
  const int64_t tiles = ceil_div(first.cols, kTransposed) * (tokens / kTransposed), tile = blockIdx.x;
  if (tile < tiles)
    transpose_tile(first, first_to, token0, tokens, tile);
  else
    transpose_tile(second, second_to, token0, tokens, tile - tiles);
}

template <class T>
void transpose(const Matrix<const T>& first, T* first_to, const Matrix<const T>& second, T* second_to, int64_t token0,
               int64_t tokens, Stream stream) {
  const int64_t features = ceil_div(first.cols, kTransposed) + ceil_div(second.cols, kTransposed);
  launch(transpose_kernel<T>, dim3(unsigned(features * (tokens / kTransposed))), dim3(kThreads),
         SharedMemory::bytes<Unit<T>>(kTransposed * kTransposed / kUnit), stream, first, first_to, second, second_to, token0,
         int(tokens));
}

}  // namespace fastft
