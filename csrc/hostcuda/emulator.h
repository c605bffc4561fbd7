// Runs CUDA kernels on the CPU, for tests only: one block at a time, each of its threads a fiber.
//
// What it checks beyond the result: barriers that not all threads of a block (or of a warp's mask) reach, reads of
// shared memory never written (filled with NaN), and, built with AddressSanitizer, every access to global and shared
// memory. Fibers run in an order drawn from FASTFT_HOSTCUDA_SEED (0: ascending), and so do blocks: a result that changes
// with the seed misses a barrier or depends on scheduling.
//
// Own code because what exists does not fit: HIP-CPU gives false positives under AddressSanitizer (its issue 22, open);
// cuda4cpu asks for C++23 (GCC 14) and has no 16-bit floats, and both must be built from source.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <source_location>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace fastft::hostcuda {

using Site = std::source_location;

// The coordinates of the fiber that runs.
struct Coordinates {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Coordinates current;

// Runs `kernel` once per thread of the grid. Throws std::runtime_error on a divergent barrier.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

// Shared memory of the block, at a byte offset that every thread asks for alike; the bytes around it are poisoned.
void* shared_memory(size_t offset, size_t bytes);

unsigned lane();

// What the lanes of a warp brought to one place.
struct Gathered {
  const char* first;
  size_t stride;

  template <class T>
  const T& of(unsigned lane) const {
    return *reinterpret_cast<const T*>(first + lane * stride);
  }
};

// All lanes of `mask` offer up to 8 bytes, to be read until the next warp barrier.
Gathered offer(unsigned mask, const void* mine, size_t bytes, Site site);

// All 32 lanes bring up to 48 bytes, to be read until the next but one gather of the warp.
Gathered gather(const void* mine, size_t bytes, Site site);

// Bytes that kernels say they move, by array and direction, while `counting` is on.
struct Moved {
  int64_t loads = 0, stores = 0;
};
extern bool counting;
extern std::map<const void*, Moved> moved;

inline void count(const void* array, size_t bytes, bool store) {
  if (counting) (store ? moved[array].stores : moved[array].loads) += static_cast<int64_t>(bytes);
}

// Copies of a thread that arrive only when it waits for their group, as `cp.async` allows.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t groups_in_flight);

// Calls `read` for each lane of `mask`, in order, with what it brought.
template <class T, class Read>
void for_each_lane(unsigned mask, T value, Site site, Read&& read) {
  static_assert(std::is_trivially_copyable_v<T>);
  const Gathered brought = offer(mask, &value, sizeof(T), site);
  for (unsigned source = 0; source < 32; ++source)
    if (mask >> source & 1) read(source, brought.template of<T>(source));
  warp_barrier(mask, site);
}

template <class T>
T exchange(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  const Gathered brought = offer(mask, &value, sizeof(T), site);
  T result;
  // CUDA leaves a read from a lane outside the mask undefined; all ones is a NaN that shows.
  if (mask >> source & 1)
    result = brought.template of<T>(source);
  else
    std::memset(&result, 0xff, sizeof(T));
  warp_barrier(mask, site);
  return result;
}

}  // namespace fastft::hostcuda

#define threadIdx (::fastft::hostcuda::current.thread)
#define blockIdx (::fastft::hostcuda::current.block)
#define blockDim (::fastft::hostcuda::current.block_dim)
#define gridDim (::fastft::hostcuda::current.grid_dim)

inline void __syncthreads(fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  fastft::hostcuda::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  fastft::hostcuda::warp_barrier(mask, site);
}

// As in CUDA, a lane outside the segment of `width` lanes reads its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  unsigned first = fastft::hostcuda::lane() & ~(width - 1u);
  return fastft::hostcuda::exchange(mask, value, first + (source & (width - 1)), site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  unsigned self = fastft::hostcuda::lane(), source = self ^ lanes;
  unsigned last = self | (width - 1u);
  return fastft::hostcuda::exchange(mask, value, source <= last ? source : self, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                   fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  unsigned self = fastft::hostcuda::lane(), last = self | (width - 1u);
  return fastft::hostcuda::exchange(mask, value, self + lanes <= last ? self + lanes : self, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                 fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  unsigned self = fastft::hostcuda::lane(), first = self & ~(width - 1u);
  return fastft::hostcuda::exchange(mask, value, self >= first + lanes ? self - lanes : self, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  unsigned votes = 0;
  fastft::hostcuda::for_each_lane(mask, predicate != 0, site,
                                  [&](unsigned lane, bool vote) { votes |= unsigned(vote) << lane; });
  return votes;
}

inline int __any_sync(unsigned mask, int predicate, fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

inline unsigned __match_any_sync(unsigned mask, int64_t value,
                                 fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  unsigned same = 0;
  fastft::hostcuda::for_each_lane(mask, value, site,
                                  [&](unsigned lane, int64_t other) { same |= unsigned(other == value) << lane; });
  return same;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                  fastft::hostcuda::Site site = fastft::hostcuda::Site::current()) {
  unsigned most = 0;
  fastft::hostcuda::for_each_lane(mask, value, site, [&](unsigned, unsigned other) { most = other > most ? other : most; });
  return most;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// One fiber runs at a time.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
