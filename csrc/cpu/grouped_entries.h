// Products with blocks of entries (ENTRIES in fastft/ops/grouped.py): y[t, n] += the sum of row n's values times x[t] at
// their columns.
//
// One to three tokens gather from their x, all entries of 16 rows at a time. More tokens read a copy of x in which those of
// one column are neighbours, so that an entry is read once for all of them, and its product is a vector or three.
#pragma once

#include "grouped.h"
#include "grouped_tiles.h"

namespace fastft {

constexpr int64_t gathering_tokens = 3;  // at most

inline vi gather_indices(const uint16_t* at) { return (vi)widen(load_bytes<vu16>(at)); }

inline vf gather(const float* p, vi at) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps((__m512i)at, p, 4);
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(p, (__m256i)at, 4);
#else
  return vf{p[at[0]], p[at[1]], p[at[2]], p[at[3]]};
#endif
}

// Where a column of n <= VL rows lies, rows `row` apart. Gathered columns are a transpose: 83 us for 1 % of 1408 x 512 at 32
// tokens, where shuffles between rows made it 132.
inline vi column_of(int64_t row, int64_t n) {
  const vi lane = reinterpret_cast<vi>(lane_numbers()), last = vi{} + static_cast<int32_t>(n - 1);
  return (lane < last ? lane : last) * static_cast<int32_t>(row);
}

// The first n of the elements at p, of which a whole vector is readable; the others as 0.
inline vf load_some(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps((1u << std::min<int64_t>(n, VL)) - 1, p);
#else
  const vi lane = reinterpret_cast<vi>(lane_numbers());
  return select(lane < static_cast<int32_t>(std::min<int64_t>(n, VL)), load(p));
#endif
}

// A block of entries, its rows [begin, end) that are asked for.
template <class W>
struct EntryBlock {
  const uint16_t* starts;   // of rows
  const uint16_t* columns;  // of entries
  const W* values;
  int64_t first, begin, end;
};

// Block b of a piece, its rows clipped to columns [lo, hi) of the window in y. False if it doesn't fit.
template <class W>
bool entry_block(const Batch& batch, const Piece& piece, int64_t b, const W* store, const uint16_t* columns,
                 int64_t column_count, int64_t lo, int64_t hi, EntryBlock<W>& block) {
  const int64_t* at = batch.offsets + piece.left + 4 * b;
  const int64_t first = at[0], rows = at[1], value = at[2], column = at[3];
  if (!inside(first, rows, piece.y_width) || !inside(column, rows + 1, column_count)) return false;
  const uint16_t* starts = columns + column;
  if (!inside(column + rows + 1, starts[rows], column_count) || !inside(value, starts[rows], batch.store_size)) return false;
  block = {starts, starts + rows + 1, store + value, first, std::max(first, lo) - first, std::min(first + rows, hi) - first};
  if (block.begin >= block.end) return true;
  bool ascending = starts[block.end] <= starts[rows];
  for (int64_t i = block.begin; i < block.end; ++i) ascending &= starts[i] <= starts[i + 1];
  if (!ascending) return false;
  uint16_t largest = 0;
  for (int64_t e = starts[block.begin]; e < starts[block.end]; ++e) largest = std::max(largest, block.columns[e]);
  return starts[block.begin] == starts[block.end] || largest < piece.x_width;
}

constexpr int64_t held_products = 1024;  // that are formed before they are added up, for several rows or a part of one

// Element l: the sum of row i + l of a block, for one token. Products are rounded before they are added: whether a row is
// held with others changes no bit.
template <class W>
inline vf gathered_rows(const EntryBlock<W>& block, int64_t i, int64_t rows, const float* x) {
  alignas(64) float products[held_products + 2 * VL];
  const auto hold = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    int64_t e = begin;
    for (; e + VL <= end; e += VL)
      store(products + (e - begin), gather(x, gather_indices(block.columns + e)) * load(block.values + e));
    if (e < end) {
      uint16_t columns[VL] = {};
      std::memcpy(columns, block.columns + e, (end - e) * sizeof(uint16_t));
      store(products + (e - begin), gather(x, gather_indices(columns)) * load(block.values + e, end - e));
    }
  };
  vf sums[VL] = {};
  const int64_t begin = block.starts[i], end = block.starts[i + rows];
  if (end - begin <= held_products) {
    hold(begin, end);
    const auto add = [&](int64_t l) __attribute__((always_inline)) {
      const int64_t e = block.starts[i + l], n = block.starts[i + l + 1] - e;
      sums[l] += load_some(products + (e - begin), n);
      for (int64_t o = VL; o < n; o += VL) sums[l] += load_some(products + (e - begin) + o, n - o);
    };
    if (rows == VL) {
#pragma GCC unroll 16
      for (int64_t l = 0; l < VL; ++l) add(l);
    } else {
      for (int64_t l = 0; l < rows; ++l) add(l);
    }
    return lane_totals(sums);
  }
  for (int64_t l = 0; l < rows; ++l)
    for (int64_t e = block.starts[i + l], stop = block.starts[i + l + 1]; e < stop; e += held_products) {
      const int64_t n = std::min(held_products, stop - e);
      hold(e, e + n);
      for (int64_t o = 0; o < n; o += VL) sums[l] += load_some(products + o, n - o);
    }
  return lane_totals(sums);
}

// out = Σ values[e] x[columns[e]] of n entries, V vectors of tokens each.
template <int V>
inline void add_columns(const float* x, int64_t row, const uint16_t* columns, const float* values, int64_t n, float* out) {
  vf total[V] = {};
  for (int64_t e = 0; e < n;) {
    vf sum[V] = {};
    for (const int64_t stop = std::min(n, e + chain); e < stop; ++e)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[v] += values[e] * load(x + columns[e] * row + v * VL);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[v] += sum[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(out + v * VL, total[v]);
}

// Copies the n elements of a row to float32 as they are there, or where it is float32 already, does not.
template <class T>
const float* widened(const T* from, int64_t n, float* to) {
  if constexpr (std::is_same_v<T, float>) return from;
  for (int64_t j = 0; j < n; j += VL) store(to + j, load(from + j, n - j), n - j);
  return to;
}

// Adds columns [lo, hi) of a piece's window to m tokens, x[i] and y[i] the beginnings of their windows.
template <class T, class W>
bool add_entries(const Batch& batch, const Piece& piece, const W* store, const uint16_t* columns, int64_t column_count,
                 int64_t m, const T* const* x, T* const* y, const float* factors, int64_t lo, int64_t hi, Workspace& space) {
  const int64_t padded = round_up(piece.x_width, VL), held = round_up(m, VL);
  const bool gathers = m <= gathering_tokens;
  const float* wide[gathering_tokens];
  float* turned = nullptr;
  if (gathers) {
    float* to = space.get(Workspace::activations, std::is_same_v<T, float> ? 0 : m * padded);
    for (int64_t t = 0; t < m; ++t) wide[t] = widened(x[t], piece.x_width, to + t * padded);
  } else {
    float* rows = space.get(Workspace::activations, VL * padded);
    turned = space.get(Workspace::turned, piece.x_width * held);
    for (int64_t t = 0; t < m; t += VL) {
      const int64_t n = std::min<int64_t>(VL, m - t);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < piece.x_width; k += VL)
          fastft::store(rows + i * padded + k, load(x[t + i] + k, piece.x_width - k));
      const vi at = column_of(padded, n);
      for (int64_t k = 0; k < piece.x_width; ++k) fastft::store(turned + k * held + t, gather(rows + k, at));
    }
  }
  for (int64_t b = 0; b < piece.count; ++b) {
    EntryBlock<W> block;
    if (!entry_block(batch, piece, b, store, columns, column_count, lo, hi, block)) return false;
    if (block.begin >= block.end) continue;  // none of its rows is asked for, and `starts` has no such places
    if (gathers) {
      for (int64_t i = block.begin; i < block.end; i += VL) {
        const int64_t n = std::min<int64_t>(VL, block.end - i);
        for (int64_t t = 0; t < m; ++t) {
          T* to = y[t] + block.first + i;
          fastft::store(to, load(to, n) + factors[t] * gathered_rows(block, i, n, wide[t]), n);
        }
      }
      continue;
    }
    const int64_t begin = block.starts[block.begin], count = block.starts[block.end] - begin;
    const float* values =
        widened(block.values + begin, count, space.get(Workspace::wide, std::is_same_v<W, float> ? 0 : count));
    alignas(64) float sums[VL * token_block];
    for (int64_t i = block.begin; i < block.end; i += VL) {
      const int64_t n = std::min<int64_t>(VL, block.end - i);
      for (int64_t l = 0; l < n; ++l) {
        const int64_t e = block.starts[i + l], length = block.starts[i + l + 1] - e;
        for (int64_t t = 0; t < held; t += 4 * VL) {
          const auto add = [&](auto vectors) {
            add_columns<decltype(vectors)::value>(turned + t, held, block.columns + e, values + (e - begin), length,
                                                  sums + l * held + t);
          };
          switch (std::min<int64_t>(4, (held - t) / VL)) {
            case 1: add(std::integral_constant<int, 1>()); break;
            case 2: add(std::integral_constant<int, 2>()); break;
            case 3: add(std::integral_constant<int, 3>()); break;
            case 4: add(std::integral_constant<int, 4>()); break;
          }
        }
      }
      const vi at = column_of(held, n);
      for (int64_t t = 0; t < m; ++t) {
        T* to = y[t] + block.first + i;
        fastft::store(to, load(to, n) + factors[t] * gather(sums + t, at), n);
      }
    }
  }
  return true;
}

}  // namespace fastft
