// The DoRA family. Maths and shapes: fastft/ops/dora.py. T tokens, N out-features, R rank.
#include "operands.cuh"
#include "update.cuh"

namespace fastft {
namespace {

// -- U += scale S Bt and Y = g U + bias, from the same float32 sums. Grid: update_grid.
template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 2)
    dora_expand_kernel(Matrix<T> u, Matrix<const float> s, Matrix<const typename Arithmetic<T, kParts>::Adapter> b,
                       Matrix<const float> g, Matrix<const T> bias, float scale, Matrix<T> y) {
  using Tile = UpdateTile<T, kParts, true>;
  SharedMemory shared;
  const Tile tile(shared, u);
  Unit<T> ahead[kUpdateUnits];
  if constexpr (Tile::kFetchAhead) tile.fetch(ahead, u);
  float sum[kUpdateUnits][kUnit] = {};
  tile.add(sum, s, b, 0, static_cast<int>(s.cols));
  if constexpr (!Tile::kFetchAhead) tile.fetch(ahead, u);
#pragma unroll
  for (int group = 0; group < Tile::kGroups; ++group) {
    const int64_t col = tile.col(group);
    const Unit<float> factor = load_unit<false, float>(g, 0, col);
    const Unit<T> shift = load_unit<false, T>(bias, 0, col);  // zeros without a bias, which has no rows then
#pragma unroll
    for (int i = group * Tile::kGroupUnits; i < (group + 1) * Tile::kGroupUnits; ++i) {
      const int64_t row = tile.row(i);
      if (row >= u.rows || col >= u.cols) continue;
      Unit<T> unit = ahead[i], scaled;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float total = fmaf(scale, sum[i][j], static_cast<float>(unit.v[j]));
        unit.v[j] = T(total);
        scaled.v[j] = T(fmaf(factor.v[j], total, static_cast<float>(shift.v[j])));
      }
      store_unit(u, row, col, unit);
      store_unit(y, row, col, scaled);
    }
  }
}

// A step of dora_grad_y: as many rows as the block's threads hold units, times the loads that a thread has in flight.
constexpr int kStepRows = kThreads / kUnitsPerRow, kRowsAhead = 2;

// -- dY' = g dY, and the sums of dY U over a part of the tokens: one pass over dY and U. Grid: column tiles, parts of T.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    dora_grad_y_kernel(Matrix<const T> dy, Matrix<const T> u, Matrix<const float> g, Matrix<T> scaled, float* partial,
                       int64_t rows_per_part) {
  SharedMemory shared;
  float* sums = shared.take<float>(kStepRows * kPitch);
  const int64_t col0 = int64_t(blockIdx.x) * kCols, col = col0 + unit_col();
  const int64_t begin = blockIdx.y * rows_per_part, end = begin + rows_per_part;
  if (end < dy.rows) dy.rows = u.rows = end;  // later rows are other blocks'

  const Unit<float> factor = load_unit<false, float>(g, 0, col);
  float sum[kUnit] = {};
  for (int64_t row0 = begin + unit_row(0); row0 < dy.rows; row0 += kRowsAhead * kStepRows) {
    Unit<T> left[kRowsAhead], right[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      left[i] = load_unit<true, T>(dy, row0 + i * kStepRows, col);
      right[i] = load_unit<true, T>(u, row0 + i * kStepRows, col);
    }
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      Unit<T> product;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float value = static_cast<float>(left[i].v[j]);
        sum[j] = fmaf(value, static_cast<float>(right[i].v[j]), sum[j]);
        product.v[j] = T(factor.v[j] * value);
      }
      if (row0 + i * kStepRows < dy.rows && col < dy.cols) store_unit<true>(scaled, row0 + i * kStepRows, col, product);
    }
  }
#pragma unroll
  for (int j = 0; j < kUnit; ++j) sums[unit_row(0) * kPitch + unit_col() + j] = sum[j];
  __syncthreads();
  const int64_t target = col0 + threadIdx.x;
  if (threadIdx.x >= kCols || target >= dy.cols) return;
  float total = 0.0f;
  for (int row = 0; row < kStepRows; ++row) total += sums[row * kPitch + threadIdx.x];
  put(partial, blockIdx.y * dy.cols + target, total);
}

// A vector [N] as a matrix of one row.
template <class T>
Matrix<const T> row(const Tensor& t) {
  return matrix(static_cast<const T*>(t.const_data_ptr()), 1, t.size(0), t.size(0));
}

Tensor dora_expand_(const Tensor& u, const Tensor& s, const Tensor& b, const Tensor& g, std::optional<Tensor> bias,
                    double scale) {
  const char* op = "dora_expand_";
  check_matrix(op, "u", u), check_matrix(op, "s", s);
  const int64_t tokens = u.size(0), features = u.size(1);
  check_rows(op, "u", u, kWhere, kActivations, {tokens, features});
  check_rows(op, "s", s, kWhere, {ScalarType::Float}, {tokens, s.size(1)});
  check(op, "b", b, kWhere, {u.scalar_type(), ScalarType::Float}, {features, s.size(1)});
  check(op, "g", g, kWhere, {ScalarType::Float}, {features});
  check_same_device(op, u, {&s, &b, &g});
  if (bias) {
    check(op, "bias", *bias, kWhere, {u.scalar_type()}, {features});
    check_same_device(op, u, {&*bias});
  }
  DeviceScope device(u);
  Tensor y = empty_on(u, {tokens, features}, u.scalar_type());
  if (u.numel() == 0) return y;
  dispatch_arithmetic(u.scalar_type(), b.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using T = typename P::T;
    launch(dora_expand_kernel<T, P::kParts>, update_grid(tokens, features), dim3(kThreads),
           UpdateTile<T, P::kParts, true>::kBytes, device.stream, output<T>(u), rank_input(s), input<typename P::Adapter>(b),
           row<float>(g), bias ? row<T>(*bias) : Matrix<const T>{}, static_cast<float>(scale), output<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor> dora_grad_y(const Tensor& dy, const Tensor& u, const Tensor& g) {
  const char* op = "dora_grad_y";
  check_matrix(op, "dy", dy);
  const int64_t tokens = dy.size(0), features = dy.size(1);
  check(op, "dy", dy, kWhere, kActivations, {tokens, features});
  check_rows(op, "u", u, kWhere, {dy.scalar_type()}, {tokens, features});
  check(op, "g", g, kWhere, {ScalarType::Float}, {features});
  check_same_device(op, dy, {&u, &g});
  DeviceScope device(dy);
  Tensor scaled = empty_on(dy, {tokens, features}, dy.scalar_type()), dots = empty_on(dy, {features}, ScalarType::Float);
  const int64_t col_tiles = ceil_div(features, kCols);
  const Split parts = split(ceil_div(tokens, kRowsAhead * kStepRows), col_tiles, 2, 4);
  Tensor partial = empty_on(dy, {parts.count, features}, ScalarType::Float);
  if (col_tiles * parts.count > 0)
    dispatch_dtype(dy.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      launch(dora_grad_y_kernel<T>, dim3(unsigned(col_tiles), unsigned(parts.count)), dim3(kThreads),
             SharedMemory::bytes<float>(kStepRows * kPitch), device.stream, input<T>(dy), input<T>(u), row<float>(g),
             output<T>(scaled), floats(partial), parts.size * kRowsAhead * kStepRows);
    });
  reduce_into(dots, partial, parts.count, 1.0, device.stream);
  return {scaled, dots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("dora_expand_", TORCH_BOX(&dora_expand_));
  m.impl("dora_grad_y", TORCH_BOX(&dora_grad_y));
}

}  // namespace fastft
