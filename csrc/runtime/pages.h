// Which fixed-size pages of a pool are in use.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace fastft::runtime {

// Pages of one owner need not be adjacent. The lowest free ones are taken, so that they often are, and one copy covers many.
class PageAllocator {
 public:
  explicit PageAllocator(int32_t pages);

  // `count` pages in ascending order, or nothing (and no change) where fewer are free.
  std::optional<std::vector<int32_t>> allocate(int32_t count);
  // Throws std::logic_error, and changes nothing before that page, where a page is not in use.
  void free(const std::vector<int32_t>& pages);

  int32_t capacity() const { return capacity_; }
  int32_t available() const { return available_; }

 private:
  std::vector<uint64_t> free_;  // a bit a page
  int32_t capacity_;
  int32_t available_;
};

}  // namespace fastft::runtime
