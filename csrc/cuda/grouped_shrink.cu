// S of the grouped family (fastft/ops/grouped.py). Few tokens: a block has one row of an adapter, so that 16 ranks spread
// over 16 multiprocessors and nothing but the block itself sums up. More: a tile of 32 tokens and up to 32 ranks on tensor
// cores, of which the warps, and where there are few tiles the blocks, have parts of the inner axis.
#include "grouped.cuh"

namespace fastft {
namespace {

constexpr int kSumPitch = kTokens + 1;
constexpr int64_t kAnnounced = 8 << 20;                 // bytes, of 50 MiB of L2 in H100 and H200
constexpr int kStep = 32, kBlockStep = kStep * kWarps;  // columns of a warp and a block at a time

struct RankSlot {
  int64_t rows;  // index of its first row's offset
  int x_first, x_width, s_first, count;
};

template <class T, int kSlots, int kParts>
struct Shrink : Arithmetic<T, kParts> {
  using W = typename Shrink::Adapter;
  static constexpr bool kTensor = kParts > 0;

  Matrix<const T> x;
  const W* store;
  const int64_t* offsets;
  Routing routing;
  float *s, *partial;  // [positions, width] and, where parts > 1, [parts, positions, width] for tiles
  int64_t positions, width;
  int parts, part_columns;

  struct Shared {
    Finder finder;
    float few[kWarps][kFew];
    RankSlot slots[kSlots];
    float sums[kTensor ? kWarps * kWarpRanks * kSumPitch : 1];
  };

  __device__ __forceinline__ static bool few(int tokens) { return !kTensor || tokens <= kFew; }

  __device__ __forceinline__ int items(int slot, int tokens) const {
    int ranks = 0, slots = 0;
    for (int p = 0; p < routing.per_slot; ++p) {
      const int count = routing.ranks(slot, p);
      ranks += count, slots += (count + kWarpRanks - 1) / kWarpRanks;
    }
    if (few(tokens)) return (tokens + kFew - 1) / kFew * ranks;
    return (tokens + kTokens - 1) / kTokens * ((slots + kSlots - 1) / kSlots) * parts;
  }

  __device__ __forceinline__ int token(int position) const { return routing.token(get(routing.assignments, position)); }

  // A token's row of x from column `first` on.
  __device__ __forceinline__ const T* row(int token, int first) const { return x.data + token * x.stride + first; }

  template <bool kVectors>
  __device__ __forceinline__ void dot(float (&sum)[kFew], const W* weights, const T* const (&tokens)[kFew], int count,
                                      int columns) const {
#pragma unroll(kVectors ? 2 : 1)
    for (int c = threadIdx.x * kUnit; c < columns; c += kThreads * kUnit) {
      const Unit<W> w = load_eight<kVectors, true>(store, weights, c, columns);
      Unit<T> u[kFew];
#pragma unroll
      for (int t = 0; t < kFew; ++t) u[t] = load_eight<kVectors, false>(x.data, tokens[t], c, t < count ? columns : 0);
#pragma unroll
      for (int t = 0; t < kFew; ++t)
#pragma unroll
        for (int j = 0; j < kUnit; ++j) sum[t] = fmaf(static_cast<float>(w.v[j]), static_cast<float>(u[t].v[j]), sum[t]);
    }
  }

  // What grouped_expand_ reads next of a rank comes into L2 meanwhile, unless it is too much to stay there.
  __device__ __forceinline__ void announce(const Piece& piece, int rank, int64_t ranks) const {
    constexpr int kLine = 128;
    if (piece.kind != kLowRank || ranks * piece.y_width * int64_t(sizeof(W)) > kAnnounced) return;
    const char* row = reinterpret_cast<const char*>(store + get(offsets, piece.right + rank));
    for (int64_t at = int64_t(threadIdx.x) * kLine; at < piece.y_width * int64_t(sizeof(W)); at += kThreads * kLine)
      ptx::prefetch(row + at);
  }

  // One rank of up to kFew tokens.
  __device__ __forceinline__ void few_tokens(const Item& item, int all, Shared& shared) const {
    const int tiles = (item.end - item.begin + kFew - 1) / kFew;
    int rank = item.index / tiles, p = 0;
    for (int count; rank >= (count = routing.ranks(item.slot, p)); ++p) rank -= count;
    const Piece piece = routing.piece(item.slot, p);
    const int first = item.begin + item.index % tiles * kFew, count = smaller(item.end - first, kFew);
    const W* weights = store + get(offsets, piece.left + rank);
    const T* tokens[kFew];
    bool vectors = piece.x_width % kUnit == 0 && on_vector(weights);
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      tokens[t] = t < count ? row(token(first + t), piece.x_first) : x.data;
      vectors = vectors && (t >= count || on_vector(tokens[t]));
    }
    if (item.index % tiles == 0) announce(piece, rank, all);
    float sum[kFew] = {};
    if (vectors)
      dot<true>(sum, weights, tokens, count, piece.x_width);
    else
      dot<false>(sum, weights, tokens, count, piece.x_width);
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum[t] += __shfl_xor_sync(kAllLanes, sum[t], lanes);
      if (threadIdx.x % 32 == 0) shared.few[threadIdx.x / 32][t] = sum[t];
    }
    __syncthreads();
    if (const int t = threadIdx.x; t < count) {
      float total = shared.few[0][t];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) total += shared.few[w][t];
      put(s, (first + t) * width + piece.s_first + rank, total);
    }
  }

  __device__ __forceinline__ RankSlot slot_at(int slot, int index) const {
    for (int p = 0; p < routing.per_slot; ++p) {
      const int count = routing.ranks(slot, p), slots = (count + kWarpRanks - 1) / kWarpRanks;
      if (index < slots) {
        const Piece piece = routing.piece(slot, p);
        const int rank = index * kWarpRanks;
        return {piece.left + rank, piece.x_first, piece.x_width, piece.s_first + rank, smaller(count - rank, kWarpRanks)};
      }
      index -= slots;
    }
    return {0, 0, 0, 0, 0};
  }

  // sum[slot][8 tokens] of ranks g and g + 8 and tokens 2t and 2t + 1, over the columns of this warp from `begin` to `end`.
  // A lane's 8 columns are the inner indices of two products, for adapter and tokens alike.
  __device__ __forceinline__ void products(float (&sum)[kSlots][kTokens / 8][4], const W* const (&rows)[kSlots][2],
                                           const int (&tokens)[kTokens / 8], int x_first, int begin, int end, int columns,
                                           int count) const {
    constexpr int kTiles = Shrink::kTiles;
#pragma unroll 1
    for (int step = begin + threadIdx.x / 32 * kStep; step < end; step += kBlockStep) {
      const int c = step + threadIdx.x % 4 * kUnit;
      Unit<T> u[kTokens / 8];
#pragma unroll
      for (int f = 0; f < kTokens / 8; ++f)
        u[f] = load_eight<true, false>(x.data, row(tokens[f], x_first), c, tokens[f] >= 0 ? columns : 0);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        Unit<W> w[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) w[j] = load_eight<true, true>(store, rows[i][j], c, rows[i][j] ? columns : 0);
        uint32_t a[2][kTiles][4];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int at = 4 * half + j / 2 * 2;
            uint32_t parts[kTiles];
            pair_of<kTiles, T>(parts, w[j % 2].v[at], w[j % 2].v[at + 1]);
#pragma unroll
            for (int k = 0; k < kTiles; ++k) a[half][k][j] = parts[k];
          }
#pragma unroll
        for (int f = 0; f < kTokens / 8; ++f) {
          if (f * 8 >= count) break;
          float c4[4] = {};
#pragma unroll
          for (int k = kTiles - 1; k >= 0; --k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              mma<T>(c4, a[half][k], pack(u[f].v[4 * half], u[f].v[4 * half + 1]),
                     pack(u[f].v[4 * half + 2], u[f].v[4 * half + 3]));
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[i][f][k] += c4[k];
        }
      }
    }
  }

  // The same of rows that do not lie on 16-byte boundaries: a warp sums up a rank of a token at a time.
  __device__ __forceinline__ void odd_rows(const RankSlot& slot, int first, int count, int begin, int end, int part) const {
    for (int e = threadIdx.x / 32; e < slot.count * count; e += kWarps) {
      const int rank = e % slot.count, position = first + e / slot.count;
      const W* weights = store + get(offsets, slot.rows + rank);
      const T* values = row(token(position), slot.x_first);
      float sum = 0.0f;
      for (int c = begin + int(threadIdx.x % 32); c < end; c += 32) {
        note_load(store, sizeof(W)), note_load(x.data, sizeof(T));
        sum = fmaf(static_cast<float>(weights[c]), static_cast<float>(values[c]), sum);
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (threadIdx.x % 32 == 0) put(partial, (part * positions + position) * width + slot.s_first + rank, sum);
    }
  }

  __device__ __forceinline__ void tile(const Item& item, Shared& shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const int tiles = (item.end - item.begin + kTokens - 1) / kTokens, part = item.index % parts;
    const int first = item.begin + item.index / parts % tiles * kTokens, count = smaller(item.end - first, kTokens);
    if (threadIdx.x < kSlots)
      shared.slots[threadIdx.x] = slot_at(item.slot, item.index / parts / tiles * kSlots + threadIdx.x);
    __syncthreads();
    // One pass over x for slots that see the same columns of it: nearly always all.
    for (int from = 0, to; from < kSlots && shared.slots[from].count > 0; from = to) {
      const int x_first = shared.slots[from].x_first, columns = shared.slots[from].x_width;
      for (to = from + 1; to < kSlots; ++to)
        if (shared.slots[to].count == 0 || shared.slots[to].x_first != x_first || shared.slots[to].x_width != columns) break;
      bool vectors = columns % kUnit == 0;
      const W* rows[kSlots][2];
#pragma unroll
      for (int i = 0; i < kSlots; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const bool own = i >= from && i < to && g + 8 * j < shared.slots[i].count;
          rows[i][j] = own ? store + get(offsets, shared.slots[i].rows + g + 8 * j) : nullptr;
          vectors = vectors && on_vector(rows[i][j]);
        }
      int tokens[kTokens / 8];
#pragma unroll
      for (int f = 0; f < kTokens / 8; ++f) {
        tokens[f] = 8 * f + g < count ? token(first + 8 * f + g) : -1;
        vectors = vectors && (tokens[f] < 0 || on_vector(row(tokens[f], x_first)));
      }
      const int begin = part * part_columns, end = smaller(begin + part_columns, columns);
      if (!__all_sync(kAllLanes, vectors)) {  // in all warps, whose lanes have the same rows
        for (int i = from; i < to; ++i) odd_rows(shared.slots[i], first, count, begin, end, part);
        continue;
      }
      float sum[kSlots][kTokens / 8][4] = {};
      products(sum, rows, tokens, x_first, begin, end, columns, count);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (i < from || i >= to) continue;
        __syncthreads();
#pragma unroll
        for (int f = 0; f < kTokens / 8; ++f)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            shared.sums[(warp * kWarpRanks + g + k / 2 * 8) * kSumPitch + 8 * f + lane % 4 * 2 + k % 2] = sum[i][f][k];
        __syncthreads();
        const RankSlot& slot = shared.slots[i];
        for (int e = threadIdx.x; e < kWarpRanks * count; e += kThreads) {
          const int rank = e % kWarpRanks, token = e / kWarpRanks;
          if (rank >= slot.count) continue;
          float total = shared.sums[rank * kSumPitch + token];
#pragma unroll
          for (int w = 1; w < kWarps; ++w) total += shared.sums[(w * kWarpRanks + rank) * kSumPitch + token];
          put(partial, (part * positions + first + token) * width + slot.s_first + rank, total);
        }
      }
    }
  }
};

template <class T, int kSlots, int kParts>
__global__ void __launch_bounds__(kThreads, 2) grouped_shrink_kernel(Shrink<T, kSlots, kParts> op) {
  using P = Shrink<T, kSlots, kParts>;
  SharedMemory memory;
  auto& shared = *memory.take<typename P::Shared>(1);
  each_item(
      op.routing, shared.finder, [&](int slot, int tokens) { return op.items(slot, tokens); },
      [&](const Item& item, int all) {
        if constexpr (P::kTensor) {
          if (!P::few(item.end - item.begin)) return op.tile(item, shared);
        }
        op.few_tokens(item, all, shared);
      });
}

// S of tiles whose inner axis several blocks had: the parts in ascending order. A block has a position.
template <class S>
__global__ void __launch_bounds__(kThreads)
    grouped_total_kernel(const int32_t* segments, int segment_count, const S* partial, int parts, int64_t positions,
                         int64_t width, S* s) {
  SharedMemory memory;
  int& in_tile = *memory.take<int>(1);
  if (threadIdx.x == 0) in_tile = 0;
  __syncthreads();
  const int position = blockIdx.x;
  for (int i = threadIdx.x; i < segment_count; i += kThreads) {
    const int begin = get(segments, 3 * i + 1), end = get(segments, 3 * i + 2);
    if (get(segments, 3 * i) >= 0 && begin <= position && position < end && end - begin > kFew) in_tile = 1;
  }
  __syncthreads();
  if (!in_tile) return;
  for (int64_t r = threadIdx.x; r < width; r += kThreads) {
    S sum = 0;
#pragma unroll 8  // loads in flight
    for (int part = 0; part < parts; ++part) sum += get(partial, (part * positions + position) * width + r);
    put(s, position * width + r, sum);
  }
}

template <int kCount>
struct SlotCount {
  static constexpr int value = kCount;
};

Tensor grouped_shrink(const Tensor& x, const Tensor& store, const Tensor& offsets, const Tensor& pieces,
                      const Tensor& segments, const Tensor& assignments, int64_t k, int64_t width) {
  const char* op = "grouped_shrink";
  check_matrix(op, "x", x);
  check_rows(op, "x", x, kWhere, kActivations, {x.size(0), x.size(1)});
  check_store(op, "store", store, x, offsets);
  const Routing routing = checked_routing(op, x, pieces, segments, assignments, k);
  STD_TORCH_CHECK(width >= 0, op, ": width is ", width, ", must not be negative");
  const int64_t positions = assignments.numel(), columns = x.size(1);
  DeviceScope device(x);
  Tensor s = empty_on(x, {positions, width}, ScalarType::Float);
  if (s.numel() == 0 || routing.segment_count == 0) return s;
  dispatch_arithmetic(x.scalar_type(), store.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    auto run = [&](auto slots) {
      using K = Shrink<typename P::T, decltype(slots)::value, P::kParts>;
      constexpr int kResident = 2;
      const int64_t few = most_tiles(positions, routing.segment_count, kFew, 1) * width;
      const int64_t tiles = K::kTensor ? most_tiles(positions, routing.segment_count, kTokens, kFew + 1) *
                                             ceil_div(ceil_div(width, kWarpRanks), decltype(slots)::value)
                                       : 0;
      const Split parts = split(std::max<int64_t>(ceil_div(columns, kBlockStep), 1), tiles, kResident, 2);
      const int count = tiles > 0 ? static_cast<int>(parts.count) : 1;
      Tensor partial = count > 1 ? empty_on(x, {count, positions, width}, ScalarType::Float) : s;
      const K kernel_op = {{},
                           input<typename P::T>(x),
                           static_cast<const typename K::W*>(store.const_data_ptr()),
                           static_cast<const int64_t*>(offsets.const_data_ptr()),
                           routing,
                           floats(s),
                           floats(partial),
                           positions,
                           width,
                           count,
                           tiles > 0 ? static_cast<int>(parts.size) * kBlockStep : 0};
      launch(grouped_shrink_kernel<typename P::T, decltype(slots)::value, P::kParts>,
             grouped_grid(std::max(few, tiles * count), kResident), dim3(kThreads),
             SharedMemory::bytes<typename K::Shared>(1), device.stream, kernel_op);
      if (count > 1)
        launch(grouped_total_kernel<float>, dim3(unsigned(positions)), dim3(kThreads), SharedMemory::bytes<int>(1),
               device.stream, routing.segments, routing.segment_count, static_cast<const float*>(floats(partial)), count,
               positions, width, floats(s));
    };
    if constexpr (P::kParts == 1)  // with float32 adapters the sums of two slots spill
      if (width > kWarpRanks) return run(SlotCount<2>{});
    run(SlotCount<1>{});
  });
  return s;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) { m.impl("grouped_shrink", TORCH_BOX(&grouped_shrink)); }

}  // namespace fastft
