// Groups: adapters that share x, stacked along the rank, each with a dropout mask of its own (fastft/ops/lora.py).
//
// A warp always works on one slot: up to 16 ranks of one group. A rank tile is 1, 2 or 4 slots, so it may span several
// groups; a block then reads the activations once and keeps a masked copy of them per group in shared memory. Without
// dropout all groups are one.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.cuh"

namespace fastft {

constexpr int kWarpRanks = 16;

// The groups of one launch: group g has the ranks from end[g - 1] (the first one: from `begin`) up to end[g].
constexpr int kMaxGroups = 64;  // with 32 bits each it is a quarter of a kilobyte of kernel arguments
struct Groups {
  int count, begin, end[kMaxGroups];
};

struct Slot {
  int rank, end;  // ranks from `rank` on, below `end` and `rank` + 16
  int group;
  bool first;  // of its group
};

// A group without ranks has a slot too: somebody must write its mask.
__host__ __device__ inline int slots_of(int ranks) { return ranks > 0 ? (ranks + kWarpRanks - 1) / kWarpRanks : 1; }

// The slots of a block's rank tile, in the padding that ends the first rows of another array in shared memory: four groups
// and a masked copy of the activations for each fill all of the 99 KiB that a block may have on compute capability 8.6.
struct Slots {
  float* padding;  // of row 0, 16 bytes
  int pitch;       // floats from row to row
  __device__ __forceinline__ Slot& operator[](int i) const { return *reinterpret_cast<Slot*>(padding + i * pitch); }
};
static_assert(sizeof(Slot) == 16);

// The slots of one group's ranks from `rank` on.
struct Consecutive {
  int rank, end;
  __device__ __forceinline__ Slot operator[](int i) const { return {rank + i * kWarpRanks, end, 0, false}; }
};

// Slots past the last one are empty and of the last group.
__device__ __forceinline__ Slot find_slot(const Groups& groups, int index) {
  int begin = groups.begin;
  for (int g = 0; g < groups.count; ++g) {
    const int end = groups.end[g], slots = slots_of(end - begin);
    if (index < slots) return {begin + index * kWarpRanks, end, g, index == 0};
    index -= slots, begin = end;
  }
  return {begin, begin, groups.count - 1, false};
}

// Calls f(groups, g), g the first group's number, for every launch that the groups need: one, up to kMaxGroups of them.
template <class F>
void each_launch(const std::vector<int64_t>& ranks, bool masked, F&& f) {
  int64_t total = 0;
  if (!masked) {
    for (int64_t r : ranks) total += r;
    return f(Groups{1, 0, {static_cast<int>(total)}}, 0);
  }
  for (size_t g = 0; g < ranks.size(); g += kMaxGroups) {
    Groups groups{static_cast<int>(std::min<size_t>(kMaxGroups, ranks.size() - g)), static_cast<int>(total), {}};
    for (int i = 0; i < groups.count; ++i) groups.end[i] = static_cast<int>(total += ranks[g + i]);
    f(groups, static_cast<int64_t>(g));
  }
}

inline int64_t count_slots(const Groups& groups) {
  int64_t slots = 0;
  for (int g = 0; g < groups.count; ++g) slots += slots_of(groups.end[g] - (g ? groups.end[g - 1] : groups.begin));
  return slots;
}

}  // namespace fastft
