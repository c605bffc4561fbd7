// Entries of a weight on CPU: reading, writing, updating and finding them; definitions in fastft/ops/sparse.py, products in
// sampled.cpp. All of it is memory traffic: what belongs to the entries streams, their places in the weight are asked for
// ahead.
#include "entries.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

namespace fastft {
namespace {

constexpr int64_t chunk = 256;  // entries whose places are asked for while those before them are computed

// A weight whose rows may lie apart, its entries, and what belongs to them.
struct Chosen {
  Chosen(const char* op, const Tensor& weight, const Tensor& starts, const Tensor& columns) : op(op) {
    check_matrix(op, "weight", weight);
    check_rows(op, "weight", weight, Where::cpu, {f32, b16, h16}, {weight.size(0), weight.size(1)});
    entries = checked_entries(op, starts, columns, weight.size(0), weight.size(1));
    ld = weight.stride(0);
  }
  void check_part(const char* name, const Tensor& t, std::initializer_list<ScalarType> dtypes) const {
    check(op, name, t, Where::cpu, dtypes, {entries.count});
  }

  template <class T>
  [[gnu::always_inline]] void fetch(const T* weight, int64_t& row, int64_t first, int64_t last) const {
    for_pieces(entries, row, first, last, [&](int64_t i, int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t e = begin; e < end; ++e) __builtin_prefetch(weight + i * ld + entries.columns[e], 1, 3);
    });
  }

  // step(row, first, last) for chunks of entries, `row` that of `first`, when their places in the weight have been asked
  // for.
  template <class T, class F>
  void for_chunks(const T* weight, const F& step) const {
    for_entry_tasks(entries, [&](int64_t begin, int64_t end) {
      int64_t row = entries.row_of(begin), ahead = row;
      fetch(weight, ahead, begin, std::min(end, begin + chunk));
      for (int64_t first = begin; first < end; first += chunk) {
        const int64_t last = std::min(end, first + chunk);
        fetch(weight, ahead, last, std::min(end, last + chunk));
        while (entries.starts[row + 1] <= first) ++row;
        step(row, first, last);
      }
    });
  }

  // Stores values[e - first] at entries [first, last).
  template <class T>
  void put(T* weight, int64_t row, int64_t first, int64_t last, const T* values) const {
    for_pieces(entries, row, first, last, [&](int64_t i, int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) weight[i * ld + entries.columns[e]] = values[e - first];
    });
  }

  // Stores value(k, n), the vector of up to n elements from entry k on, at all entries.
  template <class T, class F>
  void write(T* weight, const F& value) const {
    for_chunks(weight, [&](int64_t row, int64_t first, int64_t last) {
      T values[chunk];
      for (int64_t k = first; k < last; k += VL) store(values + (k - first), value(k, last - k));
      put(weight, row, first, last, values);
    });
  }

  const char* op;
  Entries entries;
  int64_t ld;
};

// Copies of bits, whatever they mean: of the weight's element size.
template <class F>
void dispatch_bits(const Tensor& t, const F& f) {
  t.scalar_type() == f32 ? f(static_cast<uint32_t*>(nullptr)) : f(static_cast<uint16_t*>(nullptr));
}

Tensor gather_entries(const Tensor& weight, const Tensor& starts, const Tensor& columns) {
  const Chosen chosen("gather_entries", weight, starts, columns);
  Tensor out = empty_on(weight, {chosen.entries.count});
  dispatch_bits(weight, [&](auto* type) {
    const auto* from = data(weight, type);
    auto* to = mutable_data(out, type);
    chosen.for_chunks(from, [&](int64_t row, int64_t first, int64_t last) {
      for_pieces(chosen.entries, row, first, last, [&](int64_t i, int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) to[e] = from[i * chosen.ld + chosen.entries.columns[e]];
      });
    });
  });
  return out;
}

void write_entries_(Tensor weight, const Tensor& starts, const Tensor& columns, const Tensor& base,
                    const std::optional<Tensor>& delta) {
  const Chosen chosen("write_entries_", weight, starts, columns);
  chosen.check_part("base", base, {weight.scalar_type()});
  if (!delta) {
    return dispatch_bits(weight, [&](auto* type) {
      const auto* from = data(base, type);
      auto* to = mutable_data(weight, type);
      chosen.for_chunks(to,
                        [&](int64_t row, int64_t first, int64_t last) { chosen.put(to, row, first, last, from + first); });
    });
  }
  chosen.check_part("delta", *delta, {f32});
  const auto* d = static_cast<const float*>(delta->const_data_ptr());
  dispatch(weight, [&](auto* type) {
    const auto* from = data(base, type);
    chosen.write(mutable_data(weight, type), [=](int64_t k, int64_t n) { return load(from + k, n) + load(d + k, n); });
  });
}

// 32 random bits for each entry from k on: murmur3's finaliser over position and seed (`_noise` in fastft/ops/sparse.py).
inline vu noise(int64_t k, uint32_t offset) {
  vu h = (lane_numbers() + static_cast<uint32_t>(k)) * 0x9E3779B1u + offset;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// A moment in its own dtype; into bfloat16 it is rounded up with the probability of the part that is cut off.
inline void store_moment(float* to, vf value, vu, int64_t n) { store(to, value, n); }
inline void store_moment(bf16* to, vf value, vu added, int64_t n) {
  const vu bits = reinterpret_cast<vu>(value), rounded = (bits + added) >> 16;
  const vu kept = (bits & 0x7f800000u) == 0x7f800000u ? bf16_bits(value) : rounded;
  const vu16 halves = narrow(kept);
  std::memcpy(to, &halves, std::min<int64_t>(n, VL) * sizeof(bf16));
}

// c₁ and c₂ of the present step, or of each entry's age.
struct Corrections {
  // Counts n entries' updates and calls use(c₁, c₂), vectors of them. Nearly always their ages are one.
  [[gnu::always_inline]] void at(int64_t k, int64_t n, vf& c1, vf& c2) const {
    if (!age) {
      c1 = vf{} + first, c2 = vf{} + second;
      return;
    }
    vi now = {};
    n = std::min<int64_t>(n, VL);
    std::memcpy(&now, age + k, n * sizeof(int32_t));
    now += 1;
    std::memcpy(age + k, &now, n * sizeof(int32_t));
    for (int l = n; l < VL; ++l) now[l] = now[0];
    bool one = true;
    for (int l = 1; l < VL; ++l) one &= now[l] == now[0];
    if (one) {
      const float* row = row_of(now[0]);
      c1 = vf{} + row[0], c2 = vf{} + row[1];
      return;
    }
    for (int l = 0; l < VL; ++l) c1[l] = row_of(now[l])[0], c2[l] = row_of(now[l])[1];
  }
  const float* row_of(int32_t steps) const { return table + 2 * std::clamp<int64_t>(steps, 0, length - 1); }

  float first, second;
  int32_t* age = nullptr;
  const float* table = nullptr;
  int64_t length = 0;
};

void sparse_adamw_(Tensor weight, const Tensor& starts, const Tensor& columns, const Tensor& base, Tensor delta,
                   const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> age,
                   const std::optional<Tensor>& corrections, double lr, double beta1, double beta2, double eps,
                   double weight_decay, int64_t step, int64_t seed) {
  const Chosen chosen("sparse_adamw_", weight, starts, columns);
  chosen.check_part("base", base, {weight.scalar_type()});
  chosen.check_part("delta", delta, {f32});
  chosen.check_part("grad", grad, {f32});
  chosen.check_part("exp_avg", exp_avg, {f32, b16});
  chosen.check_part("exp_avg_sq", exp_avg_sq, {exp_avg.scalar_type()});
  Corrections correct;
  if (age) {
    chosen.check_part("age", *age, {i32});
    STD_TORCH_CHECK(corrections && corrections->dim() == 2 && corrections->size(0) > 0, chosen.op,
                    ": age asks for corrections [n, 2] of at least one age");
    check(chosen.op, "corrections", *corrections, Where::cpu, {f32}, {corrections->size(0), 2});
    correct.age = static_cast<int32_t*>(age->mutable_data_ptr());
    correct.table = static_cast<const float*>(corrections->const_data_ptr());
    correct.length = corrections->size(0);
  } else {
    STD_TORCH_CHECK(step >= 1, chosen.op, ": step is ", step, ", the first is 1");
    correct.first = 1 / (1 - std::pow(beta1, step)), correct.second = 1 / std::sqrt(1 - std::pow(beta2, step));
  }
  const float decay = 1 - lr * weight_decay, b1 = beta1, rest1 = 1 - beta1, b2 = beta2, rest2 = 1 - beta2, small = eps;
  const float rate = -lr;
  const uint32_t offset = static_cast<uint32_t>(seed) * 0x85EBCA77u;
  const auto* g = static_cast<const float*>(grad.const_data_ptr());
  auto* d = static_cast<float*>(delta.mutable_data_ptr());
  auto update = [&](auto* type, auto* moment) {
    const auto* from = data(base, type);
    auto *m = mutable_data(exp_avg, moment), *v = mutable_data(exp_avg_sq, moment);
    constexpr bool rounds = std::is_same_v<decltype(moment), bf16*>;
    chosen.write(mutable_data(weight, type), [=](int64_t k, int64_t n) __attribute__((always_inline)) {
      vf c1, c2;
      correct.at(k, n, c1, c2);
      const vf gradient = load(g + k, n);
      const vf mean = b1 * load(m + k, n) + rest1 * gradient;
      const vf square = b2 * load(v + k, n) + rest2 * gradient * gradient;
      const vf next = decay * load(d + k, n) + rate * c1 * mean / (square_root(square) * c2 + small);
      const vu random = rounds ? noise(k, offset) : vu{};
      store_moment(m + k, mean, random & 0xffffu, n);
      store_moment(v + k, square, random >> 16, n);
      store(d + k, next, n);
      return load(from + k, n) + next;
    });
  };
  dispatch(weight, [&](auto* type) {
    exp_avg.scalar_type() == b16 ? update(type, static_cast<bf16*>(nullptr)) : update(type, static_cast<float*>(nullptr));
  });
}

// The larger one stays, and so does a NaN: of whatever order, so that threads may take turns.
inline void keep_larger(float& held, float value) {
  std::atomic_ref<float> at(held);
  float old = at.load(std::memory_order_relaxed);
  while (old == old && !(old >= value) && !at.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
}
inline float smaller(float a, float b) { return a < b || a != a ? a : b; }

void sparse_sm3_(Tensor weight, const Tensor& starts, const Tensor& columns, const Tensor& base, Tensor delta,
                 const Tensor& grad, Tensor row_max, Tensor column_max, double lr, double eps, double weight_decay) {
  const Chosen chosen("sparse_sm3_", weight, starts, columns);
  const int64_t A = weight.size(0), B = weight.size(1);
  chosen.check_part("base", base, {weight.scalar_type()});
  chosen.check_part("delta", delta, {f32});
  chosen.check_part("grad", grad, {f32});
  check(chosen.op, "row_max", row_max, Where::cpu, {f32}, {A});
  check(chosen.op, "column_max", column_max, Where::cpu, {f32}, {B});
  const float decay = 1 - lr * weight_decay, rate = -lr, small = eps;
  const auto* g = static_cast<const float*>(grad.const_data_ptr());
  auto *d = static_cast<float*>(delta.mutable_data_ptr()), *row = static_cast<float*>(row_max.mutable_data_ptr()),
       *column = static_cast<float*>(column_max.mutable_data_ptr());
  const Scratch<float> old(A + B);  // the bounds that all entries see
  std::copy_n(row, A, old.get());
  std::copy_n(column, B, old.get() + A);
  const float *old_row = old.get(), *old_column = old.get() + A;
  const int32_t* at = chosen.entries.columns;
  dispatch(weight, [&](auto* type) {
    const auto* from = data(base, type);
    auto* to = mutable_data(weight, type);
    chosen.for_chunks(to, [&](int64_t i0, int64_t first, int64_t last) {
      float bounds[chunk];
      std::remove_cv_t<std::remove_pointer_t<decltype(type)>> values[chunk];
      int64_t cursor = i0;
      for_pieces(chosen.entries, cursor, first, last, [&](int64_t i, int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) bounds[e - first] = smaller(old_column[at[e]], old_row[i]);
      });
      for (int64_t k = first; k < last; k += VL) {
        const int64_t n = last - k;
        const vf gradient = load(g + k, n), bound = load(bounds + (k - first), n) + gradient * gradient;
        const vf next = decay * load(d + k, n) + rate * gradient / square_root(bound + small);
        store(bounds + (k - first), bound, n);
        store(d + k, next, n);
        store(values + (k - first), load(from + k, n) + next);
      }
      cursor = i0;
      for_pieces(chosen.entries, cursor, first, last, [&](int64_t i, int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
          keep_larger(column[at[e]], bounds[e - first]);
          keep_larger(row[i], bounds[e - first]);
        }
      });
      chosen.put(to, i0, first, last, values);
    });
  });
}

Tensor match_entries(const Tensor& starts, const Tensor& columns, const Tensor& other_starts, const Tensor& other_columns) {
  const char* op = "match_entries";
  STD_TORCH_CHECK(starts.dim() == 1 && starts.numel() > 0, op, ": starts has shape ", shape_text(starts),
                  ", must be [A + 1]");
  const Entries s = checked_starts(op, starts, columns, starts.numel() - 1);
  const Entries other = checked_starts(op, other_starts, other_columns, s.rows);
  Tensor out = empty_on(columns, {s.count}, ScalarType::Long);
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  for_entry_tasks(s, [&](int64_t first, int64_t last) {
    int64_t row = s.row_of(first);
    for_pieces(s, row, first, last, [&](int64_t i, int64_t begin, int64_t end) {
      const int32_t* stop = other.columns + other.starts[i + 1];
      const int32_t* place = std::lower_bound(other.columns + other.starts[i], stop, s.columns[begin]);
      for (int64_t e = begin; e < end; ++e) {
        while (place < stop && *place < s.columns[e]) ++place;
        to[e] = place < stop && *place == s.columns[e] ? place - other.columns : -1;
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("gather_entries", TORCH_BOX(&gather_entries));
  m.impl("write_entries_", TORCH_BOX(&write_entries_));
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_));
  m.impl("sparse_sm3_", TORCH_BOX(&sparse_sm3_));
  m.impl("match_entries", TORCH_BOX(&match_entries));
}

}  // namespace fastft
