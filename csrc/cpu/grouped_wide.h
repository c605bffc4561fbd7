// Segments of many tokens in bfloat16 where the CPU has AMX, whose products are those of LoRA: a prompt's tokens are
// neighbours, so that its part of an activation is a matrix like any other. Tasks are blocks of a segment's tokens; S of a
// block stays in L1.
#pragma once

#include "grouped.h"

#include <optional>

#if defined(FASTFT_TILES)
namespace fastft {

constexpr int64_t wide_tokens = 64;  // of a segment; from here on packing its adapter pays

// Rows `at` to `at + n` of the offsets as a matrix [n, width]: where they lie if it is one, else copied into `space`. Null
// where one isn't in the store.
template <class W>
const W* matrix_of(const Batch& batch, const W* store, int64_t at, int64_t n, int64_t width, std::vector<W>& space) {
  std::vector<const W*> rows(n);
  if (!batch.row_table(store, at, n, width, 0, rows.data())) return nullptr;
  bool together = true;
  for (int64_t i = 1; i < n; ++i) together &= rows[i] == rows[0] + i * width;
  if (together) return rows[0];
  space.resize(n * width);
  for (int64_t i = 0; i < n; ++i) std::memcpy(space.data() + i * width, rows[i], width * sizeof(W));
  return space.data();
}

// One piece of a wide segment, its factors packed as what AMX multiplies.
struct WidePiece {
  using Unit = bf16x2;

  int64_t sums_width() const { return round_up(piece.count, VL); }

  // s [rows, sums_width] = x leftᵀ for tokens [t, t + rows).
  void shrink(const bf16* x, int64_t ld, int64_t t, int64_t rows, float* s, Ahead ahead) const {
    const int64_t K = piece.x_width, width = sums_width();
    const Scratch<Unit> tile(rows * block_c);
    std::fill_n(s, rows * width, 0.0f);
    for (int64_t c = 0; c < K; c += block_c) {
      const int64_t cols = std::min(block_c, K - c);
      panel_product(rows, width, product_units<Unit>(cols),
                    feature_tile<Unit>(x + piece.x_first, ld, t, rows, c, cols, Mask{}, tile.get()),
                    down->at(c / terms<Unit>, 0), AddTo{s, width}, ahead);
      ahead = Ahead();
    }
  }

  // y += scale s right for tokens [t, t + rows).
  void expand(Coefficients s, bf16* y, int64_t ld, int64_t t, int64_t rows) const {
    constexpr int64_t tall = update_t<Unit>;
    const int64_t N = piece.y_width, whole = N / VL * VL, depth = product_units<Unit>(piece.count);
    const auto to = add_to_activation<false>(y + piece.y_first, ld, Mask{});
    const Scratch<Unit> scaled(tall * rank_floats<Unit>(piece.count));
    for (int64_t i = 0; i < rows; i += tall) {
      const int64_t high = std::min(tall, rows - i);
      const auto left = rank_coefficients<Unit>(s, i, high, piece.scale(), scaled.get());
      panel_product(high, whole, depth, left, up->at(0, 0), to(t + i, 0, whole, std::false_type()), Ahead());
      if (whole < N)
        panel_product(high, VL, depth, left, up->at(0, whole), to(t + i, whole, N - whole, std::true_type()), Ahead());
    }
  }

  // Both. Y comes into L2 meanwhile.
  void add(const bf16* x, int64_t ld, bf16* y, int64_t y_ld, int64_t t, int64_t rows) const {
    const Scratch<float> s(rows * sums_width());
    const int64_t steps = product_steps<Unit>(rows, sums_width(), units<Unit>(std::min(block_c, piece.x_width)));
    shrink(x, ld, t, rows, s.get(),
           Ahead(y + t * y_ld + piece.y_first, rows, piece.y_width * sizeof(*y), y_ld * sizeof(*y), steps));
    expand({s.get(), sums_width(), piece.count}, y, y_ld, t, rows);
  }

  const Piece& piece;
  int64_t index;  // of the slot's
  std::optional<TransposedPanel<Unit>> down;
  std::optional<Panel<Unit>> up;
};

// Is it one of many neighbouring tokens, its adapter made of factors alone?
inline bool is_wide(const Batch& batch, const Segment& segment) {
  if (batch.k != 1 || batch.weights || segment.end - segment.begin < wide_tokens) return false;
  for (int64_t p = segment.begin + 1; p < segment.end; ++p)
    if (batch.assignments[p] != batch.assignments[p - 1] + 1) return false;
  for (int64_t i = 0; i < batch.per_slot; ++i)
    if (const Piece& piece = batch.piece(segment, i); !piece.empty() && piece.kind != Piece::low_rank) return false;
  return true;
}

// The wide segments of a batch, taken out of it.
class Wide {
 public:
  // down, up: which factors will be needed.
  Wide(Batch& batch, const bf16* store, bool down, bool up) : batch(batch) {
    const auto first = std::stable_partition(batch.segments.begin(), batch.segments.end(),
                                             [&](const Segment& segment) { return !is_wide(batch, segment); });
    segments.assign(first, batch.segments.end());
    batch.segments.erase(first, batch.segments.end());
    adapters.resize(segments.size());
    for (size_t d = 0; d < segments.size(); ++d)
      for (int64_t i = 0; i < batch.per_slot; ++i) {
        const Piece& piece = batch.piece(segments[d], i);
        if (piece.empty()) continue;
        adapters[d].push_back({piece, i, {}, {}});
        const double products = 1.0 * piece.count * (down * piece.x_width + up * piece.y_width);
        cost += (segments[d].end - segments[d].begin) * (read_cost(4.0 * up * piece.y_width) + product_cost(products));
      }
    pack(store, down, up);
  }

  // run(piece, first position, first token, tokens) for every piece of every block of tokens, those of a block in order.
  template <class F>
  void each(const F& run) const {
    constexpr int64_t tall = 2 * update_t<WidePiece::Unit>;
    std::vector<std::pair<size_t, int64_t>> tasks;  // a segment, and positions from there on
    for (size_t d = 0; d < segments.size(); ++d)
      for (int64_t p = segments[d].begin; p < segments[d].end; p += tall) tasks.emplace_back(d, p);
    parallel_for(static_cast<int64_t>(tasks.size()), cost, [&](int64_t i) {
      const auto [d, p] = tasks[i];
      for (const WidePiece& piece : adapters[d]) run(piece, p, batch.token(p), std::min<int64_t>(tall, segments[d].end - p));
    });
  }

 private:
  // Every factor is a task of its own: too small to be divided, and on one thread they were a tenth of an op's time.
  void pack(const bf16* store, bool down, bool up) {
    struct Factor {
      int32_t slot;
      WidePiece* to;
      bool right;
    };
    std::vector<Factor> factors;
    double elements = 0;
    for (size_t d = 0; d < segments.size(); ++d)
      for (WidePiece& one : adapters[d]) {
        if (down) factors.push_back({segments[d].slot, &one, false}), elements += one.piece.count * one.piece.x_width;
        if (up) factors.push_back({segments[d].slot, &one, true}), elements += one.piece.count * one.piece.y_width;
      }
    parallel_for(static_cast<int64_t>(factors.size()), read_cost(8 * elements), [&](int64_t i) {
      const auto& [slot, to, right] = factors[i];
      const auto emplace = [&](auto& panel, int64_t at, int64_t width) {
        std::vector<bf16> space;
        const bf16* rows = matrix_of(batch, store, at, to->piece.count, width, space);
        if (!rows) return batch.fault.found("rows that are not in the store", slot, to->index);
        panel.emplace(rows, to->piece.count, width);
      };
      if (right)
        emplace(to->up, to->piece.right, to->piece.y_width);
      else
        emplace(to->down, to->piece.left, to->piece.x_width);
    });
    batch.fault.raise(batch.op);
  }

  const Batch& batch;
  std::vector<Segment> segments;
  std::vector<std::vector<WidePiece>> adapters;
  double cost = 0;
};

}  // namespace fastft
#endif

namespace fastft {

// run(piece, first position, first token, tokens) for the pieces of the batch's wide segments, which it then has no more; of
// other dtypes and without AMX there are none.
template <class F>
void take_wide([[maybe_unused]] Batch& batch, [[maybe_unused]] const Tensor& activation,
               [[maybe_unused]] const Tensor& store, [[maybe_unused]] bool down, [[maybe_unused]] bool up,
               [[maybe_unused]] const F& run) {
#if defined(FASTFT_TILES)
  if (activation.scalar_type() == b16 && store.scalar_type() == b16)
    Wide(batch, static_cast<const bf16*>(store.const_data_ptr()), down, up).each(run);
#endif
}

}  // namespace fastft
