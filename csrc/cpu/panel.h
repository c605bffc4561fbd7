// The one inner loop of the low-rank kernels, C[i][v] += sum_j X[i, j] P[j][v], and what feeds it.
//
// All five LoRA kernels are this product of a broadcast operand X (any two strides) with a float32 panel P whose rows are
// read as vectors: S and dS (X = activations, P = the adapter), dB (X = dY transposed), Y and dX (X = S or dS, P = the
// adapter), dA (X = dS transposed, P = activations). Operands in 16 bit pass once through a float32 tile in L1/L2.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "vec.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

namespace fastft {

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

constexpr int panel_vectors = 2;  // vectors of P that one register tile spans
constexpr int panel_rows = 6;     // rows of X in one register tile: 12 accumulators, so that AVX2's 16 registers do
constexpr int64_t chain = 32;     // terms added one by one before they join the total: rounding error grows with
                                  // sqrt(chain) + sqrt(depth / chain), as in a vendor GEMM, not with sqrt(depth)

template <int M, int V>
inline void tile_product(const float* x, int64_t x_row, int64_t x_col, int64_t depth, const float* p, int64_t p_row, float* c,
                         int64_t c_row) {
  for (int64_t j = 0; j < depth;) {
    vf sum[M][V] = {};
    for (int64_t end = std::min(j + chain, depth); j < end; ++j) {
      vf panel[V];
      for (int v = 0; v < V; ++v) panel[v] = load(p + j * p_row + v * VL);
      for (int i = 0; i < M; ++i) {
        float factor = x[i * x_row + j * x_col];
        for (int v = 0; v < V; ++v) sum[i][v] += factor * panel[v];
      }
    }
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < V; ++v) {
        float* to = c + i * c_row + v * VL;
        store(to, load(to) + sum[i][v]);
      }
  }
}

template <int V>
inline void tile_rows(int64_t rows, const float* x, int64_t x_row, int64_t x_col, int64_t depth, const float* p, int64_t p_row,
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

// C [rows, cols] += X P with cols a multiple of VL. Each C element sums its `depth` terms in order, whatever the tiling.
inline void panel_product(int64_t rows, int64_t cols, int64_t depth, const float* x, int64_t x_row, int64_t x_col,
                          const float* p, int64_t p_row, float* c, int64_t c_row) {
  int64_t v = 0;
  for (; v + panel_vectors * VL <= cols; v += panel_vectors * VL)
    tile_rows<panel_vectors>(rows, x, x_row, x_col, depth, p + v, p_row, c + v, c_row);
  if (v < cols) tile_rows<1>(rows, x, x_row, x_col, depth, p + v, p_row, c + v, c_row);
}

// Uninitialised float32 scratch, aligned to a cache line.
struct Scratch {
  explicit Scratch(int64_t n) : data(static_cast<float*>(std::aligned_alloc(64, round_up(n * 4 + 64, 64)))) {
    STD_TORCH_CHECK(data, "fastft: out of memory for ", n * 4, " bytes of scratch");
  }
  float* get() const { return data.get(); }
  void zero(int64_t n) { std::fill_n(get(), n, 0.0f); }
  struct Free { void operator()(float* p) const { std::free(p); } };
  std::unique_ptr<float, Free> data;
};

template <class F>
inline void parallel_for(int64_t n, const F& body) {  // body(task) for task in [0, n), shared among threads
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
}

// Calls f with a typed null pointer of the tensor's element type.
template <class F>
inline void dispatch(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half: return f(static_cast<fp16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

// A float32 copy with rows padded to whole vectors by zeros, or the tensor's own memory where it already is one.
class Panel {
 public:
  explicit Panel(const Tensor& t) : row(round_up(t.size(1), VL)) {
    int64_t rows = t.size(0), cols = t.size(1);
    if (t.scalar_type() == ScalarType::Float && row == cols) {
      p = static_cast<const float*>(t.const_data_ptr());
      return;
    }
    copy = std::make_unique<Scratch>(rows * row);
    p = copy->get();
    dispatch(t, [&](auto* type) {
      auto* from = static_cast<decltype(type)>(const_cast<void*>(t.const_data_ptr()));
      torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t j = 0; j < row; j += VL) store(copy->get() + i * row + j, load(from + i * cols + j, cols - j));
      });
    });
  }

  const float* p;
  const int64_t row;  // floats from one row to the next

 private:
  std::unique_ptr<Scratch> copy;
};

// The transpose of a [R, C] tensor as [C, R padded to whole vectors] in float32.
class TransposedPanel {
 public:
  explicit TransposedPanel(const Tensor& t) : row(round_up(t.size(0), VL)), copy(t.size(1) * row) {
    int64_t r = t.size(0), c = t.size(1);
    dispatch(t, [&](auto* type) {
      auto* from = static_cast<decltype(type)>(const_cast<void*>(t.const_data_ptr()));
      torch::stable::parallel_for(0, round_up(c, VL) / VL, 16, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          int64_t j = block * VL, n = std::min<int64_t>(VL, c - j);
          for (int64_t i = 0; i < row; ++i) {
            vf v = i < r ? load(from + i * c + j, n) : vf{};
            for (int64_t l = 0; l < n; ++l) copy.get()[(j + l) * row + i] = v[l];
          }
        }
      });
    });
  }

  const float* get() const { return copy.get(); }
  const int64_t row;

 private:
  Scratch copy;
};

}  // namespace fastft
