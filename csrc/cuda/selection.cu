// The k largest of a matrix of scores, a block of rows at a time. Definitions: fastft/ops/selection.py. Counts are integers
// and places follow from prefix sums, so nothing depends on the order of threads.
#include "operands.cuh"

namespace fastft {
namespace {

constexpr int kBins = 1 << 16, kShift = 15;

// The bits of |score| as float32. Widening float16 is an addition (HADD2), which gives every NaN the same bits.
template <class T>
__device__ __forceinline__ uint32_t key_of(T score) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    const uint32_t half = score.x & 0x7fffu;
    if (half > 0x7c00u) return half << 13 | 0x7f800000u;
  }
  const float value = static_cast<float>(score);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & 0x7fffffffu;
}

// One bit an element of the unit at (row, col): its key is at least `least`.
template <class T>
__device__ __forceinline__ unsigned found_in(const Unit<T>& unit, int64_t left, uint32_t least) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) bits |= unsigned(j < left && key_of(unit.v[j]) >= least) << j;
  return bits;
}

// -- The histogram. 65,536 counters do not fit shared memory, but scores are within a few powers of two of each other: a
// block counts those from 2^-80 up to 2^16, and zeros, in its own 96 KiB (all that compute capability 8.6 has) and adds what
// it found to the counts at its end. The others are added right away.
constexpr int kWindow = 96 * 256, kFirstBin = (127 - 80) * 256;  // the first counter is that of bin 0
constexpr int kCountThreads = 1024, kCountUnits = 4, kCountColumns = 32 * kUnit * kCountUnits;  // of a row, by a warp

__device__ __forceinline__ void add_count(int64_t* counts, int bin, unsigned count) {
  note_store(counts, sizeof(int64_t));
  atomicAdd(reinterpret_cast<unsigned long long*>(counts + bin), static_cast<unsigned long long>(count));
}

template <class T>
__global__ void __launch_bounds__(kCountThreads) count_bins_kernel(Matrix<const T> scores, int64_t* counts) {
  SharedMemory shared;
  unsigned* window = shared.take<unsigned>(kWindow);
  for (int i = threadIdx.x; i < kWindow; i += kCountThreads) window[i] = 0;
  __syncthreads();
  const int64_t across = ceil_div(scores.cols, kCountColumns), tiles = scores.rows * across;
  const int64_t step = int64_t(gridDim.x) * (kCountThreads / 32);
  for (int64_t tile = int64_t(blockIdx.x) * (kCountThreads / 32) + threadIdx.x / 32; tile < tiles; tile += step) {
    const int64_t row = tile / across, col = tile % across * kCountColumns + threadIdx.x % 32 * kUnit;
    Unit<T> units[kCountUnits];
#pragma unroll
    for (int i = 0; i < kCountUnits; ++i) units[i] = load_unit<true, T>(scores, row, col + i * 32 * kUnit);
#pragma unroll
    for (int i = 0; i < kCountUnits; ++i)
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        if (col + i * 32 * kUnit + j >= scores.cols) break;
        const int bin = static_cast<int>(key_of(units[i].v[j]) >> kShift), at = bin ? bin - kFirstBin : 0;
        if (bin == 0 || (at > 0 && at < kWindow))
          atomicAdd(window + at, 1u);
        else
          add_count(counts, bin, 1);
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kWindow; i += kCountThreads)
    if (window[i]) add_count(counts, i ? i + kFirstBin : 0, window[i]);
}

// -- A block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) count_at_least_kernel(Matrix<const T> scores, uint32_t least, int64_t* out) {
  SharedMemory shared;
  int* of_warps = shared.take<int>(kWarps);
  const int64_t row = blockIdx.x;
  int count = 0;
#pragma unroll 4
  for (int64_t col = threadIdx.x * kUnit; col < scores.cols; col += kThreads * kUnit)
    count += __popc(found_in(load_unit<true, T>(scores, row, col), scores.cols - col, least));
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) count += __shfl_xor_sync(0xffffffffu, count, lanes);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  int64_t sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp];
  put(out, row, sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    take_at_least_kernel(Matrix<const T> scores, const int64_t* offsets, uint32_t least, int32_t* columns, int32_t* keys) {
  SharedMemory shared;
  int* of_warps = shared.take<int>(2 * kWarps);  // by turns, so that one barrier a step is enough
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t next = get(offsets, row);
  for (int64_t first = 0; first < scores.cols; first += kThreads * kUnit) {
    const int64_t col = first + threadIdx.x * kUnit;
    const Unit<T> unit = load_unit<true, T>(scores, row, col);
    const unsigned found = found_in(unit, scores.cols - col, least);
    const int count = __popc(found);
    int before = count;  // of this lane and those below
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, lanes);
      if (lane >= lanes) before += other;
    }
    int* sums = of_warps + first / (kThreads * kUnit) % 2 * kWarps;
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    int64_t at = next + before - count;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) at += sums[i];
      next += sums[i];
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
      if (found >> j & 1) {
        put(columns, at, static_cast<int32_t>(col + j));
        put(keys, at++, static_cast<int32_t>(key_of(unit.v[j])));
      }
  }
}

// -- Entry points.
void check_scores(const char* op, const Tensor& scores) {
  check_matrix(op, "scores", scores);
  check_rows(op, "scores", scores, kWhere, kActivations, {scores.size(0), scores.size(1)});
}

// The smallest key of a bin; one that no score has where there is no such bin.
uint32_t first_key(int64_t bin) { return static_cast<uint32_t>(std::clamp<int64_t>(bin, 0, kBins)) << kShift; }

void count_bins_(const Tensor& counts, const Tensor& scores) {
  const char* op = "count_bins_";
  check(op, "counts", counts, kWhere, {ScalarType::Long}, {kBins});
  check_scores(op, scores);
  check_same_device(op, counts, {&scores});
  if (scores.numel() == 0) return;
  DeviceScope device(scores);
  // Counters of 32 bits in shared memory: two blocks of 96 KiB a multiprocessor would have to see 10^12 scores to overflow.
  const int64_t tiles = scores.size(0) * ceil_div(scores.size(1), kCountColumns);
  const int64_t blocks = std::min<int64_t>(2 * kMultiprocessors, ceil_div(tiles, kCountThreads / 32));
  dispatch_dtype(scores.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch(count_bins_kernel<T>, dim3(unsigned(blocks)), dim3(kCountThreads), SharedMemory::bytes<unsigned>(kWindow),
           device.stream, input<T>(scores), static_cast<int64_t*>(counts.mutable_data_ptr()));
  });
}

Tensor count_at_least(const Tensor& scores, int64_t bin) {
  const char* op = "count_at_least";
  check_scores(op, scores);
  DeviceScope device(scores);
  Tensor out = empty_on(scores, {scores.size(0)}, ScalarType::Long);
  if (scores.size(0) == 0) return out;
  dispatch_dtype(scores.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch(count_at_least_kernel<T>, dim3(unsigned(scores.size(0))), dim3(kThreads), SharedMemory::bytes<int>(kWarps),
           device.stream, input<T>(scores), first_key(bin), static_cast<int64_t*>(out.mutable_data_ptr()));
  });
  return out;
}

void take_at_least_(const Tensor& columns, const Tensor& keys, const Tensor& scores, const Tensor& offsets, int64_t bin) {
  const char* op = "take_at_least_";
  check_scores(op, scores);
  check(op, "columns", columns, kWhere, {ScalarType::Int}, {columns.numel()});
  check(op, "keys", keys, kWhere, {ScalarType::Int}, {columns.numel()});
  check(op, "offsets", offsets, kWhere, {ScalarType::Long}, {scores.size(0)});
  check_same_device(op, scores, {&columns, &keys, &offsets});
  if (scores.numel() == 0) return;
  DeviceScope device(scores);
  dispatch_dtype(scores.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch(take_at_least_kernel<T>, dim3(unsigned(scores.size(0))), dim3(kThreads), SharedMemory::bytes<int>(2 * kWarps),
           device.stream, input<T>(scores), static_cast<const int64_t*>(offsets.const_data_ptr()), first_key(bin),
           static_cast<int32_t*>(columns.mutable_data_ptr()), static_cast<int32_t*>(keys.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("count_bins_", TORCH_BOX(&count_bins_));
  m.impl("count_at_least", TORCH_BOX(&count_at_least));
  m.impl("take_at_least_", TORCH_BOX(&take_at_least_));
}

}  // namespace fastft
