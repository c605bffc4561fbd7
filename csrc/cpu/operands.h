// Operands of panel_product from tensors, in units of one float32 or of a pair of bfloat16 terms.
//
// Adapters are small and packed once a call (Panel, TransposedPanel). Activations are read in place where their memory
// already is the operand, otherwise through a tile in L1; that is also where dropout zeroes elements.
#pragma once

#include "common/empty.h"
#include "panel_tiles.h"
#include "transpose.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <type_traits>

namespace fastft {

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

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
    const tiles::Scope scope;
    for (int64_t task = begin; task < end; ++task) body(task);
  });
}

// About what work costs one thread, in nanoseconds: memory that is read once, products of it with tokens.
inline double read_cost(double bytes) { return 0.07 * bytes; }
inline double product_cost(double products) { return products / (4 * VL); }
// Not worth sharing: two threads that are awake take 3 us to begin and to end, more after a GEMM that emptied their caches
// (of a decode step with one adapter, 1.36 ms instead of 1.47 with twice this). A layer of 24 tokens x 40 x 56, a few us an
// op, took 20 times as long where other processes kept the cores busy.
constexpr double serial_cost = 16000;

template <class F>
inline void parallel_for(int64_t n, double cost, const F& body) {  // the same, where all of it costs about so much
  if (cost >= serial_cost) return parallel_for(n, body);
  const tiles::Scope scope;
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

// The same for sums that stay in float32: AMX forms those of bfloat16 activations and a float32 adapter too, exactly, of
// three bfloat16 parts of it (panel_tiles.h).
template <class F>
inline void dispatch_exact_units(const Tensor& activations, const Tensor& adapter, const F& f) {
  dispatch(activations, [&](auto* type) {
    if constexpr (in_tiles<bf16x2> && std::is_same_v<decltype(type), bf16*>)
      f(type, static_cast<bf16x2*>(nullptr));
    else
      dispatch_units(activations, adapter, f);
  });
}

constexpr int most_parts = 3;
template <class Unit>
inline int parts_of(const Tensor& adapter) {
  return in_tiles<Unit> && adapter.scalar_type() == ScalarType::Float ? most_parts : 1;
}

// Parts of the coefficients in Y and dX: of eight bits each, twice what the result keeps.
template <class Unit>
constexpr int coefficient_parts = in_tiles<Unit> ? 2 : 1;

// The next bfloat16 part of v, in the low half of each lane, which v loses. The last one is rounded, the others are cut off.
inline vu take_part(vf& v, bool last) {
  if (last) return bf16_bits(v);
  const vu high = reinterpret_cast<vu>(v) >> 16;
  v -= reinterpret_cast<vf>(high << 16);
  return high;
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

// A packed operand of `depth` units: strips of contiguous memory, or rows far apart would each be on a page of their own.
// Units up to what a product takes are zeros.
template <class Unit>
class Packed {
 public:
  Packed(int64_t depth, int64_t cols, int parts)
      : row_(std::min(strip_cols, round_up(cols, unit_step))),
        part_(product_units<Unit>(depth * terms<Unit>) * row_),
        strip_(parts * part_),
        parts_(parts),
        memory(blocks(cols, strip_cols) * strip_) {
    for (int64_t strip = 0; part_ > depth * row_ && strip < blocks(cols, strip_cols) * strip_; strip += part_)
      std::memset(memory.get() + strip + depth * row_, 0, (part_ - depth * row_) * sizeof(Unit));
  }
  Strips<Unit> at(int64_t unit, int64_t col) const { return {to(unit, col), row_, strip_, part_, parts_}; }
  Unit* to(int64_t unit, int64_t col, int part = 0) const {
    return memory.get() + col / strip_cols * strip_ + part * part_ + unit * row_ + col % strip_cols;
  }
  int64_t row() const { return row_; }
  int parts() const { return parts_; }

 private:
  const int64_t row_, part_, strip_;
  const int parts_;
  Scratch<Unit> memory;
};

// Rows [first, first + rows) of a matrix [·, cols] as units(rows) units deep.
template <class Unit>
class Panel : public Packed<Unit> {
 public:
  explicit Panel(const Tensor& t, int parts = 1) : Panel(t, 0, t.size(0), parts) {}
  Panel(const Tensor& t, int64_t first, int64_t rows, int parts = 1) : Packed<Unit>(units<Unit>(rows), t.size(1), parts) {
    const int64_t cols = t.size(1);
    dispatch(t, [&](auto* type) { fill(data(t, type) + first * cols, rows, cols); });
  }
  template <class T>
  Panel(const T* from, int64_t rows, int64_t cols) : Packed<Unit>(units<Unit>(rows), cols, 1) {
    fill(from, rows, cols);
  }

 private:
  template <class T>
  void fill(const T* from, int64_t rows, int64_t cols) {
    const int parts = this->parts();
    torch::stable::parallel_for(
        0, units<Unit>(rows), std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1)), [&](int64_t begin, int64_t end) {
          for (int64_t u = begin; u < end; ++u)
            for (int64_t j = 0; j < cols; j += VL) {
              const int64_t i = u * terms<Unit>;
              if constexpr (terms<Unit> == 2 && std::is_same_v<T, bf16>) {
                if (i + 1 < rows && j + VL <= cols) {  // bits side by side, with no way over float32
                  store(this->to(u, j), load_bits(from + i * cols + j) | load_bits(from + (i + 1) * cols + j) << 16);
                  continue;
                }
              }
              vf one = load(from + i * cols + j, cols - j);
              vf second = terms<Unit> == 2 && i + 1 < rows ? load(from + (i + 1) * cols + j, cols - j) : vf{};
              if constexpr (in_tiles<Unit>)
                for (int part = 0; part < parts; ++part) {
                  const vu low = take_part(one, part + 1 == parts);
                  store(this->to(u, j, part), low | take_part(second, part + 1 == parts) << 16);
                }
              else
                store_unit_row(this->to(u, j), one, second);
            }
        });
  }
};

// A block of a matrix, rows [first, first + rows) x columns [from_col, from_col + cols), transposed: units(cols) units deep,
// of `rows` columns.
template <class Unit>
class TransposedPanel : public Packed<Unit> {
 public:
  explicit TransposedPanel(const Tensor& t, int parts = 1) : TransposedPanel(t, 0, t.size(0), parts) {}
  TransposedPanel(const Tensor& t, int64_t first, int64_t rows, int parts)
      : TransposedPanel(t, first, rows, 0, t.size(1), parts) {}
  TransposedPanel(const Tensor& t, int64_t first, int64_t rows, int64_t from_col, int64_t cols, int parts)
      : Packed<Unit>(units<Unit>(cols), rows, parts) {
    const int64_t ld = t.size(1), at = first * ld + from_col;
    if constexpr (std::is_same_v<Unit, float>)
      dispatch(t, [&](auto* type) { fill(data(t, type) + at, ld, rows, cols); });
    else if (t.scalar_type() == ScalarType::Float)
      fill_parts(static_cast<const float*>(t.const_data_ptr()) + at, ld, rows, cols);
    else
      fill_pairs(static_cast<const uint16_t*>(t.const_data_ptr()) + at, ld, rows, cols);
  }
  TransposedPanel(const bf16* from, int64_t rows, int64_t cols) : Packed<Unit>(units<Unit>(cols), rows, 1) {
    fill_pairs(reinterpret_cast<const uint16_t*>(from), cols, rows, cols);
  }

 private:
  static constexpr int64_t together = 64;  // units of a block

  // block(r, u, high, wide) for all blocks of rows [r, r + high) x units [u, u + wide).
  template <class F>
  static void for_blocks(int64_t rows, int64_t depth, const F& block) {
    const int64_t across = blocks(depth, together);
    torch::stable::parallel_for(0, blocks(rows, strip_cols) * across, 8, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t u = task % across * together, r = task / across * strip_cols;
        block(r, u, std::min(strip_cols, rows - r), std::min(together, depth - u));
      }
    });
  }

  // Rows r ... r + high of `wide` units as columns of units u ... u + wide.
  template <class T>
  void put(const T* from, int64_t ld, int64_t r, int64_t u, int64_t high, int64_t wide, int part = 0) {
    transpose<float>(from, ld, high, wide, reinterpret_cast<float*>(this->to(u, r, part)), this->row());
  }

  template <class T>
  void fill(const T* from, int64_t ld, int64_t rows, int64_t depth) {
    for_blocks(rows, depth,
               [&](int64_t r, int64_t u, int64_t high, int64_t wide) { put(from + r * ld + u, ld, r, u, high, wide); });
  }

  // Neighbours in a row are a pair, so rows are words of half as many columns.
  void fill_pairs(const uint16_t* from, int64_t ld, int64_t rows, int64_t cols) {
    const int64_t words = units<Unit>(cols);
    if (cols % 2 == 0 && ld % 2 == 0) return fill(reinterpret_cast<const float*>(from), ld / 2, rows, words);
    const Scratch<float> even(rows * words);
    auto* to = reinterpret_cast<uint16_t*>(even.get());
    for (int64_t i = 0; i < rows; ++i, to += 2 * words, from += ld) {
      std::memcpy(to, from, cols * 2);
      if (cols % 2) to[cols] = 0;
    }
    fill(even.get(), words, rows, words);
  }

  void fill_parts(const float* from, int64_t ld, int64_t rows, int64_t cols) {
    for_blocks(rows, units<Unit>(cols), [&](int64_t r, int64_t u, int64_t high, int64_t wide) {
      alignas(64) float split[most_parts][strip_cols * together];
      for (int64_t i = 0; i < high; ++i)
        for (int64_t j = 0; j < wide; j += VL / 2) {
          const int64_t k = 2 * (u + j);
          vf v = load(from + (r + i) * ld + k, cols - k);
          for (int part = 0; part < this->parts(); ++part) {
            const vu16 halves = narrow(take_part(v, part + 1 == this->parts()));
            std::memcpy(split[part] + i * together + j, &halves, sizeof halves);
          }
        }
      for (int part = 0; part < this->parts(); ++part) put(split[part], together, r, u, high, wide, part);
    });
  }
};

// Tokens [t, t + rows) x features [k, k + cols), k a multiple of VL, as the broadcast operand with features as depth.
template <class Unit, class T>
inline DepthInRows<Unit> feature_tile(const T* x, int64_t ld, int64_t t, int64_t rows, int64_t k, int64_t cols, Mask mask,
                                      Unit* tile) {
  constexpr bool own = std::is_same_v<Unit, float> ? std::is_same_v<T, float> : std::is_same_v<T, bf16>;
  if constexpr (own) {
    const bool aligned = reinterpret_cast<uintptr_t>(x + t * ld + k) % alignof(Unit) == 0;  // a view may start between pairs
    const bool whole = cols % terms<Unit> == 0 && units<Unit>(cols) == product_units<Unit>(cols);
    if (!mask.bits && aligned && whole && ld % terms<Unit> == 0)
      return {reinterpret_cast<const Unit*>(x + t * ld + k), ld / terms<Unit>};
  }
  const int64_t row = round_up(product_units<Unit>(cols) * terms<Unit>, VL);
  auto* elements = reinterpret_cast<std::conditional_t<std::is_same_v<Unit, float>, float, bf16>*>(tile);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < row; j += VL)
      store(elements + i * row + j, j < cols ? mask.load_kept(x, ld, t + i, k + j, cols - j) : vf{});
  return {tile, row / terms<Unit>};
}

// The same block as the operand read as vectors, with tokens as depth.
template <class Unit, class T>
inline Strips<Unit> token_tile(const T* x, int64_t ld, int64_t t, int64_t rows, int64_t k, int64_t cols, Mask mask,
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
  for (int64_t u = units<Unit>(rows); u < product_units<Unit>(rows); ++u) std::memset(tile + u * row, 0, row * sizeof(Unit));
  return {tile, row};
}

// S or dS, or the columns of one group: element (t, r) at p[t * ld + r].
struct Coefficients {
  Coefficients(const Tensor& s, int64_t first, int64_t ranks)
      : p(static_cast<const float*>(s.const_data_ptr()) + first), ld(s.stride(0)), ranks(ranks) {}
  explicit Coefficients(const Tensor& s) : Coefficients(s, 0, s.size(1)) {}
  Coefficients(const float* p, int64_t ld, int64_t ranks) : p(p), ld(ld), ranks(ranks) {}
  const float* p;
  int64_t ld, ranks;
};

// Coefficients of tokens [t, t + rows), t a multiple of `tall`, transposed: ranks x tokens, tokens as depth.
template <class Unit>
class TokenCoefficients {
 public:
  TokenCoefficients(Coefficients s, int64_t tokens, int64_t tall, const Tensor& adapter) : s(s), tall(tall) {
    if constexpr (in_tiles<Unit>) pack(tokens, parts_of<Unit>(adapter));
  }

  // `tile` holds tall x ranks floats.
  auto at(int64_t t, int64_t rows, Unit* tile) const {
    const int64_t r = s.ranks;
    if constexpr (in_tiles<Unit>) {
      const int64_t row = units<Unit>(tall), part = r * row;
      return DepthInRows<Unit>{packed->get() + t / tall * parts * part, row, part, parts};
    } else if constexpr (std::is_same_v<Unit, float>) {
      return DepthInColumns<Unit>{s.p + t * s.ld, s.ld};
    } else {
      for (int64_t i = 0; i < rows; i += 2)
        for (int64_t j = 0; j < r; j += VL) {
          const float* at = s.p + (t + i) * s.ld + j;
          vf second = i + 1 < rows ? load(at + s.ld, r - j) : vf{};
          vu words = bf16_bits(load(at, r - j)) | bf16_bits(second) << 16;
          std::memcpy(tile + i / 2 * r + j, &words, std::min<int64_t>(VL, r - j) * 4);
        }
      return DepthInColumns<Unit>{tile, r};
    }
  }

 private:
  // Tiles are read along their depth: blocks of `tall` tokens, in each the parts, in each the ranks.
  void pack(int64_t tokens, int how_many) {
    parts = how_many;
    const int64_t r = s.ranks, row = units<Unit>(tall), part = r * row;
    packed.emplace(blocks(tokens, tall) * parts * part);
    const auto block = [&](int64_t task) {
      const int64_t t = task * tall, rows = std::min(tall, tokens - t), ld = round_up(r, VL);
      const Scratch<float> pairs(parts * row * ld);
      for (int64_t u = 0; u < units<Unit>(rows); ++u)
        for (int64_t j = 0; j < r; j += VL) {
          const float* at = s.p + (t + 2 * u) * s.ld + j;
          vf first = load(at, r - j), second = 2 * u + 1 < rows ? load(at + s.ld, r - j) : vf{};
          for (int q = 0; q < parts; ++q) {
            const vu low = take_part(first, q + 1 == parts);
            const vu words = low | take_part(second, q + 1 == parts) << 16;
            std::memcpy(pairs.get() + (q * row + u) * ld + j, &words, sizeof words);
          }
        }
      for (int q = 0; q < parts; ++q)
        transpose<float>(pairs.get() + q * row * ld, ld, units<Unit>(rows), r,
                         reinterpret_cast<float*>(packed->get()) + (task * parts + q) * part, row);
    };
    parallel_for(blocks(tokens, tall), product_cost(32.0 * parts * tokens * r), block);
  }

  Coefficients s;
  int64_t tall;
  int parts = 1;
  std::optional<Scratch<Unit>> packed;
};

// Floats of a token in the tile of rank_coefficients.
template <class Unit>
constexpr int64_t rank_floats(int64_t ranks) {
  return coefficient_parts<Unit> * round_up(product_units<Unit>(ranks), VL);
}

// factor · s of tokens [t, t + rows), ranks as depth. `tile` holds rows x rank_floats(R) floats.
template <class Unit>
inline DepthInRows<Unit> rank_coefficients(Coefficients s, int64_t t, int64_t rows, float factor, Unit* tile) {
  constexpr int parts = coefficient_parts<Unit>;
  const int64_t r = s.ranks, row = round_up(product_units<Unit>(r) * terms<Unit>, VL), part = rows * row;
  auto* elements = reinterpret_cast<std::conditional_t<std::is_same_v<Unit, float>, float, bf16>*>(tile);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < row; j += VL) {
      vf v = j < r ? factor * load(s.p + (t + i) * s.ld + j, r - j) : vf{};
      if constexpr (in_tiles<Unit>)
        for (int q = 0; q < parts; ++q) {
          const vu16 bits = narrow(take_part(v, q + 1 == parts));
          std::memcpy(elements + q * part + i * row + j, &bits, sizeof bits);
        }
      else
        store(elements + i * row + j, v);
    }
  return {tile, row / terms<Unit>, part / terms<Unit>, parts};
}

}  // namespace fastft
