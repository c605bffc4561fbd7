// The two inner loops of the grouped ops, on rows that lie anywhere: dot products of pairs of rows (S), and sums of
// multiples of rows (y, gradients).
//
// An element's sum is formed in the same order whatever else a tile holds, so its bits don't depend on how many tokens or
// ranks there are.
#pragma once

#include "operands.h"

namespace fastft {

// Element l: the sum of v[l]'s elements.
inline vf lane_totals(const vf (&v)[VL]) {
#if defined(__AVX512F__)
  // Halves of two vectors are added side by side, then quarters of four, and so on.
  constexpr auto halves = [](vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  constexpr auto quarters = [](vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  constexpr auto pairs = [](vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  constexpr auto singles = [](vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  };
  vf quarter[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) quarter[q] = quarters(halves(v[q], v[4 + q]), halves(v[8 + q], v[12 + q]));
  return singles(pairs(quarter[0], quarter[1]), pairs(quarter[2], quarter[3]));
#elif defined(__AVX2__)
  constexpr auto halves = [](vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  };
  constexpr auto pairs = [](vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  };
  constexpr auto singles = [](vf a, vf b) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  };
  return singles(pairs(halves(v[0], v[4]), halves(v[1], v[5])), pairs(halves(v[2], v[6]), halves(v[3], v[7])));
#else
  const vf ab = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5) + __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const vf cd = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5) + __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

// Whether two rows are multiplied in pairs of neighbours: all of a vector's even elements, and all of its odd ones.
template <class X, class W>
constexpr bool in_pairs = std::is_same_v<X, bf16> && std::is_same_v<W, bf16>;

// sum[i][r] += a vector of elements (or pairs) of x[i] from k on times those of a[r].
template <int M, int R, class X, class W>
[[gnu::always_inline]] inline void add_products(vf (&sum)[M][R], const X* const* x, const W* const* a, int64_t k) {
  if constexpr (in_pairs<X, W>) {
    vu own[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) own[i] = load_bytes<vu>(x[i] + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vu w = load_bytes<vu>(a[r] + k);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
#if defined(__AVX512BF16__)
        sum[i][r] = (vf)_mm512_dpbf16_ps((__m512)sum[i][r], (__m512bh)own[i], (__m512bh)w);
#else
        sum[i][r] += (vf)(own[i] << 16) * (vf)(w << 16);
        sum[i][r] += (vf)(own[i] & 0xffff0000u) * (vf)(w & 0xffff0000u);
#endif
      }
    }
  } else {
    vf own[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) own[i] = load(x[i] + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf w = load(a[r] + k);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) sum[i][r] += own[i] * w;
    }
  }
}

// The ends of n rows, from element k to the last of `end`, continued with zeros.
template <int N, int64_t step, class T>
struct RowEnds {
  RowEnds(const T* const* rows, int64_t k, int64_t end) {
    for (int i = 0; i < N; ++i) std::memcpy(padded[i], rows[i] + k, (end - k) * sizeof(T)), at[i] = padded[i];
  }
  alignas(64) T padded[N][step] = {};
  const T* at[N];
};

// Rows that are read side by side: memory likes few streams of long rows. Each is asked for while the row that lies so many
// before it is read.
constexpr int rows_at_once = 4;

// Elements that are multiplied before their products join a total.
template <class X, class W>
constexpr int64_t dot_step = in_pairs<X, W> ? 2 * VL : VL;
template <class X, class W>
constexpr int64_t dot_block = chain * dot_step<X, W>;

// Element i * R + r: the product of n <= dot_block elements of x[i] and of a[r], from k on. After the R rows lie pointers to
// those that come next.
template <int M, int R, class X, class W>
inline vf dot_tile(const X* const* x, const W* const* a, int64_t k, int64_t n) {
  static_assert(M * R <= VL);
  constexpr int G = std::min(R, rows_at_once);
  constexpr int64_t step = dot_step<X, W>;
  const int64_t whole = k + n / step * step, end = k + n;
  vf sums[VL] = {};
#pragma GCC unroll 16
  for (int g = 0; g < R; g += G) {
    const W* const* rows = a + g;
    vf sum[M][G] = {};
    for (int64_t j = k; j < whole; j += step) {
#pragma GCC unroll 16
      for (int r = 0; r < G; ++r) __builtin_prefetch(rows[G + r] + j, 0, 3);
      add_products(sum, x, rows, j);
    }
    if (whole < end) {
      const RowEnds<M, step, X> x_ends(x, whole, end);
      const RowEnds<G, step, W> a_ends(rows, whole, end);
      add_products(sum, x_ends.at, a_ends.at, 0);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < G; ++r) sums[i * R + g + r] = sum[i][r];
  }
  return lane_totals(sums);
}

// Where sums go: columns v, v + 1, ... of row i get `sum`, of which n exist.
template <class T>
struct AddToRows {
  T* const* rows;
  bool distinct;  // or a row can be there twice, and waits for what came before
  AddToRows from(int64_t i) const { return {rows + i, distinct}; }
  [[gnu::always_inline]] void fetch(int64_t i, int64_t v) const { __builtin_prefetch(rows[i] + v, 1, 3); }
  vf added(int64_t i, int64_t v, vf sum) const { return load(rows[i] + v) + sum; }
  vf added(int64_t i, int64_t v, vf sum, int64_t n) const { return load(rows[i] + v, n) + sum; }
  void put(int64_t i, int64_t v, vf total) const { store(rows[i] + v, total); }
  void put(int64_t i, int64_t v, vf total, int64_t n) const { store(rows[i] + v, total, n); }
};

// To a float32 matrix whose rows are whole vectors.
struct AddToSums {
  float* p;
  int64_t ld;
  static constexpr bool distinct = true;
  AddToSums from(int64_t i) const { return {p + i * ld, ld}; }
  void fetch(int64_t, int64_t) const {}
  vf added(int64_t i, int64_t v, vf sum, int64_t = VL) const { return load(p + i * ld + v) + sum; }
  void put(int64_t i, int64_t v, vf total, int64_t = VL) const { store(p + i * ld + v, total); }
};

constexpr int64_t token_block = 48;    // tokens that share what is made of an adapter: whole vectors of any width
constexpr int64_t depth_step = chain;  // rows that are added one by one before they join the total
constexpr int64_t columns_step = 128, most_columns = 1024;  // of y or a gradient that one task sweeps
constexpr int tile_vectors = VL == 16 ? 4 : 2, tile_rows = 6;

template <int M, int V, bool part, class W, class To>
[[gnu::always_inline]] inline void sum_tile(const float* c, const W* const* rows, int64_t depth, int64_t col, int64_t n,
                                            To to) {
  vf sum[M][V] = {};
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) to.fetch(i, col + v * VL);
  for (int64_t j = 0; j < depth; ++j, c += token_block) {
    const W* p = rows[j] + col;
    vf b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = part ? load(p, n) : load(p + v * VL);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[i][v] += c[i] * b[v];
  }
  const auto added = [&](int i, int v) __attribute__((always_inline)) {
    return part ? to.added(i, col, sum[i][v], n) : to.added(i, col + v * VL, sum[i][v]);
  };
  const auto put = [&](int i, int v, vf total)
                       __attribute__((always_inline)) { part ? to.put(i, col, total, n) : to.put(i, col + v * VL, total); };
  if (to.distinct) {  // all loads before any store, see panel.h
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[i][v] = added(i, v);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) put(i, v, sum[i][v]);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) put(i, v, added(i, v));
  }
}

// One row of sums: rows are swept one after the other, a few side by side, and the sums wait in L1.
template <class W, class To>
void sum_one_row(const float* c, const W* const* rows, int64_t depth, int64_t cols, To to) {
  alignas(64) float sums[most_columns];
  const auto sweep = [&](auto count, int64_t j) {
    constexpr int n = decltype(count)::value;
    const bool first = j == 0, last = j + n >= depth;
    const W *own[n], *next[n];
    vf factor[n];
    for (int l = 0; l < n; ++l)
      own[l] = rows[j + l], next[l] = rows[std::min(depth - 1, j + l + n)], factor[l] = vf{} + c[(j + l) * token_block];
    int64_t v = 0;
    for (; v + VL <= cols; v += VL) {
      vf sum = first ? vf{} : load(sums + v);
#pragma GCC unroll 8
      for (int l = 0; l < n; ++l) {
        __builtin_prefetch(next[l] + v, 0, 3);
        sum += factor[l] * load(own[l] + v);
      }
      if (last)
        to.put(0, v, to.added(0, v, sum));
      else
        store(sums + v, sum);
    }
    if (v < cols) {
      vf sum = first ? vf{} : load(sums + v);
      for (int l = 0; l < n; ++l) sum += factor[l] * load(own[l] + v, cols - v);
      if (last)
        to.put(0, v, to.added(0, v, sum, cols - v), cols - v);
      else
        store(sums + v, sum);
    }
  };
  int64_t j = 0;
  for (; j + rows_at_once <= depth; j += rows_at_once) sweep(std::integral_constant<int, rows_at_once>(), j);
  for (; j < depth; ++j) sweep(std::integral_constant<int, 1>(), j);
}

// Row i of `to` gets Σ_j c[j * token_block + i] rows[j], m rows of `cols` columns each, depth <= depth_step.
template <class W, class To>
void sum_rows(int64_t m, const float* c, const W* const* rows, int64_t depth, int64_t cols, To to) {
  if (m == 1) return sum_one_row(c, rows, depth, cols, to);
  // Groups of tokens as equal as can be, two or more each; a block of columns stays in L1 for all of them.
  const int64_t groups = (m + tile_rows - 1) / tile_rows, larger = m % groups, smaller = m / groups;
  const auto sweep = [&](auto vectors, auto part, int64_t col) {
    int64_t i = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const auto tile = [&](auto size) {
        sum_tile<decltype(size)::value, decltype(vectors)::value, decltype(part)::value>(
            c + i, rows, depth, col, std::min<int64_t>(VL, cols - col), to.from(i));
        i += size;
      };
      switch (smaller + (g < larger)) {
        case 2: tile(std::integral_constant<int, 2>()); break;
        case 3: tile(std::integral_constant<int, 3>()); break;
        case 4: tile(std::integral_constant<int, 4>()); break;
        case 5: tile(std::integral_constant<int, 5>()); break;
        case 6: tile(std::integral_constant<int, 6>()); break;
      }
    }
  };
  int64_t col = 0;
  for (; col + tile_vectors * VL <= cols; col += tile_vectors * VL)
    sweep(std::integral_constant<int, tile_vectors>(), std::false_type(), col);
  for (; col + VL <= cols; col += VL) sweep(std::integral_constant<int, 1>(), std::false_type(), col);
  if (col < cols) sweep(std::integral_constant<int, 1>(), std::true_type(), col);
}

}  // namespace fastft
