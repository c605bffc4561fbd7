// Which rows of a paged cache of keys and values the requests of a decoding step read.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastft::runtime {

// Requests of `lengths` tokens in `blocks`, each of page_size tokens, `stride` rows from one block to the next. rows and
// mask get B times `width` items in their first places: the row of each token and 1, or behind a request's length 0 and 0.
// Throws std::invalid_argument, with the buffers untouched, where a length is larger than width or than its blocks, or a
// buffer is too small.
void cache_rows(std::span<const std::vector<int64_t>> blocks, std::span<const int64_t> lengths, int64_t page_size,
                int64_t stride, int64_t width, std::span<int64_t> rows, std::span<uint8_t> mask);

}  // namespace fastft::runtime
