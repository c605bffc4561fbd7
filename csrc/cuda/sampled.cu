// The chosen entries of leftᵀ right (fastft/ops/sparse.py), by one of two engines.
//
// Entry by entry: a product of two token vectors each, from token-contiguous copies (tokens.cuh). Its time is that of
//     E T elements from L2  and of  4 (A + B) T elements from and to memory.
// By tiles (sampled_tiles.cuh): that of the dense product, 2 A B T operations.
//
// No engine uses atomics: the same bits every time.
#include "packs.cuh"
#include "sampled_tiles.cuh"
#include "tokens.cuh"

namespace fastft {
namespace {

// At 4.5 TB/s of L2, 3.5 TB/s of memory and 550 TF/s (an H200, a model; float32 at 40 TF/s) copies of two token vectors cost
// as much as 2.5 entries, and tiles are faster where what the entries cost is above this part of A B.
constexpr double kTilesFrom = 0.008, kTilesFromFloat32 = 0.056;

bool by_tiles(ScalarType dtype, int64_t rows, int64_t cols, int64_t count) {
  const double from = dtype == ScalarType::Float ? kTilesFromFloat32 : kTilesFrom;
  return double(count) + 2.5 * double(rows + cols) > from * double(rows) * double(cols);
}

// out[i] (+)= the partial sums of part 0, 1, ... of entry i; without parts there are none.
template <bool kAdd>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const float* partial, int64_t parts, int64_t size, float* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 8  // loads in flight
  for (int64_t part = 0; part < parts; ++part) sum += get(partial, part * size + i);
  put(out, i, kAdd ? get(out, i) + sum : sum);
}

void sum_parts(const float* partial, int64_t parts, int64_t size, float* out, bool add, Stream stream) {
  launch(add ? sum_parts_kernel<true> : sum_parts_kernel<false>, dim3(unsigned(ceil_div(size, kThreads))), dim3(kThreads), 0,
         stream, partial, parts, size, out);
}

// A warp has `share` entries that follow each other, up to 32. It holds the left token vector of a row in registers and has
// the loads of two right ones in flight.
template <class T, bool kAdd>
__global__ void __launch_bounds__(kThreads, 2)
    sampled_entries_kernel(const T* left, const T* right, int tokens, Entries entries, int share, float* out) {
  const int lane = threadIdx.x % 32, vectors = tokens / kVectorTokens<T>;
  const int64_t first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * share;
  if (first >= entries.size) return;  // all of the warp
  const int count = static_cast<int>(entries.size - first < share ? entries.size - first : share);
  const int64_t mine = first + (lane < count ? lane : count - 1);
  const int64_t row = Row(entries, mine).of(mine), column = get(entries.columns, mine);

  float held[kVectors][kLaneTokens<T>], result = 0.0f;
  int64_t held_row = -1;
  for (int i = 0; i < count; i += 2) {
    Vector<T> ahead[2][kVectors];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t feature = __shfl_sync(0xffffffffu, column, i + k);
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (v < vectors) ahead[k][v] = load_vector(right, feature, tokens, v);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int64_t wanted = __shfl_sync(0xffffffffu, row, i + k);
      if (wanted != held_row) {
        held_row = wanted;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (v >= vectors) break;
          const Vector<T> vector = load_vector(left, wanted, tokens, v);
#pragma unroll
          for (int j = 0; j < kLaneTokens<T>; ++j) held[v][j] = static_cast<float>(vector.v[j]);
        }
      }
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (v < vectors)
#pragma unroll
          for (int j = 0; j < kLaneTokens<T>; ++j) sum = fmaf(held[v][j], static_cast<float>(ahead[k][v].v[j]), sum);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (lane == i + k) result = sum;
    }
  }
  if (lane < count) put(out, mine, kAdd ? get(out, mine) + result : result);
}

template <class T>
void entry_by_entry(const Tensor& out, const Tensor& left, const Tensor& right, const Entries& entries, bool add,
                    Stream stream) {
  const int64_t tokens = left.size(0), rows = left.size(1), cols = right.size(1);
  const int64_t slab = slab_tokens<T>(tokens, cols);
  Tensor copies = empty_on(left, {rows + cols, slab}, left.scalar_type());
  T* of_left = static_cast<T*>(copies.mutable_data_ptr());
  // Few entries are shared out among more warps: 16 a multiprocessor's quarter hide the latency of L2.
  const int64_t warps = kMultiprocessors * 64;
  const int share = static_cast<int>(std::clamp<int64_t>(ceil_div(entries.size, warps), 4, 32));
  const dim3 grid(unsigned(ceil_div(ceil_div(entries.size, share), kWarps)));
  for (int64_t token = 0; token < tokens; token += slab) {
    const int64_t size = std::min(slab, ceil_div(tokens - token, kVectorTokens<T>) * kVectorTokens<T>);
    T* of_right = of_left + rows * size;
    transpose(input<T>(left), of_left, input<T>(right), of_right, token, size, stream);
    launch(add || token > 0 ? sampled_entries_kernel<T, true> : sampled_entries_kernel<T, false>, grid, dim3(kThreads), 0,
           stream, static_cast<const T*>(of_left), static_cast<const T*>(of_right), int(size), entries, share, floats(out));
  }
}

template <class T>
void tile_by_tile(const Tensor& out, const Tensor& left, const Tensor& right, const Entries& entries, bool add,
                  Stream stream) {
  using Tile = SampledTile<T>;
  const int64_t tiles = ceil_div(left.size(1), Tile::kSide) * ceil_div(right.size(1), Tile::kSide);
  const Split parts = split(ceil_div(left.size(0), Tile::kTokens), tiles, Tile::kTensorCores ? 2 : 1, 256 / Tile::kTokens);
  const dim3 grid(unsigned(tiles), unsigned(parts.count));
  auto run = [&](auto* kernel, float* to) {
    launch(kernel, grid, dim3(kThreads), Tile::kBytes, stream, input<T>(left), input<T>(right), entries, to,
           int(parts.size));
  };
  if (parts.count == 1) return run(add ? sampled_tiles_kernel<T, true> : sampled_tiles_kernel<T, false>, floats(out));
  Tensor partial = empty_on(out, {parts.count, entries.size}, ScalarType::Float);
  run(sampled_tiles_kernel<T, false>, floats(partial));
  sum_parts(floats(partial), parts.count, entries.size, floats(out), add, stream);
}

void sampled_product_(const Tensor& out, const Tensor& left, const Tensor& right, const Tensor& starts,
                      const Tensor& columns, bool add) {
  const char* op = "sampled_product_";
  check_matrix(op, "left", left), check_matrix(op, "right", right);
  const int64_t tokens = left.size(0), rows = left.size(1), cols = right.size(1);
  check_rows(op, "left", left, kWhere, kActivations, {tokens, rows});
  check_rows(op, "right", right, kWhere, {left.scalar_type()}, {tokens, cols});
  const Entries entries = checked_entries(op, left, rows, starts, columns);
  check(op, "out", out, kWhere, {ScalarType::Float}, {entries.size});
  check_same_device(op, left, {&right, &out});
  if (entries.size == 0 || (tokens == 0 && add)) return;
  DeviceScope device(left);
  if (tokens == 0) return sum_parts(nullptr, 0, entries.size, floats(out), false, device.stream);
  dispatch_dtype(left.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    (by_tiles(left.scalar_type(), rows, cols, entries.size) ? tile_by_tile<T> : entry_by_entry<T>)(out, left, right, entries,
                                                                                                   add, device.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("sampled_product_", TORCH_BOX(&sampled_product_));
}

}  // namespace fastft
