#include "pages.h"

#include <bit>
#include <stdexcept>
#include <string>

namespace fastft::runtime {

PageAllocator::PageAllocator(int32_t pages) : capacity_(pages), available_(pages) {
  if (pages < 0) throw std::invalid_argument("a pool of " + std::to_string(pages) + " pages");
  free_.assign((static_cast<size_t>(pages) + 63) / 64, ~uint64_t{0});
  if (pages % 64) free_.back() = (uint64_t{1} << pages % 64) - 1;
}

std::optional<std::vector<int32_t>> PageAllocator::allocate(int32_t count) {
  if (count < 0) throw std::invalid_argument("an allocation of " + std::to_string(count) + " pages");
  if (count > available_) return std::nullopt;
  std::vector<int32_t> taken;
  taken.reserve(static_cast<size_t>(count));
  for (size_t word = 0; static_cast<int32_t>(taken.size()) < count; ++word) {
    while (free_[word] && static_cast<int32_t>(taken.size()) < count) {
      taken.push_back(static_cast<int32_t>(word * 64) + std::countr_zero(free_[word]));
      free_[word] &= free_[word] - 1;
    }
  }
  available_ -= count;
  return taken;
}

void PageAllocator::free(const std::vector<int32_t>& pages) {
  for (int32_t page : pages) {
    const bool exists = page >= 0 && page < capacity_;
    const uint64_t bit = uint64_t{1} << (page & 63);
    if (!exists || (free_[static_cast<size_t>(page) / 64] & bit))
      throw std::logic_error("page " + std::to_string(page) + " of " + std::to_string(capacity_) + " is not in use");
    free_[static_cast<size_t>(page) / 64] |= bit;
    ++available_;
  }
}

}  // namespace fastft::runtime
