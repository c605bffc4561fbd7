// Tensors as the kernels of tile.cuh take them, and the choice of a rank tile.
#pragma once

#include "ops.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace fastft {

const std::initializer_list<ScalarType> kActivations = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

template <class T>
Matrix<const T> input(const Tensor& t) {
  return matrix(static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0));
}

template <class T>
Matrix<T> output(const Tensor& t) {
  return matrix(static_cast<T*>(t.mutable_data_ptr()), t.size(0), t.size(1), t.stride(0));
}

// S or dS, which load_ranks reads four ranks at a time.
inline Matrix<const float> rank_input(const Tensor& s) {
  auto* data = static_cast<const float*>(s.const_data_ptr());
  return {data, s.size(0), s.size(1), s.stride(0), reinterpret_cast<uintptr_t>(data) % 16 == 0 && s.stride(0) % 4 == 0};
}

template <int kRanks>
struct Ranks {
  static constexpr int value = kRanks;
};

// Calls f with the smallest rank tile that holds `slots` slots of 16 ranks, or the largest.
template <class F>
void dispatch_ranks(int64_t slots, F&& f) {
  if (slots <= 1) return f(Ranks<16>{});
  if (slots <= 2) return f(Ranks<32>{});
  return f(Ranks<64>{});
}

// Calls f with the Arithmetic of two dtypes; entry points have checked that the adapter's is the activations' or float32.
template <class F>
void dispatch_arithmetic(ScalarType activations, ScalarType adapter, F&& f) {
  const bool wide = adapter == ScalarType::Float;
  switch (activations) {
    case ScalarType::Float: return f(Arithmetic<float, 0>{});
    case ScalarType::BFloat16: return wide ? f(Arithmetic<c10::BFloat16, 3>{}) : f(Arithmetic<c10::BFloat16, 1>{});
    default: return wide ? f(Arithmetic<c10::Half, 0>{}) : f(Arithmetic<c10::Half, 1>{});
  }
}

constexpr size_t kMostShared = 99 * 1024;  // that a block may have on compute capability 8.6 and 8.9

template <class T>
PartialSums<T> partial_sums(const Tensor& out, const Tensor& partial, int64_t parts) {
  return {static_cast<const float*>(partial.const_data_ptr()), parts, out.numel(), static_cast<T*>(out.mutable_data_ptr())};
}

inline void reduce_into(const Tensor& out, const Tensor& partial, int64_t parts, double scale, Stream stream) {
  dispatch_dtype(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    reduce(PartialSums<float>{}, partial_sums<T>(out, partial, parts), static_cast<float>(scale), stream);
  });
}

}  // namespace fastft
