#include "paged_blob.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace fastft::runtime {
namespace {

// Field numbers of a piece and its kinds, as in fastft/ops/grouped.py.
constexpr size_t FIELDS = 10, KIND = 0, LEFT = 2, RIGHT = 3;
constexpr int64_t NONE = 0, ENTRIES = 4;

// Calls visit(index into the blob, unit) for every address. Runs that leave the blob, or that don't count `total` addresses,
// throw before anything is visited.
template <typename Visit>
void visit_addresses(size_t size, std::span<const AddressRun> runs, size_t total, Visit visit) {
  const auto int64s = static_cast<int64_t>(size);
  size_t counted = 0;
  for (const AddressRun& run : runs) {
    const bool sane = run.first >= 0 && run.first <= int64s && run.count >= 0 && run.stride >= 1 && run.unit >= 1;
    if (!sane || (run.count > 0 && (run.first == int64s || run.count - 1 > (int64s - 1 - run.first) / run.stride)))
      throw std::invalid_argument("addresses (first " + std::to_string(run.first) + ", count " + std::to_string(run.count) +
                                  ", stride " + std::to_string(run.stride) + ", unit " + std::to_string(run.unit) +
                                  ") don't lie in a blob of " + std::to_string(int64s) + " int64s");
    counted += static_cast<size_t>(run.count);
  }
  if (counted != total)
    throw std::invalid_argument("runs of " + std::to_string(counted) + " addresses for " + std::to_string(total));
  for (const AddressRun& run : runs)
    for (int64_t i = 0; i < run.count; ++i) visit(static_cast<size_t>(run.first + i * run.stride), run.unit);
}

}  // namespace

int64_t PageMap::operator()(int64_t address, int64_t unit) const {
  const auto bytes = static_cast<int64_t>(pages_.size()) * page_bytes_;
  if (address < 0 || address >= (bytes + unit - 1) / unit || page_bytes_ % unit)
    throw std::invalid_argument("address " + std::to_string(address) + " in units of " + std::to_string(unit) +
                                " bytes is not one of a blob of " + std::to_string(bytes) + " bytes");
  const int64_t byte = address * unit;
  return (pages_[static_cast<size_t>(byte / page_bytes_)] * page_bytes_ + byte % page_bytes_) / unit;
}

void read_addresses(std::span<const int64_t> blob, std::span<const AddressRun> runs, std::span<int64_t> out) {
  auto next = out.begin();
  visit_addresses(blob.size(), runs, out.size(), [&](size_t index, int64_t) { *next++ = blob[index]; });
}

void relocate(std::span<int64_t> blob, std::span<const AddressRun> runs, std::span<const int64_t> virtual_addresses,
              const PageMap& map) {
  auto next = virtual_addresses.begin();
  visit_addresses(blob.size(), runs, virtual_addresses.size(),
                  [&](size_t index, int64_t unit) { blob[index] = map(*next++, unit); });
}

void relocate_pieces(std::span<int64_t> pieces, const PageMap& map) {
  if (pieces.size() % FIELDS) throw std::invalid_argument("pieces are rows of ten int64");
  for (size_t row = 0; row < pieces.size(); row += FIELDS) {
    const int64_t kind = pieces[row + KIND];
    if (kind == NONE) continue;
    pieces[row + LEFT] = map(pieces[row + LEFT], 8);
    if (kind != ENTRIES) pieces[row + RIGHT] = map(pieces[row + RIGHT], 8);
  }
}

void copy_pages(std::span<std::byte> pool, std::span<const std::byte> blob, const PageMap& map) {
  const auto page_bytes = static_cast<size_t>(map.page_bytes());
  if (blob.size() != map.pages().size() * page_bytes)
    throw std::invalid_argument("a blob of " + std::to_string(blob.size()) + " bytes for " +
                                std::to_string(map.pages().size()) + " pages of " + std::to_string(page_bytes));
  for (int32_t page : map.pages())
    if (page < 0 || (static_cast<size_t>(page) + 1) * page_bytes > pool.size())
      throw std::invalid_argument("page " + std::to_string(page) + " is not one of the pool");
  const std::byte* from = blob.data();
  for (int32_t page : map.pages()) {
    std::memcpy(pool.data() + static_cast<size_t>(page) * page_bytes, from, page_bytes);
    from += page_bytes;
  }
}

}  // namespace fastft::runtime
