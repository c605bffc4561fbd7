// The DoRA family on CPU; definitions in fastft/ops/dora.py. T tokens, N out, R rank.
#include "few_tokens.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

namespace fastft {
namespace {

// u += low-rank term and y = g ∘ u + bias, both from the float32 sum. Of a `part` vector the first `cols` columns are there.
template <class T, bool part>
struct ScaledActivation {
  static constexpr bool one_vector = part;
  T *u, *y;
  int64_t ld, y_ld, cols;
  const float* g;
  const T* bias;
  ScaledActivation from(int64_t i, int64_t v) const {
    return {u + i * ld + v, y + i * y_ld + v, ld, y_ld, cols, g + v, bias ? bias + v : nullptr};
  }
  template <int M>
  [[gnu::always_inline]] void prefetch() const {
    if constexpr (!part)
      for (int i = 0; i < M; ++i) {
        fetch_ahead(u + i * ld);
        fetch_ahead(y + i * y_ld);
      }
  }
  int64_t width() const { return part ? cols : VL; }
  vf added(int64_t i, int64_t v, vf sum) const { return load(u + i * ld + v, width()) + sum; }
  void put(int64_t i, int64_t v, vf total) const {
    store(u + i * ld + v, total, width());
    vf scaled = load(g + v, width()) * total;
    if (bias) scaled += load(bias + v, width());
    store(y + i * y_ld + v, scaled, width());
  }
};

Tensor dora_expand_(Tensor u, const Tensor& s, const Tensor& b, const Tensor& g, const std::optional<Tensor>& bias,
                    double scale) {
  const char* op = "dora_expand_";
  check_matrix(op, "s", s);
  check_matrix(op, "b", b);
  const int64_t T = s.size(0), R = s.size(1), N = b.size(0);
  check_rows(op, "u", u, Where::cpu, {f32, b16, h16}, {T, N});
  check_rows(op, "s", s, Where::cpu, {f32}, {T, R});
  check(op, "b", b, Where::cpu, {u.scalar_type(), f32}, {N, R});
  check(op, "g", g, Where::cpu, {f32}, {N});
  if (bias) check(op, "bias", *bias, Where::cpu, {u.scalar_type()}, {N});
  Tensor y = empty_on(u, {T, N});
  const auto* factors = static_cast<const float*>(g.const_data_ptr());
  dispatch_units(u, b, [&](auto* type, auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    auto *to_u = mutable_data(u, type), *to_y = mutable_data(y, type);
    const auto* added = bias ? data(*bias, type) : nullptr;
    const int64_t ld = u.stride(0);
    const auto tile = [=](int64_t t, int64_t c, int64_t cols, auto part) {
      using Tile = ScaledActivation<std::remove_pointer_t<decltype(to_u)>, decltype(part)::value>;
      return Tile{to_u + t * ld + c, to_y + t * N + c, ld, N, cols, factors + c, added ? added + c : nullptr};
    };
    if (T <= few_tokens) return FewExpand(T, b, scale, tile, unit).run(Coefficients(s));
    const TransposedPanel<Unit> panel(b);  // [R][N]
    add_low_rank<Unit>(T, N, Coefficients(s), panel, static_cast<float>(scale), tile);
  });
  return y;
}

// A row of g ∘ dY, and of dY ∘ U to be added to `sums`, of `many` tokens at once: each of their rows is a stream that memory
// likes, and the sums in L1 are loaded and stored once for all of them.
template <int many, class T>
void scale_rows(const T* dy, int64_t dy_ld, const T* u, int64_t u_ld, T* out, int64_t out_ld, const float* g, float* sums,
                int64_t cols) {
  const auto vector = [&](int64_t n, int64_t width) __attribute__((always_inline)) {
    const vf factor = load(g + n, width);
    vf sum = load(sums + n), grads[many];
#pragma GCC unroll 8
    for (int i = 0; i < many; ++i) {
      grads[i] = load(dy + i * dy_ld + n, width);
      sum += grads[i] * load(u + i * u_ld + n, width);
    }
    store(sums + n, sum);
#pragma GCC unroll 8
    for (int i = 0; i < many; ++i) store(out + i * out_ld + n, factor * grads[i], width);
  };
  int64_t n = 0;
  for (; n + VL <= cols; n += VL) vector(n, VL);
  if (n < cols) vector(n, cols - n);
}

// One pass over dY and U: tasks of some channels walk all tokens of a chunk, so that the dots stay in L1.
std::tuple<Tensor, Tensor> dora_grad_y(const Tensor& dy, const Tensor& u, const Tensor& g) {
  const char* op = "dora_grad_y";
  check_matrix(op, "dy", dy);
  const int64_t T = dy.size(0), N = dy.size(1);
  check_rows(op, "dy", dy, Where::cpu, {f32, b16, h16}, {T, N});
  check_rows(op, "u", u, Where::cpu, {dy.scalar_type()}, {T, N});
  check(op, "g", g, Where::cpu, {f32}, {N});
  Tensor dyg = empty_on(dy, {T, N}), dots = empty_on(g, {N});
  const TokenParts parts(T, 1, N, blocks(N, update_c), block_t);
  const auto* factors = static_cast<const float*>(g.const_data_ptr());
  dispatch(dy, [&](auto* type) {
    const auto *dy_data = data(dy, type), *u_data = data(u, type);
    auto* out = mutable_data(dyg, type);
    parallel_for(parts.count * blocks(N, update_c), [&](int64_t task) {
      const int64_t n = task % blocks(N, update_c) * update_c, cols = std::min(update_c, N - n);
      const int64_t part = task / blocks(N, update_c), t0 = part * parts.chunk, t1 = std::min(t0 + parts.chunk, T);
      float* total = parts.clear(part, n, cols);
      // The sums of 24 tokens stand by themselves before they join the total, as in panel_product.
      for (int64_t first = t0; first < t1; first += block_t) {
        alignas(64) float sums[update_c] = {};
        int64_t t = first;
        const auto take = [&](auto many) {
          scale_rows<many>(dy_data + t * dy.stride(0) + n, dy.stride(0), u_data + t * u.stride(0) + n, u.stride(0),
                           out + t * N + n, N, factors + n, sums, cols);
          t += many;
        };
        const int64_t last = std::min(first + block_t, t1);
        while (t + 4 <= last) take(std::integral_constant<int, 4>());
        while (t < last) take(std::integral_constant<int, 1>());
        for (int64_t v = 0; v < cols; v += VL) store(total + v, load(total + v) + load(sums + v));
      }
    });
  });
  auto* out = static_cast<float*>(dots.mutable_data_ptr());
  for (int64_t n = 0; n < N; n += VL) store(out + n, parts.total(0, n), N - n);
  return {dyg, dots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("dora_expand_", TORCH_BOX(&dora_expand_));
  m.impl("dora_grad_y", TORCH_BOX(&dora_grad_y));
}

}  // namespace fastft
