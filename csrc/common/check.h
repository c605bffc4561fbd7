// Argument checks that every entry point makes: an unchecked float kernel handed bfloat16 corrupts the heap.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <string>

namespace fastft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

inline std::string shape_text(const Tensor& t) {
  std::string out;
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "[") + std::to_string(t.size(i));
  return out.empty() ? "[]" : out + "]";
}

enum class Where { cpu, cuda };

// One argument: on the device the kernel runs on, of one of `dtypes`. Errors name the op.
inline void check_dtype(const char* op, const char* name, const Tensor& t, Where where,
                        std::initializer_list<ScalarType> dtypes) {
  STD_TORCH_CHECK(where == Where::cuda ? t.is_cuda() : t.is_cpu(), op, ": ", name, " must be on the ",
                  where == Where::cuda ? "CUDA device" : "CPU");
  // Texts are made where they are needed: as streams and strings they were a good part of what a call costs the host.
  const ScalarType dtype = t.scalar_type();
  if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
    std::string wanted;
    for (ScalarType one : dtypes) wanted += (wanted.empty() ? "" : " or ") + std::string(dtype_name(one));
    STD_TORCH_CHECK(false, op, ": ", name, " is ", dtype_name(dtype), ", must be ", wanted);
  }
}

// The same, of shape `sizes`.
inline void check_kind(const char* op, const char* name, const Tensor& t, Where where,
                       std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> sizes) {
  check_dtype(op, name, t, where, dtypes);
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t axis = 0; fits && axis < sizes.size(); ++axis)
    fits = t.size(static_cast<int64_t>(axis)) == sizes.begin()[axis];
  if (!fits) {
    std::string shape;
    for (int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, op, ": ", name, " has shape ", shape_text(t), ", must be [", shape, "]");
  }
}

// The same, and contiguous.
inline void check(const char* op, const char* name, const Tensor& t, Where where, std::initializer_list<ScalarType> dtypes,
                  std::initializer_list<int64_t> sizes) {
  check_kind(op, name, t, where, dtypes, sizes);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

// The same for a matrix whose rows may lie apart (columns of a wider one). A stride that no second element follows, or
// that no element at all has, says nothing.
inline void check_rows(const char* op, const char* name, const Tensor& t, Where where,
                       std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> sizes) {
  check_kind(op, name, t, where, dtypes, sizes);
  STD_TORCH_CHECK(t.numel() == 0 || ((t.size(1) == 1 || t.stride(1) == 1) && (t.size(0) == 1 || t.stride(0) >= t.size(1))),
                  op, ": ", name, " has strides [", t.stride(0), ", ", t.stride(1),
                  "], must have contiguous rows that do not overlap");
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": ", name, " has shape ", shape_text(t), ", must be a matrix");
}

// The rows of a tensor's last dimension.
struct Rows {
  int64_t count, width, stride;
};

// A matrix as check_rows takes it, or a contiguous tensor of more dimensions, as its rows.
inline Rows checked_rows(const char* op, const char* name, const Tensor& t, Where where,
                         std::initializer_list<ScalarType> dtypes) {
  const int64_t dims = t.dim(), width = dims ? t.size(dims - 1) : 0;
  if (dims == 2) {
    check_rows(op, name, t, where, dtypes, {t.size(0), width});
    return {t.size(0), width, t.stride(0)};
  }
  STD_TORCH_CHECK(dims > 2 && t.is_contiguous(), op, ": ", name, " has shape ", shape_text(t),
                  ", must be a matrix, or contiguous with more dimensions");
  int64_t count = 1;
  for (int64_t axis = 0; axis + 1 < dims; ++axis) count *= t.size(axis);
  check_dtype(op, name, t, where, dtypes);
  return {count, width, width};
}

inline void check_probability(const char* op, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, op, ": dropout p is ", p, ", must lie in [0, 1]");
}

}  // namespace fastft
