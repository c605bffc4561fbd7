// The selection family on CPU; definitions in fastft/ops/selection.py. The key of a score are the bits of its absolute value
// as float32, its bin the key's upper 16 of 31 bits. Counts are integers and every row's places are its own, so nothing
// depends on which thread gets where first.
#include "low_rank.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

namespace fastft {
namespace {

constexpr int64_t bins = 1 << 16;
constexpr int shift = 15;
constexpr int64_t row_task = 16384;           // scores of a task that looks at rows
constexpr int64_t histogram_task = 131072;    // scores that pay for clearing and adding up a table of all bins
constexpr int64_t histogram_limit = 1 << 30;  // scores that a table of 32-bit counts may see before it is added up

template <class T>
inline vu keys(const T* p) {
  return reinterpret_cast<vu>(load(p)) & 0x7fffffffu;
}
template <class T>
inline vu keys(const T* p, int64_t n) {
  return reinterpret_cast<vu>(load(p, n)) & 0x7fffffffu;
}

// body(begin, end) for ranges of rows, as many as there are threads and at least `task` scores in each.
template <class F>
void for_row_ranges(const Tensor& scores, int64_t task, const F& body) {
  torch::stable::parallel_for(0, scores.size(0), std::max<int64_t>(1, task / std::max<int64_t>(scores.size(1), 1)), body);
}

// One bit a lane where a condition is all ones.
inline uint32_t lane_bits(vi condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)condition);
#else
  uint32_t bits = 0;
  for (int l = 0; l < VL; ++l) bits |= (condition[l] & 1u) << l;
  return bits;
#endif
}

// The smallest key of a bin; none where no key reaches it.
std::optional<uint32_t> first_key(int64_t bin) {
  if (bin >= bins) return std::nullopt;
  return static_cast<uint32_t>(std::max<int64_t>(bin, 0) << shift);
}

void check_scores(const char* op, const Tensor& scores) {
  check_matrix(op, "scores", scores);
  check_rows(op, "scores", scores, Where::cpu, {f32, b16, h16}, {scores.size(0), scores.size(1)});
}

void count_bins_(Tensor counts, const Tensor& scores) {
  const char* op = "count_bins_";
  check(op, "counts", counts, Where::cpu, {i64}, {bins});
  check_scores(op, scores);
  const int64_t B = scores.size(1), ld = scores.stride(0),
                flush = std::max<int64_t>(1, histogram_limit / std::max<int64_t>(B, 1));
  auto* total = static_cast<int64_t*>(counts.mutable_data_ptr());
  dispatch(scores, [&](auto* type) {
    const auto* p = data(scores, type);
    for_row_ranges(scores, histogram_task, [=](int64_t begin, int64_t end) {
      Scratch<uint32_t> scratch(bins);
      uint32_t* table = scratch.get();
      for (int64_t first = begin; first < end; first += flush) {
        std::fill_n(table, bins, 0u);
        for (int64_t i = first; i < std::min(end, first + flush); ++i) {
          const auto* row = p + i * ld;
          int64_t j = 0;
          for (; j + VL <= B; j += VL) {
            const vu bin = keys(row + j) >> shift;
            for (int l = 0; l < VL; ++l) ++table[bin[l]];
          }
          if (j < B) {
            const vu bin = keys(row + j, B - j) >> shift;
            for (int l = 0; l < B - j; ++l) ++table[bin[l]];
          }
        }
        for (int64_t bin = 0; bin < bins; ++bin)
          if (table[bin]) std::atomic_ref<int64_t>(total[bin]).fetch_add(table[bin], std::memory_order_relaxed);
      }
    });
  });
}

Tensor count_at_least(const Tensor& scores, int64_t bin) {
  const char* op = "count_at_least";
  check_scores(op, scores);
  const int64_t B = scores.size(1), ld = scores.stride(0);
  Tensor out = empty_on(scores, {scores.size(0)}, i64);
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  const auto least = first_key(bin);
  if (!least) {
    std::fill_n(to, scores.size(0), 0);
    return out;
  }
  dispatch(scores, [&](auto* type) {
    const auto* p = data(scores, type);
    for_row_ranges(scores, row_task, [=, key = *least](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* row = p + i * ld;
        int64_t j = 0, rest = 0;
        vi count = {};
        for (; j + VL <= B; j += VL) count -= keys(row + j) >= key;
        if (j < B) rest = __builtin_popcount(lane_bits(keys(row + j, B - j) >= key) & ((1u << (B - j)) - 1));
        for (int l = 0; l < VL; ++l) rest += count[l];
        to[i] = rest;
      }
    });
  });
  return out;
}

void take_at_least_(Tensor columns, Tensor found, const Tensor& scores, const Tensor& offsets, int64_t bin) {
  const char* op = "take_at_least_";
  check_scores(op, scores);
  const int64_t B = scores.size(1), ld = scores.stride(0), places = columns.numel();
  check(op, "columns", columns, Where::cpu, {i32}, {places});
  check(op, "keys", found, Where::cpu, {i32}, {places});
  check(op, "offsets", offsets, Where::cpu, {i64}, {scores.size(0)});
  const auto least = first_key(bin);
  if (!least) return;
  const auto* from = static_cast<const int64_t*>(offsets.const_data_ptr());
  auto *to = static_cast<int32_t*>(columns.mutable_data_ptr()), *key_to = static_cast<int32_t*>(found.mutable_data_ptr());
  std::atomic<bool> beyond = false;
  dispatch(scores, [&](auto* type) {
    const auto* p = data(scores, type);
    for_row_ranges(scores, row_task, [=, key = *least, &beyond](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* row = p + i * ld;
        int64_t at = from[i];
        for (int64_t j = 0; j < B; j += VL) {
          const vu found_keys = keys(row + j, B - j);
          uint32_t hits = lane_bits(found_keys >= key);
          if (B - j < VL) hits &= (1u << (B - j)) - 1;
          if (!hits) continue;
          if (at < 0 || at > places - __builtin_popcount(hits)) {
            beyond = true;
            return;
          }
          for (; hits; hits &= hits - 1, ++at) {
            const int l = __builtin_ctz(hits);
            to[at] = j + l, key_to[at] = found_keys[l];
          }
        }
      }
    });
  });
  STD_TORCH_CHECK(!beyond, op, ": a row's scores go beyond the ", places, " places there are");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTFT_NAMESPACE, CPU, m) {
  m.impl("count_bins_", TORCH_BOX(&count_bins_));
  m.impl("count_at_least", TORCH_BOX(&count_at_least));
  m.impl("take_at_least_", TORCH_BOX(&take_at_least_));
}

}  // namespace fastft
