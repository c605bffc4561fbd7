// The matrix product that torch brings, for adapters that are matrices like any other.
//
// A kernel of ours reads an activation once where a GEMM reads it twice, and needs no copy that is masked. From some rank on
// the products themselves are what costs time, and there the vendor's library is ahead: float32 at rank 256, 1024 x 2048 x
// 2048 on a Xeon, takes 0.78 of our kernels' time, at rank 128 0.90, at rank 64 1.04.
#pragma once

#include "common/check.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

namespace fastft {

// bfloat16 and float16 stay with our kernels: a GEMM would round S and dS, which are float32, to them.
inline bool gemm_pays(const Tensor& activation, const Tensor& adapter, double p, int64_t rank) {
  return p == 0 && rank >= 128 && activation.scalar_type() == ScalarType::Float &&
         adapter.scalar_type() == ScalarType::Float;
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// out = beta · out + alpha · a b
inline void gemm(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

}  // namespace fastft
