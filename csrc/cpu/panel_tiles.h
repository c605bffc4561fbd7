// panel_product on AMX's tiles: of 16 rows and up to 64 columns at a time, for operands of pairs.
//
// A float32 operand comes as a sum of bfloat16 parts, each of 8 of its 24 bits: three parts beside bfloat16 terms make
// products that are exact in float32, two make them of 16 bits. Denormals count as zeros, as in AVX-512's products of pairs;
// an infinity beside parts that are zero becomes NaN.
#pragma once

#include "panel.h"
#include "tiles.h"

#include <utility>

#if defined(FASTFT_TILES)
namespace fastft {

template <int n, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      __attribute__((always_inline)) { (f(std::integral_constant<int, i>()), ...); }(std::make_integer_sequence<int, n>());
}

// The sums of `V` vectors, in `S` tiles each that take turns: a product waits for the one before it in the same tile.
template <int V, int S, int x_parts, int p_parts>
[[gnu::always_inline]] inline void add_tiles(int64_t step, int64_t steps, DepthInRows<bf16x2> x, Strips<bf16x2> p,
                                             Ahead& ahead) {
  unrolled<V * S>([](auto t) __attribute__((always_inline)) { tiles::zero<t>(); });
  for (int64_t k = 0; k < steps; k += S)
    unrolled<S>([&](auto s) __attribute__((always_inline)) {
      if (s > 0 && k + s >= steps) return;
      constexpr int in_x = tiles::first_x + s % 2;
      const int64_t unit = (k + s) * step;
      ahead.step();
      unrolled<x_parts * p_parts>([&](auto n) __attribute__((always_inline)) {
        static_assert(x_parts == 1 || p_parts == 1);
        constexpr int x_part = p_parts == 1 ? n : 0, p_part = p_parts == 1 ? 0 : n;
        if constexpr (n == 0 || x_parts > 1) tiles::load<in_x>(x.p + x_part * x.part + unit, x.row * sizeof(bf16x2));
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
          constexpr int in_p = tiles::first_p + v % 2;
          tiles::load<in_p>(p.at(v * VL) + p_part * p.part + unit * p.row, p.row * sizeof(bf16x2));
          tiles::multiply_add<v * S + (s + n) % S, in_x, in_p>();
        });
      });
    });
}

// Rows [i, i + M) of W vectors of sums from vector `v` on. All of C is loaded before any of it is stored, as in panel.h's
// tile_product.
template <int M, int W, int S, class Tile>
[[gnu::always_inline]] inline void put_rows(const float* sums, int64_t i, int64_t v, Tile c) {
  constexpr int64_t tile = tiles::rows * VL;
  vf total[M][W];
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const float* sum = sums + (v + w) * S * tile + (i + j) * VL;
      vf all = load(sum);
      if constexpr (S == 2) all += load(sum + tile);
      if constexpr (S == 4) all = (all + load(sum + tile)) + (load(sum + 2 * tile) + load(sum + 3 * tile));
      total[j][w] = c.added(i + j, (v + w) * VL, all);
    }
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) c.put(i + j, (v + w) * VL, total[j][w]);
}

template <int V, int x_parts, int p_parts, class Tile>
inline void tile_columns(int64_t m, int64_t step, int64_t steps, DepthInRows<bf16x2> x, Strips<bf16x2> p, Tile c,
                         Ahead& ahead) {
  constexpr int S = V == 3 ? 1 : tiles::sums / V;
  alignas(64) float sums[V * S][tiles::rows * VL];
  add_tiles<V, S, x_parts, p_parts>(step, steps, x, p, ahead);
  unrolled<V * S>([&](auto t) __attribute__((always_inline)) { tiles::store<t>(sums[t], VL * sizeof(float)); });
  // Eight rows at a time: rows a multiple of 4 KiB apart share a set of L1, which has twelve ways.
  for (int64_t i = 0; i < m;) {
    const auto put = [&](auto rows) {
      for (int64_t v = 0; v + 2 <= V; v += 2) put_rows<rows, 2, S>(sums[0], i, v, c);
      if constexpr (V % 2) put_rows<rows, 1, S>(sums[0], i, V - 1, c);
      i += rows;
    };
    if (i + 8 <= m)
      put(std::integral_constant<int, 8>());
    else
      put(std::integral_constant<int, 1>());
  }
}

template <int x_parts, int p_parts, class Tile>
inline void tile_products(int64_t rows, int64_t cols, int64_t depth, DepthInRows<bf16x2> x, Strips<bf16x2> p, Tile c,
                          Ahead& ahead) {
  const int64_t step = std::min(depth, tiles::depth), steps = step ? depth / step : 0;
  for (; rows > 0; rows -= tiles::rows, x = x.from(tiles::rows, 0), c = c.from(tiles::rows, 0)) {
    const int64_t m = std::min(rows, tiles::rows);
    tiles::shape(m, std::max<int64_t>(step, 1));
    for (int64_t v = 0; v < cols; v += tiles::sums * VL) {
      const auto take = [&](auto vectors) {
        Strips<bf16x2> from = p;
        from.p = p.at(v);
        tile_columns<vectors, x_parts, p_parts>(m, step, steps, x, from, c.from(0, v), ahead);
      };
      switch ((cols - v + VL - 1) / VL) {
        case 1: take(std::integral_constant<int, 1>()); break;
        case 2: take(std::integral_constant<int, 2>()); break;
        case 3: take(std::integral_constant<int, 3>()); break;
        default: take(std::integral_constant<int, 4>());
      }
    }
  }
}

// As the one in panel.h, of a depth of product_units. Only what there is is compiled: coefficients, of two parts, are what
// Y and dX are made of; sums in float32 come of activations and an adapter, or S, of one part or three (operands.h).
template <class Tile>
inline void panel_product(int64_t rows, int64_t cols, int64_t depth, DepthInRows<bf16x2> x, Strips<bf16x2> p, Tile c,
                          Ahead ahead) {
  if constexpr (std::is_same_v<Tile, AddTo>) {
    if (x.parts == 3) return tile_products<3, 1>(rows, cols, depth, x, p, c, ahead);
    if (p.parts == 3) return tile_products<1, 3>(rows, cols, depth, x, p, c, ahead);
    return tile_products<1, 1>(rows, cols, depth, x, p, c, ahead);
  } else {
    return tile_products<2, 1>(rows, cols, depth, x, p, c, ahead);
  }
}

}  // namespace fastft
#endif
