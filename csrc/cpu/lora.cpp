// The LoRA family on CPU; definitions in fastft/ops/lora.py. T tokens, K in, N out, R rank.
//
// Every activation is read once per op from memory, by all groups of adapters that share it. Large ranks in float32 without
// dropout are the vendor's: gemm.h.
#include "few_tokens.h"
#include "gemm.h"
#include "low_rank.h"
#include "mask_row.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastft {
namespace {

// One adapter of a stack: its ranks [first, first + ranks) and its mask. Without dropout the stack is one adapter.
struct Group {
  int64_t first, ranks;
  Mask mask;
};

std::vector<Group> groups(const char* op, const std::vector<int64_t>& ranks, int64_t total, double p, const Tensor& mask,
                          int64_t tokens, int64_t features) {
  int64_t sum = 0;
  bool sound = !ranks.empty();
  for (int64_t r : ranks) sum += r, sound = sound && r >= 0;
  STD_TORCH_CHECK(sound && sum == total, op, ": ranks must be one or more sizes that add up to the rank ", total);
  if (p == 0) return {{0, total, {}}};
  const int64_t row_bytes = (features + 7) / 8;
  check(op, "mask", mask, Where::cpu, {ScalarType::Byte}, {static_cast<int64_t>(ranks.size()), tokens, row_bytes});
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  std::vector<Group> found;
  for (int64_t r : ranks) {
    found.push_back({found.empty() ? 0 : found.back().first + found.back().ranks, r, {bits, row_bytes}});
    bits += tokens * row_bytes;
  }
  return found;
}

std::tuple<Tensor, Tensor> lora_shrink(const Tensor& x, const Tensor& a, const std::vector<int64_t>& ranks, double p,
                                       std::optional<Tensor> seed) {
  const char* op = "lora_shrink";
  check_matrix(op, "x", x);
  check_matrix(op, "a", a);
  check_probability(op, p);
  const int64_t T = x.size(0), K = x.size(1), R = a.size(0), G = static_cast<int64_t>(ranks.size());
  check(op, "x", x, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "a", a, Where::cpu, {x.scalar_type(), f32}, {R, K});
  STD_TORCH_CHECK(seed.has_value() == (p > 0), op, ": a seed is needed if and only if p > 0");
  if (seed) check(op, "seed", *seed, Where::cpu, {ScalarType::Long}, {G});
  Tensor s = empty_on(x, {T, R}, f32);
  Tensor mask = p > 0 ? empty_on(x, {G, T, (K + 7) / 8}, ScalarType::Byte) : empty_on(x, {0}, ScalarType::Byte);
  const auto all = groups(op, ranks, R, p, mask, T, K);
  const bool few = p == 0 && T <= few_tokens;
  if (!few && gemm_pays(x, a, p, R)) {
    gemm(s, x, transposed(a), 0, 1);
    return {s, mask};
  }
  const auto* keys = seed ? static_cast<const uint64_t*>(seed->const_data_ptr()) : nullptr;
  const uint32_t threshold = philox::threshold(p);
  const float factor = philox::inverse_keep(p);
  auto* out = static_cast<float*>(s.mutable_data_ptr());

  dispatch_exact_units(x, a, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    if (few) {
      const FewShrink<std::remove_pointer_t<decltype(type)>, Unit> shrink(data(x, type), K, T, a);
      parallel_for(shrink.tasks(), shrink.cost(), [&](int64_t task) { shrink.run(task); });
      return shrink.total(out, R);
    }
    const int64_t tall = tile_tokens<Unit>(R);
    std::vector<TransposedPanel<Unit>> panels;  // [K][R] of each group
    std::vector<int64_t> widths, offsets;
    int64_t total = 0;
    for (const Group& g : all) {
      panels.emplace_back(a, g.first, g.ranks, parts_of<Unit>(a));
      widths.push_back(round_up(g.ranks, VL)), offsets.push_back(total * tall);
      total += widths.back();
    }
    const auto* from = data(x, type);
    const double cost = read_cost(4.0 * T * K) + product_cost(1.0 * T * K * total);
    parallel_for(blocks(T, tall), cost, [&](int64_t task) {
      const int64_t t = task * tall, rows = std::min(tall, T - t);
      const Scratch<Unit> tile(tall * block_c);
      Scratch sum(tall * total);
      std::fill_n(sum.get(), tall * total, 0.0f);
      for (size_t g = 0; p > 0 && g < all.size(); ++g)
        for (int64_t i = 0; i < rows; ++i)
          write_mask_row(keys[g], t + i, K, threshold,
                         const_cast<uint8_t*>(all[g].mask.bits) + (t + i) * all[g].mask.row_bytes);
      for (int64_t c = 0; c < K; c += block_c) {
        const int64_t cols = std::min(block_c, K - c), next = c + block_c < K ? c + block_c : 0;
        const int64_t next_t = next ? t : t + tall;
        for (size_t g = 0; g < all.size(); ++g) {
          Ahead ahead;
          if (g == 0 && next_t < T)
            ahead = Ahead(from + next_t * K + next, std::min(tall, T - next_t), std::min(block_c, K - next) * sizeof(*from),
                          K * sizeof(*from), product_steps<Unit>(rows, widths[g], units<Unit>(cols)));
          panel_product(rows, widths[g], product_units<Unit>(cols),
                        feature_tile<Unit>(from, K, t, rows, c, cols, all[g].mask, tile.get()),
                        panels[g].at(c / terms<Unit>, 0), AddTo{sum.get() + offsets[g], widths[g]}, ahead);
        }
      }
      for (size_t g = 0; g < all.size(); ++g)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t r = 0; r < all[g].ranks; r += VL)
            store(out + (t + i) * R + all[g].first + r, factor * load(sum.get() + offsets[g] + i * widths[g] + r),
                  all[g].ranks - r);
    });
  });
  return {s, mask};
}

void lora_expand_(Tensor y, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_expand_";
  check_matrix(op, "s", s);
  check_matrix(op, "b", b);
  const int64_t T = s.size(0), R = s.size(1), N = b.size(0);
  check_rows(op, "y", y, Where::cpu, {f32, b16, h16}, {T, N});
  check_rows(op, "s", s, Where::cpu, {f32}, {T, R});
  check(op, "b", b, Where::cpu, {y.scalar_type(), f32}, {N, R});
  if (R == 0) return;
  if (T > few_tokens && gemm_pays(y, b, 0, R)) return gemm(y, s, transposed(b), 1, scale);
  dispatch_units(y, b, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    const auto tile = add_to_activation<false>(mutable_data(y, type), y.stride(0), {});
    if (T <= few_tokens) return FewExpand(T, b, scale, tile, unit).run(Coefficients(s));
    const TransposedPanel<Unit> panel(b);  // [R][N]
    add_low_rank<Unit>(T, N, Coefficients(s), panel, static_cast<float>(scale), tile);
  });
}

// Both of a single adapter without dropout, for a forward that nothing is kept of. x and y may have leading dimensions, or
// their caller would pay for views.
void lora_add_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b, double scale) {
  const char* op = "lora_add_";
  check_matrix(op, "a", a);
  check_matrix(op, "b", b);
  const Rows to = checked_rows(op, "y", y, Where::cpu, {f32, b16, h16});
  const Rows from = checked_rows(op, "x", x, Where::cpu, {y.scalar_type()});
  STD_TORCH_CHECK(to.count == from.count, op, ": y has ", to.count, " rows, x ", from.count);
  const int64_t R = a.size(0);
  check(op, "a", a, Where::cpu, {x.scalar_type(), f32}, {R, from.width});
  check(op, "b", b, Where::cpu, {a.scalar_type()}, {to.width, R});
  if (R == 0) return;
  if (to.count > few_tokens) {
    const auto matrix = [](const Tensor& t, const Rows& rows) {
      return t.dim() == 2 ? t : torch::stable::view(t, {rows.count, rows.width});
    };
    const Tensor s = std::get<0>(lora_shrink(matrix(x, from), a, {R}, 0, std::nullopt));
    return lora_expand_(matrix(y, to), s, b, scale);
  }
  dispatch_exact_units(x, a, [&](auto* type, auto* exact) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Exact = std::remove_pointer_t<decltype(exact)>;
    const FewShrink<T, Exact> shrink(data(x, type), from.stride, to.count, a);
    const auto tile = add_to_activation<false>(mutable_data(y, type), to.stride, {});
    const auto add = [&](auto* unit) { run_few(shrink, FewExpand(to.count, b, scale, tile, unit), to.count, R); };
    if constexpr (in_tiles<Exact>)
      if (b.scalar_type() == f32) return add(static_cast<float*>(nullptr));  // as in lora_expand_
    add(exact);
  });
}

// What several masked groups add to dX. A float32 dX takes them one after the other, while a block of it is in L1; for
// others they are summed in float32 and rounded once. That sum starts at -0, which adds no bit.
template <class T, class Unit>
void add_masked_groups(T* dx, int64_t K, const Tensor& ds, const Tensor& a, const std::vector<Group>& all, float factor,
                       const Unit*) {
  const int64_t tokens = ds.size(0);
  constexpr int64_t tall = update_t<Unit>;
  std::vector<Panel<Unit>> panels;
  for (const Group& g : all) panels.emplace_back(a, g.first, g.ranks);
  const double cost = read_cost(4.0 * tokens * K) + product_cost(1.0 * tokens * K * ds.size(1));
  parallel_for(blocks(tokens, tall) * blocks(K, block_c), cost, [&](int64_t task) {
    const int64_t c = task % blocks(K, block_c) * block_c, cols = std::min(block_c, K - c);
    const int64_t t = task / blocks(K, block_c) * tall, rows = std::min(tall, tokens - t);
    alignas(64) float sum[tall * block_c];
    const bool in_place = std::is_same_v<T, float> && cols % VL == 0;
    if (!in_place) std::fill_n(sum, tall * block_c, -0.0f);
    for (size_t g = 0; g < all.size(); ++g) {
      const Coefficients s(ds, all[g].first, all[g].ranks);
      Scratch<Unit> scaled(rows * rank_floats<Unit>(s.ranks));
      AddToActivation<float, true, false> to{sum, block_c, cols, all[g].mask, t, c};
      if constexpr (std::is_same_v<T, float>)
        if (in_place) to.to = dx + t * K + c, to.ld = K;
      panel_product(rows, round_up(cols, VL), product_units<Unit>(s.ranks),
                    rank_coefficients<Unit>(s, t, rows, factor, scaled.get()), panels[g].at(0, c), to, Ahead());
    }
    for (int64_t i = 0; i < rows && !in_place; ++i)
      for (int64_t v = 0; v < cols; v += VL) {
        T* to = dx + (t + i) * K + c + v;
        store(to, load(to, cols - v) + load(sum + i * block_c + v), cols - v);
      }
  });
}

void lora_grad_x_(Tensor dx, const Tensor& ds, const Tensor& a, const std::vector<int64_t>& ranks, const Tensor& mask,
                  double p) {
  const char* op = "lora_grad_x_";
  check_matrix(op, "ds", ds);
  check_matrix(op, "a", a);
  check_probability(op, p);
  const int64_t T = ds.size(0), R = ds.size(1), K = a.size(1);
  check(op, "dx", dx, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "ds", ds, Where::cpu, {f32}, {T, R});
  check(op, "a", a, Where::cpu, {dx.scalar_type(), f32}, {R, K});
  const auto all = groups(op, ranks, R, p, mask, T, K);
  if (R == 0) return;
  if (gemm_pays(dx, a, p, R)) return gemm(dx, ds, a, 1, 1);
  const float factor = philox::inverse_keep(p);
  dispatch_units(dx, a, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    auto* to = mutable_data(dx, type);
    if (all.size() > 1) return add_masked_groups(to, K, ds, a, all, factor, unit);
    const Panel<Unit> panel(a);  // [R][K]
    if (p > 0)
      add_low_rank<Unit>(T, K, Coefficients(ds), panel, factor, add_to_activation<true>(to, K, all[0].mask));
    else
      add_low_rank<Unit>(T, K, Coefficients(ds), panel, factor, add_to_activation<false>(to, K, {}));
  });
}

// One pass over dY: tasks of slab columns x chunk tokens each form a part of dS (summed over slabs) and of dBᵀ (over
// chunks).
std::tuple<Tensor, Tensor> lora_grad_sb(const Tensor& dy, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_grad_sb";
  check_matrix(op, "s", s);
  check_matrix(op, "b", b);
  const int64_t T = s.size(0), R = s.size(1), N = b.size(0);
  check(op, "dy", dy, Where::cpu, {f32, b16, h16}, {T, N});
  check_rows(op, "s", s, Where::cpu, {f32}, {T, R});
  check(op, "b", b, Where::cpu, {dy.scalar_type(), f32}, {N, R});
  Tensor ds = empty_on(dy, {T, R}, f32), db = empty_on(b, {N, R});
  if (gemm_pays(dy, b, 0, R)) {
    gemm(ds, dy, b, 0, scale);
    gemm(db, transposed(dy), s, 0, scale);
    return {ds, db};
  }
  const float factor = static_cast<float>(scale);
  const int64_t slab = round_up(std::clamp<int64_t>(8 * R, 512, 1024), block_c), slabs = blocks(N, slab);
  const int64_t row = round_up(R, VL);
  const Scratch<float> ds_parts(slabs * T * row);
  std::optional<TokenParts> db_sums;

  dispatch_exact_units(dy, b, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    const int64_t tall = tile_tokens<Unit>(R);
    const TokenParts& db_parts = db_sums.emplace(T, R, N, slabs, tall);
    const TokenCoefficients<Unit> coefficients(Coefficients(s), T, tall, b);
    const Panel<Unit> panel(b, parts_of<Unit>(b));  // [N][R]
    const auto* from = data(dy, type);
    const double cost = read_cost(4.0 * T * N) + product_cost(2.0 * T * N * R);
    parallel_for(slabs * db_parts.count, cost, [&](int64_t task) {
      const int64_t n0 = task % slabs * slab, n1 = std::min(n0 + slab, N), part = task / slabs;
      const int64_t t0 = part * db_parts.chunk, t1 = std::min(t0 + db_parts.chunk, T);
      float* ds_part = ds_parts.get() + task % slabs * T * row;
      float* db_part = db_parts.clear(part, n0, n1 - n0);
      std::fill_n(ds_part + t0 * row, (t1 - t0) * row, 0.0f);
      const Scratch<Unit> tile(tall * block_c);
      Scratch<Unit> words(tall * R);
      for (int64_t t = t0; t < t1; t += tall) {
        const int64_t rows = std::min(tall, t1 - t);
        const auto tokens = coefficients.at(t, rows, words.get());
        for (int64_t n = n0; n < n1; n += block_c) {
          const int64_t cols = std::min(block_c, n1 - n), next = n + block_c < n1 ? n + block_c : n0;
          const int64_t next_t = next > n ? t : t + tall;
          Ahead ahead;
          if (next_t < t1)
            ahead =
                Ahead(from + next_t * N + next, std::min(tall, t1 - next_t), std::min(block_c, n1 - next) * sizeof(*from),
                      N * sizeof(*from), product_steps<Unit>(rows, row, units<Unit>(cols)));
          const auto features = feature_tile<Unit>(from, N, t, rows, n, cols, {}, tile.get());
          panel_product(rows, row, product_units<Unit>(cols), features, panel.at(n / terms<Unit>, 0),
                        AddTo{ds_part + t * row, row}, ahead);
          Strips<Unit> channels{features.p, features.row};  // in float32 the same block, if its rows end with a vector
          if (!std::is_same_v<Unit, float> || (features.p != tile.get() && cols % VL))
            channels = token_tile<Unit>(from, N, t, rows, n, cols, {}, tile.get());
          panel_product(R, round_up(cols, VL), product_units<Unit>(rows), tokens, channels,
                        AddTo{db_part + (n - n0), db_parts.row}, Ahead());
        }
      }
    });
  });

  auto* ds_out = static_cast<float*>(ds.mutable_data_ptr());
  torch::stable::parallel_for(0, T, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t r = 0; r < R; r += VL) {
        vf sum = {};
        for (int64_t i = 0; i < slabs; ++i) sum += load(ds_parts.get() + (i * T + t) * row + r);
        store(ds_out + t * R + r, factor * sum, R - r);
      }
  });
  dispatch(db, [&](auto* type) {
    auto* out = const_cast<std::remove_pointer_t<decltype(type)>*>(data(db, type));
    torch::stable::parallel_for(0, blocks(N, VL), 16, [&](int64_t begin, int64_t end) {
      Scratch line(VL * row);  // VL columns of dBᵀ, transposed to rows of dB
      std::fill_n(line.get(), VL * row, 0.0f);
      for (int64_t n = begin * VL; n < std::min(end * VL, N); n += VL) {
        for (int64_t r = 0; r < R; ++r) {
          vf sum = factor * db_sums->total(r, n);
          for (int l = 0; l < VL; ++l) line.get()[l * row + r] = sum[l];
        }
        for (int64_t l = 0; l < std::min<int64_t>(VL, N - n); ++l)
          for (int64_t r = 0; r < R; r += VL) store(out + (n + l) * R + r, load(line.get() + l * row + r), R - r);
      }
    });
  });
  return {ds, db};
}

Tensor lora_grad_a(const Tensor& ds, const Tensor& x, const Tensor& a, const std::vector<int64_t>& ranks, const Tensor& mask,
                   double p) {
  const char* op = "lora_grad_a";
  check_matrix(op, "ds", ds);
  check_matrix(op, "x", x);
  check_probability(op, p);
  const int64_t T = x.size(0), K = x.size(1), R = ds.size(1);
  check(op, "x", x, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "ds", ds, Where::cpu, {f32}, {T, R});
  check(op, "a", a, Where::cpu, {x.scalar_type(), f32}, {R, K});
  const auto all = groups(op, ranks, R, p, mask, T, K);
  Tensor da = empty_on(a, {R, K});
  if (gemm_pays(x, a, p, R)) {
    gemm(da, transposed(ds), x, 0, 1);
    return da;
  }
  std::optional<TokenParts> sums;

  dispatch_exact_units(x, a, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    const int64_t tall = tile_tokens<Unit>(R);
    const TokenParts& parts = sums.emplace(T, R, K, blocks(K, block_c), tall);
    std::vector<TokenCoefficients<Unit>> coefficients;
    for (const Group& g : all) coefficients.emplace_back(Coefficients(ds, g.first, g.ranks), T, tall, a);
    const auto* from = data(x, type);
    const double cost = read_cost(4.0 * T * K) + product_cost(1.0 * T * K * R);
    parallel_for(parts.count * blocks(K, block_c), cost, [&](int64_t task) {
      const int64_t k = task % blocks(K, block_c) * block_c, cols = std::min(block_c, K - k), padded = round_up(cols, VL);
      const int64_t part = task / blocks(K, block_c), t0 = part * parts.chunk, t1 = std::min(t0 + parts.chunk, T);
      float* to = parts.clear(part, k, cols);
      const Scratch<Unit> tile(tall * block_c);
      Scratch<Unit> words(tall * R);
      for (int64_t t = t0; t < t1; t += tall) {
        const int64_t rows = std::min(tall, t1 - t);
        for (size_t i = 0; i < all.size(); ++i) {
          const Group& g = all[i];
          Ahead ahead;
          if (i == 0 && t + tall < t1)
            ahead = Ahead(from + (t + tall) * K + k, std::min(tall, t1 - t - tall), cols * sizeof(*from), K * sizeof(*from),
                          product_steps<Unit>(g.ranks, padded, units<Unit>(rows)));
          panel_product(g.ranks, padded, product_units<Unit>(rows), coefficients[i].at(t, rows, words.get()),
                        token_tile<Unit>(from, K, t, rows, k, cols, g.mask, tile.get()),
                        AddTo{to + g.first * parts.row, parts.row}, ahead);
        }
      }
    });
  });

  dispatch(da, [&](auto* type) {
    auto* out = const_cast<std::remove_pointer_t<decltype(type)>*>(data(da, type));
    const float factor = philox::inverse_keep(p);
    parallel_for(R, read_cost(4.0 * sums->count * R * K), [&](int64_t r) {
      for (int64_t k = 0; k < K; k += VL) store(out + r * K + k, factor * sums->total(r, k), K - k);
    });
  });
  return da;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_add_", TORCH_BOX(&lora_add_));
  m.impl("lora_grad_sb", TORCH_BOX(&lora_grad_sb));
  m.impl("lora_grad_a", TORCH_BOX(&lora_grad_a));
  m.impl("lora_grad_x_", TORCH_BOX(&lora_grad_x_));
}

}  // namespace fastft
