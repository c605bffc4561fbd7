// The LoRA family on CPU; definitions in fastft/ops/lora.py. T tokens, K in, N out, R rank.
//
// Every activation is read once per op from memory. Work is split by shape alone and partial sums are added in a fixed
// order, so results do not depend on the number of threads.
#include "common/philox.h"
#include "operands.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

namespace fastft {
namespace {

constexpr auto f32 = ScalarType::Float;
constexpr auto b16 = ScalarType::BFloat16;
constexpr auto h16 = ScalarType::Half;

constexpr int64_t block_t = 4 * panel_rows, block_c = 256;  // tokens x channels of an activation tile: 24 KiB of float32
constexpr int64_t update_c = 1024;  // channels of Y and dX that one task sweeps: long rows are what memory likes

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

Mask checked_mask(const char* op, const Tensor& t, int64_t tokens, int64_t features, double p) {
  if (p == 0) return {};
  const int64_t row_bytes = (features + 7) / 8;
  check(op, "mask", t, Where::cpu, {ScalarType::Byte}, {tokens, row_bytes});
  return {static_cast<const uint8_t*>(t.const_data_ptr()), row_bytes};
}

// Mask bytes [0, bytes) of token t: Philox on VL byte numbers at a time (common/philox.h has the plain form).
void write_mask_row(uint64_t seed, int64_t t, int64_t features, uint32_t threshold, uint8_t* row) {
  int64_t bytes = (features + 7) / 8;
  for (int64_t i = 0; i < bytes; i += VL) {
    vu c0 = vu{} + static_cast<uint32_t>(t), c1 = vu{} + static_cast<uint32_t>(t >> 32);
    vu c2 = lane_numbers() + static_cast<uint32_t>(i), c3 = {};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < philox::rounds; ++round, k0 += philox::W0, k1 += philox::W1) {
      vu hi0, lo0, hi1, lo1;
      mul_hilo(c0, philox::M0, hi0, lo0);
      mul_hilo(c2, philox::M1, hi1, lo1);
      c0 = hi1 ^ c1 ^ k0, c1 = lo1, c2 = hi0 ^ c3 ^ k1, c3 = lo0;
    }
    vu byte = {};
    const vu words[4] = {c0, c1, c2, c3};
    for (int m = 0; m < 4; ++m) {
      byte |= reinterpret_cast<vu>((words[m] & 0xffffu) >= threshold) & (1u << 2 * m);
      byte |= reinterpret_cast<vu>((words[m] >> 16) >= threshold) & (2u << 2 * m);
    }
    vu8 packed = __builtin_convertvector(byte, vu8);
    std::memcpy(row + i, &packed, std::min<int64_t>(VL, bytes - i));
  }
  if (features % 8) row[bytes - 1] &= (1u << features % 8) - 1u;
}

// sum [rows, panel.row()] += tokens [t, t + rows) of x times a panel whose units run along x's channels [c0, c1).
template <class Unit, class T, class P>
void shrink_block(const T* x, int64_t ld, int64_t t, int64_t rows, int64_t c0, int64_t c1, Mask mask, const P& panel,
                  Unit* tile, float* sum) {
  for (int64_t c = c0; c < c1; c += block_c) {
    const int64_t cols = std::min(block_c, c1 - c);
    panel_product(rows, panel.row(), units<Unit>(cols), feature_tile<Unit>(x, ld, t, rows, c, cols, mask, tile),
                  panel.at(c / terms<Unit>, 0), AddTo{sum, panel.row()});
  }
}

std::tuple<Tensor, Tensor> lora_shrink(const Tensor& x, const Tensor& a, double p, std::optional<Tensor> seed) {
  const char* op = "lora_shrink";
  check_matrix(op, "x", x);
  check_matrix(op, "a", a);
  check_probability(op, p);
  const int64_t T = x.size(0), K = x.size(1), R = a.size(0), row_bytes = (K + 7) / 8;
  check(op, "x", x, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "a", a, Where::cpu, {x.scalar_type(), f32}, {R, K});
  STD_TORCH_CHECK(seed.has_value() == (p > 0), op, ": a seed is needed if and only if p > 0");
  if (seed) check(op, "seed", *seed, Where::cpu, {ScalarType::Long}, {1});
  Tensor s = torch::stable::new_empty(x, {T, R}, f32);
  Tensor mask_tensor = p > 0 ? torch::stable::new_empty(x, {T, row_bytes}, ScalarType::Byte)
                             : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  const uint64_t key = seed ? *static_cast<const uint64_t*>(seed->const_data_ptr()) : 0;
  const uint32_t threshold = philox::threshold(p);
  const float factor = philox::inverse_keep(p);
  const Mask mask = checked_mask(op, mask_tensor, T, K, p);
  auto* mask_out = static_cast<uint8_t*>(mask_tensor.mutable_data_ptr());
  auto* out = static_cast<float*>(s.mutable_data_ptr());

  dispatch_units(x, a, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    const TransposedPanel<Unit> panel(a);  // [K][R]
    parallel_for(blocks(T, block_t), [&](int64_t task) {
      const int64_t t = task * block_t, rows = std::min(block_t, T - t), row = panel.row();
      alignas(64) Unit tile[block_t * block_c];
      Scratch sum(rows * row);
      std::fill_n(sum.get(), rows * row, 0.0f);
      if (p > 0)
        for (int64_t i = 0; i < rows; ++i) write_mask_row(key, t + i, K, threshold, mask_out + (t + i) * row_bytes);
      shrink_block(data(x, type), K, t, rows, 0, K, mask, panel, tile, sum.get());
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < R; r += VL) store(out + (t + i) * R + r, factor * load(sum.get() + i * row + r), R - r);
    });
  });
  return {s, mask_tensor};
}

// Adds to an activation in its own dtype, rounded once; only to kept elements, if masked. Of a `part` vector the first
// `cols` columns are there.
template <class T, bool masked, bool part>
struct AddToActivation {
  T* to;
  int64_t ld, cols;
  Mask mask;
  int64_t t, c;  // of `to` in the mask
  AddToActivation from(int64_t i, int64_t v) const { return {to + i * ld + v, ld, cols, mask, t + i, c + v}; }
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

// to [T, C] += factor · (keep ∘ S P) for S [T, R] and a panel P [units(R)][C]: y and dx.
template <bool masked, class T, class Unit, class P>
void add_low_rank(Tensor& to_tensor, const T* type, const Tensor& s, const P& panel, float factor, Mask mask, const Unit*) {
  const int64_t tokens = s.size(0), R = s.size(1), C = to_tensor.size(1);
  if (R == 0) return;
  T* to = const_cast<T*>(data(to_tensor, type));
  const float* coefficients = static_cast<const float*>(s.const_data_ptr());
  parallel_for(blocks(tokens, block_t) * blocks(C, update_c), [&](int64_t task) {
    const int64_t c = task % blocks(C, update_c) * update_c, cols = std::min(update_c, C - c), whole = cols / VL * VL;
    const int64_t t = task / blocks(C, update_c) * block_t, rows = std::min(block_t, tokens - t);
    Scratch<Unit> scaled(rows * round_up(R, VL));
    const auto x = rank_coefficients<Unit>(coefficients, R, t, rows, factor, scaled.get());
    panel_product(rows, whole, units<Unit>(R), x, panel.at(0, c),
                  AddToActivation<T, masked, false>{to + t * C + c, C, whole, mask, t, c});
    if (whole < cols)
      panel_product(rows, VL, units<Unit>(R), x, panel.at(0, c + whole),
                    AddToActivation<T, masked, true>{to + t * C + c + whole, C, cols - whole, mask, t, c + whole});
  });
}

void lora_expand_(Tensor y, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_expand_";
  check_matrix(op, "s", s);
  check_matrix(op, "b", b);
  const int64_t T = s.size(0), R = s.size(1), N = b.size(0);
  check(op, "y", y, Where::cpu, {f32, b16, h16}, {T, N});
  check(op, "s", s, Where::cpu, {f32}, {T, R});
  check(op, "b", b, Where::cpu, {y.scalar_type(), f32}, {N, R});
  dispatch_units(y, b, [&](auto* type, auto* unit) {
    const TransposedPanel<std::remove_pointer_t<decltype(unit)>> panel(b);  // [R][N]
    add_low_rank<false>(y, type, s, panel, static_cast<float>(scale), {}, unit);
  });
}

void lora_grad_x_(Tensor dx, const Tensor& ds, const Tensor& a, const Tensor& mask_tensor, double p) {
  const char* op = "lora_grad_x_";
  check_matrix(op, "ds", ds);
  check_matrix(op, "a", a);
  check_probability(op, p);
  const int64_t T = ds.size(0), R = ds.size(1), K = a.size(1);
  check(op, "dx", dx, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "ds", ds, Where::cpu, {f32}, {T, R});
  check(op, "a", a, Where::cpu, {dx.scalar_type(), f32}, {R, K});
  const Mask mask = checked_mask(op, mask_tensor, T, K, p);
  dispatch_units(dx, a, [&](auto* type, auto* unit) {
    const Panel<std::remove_pointer_t<decltype(unit)>> panel(a);  // [R][K]
    if (mask.bits)
      add_low_rank<true>(dx, type, ds, panel, philox::inverse_keep(p), mask, unit);
    else
      add_low_rank<false>(dx, type, ds, panel, philox::inverse_keep(p), mask, unit);
  });
}

// Partial sums of a product over tokens, out [R, C] = Σ_t s[t]ᵀ x[t]: one float32 part a chunk of tokens, in order.
struct TokenParts {
  // As many chunks as it takes for 16 tasks of `slabs` columns each, so that several threads find work; of a length that
  // keeps the parts under a quarter of the activation's bytes, and below 2016 tokens, so that they stay in a cache.
  TokenParts(int64_t tokens, int64_t r, int64_t c, int64_t slabs)
      : chunk(chunk_length(tokens, std::max<int64_t>(240, 8 * r), slabs)),
        count(blocks(tokens, chunk)),
        rows(r),
        row(round_up(c, VL)),
        parts(count * r * row) {}

  static int64_t chunk_length(int64_t tokens, int64_t shortest, int64_t slabs) {
    const int64_t wanted =
        std::max(blocks(16, std::max<int64_t>(slabs, 1)), blocks(tokens, std::max<int64_t>(2016, shortest)));
    const int64_t count = std::max<int64_t>(1, std::min(wanted, tokens / shortest));
    return std::max(block_t, round_up(blocks(tokens, count), block_t));
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

// One pass over dY: tasks of slab columns x chunk tokens each form a part of dS (summed over slabs) and of dBᵀ (over
// chunks).
std::tuple<Tensor, Tensor> lora_grad_sb(const Tensor& dy, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_grad_sb";
  check_matrix(op, "s", s);
  check_matrix(op, "b", b);
  const int64_t T = s.size(0), R = s.size(1), N = b.size(0);
  check(op, "dy", dy, Where::cpu, {f32, b16, h16}, {T, N});
  check(op, "s", s, Where::cpu, {f32}, {T, R});
  check(op, "b", b, Where::cpu, {dy.scalar_type(), f32}, {N, R});
  Tensor ds = torch::stable::new_empty(s, {T, R}, f32), db = torch::stable::new_empty(b, {N, R});
  const float factor = static_cast<float>(scale);
  const float* coefficients = static_cast<const float*>(s.const_data_ptr());
  const int64_t slab = round_up(std::max<int64_t>(512, 8 * R), block_c), slabs = blocks(N, slab), row = round_up(R, VL);
  const TokenParts db_parts(T, R, N, slabs);
  const Scratch<float> ds_parts(slabs * T * row);

  dispatch_units(dy, b, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    const Panel<Unit> panel(b);  // [N][R]
    parallel_for(slabs * db_parts.count, [&](int64_t task) {
      const int64_t n0 = task % slabs * slab, n1 = std::min(n0 + slab, N), part = task / slabs;
      const int64_t t0 = part * db_parts.chunk, t1 = std::min(t0 + db_parts.chunk, T);
      float* ds_part = ds_parts.get() + task % slabs * T * row;
      float* db_part = db_parts.clear(part, n0, n1 - n0);
      std::fill_n(ds_part + t0 * row, (t1 - t0) * row, 0.0f);
      alignas(64) Unit tile[block_t * block_c];
      Scratch<Unit> words(block_t * R);
      for (int64_t t = t0; t < t1; t += block_t) {
        const int64_t rows = std::min(block_t, t1 - t);
        const auto tokens = token_coefficients<Unit>(coefficients, R, t, rows, words.get());
        for (int64_t n = n0; n < n1; n += block_c) {
          const int64_t cols = std::min(block_c, n1 - n);
          shrink_block(data(dy, type), N, t, rows, n, n + cols, {}, panel, tile, ds_part + t * row);
          panel_product(R, round_up(cols, VL), units<Unit>(rows), tokens,
                        token_tile<Unit>(data(dy, type), N, t, rows, n, cols, {}, tile),
                        AddTo{db_part + (n - n0), db_parts.row});
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
          vf sum = factor * db_parts.total(r, n);
          for (int l = 0; l < VL; ++l) line.get()[l * row + r] = sum[l];
        }
        for (int64_t l = 0; l < std::min<int64_t>(VL, N - n); ++l)
          for (int64_t r = 0; r < R; r += VL) store(out + (n + l) * R + r, load(line.get() + l * row + r), R - r);
      }
    });
  });
  return {ds, db};
}

Tensor lora_grad_a(const Tensor& ds, const Tensor& x, const Tensor& a, const Tensor& mask_tensor, double p) {
  const char* op = "lora_grad_a";
  check_matrix(op, "ds", ds);
  check_matrix(op, "x", x);
  check_probability(op, p);
  const int64_t T = x.size(0), K = x.size(1), R = ds.size(1);
  check(op, "x", x, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "ds", ds, Where::cpu, {f32}, {T, R});
  check(op, "a", a, Where::cpu, {x.scalar_type(), f32}, {R, K});
  const Mask mask = checked_mask(op, mask_tensor, T, K, p);
  Tensor da = torch::stable::new_empty(a, {R, K});
  const float* coefficients = static_cast<const float*>(ds.const_data_ptr());
  const TokenParts parts(T, R, K, blocks(K, block_c));

  dispatch_units(x, a, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    parallel_for(parts.count * blocks(K, block_c), [&](int64_t task) {
      const int64_t k = task % blocks(K, block_c) * block_c, cols = std::min(block_c, K - k);
      const int64_t part = task / blocks(K, block_c), t0 = part * parts.chunk, t1 = std::min(t0 + parts.chunk, T);
      float* to = parts.clear(part, k, cols);
      alignas(64) Unit tile[block_t * block_c];
      Scratch<Unit> words(block_t * R);
      for (int64_t t = t0; t < t1; t += block_t) {
        const int64_t rows = std::min(block_t, t1 - t);
        panel_product(R, round_up(cols, VL), units<Unit>(rows),
                      token_coefficients<Unit>(coefficients, R, t, rows, words.get()),
                      token_tile<Unit>(data(x, type), K, t, rows, k, cols, mask, tile), AddTo{to, parts.row});
      }
    });
  });

  dispatch(da, [&](auto* type) {
    auto* out = const_cast<std::remove_pointer_t<decltype(type)>*>(data(da, type));
    const float factor = philox::inverse_keep(p);
    torch::stable::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t k = 0; k < K; k += VL) store(out + r * K + k, factor * parts.total(r, k), K - k);
    });
  });
  return da;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_grad_sb", TORCH_BOX(&lora_grad_sb));
  m.impl("lora_grad_a", TORCH_BOX(&lora_grad_a));
  m.impl("lora_grad_x_", TORCH_BOX(&lora_grad_x_));
}

}  // namespace fastft
