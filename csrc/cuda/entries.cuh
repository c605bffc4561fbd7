// Chosen entries of a matrix, row-compressed (fastft/ops/sparse.py).
#pragma once

#include "operands.cuh"

namespace fastft {

struct Entries {
  const int64_t* starts;  // [rows + 1]
  const int32_t* columns;
  int64_t rows, size;
};

inline Entries checked_entries(const char* op, const Tensor& device_of, int64_t rows, const Tensor& starts,
                               const Tensor& columns) {
  check(op, "starts", starts, kWhere, {ScalarType::Long}, {rows + 1});
  check(op, "columns", columns, kWhere, {ScalarType::Int}, {columns.numel()});
  check_same_device(op, device_of, {&starts, &columns});
  return {static_cast<const int64_t*>(starts.const_data_ptr()), static_cast<const int32_t*>(columns.const_data_ptr()), rows,
          columns.numel()};
}

// The first index from `low` on, below `high`, at which array[index] >= value; `high` if there is none.
template <class T, class V>
__device__ __forceinline__ int64_t lower_bound(const T* array, int64_t low, int64_t high, V value) {
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (get(array, middle) < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The row of an entry, and of those after it: neighbours are in one row or in the next but for rows without entries.
class Row {
 public:
  __device__ __forceinline__ Row(const Entries& entries, int64_t at) : entries_(entries) { find(0, at); }

  // `at` is not before the entry that was asked for last.
  __device__ __forceinline__ int64_t of(int64_t at) {
    if (at >= end_) {
      end_ = get(entries_.starts, ++row_ + 1);
      if (at >= end_) find(row_ + 1, at);
    }
    return row_;
  }

 private:
  // The first row that ends behind the entry.
  __device__ __forceinline__ void find(int64_t from, int64_t at) {
    row_ = lower_bound(entries_.starts, from + 1, entries_.rows, at + 1) - 1;
    end_ = get(entries_.starts, row_ + 1);
  }

  const Entries& entries_;
  int64_t row_, end_;
};

}  // namespace fastft
