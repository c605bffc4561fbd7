// Gradients of the rows of adapters (fastft/ops/grouped.py). A block has 16 ranks of a piece and 256 columns of them; its
// warps have 64 columns and every other step of 16 tokens on tensor cores, or, in float32, two ranks.
#include "grouped.cuh"

namespace fastft {
namespace {

constexpr int kOuterColumns = 256, kStripColumns = 64, kHalves = 2;
constexpr int kWarpTokens = 16, kOuterRanks = kWarpRanks / kWarps;  // of a warp without tensor cores

template <class T, int kParts>
struct Outer : Arithmetic<T, kParts> {
  using W = typename Outer::Adapter;
  static constexpr bool kTensor = kParts > 0;

  W* grad;
  Matrix<const T> values, other;
  const float* s;
  const int64_t* offsets;
  const float* weights;
  Routing routing;
  int64_t width;

  struct Shared {
    Finder finder;
    float halves[kTensor ? kWarps / kHalves : 1][32][4 * kUnit + 1];
  };

  // 16 ranks of a piece, `count` of them there, from `rank` on.
  struct Ranks16 {
    Piece piece;
    int rank, count;
  };

  __device__ __forceinline__ int across() const { return static_cast<int>(ceil_div(values.cols, kOuterColumns)); }

  __device__ __forceinline__ int items(int slot) const {
    int slots = 0;
    for (int p = 0; p < routing.per_slot; ++p) slots += (routing.ranks(slot, p) + kWarpRanks - 1) / kWarpRanks;
    return slots * across();
  }

  // The factor of rank `r` of the 16 and the token at `position`; `assignment` is that position's.
  __device__ __forceinline__ float coefficient(const Ranks16& ranks, int position, int assignment, int r) const {
    const Piece& piece = ranks.piece;
    const float own = piece.kind == kLowRank
                          ? get(s, position * width + piece.s_first + ranks.rank + r)
                          : static_cast<float>(get(other.data, routing.token(assignment) * other.stride + piece.y_first +
                                                                   get(offsets, piece.right + ranks.rank + r)));
    return own * (weights ? piece.scale * get(weights, assignment) : piece.scale);
  }

  __device__ __forceinline__ const T* row(int assignment, int first) const {
    return values.data + routing.token(assignment) * values.stride + first;
  }

  __device__ __forceinline__ void store(const Ranks16& ranks, int r, int column, const float (&sum)[kUnit]) const {
    if (r >= ranks.count || column >= ranks.piece.x_width) return;
    W* target = grad + get(offsets, ranks.piece.left + ranks.rank + r) + column;
    Unit<W> unit;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) unit.v[j] = W(sum[j]);
    if (column + kUnit <= ranks.piece.x_width && on_vector(target)) {
      note_store(grad, sizeof(unit));
#pragma unroll
      for (int i = 0; i < int(sizeof(unit) / 16); ++i)
        reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(&unit)[i];
    } else {
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        if (column + j < ranks.piece.x_width) {
          note_store(grad, sizeof(W));
          target[j] = unit.v[j];
        }
    }
  }

  __device__ __forceinline__ void plain(const Item& item, const Ranks16& ranks, int column) const {
    const int at = column + threadIdx.x % 32 * kUnit, first = threadIdx.x / 32 * kOuterRanks;
    float sum[kOuterRanks][kUnit] = {};
#pragma unroll 2
    for (int position = item.begin; position < item.end; ++position) {
      const int assignment = get(routing.assignments, position);
      const T* from = row(assignment, ranks.piece.x_first);
      const int size = ranks.piece.x_width;
      const Unit<T> unit = size % kUnit == 0 && on_vector(from) ? load_eight<true, false>(values.data, from, at, size)
                                                                : load_eight<false, false>(values.data, from, at, size);
#pragma unroll
      for (int r = 0; r < kOuterRanks; ++r) {
        const float factor = first + r < ranks.count ? coefficient(ranks, position, assignment, first + r) : 0.0f;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) sum[r][j] = fmaf(factor, static_cast<float>(unit.v[j]), sum[r][j]);
      }
    }
#pragma unroll
    for (int r = 0; r < kOuterRanks; ++r) store(ranks, first + r, at, sum[r]);
  }

  __device__ __forceinline__ void tile(const Item& item, const Ranks16& ranks, int column, Shared& shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, half = warp % kHalves;
    const int strip = column + warp / kHalves * kStripColumns, size = ranks.piece.x_width;
    float sum[kUnit][4] = {};
#pragma unroll 1
    for (int first = item.begin + half * kWarpTokens; first < item.end; first += kHalves * kWarpTokens) {
      const T* from[4];
      float of[2][4] = {};
      bool vectors = size % kUnit == 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = first + strip_row(i);
        from[i] = nullptr;
        if (position >= item.end) continue;
        const int assignment = get(routing.assignments, position);
        from[i] = row(assignment, ranks.piece.x_first);
        vectors = vectors && on_vector(from[i]);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (g + 8 * h < ranks.count) of[h][i] = coefficient(ranks, position, assignment, g + 8 * h);
      }
      Unit<T> rows[4];
      if (__all_sync(kAllLanes, vectors)) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          rows[i] = load_eight<true, false>(values.data, from[i], strip + g * kUnit, from[i] ? size : 0);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          rows[i] = load_eight<false, false>(values.data, from[i], strip + g * kUnit, from[i] ? size : 0);
      }
      uint32_t a[kFactorTiles<kParts>][4];
      factor_fragment<T>(a, of[0], of[1]);
      add_strip<T, kFactorTiles<kParts>, 1>(sum, a, rows);
    }
    float* held = shared.halves[warp / kHalves][lane];
    if (half == 1) {
#pragma unroll
      for (int j = 0; j < 4 * kUnit; ++j) held[j] = sum[j / 4][j % 4];
    }
    __syncthreads();
    if (half == 1) return;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float unit[kUnit];
#pragma unroll
        for (int j = 0; j < kUnit; ++j) unit[j] = sum[j][2 * h + i] + held[4 * j + 2 * h + i];
        store(ranks, g + 8 * h, strip + lane % 4 * 16 + i * kUnit, unit);
      }
  }

  __device__ __forceinline__ void work(const Item& item, Shared& shared) const {
    const int column = item.index % across() * kOuterColumns;
    int slot = item.index / across(), p = 0;
    for (;; ++p) {
      const int slots = (routing.ranks(item.slot, p) + kWarpRanks - 1) / kWarpRanks;
      if (slot < slots) break;
      slot -= slots;
    }
    const Piece piece = routing.piece(item.slot, p);
    const Ranks16 ranks{piece, slot * kWarpRanks, smaller(piece.count - slot * kWarpRanks, kWarpRanks)};
    if (column >= piece.x_width) return;
    if constexpr (kTensor)
      tile(item, ranks, column, shared);
    else
      plain(item, ranks, column);
  }
};

template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 2) grouped_outer_kernel(Outer<T, kParts> op) {
  SharedMemory memory;
  auto& shared = *memory.take<typename Outer<T, kParts>::Shared>(1);
  each_item(
      op.routing, shared.finder, [&](int slot, int) { return op.items(slot); },
      [&](const Item& item, int) { op.work(item, shared); });
}

void grouped_outer_(const Tensor& grad, const Tensor& values, const Tensor& other, const Tensor& s, const Tensor& offsets,
                    const Tensor& pieces, const Tensor& segments, const Tensor& assignments, std::optional<Tensor> weights,
                    int64_t k) {
  const char* op = "grouped_outer_";
  check_matrix(op, "values", values), check_matrix(op, "other", other), check_matrix(op, "s", s);
  const int64_t tokens = values.size(0), positions = assignments.numel();
  check_rows(op, "values", values, kWhere, kActivations, {tokens, values.size(1)});
  check_rows(op, "other", other, kWhere, {values.scalar_type()}, {tokens, other.size(1)});
  check(op, "s", s, kWhere, {ScalarType::Float}, {positions, s.size(1)});
  check_store(op, "grad", grad, values, offsets);
  const Routing routing = checked_routing(op, values, pieces, segments, assignments, k);
  check_same_device(op, values, {&other, &s});
  if (weights) {
    check(op, "weights", *weights, kWhere, {ScalarType::Float}, {tokens, k});
    check_same_device(op, values, {&*weights});
  }
  if (values.numel() == 0 || positions == 0 || routing.segment_count == 0 || routing.per_slot == 0) return;
  DeviceScope device(values);
  dispatch_arithmetic(values.scalar_type(), grad.scalar_type(), [&](auto arithmetic) {
    using P = decltype(arithmetic);
    using K = Outer<typename P::T, P::kParts>;
    const K kernel_op = {{},
                         static_cast<typename K::W*>(grad.mutable_data_ptr()),
                         input<typename P::T>(values),
                         input<typename P::T>(other),
                         static_cast<const float*>(s.const_data_ptr()),
                         static_cast<const int64_t*>(offsets.const_data_ptr()),
                         weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr,
                         routing,
                         s.size(1)};
    // How many ranks there are is known to the device alone: as many blocks as run at once take turns.
    launch(grouped_outer_kernel<typename P::T, P::kParts>, grouped_grid(INT32_MAX, 2), dim3(kThreads),
           SharedMemory::bytes<typename K::Shared>(1), device.stream, kernel_op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) { m.impl("grouped_outer_", TORCH_BOX(&grouped_outer_)); }

}  // namespace fastft
