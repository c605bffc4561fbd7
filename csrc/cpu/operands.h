// Operands of panel_product from tensors, in units of one float32 or of a pair of bfloat16 terms.
//
// Adapters are small and packed once a call (Panel, TransposedPanel). Activations are read in place where their memory
// already is the operand, otherwise through a tile in L1; that is also where dropout zeroes elements.
#pragma once

#include "common/check.h"
#include "panel.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <type_traits>

namespace fastft {

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class Unit>
constexpr int64_t terms = std::is_same_v<Unit, bf16x2> ? 2 : 1;

template <class Unit>
constexpr int64_t units(int64_t n) {
  return (n + terms<Unit> - 1) / terms<Unit>;
}

// Uninitialised scratch of 4-byte elements, aligned to a cache line.
template <class Unit = float>
struct Scratch {
  static_assert(sizeof(Unit) == 4);
  explicit Scratch(int64_t n) : data(static_cast<Unit*>(std::aligned_alloc(64, round_up(n * 4 + 64, 64)))) {
    STD_TORCH_CHECK(data, "fastft: out of memory for ", n * 4, " bytes of scratch");
  }
  Unit* get() const { return data.get(); }
  struct Free {
    void operator()(Unit* p) const { std::free(p); }
  };
  std::unique_ptr<Unit, Free> data;
};

template <class F>
inline void parallel_for(int64_t n, const F& body) {  // body(task) for task in [0, n), shared among threads
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
}

// About what work costs one thread, in nanoseconds: memory that is read once, products of it with tokens.
inline double read_cost(double bytes) { return 0.07 * bytes; }
inline double product_cost(double products) { return products / (4 * VL); }
// Not worth waking anybody: two threads share 30 us of work in as much time as one takes for it when both are awake, and
// between two GEMMs of a decode step they rarely are (one adapter in a batch: 1.13 instead of 1.20 of the base's step). A
// layer of 24 tokens x 40 x 56, a few us an op, took 20 times as long where other processes kept the cores busy.
constexpr double serial_cost = 30000;

template <class F>
inline void parallel_for(int64_t n, double cost, const F& body) {  // the same, where all of it costs about so much
  if (cost >= serial_cost) return parallel_for(n, body);
  for (int64_t task = 0; task < n; ++task) body(task);
}

// Calls f with a null pointer of the tensor's element type, to be used by decltype.
template <class F>
inline void dispatch(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half: return f(static_cast<fp16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

template <class T>
inline const T* data(const Tensor& t, const T*) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
inline T* mutable_data(const Tensor& t, const T*) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f with a null pointer of the activations' type and one of the unit that their products with an adapter use.
template <class F>
inline void dispatch_units(const Tensor& activations, const Tensor& adapter, const F& f) {
  dispatch(activations, [&](auto* type) {
    if constexpr (has_pairs && std::is_same_v<decltype(type), bf16*>) {
      if (adapter.scalar_type() == ScalarType::BFloat16) return f(type, static_cast<bf16x2*>(nullptr));
    }
    f(type, static_cast<float*>(nullptr));
  });
}

// Rows j and j + 1 of a matrix as one row of units: their floats, or pairs of their elements in each lane.
template <class Unit>
inline void store_unit_row(Unit* to, vf first, vf second) {
  if constexpr (std::is_same_v<Unit, float>)
    store(to, first);
  else
    store(to, bf16_bits(first) | bf16_bits(second) << 16);
}

// A packed keep mask [T, ceil(K / 8)], or none: `bits` null.
struct Mask {
  vi keep(int64_t t, int64_t k) const { return keep_lanes(bits + t * row_bytes, k, row_bytes); }
  template <class T>
  vf load_kept(const T* x, int64_t ld, int64_t t, int64_t k, int64_t n) const {
    vf v = load(x + t * ld + k, n);
    return bits ? select(keep(t, k), v) : v;
  }

  const uint8_t* bits = nullptr;
  int64_t row_bytes = 0;
};

// Rows of a panel this many floats apart lie in different sets of an 8-way L1 (64 sets of 64 bytes).
inline int64_t spread_row(int64_t n) {
  const int64_t row = round_up(n, VL);
  return row >= 256 && row / 16 % 2 == 0 ? row + 16 : row;
}

// Rows [first, first + rows) of a matrix [·, cols] as [units(rows)][cols padded to whole vectors]: its own memory where
// that already is so.
template <class Unit>
class Panel {
 public:
  explicit Panel(const Tensor& t) : Panel(t, 0, t.size(0)) {}
  Panel(const Tensor& t, int64_t first, int64_t rows) {
    const int64_t cols = t.size(1), row = spread_row(cols);
    if (std::is_same_v<Unit, float> && t.scalar_type() == ScalarType::Float && row == cols) {
      view = {static_cast<const Unit*>(t.const_data_ptr()) + first * cols, row};
      return;
    }
    copy = std::make_unique<Scratch<Unit>>(units<Unit>(rows) * row);
    view = {copy->get(), row};
    dispatch(t, [&](auto* type) {
      auto* from = data(t, type) + first * cols;
      torch::stable::parallel_for(0, units<Unit>(rows), 64, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u)
          for (int64_t j = 0; j < round_up(cols, VL); j += VL) {
            const int64_t i = u * terms<Unit>;
            vf second = terms<Unit> == 2 && i + 1 < rows ? load(from + (i + 1) * cols + j, cols - j) : vf{};
            store_unit_row(copy->get() + u * row + j, load(from + i * cols + j, cols - j), second);
          }
      });
    });
  }
  Rows<Unit> at(int64_t unit, int64_t col) const { return {view.p + unit * view.row + col, view.row}; }
  int64_t row() const { return view.row; }

 private:
  Rows<Unit> view;
  std::unique_ptr<Scratch<Unit>> copy;
};

// The transpose of rows [first, first + rows) of a matrix [·, cols] as [units(cols)][rows padded to whole vectors].
template <class Unit>
class TransposedPanel {
 public:
  explicit TransposedPanel(const Tensor& t) : TransposedPanel(t, 0, t.size(0)) {}
  TransposedPanel(const Tensor& t, int64_t first, int64_t rows)
      : row_(spread_row(rows)), copy(units<Unit>(t.size(1)) * spread_row(rows)) {
    const int64_t cols = t.size(1), padded = round_up(rows, VL), across = (cols + VL - 1) / VL;
    dispatch(t, [&](auto* type) {
      auto* from = data(t, type) + first * cols;
      constexpr int64_t block = VL / terms<Unit>;  // units that one vector of a row holds
      torch::stable::parallel_for(0, padded / VL * across, 16, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {  // a square of VL x VL elements
          const int64_t j = task % across * VL, n = std::min<int64_t>(block, units<Unit>(cols - j));
          for (int64_t i = task / across * VL; i < task / across * VL + VL; ++i) {
            alignas(64) Unit line[VL];
            vf v = i < rows ? load(from + i * cols + j, cols - j) : vf{};
            if constexpr (std::is_same_v<Unit, float>)
              store(line, v);
            else
              store(reinterpret_cast<bf16*>(line), v);
            for (int64_t l = 0; l < n; ++l) copy.get()[(j / terms<Unit> + l) * row_ + i] = line[l];
          }
        }
      });
    });
  }
  Rows<Unit> at(int64_t unit, int64_t col) const { return {copy.get() + unit * row_ + col, row_}; }
  int64_t row() const { return row_; }

 private:
  const int64_t row_;
  Scratch<Unit> copy;
};

// Tokens [t, t + rows) x features [k, k + cols), k a multiple of VL, as the broadcast operand with features as depth.
template <class Unit, class T>
inline Broadcast<Unit> feature_tile(const T* x, int64_t ld, int64_t t, int64_t rows, int64_t k, int64_t cols, Mask mask,
                                    Unit* tile) {
  constexpr bool own = std::is_same_v<Unit, float> ? std::is_same_v<T, float> : std::is_same_v<T, bf16>;
  if constexpr (own) {
    const bool aligned = reinterpret_cast<uintptr_t>(x + t * ld + k) % alignof(Unit) == 0;  // a view may start between pairs
    if (!mask.bits && aligned && cols % terms<Unit> == 0 && ld % terms<Unit> == 0)
      return {reinterpret_cast<const Unit*>(x + t * ld + k), ld / terms<Unit>, 1};
  }
  const int64_t row = round_up(cols, VL);
  auto* elements = reinterpret_cast<std::conditional_t<std::is_same_v<Unit, float>, float, bf16>*>(tile);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += VL) store(elements + i * row + j, mask.load_kept(x, ld, t + i, k + j, cols - j));
  return {tile, row / terms<Unit>, 1};
}

// The same block as the operand read as vectors, with tokens as depth.
template <class Unit, class T>
inline Rows<Unit> token_tile(const T* x, int64_t ld, int64_t t, int64_t rows, int64_t k, int64_t cols, Mask mask,
                             Unit* tile) {
  if constexpr (std::is_same_v<Unit, float> && std::is_same_v<T, float>) {
    if (!mask.bits && cols % VL == 0) return {x + t * ld + k, ld};
  }
  const int64_t row = round_up(cols, VL);
  for (int64_t i = 0; i < rows; i += terms<Unit>)
    for (int64_t j = 0; j < row; j += VL) {
      Unit* to = tile + i / terms<Unit> * row + j;
      if constexpr (terms<Unit> == 2 && std::is_same_v<T, bf16>) {
        if (i + 1 < rows && j + VL <= cols) {  // bits side by side, with no way over float32
          vu first = load_bits(x + (t + i) * ld + k + j), second = load_bits(x + (t + i + 1) * ld + k + j);
          if (mask.bits) first &= (vu)mask.keep(t + i, k + j), second &= (vu)mask.keep(t + i + 1, k + j);
          store(to, first | second << 16);
          continue;
        }
      }
      vf second = terms<Unit> == 2 && i + 1 < rows ? mask.load_kept(x, ld, t + i + 1, k + j, cols - j) : vf{};
      store_unit_row(to, mask.load_kept(x, ld, t + i, k + j, cols - j), second);
    }
  return {tile, row};
}

// S or dS, or the columns of one group: element (t, r) at p[t * ld + r].
struct Coefficients {
  Coefficients(const Tensor& s, int64_t first, int64_t ranks)
      : p(static_cast<const float*>(s.const_data_ptr()) + first), ld(s.stride(0)), ranks(ranks) {}
  explicit Coefficients(const Tensor& s) : Coefficients(s, 0, s.size(1)) {}
  const float* p;
  int64_t ld, ranks;
};

// Coefficients of tokens [t, t + rows), transposed: ranks x tokens, tokens as depth.
template <class Unit>
inline Broadcast<Unit> token_coefficients(Coefficients s, int64_t t, int64_t rows, Unit* tile) {
  const int64_t r = s.ranks;
  if constexpr (std::is_same_v<Unit, float>) {
    return {s.p + t * s.ld, 1, s.ld};
  } else {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < r; j += VL) {
        const float* at = s.p + (t + i) * s.ld + j;
        vf second = i + 1 < rows ? load(at + s.ld, r - j) : vf{};
        vu words = bf16_bits(load(at, r - j)) | bf16_bits(second) << 16;
        std::memcpy(tile + i / 2 * r + j, &words, std::min<int64_t>(VL, r - j) * 4);
      }
    return {tile, 1, r};
  }
}

// factor · s of tokens [t, t + rows), ranks as depth. `tile` holds rows x round_up(R, VL) floats.
template <class Unit>
inline Broadcast<Unit> rank_coefficients(Coefficients s, int64_t t, int64_t rows, float factor, Unit* tile) {
  const int64_t r = s.ranks, row = round_up(r, VL);
  auto* elements = reinterpret_cast<std::conditional_t<std::is_same_v<Unit, float>, float, bf16>*>(tile);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < r; j += VL) store(elements + i * row + j, factor * load(s.p + (t + i) * s.ld + j, r - j));
  return {tile, row / terms<Unit>, 1};
}

}  // namespace fastft
