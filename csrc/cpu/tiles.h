// Intel's AMX (Sapphire Rapids and later): products of tiles, registers of 16 rows of 64 bytes. One instruction adds the
// product of 16 rows of 32 bfloat16 terms with 16 columns to 16 x 16 float32 sums, eight times the rate of AVX-512's pairs.
//
// Each instruction is a function here, as assembly: GCC's intrinsics do not tell it that a load reads memory. A thread gives
// tiles their shapes before it uses them, and lets go of them when its part of an op is done (Scope): a library that comes
// next finds none, and a thread that is switched out has 8 KiB less to save.
#pragma once

#include "vec.h"

#if defined(__AMX_BF16__)
#define FASTFT_TILES 1
#endif

namespace fastft::tiles {

constexpr int64_t rows = 16;   // of a tile
constexpr int64_t depth = 16;  // units of two terms that one product adds up at most

// Units that a product of so many is to be padded to, with zeros in both operands: one product, or full ones.
constexpr int64_t padded(int64_t units) { return units <= depth ? units : (units + depth - 1) / depth * depth; }

#if defined(FASTFT_TILES)
constexpr bool exist = true;

constexpr int sums = 4;     // tiles 0 ... 3 hold sums
constexpr int first_x = 4;  // 4 and 5 rows of the left operand
constexpr int first_p = 6;  // 6 and 7 columns of the right one

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline thread_local int64_t shaped = 0;  // what this thread's tiles hold: rows and units, 0 without tiles

// Sums of `m` rows, over `units` units a product.
inline void shape(int64_t m, int64_t units) {
  const int64_t wanted = m << 8 | units;
  if (shaped == wanted) return;
  Shapes shapes;
  for (int t = 0; t < first_p + 2; ++t) {
    shapes.rows[t] = t < first_p ? m : units;
    shapes.row_bytes[t] = t >= first_x && t < first_p ? units * 4 : 64;
  }
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  shaped = wanted;
}

struct Scope {
  ~Scope() {
    if (shaped) asm volatile("tilerelease");
    shaped = 0;
  }
};

template <int tile>
[[gnu::always_inline]] inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int tile>
[[gnu::always_inline]] inline void load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(tile) : "memory");
}

template <int tile>
[[gnu::always_inline]] inline void store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(tile) : "memory");
}

template <int sum, int x, int p>
[[gnu::always_inline]] inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(x), "i"(p));
}

#else
constexpr bool exist = false;
struct Scope {
  ~Scope() {}  // not trivial, or it would be an unused variable
};
#endif

}  // namespace fastft::tiles
