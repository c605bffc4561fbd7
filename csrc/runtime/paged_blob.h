// A packed adapter's way into pages that lie anywhere: addresses, and bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace fastft::runtime {

// Int64s of a blob that are addresses: `count` of them, from index `first` on, `stride` int64s apart, in units of `unit`
// bytes.
struct AddressRun {
  int64_t first;
  int64_t count;
  int64_t stride;
  int64_t unit;
};

// Where the bytes of a blob lie: its page i is page pages[i] of the pool. Nothing that is addressed crosses a page.
class PageMap {
 public:
  PageMap(std::span<const int32_t> pages, int64_t page_bytes) : pages_(pages), page_bytes_(page_bytes) {}

  // The physical address, in units, of a virtual one. Throws std::invalid_argument where the blob has no such byte or the
  // address is negative.
  int64_t operator()(int64_t address, int64_t unit) const;
  int64_t page_bytes() const { return page_bytes_; }
  std::span<const int32_t> pages() const { return pages_; }

 private:
  std::span<const int32_t> pages_;
  int64_t page_bytes_;
};

// The addresses of a blob as they are, one run after the other: virtual ones, if the blob was never relocated. `out` has
// room for exactly as many as the runs count.
void read_addresses(std::span<const int64_t> blob, std::span<const AddressRun> runs, std::span<int64_t> out);

// Writes into the blob the physical form of `virtual_addresses`, as `read_addresses` gave them. Can be repeated for other
// pages.
void relocate(std::span<int64_t> blob, std::span<const AddressRun> runs, std::span<const int64_t> virtual_addresses,
              const PageMap& map);

// The same for pieces, rows of ten int64 (fastft/ops/grouped.py), whose `left` and `right` are addresses in int64s of
// tables.
void relocate_pieces(std::span<int64_t> pieces, const PageMap& map);

// The pages of a blob into a pool's.
void copy_pages(std::span<std::byte> pool, std::span<const std::byte> blob, const PageMap& map);

}  // namespace fastft::runtime
