// What the grouped ops share on CPU: the metadata of a batch, checked, and tasks for threads. Definitions in
// fastft/ops/grouped.py. What metadata names is read and written, so all of it is looked at before it is used.
#pragma once

#include "low_rank.h"

#include <atomic>
#include <bit>
#include <memory>
#include <vector>

namespace fastft {

// What one adapter adds to one output of a linear, as `pieces` holds it.
struct Piece {
  enum Kind : int64_t { none, low_rank, columns, rows, entries };
  int64_t kind, count, left, right, x_first, x_width, y_first, y_width, s_first, scale_bits;

  bool empty() const { return kind == none || count == 0; }
  bool has_s() const { return kind == low_rank || kind == rows; }
  float scale() const { return std::bit_cast<float>(static_cast<int32_t>(scale_bits)); }
};
static_assert(sizeof(Piece) == 80);

// Positions [begin, end) of `assignments` that use the adapter in a slot.
struct Segment {
  int32_t slot, begin, end;
};
static_assert(sizeof(Segment) == 12);

inline bool inside(int64_t first, int64_t width, int64_t size) {
  return first >= 0 && width >= 0 && width <= size && first <= size - width;
}

// The first index found by a task that names something which isn't there; raised when the tasks are done.
class Fault {
 public:
  void found(const char* text, int64_t slot, int64_t piece) {
    const char* nothing = nullptr;
    if (what.compare_exchange_strong(nothing, text)) at_slot = slot, at_piece = piece;
  }
  void raise(const char* op) const {
    const char* text = what;
    STD_TORCH_CHECK(!text, op, ": piece ", at_piece, " of slot ", at_slot, " names ", text);
  }

 private:
  std::atomic<const char*> what = nullptr;
  int64_t at_slot = 0, at_piece = 0;
};

// The routing of a batch and the pieces of its adapters. `segments` are those that have tokens.
struct Batch {
  // Columns of x and y and the width of S, where an op has them.
  struct Sizes {
    int64_t tokens, x = -1, y = -1, s = -1;
  };

  Batch(const char* op, const Tensor& store, const Tensor& offset_table, const Tensor& all_pieces,
        const Tensor& all_segments, const Tensor& all_assignments, const Tensor* all_weights, int64_t k, Sizes sizes)
      : op(op), store_size(store.numel()), k(k) {
    STD_TORCH_CHECK(k >= 1, op, ": k is ", k, ", a token has at least one assignment");
    STD_TORCH_CHECK(all_pieces.dim() == 3 && all_segments.dim() == 2, op, ": pieces and segments have shapes ",
                    shape_text(all_pieces), " and ", shape_text(all_segments), ", must be [E, P, 10] and [D, 3]");
    const int64_t slots = all_pieces.size(0), listed = all_segments.size(0), positions = all_assignments.numel();
    per_slot = all_pieces.size(1);
    check(op, "store", store, Where::cpu, {store.scalar_type()}, {store_size});
    check(op, "offsets", offset_table, Where::cpu, {i64}, {offset_table.numel()});
    check(op, "pieces", all_pieces, Where::cpu, {i64}, {slots, per_slot, sizeof(Piece) / sizeof(int64_t)});
    check(op, "segments", all_segments, Where::cpu, {i32}, {listed, 3});
    check(op, "assignments", all_assignments, Where::cpu, {i32}, {positions});
    if (all_weights) check(op, "weights", *all_weights, Where::cpu, {f32}, {sizes.tokens, k});
    offsets = static_cast<const int64_t*>(offset_table.const_data_ptr());
    pieces = static_cast<const Piece*>(all_pieces.const_data_ptr());
    assignments = static_cast<const int32_t*>(all_assignments.const_data_ptr());
    weights = all_weights ? static_cast<const float*>(all_weights->const_data_ptr()) : nullptr;

    const auto* segment = static_cast<const Segment*>(all_segments.const_data_ptr());
    segments.reserve(listed);
    for (int64_t d = 0; d < listed; ++d) {
      const Segment s = segment[d];
      STD_TORCH_CHECK(s.begin >= 0 && s.begin <= s.end && s.end <= positions, op, ": segment ", d, " is positions ", s.begin,
                      " to ", s.end, " of ", positions);
      if (s.begin == s.end) continue;
      STD_TORCH_CHECK(s.slot >= 0 && s.slot < slots, op, ": segment ", d, " names slot ", s.slot, ", there are ", slots);
      uint32_t largest = 0;  // a negative one is very large
      for (int64_t p = s.begin; p < s.end; ++p) largest = std::max(largest, static_cast<uint32_t>(assignments[p]));
      STD_TORCH_CHECK(largest < sizes.tokens * k, op, ": assignments of segment ", d, " name ",
                      static_cast<int32_t>(largest), ", there are ", sizes.tokens * k);
      for (int64_t i = 0; i < per_slot; ++i) check_piece(s.slot, i, sizes, offset_table.numel());
      segments.push_back(s);
    }
  }

  const Piece& piece(const Segment& s, int64_t i) const { return pieces[s.slot * per_slot + i]; }
  int64_t token(int64_t p) const { return k == 1 ? assignments[p] : assignments[p] / k; }
  float factor(const Piece& piece, int64_t p) const {
    return weights ? piece.scale() * weights[assignments[p]] : piece.scale();
  }

  // Pointers to n rows of `width` elements from entry `at` of the offsets on, beginning at their element `first`. False
  // where one isn't in the store.
  template <class W>
  bool row_table(const W* store, int64_t at, int64_t n, int64_t width, int64_t first, const W** to) const {
    bool fits = true;
    for (int64_t j = 0; j < n; ++j) {
      const bool there = inside(offsets[at + j], width, store_size);
      to[j] = store + (there ? offsets[at + j] + first : 0);
      fits &= there;
    }
    return fits;
  }

  const char* op;
  const int64_t* offsets;
  const Piece* pieces;
  const int32_t* assignments;
  const float* weights;
  int64_t store_size, k, per_slot;
  std::vector<Segment> segments;
  mutable Fault fault;

 private:
  void check_piece(int64_t slot, int64_t i, Sizes sizes, int64_t table) const {
    const Piece& p = pieces[slot * per_slot + i];
    STD_TORCH_CHECK(p.kind >= Piece::none && p.kind <= Piece::entries && p.count >= 0, op, ": piece ", i, " of slot ", slot,
                    " has kind ", p.kind, " and count ", p.count, ", must be 0 to ", static_cast<int64_t>(Piece::entries),
                    " and not negative");
    if (p.empty()) return;
    const int64_t left = p.kind == Piece::entries ? 4 : 1, right = p.kind != Piece::entries;
    STD_TORCH_CHECK(p.count <= table && inside(p.left, left * p.count, table) && (!right || inside(p.right, p.count, table)),
                    op, ": piece ", i, " of slot ", slot, " has tables of ", p.count, " at ", p.left, " and ", p.right,
                    ", there are ", table, " offsets");
    STD_TORCH_CHECK(
        (sizes.x < 0 || inside(p.x_first, p.x_width, sizes.x)) && (sizes.y < 0 || inside(p.y_first, p.y_width, sizes.y)), op,
        ": piece ", i, " of slot ", slot, " is for ", p.x_width, " columns at ", p.x_first, " of x and ", p.y_width, " at ",
        p.y_first, " of y, there are ", sizes.x, " and ", sizes.y);
    STD_TORCH_CHECK(sizes.s < 0 || !p.has_s() || inside(p.s_first, p.count, sizes.s), op, ": piece ", i, " of slot ", slot,
                    " is for ", p.count, " columns at ", p.s_first, " of S, there are ", sizes.s);
  }
};

// What a thread needs beside its stack, kept from task to task.
class Workspace {
 public:
  enum Part { sums, wide, activations, turned, parts };
  float* get(Part part, int64_t n) {
    if (sizes[part] < n) memory[part] = std::make_unique<Scratch<float>>(n), sizes[part] = n;
    return memory[part] ? memory[part]->get() : nullptr;
  }

 private:
  std::unique_ptr<Scratch<float>> memory[parts];
  int64_t sizes[parts] = {};
};

constexpr double task_cost = 3000;  // worth handing out

// How many parts to make of work of this cost, of `total` for all threads.
inline int64_t parts_of(double cost, double total, int64_t threads) {
  return static_cast<int64_t>(cost / std::max(task_cost, total / (4.0 * threads))) + 1;
}

}  // namespace fastft
