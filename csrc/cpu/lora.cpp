// The LoRA family on CPU; definitions in fastft/ops/lora.py. T tokens, K in, N out, R rank.
//
// Every activation is read once per op, converted to float32 in an L1-sized tile where it is 16 bit or masked, and used
// in place where it is float32. Work is split by shape alone, and partial sums are added in a fixed order, so results do not
// depend on the number of threads.
#include "common/philox.h"
#include "panel.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastft {
namespace {

constexpr auto f32 = ScalarType::Float;
constexpr auto b16 = ScalarType::BFloat16;
constexpr auto h16 = ScalarType::Half;

template <class T>
const T* data(const Tensor& t, const T*) { return static_cast<const T*>(t.const_data_ptr()); }

// A packed keep mask [T, ceil(K / 8)], or none.
struct Mask {
  Mask(const char* op, const Tensor& t, int64_t tokens, int64_t features, double p) : row_bytes((features + 7) / 8) {
    if (p > 0) {
      check(op, "mask", t, Where::cpu, {ScalarType::Byte}, {tokens, row_bytes});
      bits = static_cast<const uint8_t*>(t.const_data_ptr());
    }
  }
  vi keep(int64_t t, int64_t k) const { return keep_lanes(bits + t * row_bytes, k, row_bytes); }

  const uint8_t* bits = nullptr;
  int64_t row_bytes;
};

// Rows [t, t + rows) x columns [k, k + cols) of an activation as float32, dropped elements 0, columns padded to vectors.
// `tile` is written only where the activation's own memory does not serve.
template <class T>
std::pair<const float*, int64_t> float_tile(const T* x, int64_t ld, int64_t t, int64_t rows, int64_t k, int64_t cols,
                                            const Mask* mask, float* tile) {
  if constexpr (std::is_same_v<T, float>) {
    if ((!mask || !mask->bits) && cols % VL == 0) return {x + t * ld + k, ld};
  }
  int64_t row = round_up(cols, VL);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += VL) {
      vf v = load(x + (t + i) * ld + k + j, cols - j);
      store(tile + i * row + j, mask && mask->bits ? select(mask->keep(t + i, k + j), v) : v);
    }
  return {tile, row};
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

std::tuple<Tensor, Tensor> lora_shrink(const Tensor& x, const Tensor& a, double p, std::optional<Tensor> seed) {
  const char* op = "lora_shrink";
  check_matrix(op, "x", x);
  check_matrix(op, "a", a);
  check_probability(op, p);
  const int64_t T = x.size(0), K = x.size(1), R = a.size(0);
  check(op, "x", x, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "a", a, Where::cpu, {x.scalar_type(), f32}, {R, K});
  STD_TORCH_CHECK(seed.has_value() == (p > 0), op, ": a seed is needed if and only if p > 0");
  const int64_t row_bytes = (K + 7) / 8;
  Tensor s = torch::stable::new_empty(x, {T, R}, f32);
  Tensor mask_tensor = p > 0 ? torch::stable::new_empty(x, {T, row_bytes}, ScalarType::Byte)
                             : torch::stable::new_empty(x, {0}, ScalarType::Byte);
  uint64_t key = 0;
  if (p > 0) {
    check(op, "seed", *seed, Where::cpu, {ScalarType::Long}, {1});
    key = *static_cast<const uint64_t*>(seed->const_data_ptr());
  }
  const uint32_t threshold = philox::threshold(p);
  const float factor = philox::inverse_keep(p);
  const Mask mask(op, mask_tensor, T, K, p);
  const TransposedPanel panel(a);  // [K][R]
  uint8_t* mask_out = static_cast<uint8_t*>(mask_tensor.mutable_data_ptr());
  float* out = static_cast<float*>(s.mutable_data_ptr());

  constexpr int64_t block_t = 4 * panel_rows, block_k = 256;
  dispatch(x, [&](auto* type) {
    const auto* from = data(x, type);
    parallel_for((T + block_t - 1) / block_t, [&](int64_t task) {
      const int64_t t = task * block_t, rows = std::min(block_t, T - t);
      alignas(64) float tile[block_t * block_k];
      Scratch sum(block_t * panel.row);
      sum.zero(rows * panel.row);
      if (p > 0)
        for (int64_t i = 0; i < rows; ++i) write_mask_row(key, t + i, K, threshold, mask_out + (t + i) * row_bytes);
      for (int64_t k = 0; k < K; k += block_k) {
        const int64_t depth = std::min(block_k, K - k);
        auto [block, ld] = float_tile(from, K, t, rows, k, depth, &mask, tile);
        panel_product(rows, panel.row, depth, block, ld, 1, panel.get() + k * panel.row, panel.row, sum.get(), panel.row);
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t r = 0; r < R; r += VL)
          store(out + (t + i) * R + r, factor * load(sum.get() + i * panel.row + r), R - r);
    });
  });
  return {s, mask_tensor};
}

// to [T, C] += factor · (keep ∘ S P) for S [T, R] and a panel P [R][C]: y and dx.
void add_low_rank(Tensor& to_tensor, const Tensor& s, const float* panel, int64_t panel_row, float factor, const Mask& mask) {
  const int64_t T = s.size(0), R = s.size(1), C = to_tensor.size(1);
  if (R == 0) return;
  const float* coefficients = static_cast<const float*>(s.const_data_ptr());
  constexpr int64_t block_t = 8 * panel_rows, block_c = 256;
  const int64_t blocks_c = (C + block_c - 1) / block_c;
  dispatch(to_tensor, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(to_tensor.mutable_data_ptr());
    parallel_for((T + block_t - 1) / block_t * blocks_c, [&](int64_t task) {
      const int64_t c = task % blocks_c * block_c, cols = std::min(block_c, C - c), row = round_up(cols, VL);
      const int64_t first = task / blocks_c * block_t, last = std::min(first + block_t, T);
      Scratch scaled(panel_rows * R);
      alignas(64) float tile[panel_rows * block_c];
      for (int64_t t = first; t < last; t += panel_rows) {
        const int64_t rows = std::min<int64_t>(panel_rows, last - t);
        for (int64_t i = 0; i < rows * R; ++i) scaled.get()[i] = factor * coefficients[t * R + i];
        auto product = [&](float* sum, int64_t ld) {
          panel_product(rows, row, R, scaled.get(), R, 1, panel + c, panel_row, sum, ld);
        };
        if constexpr (std::is_same_v<decltype(type), float*>) {
          if (!mask.bits && cols % VL == 0) {
            product(to + t * C + c, C);
            continue;
          }
        }
        std::fill_n(tile, rows * row, 0.0f);
        product(tile, row);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < cols; j += VL) {
            auto* at = to + (t + i) * C + c + j;
            vf before = load(at, cols - j), after = before + load(tile + i * row + j);
            store(at, mask.bits ? (mask.keep(t + i, c + j) ? after : before) : after, cols - j);
          }
      }
    });
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
  const TransposedPanel panel(b);  // [R][N]
  add_low_rank(y, s, panel.get(), panel.row, static_cast<float>(scale), Mask(op, s, T, N, 0.0));
}

void lora_grad_x_(Tensor dx, const Tensor& ds, const Tensor& a, const Tensor& mask, double p) {
  const char* op = "lora_grad_x_";
  check_matrix(op, "ds", ds);
  check_matrix(op, "a", a);
  check_probability(op, p);
  const int64_t T = ds.size(0), R = ds.size(1), K = a.size(1);
  check(op, "dx", dx, Where::cpu, {f32, b16, h16}, {T, K});
  check(op, "ds", ds, Where::cpu, {f32}, {T, R});
  check(op, "a", a, Where::cpu, {dx.scalar_type(), f32}, {R, K});
  const Panel panel(a);  // [R][K]
  add_low_rank(dx, ds, panel.p, panel.row, philox::inverse_keep(p), Mask(op, mask, T, K, p));
}

// out [rows, cols] = factor · the sum over parts of float32 partials [parts][rows][row], in order, in out's dtype.
void reduce_parts(const Tensor& out_tensor, const float* partial, int64_t parts, int64_t row, float factor) {
  Tensor out_copy = out_tensor;
  const int64_t rows = out_tensor.size(0), cols = out_tensor.size(1);
  dispatch(out_tensor, [&](auto* type) {
    auto* out = static_cast<decltype(type)>(out_copy.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < cols; j += VL) {
          vf sum = {};
          for (int64_t part = 0; part < parts; ++part) sum += load(partial + (part * rows + i) * row + j);
          store(out + i * cols + j, factor * sum, cols - j);
        }
    });
  });
}

// One pass over dY: tasks of slab_n columns x chunk_t tokens each form a partial of dS (summed over slabs) and of
// dB (summed over chunks). Slabs grow with R, so that partials stay under an eighth of dY.
std::tuple<Tensor, Tensor> lora_grad_sb(const Tensor& dy, const Tensor& s, const Tensor& b, double scale) {
  const char* op = "lora_grad_sb";
  check_matrix(op, "s", s);
  check_matrix(op, "b", b);
  const int64_t T = s.size(0), R = s.size(1), N = b.size(0);
  check(op, "dy", dy, Where::cpu, {f32, b16, h16}, {T, N});
  check(op, "s", s, Where::cpu, {f32}, {T, R});
  check(op, "b", b, Where::cpu, {dy.scalar_type(), f32}, {N, R});
  Tensor ds = torch::stable::new_empty(s, {T, R}, f32), db = torch::stable::new_empty(b, {N, R});
  const Panel s_panel(s), b_panel(b);
  const int64_t row = b_panel.row;
  const int64_t slab_n = round_up(std::max<int64_t>(512, 8 * R), 64), chunk_t = std::max<int64_t>(1024, 8 * R);
  const int64_t slabs = (N + slab_n - 1) / slab_n, chunks = (T + chunk_t - 1) / chunk_t;
  Scratch ds_parts(slabs * T * row), db_parts(chunks * N * row);

  constexpr int64_t block_t = 36, block_n = 256;
  dispatch(dy, [&](auto* type) {
    const auto* from = data(dy, type);
    parallel_for(slabs * chunks, [&](int64_t task) {
      const int64_t slab = task % slabs, chunk = task / slabs;
      const int64_t n0 = slab * slab_n, n1 = std::min(n0 + slab_n, N), t0 = chunk * chunk_t, t1 = std::min(t0 + chunk_t, T);
      float* ds_part = ds_parts.get() + slab * T * row;
      float* db_part = db_parts.get() + chunk * N * row;
      std::fill_n(ds_part + t0 * row, (t1 - t0) * row, 0.0f);
      std::fill_n(db_part + n0 * row, (n1 - n0) * row, 0.0f);
      alignas(64) float tile[block_t * block_n];
      for (int64_t t = t0; t < t1; t += block_t)
        for (int64_t n = n0; n < n1; n += block_n) {
          const int64_t rows = std::min(block_t, t1 - t), cols = std::min(block_n, n1 - n);
          auto [block, ld] = float_tile(from, N, t, rows, n, cols, nullptr, tile);
          panel_product(rows, row, cols, block, ld, 1, b_panel.p + n * row, row, ds_part + t * row, row);
          panel_product(cols, row, rows, block, 1, ld, s_panel.p + t * row, row, db_part + n * row, row);
        }
    });
  });
  reduce_parts(ds, ds_parts.get(), slabs, row, static_cast<float>(scale));
  reduce_parts(db, db_parts.get(), chunks, row, static_cast<float>(scale));
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
  const Mask mask(op, mask_tensor, T, K, p);
  Tensor da = torch::stable::new_empty(a, {R, K});
  const float* coefficients = static_cast<const float*>(ds.const_data_ptr());
  constexpr int64_t block_t = 32, block_k = 256;
  const int64_t row = round_up(K, VL), chunk_t = std::max<int64_t>(2048, 8 * R);
  const int64_t chunks = (T + chunk_t - 1) / chunk_t, blocks_k = (K + block_k - 1) / block_k;
  Scratch parts(chunks * R * row);

  dispatch(x, [&](auto* type) {
    const auto* from = data(x, type);
    parallel_for(chunks * blocks_k, [&](int64_t task) {
      const int64_t k = task % blocks_k * block_k, cols = std::min(block_k, K - k), padded = round_up(cols, VL);
      const int64_t t0 = task / blocks_k * chunk_t, t1 = std::min(t0 + chunk_t, T);
      float* part = parts.get() + task / blocks_k * R * row + k;
      for (int64_t r = 0; r < R; ++r) std::fill_n(part + r * row, padded, 0.0f);
      alignas(64) float tile[block_t * block_k];
      for (int64_t t = t0; t < t1; t += block_t) {
        const int64_t rows = std::min(block_t, t1 - t);
        auto [block, ld] = float_tile(from, K, t, rows, k, cols, &mask, tile);
        panel_product(R, padded, rows, coefficients + t * R, 1, R, block, ld, part, row);
      }
    });
  });
  reduce_parts(da, parts.get(), chunks, row, philox::inverse_keep(p));
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
