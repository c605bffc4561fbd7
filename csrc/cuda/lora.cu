// Entry points of the LoRA family; its kernels are in lora_kernels.cuh, its definition in fastft/ops/lora.py.
#include <numeric>

#include "lora_kernels.cuh"
#include "operands.cuh"

namespace fastft {
namespace {

// With the most groups that a rank tile may span.
template <class T, int kParts>
constexpr size_t kMostBytes =
    std::max({GradSb<T, 64, kParts>::kBytes, Shrink<T, 64, kParts>::bytes(4), GradA<T, 64, kParts>::bytes(4)});
static_assert(std::max({kMostBytes<float, 0>, kMostBytes<c10::Half, 1>, kMostBytes<c10::BFloat16, 3>}) <= kMostShared);

void check_ranks(const char* op, const std::vector<int64_t>& ranks, int64_t total) {
  const bool signs = std::all_of(ranks.begin(), ranks.end(), [](int64_t r) { return r >= 0; });
  STD_TORCH_CHECK(signs && std::accumulate(ranks.begin(), ranks.end(), int64_t{0}) == total, op,
                  ": ranks must not be negative and must add up to the ", total, " ranks of a");
}

const uint8_t* check_mask(const char* op, const Tensor& mask, size_t groups, int64_t rows, int64_t cols, double p) {
  if (p > 0)
    check(op, "mask", mask, kWhere, {ScalarType::Byte}, {static_cast<int64_t>(groups), rows, ceil_div(cols, kUnit)});
  else
    check(op, "mask", mask, kWhere, {ScalarType::Byte}, {0});
  return p > 0 ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr;
}

int64_t total_slots(const std::vector<int64_t>& ranks, bool masked) {
  int64_t slots = 0;
  each_launch(ranks, masked, [&](const Groups& groups, int64_t) { slots += count_slots(groups); });
  return slots;
}

std::tuple<Tensor, Tensor> lora_shrink(const Tensor& x, const Tensor& a, std::vector<int64_t> ranks, double p,
                                       std::optional<Tensor> seed) {
  const char* op = "lora_shrink";
  check_matrix(op, "x", x), check_matrix(op, "a", a), check_probability(op, p);
  const int64_t tokens = x.size(0), features = x.size(1), rank = a.size(0), bytes = ceil_div(features, kUnit);
  const int64_t groups = static_cast<int64_t>(ranks.size());
  check(op, "x", x, kWhere, kActivations, {tokens, features});
  check(op, "a", a, kWhere, {x.scalar_type(), ScalarType::Float}, {rank, features});
  check_ranks(op, ranks, rank);
  STD_TORCH_CHECK(seed.has_value() == (p > 0), op, ": needs a seed if and only if p > 0");
  check_same_device(op, x, {&a});
  if (seed) {
    check(op, "seed", *seed, kWhere, {ScalarType::Long}, {groups});
    check_same_device(op, x, {&*seed});
  }
  DeviceScope device(x);
  Tensor s = empty_on(x, {tokens, rank}, ScalarType::Float);
  Tensor mask = p > 0 ? empty_on(x, {groups, tokens, bytes}, ScalarType::Byte) : empty_on(x, {0}, ScalarType::Byte);
  const int64_t* seeds = p > 0 ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
  const int64_t slots = total_slots(ranks, p > 0), row_tiles = ceil_div(tokens, kRows);
  dispatch_arithmetic(x.scalar_type(), a.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using T = typename P::T;
    dispatch_ranks(slots, [&](auto tile) {
      constexpr int kRanks = decltype(tile)::value, kSlots = kRanks / kWarpRanks;
      const Split parts =
          split(ceil_div(features, kCols), row_tiles * ceil_div(slots, kSlots), kStreaming<kRanks, P::kParts>, 4);
      Tensor partial = empty_on(x, {parts.count, tokens, rank}, ScalarType::Float);
      each_launch(ranks, p > 0, [&](const Groups& some, int64_t first) {
        const dim3 grid(unsigned(row_tiles), unsigned(ceil_div(count_slots(some), kSlots)), unsigned(parts.count));
        if (row_tiles * parts.count > 0 && (rank > 0 || p > 0))
          launch(shrink_kernel<T, kRanks, P::kParts>, grid, dim3(kThreads), Shrink<T, kRanks, P::kParts>::bytes(some.count),
                 device.stream, input<T>(x), input<typename P::Adapter>(a), some, seeds ? seeds + first : nullptr,
                 philox::threshold(p), static_cast<uint8_t*>(mask.mutable_data_ptr()) + first * tokens * bytes,
                 floats(partial), int(parts.size));
      });
      reduce_into(s, partial, parts.count, philox::inverse_keep(p), device.stream);
    });
  });
  return {s, mask};
}

void lora_expand_(const Tensor& y, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_expand_";
  check_matrix(op, "y", y), check_matrix(op, "s", s);
  check_rows(op, "y", y, kWhere, kActivations, {y.size(0), y.size(1)});
  check_rows(op, "s", s, kWhere, {ScalarType::Float}, {y.size(0), s.size(1)});
  check(op, "b", b, kWhere, {y.scalar_type(), ScalarType::Float}, {y.size(1), s.size(1)});
  check_same_device(op, y, {&s, &b});
  if (y.numel() == 0 || s.size(1) == 0) return;
  DeviceScope device(y);
  dispatch_arithmetic(y.scalar_type(), b.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using T = typename P::T;
    launch(expand_kernel<T, P::kParts>, update_grid(y.size(0), y.size(1)), dim3(kThreads),
           UpdateTile<T, P::kParts, true>::kBytes, device.stream, output<T>(y), rank_input(s), input<typename P::Adapter>(b),
           static_cast<float>(scale));
  });
}

std::tuple<Tensor, Tensor> lora_grad_sb(const Tensor& dy, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_grad_sb";
  check_matrix(op, "dy", dy), check_matrix(op, "s", s);
  const int64_t tokens = dy.size(0), features = dy.size(1), ranks = s.size(1);
  check(op, "dy", dy, kWhere, kActivations, {tokens, features});
  check_rows(op, "s", s, kWhere, {ScalarType::Float}, {tokens, ranks});
  check(op, "b", b, kWhere, {dy.scalar_type(), ScalarType::Float}, {features, ranks});
  check_same_device(op, dy, {&s, &b});
  DeviceScope device(dy);
  Tensor ds = empty_on(dy, {tokens, ranks}, ScalarType::Float), db = empty_on(dy, {features, ranks}, b.scalar_type());
  dispatch_arithmetic(dy.scalar_type(), b.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using T = typename P::T;
    dispatch_ranks(ceil_div(ranks, kWarpRanks), [&](auto tile) {
      constexpr int kRanks = decltype(tile)::value;
      const int64_t col_tiles = ceil_div(features, kCols), rank_tiles = ceil_div(ranks, kRanks);
      // The workspaces hold (chunks T + parts N) R floats: about as many chunks as parts keeps them smallest.
      const int64_t tiles_per_chunk = std::max<int64_t>(ceil_div(col_tiles, 16), 1);
      const int64_t chunks = ceil_div(col_tiles, tiles_per_chunk);
      const Split parts = split(ceil_div(tokens, kRows), chunks * rank_tiles, kRanks == 16 && P::kParts == 1 ? 3 : 2, 4);
      Tensor ds_partial = empty_on(dy, {chunks, tokens, ranks}, ScalarType::Float);
      Tensor db_partial = empty_on(dy, {parts.count, features, ranks}, ScalarType::Float);
      if (chunks * rank_tiles * parts.count > 0)
        launch(grad_sb_kernel<T, kRanks, P::kParts>, dim3(unsigned(chunks), unsigned(rank_tiles), unsigned(parts.count)),
               dim3(kThreads), GradSb<T, kRanks, P::kParts>::kBytes, device.stream, input<T>(dy), rank_input(s),
               input<typename P::Adapter>(b), floats(ds_partial), floats(db_partial), int(tiles_per_chunk), int(parts.size));
      reduce(partial_sums<float>(ds, ds_partial, chunks), partial_sums<typename P::Adapter>(db, db_partial, parts.count),
             static_cast<float>(scale), device.stream);
    });
  });
  return {ds, db};
}

Tensor lora_grad_a(const Tensor& ds, const Tensor& x, const Tensor& a, std::vector<int64_t> ranks, const Tensor& mask,
                   double p) {
  const char* op = "lora_grad_a";
  check_matrix(op, "ds", ds), check_matrix(op, "x", x), check_probability(op, p);
  const int64_t tokens = x.size(0), features = x.size(1), rank = ds.size(1);
  check(op, "x", x, kWhere, kActivations, {tokens, features});
  check(op, "ds", ds, kWhere, {ScalarType::Float}, {tokens, rank});
  check(op, "a", a, kWhere, {x.scalar_type(), ScalarType::Float}, {rank, features});
  check_ranks(op, ranks, rank);
  const uint8_t* masks = check_mask(op, mask, ranks.size(), tokens, features, p);
  check_same_device(op, x, {&ds, &a, &mask});
  DeviceScope device(x);
  Tensor da = empty_on(x, {rank, features}, a.scalar_type());
  const int64_t slots = total_slots(ranks, p > 0), col_tiles = ceil_div(features, kCols);
  dispatch_arithmetic(x.scalar_type(), a.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using T = typename P::T;
    dispatch_ranks(slots, [&](auto tile) {
      constexpr int kRanks = decltype(tile)::value, kSlots = kRanks / kWarpRanks;
      const Split parts =
          split(ceil_div(tokens, kRows), col_tiles * ceil_div(slots, kSlots), kStreaming<kRanks, P::kParts>, 4);
      Tensor partial = empty_on(x, {parts.count, rank, features}, ScalarType::Float);
      each_launch(ranks, p > 0, [&](const Groups& some, int64_t first) {
        const dim3 grid(unsigned(col_tiles), unsigned(ceil_div(count_slots(some), kSlots)), unsigned(parts.count));
        if (col_tiles * parts.count * rank > 0)
          launch(grad_a_kernel<T, kRanks, P::kParts>, grid, dim3(kThreads), GradA<T, kRanks, P::kParts>::bytes(some.count),
                 device.stream, input<T>(x), rank_input(ds), some, masks ? masks + first * tokens * mask.size(2) : nullptr,
                 floats(partial), int(parts.size));
      });
      reduce_into(da, partial, parts.count, philox::inverse_keep(p), device.stream);
    });
  });
  return da;
}

// More than kMaxGroups groups take several launches, and then dX is read, added to and rounded once in each.
void lora_grad_x_(const Tensor& dx, const Tensor& ds, const Tensor& a, std::vector<int64_t> ranks, const Tensor& mask,
                  double p) {
  const char* op = "lora_grad_x_";
  check_matrix(op, "dx", dx), check_matrix(op, "ds", ds), check_probability(op, p);
  const int64_t tokens = dx.size(0), features = dx.size(1), rank = ds.size(1);
  check(op, "dx", dx, kWhere, kActivations, {tokens, features});
  check(op, "ds", ds, kWhere, {ScalarType::Float}, {tokens, rank});
  check(op, "a", a, kWhere, {dx.scalar_type(), ScalarType::Float}, {rank, features});
  check_ranks(op, ranks, rank);
  const uint8_t* masks = check_mask(op, mask, ranks.size(), tokens, features, p);
  check_same_device(op, dx, {&ds, &a, &mask});
  if (dx.numel() == 0 || rank == 0) return;
  DeviceScope device(dx);
  dispatch_arithmetic(dx.scalar_type(), a.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using T = typename P::T;
    each_launch(ranks, p > 0, [&](const Groups& some, int64_t first) {
      launch(grad_x_kernel<T, P::kParts>, update_grid(tokens, features), dim3(kThreads),
             UpdateTile<T, P::kParts, false>::kBytes, device.stream, output<T>(dx), rank_input(ds),
             input<typename P::Adapter>(a), some, masks ? masks + first * tokens * mask.size(2) : nullptr,
             philox::inverse_keep(p));
    });
  });
}

}  // namespace

#ifndef FASTFT_HOSTCUDA
// Why the kernels of this library can't run on the current device (the driver is too old, say), or nullptr: the library
// itself loads anywhere. For fastft/_native.py.
extern "C" __attribute__((visibility("default"))) const char* fastft_cuda_obstacle() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(expand_kernel<float, 0>));
  cudaGetLastError();  // or the next launch would report it
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_grad_sb", TORCH_BOX(&lora_grad_sb));
  m.impl("lora_grad_a", TORCH_BOX(&lora_grad_a));
  m.impl("lora_grad_x_", TORCH_BOX(&lora_grad_x_));
}

}  // namespace fastft
