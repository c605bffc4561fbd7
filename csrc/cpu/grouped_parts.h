// What the grouped ops compute on CPU, each planned as tasks of about equal cost and run task by task: `Shrink`, `Expand`
// and `Outer`, the sums of fastft/ops/grouped.py.
#pragma once

#include "grouped_entries.h"

namespace fastft {

// What a task does: of segments [first, last) positions [p0, p1), of pieces [piece, ...) ranks or columns [begin, end).
struct Task {
  int32_t first, last, piece;
  int64_t p0, p1, begin, end;
  double cost;
};

struct Plan {
  std::vector<Task> tasks;
  double cost = 0;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(fp16 v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }

// S, element (p, r) of position p: rows as the public ops have them, or columns inside of one op, where threads that share a
// segment's ranks then write no cache line together.
template <class Float>
struct Sums {
  Float* p;
  int64_t row, column;
  Float& at(int64_t position, int64_t r) const { return p[position * row + r * column]; }
};

// Asks for `width` elements of each row: rows are too short for prefetchers, and lie where those don't look.
template <class T>
[[gnu::always_inline]] inline void fetch_rows(const T* const* rows, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t v = 0; v < width; v += 64 / sizeof(T)) __builtin_prefetch(rows[i] + v, 0, 3);
}

// Row i of `to` (m <= token_block) gets Σ_j c[i, j] row j of a table: coefficients(j, n, c) writes c[l * token_block + i]
// for l < n, and table(j, n, rows) the rows of terms j to j + n, and either may say that something isn't there. `replace`:
// instead of what stood in `to`.
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
    if (!table(j, n, rows)) return false;
    if (m > 1) fetch_rows(rows, n, cols);  // for one token they are asked for in turn
    if (!coefficients(j, n, c)) return false;
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
  Sums<float> s;

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
        const double block_cost = cost(s, piece) / blocks(s.end - s.begin, token_block);
        const int64_t parts = parts_of(block_cost, plan.cost, threads);
        const int64_t step = round_up(blocks(piece.count, parts), s.end - s.begin == 1 ? 8 : 4);
        for (int64_t p = s.begin; p < s.end; p += token_block)
          for (int64_t r = 0; r < piece.count; r += step)
            plan.tasks.push_back({d, d + 1, i, p, std::min<int64_t>(s.end, p + token_block), r,
                                  std::min(piece.count, r + step),
                                  block_cost * std::min(piece.count - r, step) / piece.count});
      }
    }
    return plan;
  }

  void run(const Task& task, Workspace&) const {
    const Segment& segment = batch.segments[task.first];
    const int64_t m = task.p1 - task.p0;
    const bool fits = VL == 4            ? (m == 1 ? ranks<1, 4>(segment, task) : ranks<2, 2>(segment, task))
                      : m == 1           ? ranks<1, VL>(segment, task)
                      : m < 4 || VL == 8 ? ranks<2, VL / 2>(segment, task)
                                         : ranks<std::min(VL / 2, 4), std::max(VL / 4, 2)>(segment, task);
    if (!fits) batch.fault.found("rows that are not in the store", segment.slot, task.piece);
  }

  // In tiles of M tokens and R ranks; of as many ranks and columns at a time as L1 holds for all tokens.
  template <int M, int R>
  bool ranks(const Segment& segment, const Task& task) const {
    constexpr int64_t block = dot_block<T, W>, held = 16;
    const Piece& piece = batch.piece(segment, task.piece);
    const T* tokens[token_block];
    for (int64_t p = task.p0; p < task.p1; ++p) tokens[p - task.p0] = x + batch.token(p) * ld + piece.x_first;
    const int64_t m = task.p1 - task.p0;
    for (int64_t r = task.begin; r < task.end; r += held) {
      const W* rows[held + rows_at_once];
      const int64_t n = std::min(held, task.end - r), known = std::min(held + rows_at_once, task.end - r);
      if (!batch.row_table(store, piece.left + r, known, piece.x_width, 0, rows)) return false;
      std::fill(rows + known, rows + held + rows_at_once, rows[known - 1]);  // whose products nobody wants
      int64_t k = 0;
      do {  // also where x has no columns, for S of 0
        const int64_t depth = std::min(block, piece.x_width - k);
        int64_t t = 0;
        const auto tiles = [&](auto size) {
          for (int64_t i = 0; i < n; i += R)
            dots<decltype(size)::value, R>(tokens + t, rows + i, k, depth, std::min<int64_t>(R, n - i), task.p0 + t,
                                           piece.s_first + r + i);
          t += size;
        };
        while (t + M <= m) tiles(std::integral_constant<int, M>());
        if constexpr (M > 2)
          if (t + 2 <= m) tiles(std::integral_constant<int, 2>());
        if constexpr (M > 1)
          if (t < m) tiles(std::integral_constant<int, 1>());
      } while ((k += block) < piece.x_width);
    }
    return true;
  }

  template <int M, int R>
  void dots(const T* const* tokens, const W* const* rows, int64_t k, int64_t depth, int64_t n, int64_t position,
            int64_t rank) const {
    alignas(64) float out[VL];
    fastft::store(out, dot_tile<M, R>(tokens, rows, k, depth));
    for (int64_t r = 0; r < n; ++r)
      for (int i = 0; i < M; ++i) {
        float& to = s.at(position + i, rank + r);
        to = k ? to + out[i * R + r] : out[i * R + r];
      }
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
  Sums<const float> s;
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
      add_tasks(plan, 0, segments, 0, INT64_MAX, plan.cost, threads);
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
    for (int64_t c = lo; c < hi; c += step)
      plan.tasks.push_back({first, last, 0, p0, p1, c, std::min(hi, c + step), cost * std::min(hi - c, step) / (hi - lo)});
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
        for (int64_t l = 0; l < n; ++l)
          for (int64_t i = 0; i < m; ++i) c[l * token_block + i] = factors[i] * to_float(from[i][at[l]]);
        return true;
      };
      return sum_products<false, W>(m, piece.count, hi - lo, gathered, table, to, distinct, space)
                 ? nullptr
                 : "rows that are not in the store, or channels outside of its window in x";
    }
    const auto scaled = [&](int64_t j, int64_t n, float* c) {
      for (int64_t l = 0; l < n; ++l)
        for (int64_t i = 0; i < m; ++i) c[l * token_block + i] = factors[i] * s.at(p + i, piece.s_first + j + l);
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
        for (int64_t l = 0; l < n; l += VL) {
          const int64_t some = std::min<int64_t>(VL, n - l);
          T held[VL] = {};
          float added[VL] = {};
          for (int64_t v = 0; v < some; ++v)
            held[v] = to[i][channels[l + v]], added[v] = s.at(p + i, piece.s_first + own[l + v]);
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
  Sums<const float> s;

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
        const double own_cost = cost(batch.segments[d], piece);
        const int64_t parts = parts_of(own_cost, plan.cost, threads);
        const int64_t step = std::min(most_columns, round_up(blocks(piece.x_width, parts), columns_step));
        for (int64_t c = 0; c < piece.x_width; c += step)
          plan.tasks.push_back({d, d + 1, i, batch.segments[d].begin, batch.segments[d].end, c,
                                std::min(piece.x_width, c + step),
                                own_cost * std::min(piece.x_width - c, step) / piece.x_width});
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
        for (int64_t i = 0; i < n; ++i)
          c[l * token_block + i] =
              factor * (piece.kind == Piece::rows ? to_float(gathered[channels[i]]) : s.at(p, piece.s_first + r + i));
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

}  // namespace fastft
