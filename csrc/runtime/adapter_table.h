// Which adapters are where: on disk, in host memory, on the device; who uses them, what is loaded next, what must go.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include "host_tier.h"
#include "load_queue.h"
#include "pages.h"

namespace fastft::runtime {

enum class State { on_disk, in_host, loading, on_device, draining };
enum class Miss { absent, pending, failed };
enum class Failure { none, files, room, unloaded, closed, other };

// Why an adapter is loaded. What is on the device for a demand is kept until it was leased, or for `reserve_seconds`: else
// two requests that wait for one slot could push out each other's adapter for ever. A prefetched one yields to demands only.
enum class Urgency { prefetch, load, demand };

// The right to use a slot; its content stays until the lease is given back.
struct Lease {
  uint64_t id;
  uint64_t generation;
  int32_t slot;
  std::string name;
  std::string digest;
};

// How a load ended; `generation` and `digest` where it did not fail.
struct Outcome {
  Failure failure = Failure::none;
  std::string error;
  uint64_t generation = 0;
  std::string digest;
};

// What the thread that loads does next. It does the work itself and reports it; the table only keeps the books.
struct Task {
  enum class Kind { read, place, collect };
  Kind kind = Kind::collect;
  std::string name;
  uint64_t epoch = 0;       // version of the folder that is asked for
  uint64_t copy = 0;        // id of the host copy, to be made (read) or to be copied (place)
  uint64_t generation = 0;  // place: where to
  int32_t slot = -1;
  std::vector<int32_t> pages;
};

// What nobody may use any more: host copies to let go, slots to be emptied and then reported by `reclaimed`.
struct Garbage {
  std::vector<uint64_t> copies;
  std::vector<int32_t> slots;
};

struct Stats {
  int32_t slots = 0, slots_used = 0, pages = 0, pages_used = 0;
  int64_t page_bytes = 0, host_bytes = 0, host_cap = 0;
  int64_t leases = 0, queued = 0, known = 0, host_copies = 0;
  int64_t hits = 0, misses = 0, host_hits = 0, reads = 0, loads = 0, failures = 0, evictions = 0, host_evictions = 0;
};

struct Resident {
  std::string name;
  std::string digest;
  State state;
  uint64_t generation;
  int32_t slot;
  int64_t bytes;
  int64_t leases;
  bool pinned;
};

struct Limits {
  int32_t slots = 0;
  int32_t pages = 0;
  int64_t page_bytes = 0;
  int64_t host_bytes = 0;
  double reserve_seconds = 5.0;
  double retry_seconds = 1.0;  // how long a failure is remembered, in which a miss does not try again
};

// A *version* of an adapter is one content of its folder in device pages. It has a generation number that is never used
// again. The newest is the current one, which new leases get; older ones live until their last lease is given back.
//
// All methods may be called from any thread. Pages and slots are free again only when `reclaimed` says that nothing reads
// them, which on a GPU is a matter of streams.
class AdapterTable {
 public:
  struct Load {  // one that was asked for
    bool ended = false;
    Outcome outcome;
  };
  using Ticket = std::shared_ptr<const Load>;

  explicit AdapterTable(Limits limits);

  // Requests. Misses of `absent` adapters are for the caller to look up and to `want`. Errors are told for `retry_seconds`,
  // and to who has `waited` (seconds) since before.
  std::variant<Lease, Miss> acquire(const std::string& name, double waited = 0);
  void release(const Lease& lease);  // throws std::invalid_argument where it was given back before
  bool holds(const Lease& lease) const;
  Ticket want(const std::string& name, Urgency urgency);
  Ticket update(const std::string& name);  // the folder has changed
  std::optional<Outcome> wait(const Ticket& ticket, double seconds);

  // The thread that loads.
  std::optional<Task> next_task(double seconds);  // nothing: time is up, or the table was closed
  bool read_done(const Task& task, int64_t bytes, int32_t pages, const std::string& digest);  // false: not kept, drop it
  void placed(const Task& task);
  void failed(const Task& task, Failure failure, const std::string& error);
  Garbage take_garbage();
  void reclaimed(const std::vector<int32_t>& slots);

  // Administration.
  void start_unload(const std::string& name);                                     // no new leases from here on
  std::optional<int64_t> finish_unload(const std::string& name, double seconds);  // bytes freed; nothing: still in use
  void cancel_unload(const std::string& name);
  void forget(const std::string& name);  // all of it, without waiting: device pages when the last user leaves
  bool evict(const std::string& name);   // from the device, if nobody uses it and it is not pinned
  void pin(const std::string& name, bool pinned);
  void close();

  State state(const std::string& name) const;
  bool waits_for_room(const std::string& name) const;  // all is ready but for a slot or pages that users have to leave
  std::optional<std::string> error(const std::string& name, double waited = 0) const;
  std::vector<Resident> residents() const;
  Stats stats() const;
  void check() const;  // throws std::logic_error where the books are wrong

 private:
  using Clock = std::chrono::steady_clock;
  enum class Work { none, reading, placing };
  enum class Room { ready, retiring, none_now, never };

  struct Version {
    std::string name;
    std::string digest;
    uint64_t epoch;
    int32_t slot;
    std::vector<int32_t> pages;
    bool visible = false;  // its bytes are there
    std::unordered_set<uint64_t> leases;
    uint64_t last_used = 0;
    Urgency reserved = Urgency::load;  // load: not reserved
    Clock::time_point reserved_until;
  };

  // An adapter that is somewhere else than on disk, or asked for. All others have no entry.
  struct Entry {
    uint64_t epoch = 0;    // goes up when the folder has changed
    uint64_t current = 0;  // generation; 0: none
    uint64_t copy = 0;     // host copy of this epoch; 0: none
    Work work = Work::none;
    uint64_t placing = 0;
    std::shared_ptr<Load> load;  // asked for and not ended
    Urgency urgency = Urgency::prefetch;
    bool no_room = false;
    bool pinned = false;
    int32_t unloading = 0;
    std::string error;
    Clock::time_point error_at;
  };

  static Clock::time_point after(double seconds) {
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }
  static Ticket ended(Outcome outcome) { return std::make_shared<const Load>(Load{true, std::move(outcome)}); }

  Ticket ask(const std::string& name, Urgency urgency);
  std::optional<Task> choose(Clock::time_point& wake);
  Task start_read(const std::string& name, Entry& entry);
  Task start_place(const std::string& name, Entry& entry);
  Room make_room(const std::string& name, int32_t pages, bool urgent, Clock::time_point& wake);
  std::string why_never(const std::string& name, int32_t pages) const;
  void end_load(Entry& entry, Outcome outcome);
  void fail(const std::string& name, Entry& entry, Failure failure, const std::string& error);
  void dequeue(const std::string& name, Entry& entry);
  void drop_copy(Entry& entry);
  void supersede(Entry& entry);
  void demote(uint64_t generation);  // a current version goes, its host copy stays for a while
  void retire(uint64_t generation);
  void settle(std::vector<HostTier::Gone>& gone);
  void tidy(const std::string& name);
  bool remembers_error(const Entry& entry, double waited = 0) const;
  bool is_current(uint64_t generation, const Version& version) const;
  void notify();

  const Limits limits_;
  mutable std::mutex mutex_;
  std::condition_variable work_;     // for the thread that loads
  std::condition_variable changed_;  // for those who wait for a load or for users
  PageAllocator pages_;
  PageAllocator slots_;
  HostTier host_;
  LoadQueue queue_;
  std::unordered_map<std::string, Entry> entries_;
  std::unordered_map<uint64_t, Version> versions_;                // by generation
  std::unordered_map<int32_t, std::vector<int32_t>> reclaiming_;  // pages by slot
  Garbage garbage_;
  Stats counts_;
  uint64_t copies_ = 0, generations_ = 0, leases_ = 0, uses_ = 0;
  bool host_full_ = false;  // a read ahead found no room
  bool closed_ = false;
};

}  // namespace fastft::runtime
