#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "switch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FASTFT_ASAN 1
#else
#define FASTFT_ASAN 0
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace fastft::hostcuda {

Coordinates current;
bool counting = false;
std::map<const void*, Moved> moved;

namespace {

constexpr size_t stack_bytes = 128 << 10, redzone = 64, warp_size = 32, offer_bytes = 8, gather_bytes = 48;

enum class State { ready, block_wait, warp_wait, done };

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(stack_bytes);
  void* fake_stack = nullptr;  // AddressSanitizer's, saved while the fiber does not run
  uint3 thread{};
  unsigned index = 0;
  State state = State::done;
  unsigned mask = 0;  // of the warp barrier it waits at
  Site site;
  unsigned turn = 0;  // of the warp's two buffers
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<std::vector<Copy>> copies;  // groups in flight and, last, the one that is open
};

struct Warp {
  alignas(8) char offered[warp_size][offer_bytes];
  // By turns, so that one barrier is enough: nobody fills a buffer again before all have left the barrier in between.
  alignas(8) char brought[2][warp_size][gather_bytes];
};

struct Scheduler {
  std::mutex one_grid_at_a_time;
  std::vector<std::unique_ptr<Fiber>> fibers;  // grown on demand, reused by later blocks
  std::vector<Warp> warps;
  size_t threads = 0;  // of the block that runs
  Fiber* running = nullptr;
  Context context;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;  // thrown inside a fiber
  std::vector<char> shared;
  size_t shared_bytes = 0;
  std::mt19937_64 random;
  bool shuffled = false;
} scheduler;

// AddressSanitizer must know which stack is in use; a null `fake_stack` says that the stack left behind has ended.
void announce_switch(void** fake_stack, const void* bottom, size_t size) {
#if FASTFT_ASAN
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}

void finish_switch(void* fake_stack, const void** bottom_left, size_t* size_left) {
#if FASTFT_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, bottom_left, size_left);
#else
  (void)fake_stack, (void)bottom_left, (void)size_left;
#endif
}

void fiber_main() {
  finish_switch(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
  try {
    (*scheduler.kernel)();
  } catch (...) {
    scheduler.error = std::current_exception();
  }
  scheduler.running->state = State::done;
  announce_switch(nullptr, scheduler.stack_bottom, scheduler.stack_size);
  switch_context(scheduler.running->context, scheduler.context);
}

void resume(Fiber& fiber) {
  scheduler.running = &fiber;
  current.thread = fiber.thread;
  announce_switch(&scheduler.fake_stack, fiber.stack.get(), stack_bytes);
  switch_context(scheduler.context, fiber.context);
  finish_switch(scheduler.fake_stack, nullptr, nullptr);
}

void wait(State state, unsigned mask, Site site) {
  Fiber& self = *scheduler.running;
  self.state = state, self.mask = mask, self.site = site;
  announce_switch(&self.fake_stack, scheduler.stack_bottom, scheduler.stack_size);
  switch_context(self.context, scheduler.context);
  finish_switch(self.fake_stack, &scheduler.stack_bottom, &scheduler.stack_size);
}

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

[[noreturn]] void divergent(const char* what) {
  std::ostringstream text;
  text << "divergent barrier (" << what << ") in block (" << current.block.x << ", " << current.block.y << ", "
       << current.block.z << "):";
  std::string last;
  for (size_t i = 0; i < scheduler.threads; ++i) {
    const Fiber& fiber = *scheduler.fibers[i];
    std::ostringstream where;
    if (fiber.state == State::done)
      where << "has exited";
    else
      where << "waits at " << fiber.site.file_name() << ":" << fiber.site.line();
    if (where.str() != last) text << " thread " << i << " " << where.str() << ";";
    last = where.str();
  }
  throw std::runtime_error(text.str());
}

// Lets every warp go on whose masked lanes all wait at one warp barrier; false if there is none.
bool release_warps() {
  bool released = false;
  for (size_t first = 0; first < scheduler.threads; first += warp_size) {
    for (size_t i = first; i < std::min(first + warp_size, scheduler.threads); ++i) {
      Fiber& fiber = *scheduler.fibers[i];
      if (fiber.state != State::warp_wait) continue;
      bool complete = true;
      for (size_t lane = 0; lane < warp_size; ++lane) {
        if (!(fiber.mask >> lane & 1)) continue;
        if (first + lane >= scheduler.threads) divergent("mask names lanes beyond the block");
        const Fiber& other = *scheduler.fibers[first + lane];
        complete =
            complete && other.state == State::warp_wait && other.mask == fiber.mask && same_site(other.site, fiber.site);
      }
      if (!complete) continue;
      unsigned mask = fiber.mask;
      for (size_t lane = 0; lane < warp_size; ++lane)
        if (mask >> lane & 1) scheduler.fibers[first + lane]->state = State::ready;
      released = true;
    }
  }
  return released;
}

void release_block() {
  const Fiber& first = *scheduler.fibers[0];
  for (size_t i = 0; i < scheduler.threads; ++i) {
    const Fiber& fiber = *scheduler.fibers[i];
    if (fiber.state != State::block_wait || !same_site(fiber.site, first.site))
      divergent("not every thread reached the same one");
  }
  for (size_t i = 0; i < scheduler.threads; ++i) scheduler.fibers[i]->state = State::ready;
}

void start(Fiber& fiber, unsigned index, dim3 block) {
  fiber.index = index;
  fiber.thread = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
  // A fiber abandoned after an error leaves its frames poisoned.
  if (fiber.state != State::done) ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), stack_bytes);
  fiber.state = State::ready;
  fiber.turn = 0;
  fiber.copies.assign(1, {});
  prepare_context(fiber.context, fiber.stack.get(), stack_bytes, fiber_main);
}

// NaN in every float type, so that a read before the first write shows in the result.
void prepare_shared(size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(scheduler.shared.data(), scheduler.shared.size());
  scheduler.shared_bytes = bytes;
  scheduler.shared.assign(2 * bytes + 16 * redzone, char(0xff));
  ASAN_POISON_MEMORY_REGION(scheduler.shared.data(), scheduler.shared.size());
}

void run_block(dim3 block, size_t shared_bytes) {
  scheduler.threads = size_t(block.x) * block.y * block.z;
  while (scheduler.fibers.size() < scheduler.threads) scheduler.fibers.push_back(std::make_unique<Fiber>());
  scheduler.warps.resize((scheduler.threads + warp_size - 1) / warp_size);
  prepare_shared(shared_bytes);
  for (size_t i = 0; i < scheduler.threads; ++i) start(*scheduler.fibers[i], unsigned(i), block);
  std::vector<size_t> order(scheduler.threads);
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    if (scheduler.shuffled) std::shuffle(order.begin(), order.end(), scheduler.random);
    bool finished = true;
    for (size_t i : order) {
      if (scheduler.fibers[i]->state == State::ready) resume(*scheduler.fibers[i]);
      if (scheduler.error) std::rethrow_exception(std::exchange(scheduler.error, nullptr));
      finished = finished && scheduler.fibers[i]->state == State::done;
    }
    if (finished) return;
    if (!release_warps()) release_block();
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  std::lock_guard<std::mutex> lock(scheduler.one_grid_at_a_time);
  size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("invalid launch configuration: " + std::to_string(threads) + " threads per block, grid (" +
                             std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) + ")");
  const char* seed = std::getenv("FASTFT_HOSTCUDA_SEED");
  scheduler.random.seed(seed ? std::strtoull(seed, nullptr, 10) : 0);
  scheduler.shuffled = seed && std::strcmp(seed, "0") != 0;
  scheduler.kernel = &kernel;
  current.block_dim = block, current.grid_dim = grid;
  std::vector<size_t> blocks(size_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (scheduler.shuffled) std::shuffle(blocks.begin(), blocks.end(), scheduler.random);
  for (size_t b : blocks) {
    current.block = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (size_t(grid.x) * grid.y))};
    run_block(block, shared_bytes);
  }
}

void block_barrier(Site site) { wait(State::block_wait, 0, site); }

void warp_barrier(unsigned mask, Site site) {
  if (!(mask >> lane() & 1)) throw std::runtime_error("a lane calls a warp barrier whose mask does not name it");
  wait(State::warp_wait, mask, site);
}

unsigned lane() { return scheduler.running->index % warp_size; }

Gathered offer(unsigned mask, const void* mine, size_t bytes, Site site) {
  if (bytes > offer_bytes) throw std::runtime_error("a lane brings more bytes than it may");
  auto& offered = scheduler.warps[scheduler.running->index / warp_size].offered;
  std::memcpy(offered[lane()], mine, bytes);
  warp_barrier(mask, site);
  return {offered[0], offer_bytes};
}

Gathered gather(const void* mine, size_t bytes, Site site) {
  if (bytes > gather_bytes) throw std::runtime_error("a lane brings more bytes than it may");
  Fiber& self = *scheduler.running;
  auto& brought = scheduler.warps[self.index / warp_size].brought[self.turn ^= 1];
  std::memcpy(brought[lane()], mine, bytes);
  warp_barrier(0xffffffffu, site);
  return {brought[0], gather_bytes};
}

void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw std::runtime_error("an asynchronous copy is not 16-byte aligned");
  scheduler.running->copies.back().push_back({to, from, bytes});
}

void commit_copies() { scheduler.running->copies.emplace_back(); }

void wait_for_copies(size_t groups_in_flight) {
  auto& copies = scheduler.running->copies;
  while (copies.size() > groups_in_flight + 1) {
    for (const auto& copy : copies.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else  // nothing to read
        std::memset(copy.to, 0, copy.bytes);
    }
    copies.erase(copies.begin());
  }
}

void* shared_memory(size_t offset, size_t bytes) {
  if (offset + bytes > scheduler.shared_bytes)
    throw std::runtime_error("kernel uses " + std::to_string(offset + bytes) + " bytes of shared memory, the launch gave " +
                             std::to_string(scheduler.shared_bytes));
  // Each array starts at twice its offset, so that poisoned bytes separate it from the next.
  char* base = scheduler.shared.data();
  base += (redzone - reinterpret_cast<uintptr_t>(base) % redzone) + 2 * offset;
  ASAN_UNPOISON_MEMORY_REGION(base, bytes);
  return base;
}

}  // namespace fastft::hostcuda
