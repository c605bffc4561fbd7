// New tensors. By the C function: torch::stable::new_empty goes through the dispatcher, 3 us instead of 1, and an op
// allocates up to four tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "check.h"

namespace fastft {

// Uninitialised, contiguous, on like's device. The number of a dtype is part of torch's file format.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  constexpr int64_t kMostDims = 4;
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dims <= kMostDims, "fastft: a tensor of ", dims, " dimensions");
  int64_t strides[kMostDims], step = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  const int32_t device = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.begin(), strides, static_cast<int32_t>(dtype), device,
                                                  like.get_device(), &handle));
  return Tensor(handle);
}

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_on(like, sizes, like.scalar_type());
}

}  // namespace fastft
