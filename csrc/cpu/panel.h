// The one inner loop of the low-rank kernels, C[i][v] += sum_j X[i, j] P[j][v].
//
// X is a broadcast operand with any two strides, P a panel whose rows are read as vectors, C float32. All five LoRA kernels
// are this product: S and dS (X = activations, P = the adapter), Y and dX (X = S or dS, P = the adapter), dA and dB (X = dS or
// S transposed, P = activations). A unit of X and P is a float32, or a pair of bfloat16 terms where the CPU multiplies
// those (avx512_bf16) and the adapter is bfloat16 too; operands.h makes either from tensors.
#pragma once

#include "vec.h"

#include <algorithm>

namespace fastft {

constexpr int panel_vectors = 2;  // vectors of P that one register tile spans
constexpr int panel_rows = 6;     // rows of X in one register tile: 12 accumulators, so that AVX2's 16 registers do
constexpr int64_t chain = 32;     // units added one by one before they join the total: rounding error grows with
                                  // sqrt(chain) + sqrt(depth / chain), as in a vendor GEMM, not with sqrt(depth)

template <int M, int V, class Unit>
inline void tile_product(const Unit* x, int64_t x_row, int64_t x_col, int64_t depth, const Unit* p, int64_t p_row, float* c,
                         int64_t c_row) {
  for (int64_t j = 0; j < depth;) {
    vf sum[M][V] = {};
    for (int64_t end = std::min(j + chain, depth); j < end; ++j)
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(sum[i][v], x[i * x_row + j * x_col], p + j * p_row + v * VL);
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) {
        float* to = c + i * c_row + v * VL;
        store(to, load(to) + sum[i][v]);
      }
  }
}

template <int V, class Unit>
inline void tile_rows(int64_t rows, const Unit* x, int64_t x_row, int64_t x_col, int64_t depth, const Unit* p, int64_t p_row,
                      float* c, int64_t c_row) {
  int64_t i = 0;
  for (; i + panel_rows <= rows; i += panel_rows)
    tile_product<panel_rows, V>(x + i * x_row, x_row, x_col, depth, p, p_row, c + i * c_row, c_row);
  x += i * x_row, c += i * c_row;
  switch (rows - i) {
    case 5: return tile_product<5, V>(x, x_row, x_col, depth, p, p_row, c, c_row);
    case 4: return tile_product<4, V>(x, x_row, x_col, depth, p, p_row, c, c_row);
    case 3: return tile_product<3, V>(x, x_row, x_col, depth, p, p_row, c, c_row);
    case 2: return tile_product<2, V>(x, x_row, x_col, depth, p, p_row, c, c_row);
    case 1: return tile_product<1, V>(x, x_row, x_col, depth, p, p_row, c, c_row);
  }
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

// C [rows, cols] += X P over `depth` units, cols a multiple of VL. A C element's sum does not depend on the tiling.
template <class Unit>
inline void panel_product(int64_t rows, int64_t cols, int64_t depth, Broadcast<Unit> x, Rows<Unit> p, float* c, int64_t c_row) {
  int64_t v = 0;
  for (; v + panel_vectors * VL <= cols; v += panel_vectors * VL)
    tile_rows<panel_vectors>(rows, x.p, x.row, x.col, depth, p.p + v, p.row, c + v, c_row);
  if (v < cols) tile_rows<1>(rows, x.p, x.row, x.col, depth, p.p + v, p.row, c + v, c_row);
}

}  // namespace fastft
