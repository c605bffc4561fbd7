// Launches and shared memory, for nvcc and for the host build that the tests run (csrc/hostcuda).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef FASTFT_HOSTCUDA
#include "../hostcuda/emulator.h"
#define FASTFT_DISPATCH_KEY CPU
#else
#include <cuda_runtime.h>
#define FASTFT_DISPATCH_KEY CUDA
#endif

namespace fastft {

#ifdef FASTFT_HOSTCUDA

using Stream = void*;

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream, A... args) {
  std::tuple<P...> params(args...);
  hostcuda::run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, params); });
}

#else

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastft CUDA kernel: ") + cudaGetErrorString(error));
}

// Asynchronous; allocates nothing and never synchronises, so it can be captured into a CUDA graph.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, A... args) {
  // Above 48 KiB a kernel must ask for its shared memory.
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)));
  // clang-format off: it does not know launches in a header
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  // clang-format on
  check_cuda(cudaGetLastError());
}

#endif

// A thread loads or stores `bytes` of the array that starts at `array`. The host build counts them (hostcuda/emulator.h) for
// the tests of bench/traffic_cuda.py; on a GPU nothing happens.
#ifdef FASTFT_HOSTCUDA
inline void note_load(const void* array, size_t bytes) { hostcuda::count(array, bytes, false); }
inline void note_store(const void* array, size_t bytes) { hostcuda::count(array, bytes, true); }
#else
__device__ __forceinline__ void note_load(const void*, size_t) {}
__device__ __forceinline__ void note_store(const void*, size_t) {}
#endif

template <class T>
__device__ __forceinline__ T get(const T* array, int64_t i) {
  note_load(array, sizeof(T));
  return array[i];
}

template <class T>
__device__ __forceinline__ void put(T* array, int64_t i, T value) {
  note_store(array, sizeof(T));
  array[i] = value;
}

// Hands out a block's dynamic shared memory in 16-byte steps; every thread makes the same calls. On the host the arrays
// lie apart and the bytes between them are poisoned.
class SharedMemory {
 public:
  template <class T>
  __device__ T* take(int count) {
    size_t offset = used_;
    used_ += bytes<T>(count);
#ifdef FASTFT_HOSTCUDA
    return static_cast<T*>(hostcuda::shared_memory(offset, count * sizeof(T)));
#else
    extern __shared__ uint4 fastft_shared[];
    return reinterpret_cast<T*>(reinterpret_cast<char*>(fastft_shared) + offset);
#endif
  }

  template <class T>
  __host__ __device__ static constexpr size_t bytes(int count) {
    return (count * sizeof(T) + 15) / 16 * 16;
  }

 private:
  size_t used_ = 0;
};

}  // namespace fastft
