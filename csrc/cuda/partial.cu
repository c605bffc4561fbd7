// The partial family. Maths and shapes: fastft/ops/partial.py. T tokens, C indices. All of it is memory traffic; indices are
// the caller's promise.
#include "packs.cuh"

#include <cmath>

namespace fastft {
namespace {

// -- Columns of activations. A warp has a tile of 8 rows x 32 of the C columns, a lane one column: it reads its index once
// and has the loads of all rows in flight, and what is contiguous [T, C] is read and written by neighbours together. What
// the index names is a sector an element where it names single columns; a run of columns is read together too.
constexpr int kTileRows = 8, kTileColumns = 32;

struct ColumnTile {
  int64_t row, column;

  // Tiles are numbered along the columns first, so that a block's warps read the same rows.
  __device__ __forceinline__ explicit ColumnTile(int64_t count) {
    const int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, tiles = ceil_div(count, kTileColumns);
    row = tile / tiles * kTileRows;
    column = tile % tiles * kTileColumns + threadIdx.x % 32;
  }
};

inline dim3 column_grid(int64_t rows, int64_t count) {
  return dim3(unsigned(ceil_div(ceil_div(rows, kTileRows) * ceil_div(count, kTileColumns), kWarps)));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_columns_kernel(Matrix<const T> x, const int32_t* index, int64_t count, T* out) {
  const ColumnTile tile(count);
  if (tile.column >= count) return;
  const int64_t from = get(index, tile.column);
  T held[kTileRows];
#pragma unroll
  for (int i = 0; i < kTileRows; ++i)
    if (tile.row + i < x.rows) held[i] = get(x.data, (tile.row + i) * x.stride + from);
#pragma unroll
  for (int i = 0; i < kTileRows; ++i)
    if (tile.row + i < x.rows) put(out, (tile.row + i) * count + tile.column, held[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(Matrix<const T> x, const int32_t* index, int64_t size, T* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at < size) put(out, at, get(x.data, get(index, at / x.cols) * x.stride + at % x.cols));
}

// z is float32 (kWide) or has the dtype of y.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) scatter_add_columns_kernel(Matrix<T> y, const int32_t* index, int64_t count,
                                                                       const std::conditional_t<kWide, float, T>* z) {
  const ColumnTile tile(count);
  if (tile.column >= count) return;
  const int64_t to = get(index, tile.column);
  T held[kTileRows];
  std::conditional_t<kWide, float, T> added[kTileRows];
#pragma unroll
  for (int i = 0; i < kTileRows; ++i)
    if (tile.row + i < y.rows) {
      held[i] = get(y.data, (tile.row + i) * y.stride + to);
      added[i] = get(z, (tile.row + i) * count + tile.column);
    }
#pragma unroll
  for (int i = 0; i < kTileRows; ++i)
    if (tile.row + i < y.rows)
      put(y.data, (tile.row + i) * y.stride + to, T(static_cast<float>(held[i]) + static_cast<float>(added[i])));
}

// -- Slices of a weight. What belongs to a slice (base, delta, moments) is contiguous and walked as a flat array, a pack of
// n elements a thread, whatever the length of its rows: of 430 columns no row but the first starts on a 16-byte boundary,
// but every pack does. Four elements are 16 bytes of float32, of which there is most.
template <class T>
struct Slice {
  T* weight;
  int64_t stride;
  const int32_t* index;
  const T* base;
  int64_t size, cols;   // of the slice
  bool vectors;         // all that is contiguous starts on a 16-byte boundary
  bool weight_vectors;  // so do the weight's rows, and no pack crosses a row's end
};

// Where in the weight a pack of the slice stands. Looked up before anything is stored, so that the index arrives with the
// rest. kWhole: all of the pack lies within the slice.
template <int kDim, bool kWhole, int n>
struct Targets {
  int64_t to[n];

  template <class T>
  __device__ __forceinline__ Targets(const Slice<T>& slice, int64_t at) {
    int64_t row = at / slice.cols, col = at % slice.cols;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if ((!kWhole && at + j >= slice.size) || (kDim == 0 && slice.weight_vectors && j > 0)) break;
      to[j] = kDim == 0 ? get(slice.index, row) * slice.stride + col : row * slice.stride + get(slice.index, col);
      if (++col == slice.cols) col = 0, ++row;
    }
  }

  template <class T>
  __device__ __forceinline__ void store(const Slice<T>& slice, int64_t at, const Pack<T, n>& pack) const {
    using Word = typename Pack<T, n>::Word;
    if (kDim == 0 && slice.weight_vectors) {
      note_store(slice.weight, sizeof(pack));
      *reinterpret_cast<Word*>(slice.weight + to[0]) = *reinterpret_cast<const Word*>(&pack);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j)
        if (kWhole || at + j < slice.size) put(slice.weight, to[j], pack.v[j]);
    }
  }
};

// Elements that a thread writes: 16 bytes of the widest array.
template <class T, bool kDelta>
constexpr int kWritten = kDelta ? 4 : 16 / int(sizeof(T));

template <class T, int kDim, bool kDelta>
__global__ void __launch_bounds__(kThreads) write_slice_kernel(Slice<T> slice, const float* delta) {
  constexpr int n = kWritten<T, kDelta>;
  for_pack<n>(slice.vectors, slice.size, [&](int64_t at, auto whole) {
    Pack<T, n> value = load_pack<true, whole.value, n>(slice.base, at, slice.size);
    if constexpr (kDelta) {
      const Pack<float, n> change = load_pack<true, whole.value, n>(delta, at, slice.size);
      const Targets<kDim, whole.value, n> targets(slice, at);
#pragma unroll
      for (int j = 0; j < n; ++j) value.v[j] = T(static_cast<float>(value.v[j]) + change.v[j]);
      targets.store(slice, at, value);
    } else {
      Targets<kDim, whole.value, n>(slice, at).store(slice, at, value);
    }
  });
}

// What a step of AdamW multiplies with, from the op's doubles.
struct AdamW {
  float decay, beta1, rest1, beta2, rest2, spread, eps, rate;
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    slice_adamw_kernel(Slice<T> slice, float* delta, const float* grad, float* exp_avg, float* exp_avg_sq, AdamW by) {
  constexpr int n = 4;
  for_pack<n>(slice.vectors, slice.size, [&](int64_t at, auto whole) {
    Pack<T, n> value = load_pack<true, whole.value, n>(slice.base, at, slice.size);
    const Pack<float, n> gradient = load_pack<true, whole.value, n>(grad, at, slice.size);
    Pack<float, n> change = load_pack<false, whole.value, n>(delta, at, slice.size);
    Pack<float, n> mean = load_pack<false, whole.value, n>(exp_avg, at, slice.size);
    Pack<float, n> square = load_pack<false, whole.value, n>(exp_avg_sq, at, slice.size);
    const Targets<kDim, whole.value, n> targets(slice, at);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float g = gradient.v[j];
      mean.v[j] = fmaf(by.rest1, g, by.beta1 * mean.v[j]);
      square.v[j] = fmaf(by.rest2 * g, g, by.beta2 * square.v[j]);
      const float step = by.rate * mean.v[j] / fmaf(sqrtf(square.v[j]), by.spread, by.eps);
      change.v[j] = fmaf(by.decay, change.v[j], step);
      value.v[j] = T(static_cast<float>(value.v[j]) + change.v[j]);
    }
    store_pack<whole.value>(delta, at, slice.size, change);
    store_pack<whole.value>(exp_avg, at, slice.size, mean);
    store_pack<whole.value>(exp_avg_sq, at, slice.size, square);
    targets.store(slice, at, value);
  });
}

// -- Entry points.
const int32_t* checked_index(const char* op, const Tensor& index) {
  check(op, "index", index, kWhere, {ScalarType::Int}, {index.numel()});
  return static_cast<const int32_t*>(index.const_data_ptr());
}

Tensor gather_columns(const Tensor& x, const Tensor& index) {
  const char* op = "gather_columns";
  check_matrix(op, "x", x);
  const int64_t tokens = x.size(0), count = index.numel();
  check_rows(op, "x", x, kWhere, kActivations, {tokens, x.size(1)});
  const int32_t* columns = checked_index(op, index);
  check_same_device(op, x, {&index});
  DeviceScope device(x);
  Tensor out = empty_on(x, {tokens, count}, x.scalar_type());
  if (tokens * count == 0) return out;
  dispatch_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch(gather_columns_kernel<T>, column_grid(tokens, count), dim3(kThreads), 0, device.stream, input<T>(x), columns,
           count, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

void scatter_add_columns_(const Tensor& y, const Tensor& index, const Tensor& z) {
  const char* op = "scatter_add_columns_";
  check_matrix(op, "y", y);
  const int64_t tokens = y.size(0), count = index.numel();
  check_rows(op, "y", y, kWhere, kActivations, {tokens, y.size(1)});
  const int32_t* columns = checked_index(op, index);
  check(op, "z", z, kWhere, {y.scalar_type(), ScalarType::Float}, {tokens, count});
  check_same_device(op, y, {&index, &z});
  if (tokens * count == 0) return;
  DeviceScope device(y);
  auto run = [&](auto type, auto wide) {
    using T = typename decltype(type)::type;
    using Z = std::conditional_t<wide.value, float, T>;
    launch(scatter_add_columns_kernel<T, wide.value>, column_grid(tokens, count), dim3(kThreads), 0, device.stream,
           output<T>(y), columns, count, static_cast<const Z*>(z.const_data_ptr()));
  };
  dispatch_dtype(y.scalar_type(), [&](auto type) {
    constexpr bool narrow = sizeof(typename decltype(type)::type) < sizeof(float);
    if constexpr (narrow)
      if (z.scalar_type() == ScalarType::Float) return run(type, std::true_type{});
    run(type, std::false_type{});
  });
}

// Checks what every op on slices takes; `parts`: float32 tensors that belong to the slice, with their names, or null.
void check_slice(const char* op, const Tensor& weight, const Tensor& index, int64_t dim, const Tensor& base,
                 std::initializer_list<std::pair<const char*, const Tensor*>> parts) {
  check_matrix(op, "weight", weight);
  STD_TORCH_CHECK(dim == 0 || dim == 1, op, ": dim is ", dim, ", must be 0 or 1");
  check_rows(op, "weight", weight, kWhere, kActivations, {weight.size(0), weight.size(1)});
  checked_index(op, index);
  const int64_t rows = dim == 0 ? index.numel() : weight.size(0), cols = dim == 0 ? weight.size(1) : index.numel();
  check(op, "base", base, kWhere, {weight.scalar_type()}, {rows, cols});
  check_same_device(op, weight, {&index, &base});
  for (const auto& [name, part] : parts) {
    if (part == nullptr) continue;
    check(op, name, *part, kWhere, {ScalarType::Float}, {rows, cols});
    check_same_device(op, weight, {part});
  }
}

// The slice as kernels with packs of n elements take it.
template <class T, int n>
Slice<T> slice_of(const Tensor& weight, const Tensor& index, const Tensor& base, bool vectors) {
  const int64_t stride = weight.stride(0);
  const bool packs = aligned(weight) && base.size(1) % n == 0 && (weight.size(0) < 2 || stride * sizeof(T) % 16 == 0);
  return {static_cast<T*>(weight.mutable_data_ptr()),
          stride,
          static_cast<const int32_t*>(index.const_data_ptr()),
          static_cast<const T*>(base.const_data_ptr()),
          base.numel(),
          base.size(1),
          vectors && aligned(base),
          packs};
}

template <int kDim>
struct Dim {
  static constexpr int value = kDim;
};

// Calls f(Type<T>{}, Dim<dim>{}).
template <class F>
void dispatch_slice(const Tensor& weight, int64_t dim, F&& f) {
  dispatch_dtype(weight.scalar_type(), [&](auto type) { dim == 0 ? f(type, Dim<0>{}) : f(type, Dim<1>{}); });
}

void write_slice_(const Tensor& weight, const Tensor& index, int64_t dim, const Tensor& base, std::optional<Tensor> delta) {
  const char* op = "write_slice_";
  check_slice(op, weight, index, dim, base, {{"delta", delta ? &*delta : nullptr}});
  if (base.numel() == 0) return;
  DeviceScope device(weight);
  auto run = [&](auto type, auto along, auto with) {
    using T = typename decltype(type)::type;
    constexpr int n = kWritten<T, with.value>;
    launch(write_slice_kernel<T, along.value, with.value>, pack_grid<n>(base.numel()), dim3(kThreads), 0, device.stream,
           slice_of<T, n>(weight, index, base, !delta || aligned(*delta)),
           delta ? static_cast<const float*>(delta->const_data_ptr()) : nullptr);
  };
  dispatch_slice(weight, dim, [&](auto type, auto along) {
    delta ? run(type, along, std::true_type{}) : run(type, along, std::false_type{});
  });
}

// Three launches: a weight row's slices may lie in several blocks.
Tensor exchange_slice_(const Tensor& weight, int64_t dim, const Tensor& old_index, const Tensor& old_base,
                       const Tensor& index, const Tensor& delta) {
  const char* op = "exchange_slice_";
  check_slice(op, weight, old_index, dim, old_base, {});
  const int64_t count = index.numel();
  const bool columns = dim == 1;
  Tensor base = empty_on(weight, {columns ? weight.size(0) : count, columns ? count : weight.size(1)}, weight.scalar_type());
  check_slice(op, weight, index, dim, base, {{"delta", &delta}});
  write_slice_(weight, old_index, dim, old_base, std::nullopt);
  if (base.numel() == 0) return base;
  DeviceScope device(weight);
  dispatch_slice(weight, dim, [&](auto type, auto along) {
    using T = typename decltype(type)::type;
    const auto* at = static_cast<const int32_t*>(index.const_data_ptr());
    auto* kept = static_cast<T*>(base.mutable_data_ptr());
    if constexpr (along.value == 1)
      launch(gather_columns_kernel<T>, column_grid(weight.size(0), count), dim3(kThreads), 0, device.stream,
             input<T>(weight), at, count, kept);
    else
      launch(gather_rows_kernel<T>, dim3(unsigned(ceil_div(base.numel(), kThreads))), dim3(kThreads), 0, device.stream,
             input<T>(weight), at, base.numel(), kept);
  });
  write_slice_(weight, index, dim, base, delta);
  return base;
}

void slice_adamw_(const Tensor& weight, const Tensor& index, int64_t dim, const Tensor& base, const Tensor& delta,
                  const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, double lr, double beta1, double beta2,
                  double eps, double weight_decay, int64_t step) {
  const char* op = "slice_adamw_";
  check_slice(op, weight, index, dim, base,
              {{"delta", &delta}, {"grad", &grad}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}});
  STD_TORCH_CHECK(step >= 1, op, ": step is ", step, ", the first is 1");
  if (base.numel() == 0) return;
  DeviceScope device(weight);
  const double count = static_cast<double>(step);
  const AdamW by = {float(1 - lr * weight_decay),
                    float(beta1),
                    float(1 - beta1),
                    float(beta2),
                    float(1 - beta2),
                    float(1 / std::sqrt(1 - std::pow(beta2, count))),
                    float(eps),
                    float(-lr / (1 - std::pow(beta1, count)))};
  const bool vectors = aligned(delta) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq);
  dispatch_slice(weight, dim, [&](auto type, auto along) {
    using T = typename decltype(type)::type;
    launch(slice_adamw_kernel<T, along.value>, pack_grid<4>(base.numel()), dim3(kThreads), 0, device.stream,
           slice_of<T, 4>(weight, index, base, vectors), floats(delta), static_cast<const float*>(grad.const_data_ptr()),
           floats(exp_avg), floats(exp_avg_sq), by);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("gather_columns", TORCH_BOX(&gather_columns));
  m.impl("scatter_add_columns_", TORCH_BOX(&scatter_add_columns_));
  m.impl("write_slice_", TORCH_BOX(&write_slice_));
  m.impl("exchange_slice_", TORCH_BOX(&exchange_slice_));
  m.impl("slice_adamw_", TORCH_BOX(&slice_adamw_));
}

}  // namespace fastft
