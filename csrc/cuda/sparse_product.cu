// Y += X deltaᵀ for a delta of single entries beside the weight (fastft/ops/sparse.py): few tokens, as at decoding, and
// many.
#include "entries.cuh"
#include "tokens.cuh"

namespace fastft {
namespace {

// From more tokens on copying X pays: 32 lanes that read x at their entries' columns touch 32 sectors a token.
constexpr int64_t kFewTokens = 16;

// -- Few tokens. A warp per row of delta, a lane per entry, kFewHeld tokens at a time. Grid: rows, tokens.
constexpr int kFewHeld = 4;

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_few_kernel(Matrix<T> y, Matrix<const T> x, Entries entries, const float* values) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, token0 = blockIdx.y * kFewHeld;
  if (row >= entries.rows) return;  // all of the warp
  const int lane = threadIdx.x % 32;
  const int64_t begin = get(entries.starts, row), end = get(entries.starts, row + 1);
  if (begin == end) return;
  float sum[kFewHeld] = {};
#pragma unroll 2
  for (int64_t i = begin + lane; i < end; i += 32) {
    const int64_t column = get(entries.columns, i);
    const float value = get(values, i);
#pragma unroll
    for (int t = 0; t < kFewHeld; ++t)
      if (token0 + t < x.rows)
        sum[t] = fmaf(value, static_cast<float>(get(x.data, (token0 + t) * x.stride + column)), sum[t]);
  }
#pragma unroll
  for (int t = 0; t < kFewHeld; ++t) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], lanes);
    const int64_t at = (token0 + t) * y.stride + row;
    if (lane == t && token0 + t < y.rows) put(y.data, at, T(static_cast<float>(get(y.data, at)) + sum[t]));
  }
}

// -- Many tokens. A block has kGroup rows of delta and the tokens of a warp's vector. A warp sums up a row at a time, one
// vector of a token-contiguous copy of X an entry; the sums are transposed in shared memory.
constexpr int kGroup = 32, kAhead = 4;

template <class T>
constexpr int kSumsPitch = kVectorTokens<T> + 4;

// Four blocks a multiprocessor and one step at a time: left to itself ptxas (13.0) aims at more and spills 8 to 16 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    add_many_kernel(Matrix<T> y, const T* x, int64_t token0, int tokens, Entries entries, const float* values) {
  const int64_t groups = ceil_div(entries.rows, kGroup), row0 = blockIdx.x % groups * kGroup;
  const int vector = static_cast<int>(blockIdx.x / groups), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = static_cast<int>(entries.rows - row0 < kGroup ? entries.rows - row0 : kGroup);
  if (get(entries.starts, row0) == get(entries.starts, row0 + rows)) return;  // all of the block
  SharedMemory shared;
  float* sums = shared.take<float>(kGroup * kSumsPitch<T>);
  for (int r = warp; r < rows; r += kWarps) {
    const int64_t begin = get(entries.starts, row0 + r), end = get(entries.starts, row0 + r + 1);
    float acc[kLaneTokens<T>] = {};
    for (int64_t first = begin; first < end; first += 32) {
      const int count = static_cast<int>(end - first < 32 ? end - first : 32);
      // Lanes past the last entry have it too: what they read is not used.
      const int64_t mine = first + (lane < count ? lane : count - 1);
      const int32_t column = get(entries.columns, mine);
      const float value = get(values, mine);
#pragma unroll 1
      for (int i = 0; i < count; i += kAhead) {
        Vector<T> ahead[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) ahead[k] = load_vector(x, __shfl_sync(0xffffffffu, column, i + k), tokens, vector);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const float factor = __shfl_sync(0xffffffffu, value, i + k);
          if (i + k < count)
#pragma unroll
            for (int j = 0; j < kLaneTokens<T>; ++j) acc[j] = fmaf(factor, static_cast<float>(ahead[k].v[j]), acc[j]);
        }
      }
    }
    auto* target = reinterpret_cast<float4*>(sums + r * kSumsPitch<T> + lane * kLaneTokens<T>);
#pragma unroll
    for (int j = 0; j < kLaneTokens<T>; j += 4) target[j / 4] = make_float4(acc[j], acc[j + 1], acc[j + 2], acc[j + 3]);
  }
  __syncthreads();
  token0 += vector * kVectorTokens<T>;
#pragma unroll 4
  for (int t = warp; t < kVectorTokens<T>; t += kWarps) {
    const int64_t at = (token0 + t) * y.stride + row0 + lane;
    if (token0 + t < y.rows && lane < rows)
      put(y.data, at, T(static_cast<float>(get(y.data, at)) + sums[lane * kSumsPitch<T> + t]));
  }
}

template <class T>
void add_product(const Tensor& y, const Tensor& x, const Entries& entries, const float* values, Stream stream) {
  const int64_t tokens = x.size(0), features = x.size(1);
  if (tokens <= kFewTokens) {
    const dim3 grid(unsigned(ceil_div(entries.rows, kWarps)), unsigned(ceil_div(tokens, kFewHeld)));
    launch(add_few_kernel<T>, grid, dim3(kThreads), 0, stream, output<T>(y), input<T>(x), entries, values);
    return;
  }
  const int64_t slab = slab_tokens<T>(tokens, features);
  Tensor copy = empty_on(x, {features, slab}, x.scalar_type());
  T* features_of_x = static_cast<T*>(copy.mutable_data_ptr());
  for (int64_t token = 0; token < tokens; token += slab) {
    const int64_t size = std::min(slab, ceil_div(tokens - token, kVectorTokens<T>) * kVectorTokens<T>);
    transpose<T>(input<T>(x), features_of_x, Matrix<const T>{}, nullptr, token, size, stream);
    launch(add_many_kernel<T>, dim3(unsigned(ceil_div(entries.rows, kGroup) * (size / kVectorTokens<T>))), dim3(kThreads),
           SharedMemory::bytes<float>(kGroup * kSumsPitch<T>), stream, output<T>(y), static_cast<const T*>(features_of_x),
           token, int(size), entries, values);
  }
}

void add_sparse_product_(const Tensor& y, const Tensor& x, const Tensor& starts, const Tensor& columns,
                         const Tensor& values) {
  const char* op = "add_sparse_product_";
  check_matrix(op, "y", y), check_matrix(op, "x", x);
  const int64_t tokens = y.size(0), rows = y.size(1);
  check_rows(op, "y", y, kWhere, kActivations, {tokens, rows});
  check_rows(op, "x", x, kWhere, {y.scalar_type()}, {tokens, x.size(1)});
  const Entries entries = checked_entries(op, y, rows, starts, columns);
  check(op, "values", values, kWhere, {ScalarType::Float}, {entries.size});
  check_same_device(op, y, {&x, &values});
  if (entries.size == 0 || tokens == 0) return;
  DeviceScope device(y);
  dispatch_dtype(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    add_product<T>(y, x, entries, static_cast<const float*>(values.const_data_ptr()), device.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("add_sparse_product_", TORCH_BOX(&add_sparse_product_));
}

}  // namespace fastft
