// What the kernels of the grouped family share (fastft/ops/grouped.py): pieces, the work that segments give to blocks, rows
// anywhere in a store.
//
// Grids follow from capacities alone, so that a captured launch serves every routing: each block finds the work there is by
// a sum over the segments, and takes of it every gridDim-th item. One that finds none has read the segments and is gone.
#pragma once

#include "operands.cuh"

namespace fastft {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMissing = 0, kLowRank = 1, kColumns = 2, kRowKind = 3, kEntries = 4;  // NONE ... ENTRIES
constexpr int kFields = 10;
constexpr int kFew = 4;      // tokens of a segment that vector units are for
constexpr int kTokens = 32;  // of a tile for tensor cores

struct Piece {
  int kind, count;
  int64_t left, right;
  int x_first, x_width, y_first, y_width, s_first;
  float scale;

  __device__ __forceinline__ bool has_rank() const { return kind == kLowRank || kind == kRowKind; }
};

struct Routing {
  const int64_t* pieces;
  const int32_t* segments;
  const int32_t* assignments;
  int per_slot, segment_count, k;

  __device__ __forceinline__ Piece piece(int slot, int p) const {
    const int64_t at = (int64_t(slot) * per_slot + p) * kFields;
    return {static_cast<int>(get(pieces, at)),
            static_cast<int>(get(pieces, at + 1)),
            get(pieces, at + 2),
            get(pieces, at + 3),
            static_cast<int>(get(pieces, at + 4)),
            static_cast<int>(get(pieces, at + 5)),
            static_cast<int>(get(pieces, at + 6)),
            static_cast<int>(get(pieces, at + 7)),
            static_cast<int>(get(pieces, at + 8)),
            as_float(static_cast<uint32_t>(get(pieces, at + 9)))};
  }

  // Ranks of a piece in S; 0 where it has none there.
  __device__ __forceinline__ int ranks(int slot, int p) const {
    const int64_t at = (int64_t(slot) * per_slot + p) * kFields;
    const int64_t kind = get(pieces, at), count = get(pieces, at + 1);
    return kind == kLowRank || kind == kRowKind ? static_cast<int>(count) : 0;
  }

  __device__ __forceinline__ int token(int assignment) const { return k == 1 ? assignment : assignment / k; }

 private:
  __device__ __forceinline__ static float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

// A segment, and the number of one of its items.
struct alignas(16) Item {
  int slot, begin, end, index;
};

struct Finder {
  Item segments[kThreads];  // index: of the items of this and those before
  int totals[kWarps];
  Item item;
};

// Keeps every thread's segment, its items with those of the threads before; returns all there are.
__device__ __forceinline__ int sum_up(Item segment, Finder& finder) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int before = __shfl_up_sync(kAllLanes, segment.index, lanes);
    if (lane >= lanes) segment.index += before;
  }
  if (lane == 31) finder.totals[warp] = segment.index;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) segment.index += total;
    total += finder.totals[w];
  }
  finder.segments[threadIdx.x] = segment;
  __syncthreads();
  return total;
}

// Calls work(item, all) for this block's share of the items, of which a segment has count(slot, tokens). All threads call
// it. What a thread knows of its segment waits in shared memory, since `work` needs the registers.
template <class Count, class Work>
__device__ __forceinline__ void each_item(const Routing& routing, Finder& finder, Count&& count, Work&& work) {
  int offset = blockIdx.x;  // of this block's next item in those from the present segments on
  for (int chunk = 0; chunk < routing.segment_count; chunk += kThreads) {
    Item segment{-1, 0, 0, 0};
    if (const int at = chunk + threadIdx.x; at < routing.segment_count) {
      segment = {get(routing.segments, 3 * at), get(routing.segments, 3 * at + 1), get(routing.segments, 3 * at + 2), 0};
      if (segment.slot >= 0 && segment.end > segment.begin) segment.index = count(segment.slot, segment.end - segment.begin);
    }
    const int total = sum_up(segment, finder);
    for (; offset < total; offset += gridDim.x) {
      const int before = threadIdx.x > 0 ? finder.segments[threadIdx.x - 1].index : 0;
      if (offset >= before && offset < finder.segments[threadIdx.x].index) {
        finder.item = finder.segments[threadIdx.x];
        finder.item.index = offset - before;
      }
      __syncthreads();
      const Item item = finder.item;
      work(item, total);
      __syncthreads();
    }
    offset -= total;
    if (chunk + kThreads < routing.segment_count) __syncthreads();
  }
}

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

template <class T>
__device__ __forceinline__ bool on_vector(const T* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// Eight elements of a row of `size` elements from element `at` on, which may lie before its start; those outside are 0 and
// not read. kVectors: `row` starts on a 16-byte boundary, `at` and `size` are multiples of 8. kOnce: see load_unit.
template <bool kVectors, bool kOnce, class T>
__device__ __forceinline__ Unit<T> load_eight(const T* array, const T* row, int at, int size) {
  Unit<T> unit{};
  if constexpr (kVectors) {
    if (at < 0 || at >= size) return unit;
    note_load(array, sizeof(unit));
    const uint4* source = reinterpret_cast<const uint4*>(row + at);
#pragma unroll
    for (int i = 0; i < int(sizeof(unit) / 16); ++i)
      reinterpret_cast<uint4*>(&unit)[i] = kOnce ? ptx::load_once(source + i) : ptx::load(source + i);
  } else {
    // Pushed in one by one: as eight loads with their eight conditions they took the registers that sums need.
#pragma unroll 1
    for (int j = 0; j < kUnit; ++j) {
#pragma unroll
      for (int i = 1; i < kUnit; ++i) unit.v[i - 1] = unit.v[i];
      unit.v[kUnit - 1] = T(0.0f);
      if (at + j < 0 || at + j >= size) continue;
      note_load(array, sizeof(T));
      unit.v[kUnit - 1] = row[at + j];
    }
  }
  return unit;
}

// -- Fragments of mma.cuh straight from 16-byte loads. Both operands may take the inner axis in any order, if it is the same
// one, and the outer axes too.

template <class E>
__device__ __forceinline__ uint32_t pack(E low, E high) {
  return uint32_t(low.x) | uint32_t(high.x) << 16;
}

// A float32 in two parts, of 16 bits of its 24 for bfloat16 and 22 for float16; in one or three as in mma.cuh.
template <int kTiles, class E>
__device__ __forceinline__ void parts_of(float value, E (&parts)[kTiles]) {
  if constexpr (kTiles == 2) {
    parts[0] = E(value);
    const float first = static_cast<float>(parts[0]);
    parts[1] = E(fabsf(first) == INFINITY ? 0.0f : value - first);
  } else {
    split(value, parts);
  }
}

// Two neighbours of a unit, in parts.
template <int kTiles, class E, class W>
__device__ __forceinline__ void pair_of(uint32_t (&parts)[kTiles], W low, W high) {
  if constexpr (std::is_same_v<W, E>) {
    static_assert(kTiles == 1);
    parts[0] = pack(low, high);
  } else {
    E first[kTiles], second[kTiles];
    parts_of(static_cast<float>(low), first), parts_of(static_cast<float>(high), second);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) parts[i] = pack(first[i], second[i]);
  }
}

// sum += a b for a strip of 64 columns and one step of 16 along the inner axis; a lane brings units of the rows 2t, 2t + 1,
// 2t + 8, 2t + 9 of b, its columns 8g to 8g + 7, which are column g of the 8 products. So it has of rows g and g + 8 of the
// result the columns 16t + j (sum[j][0], sum[j][2]) and 16t + 8 + j (sum[j][1], sum[j][3]).
template <class T, int kLeft, int kRight, class W>
__device__ __forceinline__ void add_strip(float (&sum)[kUnit][4], const uint32_t (&a)[kLeft][4], const Unit<W> (&rows)[4]) {
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    uint32_t low[kRight], high[kRight];
    pair_of<kRight, T>(low, rows[0].v[j], rows[1].v[j]);
    pair_of<kRight, T>(high, rows[2].v[j], rows[3].v[j]);
    // Of products of parts all but those below 2^-21 of the whole, the smallest first; added up in float32 (mma.cuh).
    float c[4] = {};
#pragma unroll
    for (int order = 2; order >= 0; --order)
#pragma unroll
      for (int i = 0; i <= order; ++i)
        if (i < kLeft && order - i < kRight) mma<T>(c, a[i], low[order - i], high[order - i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[j][i] += c[i];
  }
}

// The inner index of a lane's i-th row or factor.
__device__ __forceinline__ int strip_row(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

// Parts of the float32 factors of a strip. One would be the rounding that plain PyTorch makes, but the error of that is as
// large as the one of rounding the result.
template <int kParts>
constexpr int kFactorTiles = kParts == 1 ? 2 : 3;

// A factor's fragment from its elements [outer g, inner strip_row(i)] (first) and [outer g + 8, ...] (second).
template <class E, int kTiles>
__device__ __forceinline__ void factor_fragment(uint32_t (&a)[kTiles][4], const float (&first)[4],
                                                const float (&second)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t upper[kTiles], lower[kTiles];
    pair_of<kTiles, E>(upper, first[2 * half], first[2 * half + 1]);
    pair_of<kTiles, E>(lower, second[2 * half], second[2 * half + 1]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) a[i][2 * half] = upper[i], a[i][2 * half + 1] = lower[i];
  }
}

// -- Entry points.

inline Routing checked_routing(const char* op, const Tensor& like, const Tensor& pieces, const Tensor& segments,
                               const Tensor& assignments, int64_t k) {
  STD_TORCH_CHECK(pieces.dim() == 3, op, ": pieces has shape ", shape_text(pieces), ", must be [slots, pieces, 10]");
  check(op, "pieces", pieces, kWhere, {ScalarType::Long}, {pieces.size(0), pieces.size(1), kFields});
  check(op, "segments", segments, kWhere, {ScalarType::Int}, {segments.dim() ? segments.size(0) : 0, 3});
  check(op, "assignments", assignments, kWhere, {ScalarType::Int}, {assignments.numel()});
  STD_TORCH_CHECK(k >= 1, op, ": k is ", k, ", a token has at least one assignment");
  check_same_device(op, like, {&pieces, &segments, &assignments});
  return {static_cast<const int64_t*>(pieces.const_data_ptr()),
          static_cast<const int32_t*>(segments.const_data_ptr()),
          static_cast<const int32_t*>(assignments.const_data_ptr()),
          static_cast<int>(pieces.size(1)),
          static_cast<int>(segments.size(0)),
          static_cast<int>(k)};
}

inline void check_store(const char* op, const char* name, const Tensor& store, const Tensor& like, const Tensor& offsets) {
  check(op, name, store, kWhere, {like.scalar_type(), ScalarType::Float}, {store.numel()});
  check(op, "offsets", offsets, kWhere, {ScalarType::Long}, {offsets.numel()});
  check_same_device(op, like, {&store, &offsets});
}

// The most tiles of `size` tokens that segments with at least `least` tokens each have.
inline int64_t most_tiles(int64_t positions, int64_t segments, int64_t size, int64_t least) {
  return std::min(positions / least, positions / size + std::min(segments, positions));
}

// Blocks for at most `items` items, `resident` to a multiprocessor; more would only look at the segments. On the host fewer,
// which take several items each.
inline dim3 grouped_grid(int64_t items, int resident) {
  const int64_t most = kWhere == Where::cuda ? resident * kMultiprocessors : 10;
  return dim3(unsigned(std::clamp<int64_t>(items, 1, most)));
}

}  // namespace fastft
