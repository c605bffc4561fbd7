// The LoRA family: Y += s drop(X) At Bt and its gradients. Maths, shapes and the definition of the mask: fastft/ops/lora.py.
// T tokens, K in-features, N out-features, R rank. Rank tiles of 16, 32 or 64; a larger R takes several tiles, each of
// which reads the activations again.
#include "../common/philox.h"
#include "ops.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace fastft {
namespace {

// Blocks that share a multiprocessor: two, unless the 128 registers which that leaves a thread make ptxas (13.0) spill:
// 24 to 56 bytes in grad_sb_kernel for sm_80, 48 to 64 in grad_a_kernel for sm_100.
#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;  // the host's pass over this file compiles no kernel
#endif
constexpr int kGradSbBlocks = kArch >= 900 ? 2 : 1, kGradABlocks = kArch < 1000 ? 2 : 1;

__device__ __forceinline__ int min_int(int a, int b) { return a < b ? a : b; }

// -- S = drop(X) At and the packed mask: one pass over X. Grid: token tiles, rank tiles, parts of K.
template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_kernel(Matrix<const T> x, Weights<T> a, const int64_t* seed, uint32_t threshold, uint8_t* mask, float* partial,
                  int tiles_per_part) {
  SharedMemory shared;
  float* act = shared.take<float>(kRows * kPitch);
  float* weights = shared.take<float>(kRanks * kPitch);
  static_assert(RowDot<kRanks>::kBuffer <= kRows * kPitch);
  const int64_t row0 = int64_t(blockIdx.x) * kRows;
  const int rank0 = blockIdx.y * kRanks, begin = blockIdx.z * tiles_per_part;
  const int end = min_int(begin + tiles_per_part, static_cast<int>(ceil_div(x.cols, kCols)));
  const uint64_t key = seed ? static_cast<uint64_t>(*seed) : 0;

  TileRegisters<T> ahead;
  auto fetch = [&](int tile) {
    const int64_t col = int64_t(tile) * kCols + unit_col();
    ahead.load(x, row0, int64_t(tile) * kCols);
    if (!seed) return;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int64_t row = row0 + unit_row(i);
      if (row >= x.rows || col >= x.cols) continue;
      unsigned keep = philox::keep_byte(key, row, static_cast<uint32_t>(col / kUnit), threshold);
      if (x.cols - col < kUnit) keep &= (1u << (x.cols - col)) - 1;
      if (blockIdx.y == 0) mask[row * ceil_div(x.cols, kUnit) + col / kUnit] = static_cast<uint8_t>(keep);
      ahead.drop(i, keep);
    }
  };

  RowDot<kRanks> dot;
  fetch(begin);
  for (int tile = begin; tile < end; ++tile) {
    ahead.store(act);
    a.template load<kRanks>(weights, rank0, int64_t(tile) * kCols);
    __syncthreads();
    if (tile + 1 < end) fetch(tile + 1);
    dot.add(act, weights);
    __syncthreads();
  }
  dot.publish(act);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
    const int64_t row = row0 + i / kRanks;
    const int rank = rank0 + i % kRanks;
    if (row < x.rows && rank < a.rows) partial[(blockIdx.z * x.rows + row) * a.rows + rank] = RowDot<kRanks>::total(act, i);
  }
}

// -- out[t, c] += scale sum_r s[t, r] w(r, c) where the mask keeps (t, c); the rest of out stays as it is, bit for bit.
// w is A [R, K], or B [N, R] when kColumnMajor. Grid: column tiles x tiles of 64 tokens.
constexpr int kUpdateRows = 64, kUpdateRanks = 16, kUpdateUnits = kUpdateRows * kCols / kUnit / kThreads;

template <class T, bool kColumnMajor>
__global__ void __launch_bounds__(kThreads, 2)
    update_kernel(Matrix<T> out, Matrix<const float> s, Weights<T> w, const uint8_t* mask, float scale) {
  SharedMemory shared;
  float* tokens = shared.take<float>(kUpdateRows * (kUpdateRanks + 4));
  float* weights = shared.take<float>(kUpdateRanks * kPitch);
  const int64_t col_tiles = ceil_div(out.cols, kCols);
  const int64_t row0 = blockIdx.x / col_tiles * kUpdateRows, col0 = blockIdx.x % col_tiles * kCols;
  const int64_t col = col0 + unit_col();

  float sum[kUpdateUnits][kUnit] = {};
  for (int rank0 = 0; rank0 < s.cols; rank0 += kUpdateRanks) {
    load_ranks<kUpdateRows, kUpdateRanks>(tokens, s, row0, rank0);
    if (kColumnMajor)
      w.template load_transposed<kUpdateRanks>(weights, col0, rank0);
    else
      w.template load<kUpdateRanks>(weights, rank0, col0);
    __syncthreads();
#pragma unroll 2
    for (int r = 0; r < kUpdateRanks; ++r) {
      const float4* row = reinterpret_cast<const float4*>(weights + r * kPitch + unit_col());
      const float4 low = row[0], high = row[1];
#pragma unroll
      for (int i = 0; i < kUpdateUnits; ++i) {
        const float factor = tokens[unit_row(i) * (kUpdateRanks + 4) + r];
        sum[i][0] += factor * low.x, sum[i][1] += factor * low.y, sum[i][2] += factor * low.z, sum[i][3] += factor * low.w;
        sum[i][4] += factor * high.x, sum[i][5] += factor * high.y, sum[i][6] += factor * high.z,
            sum[i][7] += factor * high.w;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kUpdateUnits; ++i) {
    const int64_t row = row0 + unit_row(i);
    if (row >= out.rows || col >= out.cols) continue;
    const unsigned keep = mask ? mask[row * ceil_div(out.cols, kUnit) + col / kUnit] : 0xffu;
    Unit<T> unit = load_unit<false, T>(out, row, col);
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
      if (keep >> j & 1) unit.v[j] = T(static_cast<float>(unit.v[j]) + scale * sum[i][j]);
    store_unit(out, row, col, unit);
  }
}

// -- dS = dY B and dBt = St dY: one pass over dY. Grid: chunks of column tiles, rank tiles, parts of T.
// A block walks its tokens once per column tile and keeps that tile's dB in registers. Its dS goes to a workspace slice
// that no other block touches, first stored and then added to, always by the same thread.
template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads, kGradSbBlocks)
    grad_sb_kernel(Matrix<const T> dy, Matrix<const float> s, Weights<T> b, float* ds_partial, float* db_partial,
                   int col_tiles_per_chunk, int row_tiles_per_part) {
  SharedMemory shared;
  float* act = shared.take<float>(kRows * kPitch);
  float* weights = shared.take<float>(kRanks * kPitch);
  float* tokens = shared.take<float>(kRows * (kRanks + 4));
  float* buffer = shared.take<float>(RowDot<kRanks>::kBuffer);
  const int rank0 = blockIdx.y * kRanks, first_col = blockIdx.x * col_tiles_per_chunk,
            begin = blockIdx.z * row_tiles_per_part;
  const int end_col = min_int(first_col + col_tiles_per_chunk, static_cast<int>(ceil_div(dy.cols, kCols)));
  const int end = min_int(begin + row_tiles_per_part, static_cast<int>(ceil_div(dy.rows, kRows)));

  for (int col_tile = first_col; col_tile < end_col; ++col_tile) {
    const int64_t col0 = int64_t(col_tile) * kCols;
    b.template load_transposed<kRanks>(weights, col0, rank0);
    TokenSum<kRanks> sum;
    for (int row_tile = begin; row_tile < end; ++row_tile) {
      const int64_t row0 = int64_t(row_tile) * kRows;
      load_tile(act, dy, row0, col0);
      load_ranks<kRows, kRanks>(tokens, s, row0, rank0);
      __syncthreads();
      sum.add(act, tokens);
      RowDot<kRanks> dot;
      dot.add(act, weights);
      dot.publish(buffer);
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
        const int64_t row = row0 + i / kRanks;
        const int rank = rank0 + i % kRanks;
        if (row >= dy.rows || rank >= s.cols) continue;
        float* target = ds_partial + (blockIdx.x * dy.rows + row) * s.cols + rank;
        const float part = RowDot<kRanks>::total(buffer, i);
        *target = col_tile == first_col ? part : *target + part;
      }
    }
    sum.combine(weights);
#pragma unroll 1
    for (int i = threadIdx.x; i < kCols * kRanks; i += kThreads) {
      const int64_t col = col0 + i / kRanks;
      const int rank = rank0 + i % kRanks;
      if (col < dy.cols && rank < s.cols)
        db_partial[(blockIdx.z * dy.cols + col) * s.cols + rank] = weights[i % kRanks * kPitch + i / kRanks];
    }
    __syncthreads();  // before the next column tile's weights; a thread overwrites what it read itself, but only as yet
  }
}

// -- dA = dSt drop(X). Grid: column tiles, rank tiles, parts of T.
template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads, kGradABlocks)
    grad_a_kernel(Matrix<const T> x, Matrix<const float> ds, const uint8_t* mask, float* partial, int row_tiles_per_part) {
  SharedMemory shared;
  float* act = shared.take<float>((kRows > kRanks ? kRows : kRanks) * kPitch);
  float* tokens = shared.take<float>(kRows * (kRanks + 4));
  const int64_t col0 = int64_t(blockIdx.x) * kCols, col = col0 + unit_col();
  const int rank0 = blockIdx.y * kRanks, begin = blockIdx.z * row_tiles_per_part;
  const int end = min_int(begin + row_tiles_per_part, static_cast<int>(ceil_div(x.rows, kRows)));

  TileRegisters<T> ahead;
  auto fetch = [&](int row_tile) {
    const int64_t row0 = int64_t(row_tile) * kRows;
    ahead.load(x, row0, col0);
    if (!mask || col >= x.cols) return;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int64_t row = row0 + unit_row(i);
      if (row < x.rows) ahead.drop(i, mask[row * ceil_div(x.cols, kUnit) + col / kUnit]);
    }
  };

  TokenSum<kRanks> sum;
  fetch(begin);
  for (int row_tile = begin; row_tile < end; ++row_tile) {
    ahead.store(act);
    load_ranks<kRows, kRanks>(tokens, ds, int64_t(row_tile) * kRows, rank0);
    __syncthreads();
    if (row_tile + 1 < end) fetch(row_tile + 1);
    sum.add(act, tokens);
    __syncthreads();
  }
  sum.combine(act);
#pragma unroll 1
  for (int i = threadIdx.x; i < kCols * kRanks; i += kThreads) {
    const int rank = rank0 + i / kCols;
    const int64_t target_col = col0 + i % kCols;
    if (rank < ds.cols && target_col < x.cols)
      partial[(int64_t(blockIdx.z) * ds.cols + rank) * x.cols + target_col] = act[i / kCols * kPitch + i % kCols];
  }
}

// -- Launchers.

template <class T>
Weights<T> weights(const Tensor& w) {
  auto vectors = matrix(static_cast<const char*>(w.const_data_ptr()), w.size(0), w.size(1)).vectors;
  return {w.const_data_ptr(), w.size(0), w.size(1), vectors, w.scalar_type() == ScalarType::Float};
}

template <class T>
Matrix<const T> input(const Tensor& t) {
  return matrix(static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1));
}

template <int kRanks>
struct Ranks {
  static constexpr int value = kRanks;
};

// Calls f with the smallest rank tile that holds `ranks`, or the largest.
template <class F>
void dispatch_ranks(int64_t ranks, F&& f) {
  if (ranks <= 16) return f(Ranks<16>{});
  if (ranks <= 32) return f(Ranks<32>{});
  return f(Ranks<64>{});
}

constexpr size_t tile_bytes(int rows) { return SharedMemory::bytes<float>(rows * kPitch); }
constexpr size_t tokens_bytes(int rows, int ranks) { return SharedMemory::bytes<float>(rows * (ranks + 4)); }

template <int kRanks>
constexpr size_t kGradSbBytes = tile_bytes(kRows) + tile_bytes(kRanks) + tokens_bytes(kRows, kRanks) +
                                SharedMemory::bytes<float>(RowDot<kRanks>::kBuffer);
static_assert(kGradSbBytes<64> <= 99 * 1024, "the most a block may have on compute capability 8.6 and 8.9");

void reduce_into(const Tensor& out, const Tensor& partial, int64_t parts, double scale, Stream stream) {
  dispatch_dtype(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    reduce(static_cast<const float*>(partial.const_data_ptr()), parts, out.numel(), static_cast<float>(scale),
           static_cast<T*>(out.mutable_data_ptr()), stream);
  });
}

template <bool kColumnMajor>
void update(const Tensor& out, const Tensor& s, const Tensor& w, const uint8_t* mask, float scale) {
  if (out.numel() == 0 || s.size(1) == 0) return;
  DeviceScope device(out);
  dispatch_dtype(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    int64_t blocks = ceil_div(out.size(1), kCols) * ceil_div(out.size(0), kUpdateRows);
    launch(update_kernel<T, kColumnMajor>, dim3(unsigned(blocks)), dim3(kThreads),
           tokens_bytes(kUpdateRows, kUpdateRanks) + tile_bytes(kUpdateRanks), device.stream,
           matrix(static_cast<T*>(out.mutable_data_ptr()), out.size(0), out.size(1)), input<float>(s), weights<T>(w), mask,
           scale);
  });
}

const std::initializer_list<ScalarType> kActivations = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

const uint8_t* check_mask(const char* op, const Tensor& mask, int64_t rows, int64_t cols, double p) {
  if (p > 0)
    check(op, "mask", mask, kWhere, {ScalarType::Byte}, {rows, ceil_div(cols, kUnit)});
  else
    check(op, "mask", mask, kWhere, {ScalarType::Byte}, {0});
  return p > 0 ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr;
}

// -- Entry points.

std::tuple<Tensor, Tensor> lora_shrink(const Tensor& x, const Tensor& a, double p, std::optional<Tensor> seed) {
  const char* op = "lora_shrink";
  check_matrix(op, "x", x), check_matrix(op, "a", a), check_probability(op, p);
  const int64_t tokens = x.size(0), features = x.size(1), ranks = a.size(0);
  check(op, "x", x, kWhere, kActivations, {tokens, features});
  check(op, "a", a, kWhere, {x.scalar_type(), ScalarType::Float}, {ranks, features});
  STD_TORCH_CHECK(seed.has_value() == (p > 0), op, ": needs a seed if and only if p > 0");
  check_same_device(op, x, {&a});
  if (seed) {
    check(op, "seed", *seed, kWhere, {ScalarType::Long}, {1});
    check_same_device(op, x, {&*seed});
  }
  DeviceScope device(x);
  Tensor s = empty_on(x, {tokens, ranks}, ScalarType::Float);
  Tensor mask =
      p > 0 ? empty_on(x, {tokens, ceil_div(features, kUnit)}, ScalarType::Byte) : empty_on(x, {0}, ScalarType::Byte);
  dispatch_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_ranks(ranks, [&](auto tile) {
      constexpr int kRanks = decltype(tile)::value;
      const int64_t row_tiles = ceil_div(tokens, kRows), rank_tiles = std::max<int64_t>(ceil_div(ranks, kRanks), 1);
      const Split parts = split(ceil_div(features, kCols), row_tiles * rank_tiles, 4);
      Tensor partial = empty_on(x, {parts.count, tokens, ranks}, ScalarType::Float);
      if (row_tiles * parts.count > 0 && (ranks > 0 || p > 0))
        launch(shrink_kernel<T, kRanks>, dim3(unsigned(row_tiles), unsigned(rank_tiles), unsigned(parts.count)),
               dim3(kThreads), tile_bytes(kRows) + tile_bytes(kRanks), device.stream, input<T>(x), weights<T>(a),
               p > 0 ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr, philox::threshold(p),
               static_cast<uint8_t*>(mask.mutable_data_ptr()), floats(partial), int(parts.size));
      reduce_into(s, partial, parts.count, philox::inverse_keep(p), device.stream);
    });
  });
  return {s, mask};
}

void lora_expand_(const Tensor& y, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_expand_";
  check_matrix(op, "y", y), check_matrix(op, "s", s);
  check(op, "y", y, kWhere, kActivations, {y.size(0), y.size(1)});
  check(op, "s", s, kWhere, {ScalarType::Float}, {y.size(0), s.size(1)});
  check(op, "b", b, kWhere, {y.scalar_type(), ScalarType::Float}, {y.size(1), s.size(1)});
  check_same_device(op, y, {&s, &b});
  update<true>(y, s, b, nullptr, static_cast<float>(scale));
}

std::tuple<Tensor, Tensor> lora_grad_sb(const Tensor& dy, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_grad_sb";
  check_matrix(op, "dy", dy), check_matrix(op, "s", s);
  const int64_t tokens = dy.size(0), features = dy.size(1), ranks = s.size(1);
  check(op, "dy", dy, kWhere, kActivations, {tokens, features});
  check(op, "s", s, kWhere, {ScalarType::Float}, {tokens, ranks});
  check(op, "b", b, kWhere, {dy.scalar_type(), ScalarType::Float}, {features, ranks});
  check_same_device(op, dy, {&s, &b});
  DeviceScope device(dy);
  Tensor ds = empty_on(dy, {tokens, ranks}, ScalarType::Float), db = empty_on(dy, {features, ranks}, b.scalar_type());
  dispatch_dtype(dy.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_ranks(ranks, [&](auto tile) {
      constexpr int kRanks = decltype(tile)::value;
      const int64_t col_tiles = ceil_div(features, kCols), rank_tiles = ceil_div(ranks, kRanks);
      // The workspaces hold (chunks T + parts N) R floats: about as many chunks as parts keeps them smallest.
      const int64_t tiles_per_chunk = std::max<int64_t>(ceil_div(col_tiles, 16), 1);
      const int64_t chunks = ceil_div(col_tiles, tiles_per_chunk);
      const Split parts = split(ceil_div(tokens, kRows), chunks * rank_tiles, 4);
      Tensor ds_partial = empty_on(dy, {chunks, tokens, ranks}, ScalarType::Float);
      Tensor db_partial = empty_on(dy, {parts.count, features, ranks}, ScalarType::Float);
      if (chunks * rank_tiles * parts.count > 0)
        launch(grad_sb_kernel<T, kRanks>, dim3(unsigned(chunks), unsigned(rank_tiles), unsigned(parts.count)),
               dim3(kThreads), kGradSbBytes<kRanks>, device.stream, input<T>(dy), input<float>(s), weights<T>(b),
               floats(ds_partial), floats(db_partial), int(tiles_per_chunk), int(parts.size));
      reduce_into(ds, ds_partial, chunks, scale, device.stream);
      reduce_into(db, db_partial, parts.count, scale, device.stream);
    });
  });
  return {ds, db};
}

Tensor lora_grad_a(const Tensor& ds, const Tensor& x, const Tensor& a, const Tensor& mask, double p) {
  const char* op = "lora_grad_a";
  check_matrix(op, "ds", ds), check_matrix(op, "x", x), check_probability(op, p);
  const int64_t tokens = x.size(0), features = x.size(1), ranks = ds.size(1);
  check(op, "x", x, kWhere, kActivations, {tokens, features});
  check(op, "ds", ds, kWhere, {ScalarType::Float}, {tokens, ranks});
  check(op, "a", a, kWhere, {x.scalar_type(), ScalarType::Float}, {ranks, features});
  const uint8_t* bits = check_mask(op, mask, tokens, features, p);
  check_same_device(op, x, {&ds, &a, &mask});
  DeviceScope device(x);
  Tensor da = empty_on(x, {ranks, features}, a.scalar_type());
  dispatch_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_ranks(ranks, [&](auto tile) {
      constexpr int kRanks = decltype(tile)::value;
      const int64_t col_tiles = ceil_div(features, kCols), rank_tiles = ceil_div(ranks, kRanks);
      const Split parts = split(ceil_div(tokens, kRows), col_tiles * rank_tiles, 4);
      Tensor partial = empty_on(x, {parts.count, ranks, features}, ScalarType::Float);
      if (col_tiles * rank_tiles * parts.count > 0)
        launch(grad_a_kernel<T, kRanks>, dim3(unsigned(col_tiles), unsigned(rank_tiles), unsigned(parts.count)),
               dim3(kThreads), tile_bytes(std::max(kRows, kRanks)) + tokens_bytes(kRows, kRanks), device.stream, input<T>(x),
               input<float>(ds), bits, floats(partial), int(parts.size));
      reduce_into(da, partial, parts.count, philox::inverse_keep(p), device.stream);
    });
  });
  return da;
}

void lora_grad_x_(const Tensor& dx, const Tensor& ds, const Tensor& a, const Tensor& mask, double p) {
  const char* op = "lora_grad_x_";
  check_matrix(op, "dx", dx), check_matrix(op, "ds", ds), check_probability(op, p);
  check(op, "dx", dx, kWhere, kActivations, {dx.size(0), dx.size(1)});
  check(op, "ds", ds, kWhere, {ScalarType::Float}, {dx.size(0), ds.size(1)});
  check(op, "a", a, kWhere, {dx.scalar_type(), ScalarType::Float}, {ds.size(1), dx.size(1)});
  const uint8_t* bits = check_mask(op, mask, dx.size(0), dx.size(1), p);
  check_same_device(op, dx, {&ds, &a, &mask});
  update<false>(dx, ds, a, bits, philox::inverse_keep(p));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_grad_sb", TORCH_BOX(&lora_grad_sb));
  m.impl("lora_grad_a", TORCH_BOX(&lora_grad_a));
  m.impl("lora_grad_x_", TORCH_BOX(&lora_grad_x_));
}

}  // namespace fastft
