// Sums in a fixed order: blocks write partial results to a workspace and a second kernel adds them, part 0 first. The
// number of parts depends on shapes alone, so results repeat bit for bit whatever the scheduling and the GPU.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace fastft {

// Two blocks for each multiprocessor of the largest Hopper; a constant, so that every GPU sums in the same order.
constexpr int64_t kTargetBlocks = 264;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a block's inner dimension of `tiles` tiles is split: `count` parts of `size` tiles, the last one smaller.
struct Split {
  int64_t count, size;
};

// Splits so far that all blocks together reach the target, but keeps `least` tiles a part.
inline Split split(int64_t tiles, int64_t blocks, int64_t least) {
  if (tiles == 0) return {0, 0};
  int64_t wanted = std::clamp<int64_t>(ceil_div(kTargetBlocks, std::max<int64_t>(blocks, 1)), 1, ceil_div(tiles, least));
  int64_t size = ceil_div(tiles, wanted);
  return {ceil_div(tiles, size), size};
}

// out[i] = scale * (partial[0, i] + ... + partial[parts - 1, i]); zeros when there are no parts.
template <class T>
__global__ void __launch_bounds__(256)
    reduce_kernel(const float* partial, int64_t parts, int64_t size, float scale, T* out) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += get(partial, part * size + i);
  put(out, i, T(scale * sum));
}

template <class T>
void reduce(const float* partial, int64_t parts, int64_t size, float scale, T* out, Stream stream) {
  if (size > 0)
    launch(reduce_kernel<T>, dim3(unsigned(ceil_div(size, 256))), dim3(256), 0, stream, partial, parts, size, scale, out);
}

}  // namespace fastft
