// The grouped family on CPU: adapters of many kinds in one batch; definitions in fastft/ops/grouped.py.
//
// A decoding batch reads every adapter for a token or a few, so it is memory traffic: tasks are parts of adapters, each byte
// of which is read once. An element of S, y or a gradient is owned by one task, which adds in a fixed order, so results do
// not depend on the number of threads.
#include "grouped_entries.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace fastft {
namespace {

constexpr int64_t columns_step = 128, most_columns = 1024;  // of y or a gradient that one task sweeps

// What a task does: of segments [first, last) positions [p0, p1), of pieces [piece, ...) ranks or columns [begin, end).
struct Task {
  int32_t first, last, piece;
  int64_t p0, p1, begin, end;
};

struct Plan {
  std::vector<Task> tasks;
  double cost = 0;
};

float to_float(float v) { return v; }
float to_float(bf16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
float to_float(fp16 v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }

// Row i of `to` (m <= token_block) gets Σ_j c[i, j] row j of a table: coefficients(j, n, c) writes c[i * depth_step + 0 ...
// n) and table(j, n, rows) the rows of terms j to j + n, and either may say that something isn't there. `replace`: instead
// of what stood in `to`.
template <bool replace, class W, class T, class Coefficients, class Table>
bool sum_products(int64_t m, int64_t depth, int64_t cols, const Coefficients& coefficients, const Table& table, T* const* to,
                  bool distinct, Workspace& space) {
  alignas(64) float c[token_block * depth_step];
  const W* rows[depth_step];
  const int64_t row = round_up(cols, VL);
  constexpr bool may = !replace && !std::is_same_v<T, fp16>;  // fewer forms of the inner loop, for what CPUs seldom do
  const bool direct = may && depth <= depth_step;
  float* sums = direct ? nullptr : space.get(Workspace::sums, m * row);
  if (sums) std::fill_n(sums, m * row, 0.0f);
  for (int64_t j = 0; j < depth; j += depth_step) {
    const int64_t n = std::min(depth_step, depth - j);
    if (!table(j, n, rows) || !coefficients(j, n, c)) return false;
    const auto add = [&](auto* const* from) {
      if constexpr (may)
        if (direct) return sum_rows(m, c, from, n, cols, AddToRows<T>{to, distinct});
      sum_rows(m, c, from, n, cols, AddToSums{sums, row});
    };
    if constexpr (!std::is_same_v<W, float>) {
      if (m > 2 * tile_rows) {  // converted once for all
        float* wide = space.get(Workspace::wide, depth_step * row);
        const float* wide_rows[depth_step];
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t v = 0; v < cols; v += VL) store(wide + i * row + v, load(rows[i] + v, cols - v));
          wide_rows[i] = wide + i * row;
        }
        add(wide_rows);
        continue;
      }
    }
    add(rows);
  }
  for (int64_t i = 0; sums && i < m; ++i)
    for (int64_t v = 0; v < cols; v += VL) {
      const vf sum = load(sums + i * row + v), before = replace ? vf{} : load(to[i] + v, cols - v);
      store(to[i] + v, before + sum, cols - v);
    }
  return true;
}

// S = x times the left rows.
template <class T, class W>
struct Shrink {
  const Batch& batch;
  const T* x;
  int64_t ld;
  const W* store;
  float* s;
  int64_t width;

  Plan plan(int64_t threads) const {
    Plan plan;
    const auto cost = [&](const Segment& s, const Piece& p) {
      return p.empty() || !p.has_s() ? 0 : p.count * p.x_width * (read_cost(sizeof(W)) + product_cost(s.end - s.begin));
    };
    for (const Segment& s : batch.segments)
      for (int64_t i = 0; i < batch.per_slot; ++i) plan.cost += cost(s, batch.piece(s, i));
    for (int32_t d = 0; d < static_cast<int32_t>(batch.segments.size()); ++d) {
      const Segment& s = batch.segments[d];
      for (int32_t i = 0; i < batch.per_slot; ++i) {
        const Piece& piece = batch.piece(s, i);
        if (piece.empty() || !piece.has_s()) continue;
        const int64_t token_parts = blocks(s.end - s.begin, token_block);
        const int64_t parts = parts_of(cost(s, piece) / token_parts, plan.cost, threads);
        const int64_t step = round_up(blocks(piece.count, parts), s.end - s.begin == 1 ? 8 : 4);
        for (int64_t p = s.begin; p < s.end; p += token_block)
          for (int64_t r = 0; r < piece.count; r += step)
            plan.tasks.push_back(
                {d, d + 1, i, p, std::min<int64_t>(s.end, p + token_block), r, std::min(piece.count, r + step)});
      }
    }
    return plan;
  }

  void run(const Task& task) const {
    const Segment& segment = batch.segments[task.first];
    const int64_t m = task.p1 - task.p0;
    const bool fits = VL == 4            ? (m == 1 ? ranks<4>(segment, task) : ranks<2>(segment, task))
                      : m == 1           ? ranks<VL>(segment, task)
                      : m < 4 || VL == 8 ? ranks<VL / 2>(segment, task)
                                         : ranks<std::max(VL / 4, 2)>(segment, task);
    if (!fits) batch.fault.found("rows that are not in the store", segment.slot, task.piece);
  }

  // In groups of R, each for all tokens.
  template <int R>
  bool ranks(const Segment& segment, const Task& task) const {
    const Piece& piece = batch.piece(segment, task.piece);
    const T* tokens[token_block];
    for (int64_t p = task.p0; p < task.p1; ++p) tokens[p - task.p0] = x + batch.token(p) * ld + piece.x_first;
    for (int64_t r = task.begin; r < task.end; r += R) {
      const W* rows[R];
      const int64_t n = std::min<int64_t>(R, task.end - r), m = task.p1 - task.p0;
      if (!batch.row_table(store, piece.left + r, n, piece.x_width, 0, rows)) return false;
      std::fill(rows + n, rows + R, rows[n - 1]);  // whose products nobody wants
      float* to = s + task.p0 * width + piece.s_first + r;
      int64_t t = 0;
      if constexpr (VL / R >= 4)
        for (; t + 4 <= m; t += 4) dots<4, R>(tokens + t, rows, piece.x_width, n, to + t * width);
      if constexpr (VL / R >= 2)
        for (; t + 2 <= m; t += 2) dots<2, R>(tokens + t, rows, piece.x_width, n, to + t * width);
      for (; t < m; ++t) dots<1, R>(tokens + t, rows, piece.x_width, n, to + t * width);
    }
    return true;
  }

  template <int M, int R>
  void dots(const T* const* tokens, const W* const* rows, int64_t depth, int64_t n, float* to) const {
    alignas(64) float out[VL];
    fastft::store(out, dot_tile<M, R>(tokens, rows, depth));
    for (int i = 0; i < M; ++i) std::memcpy(to + i * width, out + i * R, n * sizeof(float));
  }
};

// y += what every piece makes of S or x.
template <class T, class W>
struct Expand {
  const Batch& batch;
  T* y;
  int64_t y_ld;
  const T* x;
  int64_t x_ld;
  const float* s;
  int64_t s_ld;
  const W* store;
  const uint16_t* columns;
  int64_t column_count;

  // About the time that a piece takes for m tokens.
  static double cost(const Piece& p, int64_t m) {
    if (p.empty()) return 0;
    if (p.kind == Piece::rows) return 2.0 * p.count * m;
    if (p.kind != Piece::entries) return p.count * (p.y_width * (read_cost(sizeof(W)) + product_cost(m)) + m);
    const double entries = 0.01 * p.x_width * p.y_width;  // a guess
    const double products = m <= gathering_tokens ? m * (entries + 3.0 * p.y_width) : entries + p.y_width * (8.0 + m / 8.0);
    return entries * read_cost(sizeof(W) + 2) + products;
  }

  // Tasks are columns of one segment, or with several assignments a token of all segments, for two may add to one token.
  Plan plan(int64_t threads) const {
    Plan plan;
    const auto segments = static_cast<int32_t>(batch.segments.size());
    std::vector<double> costs(segments);
    for (int32_t d = 0; d < segments; ++d) {
      const Segment& s = batch.segments[d];
      for (int64_t i = 0; i < batch.per_slot; ++i) costs[d] += cost(batch.piece(s, i), s.end - s.begin);
      plan.cost += costs[d];
    }
    if (batch.k > 1) {
      add_tasks(plan, 0, segments, 0, batch.segments.back().end, plan.cost, threads);
    } else {
      for (int32_t d = 0; d < segments; ++d) {
        const Segment& s = batch.segments[d];
        const double block_cost = costs[d] / blocks(s.end - s.begin, token_block);
        for (int64_t p = s.begin; p < s.end; p += token_block)
          add_tasks(plan, d, d + 1, p, std::min<int64_t>(s.end, p + token_block), block_cost, threads);
      }
    }
    return plan;
  }

  void add_tasks(Plan& plan, int32_t first, int32_t last, int64_t p0, int64_t p1, double cost, int64_t threads) const {
    int64_t lo = INT64_MAX, hi = 0;
    for (int32_t d = first; d < last; ++d)
      for (int64_t i = 0; i < batch.per_slot; ++i) {
        const Piece& piece = batch.piece(batch.segments[d], i);
        if (!piece.empty()) lo = std::min(lo, piece.y_first), hi = std::max(hi, piece.y_first + piece.y_width);
      }
    if (lo >= hi) return;
    lo = lo / columns_step * columns_step;
    const int64_t parts = parts_of(cost, plan.cost, threads);
    const int64_t step = std::min(most_columns, round_up(blocks(hi - lo, parts), columns_step));
    for (int64_t c = lo; c < hi; c += step) plan.tasks.push_back({first, last, 0, p0, p1, c, std::min(hi, c + step)});
  }

  void run(const Task& task, Workspace& space) const {
    for (int32_t d = task.first; d < task.last; ++d) {
      const Segment& segment = batch.segments[d];
      for (int32_t i = 0; i < batch.per_slot; ++i) {
        const Piece& piece = batch.piece(segment, i);
        if (piece.empty()) continue;
        const int64_t lo = std::max(task.begin, piece.y_first) - piece.y_first;
        const int64_t hi = std::min(task.end - piece.y_first, piece.y_width);
        if (lo >= hi) continue;
        const int64_t p1 = std::min<int64_t>(segment.end, task.p1);
        for (int64_t p = std::max<int64_t>(segment.begin, task.p0); p < p1; p += token_block)
          if (const char* absent = add(piece, p, std::min(token_block, p1 - p), lo, hi, space))
            batch.fault.found(absent, segment.slot, i);
      }
    }
  }

  // Columns [lo, hi) of a piece's window, m tokens from position p on. What isn't there, or null.
  const char* add(const Piece& piece, int64_t p, int64_t m, int64_t lo, int64_t hi, Workspace& space) const {
    T* to[token_block];
    const T* from[token_block];
    float factors[token_block];
    for (int64_t i = 0; i < m; ++i) {
      const int64_t token = batch.token(p + i);
      to[i] = y + token * y_ld + piece.y_first;
      from[i] = x + token * x_ld + piece.x_first;
      factors[i] = batch.factor(piece, p + i);
    }
    if (piece.kind == Piece::entries)
      return add_entries(batch, piece, store, columns, column_count, m, from, to, factors, lo, hi, space)
                 ? nullptr
                 : "entries that are not in the store, its columns or the windows";
    if (piece.kind == Piece::rows)
      return add_channels(piece, p, m, to, factors, lo, hi) ? nullptr : "channels outside of its window in y";
    for (int64_t i = 0; i < m; ++i) to[i] += lo;
    const auto table = [&](int64_t j, int64_t n, const W** rows) {
      return batch.row_table(store, piece.right + j, n, piece.y_width, lo, rows);
    };
    const bool distinct = batch.k == 1;
    if (piece.kind == Piece::columns) {
      const auto gathered = [&](int64_t j, int64_t n, float* c) {
        const int64_t* at = batch.offsets + piece.left + j;
        for (int64_t l = 0; l < n; ++l)
          if (at[l] < 0 || at[l] >= piece.x_width) return false;
        for (int64_t i = 0; i < m; ++i)
          for (int64_t l = 0; l < n; ++l) c[i * depth_step + l] = factors[i] * to_float(from[i][at[l]]);
        return true;
      };
      return sum_products<false, W>(m, piece.count, hi - lo, gathered, table, to, distinct, space)
                 ? nullptr
                 : "rows that are not in the store, or channels outside of its window in x";
    }
    const auto scaled = [&](int64_t j, int64_t n, float* c) {
      for (int64_t i = 0; i < m; ++i)
        for (int64_t l = 0; l < n; ++l) c[i * depth_step + l] = factors[i] * s[(p + i) * s_ld + piece.s_first + j + l];
      return true;
    };
    return sum_products<false, W>(m, piece.count, hi - lo, scaled, table, to, distinct, space)
               ? nullptr
               : "rows that are not in the store";
  }

  // S added to those of a piece's channels that lie in [lo, hi).
  bool add_channels(const Piece& piece, int64_t p, int64_t m, T* const* to, const float* factors, int64_t lo,
                    int64_t hi) const {
    constexpr int64_t step = 16 * VL;
    const int64_t* table = batch.offsets + piece.right;
    for (int64_t j = 0; j < piece.count;) {
      int64_t channels[step], own[step], n = 0;
      for (; j < piece.count && n < step; ++j) {
        if (table[j] < 0 || table[j] >= piece.y_width) return false;
        channels[n] = table[j], own[n] = j;
        n += table[j] >= lo && table[j] < hi;
      }
      for (int64_t i = 0; i < m; ++i) {
        const float* row = s + (p + i) * s_ld + piece.s_first;
        for (int64_t l = 0; l < n; l += VL) {
          const int64_t some = std::min<int64_t>(VL, n - l);
          T held[VL] = {};
          float added[VL] = {};
          for (int64_t v = 0; v < some; ++v) held[v] = to[i][channels[l + v]], added[v] = row[own[l + v]];
          fastft::store(held, load(held) + factors[i] * load(added));
          for (int64_t v = 0; v < some; ++v) to[i][channels[l + v]] = held[v];
        }
      }
    }
    return true;
  }
};

// The gradient's left rows = S or gathered columns of `other`, transposed, times `values`.
template <class T, class W>
struct Outer {
  const Batch& batch;
  W* grad;
  const T* values;
  int64_t ld;
  const T* other;
  int64_t other_ld;
  const float* s;
  int64_t s_ld;

  Plan plan(int64_t threads) const {
    Plan plan;
    const auto cost = [&](const Segment& s, const Piece& p) {
      const int64_t m = s.end - s.begin;
      return p.empty() || !p.has_s()
                 ? 0
                 : p.x_width * (p.count * (read_cost(sizeof(W)) + product_cost(m)) + m * read_cost(sizeof(T)));
    };
    for (const Segment& s : batch.segments)
      for (int64_t i = 0; i < batch.per_slot; ++i) plan.cost += cost(s, batch.piece(s, i));
    for (int32_t d = 0; d < static_cast<int32_t>(batch.segments.size()); ++d)
      for (int32_t i = 0; i < batch.per_slot; ++i) {
        const Piece& piece = batch.piece(batch.segments[d], i);
        if (piece.empty() || !piece.has_s()) continue;
        const int64_t parts = parts_of(cost(batch.segments[d], piece), plan.cost, threads);
        const int64_t step = std::min(most_columns, round_up(blocks(piece.x_width, parts), columns_step));
        for (int64_t c = 0; c < piece.x_width; c += step)
          plan.tasks.push_back(
              {d, d + 1, i, batch.segments[d].begin, batch.segments[d].end, c, std::min(piece.x_width, c + step)});
      }
    return plan;
  }

  void run(const Task& task, Workspace& space) const {
    const Segment& segment = batch.segments[task.first];
    const Piece& piece = batch.piece(segment, task.piece);
    for (int64_t r = 0; r < piece.count; r += token_block)
      if (!ranks(piece, task, r, std::min(token_block, piece.count - r), space))
        return batch.fault.found("rows that are not in the gradient, or channels outside of its window", segment.slot,
                                 task.piece);
  }

  // Columns [begin, end) of gradient rows [r, r + n).
  bool ranks(const Piece& piece, const Task& task, int64_t r, int64_t n, Workspace& space) const {
    const W* table[token_block];
    W* to[token_block];
    if (!batch.row_table<W>(grad, piece.left + r, n, piece.x_width, task.begin, table)) return false;
    for (int64_t i = 0; i < n; ++i) to[i] = const_cast<W*>(table[i]);
    const int64_t* channels = batch.offsets + piece.right + r;
    for (int64_t i = 0; piece.kind == Piece::rows && i < n; ++i)
      if (channels[i] < 0 || channels[i] >= piece.y_width) return false;
    const auto coefficients = [&](int64_t j, int64_t tokens, float* c) {
      for (int64_t l = 0; l < tokens; ++l) {
        const int64_t p = task.p0 + j + l;
        const float factor = batch.factor(piece, p);
        const T* gathered = other + batch.token(p) * other_ld + piece.y_first;
        const float* own = s + p * s_ld + piece.s_first + r;
        for (int64_t i = 0; i < n; ++i)
          c[i * depth_step + l] = factor * (piece.kind == Piece::rows ? to_float(gathered[channels[i]]) : own[i]);
      }
      return true;
    };
    const auto rows = [&](int64_t j, int64_t tokens, const T** from) {
      for (int64_t l = 0; l < tokens; ++l) from[l] = values + batch.token(task.p0 + j + l) * ld + piece.x_first + task.begin;
      return true;
    };
    return sum_products<true, T>(n, task.p1 - task.p0, task.end - task.begin, coefficients, rows, to, true, space);
  }
};

template <class Op>
void run_all(const Batch& batch, const Op& op) {
  if (batch.segments.empty()) return;
  const int64_t threads = torch::stable::get_num_threads();
  const Plan plan = op.plan(threads);
  run_tasks(plan.tasks.size(), plan.cost, threads, [&](int64_t i, Workspace& space) {
    if constexpr (requires { op.run(plan.tasks[i]); })
      op.run(plan.tasks[i]);
    else
      op.run(plan.tasks[i], space);
  });
  batch.fault.raise(batch.op);
}

// Calls f with null pointers of the activations' and of the store's element type.
template <class F>
void dispatch_pair(const Tensor& x, const Tensor& store, const F& f) {
  dispatch(x, [&](auto* type) { store.scalar_type() == f32 ? f(type, static_cast<float*>(nullptr)) : f(type, type); });
}

void check_activations(const char* op, const char* name, const Tensor& t) {
  check_matrix(op, name, t);
  check_rows(op, name, t, Where::cpu, {f32, b16, h16}, {t.size(0), t.size(1)});
}

Tensor grouped_shrink(const Tensor& x, const Tensor& store, const Tensor& offsets, const Tensor& pieces,
                      const Tensor& segments, const Tensor& assignments, int64_t k, int64_t width) {
  const char* op = "grouped_shrink";
  check_activations(op, "x", x);
  STD_TORCH_CHECK(width >= 0, op, ": width is ", width, ", must not be negative");
  check(op, "store", store, Where::cpu, {x.scalar_type(), f32}, {store.numel()});
  const Batch batch(op, store, offsets, pieces, segments, assignments, nullptr, k, {x.size(0), x.size(1), -1, width});
  Tensor s = torch::stable::new_empty(x, {assignments.numel(), width}, f32);
  dispatch_pair(x, store, [&](auto* type, auto* own) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(own)>;
    run_all(batch, Shrink<T, W>{batch, data(x, type), x.stride(0), data(store, own),
                                static_cast<float*>(s.mutable_data_ptr()), width});
  });
  return s;
}

void grouped_expand_(Tensor y, const Tensor& x, const Tensor& s, const Tensor& store, const Tensor& offsets,
                     const Tensor& columns, const Tensor& pieces, const Tensor& segments, const Tensor& assignments,
                     const std::optional<Tensor>& weights, int64_t k) {
  const char* op = "grouped_expand_";
  check_activations(op, "y", y);
  check_matrix(op, "x", x);
  check_matrix(op, "s", s);
  check_rows(op, "x", x, Where::cpu, {y.scalar_type()}, {y.size(0), x.size(1)});
  check_rows(op, "s", s, Where::cpu, {f32}, {assignments.numel(), s.size(1)});
  check(op, "store", store, Where::cpu, {y.scalar_type(), f32}, {store.numel()});
  check(op, "columns", columns, Where::cpu, {ScalarType::Short}, {columns.numel()});
  const Batch batch(op, store, offsets, pieces, segments, assignments, weights ? &*weights : nullptr, k,
                    {y.size(0), x.size(1), y.size(1), s.size(1)});
  dispatch_pair(y, store, [&](auto* type, auto* own) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(own)>;
    run_all(batch, Expand<T, W>{batch, mutable_data(y, type), y.stride(0), data(x, type), x.stride(0),
                                static_cast<const float*>(s.const_data_ptr()), s.stride(0), data(store, own),
                                static_cast<const uint16_t*>(columns.const_data_ptr()), columns.numel()});
  });
}

void grouped_outer_(Tensor grad, const Tensor& values, const Tensor& other, const Tensor& s, const Tensor& offsets,
                    const Tensor& pieces, const Tensor& segments, const Tensor& assignments,
                    const std::optional<Tensor>& weights, int64_t k) {
  const char* op = "grouped_outer_";
  check_activations(op, "values", values);
  check_matrix(op, "other", other);
  check_matrix(op, "s", s);
  check_rows(op, "other", other, Where::cpu, {values.scalar_type()}, {values.size(0), other.size(1)});
  check_rows(op, "s", s, Where::cpu, {f32}, {assignments.numel(), s.size(1)});
  check(op, "grad", grad, Where::cpu, {values.scalar_type(), f32}, {grad.numel()});
  const Batch batch(op, grad, offsets, pieces, segments, assignments, weights ? &*weights : nullptr, k,
                    {values.size(0), values.size(1), other.size(1), s.size(1)});
  dispatch_pair(values, grad, [&](auto* type, auto* own) {
    using T = std::remove_pointer_t<decltype(type)>;
    using W = std::remove_pointer_t<decltype(own)>;
    run_all(batch, Outer<T, W>{batch, mutable_data(grad, own), data(values, type), values.stride(0), data(other, type),
                               other.stride(0), static_cast<const float*>(s.const_data_ptr()), s.stride(0)});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("grouped_shrink", TORCH_BOX(&grouped_shrink));
  m.impl("grouped_expand_", TORCH_BOX(&grouped_expand_));
  m.impl("grouped_outer_", TORCH_BOX(&grouped_outer_));
}

}  // namespace fastft
