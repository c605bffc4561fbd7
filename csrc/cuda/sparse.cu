// Entries of a weight that train where they stand: what is memory traffic alone. Maths and shapes: fastft/ops/sparse.py. All
// kernels walk the entries as flat arrays; the row of a thread's first entry is searched while they arrive.
#include "entries.cuh"
#include "packs.cuh"

#include <cmath>

namespace fastft {
namespace {

constexpr int kPack = 4;  // entries of a thread: 16 bytes of columns, delta, gradient

template <class T>
struct Chosen {
  T* weight;
  int64_t stride;
  Entries entries;
  const T* base;
  bool vectors;  // all arrays of the entries start on a 16-byte boundary
};

// Where in the weight a thread's entries stand. kWhole: all of them exist.
template <bool kWhole>
struct Places {
  int64_t to[kPack];

  template <class W>
  __device__ __forceinline__ Places(const Chosen<W>& chosen, int64_t at) {
    const Pack<int32_t, kPack> columns = load_pack<true, kWhole, kPack>(chosen.entries.columns, at, chosen.entries.size);
    Row row(chosen.entries, at);
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (kWhole || at + j < chosen.entries.size) to[j] = row.of(at + j) * chosen.stride + columns.v[j];
  }

  template <class W>
  __device__ __forceinline__ void store(const Chosen<W>& chosen, int64_t at, const Pack<W, kPack>& values) const {
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (kWhole || at + j < chosen.entries.size) put(chosen.weight, to[j], values.v[j]);
  }
};

// Six blocks a multiprocessor: left to itself ptxas (13.0) aims at eight and spills 4 to 8 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads, 6) gather_entries_kernel(Chosen<const T> chosen, T* out) {
  const int64_t size = chosen.entries.size;
  for_pack<kPack>(chosen.vectors, size, [&](int64_t at, auto whole) {
    const Places<whole.value> places(chosen, at);
    Pack<T, kPack> value{};
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (whole.value || at + j < size) value.v[j] = get(chosen.weight, places.to[j]);
    store_pack<whole.value>(out, at, size, value);
  });
}

template <class T, bool kDelta>
__global__ void __launch_bounds__(kThreads) write_entries_kernel(Chosen<T> chosen, const float* delta) {
  const int64_t size = chosen.entries.size;
  for_pack<kPack>(chosen.vectors, size, [&](int64_t at, auto whole) {
    Pack<T, kPack> value = load_pack<true, whole.value, kPack>(chosen.base, at, size);
    if constexpr (kDelta) {
      const Pack<float, kPack> change = load_pack<true, whole.value, kPack>(delta, at, size);
#pragma unroll
      for (int j = 0; j < kPack; ++j) value.v[j] = T(static_cast<float>(value.v[j]) + change.v[j]);
    }
    Places<whole.value>(chosen, at).store(chosen, at, value);
  });
}

// Two random 16-bit numbers an entry, as `_noise` of fastft/ops/sparse.py defines them.
__device__ __forceinline__ uint32_t noise(int64_t position, uint32_t seed) {
  uint32_t h = static_cast<uint32_t>(position) * 0x9E3779B1u + seed * 0x85EBCA77u;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// A moment as it is stored: bfloat16 is rounded up with the probability of the part that is cut off.
__device__ __forceinline__ void round_moment(float& to, float value, uint32_t) { to = value; }
__device__ __forceinline__ void round_moment(c10::BFloat16& to, float value, uint32_t added) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  to =
      finite ? c10::BFloat16(static_cast<uint16_t>((bits + added) >> 16), c10::BFloat16::from_bits()) : c10::BFloat16(value);
}

// What a step of AdamW multiplies with. Without ages `rate` is -lr c1 and `spread` c2, else `rate` is -lr.
struct SparseAdamW {
  float decay, beta1, rest1, beta2, rest2, spread, eps, rate;
  uint32_t seed;
  int32_t oldest;  // the last age that the table of corrections has
};

template <class T, bool kNarrow, bool kAged>
__global__ void __launch_bounds__(kThreads)
    sparse_adamw_kernel(Chosen<T> chosen, float* delta, const float* grad,
                        std::conditional_t<kNarrow, c10::BFloat16, float>* exp_avg,
                        std::conditional_t<kNarrow, c10::BFloat16, float>* exp_avg_sq, int32_t* age,
                        const float* corrections, SparseAdamW by) {
  using M = std::conditional_t<kNarrow, c10::BFloat16, float>;
  const int64_t size = chosen.entries.size;
  for_pack<kPack>(chosen.vectors, size, [&](int64_t at, auto whole) {
    Pack<T, kPack> value = load_pack<true, whole.value, kPack>(chosen.base, at, size);
    const Pack<float, kPack> gradient = load_pack<true, whole.value, kPack>(grad, at, size);
    Pack<float, kPack> change = load_pack<false, whole.value, kPack>(delta, at, size);
    Pack<M, kPack> mean = load_pack<false, whole.value, kPack>(exp_avg, at, size);
    Pack<M, kPack> square = load_pack<false, whole.value, kPack>(exp_avg_sq, at, size);
    [[maybe_unused]] Pack<int32_t, kPack> ages{};
    if constexpr (kAged) ages = load_pack<false, whole.value, kPack>(age, at, size);
    const Places<whole.value> places(chosen, at);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float g = gradient.v[j];
      const float m = fmaf(by.rest1, g, by.beta1 * static_cast<float>(mean.v[j]));
      const float v = fmaf(by.rest2 * g, g, by.beta2 * static_cast<float>(square.v[j]));
      float rate = by.rate, spread = by.spread;
      if constexpr (kAged) {
        // Two loads: most entries are of few ages, whose corrections lie in L1.
        const int64_t row = ++ages.v[j] < by.oldest ? ages.v[j] : by.oldest;
        rate *= get(corrections, 2 * row);
        spread = get(corrections, 2 * row + 1);
      }
      change.v[j] = fmaf(by.decay, change.v[j], rate * m / fmaf(sqrtf(v), spread, by.eps));
      value.v[j] = T(static_cast<float>(value.v[j]) + change.v[j]);
      const uint32_t added = kNarrow ? noise(at + j, by.seed) : 0;
      round_moment(mean.v[j], m, added & 0xffffu);
      round_moment(square.v[j], v, added >> 16);
    }
    store_pack<whole.value>(delta, at, size, change);
    store_pack<whole.value>(exp_avg, at, size, mean);
    store_pack<whole.value>(exp_avg_sq, at, size, square);
    if constexpr (kAged) store_pack<whole.value>(age, at, size, ages);
    places.store(chosen, at, value);
  });
}

// -- SM3. Bounds follow from the accumulators before the step, of which `copy_kernel` keeps a copy: rows, then columns. The
// order of float32 that are not negative is that of their bits as integers, and a maximum does not depend on the order in
// which it is taken, so atomics repeat bit by bit. A NaN is above everything and stays.
template <class F>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const F* first, int64_t first_size, const F* second, int64_t second_size, F* to) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < first_size)
    put(to, i, get(first, i));
  else if (i - first_size < second_size)
    put(to, i, get(second, i - first_size));
}

__device__ __forceinline__ uint32_t magnitude_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & 0x7fffffffu;
}

__device__ __forceinline__ void raise(float* array, int64_t i, uint32_t bits) {
  note_store(array, sizeof(float));
  atomicMax(reinterpret_cast<uint32_t*>(array + i), bits);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sparse_maxima_kernel(Chosen<T> chosen, float* delta, const float* grad, const float* old, float* row_max,
                         float* column_max, float decay, float rate, float eps) {
  const int64_t size = chosen.entries.size;
  int64_t run = -1;       // the row of this thread's last entries
  uint32_t run_bits = 0;  // and the largest of their bounds
  for_pack<kPack>(chosen.vectors, size, [&](int64_t at, auto whole) {
    Pack<T, kPack> value = load_pack<true, whole.value, kPack>(chosen.base, at, size);
    const Pack<float, kPack> gradient = load_pack<true, whole.value, kPack>(grad, at, size);
    Pack<float, kPack> change = load_pack<false, whole.value, kPack>(delta, at, size);
    const Pack<int32_t, kPack> columns = load_pack<true, whole.value, kPack>(chosen.entries.columns, at, size);
    Row rows(chosen.entries, at);
    int64_t row[kPack];
    float of_row[kPack], of_column[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {  // all loads before the first store
      if (!whole.value && at + j >= size) break;
      row[j] = rows.of(at + j);
      of_row[j] = get(old, row[j]);
      of_column[j] = get(old, chosen.entries.rows + columns.v[j]);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (!whole.value && at + j >= size) break;
      const float g = gradient.v[j];
      const float bound = fmaf(g, g, of_row[j] != of_row[j] || of_row[j] < of_column[j] ? of_row[j] : of_column[j]);
      change.v[j] = fmaf(decay, change.v[j], rate * g / sqrtf(bound + eps));
      put(chosen.weight, row[j] * chosen.stride + columns.v[j], T(static_cast<float>(value.v[j]) + change.v[j]));
      const uint32_t bits = magnitude_bits(bound);
      if (bits > magnitude_bits(of_column[j])) raise(column_max, columns.v[j], bits);
      if (row[j] != run) {
        if (run >= 0) raise(row_max, run, run_bits);
        run = row[j], run_bits = 0;
      }
      run_bits = bits > run_bits ? bits : run_bits;
    }
    store_pack<whole.value>(delta, at, size, change);
  });
  // Of the threads of a warp whose last entries share a row, one raises its maximum: a row is one address.
  const unsigned peers = __match_any_sync(0xffffffffu, run);
  const uint32_t most = __reduce_max_sync(peers, run_bits);
  if (run >= 0 && int(threadIdx.x % 32) == __ffs(int(peers)) - 1) raise(row_max, run, most);
}

// -- Entries of one choice in another.
template <class I>
__global__ void __launch_bounds__(kThreads) match_entries_kernel(Entries entries, Entries other, I* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= entries.size) return;
  const int32_t column = get(entries.columns, at);
  const int64_t row = Row(entries, at).of(at), end = get(other.starts, row + 1);
  const int64_t found = lower_bound(other.columns, get(other.starts, row), end, column);
  put(out, at, found < end && get(other.columns, found) == column ? I(found) : I(-1));
}

// -- Entry points.
void check_weight(const char* op, const Tensor& weight) {
  check_matrix(op, "weight", weight);
  check_rows(op, "weight", weight, kWhere, kActivations, {weight.size(0), weight.size(1)});
}

// Checks what every op that writes takes; `parts`: float32 tensors, one element an entry, with their names, or null.
Entries check_chosen(const char* op, const Tensor& weight, const Tensor& starts, const Tensor& columns, const Tensor& base,
                     std::initializer_list<std::pair<const char*, const Tensor*>> parts) {
  check_weight(op, weight);
  const Entries entries = checked_entries(op, weight, weight.size(0), starts, columns);
  check(op, "base", base, kWhere, {weight.scalar_type()}, {entries.size});
  check_same_device(op, weight, {&base});
  for (const auto& [name, part] : parts) {
    if (part == nullptr) continue;
    check(op, name, *part, kWhere, {ScalarType::Float}, {entries.size});
    check_same_device(op, weight, {part});
  }
  return entries;
}

template <class T>
Chosen<T> chosen(const Tensor& weight, const Entries& entries, const Tensor& columns, const Tensor& base, bool vectors) {
  return {static_cast<T*>(weight.mutable_data_ptr()), weight.stride(0), entries,
          static_cast<const T*>(base.const_data_ptr()), vectors && aligned(columns) && aligned(base)};
}

Tensor gather_entries(const Tensor& weight, const Tensor& starts, const Tensor& columns) {
  const char* op = "gather_entries";
  check_weight(op, weight);
  const Entries entries = checked_entries(op, weight, weight.size(0), starts, columns);
  DeviceScope device(weight);
  Tensor out = empty_on(weight, {entries.size}, weight.scalar_type());
  if (entries.size == 0) return out;
  dispatch_dtype(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Chosen<const T> from = {static_cast<const T*>(weight.const_data_ptr()), weight.stride(0), entries, nullptr,
                                  aligned(columns) && aligned(out)};
    launch(gather_entries_kernel<T>, pack_grid<kPack>(entries.size), dim3(kThreads), 0, device.stream, from,
           static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

void write_entries_(const Tensor& weight, const Tensor& starts, const Tensor& columns, const Tensor& base,
                    std::optional<Tensor> delta) {
  const char* op = "write_entries_";
  const Entries entries = check_chosen(op, weight, starts, columns, base, {{"delta", delta ? &*delta : nullptr}});
  if (entries.size == 0) return;
  DeviceScope device(weight);
  dispatch_dtype(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch(delta ? write_entries_kernel<T, true> : write_entries_kernel<T, false>, pack_grid<kPack>(entries.size),
           dim3(kThreads), 0, device.stream, chosen<T>(weight, entries, columns, base, !delta || aligned(*delta)),
           delta ? static_cast<const float*>(delta->const_data_ptr()) : nullptr);
  });
}

void sparse_adamw_(const Tensor& weight, const Tensor& starts, const Tensor& columns, const Tensor& base,
                   const Tensor& delta, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                   std::optional<Tensor> age, std::optional<Tensor> corrections, double lr, double beta1, double beta2,
                   double eps, double weight_decay, int64_t step, int64_t seed) {
  const char* op = "sparse_adamw_";
  const Entries entries = check_chosen(op, weight, starts, columns, base, {{"delta", &delta}, {"grad", &grad}});
  check(op, "exp_avg", exp_avg, kWhere, {ScalarType::Float, ScalarType::BFloat16}, {entries.size});
  check(op, "exp_avg_sq", exp_avg_sq, kWhere, {exp_avg.scalar_type()}, {entries.size});
  check_same_device(op, weight, {&exp_avg, &exp_avg_sq});
  STD_TORCH_CHECK(age.has_value() == corrections.has_value(), op, ": age and corrections go together");
  STD_TORCH_CHECK(age || step >= 1, op, ": step is ", step, ", the first is 1");
  if (age) {
    check(op, "age", *age, kWhere, {ScalarType::Int}, {entries.size});
    check(op, "corrections", *corrections, kWhere, {ScalarType::Float}, {corrections->dim() ? corrections->size(0) : 0, 2});
    STD_TORCH_CHECK(corrections->size(0) >= 1, op, ": corrections has no rows");
    check_same_device(op, weight, {&*age, &*corrections});
  }
  if (entries.size == 0) return;
  DeviceScope device(weight);
  const double count = static_cast<double>(step);
  const SparseAdamW by = {float(1 - lr * weight_decay),
                          float(beta1),
                          float(1 - beta1),
                          float(beta2),
                          float(1 - beta2),
                          age ? 1.0f : float(1 / std::sqrt(1 - std::pow(beta2, count))),
                          float(eps),
                          float(age ? -lr : -lr / (1 - std::pow(beta1, count))),
                          static_cast<uint32_t>(seed),
                          age ? static_cast<int32_t>(std::min<int64_t>(corrections->size(0) - 1, INT32_MAX)) : 0};
  const bool vectors = aligned(delta) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq) && (!age || aligned(*age));
  auto run = [&](auto type, auto narrow, auto aged) {
    using T = typename decltype(type)::type;
    using M = std::conditional_t<narrow.value, c10::BFloat16, float>;
    launch(sparse_adamw_kernel<T, narrow.value, aged.value>, pack_grid<kPack>(entries.size), dim3(kThreads), 0,
           device.stream, chosen<T>(weight, entries, columns, base, vectors), floats(delta),
           static_cast<const float*>(grad.const_data_ptr()), static_cast<M*>(exp_avg.mutable_data_ptr()),
           static_cast<M*>(exp_avg_sq.mutable_data_ptr()),
           aged.value ? static_cast<int32_t*>(age->mutable_data_ptr()) : nullptr,
           aged.value ? static_cast<const float*>(corrections->const_data_ptr()) : nullptr, by);
  };
  const bool narrow = exp_avg.scalar_type() == ScalarType::BFloat16;
  dispatch_dtype(weight.scalar_type(), [&](auto type) {
    if (narrow)
      age ? run(type, std::true_type{}, std::true_type{}) : run(type, std::true_type{}, std::false_type{});
    else
      age ? run(type, std::false_type{}, std::true_type{}) : run(type, std::false_type{}, std::false_type{});
  });
}

void sparse_sm3_(const Tensor& weight, const Tensor& starts, const Tensor& columns, const Tensor& base, const Tensor& delta,
                 const Tensor& grad, const Tensor& row_max, const Tensor& column_max, double lr, double eps,
                 double weight_decay) {
  const char* op = "sparse_sm3_";
  const Entries entries = check_chosen(op, weight, starts, columns, base, {{"delta", &delta}, {"grad", &grad}});
  const int64_t rows = weight.size(0), cols = weight.size(1);
  check(op, "row_max", row_max, kWhere, {ScalarType::Float}, {rows});
  check(op, "column_max", column_max, kWhere, {ScalarType::Float}, {cols});
  check_same_device(op, weight, {&row_max, &column_max});
  if (entries.size == 0) return;
  DeviceScope device(weight);
  Tensor old = empty_on(weight, {rows + cols}, ScalarType::Float);
  launch(copy_kernel<float>, dim3(unsigned(ceil_div(rows + cols, kThreads))), dim3(kThreads), 0, device.stream,
         static_cast<const float*>(row_max.const_data_ptr()), rows, static_cast<const float*>(column_max.const_data_ptr()),
         cols, floats(old));
  dispatch_dtype(weight.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch(sparse_maxima_kernel<T>, pack_grid<kPack>(entries.size), dim3(kThreads), 0, device.stream,
           chosen<T>(weight, entries, columns, base, aligned(delta) && aligned(grad)), floats(delta),
           static_cast<const float*>(grad.const_data_ptr()), static_cast<const float*>(old.const_data_ptr()),
           floats(row_max), floats(column_max), float(1 - lr * weight_decay), float(-lr), float(eps));
  });
}

Tensor match_entries(const Tensor& starts, const Tensor& columns, const Tensor& other_starts, const Tensor& other_columns) {
  const char* op = "match_entries";
  STD_TORCH_CHECK(starts.dim() == 1 && starts.numel() >= 1, op, ": starts has shape ", shape_text(starts),
                  ", must be [rows + 1]");
  const int64_t rows = starts.numel() - 1;
  const Entries entries = checked_entries(op, starts, rows, starts, columns);
  check(op, "other_starts", other_starts, kWhere, {ScalarType::Long}, {rows + 1});
  check(op, "other_columns", other_columns, kWhere, {ScalarType::Int}, {other_columns.numel()});
  check_same_device(op, starts, {&other_starts, &other_columns});
  DeviceScope device(starts);
  Tensor out = empty_on(starts, {entries.size}, ScalarType::Long);
  if (entries.size == 0) return out;
  const Entries other = {static_cast<const int64_t*>(other_starts.const_data_ptr()),
                         static_cast<const int32_t*>(other_columns.const_data_ptr()), rows, other_columns.numel()};
  launch(match_entries_kernel<int64_t>, dim3(unsigned(ceil_div(entries.size, kThreads))), dim3(kThreads), 0, device.stream,
         entries, other, static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, FASTFT_DISPATCH_KEY, m) {
  m.impl("gather_entries", TORCH_BOX(&gather_entries));
  m.impl("write_entries_", TORCH_BOX(&write_entries_));
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_));
  m.impl("sparse_sm3_", TORCH_BOX(&sparse_sm3_));
  m.impl("match_entries", TORCH_BOX(&match_entries));
}

}  // namespace fastft
