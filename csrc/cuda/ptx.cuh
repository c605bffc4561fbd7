// Inline PTX: one function per instruction, each with a portable twin that the host build runs. A twin shows that the
// surrounding code is right; the instruction itself is unverified until a GPU has run it (its SASS is asserted in
// tests/cuda/test_cuda_build.py).
#pragma once

#include "launch.cuh"

namespace fastft::ptx {

// 16 bytes that this kernel reads once and nobody writes meanwhile: read-only path, not kept in L1, which leaves L1 to
// operands that are read again. `source` is 16-byte aligned.
__device__ __forceinline__ uint4 load_once(const void* source) {
#ifdef __CUDA_ARCH__
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(__cvta_generic_to_global(source)));
  return value;
#else
  return *static_cast<const uint4*>(source);
#endif
}

// 16 bytes that this kernel reads and nobody writes meanwhile, kept in L1. As a plain load nvcc makes two of 8 bytes of it
// where the numbers are used apart.
__device__ __forceinline__ uint4 load(const void* source) {
#ifdef __CUDA_ARCH__
  uint4 value;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(__cvta_generic_to_global(source)));
  return value;
#else
  return *static_cast<const uint4*>(source);
#endif
}

// 16 bytes into global memory, 16-byte aligned. As a plain store nvcc makes four of 4 bytes of it where 16-bit numbers were
// computed in pairs (dora_grad_y, the transposed copies), four times the instructions and the sectors that they ask for.
__device__ __forceinline__ void store(void* target, const uint4& value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  *static_cast<uint4*>(target) = value;
#endif
}

// 16 bytes from global into shared memory, both 16-byte aligned, past the registers; zeros where `inside` is false (nothing
// is read then). Arrives when its thread waits for the group, and is visible to others after a barrier.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool inside) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(target))),
      "l"(__cvta_generic_to_global(source)), "r"(inside ? 16 : 0)
      : "memory");
#elif defined(FASTFT_HOSTCUDA)
  hostcuda::copy_async(target, inside ? source : nullptr, 16);
#endif
}

// Ends the group of this thread's copies since the last one; it may be empty.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(FASTFT_HOSTCUDA)
  hostcuda::commit_copies();
#endif
}

// Until all but the last kInFlight groups of this thread have arrived.
template <int kInFlight>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
#elif defined(FASTFT_HOSTCUDA)
  hostcuda::wait_for_copies(kInFlight);
#endif
}

// Has L2 fetch the 128 bytes around an address that something reads soon.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#endif
}

}  // namespace fastft::ptx
