// The one inner loop of the low-rank kernels, C[i][v] += sum_j X[i, j] P[j][v].
//
// X is a broadcast operand, P one whose rows are read as vectors; the float32 sums go where a tile says. All five LoRA
// kernels are this product: S and dS (X = activations, P = the adapter), Y and dX (X = S or dS, P = the adapter), dA and dB
// (X = dS or S transposed, P = activations). A unit of X and P is a float32, or a pair of bfloat16 terms where the CPU
// multiplies those (avx512_bf16) and the adapter is bfloat16 too; operands.h makes either from tensors.
#pragma once

#include "tiles.h"
#include "vec.h"

#include <algorithm>
#include <type_traits>

namespace fastft {

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Terms of a sum in one unit, and units of n terms.
template <class Unit>
constexpr int64_t terms = std::is_same_v<Unit, bf16x2> ? 2 : 1;

template <class Unit>
constexpr int64_t units(int64_t n) {
  return (n + terms<Unit> - 1) / terms<Unit>;
}

// Whether products of such units are AMX's.
template <class Unit>
constexpr bool in_tiles = tiles::exist && terms<Unit> == 2;

// Units that a product of n terms has.
template <class Unit>
constexpr int64_t product_units(int64_t n) {
  return in_tiles<Unit> ? tiles::padded(units<Unit>(n)) : units<Unit>(n);
}

constexpr int panel_vectors = 2;               // vectors of P that one register tile spans
constexpr int panel_rows = VL == 16 ? 12 : 6;  // rows of X in it: 24 sums in AVX-512's 32 registers, 12 in 16
constexpr int64_t chain = 32;  // units added one by one before they join the total: rounding error grows with
                               // sqrt(chain) + sqrt(depth / chain), as in a vendor GEMM, not with sqrt(depth)

// The broadcast operand in one of two orders. Element (i, j) at p[i * row + j]; with tiles (panel_tiles.h) it may be the sum
// of several parts, `part` units apart.
template <class UnitT>
struct DepthInRows {
  using Unit = UnitT;
  const Unit* p;
  int64_t row;
  int64_t part = 0;
  int parts = 1;
  DepthInRows from(int64_t i, int64_t j) const { return {p + i * row + j, row, part, parts}; }
};

// Element (i, j) at p[i + j * row]:
template <class UnitT>
struct DepthInColumns {
  using Unit = UnitT;
  const Unit* p;
  int64_t row;
  DepthInColumns from(int64_t i, int64_t j) const { return {p + i + j * row, row}; }
};

// One pointer reaches so many rows: x86 multiplies an index by 1, 2, 4 and 8.
constexpr int reach = 3;

// A vector of P in a register: without the assembly GCC reads it anew for each row (measured with AVX2: 1.5 times as long).
template <class Unit>
[[gnu::always_inline]] inline vf panel_vector(const Unit* p) {
  vf vector = load_bytes<vf>(p);
#if defined(__x86_64__)
  asm("" : "+x"(vector));
#endif
  return vector;
}

template <int I, int M, int V, class Unit>
[[gnu::always_inline]] inline void add_term_of_rows(vf (&sum)[M][V], const Unit*& x, int64_t row, const vf (&p)[V]) {
  constexpr int rows = std::min(reach, M - I);
  if constexpr (rows > 0) {
    asm("" : "+r"(x));  // a register of its own, or the compiler would derive it from another
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[I + i][v] = multiply_add(sum[I + i][v], x[i * row], p[v]);
    ++x;
  }
}

// sum[i][v] += X[i, j] P[j][v] for all j below depth. All addresses are in registers: a load of one would cost as much as
// a term.
template <int M, int V, class Unit>
[[gnu::always_inline]] inline void add_terms(vf (&sum)[M][V], DepthInRows<Unit> x, int64_t depth, const Unit* p,
                                             int64_t p_row) {
  static_assert(M <= 4 * reach);
  const Unit *x0 = x.p, *x1 = x0 + reach * x.row, *x2 = x1 + reach * x.row, *x3 = x2 + reach * x.row;
  for (int64_t j = 0; j < depth; ++j, p += p_row) {
    vf vectors[V];
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) vectors[v] = panel_vector(p + v * VL);
    add_term_of_rows<0>(sum, x0, x.row, vectors);
    add_term_of_rows<reach>(sum, x1, x.row, vectors);
    add_term_of_rows<2 * reach>(sum, x2, x.row, vectors);
    add_term_of_rows<3 * reach>(sum, x3, x.row, vectors);
  }
}

template <int M, int V, class Unit>
[[gnu::always_inline]] inline void add_terms(vf (&sum)[M][V], DepthInColumns<Unit> x, int64_t depth, const Unit* p,
                                             int64_t p_row) {
  for (int64_t j = 0; j < depth; ++j, x.p += x.row, p += p_row) {
    vf vectors[V];
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) vectors[v] = panel_vector(p + v * VL);
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(sum[i][v], x.p[i], vectors[v]);
  }
}

// What the next block of work will read, fetched into L2 a few cache lines at a time while the present one is computed:
// GEMMs between our kernels leave activations in memory, and tiles of short rows are too short for hardware prefetchers.
class Ahead {
 public:
  Ahead() = default;
  // rows x row_bytes, rows ld bytes apart, to be fetched in about `steps` calls.
  Ahead(const void* first, int64_t rows, int64_t row_bytes, int64_t ld, int64_t steps)
      : at(static_cast<const char*>(first)),
        row_end(at + row_bytes),
        skip(ld - round_up(row_bytes, piece)),
        bytes(row_bytes),
        left(rows * (round_up(row_bytes, piece) / piece)),
        each((left + steps - 1) / std::max<int64_t>(steps, 1)) {}

  [[gnu::always_inline]] void step() {
    for (int64_t n = std::min(each, left); n > 0; --n) {
      for (int64_t line = 0; line < piece; line += 64) __builtin_prefetch(at + line, 0, 2);
      at += piece;
      if (at >= row_end) at += skip, row_end = at + bytes;
      --left;
    }
  }

 private:
  static constexpr int64_t piece = 256;  // bytes that are asked for together
  const char *at = nullptr, *row_end = nullptr;
  int64_t skip = 0, bytes = 0, left = 0, each = 0;
};

template <int M, int V, class X, class Tile>
inline void tile_product(X x, int64_t depth, const typename X::Unit* p, int64_t p_row, Tile c, Ahead& ahead) {
  vf sum[M][V] = {};
  alignas(64) float total[M * V * VL];  // in memory: all registers are needed for the sums
  c.template prefetch<M>();
  for (int64_t j = 0;; j += chain) {
    ahead.step();
    add_terms(sum, x.from(0, j), std::min(chain, depth - j), p + j * p_row, p_row);
    if (j + chain >= depth) break;
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) {
        float* to = total + (i * V + v) * VL;
        store(to, j == 0 ? sum[i][v] : load(to) + sum[i][v]);
        sum[i][v] = vf{};
      }
  }
  if (depth > chain)
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[i][v] += load(total + (i * V + v) * VL);
  // Unrolled, or the accumulators would be an array in memory (measured: 4 times slower). All of C is loaded before any of
  // it is stored: rows a multiple of 4 KiB apart would make each load wait for the store before it (measured: 1.7 times
  // slower).
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) sum[i][v] = c.added(i, v * VL, sum[i][v]);
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) c.put(i, v * VL, sum[i][v]);
}

// The operand read as vectors: strips of `strip_cols` columns, `strip` units apart, in each of which element (j, v) is at
// p[j * row + v], readable to a whole vector. A matrix in rows has its strips side by side. Parts as in DepthInRows.
constexpr int64_t strip_cols = 32;

template <class Unit>
struct Strips {
  const Unit* p;
  int64_t row, strip = strip_cols;
  int64_t part = 0;
  int parts = 1;
  const Unit* at(int64_t v) const { return p + v / strip_cols * strip + v % strip_cols; }
};

// Where sums go by default: added to a float32 matrix whose rows are readable and writable to a whole vector. `one_vector`:
// products with no more columns than that, for which half the code is not compiled.
struct AddTo {
  static constexpr bool one_vector = false;
  float* c;
  int64_t row;
  template <int M>
  [[gnu::always_inline]] void prefetch() const {}
  AddTo from(int64_t i, int64_t v) const { return {c + i * row + v, row}; }
  vf added(int64_t i, int64_t v, vf sum) const { return load(c + i * row + v) + sum; }
  void put(int64_t i, int64_t v, vf total) const { store(c + i * row + v, total); }
};

template <int M, class X, class Tile>
inline void row_group(int64_t cols, int64_t depth, X x, Strips<typename X::Unit> p, Tile c, Ahead& ahead) {
  int64_t v = 0;
  if constexpr (!Tile::one_vector)
    for (; v + panel_vectors * VL <= cols; v += panel_vectors * VL)
      tile_product<M, panel_vectors>(x, depth, p.at(v), p.row, c.from(0, v), ahead);
  for (; v < cols; v += VL) tile_product<M, 1>(x, depth, p.at(v), p.row, c.from(0, v), ahead);
}

// For every row i and every v below cols in steps of VL: c.put(i, v, c.added(i, v, the sum over `depth` units of
// X[i, j] P[j][v ... v + VL))). A sum does not depend on the tiling. Columns run fastest, so that C in memory is few
// streams.
template <class X, class Tile>
inline void panel_product(int64_t rows, int64_t cols, int64_t depth, X x, Strips<typename X::Unit> p, Tile c, Ahead ahead) {
  const auto take = [&](auto m) {
    row_group<m>(cols, depth, x, p, c, ahead);
    rows -= m, x = x.from(m, 0), c = c.from(m, 0);
  };
  // Of 16 rows 12 and 4 would be too few sums at a time for the 4.
  while (rows >= panel_rows && (panel_rows < 12 || rows != 16)) take(std::integral_constant<int, panel_rows>());
  if constexpr (panel_rows > 8)
    while (rows >= 8) take(std::integral_constant<int, 8>());
  if (rows >= 4) take(std::integral_constant<int, 4>());
  switch (rows) {
    case 3: return row_group<3>(cols, depth, x, p, c, ahead);
    case 2: return row_group<2>(cols, depth, x, p, c, ahead);
    case 1: return row_group<1>(cols, depth, x, p, c, ahead);
  }
}

// How many times a panel_product calls Ahead::step.
template <class Unit>
inline int64_t product_steps(int64_t rows, int64_t cols, int64_t depth) {
  if (in_tiles<Unit>)
    return (rows + tiles::rows - 1) / tiles::rows * ((cols + 4 * VL - 1) / (4 * VL)) *
           ((depth + tiles::depth - 1) / tiles::depth);
  const int64_t span = panel_vectors * VL;
  return (rows + panel_rows - 1) / panel_rows * (cols / span + (cols % span + VL - 1) / VL) * ((depth + chain - 1) / chain);
}

}  // namespace fastft
