#include "batch_planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastft::runtime {

BatchPlanner::BatchPlanner(int32_t slots) : slots_(slots), next_(static_cast<size_t>(std::max(slots, 0)) + 1) {
  if (slots < 1) throw std::invalid_argument("a batch planner for " + std::to_string(slots) + " slots");
}

BatchPlan BatchPlanner::plan(std::span<const int32_t> token_slots, std::span<int32_t> assignments,
                             std::span<int32_t> segments) {
  std::fill(next_.begin(), next_.end(), 0);
  const auto without = static_cast<size_t>(slots_);
  for (int32_t slot : token_slots) {
    if (slot < -1 || slot >= slots_)
      throw std::invalid_argument("a token has slot " + std::to_string(slot) + "; there are slots 0 to " +
                                  std::to_string(slots_ - 1) + ", and -1 for no adapter");
    ++next_[slot < 0 ? without : static_cast<size_t>(slot)];
  }
  const auto distinct = slots_ - static_cast<int32_t>(std::count(next_.begin(), next_.end() - 1, 0));
  if (static_cast<size_t>(distinct) > segments.size() / 3)
    throw std::invalid_argument("a batch with " + std::to_string(distinct) + " distinct adapters and room for " +
                                std::to_string(segments.size() / 3) + " segments");
  if (token_slots.size() > assignments.size())
    throw std::invalid_argument("a batch of " + std::to_string(token_slots.size()) + " tokens and room for " +
                                std::to_string(assignments.size()) + " assignments");
  int32_t begin = 0;
  size_t out = 0;
  for (size_t slot = 0; slot <= without; ++slot) {
    const int32_t count = next_[slot];
    next_[slot] = begin;
    begin += count;
    if (slot == without || count == 0) continue;
    segments[out++] = static_cast<int32_t>(slot);
    segments[out++] = begin - count;
    segments[out++] = begin;
  }
  const int32_t active = next_[without];
  for (; out + 3 <= segments.size(); out += 3) {
    segments[out] = 0;
    segments[out + 1] = segments[out + 2] = active;
  }
  for (size_t token = 0; token < token_slots.size(); ++token) {
    const int32_t slot = token_slots[token];
    assignments[static_cast<size_t>(next_[slot < 0 ? without : static_cast<size_t>(slot)]++)] = static_cast<int32_t>(token);
  }
  std::fill(assignments.begin() + static_cast<std::ptrdiff_t>(token_slots.size()), assignments.end(), -1);
  return {distinct, active};
}

}  // namespace fastft::runtime
