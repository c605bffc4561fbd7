// What the families of low-rank updates share on CPU: adding a low-rank term to an activation, and sums over tokens.
//
// Work is split by shape alone and partial sums are added in a fixed order, so results do not depend on the number of
// threads.
#pragma once

#include "operands.h"

namespace fastft {

constexpr auto f32 = ScalarType::Float;
constexpr auto b16 = ScalarType::BFloat16;
constexpr auto h16 = ScalarType::Half;
constexpr auto i32 = ScalarType::Int;
constexpr auto i64 = ScalarType::Long;

constexpr int64_t block_t = 24, block_c = 256;  // tokens x channels of an activation tile: 24 KiB of float32
constexpr int64_t update_c = 1024;              // channels of Y and dX that one task sweeps: long rows are what memory likes

// Tokens of a tile where a rank is large: sums over tokens that go to memory once a tile would spend their time there, and
// panels larger than L2 be read from memory once a tile.
// AMX's products are so fast that sums which go to memory cost more than they do at any rank.
template <class Unit>
inline int64_t tile_tokens(int64_t ranks) {
  if (in_tiles<Unit>) return 64;
  return ranks <= 64 ? block_t : ranks <= 128 ? 2 * block_t : 4 * block_t;
}

// Tokens of a tile of Y and dX: whole tiles of AMX's.
template <class Unit>
constexpr int64_t update_t = in_tiles<Unit> ? 2 * tiles::rows : block_t;

// Fetches what a tile of two vectors a few tiles further along this row will read and write.
// Always inlined: GCC drops calls of functions that do nothing but prefetch (measured: twice the time on cold memory).
template <class T>
[[gnu::always_inline]] inline void fetch_ahead(const T* row) {
  constexpr int64_t bytes = 384;
  __builtin_prefetch(reinterpret_cast<const char*>(row) + bytes, 1, 3);
  if (panel_vectors * VL * sizeof(T) > 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + bytes + 64, 1, 3);
}

// What a caller's make_tile(t, c, cols, part) makes, tokens [t, t + rows) x channels [c, c + cols) of an activation, gets
// the product of factor · S [T, R] with a panel [units(R)][·], from its column `panel_c` on. `part`: the last vector of a
// row, of which `cols` columns exist.
template <class Unit, class P, class MakeTile>
void add_low_rank_block(Coefficients s, int64_t t, int64_t rows, int64_t c, int64_t cols, const P& panel, int64_t panel_c,
                        float factor, const MakeTile& make_tile) {
  const int64_t depth = product_units<Unit>(s.ranks), whole = cols / VL * VL;
  Scratch<Unit> scaled(rows * rank_floats<Unit>(s.ranks));
  const auto x = rank_coefficients<Unit>(s, t, rows, factor, scaled.get());
  panel_product(rows, whole, depth, x, panel.at(0, panel_c), make_tile(t, c, whole, std::false_type()), Ahead());
  if (whole < cols)
    panel_product(rows, VL, depth, x, panel.at(0, panel_c + whole), make_tile(t, c + whole, cols - whole, std::true_type()),
                  Ahead());
}

// The same for all of an activation [T, C], in tasks of update_t tokens x 1024 channels, with a panel of all C.
template <class Unit, class P, class MakeTile>
void add_low_rank(int64_t tokens, int64_t C, Coefficients s, const P& panel, float factor, const MakeTile& make_tile) {
  constexpr int64_t tall = update_t<Unit>;
  const double cost = read_cost(4.0 * tokens * C) + product_cost(1.0 * tokens * C * s.ranks);
  parallel_for(blocks(tokens, tall) * blocks(C, update_c), cost, [&](int64_t task) {
    const int64_t c = task % blocks(C, update_c) * update_c, t = task / blocks(C, update_c) * tall;
    add_low_rank_block<Unit>(s, t, std::min(tall, tokens - t), c, std::min(update_c, C - c), panel, c, factor, make_tile);
  });
}

// Adds to an activation in its own dtype, rounded once. Of a `part` vector the first `cols` columns are there.
template <class T, bool masked, bool part>
struct AddToActivation {
  static constexpr bool one_vector = part;
  T* to;
  int64_t ld, cols;
  Mask mask;
  int64_t t, c;  // of `to` in the mask
  AddToActivation from(int64_t i, int64_t v) const { return {to + i * ld + v, ld, cols, mask, t + i, c + v}; }
  template <int M>
  [[gnu::always_inline]] void prefetch() const {
    if constexpr (!part)
      for (int i = 0; i < M; ++i) fetch_ahead(to + i * ld);
  }
  vf added(int64_t i, int64_t v, vf sum) const {
    // Adding -0 changes no bit, not even those of a zero.
    if constexpr (masked) sum = mask.keep(t + i, c + v) ? sum : -vf{};
    if constexpr (part) return load(to + i * ld + v, cols) + sum;
    return load(to + i * ld + v) + sum;
  }
  void put(int64_t i, int64_t v, vf total) const {
    if constexpr (part) return store(to + i * ld + v, total, cols);
    store(to + i * ld + v, total);
  }
};

template <bool masked, class T>
auto add_to_activation(T* to, int64_t ld, Mask mask) {
  return [=](int64_t t, int64_t c, int64_t cols, auto part) {
    return AddToActivation<T, masked, decltype(part)::value>{to + t * ld + c, ld, cols, mask, t, c};
  };
}

// Partial sums of a product over tokens, out [R, C] = Σ_t s[t]ᵀ x[t]: one float32 part a chunk of tokens, in order.
struct TokenParts {
  // As many chunks as it takes for 16 tasks of `slabs` columns each, so that several threads find work; of a length that
  // keeps what the parts move under a quarter of the activation's bytes up to rank 60, from where on products cost more than
  // bytes; and below 2016 tokens, so that they stay in a cache.
  TokenParts(int64_t tokens, int64_t r, int64_t c, int64_t slabs, int64_t block)
      : chunk(chunk_length(tokens, r, slabs, block)),
        count(blocks(tokens, chunk)),
        rows(r),
        row(round_up(c, VL)),
        parts(count * r * row) {}

  static int64_t chunk_length(int64_t tokens, int64_t r, int64_t slabs, int64_t block) {
    const int64_t shortest = std::clamp<int64_t>(8 * r, 240, 480);
    const int64_t wanted = std::max(blocks(16, std::max<int64_t>(slabs, 1)), blocks(tokens, 2016));
    const int64_t count = std::max<int64_t>(1, std::min(wanted, tokens / shortest));
    return std::max(block, round_up(blocks(tokens, count), block));
  }

  float* clear(int64_t part, int64_t c, int64_t cols) const {
    float* to = parts.get() + part * rows * row + c;
    for (int64_t r = 0; r < rows; ++r) std::fill_n(to + r * row, round_up(cols, VL), 0.0f);
    return to;
  }
  vf total(int64_t r, int64_t c) const {
    vf sum = {};
    for (int64_t part = 0; part < count; ++part) sum += load(parts.get() + (part * rows + r) * row + c);
    return sum;
  }

  const int64_t chunk, count, rows, row;
  Scratch<float> parts;
};

}  // namespace fastft
