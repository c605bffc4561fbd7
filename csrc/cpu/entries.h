// Chosen entries of a matrix, row-compressed (fastft/ops/sparse.py), as the CPU kernels walk over them: in tasks of as many
// entries each, wherever rows begin, for a row of one choice can hold many times what another does.
#pragma once

#include "low_rank.h"

#include <atomic>

namespace fastft {

struct Entries {
  const int64_t* starts;
  const int32_t* columns;
  int64_t rows, count;

  // The row that entry e lies in.
  int64_t row_of(int64_t e) const { return std::upper_bound(starts, starts + rows + 1, e) - starts - 1; }
};

// An index of `rows` rows, checked: what it names is read and written. Columns are not looked at, a row's are `columns`.
inline Entries checked_starts(const char* op, const Tensor& starts, const Tensor& columns, int64_t rows) {
  check(op, "starts", starts, Where::cpu, {ScalarType::Long}, {rows + 1});
  check(op, "columns", columns, Where::cpu, {ScalarType::Int}, {columns.numel()});
  const Entries s{static_cast<const int64_t*>(starts.const_data_ptr()),
                  static_cast<const int32_t*>(columns.const_data_ptr()), rows, columns.numel()};
  STD_TORCH_CHECK(s.starts[0] == 0 && s.starts[rows] == s.count && std::is_sorted(s.starts, s.starts + rows + 1), op,
                  ": starts must ascend from 0 to the number of entries, ", s.count);
  return s;
}

inline Entries checked_entries(const char* op, const Tensor& starts, const Tensor& columns, int64_t rows, int64_t cols) {
  const Entries s = checked_starts(op, starts, columns, rows);
  std::atomic<bool> fits = true;
  torch::stable::parallel_for(0, s.count, 65536, [&](int64_t begin, int64_t end) {
    uint32_t largest = 0;  // a negative one is very large
    for (int64_t e = begin; e < end; ++e) largest = std::max(largest, static_cast<uint32_t>(s.columns[e]));
    if (largest >= cols) fits = false;
  });
  for (int64_t e = 0; !fits && e < s.count; ++e)
    STD_TORCH_CHECK(s.columns[e] >= 0 && s.columns[e] < cols, op, ": columns holds ", s.columns[e], ", there are ", cols);
  return s;
}

// body(first, last) for ranges of entries, shared among threads.
template <class F>
void for_entry_tasks(const Entries& s, const F& body) {
  constexpr int64_t step = 16384;
  parallel_for(blocks(s.count, step), [&](int64_t task) { body(task * step, std::min(s.count, (task + 1) * step)); });
}

// piece(row, begin, end) for what each row holds of entries [first, last); `row`, that of `first` or one before, moves
// along.
template <class F>
[[gnu::always_inline]] inline void for_pieces(const Entries& s, int64_t& row, int64_t first, int64_t last, const F& piece) {
  while (first < last) {
    while (s.starts[row + 1] <= first) ++row;
    const int64_t end = std::min(last, s.starts[row + 1]);
    piece(row, first, end);
    first = end;
  }
}

}  // namespace fastft
