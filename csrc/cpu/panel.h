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

// What the next block of work will read, fetched into L2 a few cache lines at a time while the present one is computed:
// GEMMs between our kernels leave activations in memory, and tiles of short rows are too short for hardware prefetchers.
class Ahead {
 public:
  Ahead() = default;
  // rows x row_bytes, rows ld bytes apart, to be fetched in about `steps` calls.
  Ahead(const void* first, int64_t rows, int64_t row_bytes, int64_t ld, int64_t steps)
      : line(static_cast<const char*>(first)),
        row_end(line + row_bytes),
        skip(ld - row_bytes),
        bytes(row_bytes),
        left(rows * ((row_bytes + 63) / 64)),
        each((left + steps - 1) / std::max<int64_t>(steps, 1)) {}

  [[gnu::always_inline]] void step() {
    for (int64_t n = std::min(each, left); n > 0; --n) {
      __builtin_prefetch(line, 0, 2);
      line += 64;
      if (line >= row_end) line = row_end + skip, row_end = line + bytes;
      --left;
    }
  }

 private:
  const char *line = nullptr, *row_end = nullptr;
  int64_t skip = 0, bytes = 0, left = 0, each = 0;
};

template <int M, int V, class Unit, class Tile>
inline void tile_product(const Unit* x, int64_t x_row, int64_t x_col, int64_t depth, const Unit* p, int64_t p_row, Tile c,
                         Ahead& ahead) {
  vf sum[M][V] = {};
  c.template prefetch<M>();
  ahead.step();
  add_terms(sum, x, x_row, x_col, std::min(chain, depth), p, p_row);
  for (int64_t j = chain; j < depth; j += chain) {
    ahead.step();
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
  template <int M>
  [[gnu::always_inline]] void prefetch() const {}
  AddTo from(int64_t i, int64_t v) const { return {c + i * row + v, row}; }
  vf added(int64_t i, int64_t v, vf sum) const { return load(c + i * row + v) + sum; }
  void put(int64_t i, int64_t v, vf total) const { store(c + i * row + v, total); }
};

template <int M, class Unit, class Tile>
inline void row_group(int64_t cols, int64_t depth, Broadcast<Unit> x, Rows<Unit> p, Tile c, Ahead& ahead) {
  int64_t v = 0;
  for (; v + panel_vectors * VL <= cols; v += panel_vectors * VL)
    tile_product<M, panel_vectors>(x.p, x.row, x.col, depth, p.p + v, p.row, c.from(0, v), ahead);
  for (; v < cols; v += VL) tile_product<M, 1>(x.p, x.row, x.col, depth, p.p + v, p.row, c.from(0, v), ahead);
}

// For every row i and every v below cols in steps of VL: c.put(i, v, c.added(i, v, the sum over `depth` units of
// X[i, j] P[j][v ... v + VL))). A sum does not depend on the tiling. Columns run fastest, so that C in memory is few
// streams.
template <class Unit, class Tile>
inline void panel_product(int64_t rows, int64_t cols, int64_t depth, Broadcast<Unit> x, Rows<Unit> p, Tile c, Ahead ahead) {
  for (; rows >= panel_rows; rows -= panel_rows, x.p += panel_rows * x.row, c = c.from(panel_rows, 0))
    row_group<panel_rows>(cols, depth, x, p, c, ahead);
  switch (rows) {
    case 5: return row_group<5>(cols, depth, x, p, c, ahead);
    case 4: return row_group<4>(cols, depth, x, p, c, ahead);
    case 3: return row_group<3>(cols, depth, x, p, c, ahead);
    case 2: return row_group<2>(cols, depth, x, p, c, ahead);
    case 1: return row_group<1>(cols, depth, x, p, c, ahead);
  }
}

// How many times a panel_product calls Ahead::step.
inline int64_t product_steps(int64_t rows, int64_t cols, int64_t depth) {
  const int64_t span = panel_vectors * VL;
  return (rows + panel_rows - 1) / panel_rows * (cols / span + (cols % span + VL - 1) / VL) * ((depth + chain - 1) / chain);
}

}  // namespace fastft
