// Tasks shared among threads so that each takes its own in order, and then what others have not begun.
#pragma once

#include "operands.h"

#include <atomic>
#include <thread>
#include <vector>

namespace fastft {

// Tasks one after the other that cost about so much each, in as many contiguous shares as there are threads. A thread takes
// the tasks of its own share in order, then what others have not begun.
class Shares {
 public:
  template <class Tasks>
  Shares(const Tasks& tasks, int64_t threads) : all(threads) {
    double total = 0, sum = 0;
    for (const auto& task : tasks) total += task.cost;
    int64_t i = 0;
    const auto n = static_cast<int64_t>(tasks.size());
    for (int64_t t = 0; t < threads; ++t) {
      all[t].next = i;
      for (const double most = total * (t + 1) / threads; i < n && (t + 1 == threads || sum + tasks[i].cost / 2 <= most);
           ++i)
        sum += tasks[i].cost;
      all[t].end = i;
    }
  }

  // `count` tasks that cost the same.
  Shares(int64_t count, int64_t threads) : all(threads) {
    for (int64_t t = 0; t < threads; ++t) all[t].next = count * t / threads, all[t].end = count * (t + 1) / threads;
  }

  template <class F>
  void work(int64_t thread, const F& body) {
    for (size_t t = 0; t < all.size(); ++t) {
      Share& share = all[(thread + t) % all.size()];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) body(i);
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> all;
};

// How many to share work of this cost among.
inline int64_t threads_for(double cost) {
  return cost < serial_cost ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

// Tasks that others wait for.
template <class Number>
class Open {
 public:
  explicit Open(Number count = 0) : left(count) {}
  void add() { left.fetch_add(1, std::memory_order_relaxed); }

  // Runs one of them. It is over also where it fails, or those who wait would wait for ever.
  template <class F>
  void run(const F& task) {
    struct Over {
      std::atomic<Number>& left;
      ~Over() { left.fetch_sub(1, std::memory_order_release); }
    } const over{left};
    task();
  }

  void wait() const {
    for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  std::atomic<Number> left;
};

}  // namespace fastft
