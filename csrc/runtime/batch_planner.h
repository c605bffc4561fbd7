// From the slot of every token to what the grouped kernels read: tokens by slot, and where each slot's begin.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastft::runtime {

struct BatchPlan {
  int32_t distinct;  // slots that have tokens
  int32_t active;    // tokens that have a slot
};

// Keeps its working memory: one planner for each thread that plans.
class BatchPlanner {
 public:
  explicit BatchPlanner(int32_t slots);

  // token_slots: T slots, -1 for no adapter. assignments: T or more, get the tokens sorted by slot, in order within each,
  // those without adapter last; what lies behind them gets -1. segments: D triples (slot, begin, end) in order of slots;
  // those that are left become (0, active, active), so buffers of any size can stay in a CUDA graph. Throws
  // std::invalid_argument, with the buffers untouched, where a slot doesn't exist or a buffer is too small.
  BatchPlan plan(std::span<const int32_t> token_slots, std::span<int32_t> assignments, std::span<int32_t> segments);

 private:
  int32_t slots_;
  std::vector<int32_t> next_;  // by slot, -1 last: how many tokens, then where the next one goes
};

}  // namespace fastft::runtime
