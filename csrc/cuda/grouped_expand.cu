// What adapters add to y (fastft/ops/grouped.py). A block owns columns of y for a tile of one segment and adds the pieces
// that reach into them one after the other; a warp has 64 of them. Few tokens: its quarters have every 4th rank. More: a
// tile of 32 tokens, of which a warp has 16 on tensor cores. Of k assignments of a token each has a launch of its own, so
// that no two blocks add to one element at a time.
#include "grouped.cuh"

namespace fastft {
namespace {

constexpr int kHeldPieces = 8;
constexpr int kEntryTokens = 8;  // that an entry is held for

// Columns of y that a block owns.
__host__ __device__ constexpr int owned(bool few) { return few ? 512 : 256; }

template <class T, int kParts>
struct Expand : Arithmetic<T, kParts> {
  using W = typename Expand::Adapter;
  static constexpr bool kTensor = kParts > 0;
  static constexpr int kAtOnce = 8 / int(sizeof(W));  // ranks of a lane whose rows are in flight together
  static constexpr int kChunk = kFew * kAtOnce, kHeldFactors = kChunk * kFew / 32;  // of a warp; of its factors a lane's

  Matrix<T> y;
  Matrix<const T> x;
  const float* s;
  const W* store;
  const int64_t* offsets;
  const int16_t* columns;
  const float* weights;
  Routing routing;
  int64_t width;
  int choice;

  struct Shared {
    Finder finder;
    Piece pieces[kHeldPieces];
    int tokens[kTokens];     // -1: not of this launch
    float factors[kTokens];  // scale not included
    int listed, list[owned(true)];
  };

  // A tile of a segment, and the columns of y from `column` on.
  struct Tile {
    int slot, first, count, column, end;  // of its columns
  };

  __device__ __forceinline__ static bool few(int tokens) { return !kTensor || tokens <= kFew; }
  __device__ __forceinline__ static int tile_of(int tokens) { return few(tokens) ? kFew : kTokens; }

  __device__ __forceinline__ int across(bool few) const { return static_cast<int>(ceil_div(y.cols, owned(few))); }

  __device__ __forceinline__ int items(int tokens) const {
    const int tile = tile_of(tokens);
    return (tokens + tile - 1) / tile * across(few(tokens));
  }

  __device__ __forceinline__ void add(float added, int64_t row, int column) const {
    T* at = y.data + row * y.stride + column;
    note_load(y.data, sizeof(T)), note_store(y.data, sizeof(T));
    *at = T(static_cast<float>(*at) + added);
  }

  // What S or x has for rank i of a piece.
  __device__ __forceinline__ float coefficient(const Piece& piece, int position, int token, int i) const {
    if (piece.kind == kColumns)
      return static_cast<float>(get(x.data, token * x.stride + piece.x_first + get(offsets, piece.left + i)));
    return get(s, position * width + piece.s_first + i);
  }

  // A warp has 64 columns; its quarters have every 4th rank each and, after the sums have changed places, a token each.
  __device__ __forceinline__ void add_few(const Tile& tile, const Piece& piece, const Shared& shared) const {
    const int lane = threadIdx.x % 32, quarter = lane / 8, column = tile.column + threadIdx.x / 32 * 64 + lane % 8 * kUnit;
    const int at = column - piece.y_first, own = quarter < tile.count ? shared.tokens[quarter] : -1;
    const bool aligned = (piece.y_first | piece.y_width) % kUnit == 0, whole = aligned && y.vectors;
    float sum[kFew][kUnit] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < piece.count; chunk += kChunk) {
      const W* row[kAtOnce];
      bool vectors = aligned;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int rank = chunk + quarter + i * kFew;
        row[i] = rank < piece.count ? store + get(offsets, piece.right + rank) : nullptr;
        vectors = vectors && on_vector(row[i]);
      }
      Unit<W> rows[kAtOnce];
      if (__all_sync(kAllLanes, vectors)) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) rows[i] = load_eight<true, true>(store, row[i], at, row[i] ? piece.y_width : 0);
      } else {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) rows[i] = load_eight<false, true>(store, row[i], at, row[i] ? piece.y_width : 0);
      }
      float held[kHeldFactors];
#pragma unroll
      for (int h = 0; h < kHeldFactors; ++h) {
        const int rank = chunk + lane % kChunk, t = lane / kChunk + h * (32 / kChunk);
        const bool there = rank < piece.count && t < tile.count && shared.tokens[t] >= 0;
        held[h] = there ? coefficient(piece, tile.first + t, shared.tokens[t], rank) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int t = 0; t < kFew; ++t) {
          if (t >= tile.count) break;
          const int from = t % (32 / kChunk) * kChunk + quarter + i * kFew;
          const float factor = __shfl_sync(kAllLanes, held[t / (32 / kChunk)], from);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) sum[t][j] = fmaf(factor, static_cast<float>(rows[i].v[j]), sum[t][j]);
        }
    }
    Unit<T> old{};
    if (whole && own >= 0 && at >= 0 && at < piece.y_width) old = load_unit<false, T>(y, own, column);
    float total[kUnit];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      float pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float kept = quarter < 2 ? sum[i][j] : sum[2 + i][j], given = quarter < 2 ? sum[2 + i][j] : sum[i][j];
        pair[i] = kept + __shfl_xor_sync(kAllLanes, given, 16);
      }
      total[j] = (quarter % 2 ? pair[1] : pair[0]) + __shfl_xor_sync(kAllLanes, quarter % 2 ? pair[0] : pair[1], 8);
    }
    if (own < 0) return;
    const float factor = piece.scale * shared.factors[quarter];
    if (whole) {
      if (at < 0 || at >= piece.y_width) return;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) old.v[j] = T(fmaf(factor, total[j], static_cast<float>(old.v[j])));
      store_unit(y, own, column, old);
    } else {
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        if (at + j >= 0 && at + j < piece.y_width) add(factor * total[j], own, column + j);
    }
  }

  __device__ __forceinline__ void add_tile(const Tile& tile, const Piece& piece, Shared& shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, half = warp % 2 * 16;
    if (half >= tile.count) return;  // all of the warp
    const int strip = tile.column + warp / 2 * 64, at = strip + g * kUnit - piece.y_first;
    int tokens[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = half + g + 8 * h;
      tokens[h] = t < tile.count ? shared.tokens[t] : -1;
    }
    float sum[kUnit][4] = {};
    for (int rank = 0; rank < piece.count; rank += 16) {
      bool vectors = (piece.y_first | piece.y_width) % kUnit == 0;
      const W* row[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = rank + strip_row(i);
        row[i] = r < piece.count ? store + get(offsets, piece.right + r) : nullptr;
        vectors = vectors && on_vector(row[i]);
      }
      Unit<W> rows[4];
      if (__all_sync(kAllLanes, vectors)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = load_eight<true, false>(store, row[i], at, row[i] ? piece.y_width : 0);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = load_eight<false, false>(store, row[i], at, row[i] ? piece.y_width : 0);
      }
      float of[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          of[h][i] = row[i] && tokens[h] >= 0
                         ? coefficient(piece, tile.first + half + g + 8 * h, tokens[h], rank + strip_row(i))
                         : 0.0f;
      uint32_t a[kFactorTiles<kParts>][4];
      factor_fragment<T>(a, of[0], of[1]);
      add_strip<T, kFactorTiles<kParts>, Expand::kTiles>(sum, a, rows);
    }
    const bool whole = y.vectors && (piece.y_first | piece.y_width) % kUnit == 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (tokens[h] < 0) continue;
      const float factor = piece.scale * shared.factors[half + g + 8 * h];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = strip + lane % 4 * 16 + i * kUnit, from = column - piece.y_first;
        if (whole && from >= 0 && from < piece.y_width) {
          Unit<T> unit = load_unit<false, T>(y, tokens[h], column);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) unit.v[j] = T(fmaf(factor, sum[j][2 * h + i], static_cast<float>(unit.v[j])));
          store_unit(y, tokens[h], column, unit);
        } else if (!whole) {
#pragma unroll
          for (int j = 0; j < kUnit; ++j)
            if (from + j >= 0 && from + j < piece.y_width) add(factor * sum[j][2 * h + i], tokens[h], column + j);
        }
      }
    }
  }

  // Lists those i < count for which reaches(i), in any order; there are no more than columns of the tile.
  template <class Reaches>
  __device__ __forceinline__ int list(Shared& shared, int count, Reaches&& reaches) const {
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads)
      if (reaches(i)) shared.list[atomicAdd(&shared.listed, 1)] = i;
    __syncthreads();
    return shared.listed;
  }

  __device__ __forceinline__ void add_rows(const Tile& tile, const Piece& piece, Shared& shared) const {
    const int listed = list(shared, piece.count, [&](int i) {
      const int64_t column = piece.y_first + get(offsets, piece.right + i);
      return column >= tile.column && column < tile.end;
    });
    for (int e = threadIdx.x; e < listed * tile.count; e += kThreads) {
      const int t = e / listed, i = shared.list[e % listed], token = shared.tokens[t];
      if (token < 0) continue;
      const float value = get(s, (tile.first + t) * width + piece.s_first + i);
      add(piece.scale * shared.factors[t] * value, token, piece.y_first + static_cast<int>(get(offsets, piece.right + i)));
    }
  }

  // A warp has a row of a block of entries, a lane an entry, for up to kEntryTokens tokens.
  __device__ __forceinline__ void add_entries(const Tile& tile, const Piece& piece, Shared& shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int low = tile.column - piece.y_first, high = tile.end - piece.y_first;
    const int listed = list(shared, piece.count, [&](int b) {
      const int64_t first = get(offsets, piece.left + 4 * b), rows = get(offsets, piece.left + 4 * b + 1);
      return rows > 0 && first < high && first + rows > low;
    });
    for (int b = 0; b < listed; ++b) {
      const int64_t* block = offsets + piece.left + 4 * shared.list[b];
      const int first = static_cast<int>(get(block, 0)), rows = static_cast<int>(get(block, 1));
      const W* values = store + get(block, 2);
      const auto* starts = reinterpret_cast<const uint16_t*>(columns) + get(block, 3);
      const uint16_t* of = starts + rows + 1;
      const int end = smaller(first + rows, high), from = first > low ? first : low;
      for (int row = from + warp; row < end; row += kWarps) {
        const int begin = get(starts, row - first), stop = get(starts, row - first + 1);
        if (begin == stop) continue;
        for (int t0 = 0; t0 < tile.count; t0 += kEntryTokens) {
          float sum[kEntryTokens] = {};
#pragma unroll 2
          for (int e = begin + lane; e < stop; e += 32) {
            const int64_t column = piece.x_first + int(get(of, e));
            const float value = static_cast<float>(get(values, e));
#pragma unroll
            for (int t = 0; t < kEntryTokens; ++t)
              if (t0 + t < tile.count && shared.tokens[t0 + t] >= 0)
                sum[t] = fmaf(value, static_cast<float>(get(x.data, shared.tokens[t0 + t] * x.stride + column)), sum[t]);
          }
#pragma unroll
          for (int t = 0; t < kEntryTokens; ++t) {
            if (t0 + t >= tile.count) break;
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) sum[t] += __shfl_xor_sync(kAllLanes, sum[t], lanes);
            const int token = shared.tokens[t0 + t];
            if (lane == t && token >= 0) add(piece.scale * shared.factors[t0 + t] * sum[t], token, piece.y_first + row);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void work(const Item& item, Shared& shared) const {
    const int tokens = item.end - item.begin, size = tile_of(tokens), columns = owned(few(tokens));
    const int first = item.begin + item.index / across(few(tokens)) * size;
    const int column = item.index % across(few(tokens)) * columns;
    const Tile tile{item.slot, first, smaller(item.end - first, size), column, column + columns};
    if (const int t = threadIdx.x; t < tile.count) {
      const int assignment = get(routing.assignments, tile.first + t), token = routing.token(assignment);
      const bool own = routing.k == 1 || assignment - token * routing.k == choice;
      shared.tokens[t] = own ? token : -1;
      shared.factors[t] = own && weights ? get(weights, assignment) : 1.0f;
    }
    for (int from = 0; from < routing.per_slot; from += kHeldPieces) {
      const int held = smaller(routing.per_slot - from, kHeldPieces);
      // Not by the threads of the tokens, so that both are on their way together.
      if (const int p = int(threadIdx.x) - (kThreads - kHeldPieces); p >= 0 && p < held)
        shared.pieces[p] = routing.piece(tile.slot, from + p);
      __syncthreads();
      for (int p = 0; p < held; ++p) {
        const Piece& piece = shared.pieces[p];
        const bool reaches = piece.y_first < tile.end && piece.y_first + piece.y_width > tile.column;
        if (piece.kind == kMissing || piece.count == 0 || !reaches) continue;
        add_piece(tile, piece, few(tokens), shared);
        __syncthreads();
      }
      if (from + kHeldPieces < routing.per_slot) __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void add_piece(const Tile& tile, const Piece& piece, bool few, Shared& shared) const {
    if (piece.kind == kRowKind) return add_rows(tile, piece, shared);
    if (piece.kind == kEntries) return add_entries(tile, piece, shared);
    if constexpr (kTensor) {
      if (!few) return add_tile(tile, piece, shared);
    }
    add_few(tile, piece, shared);
  }
};

// Two blocks a multiprocessor where that does not spill: of 8.0 and 9.0 it does (ptxas 13.0: 88 and 8 bytes).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr int kTwoBlocks = 1;
#else
constexpr int kTwoBlocks = 2;
#endif

template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, kParts == 3 ? 1 : kTwoBlocks) grouped_expand_kernel(Expand<T, kParts> op) {
  SharedMemory memory;
  auto& shared = *memory.take<typename Expand<T, kParts>::Shared>(1);
  each_item(
      op.routing, shared.finder, [&](int, int tokens) { return op.items(tokens); },
      [&](const Item& item, int) { op.work(item, shared); });
}

void grouped_expand_(const Tensor& y, const Tensor& x, const Tensor& s, const Tensor& store, const Tensor& offsets,
                     const Tensor& columns, const Tensor& pieces, const Tensor& segments, const Tensor& assignments,
                     std::optional<Tensor> weights, int64_t k) {
  const char* op = "grouped_expand_";
  check_matrix(op, "y", y), check_matrix(op, "x", x), check_matrix(op, "s", s);
  const int64_t tokens = y.size(0), positions = assignments.numel();
  check_rows(op, "y", y, kWhere, kActivations, {tokens, y.size(1)});
  check_rows(op, "x", x, kWhere, {y.scalar_type()}, {tokens, x.size(1)});
  check(op, "s", s, kWhere, {ScalarType::Float}, {positions, s.size(1)});
  check_store(op, "store", store, y, offsets);
  check(op, "columns", columns, kWhere, {ScalarType::Short}, {columns.numel()});
  const Routing routing = checked_routing(op, y, pieces, segments, assignments, k);
  check_same_device(op, y, {&x, &s, &columns});
  if (weights) {
    check(op, "weights", *weights, kWhere, {ScalarType::Float}, {tokens, k});
    check_same_device(op, y, {&*weights});
  }
  if (y.numel() == 0 || positions == 0 || routing.segment_count == 0 || routing.per_slot == 0) return;
  DeviceScope device(y);
  dispatch_arithmetic(y.scalar_type(), store.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using K = Expand<typename P::T, P::kParts>;
    K kernel_op = {{},
                   output<typename P::T>(y),
                   input<typename P::T>(x),
                   static_cast<const float*>(s.const_data_ptr()),
                   static_cast<const typename K::W*>(store.const_data_ptr()),
                   static_cast<const int64_t*>(offsets.const_data_ptr()),
                   static_cast<const int16_t*>(columns.const_data_ptr()),
                   weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr,
                   routing,
                   s.size(1),
                   0};
    const int64_t items = most_tiles(positions, routing.segment_count, kFew, 1) * ceil_div(y.size(1), owned(false));
    for (int64_t choice = 0; choice < k; ++choice) {
      kernel_op.choice = static_cast<int>(choice);
      launch(grouped_expand_kernel<typename P::T, P::kParts>, grouped_grid(items, 2), dim3(kThreads),
             SharedMemory::bytes<typename K::Shared>(1), device.stream, kernel_op);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("grouped_expand_", TORCH_BOX(&grouped_expand_));
}

}  // namespace fastft
