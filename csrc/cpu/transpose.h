// Transposed copies: of a block of an activation, so that vectors run along tokens whatever columns are asked for, and of
// adapters.
#pragma once

#include "panel.h"

namespace fastft {

using v4 = float __attribute__((vector_size(16)));
using v8 = float __attribute__((vector_size(32)));
using u4 = uint32_t __attribute__((vector_size(16)));
using h4 = uint16_t __attribute__((vector_size(8)));

constexpr int64_t transposed_units = 256;   // of a column in a block; 512 tokens where units are pairs
constexpr int64_t transposed_columns = 32;  // that one task copies: their lines are in L1 together
constexpr int64_t unit_step = 16;           // units that vectors of any width fill, and two of AVX2's

// Four neighbouring elements as units: floats, or pairs with those of the next row.
template <class Unit, class T>
[[gnu::always_inline]] inline v4 load_units(const T* p, const T* next) {
  if constexpr (std::is_same_v<Unit, bf16x2>) {
    const h4 low = load_bytes<h4>(p), high = next ? load_bytes<h4>(next) : h4{};
    return (v4)__builtin_shufflevector(low, high, 0, 4, 1, 5, 2, 6, 3, 7);
  } else if constexpr (std::is_same_v<T, float>) {
    return load_bytes<v4>(p);
  } else if constexpr (std::is_same_v<T, bf16>) {
    return (v4)(__builtin_convertvector(load_bytes<h4>(p), u4) << 16);
  } else {
#if defined(__F16C__)
    return (v4)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#else
    return load(p);
#endif
  }
}

// The same of rows and columns that may not be there: what isn't reads as 0.
template <class Unit, class T>
inline v4 load_units(const T* p, int64_t ld, int64_t rows, int64_t cols) {
  T line[2][4] = {};
  const int64_t n = std::min<int64_t>(cols, 4);
  for (int64_t i = 0; i < std::min(rows, terms<Unit>); ++i) std::memcpy(line[i], p + i * ld, n * sizeof(T));
  return load_units<Unit>(line[0], line[1]);
}

// Rows [0, rows) x columns [0, cols) of a matrix as to[column * to_row + unit], zeros up to a whole unit_step of units.
template <class Unit, class T>
void transpose(const T* from, int64_t ld, int64_t rows, int64_t cols, Unit* to, int64_t to_row) {
  constexpr int64_t tall = 8 * terms<Unit>;
  for (int64_t u = 0; u < round_up(units<Unit>(rows), unit_step); u += 8) {
    const int64_t first = u * terms<Unit>, left = rows - first;
    // Both what is read and what is written lies farther apart than prefetchers look, and is too much for L2 (2.4 instead of
    // 3.4 ms for 1024 x 4096 float32).
    for (int64_t i = tall; i < std::min(2 * tall, left); ++i)
      for (int64_t c = 0; c < cols; c += 64 / sizeof(T)) __builtin_prefetch(from + (first + i) * ld + c, 0, 3);
    if (u % 16 == 0)
      for (int64_t c = 0; c < cols; ++c) __builtin_prefetch(to + c * to_row + u + 16, 1, 3);
    for (int64_t c = 0; c < cols; c += 4) {
      const T* p = from + first * ld + c;
      v4 row[8];
      if (left >= tall && c + 4 <= cols) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) row[i] = load_units<Unit>(p + i * terms<Unit> * ld, p + (i * terms<Unit> + 1) * ld);
      } else {
        for (int64_t i = 0; i < 8; ++i)
          row[i] = left > i * terms<Unit> ? load_units<Unit>(p + i * terms<Unit> * ld, ld, left - i * terms<Unit>, cols - c)
                                          : v4{};
      }
      const v8 a = __builtin_shufflevector(row[0], row[4], 0, 1, 2, 3, 4, 5, 6, 7);
      const v8 b = __builtin_shufflevector(row[1], row[5], 0, 1, 2, 3, 4, 5, 6, 7);
      const v8 d = __builtin_shufflevector(row[2], row[6], 0, 1, 2, 3, 4, 5, 6, 7);
      const v8 e = __builtin_shufflevector(row[3], row[7], 0, 1, 2, 3, 4, 5, 6, 7);
      const v8 ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
      const v8 de = __builtin_shufflevector(d, e, 0, 8, 1, 9, 4, 12, 5, 13);
      const v8 ab2 = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
      const v8 de2 = __builtin_shufflevector(d, e, 2, 10, 3, 11, 6, 14, 7, 15);
      const v8 column[4] = {__builtin_shufflevector(ab, de, 0, 1, 8, 9, 4, 5, 12, 13),
                            __builtin_shufflevector(ab, de, 2, 3, 10, 11, 6, 7, 14, 15),
                            __builtin_shufflevector(ab2, de2, 0, 1, 8, 9, 4, 5, 12, 13),
                            __builtin_shufflevector(ab2, de2, 2, 3, 10, 11, 6, 7, 14, 15)};
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j)
        if (c + j < cols) std::memcpy(to + (c + j) * to_row + u, &column[j], sizeof(v8));
    }
  }
}

}  // namespace fastft
