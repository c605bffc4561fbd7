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

}  // namespace fastft::ptx
