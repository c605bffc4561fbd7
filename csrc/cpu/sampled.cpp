// Products of the sparse family on CPU; definitions in fastft/ops/sparse.py.
//
// Both go over blocks of tokens, of which activations are copied token-contiguous: an entry is then a sum or a step along
// vectors of its column's tokens, which come from L2. Every entry of a sampled product, and every element of Y, is owned by
// one task, so results do not depend on the number of threads.
#include "entries.h"
#include "transpose.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace fastft {
namespace {

constexpr int64_t tile_bytes = 1 << 20;    // of columns of a transposed block, that stay in L2 while all rows use them
constexpr int64_t wave_bytes = 128 << 20;  // of transposed blocks and sums for threads, which would outgrow a dense gradient
constexpr int group = 8;                   // entries of a row that share what is read of the row

// Ask once, outside of parallel_for: a worker's own answer was another one when it was asked first.
inline int64_t row_ranges() { return torch::stable::get_num_threads(); }

// Where range i of n ranges of rows begins, each with as many entries, in whole steps of rows.
int64_t range_begin(const Entries& s, int64_t i, int64_t n, int64_t step) {
  if (i == 0 || i == n) return i ? s.rows : 0;
  return std::min(s.rows, (s.row_of(i * s.count / n) + step - 1) / step * step);
}

[[gnu::always_inline]] inline vf multiply_add(vf sum, const float* x, const float* p) { return sum + load(x) * load(p); }
[[gnu::always_inline]] inline vf multiply_add(vf sum, const bf16x2* x, const bf16x2* p) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(p));
#else
  const vu a = load_bytes<vu>(x), b = load_bytes<vu>(p);
  sum += (vf)(a << 16) * (vf)(b << 16);
  return sum + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

inline v4 fold(vf v) {
#if defined(__AVX512F__)
  return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 8, 9, 10, 11)) +
         (__builtin_shufflevector(v, v, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 12, 13, 14, 15));
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}

// The sums of four vectors' elements.
[[gnu::always_inline]] inline v4 lane_sums(vf v0, vf v1, vf v2, vf v3) {
  const v4 a = fold(v0), b = fold(v1), c = fold(v2), d = fold(v3);
  const v4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const v4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// out[e] (+)= Σ_u left[u] right[columns[e]][u] of N entries. Sums of few entries are several each: an addition takes as long
// as eight of them in a row.
template <int N, class Unit>
[[gnu::always_inline]] inline void sample(const Unit* left, const Unit* right, int64_t row, int64_t units,
                                          const int32_t* columns, float* out, bool add) {
  constexpr int parts = N > 4 || VL == 4 ? 1 : unit_step / VL;
  const Unit* column[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    column[n] = right + columns[n] * row;
    asm("" : "+r"(column[n]));  // GCC computes addresses in vectors otherwise: 11.3 instead of 7.5 ns an entry and block
  }
  vf sum[parts][round_up(N, 4)] = {};
  for (int64_t u = 0; u < units; u += parts * VL)
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[part][n] = multiply_add(sum[part][n], left + u + part * VL, column[n] + u + part * VL);
#pragma GCC unroll 4
  for (int n = 0; n < N; n += 4) {
#pragma GCC unroll 4
    for (int part = 1; part < parts; ++part)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[0][n + i] += sum[part][n + i];
    v4 total = lane_sums(sum[0][n], sum[0][n + 1], sum[0][n + 2], sum[0][n + 3]), before = {};
    constexpr size_t rest = (N - 1) % 4 + 1;
    const size_t bytes = sizeof(float) * (n + 4 <= N ? 4 : rest);
    if (add) std::memcpy(&before, out + n, bytes), total += before;
    std::memcpy(out + n, &total, bytes);
  }
}

template <class Unit>
inline void sample_row(const Unit* left, const Unit* right, int64_t row, int64_t units, const int32_t* columns, float* out,
                       int64_t n, bool add) {
  for (; n >= group; n -= group, columns += group, out += group) sample<group>(left, right, row, units, columns, out, add);
  switch (n) {
    case 7: return sample<7>(left, right, row, units, columns, out, add);
    case 6: return sample<6>(left, right, row, units, columns, out, add);
    case 5: return sample<5>(left, right, row, units, columns, out, add);
    case 4: return sample<4>(left, right, row, units, columns, out, add);
    case 3: return sample<3>(left, right, row, units, columns, out, add);
    case 2: return sample<2>(left, right, row, units, columns, out, add);
    case 1: return sample<1>(left, right, row, units, columns, out, add);
  }
}

// Rows this many floats apart lie in different sets of an 8-way L1 (64 sets of 64 bytes).
inline int64_t spread_row(int64_t n) {
  const int64_t row = round_up(n, VL);
  return row >= 256 && row / 16 % 2 == 0 ? row + 16 : row;
}

// A matrix [T, cols], of which blocks of tokens are held as [cols][row] units each.
template <class Unit, class T>
struct TransposedBlocks {
  TransposedBlocks(const Tensor& t, int64_t units, int64_t count = 1)
      : from(data(t, static_cast<T*>(nullptr))),
        ld(t.stride(0)),
        cols(t.size(1)),
        row(spread_row(units)),
        copy(count * cols * row) {}
  int64_t tasks() const { return blocks(cols, transposed_columns); }
  void load(int64_t task, int64_t first, int64_t tokens, int64_t block = 0) const {
    const int64_t c = task * transposed_columns, n = std::min(transposed_columns, cols - c);
    transpose<Unit>(from + first * ld + c, ld, tokens, n, copy.get() + (block * cols + c) * row, row);
  }
  const Unit* at(int64_t column, int64_t block = 0) const { return copy.get() + (block * cols + column) * row; }

  const T* from;
  const int64_t ld, cols, row;
  const Scratch<Unit> copy;
};

// Of `count` blocks of tokens, `bytes` each, as many as are held at a time: one a thread, where there is memory for them.
inline int64_t wave_of(int64_t count, int64_t threads, int64_t bytes) {
  return std::min({count, threads, std::max<int64_t>(1, wave_bytes / bytes)});
}

// Every block of tokens is copied by load(task, block, slot) for all of `loads` tasks, then used by use(begin, end, block,
// slot) for ranges of rows, in whole steps, that are all of them; after a wave of n blocks then(n). With a block a thread
// each works on its own. Threads that share one read what another core has just written: 4.1 instead of 2.9 ms for 1 % of
// 2048 x 2048 at 1,024 tokens with two threads, hardly faster than one.
template <class Load, class Use, class Then>
void for_waves(const Entries& s, int64_t count, int64_t wave, int64_t ranges, int64_t step, int64_t loads, const Load& load,
               const Use& use, const Then& then) {
  for (int64_t block = 0; block < count; block += wave) {
    const int64_t n = std::min(wave, count - block);
    if (n == ranges) {
      parallel_for(n, [&](int64_t slot) {
        for (int64_t task = 0; task < loads; ++task) load(task, block + slot, slot);
        use(0, s.rows, block + slot, slot);
      });
    } else {
      parallel_for(n * loads, [&](int64_t task) { load(task % loads, block + task / loads, task / loads); });
      parallel_for(n * ranges, [&](int64_t task) {
        const int64_t range = task % ranges, slot = task / ranges;
        use(range_begin(s, range, ranges, step), range_begin(s, range + 1, ranges, step), block + slot, slot);
      });
    }
    then(n);
  }
}

// Blocks of tokens are added in order, whoever works on them, so the sums don't depend on the number of threads.
template <class Unit, class T>
void sampled_product(float* out, const Tensor& left, const Tensor& right, const Entries& s, bool add) {
  const int64_t tokens = left.size(0), step = transposed_units * terms<Unit>, count = blocks(tokens, step);
  const int64_t held = round_up(std::min(transposed_units, units<Unit>(tokens)), unit_step), ranges = row_ranges();
  const int64_t bytes = (left.size(1) + right.size(1)) * spread_row(held) * sizeof(Unit) + s.count * sizeof(float);
  // Blocks that threads have to share save only barriers, and sums of their own for each cost more.
  const int64_t wave = ranges <= count ? wave_of(count, ranges, bytes) : 1;
  const TransposedBlocks<Unit, T> l(left, held, wave), r(right, held, wave);
  const Scratch<float> parts((wave - 1) * s.count);
  const int64_t tiles = std::max<int64_t>(1, blocks(4 * held * r.cols, tile_bytes)), tile = blocks(r.cols, tiles);
  std::vector<int32_t> ends(s.rows * tiles);  // of a row's entries in each tile of columns
  parallel_for(s.rows, [&](int64_t i) {
    const int32_t *begin = s.columns + s.starts[i], *end = s.columns + s.starts[i + 1];
    for (int64_t k = 0; k < tiles; ++k)
      ends[i * tiles + k] = std::lower_bound(begin, end, std::min((k + 1) * tile, r.cols)) - begin;
  });
  const auto load = [&](int64_t task, int64_t block, int64_t slot) {
    const int64_t t = block * step, n = std::min(step, tokens - t);
    task < l.tasks() ? l.load(task, t, n, slot) : r.load(task - l.tasks(), t, n, slot);
  };
  const auto sample_rows = [&](int64_t begin, int64_t end, int64_t block, int64_t slot) {
    const int64_t length = round_up(units<Unit>(std::min(step, tokens - block * step)), unit_step);
    float* to = slot ? parts.get() + (slot - 1) * s.count : out;
    const bool adds = !slot && (add || block);
    for (int64_t k = 0; k < tiles; ++k)
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = k ? ends[i * tiles + k - 1] : 0, e = s.starts[i] + from;
        sample_row(l.at(i, slot), r.at(0, slot), r.row, length, s.columns + e, to + e, ends[i * tiles + k] - from, adds);
      }
  };
  const auto join = [&](int64_t n) {
    if (n > 1)
      for_entry_tasks(s, [&](int64_t begin, int64_t end) {
        for (int64_t w = 0; w < n - 1; ++w)
          for (int64_t e = begin; e < end; ++e) out[e] += parts.get()[w * s.count + e];
      });
  };
  for_waves(s, count, wave, ranges, 1, l.tasks() + r.tasks(), load, sample_rows, join);
}

void sampled_product_(Tensor out, const Tensor& left, const Tensor& right, const Tensor& starts, const Tensor& columns,
                      bool add) {
  const char* op = "sampled_product_";
  check_matrix(op, "left", left);
  check_matrix(op, "right", right);
  check_rows(op, "left", left, Where::cpu, {f32, b16, h16}, {left.size(0), left.size(1)});
  check_rows(op, "right", right, Where::cpu, {left.scalar_type()}, {left.size(0), right.size(1)});
  const Entries s = checked_entries(op, starts, columns, left.size(1), right.size(1));
  check(op, "out", out, Where::cpu, {f32}, {s.count});
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  if (!s.count) return;
  if (!left.size(0)) {
    if (!add) std::fill_n(to, s.count, 0.0f);
    return;
  }
  dispatch(left, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    sampled_product<std::conditional_t<std::is_same_v<T, bf16>, bf16x2, float>, T>(to, left, right, s, add);
  });
}

inline vf gather(const float* p, const int32_t* at) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps(_mm512_loadu_si512(at), p, 4);
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i*)at), 4);
#else
  return vf{p[at[0]], p[at[1]], p[at[2]], p[at[3]]};
#endif
}

// Σ_e x[columns[e]] values[e] of n entries: one token's element of x deltaᵀ.
inline float dot(const float* x, const int32_t* columns, const float* values, int64_t n) {
  vf sum = {}, other = {};
  int64_t e = 0;
  for (; e + 2 * VL <= n; e += 2 * VL) {
    sum += gather(x, columns + e) * load(values + e);
    other += gather(x, columns + e + VL) * load(values + e + VL);
  }
  if (e + VL <= n) sum += gather(x, columns + e) * load(values + e), e += VL;
  float rest = 0;
  for (; e < n; ++e) rest += x[columns[e]] * values[e];
  return lane_sums(sum + other, vf{}, vf{}, vf{})[0] + rest;
}

// One token: a matrix of 8 bytes an entry is read once, and x is small.
template <class T>
void add_one(T* y, const T* x, int64_t cols, const Entries& s, const float* values) {
  const Scratch<float> wide(round_up(cols, VL));
  const int64_t ranges = row_ranges();
  for (int64_t c = 0; c < cols; c += VL) store(wide.get() + c, load(x + c, cols - c));
  parallel_for(ranges, [&](int64_t range) {
    const int64_t end = range_begin(s, range + 1, ranges, VL);
    for (int64_t i = range_begin(s, range, ranges, VL); i < end; i += VL) {
      vf sum = {};
      const int64_t n = std::min<int64_t>(VL, s.rows - i);
      for (int64_t l = 0; l < n; ++l) {
        const int64_t e = s.starts[i + l];
        sum[l] = dot(wide.get(), s.columns + e, values + e, s.starts[i + l + 1] - e);
      }
      store(y + i, load(y + i, n) + sum, n);
    }
  });
}

// out = Σ_e values[e] x[columns[e]] of n entries, V vectors of tokens each, in several sums, or each would wait for the one
// before.
template <int V>
inline void add_columns(const float* x, int64_t row, const int32_t* columns, const float* values, int64_t n, float* out) {
  constexpr int U = 8 / V;
  vf total[V] = {};
  for (int64_t e = 0; e < n;) {
    const int64_t stop = std::min(n, e + U * chain);
    vf sum[U][V] = {};
    for (; e + U <= stop; e += U)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[u][v] += values[e + u] * load(x + columns[e + u] * row + v * VL);
    for (; e < stop; ++e)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[0][v] += values[e] * load(x + columns[e] * row + v * VL);
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < V; ++v) total[v] += sum[u][v];
  }
  for (int v = 0; v < V; ++v) store(out + v * VL, total[v]);
}

constexpr int64_t row_group = 16;  // rows of delta, columns of y, that are written together

// y[t][i] += sums of V vectors of tokens x rows [first, last) of delta.
template <int V, class T>
void add_rows(T* y, int64_t ld, int64_t tokens, const float* x, int64_t row, const Entries& s, const float* values,
              int64_t first, int64_t last) {
  alignas(64) float sums[row_group * V * VL], turned[V * VL * row_group];
  for (int64_t i = first; i < last; i += row_group) {
    const int64_t n = std::min(row_group, last - i);
    if (s.starts[i] == s.starts[i + n]) continue;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t e = s.starts[i + j];
      for (int64_t t = j; t < tokens; t += n) __builtin_prefetch(y + t * ld + i, 1, 3);
      add_columns<V>(x, row, s.columns + e, values + e, s.starts[i + j + 1] - e, sums + j * V * VL);
    }
    transpose<float>(sums, V * VL, n, V * VL, turned, row_group);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < n; j += VL)
        store(y + t * ld + i + j, load(y + t * ld + i + j, n - j) + load(turned + t * row_group + j), n - j);
  }
}

// Vectors that fill a cache line: more tokens in a pass would read the entries less often, but their columns lie in L2 no
// more (1 % of 2048 x 2048 on 1,024 tokens of float32, two threads: 2.2 ms; 4.0 with four lines).
constexpr int line = unit_step / VL;

template <int V, class T>
void add_product(T* y, int64_t ld, const Tensor& x, const Entries& s, const float* values) {
  constexpr int64_t part = V * VL;  // tokens that one pass over the entries takes
  const int64_t tokens = x.size(0), count = blocks(tokens, part), ranges = row_ranges();
  const int64_t wave = wave_of(count, ranges, x.size(1) * unit_step * sizeof(float));
  const TransposedBlocks<float, T> held(x, unit_step, wave);
  const auto load = [&](int64_t task, int64_t block, int64_t slot) {
    held.load(task, block * part, std::min(part, tokens - block * part), slot);
  };
  const auto add = [&](int64_t begin, int64_t end, int64_t block, int64_t slot) {
    add_rows<V>(y + block * part * ld, ld, std::min(part, tokens - block * part), held.at(0, slot), held.row, s, values,
                begin, end);
  };
  for_waves(s, count, wave, ranges, row_group, held.tasks(), load, add, [](int64_t) {});
}

void add_sparse_product_(Tensor y, const Tensor& x, const Tensor& starts, const Tensor& columns, const Tensor& values) {
  const char* op = "add_sparse_product_";
  check_matrix(op, "y", y);
  check_matrix(op, "x", x);
  check_rows(op, "y", y, Where::cpu, {f32, b16, h16}, {y.size(0), y.size(1)});
  check_rows(op, "x", x, Where::cpu, {y.scalar_type()}, {y.size(0), x.size(1)});
  const Entries s = checked_entries(op, starts, columns, y.size(1), x.size(1));
  check(op, "values", values, Where::cpu, {f32}, {s.count});
  const auto* v = static_cast<const float*>(values.const_data_ptr());
  const int64_t tokens = y.size(0), ld = y.stride(0);
  if (!s.count || !tokens) return;
  dispatch(y, [&](auto* type) {
    auto* to = mutable_data(y, type);
    if (tokens == 1) return add_one(to, data(x, type), x.size(1), s, v);
    if (tokens <= VL) return add_product<1>(to, ld, x, s, v);
    if (tokens <= 2 * VL) return add_product<std::min(2, line)>(to, ld, x, s, v);
    add_product<line>(to, ld, x, s, v);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("sampled_product_", TORCH_BOX(&sampled_product_));
  m.impl("add_sparse_product_", TORCH_BOX(&add_sparse_product_));
}

}  // namespace fastft
