// LoRA's products for few tokens, as in decoding. They cost what it takes to read the adapter: each of its bytes is read
// once, by one task, and packed in a piece that stays in L1 or L2. (Kernels for many tokens pack all of it before they
// begin, and share tokens among threads, of which there is one block here.)
//
// Work is split by shape alone and parts are added in a fixed order, so results do not depend on the number of threads.
#pragma once

#include "low_rank.h"
#include "shares.h"

namespace fastft {

constexpr int64_t few_tokens = 32;  // where the two kinds of kernels take the same time (an AMD EPYC, ranks 16 and 64)

constexpr int64_t piece_floats = 8192;  // of a packed piece: 32 KiB

// Columns of an adapter's transpose that `rows` of it leave room for in a piece, in whole strips.
inline int64_t piece_columns(int64_t rows) {
  return std::clamp(piece_floats / std::max<int64_t>(rows, 1) / 32 * 32, int64_t{64}, block_c);
}

// S = X Aᵀ [T, R]: a part for each `chunk` of features.
template <class T, class Unit>
class FewShrink {
 public:
  FewShrink(const T* x, int64_t ld, int64_t tokens, const Tensor& a)
      : x(x),
        ld(ld),
        tokens(tokens),
        features(a.size(1)),
        ranks(a.size(0)),
        row(round_up(ranks, VL)),
        chunk(round_up(std::max<int64_t>(1, blocks(features, most_chunks)), block_c)),
        a(a),
        sums(tasks() * tokens * row) {}

  int64_t tasks() const { return blocks(features, chunk); }
  double cost() const { return read_cost(4.0 * features * ranks) + product_cost(1.0 * tokens * features * ranks); }

  void run(int64_t task) const {
    const int64_t end = std::min((task + 1) * chunk, features), tall = tile_tokens<Unit>(ranks), wide = piece_columns(row);
    float* to = sums.get() + task * tokens * row;
    std::fill_n(to, tokens * row, 0.0f);
    const Scratch<Unit> tile(std::min(tall, tokens) * round_up(wide, 2 * tiles::depth));
    for (int64_t k = task * chunk; k < end; k += wide) {
      const int64_t cols = std::min(wide, end - k);
      const TransposedPanel<Unit> panel(a, 0, ranks, k, cols, parts_of<Unit>(a));
      for (int64_t t = 0; t < tokens; t += tall) {
        const int64_t rows = std::min(tall, tokens - t);
        panel_product(rows, row, product_units<Unit>(cols), feature_tile<Unit>(x, ld, t, rows, k, cols, {}, tile.get()),
                      panel.at(0, 0), AddTo{to + t * row, row}, Ahead());
      }
    }
  }

  // All tasks have run: S to rows of `to`, `to_row` floats apart.
  void total(float* to, int64_t to_row) const {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < ranks; r += VL) {
        vf sum = {};
        for (int64_t task = 0; task < tasks(); ++task) sum += load(sums.get() + (task * tokens + t) * row + r);
        store(to + t * to_row + r, sum, ranks - r);
      }
  }

 private:
  static constexpr int64_t most_chunks = 16;
  const T* x;
  const int64_t ld, tokens, features, ranks, row, chunk;
  const Tensor& a;
  const Scratch<float> sums;
};

// factor · S Bᵀ for the tiles of add_low_rank: a task for each slab of channels.
template <class Unit, class MakeTile>
class FewExpand {
 public:
  FewExpand(int64_t tokens, const Tensor& b, double factor, const MakeTile& make_tile, const Unit*)
      : tokens(tokens),
        channels(b.size(0)),
        ranks(b.size(1)),
        slab(piece_columns(ranks)),
        factor(static_cast<float>(factor)),
        b(b),
        make_tile(make_tile) {}

  int64_t tasks() const { return blocks(channels, slab); }
  double cost() const {
    return read_cost(4.0 * channels * (ranks + tokens)) + product_cost(1.0 * tokens * channels * ranks);
  }

  void run(int64_t task, Coefficients s) const {
    constexpr int64_t tall = update_t<Unit>;
    const int64_t n = task * slab, cols = std::min(slab, channels - n);
    const TransposedPanel<Unit> panel(b, n, cols, 1);
    for (int64_t t = 0; t < tokens; t += tall)
      add_low_rank_block<Unit>(s, t, std::min(tall, tokens - t), n, cols, panel, 0, factor, make_tile);
  }

  void run(Coefficients s) const {
    parallel_for(tasks(), cost(), [&](int64_t task) { run(task, s); });
  }

 private:
  const int64_t tokens, channels, ranks, slab;
  const float factor;
  const Tensor& b;
  const MakeTile make_tile;
};

// Both one after the other, in one call of all threads.
template <class Shrink, class Expand>
void run_few(const Shrink& shrink, const Expand& expand, int64_t tokens, int64_t ranks) {
  const double cost = shrink.cost() + expand.cost();
  const int64_t threads = threads_for(cost);
  Shares first(shrink.tasks(), threads), second(expand.tasks(), threads);
  Open<int64_t> open(shrink.tasks());
  parallel_for(threads, cost, [&](int64_t thread) {
    first.work(thread, [&](int64_t task) { open.run([&] { shrink.run(task); }); });
    open.wait();
    const Scratch<float> s(tokens * round_up(ranks, VL));
    shrink.total(s.get(), round_up(ranks, VL));
    second.work(thread, [&](int64_t task) { expand.run(task, {s.get(), round_up(ranks, VL), ranks}); });
  });
}

}  // namespace fastft
