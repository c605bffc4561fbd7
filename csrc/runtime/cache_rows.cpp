#include "cache_rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastft::runtime {

void cache_rows(std::span<const std::vector<int64_t>> blocks, std::span<const int64_t> lengths, int64_t page_size,
                int64_t stride, int64_t width, std::span<int64_t> rows, std::span<uint8_t> mask) {
  const auto items = blocks.size() * static_cast<size_t>(std::max<int64_t>(width, 0));
  if (page_size < 1 || width < 0 || lengths.size() != blocks.size() || rows.size() < items || mask.size() < items)
    throw std::invalid_argument(std::to_string(blocks.size()) + " requests of at most " + std::to_string(width) +
                                " tokens, with " + std::to_string(lengths.size()) + " lengths and room for " +
                                std::to_string(rows.size()) + " rows and " + std::to_string(mask.size()) + " of the mask");
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t room = std::min(width, static_cast<int64_t>(blocks[i].size()) * page_size);
    if (lengths[i] < 0 || lengths[i] > room)
      throw std::invalid_argument("a request of " + std::to_string(lengths[i]) + " tokens, of which " +
                                  std::to_string(room) + " have a place");
  }
  int64_t* row = rows.data();
  uint8_t* seen = mask.data();
  for (size_t i = 0; i < blocks.size(); ++i, row += width, seen += width) {
    for (int64_t first = 0; first < lengths[i]; first += page_size) {
      const int64_t start = blocks[i][static_cast<size_t>(first / page_size)] * stride - first;
      for (int64_t token = first; token < std::min(first + page_size, lengths[i]); ++token) row[token] = start + token;
    }
    std::fill(row + lengths[i], row + width, 0);
    std::fill(seen, seen + lengths[i], uint8_t{1});
    std::fill(seen + lengths[i], seen + width, uint8_t{0});
  }
}

}  // namespace fastft::runtime
