// What an op's entry point needs of torch's stable ABI: checks, workspaces, the current stream, dispatch on dtypes.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common/empty.h"
#include "launch.cuh"

namespace fastft {

#ifdef FASTFT_HOSTCUDA
constexpr Where kWhere = Where::cpu;
#else
constexpr Where kWhere = Where::cuda;
#endif

// Makes a tensor's device current while it lives, and knows torch's current stream there.
class DeviceScope {
 public:
#ifdef FASTFT_HOSTCUDA
  explicit DeviceScope(const Tensor&) {}
#else
  explicit DeviceScope(const Tensor& t) : guard_(t.get_device()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
#endif
  Stream stream{};

 private:
#ifndef FASTFT_HOSTCUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check_same_device(const char* op, const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others)
    STD_TORCH_CHECK(other->get_device() == first.get_device(), op, ": tensors are on CUDA devices ", int(first.get_device()),
                    " and ", int(other->get_device()));
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the element type T of an activation or adapter dtype; entry points have checked the dtype.
template <class F>
void dispatch_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::BFloat16: return f(Type<c10::BFloat16>{});
    default: return f(Type<c10::Half>{});
  }
}

}  // namespace fastft
