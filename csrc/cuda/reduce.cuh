// Sums in a fixed order: blocks write partial results to a workspace and a second kernel adds them, part 0 first. The
// number of parts depends on shapes alone, so results repeat bit for bit whatever the scheduling and the GPU.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace fastft {

// Multiprocessors of the largest Hopper; a constant, so that every GPU sums in the same order.
constexpr int64_t kMultiprocessors = 132;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a block's inner dimension of `tiles` tiles is split: `count` parts of `size` tiles, the last one smaller.
struct Split {
  int64_t count, size;
};

// Splits as far as all blocks together run at once, `resident` on a multiprocessor, and keeps `least` tiles a part: a few
// blocks more would be a second wave, in which most multiprocessors wait.
inline Split split(int64_t tiles, int64_t blocks, int resident, int64_t least) {
  if (tiles == 0) return {0, 0};
  const int64_t fit = resident * kMultiprocessors / std::max<int64_t>(blocks, 1);
  const int64_t wanted = std::clamp<int64_t>(fit, 1, ceil_div(tiles, least));
  const int64_t size = ceil_div(tiles, wanted);
  return {ceil_div(tiles, size), size};
}

// out[i] = scale * (partial[0, i] + ... + partial[parts - 1, i]) for i < size; zeros when there are no parts.
template <class T>
struct PartialSums {
  const float* partial;
  int64_t parts, size;
  T* out;

  __device__ __forceinline__ void add(int64_t i, float scale) const {
    if (i >= size) return;
    float sum = 0.0f;
#pragma unroll 8  // loads in flight
    for (int64_t part = 0; part < parts; ++part) sum += get(partial, part * size + i);
    put(out, i, T(scale * sum));
  }
};

// Two of them in one launch; either may be empty.
template <class T>
__global__ void __launch_bounds__(256) reduce_kernel(PartialSums<float> first, PartialSums<T> second, float scale) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, begin = ceil_div(first.size, blockDim.x) * blockDim.x;
  if (i < begin)
    first.add(i, scale);
  else
    second.add(i - begin, scale);
}

template <class T>
void reduce(const PartialSums<float>& first, const PartialSums<T>& second, float scale, Stream stream) {
  const int64_t blocks = ceil_div(first.size, 256) + ceil_div(second.size, 256);
  if (blocks > 0) launch(reduce_kernel<T>, dim3(unsigned(blocks)), dim3(256), 0, stream, first, second, scale);
}

}  // namespace fastft
