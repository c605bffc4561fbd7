// The one inner loop of the low-rank kernels, C[i][v] += sum_j X[i, j] P[j][v].
//
// X is a broadcast operand with any two strides, P a panel whose rows are read as vectors; the float32 sums go where a tile
// says. All five LoRA kernels are this product: S and dS (X = activations, P = the adapter), Y and dX (X = S or dS, P = the
// adapter), dA and dB (X = dS or S transposed, P = activations). A unit of X and P is a float32, or a pair of bfloat16 terms
// where the CPU multiplies those (avx512_bf16) and the adapter is bfloat16 too; operands.h makes either from tensors.
#pragma once

#include "vec.h"

#include <algorithm>

namespace fastft {

constexpr int panel_vectors = 2;  // vectors of P that one register tile spans
constexpr int panel_rows = 6;     // rows of X in one register tile: 12 accumulators, so that AVX2's 16 registers do
constexpr int64_t chain = 32;     // units added one by one before they join the total: rounding error grows with
                                  // sqrt(chain) + sqrt(depth / chain), as in a vendor GEMM, not with sqrt(depth)

template <int M, int V, class Unit>
[[gnu::always_inline]] inline void add_terms(vf (&sum)[M][V], const Unit* x, int64_t x_row, int64_t x_col, int64_t depth,
                                             const Unit* p, int64_t p_row) {
  for (int64_t j = 0; j < depth; ++j, x += x_col, p += p_row)
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(sum[i][v], x[i * x_row], p + v * VL);
}

template <int M, int V, class Unit, class Tile>
inline void tile_product(const Unit* x, int64_t x_row, int64_t x_col, int64_t depth, const Unit* p, int64_t p_row, Tile c) {
  vf sum[M][V] = {};
  add_terms(sum, x, x_row, x_col, std::min(chain, depth), p, p_row);
  for (int64_t j = chain; j < depth; j += chain) {
    vf more[M][V] = {};
    add_terms(more, x + j * x_col, x_row, x_col, std::min(chain, depth - j), p + j * p_row, p_row);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[i][v] += more[i][v];
  }
  // Unrolled, or the accumulators would be an array in memory (measured: 4 times slower). All of C is loaded before any of
  // it is stored: rows a multiple of 4 KiB apart would make each load wait for the store before it (measured: 1.7 times
  // slower).
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[i][v] = c.added(i, v * VL, sum[i][v]);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) c.put(i, v * VL, sum[i][v]);
}

// The broadcast operand: element (i, j) at p[i * row + j * col].
template <class Unit>
struct Broadcast {
  const Unit* p;
  int64_t row, col;
};

// The operand read as vectors: element (j, v) at p[j * row + v], rows readable to a whole vector.
template <class Unit>
struct Rows {
  const Unit* p;
  int64_t row;
};

// Where sums go by default: added to a float32 matrix whose rows are readable and writable to a whole vector.
struct AddTo {
  float* c;
  int64_t row;
  AddTo from(int64_t i, int64_t v) const { return {c + i * row + v, row}; }
  vf added(int64_t i, int64_t v, vf sum) const { return load(c + i * row + v) + sum; }
  void put(int64_t i, int64_t v, vf total) const { store(c + i * row + v, total); }
};

template <int M, class Unit, class Tile>
inline void row_group(int64_t cols, int64_t depth, Broadcast<Unit> x, Rows<Unit> p, Tile c) {
  int64_t v = 0;
  for (; v + panel_vectors * VL <= cols; v += panel_vectors * VL)
    tile_product<M, panel_vectors>(x.p, x.row, x.col, depth, p.p + v, p.row, c.from(0, v));
  for (; v < cols; v += VL) tile_product<M, 1>(x.p, x.row, x.col, depth, p.p + v, p.row, c.from(0, v));
}

// For every row i and every v below cols in steps of VL: c.put(i, v, c.added(i, v, the sum over `depth` units of
// X[i, j] P[j][v ... v + VL))). A sum does not depend on the tiling. Columns run fastest, so that C in memory is few
// streams.
template <class Unit, class Tile>
inline void panel_product(int64_t rows, int64_t cols, int64_t depth, Broadcast<Unit> x, Rows<Unit> p, Tile c) {
  for (; rows >= panel_rows; rows -= panel_rows, x.p += panel_rows * x.row, c = c.from(panel_rows, 0))
    row_group<panel_rows>(cols, depth, x, p, c);
  switch (rows) {
    case 5: return row_group<5>(cols, depth, x, p, c);
    case 4: return row_group<4>(cols, depth, x, p, c);
    case 3: return row_group<3>(cols, depth, x, p, c);
    case 2: return row_group<2>(cols, depth, x, p, c);
    case 1: return row_group<1>(cols, depth, x, p, c);
  }
}

}  // namespace fastft
