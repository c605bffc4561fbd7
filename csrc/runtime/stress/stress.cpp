// Threads that load, use, update, unload, evict, pin and forget adapters at random, with pages and slots in plain memory
// that nothing but the table guards: built with -fsanitize=thread (make test-tsan), a page given out too early is a data
// race, and in any build a wrong word. Arguments: seconds, seed, and "use-after-release", which reads what it gave back:
// that must be found.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../adapter_table.h"

using namespace fastft::runtime;

namespace {

constexpr int NAMES = 12, SLOTS = 4, PAGES = 14, WORDS = 64, LOADERS = 2, USERS = 4;
constexpr int64_t PAGE_BYTES = WORDS * 8;

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::abort();
}

uint64_t word_of(const std::string& digest, int page, int word) {
  return std::hash<std::string>()(digest) + static_cast<uint64_t>(page * WORDS + word) * 0x9E3779B97F4A7C15u;
}

struct Content {
  std::string digest;
  int pages;
};

struct World {
  AdapterTable table{{SLOTS, PAGES, PAGE_BYTES, 6 * PAGE_BYTES, 0.005, 0.002}};
  std::atomic<bool> over{false};
  std::atomic<int> on_disk[NAMES] = {};  // the version of every folder
  std::atomic<int64_t> leases{0}, loads{0}, updates{0}, unloads{0}, errors{0};
  bool use_after_release = false;
  // What the device would hold. Only the table keeps threads apart here.
  std::vector<uint64_t> pool = std::vector<uint64_t>(PAGES * WORDS);
  std::vector<std::vector<int32_t>> slot_pages = std::vector<std::vector<int32_t>>(SLOTS);
  // Host copies, as a caller in Python has them in a dictionary.
  std::mutex copies_mutex;
  std::map<uint64_t, Content> copies;
};

int number_of(const std::string& name) { return std::atoi(name.c_str() + 1); }
int pages_of(int number) { return 1 + number % 4; }

void collect(World& world) {
  const Garbage garbage = world.table.take_garbage();
  {
    std::lock_guard lock(world.copies_mutex);
    for (uint64_t copy : garbage.copies) world.copies.erase(copy);
  }
  for (int32_t slot : garbage.slots) world.slot_pages[static_cast<size_t>(slot)].clear();
  if (!garbage.slots.empty()) world.table.reclaimed(garbage.slots);
}

void load(World& world, uint64_t seed) {
  std::mt19937_64 random(seed);
  while (const auto task = world.table.next_task(1000)) {
    const bool fails = random() % 40 == 0;
    if (task->kind == Task::Kind::read && fails) {
      world.table.failed(*task, Failure::files, "made to fail");
    } else if (task->kind == Task::Kind::read) {
      const int number = number_of(task->name), pages = pages_of(number);
      const std::string digest = task->name + ":" + std::to_string(world.on_disk[number].load());
      {
        std::lock_guard lock(world.copies_mutex);
        world.copies[task->copy] = {digest, pages};
      }
      if (!world.table.read_done(*task, pages * PAGE_BYTES, pages, digest)) {
        std::lock_guard lock(world.copies_mutex);
        world.copies.erase(task->copy);
      }
    } else if (task->kind == Task::Kind::place) {
      Content content;
      {
        std::lock_guard lock(world.copies_mutex);
        const auto copy = world.copies.find(task->copy);
        if (copy == world.copies.end()) die("the host copy of " + task->name + " is gone while it is placed");
        content = copy->second;
      }
      world.slot_pages[static_cast<size_t>(task->slot)] = task->pages;
      for (int page = 0; page < content.pages; ++page)
        for (int word = 0; word < WORDS; ++word)
          world.pool[static_cast<size_t>(task->pages[static_cast<size_t>(page)] * WORDS + word)] =
              word_of(content.digest, page, word);
      if (fails) {
        world.table.failed(*task, Failure::other, "made to fail");
      } else {
        world.table.placed(*task);
        ++world.loads;
      }
    }
    collect(world);
  }
}

void verify(World& world, const Lease& lease) {
  const auto& pages = world.slot_pages[static_cast<size_t>(lease.slot)];
  const int number = number_of(lease.name);
  if (static_cast<int>(pages.size()) != pages_of(number)) die("slot of " + lease.name + " has the wrong number of pages");
  if (lease.digest.substr(0, lease.digest.find(':')) != lease.name) die("a lease of " + lease.name + " got " + lease.digest);
  for (int page = 0; page < pages_of(number); ++page)
    for (int word = 0; word < WORDS; ++word)
      if (world.pool[static_cast<size_t>(pages[static_cast<size_t>(page)] * WORDS + word)] !=
          word_of(lease.digest, page, word))
        die("a wrong word in " + lease.name);
}

// Whatever is there now.
void read(const World& world, const std::vector<int32_t>& pages) {
  uint64_t sum = 0;
  for (int32_t page : pages) sum += world.pool[static_cast<size_t>(page * WORDS)];
  static std::atomic<uint64_t> kept;
  kept += sum;
}

std::string some_name(std::mt19937_64& random) {
  return "a" + std::to_string(std::min(random() % NAMES, random() % NAMES));  // low numbers more often
}

void use(World& world, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Lease> held;
  while (!world.over) {
    const std::string name = some_name(random);
    const auto found = world.table.acquire(name);
    if (const Lease* lease = std::get_if<Lease>(&found)) {
      held.push_back(*lease);
      ++world.leases;
    } else if (std::get<Miss>(found) == Miss::absent) {
      world.table.want(name, random() % 3 ? Urgency::demand : Urgency::prefetch);
    }
    for (const Lease& lease : held) verify(world, lease);
    while (held.size() > random() % 3) {
      const Lease lease = held.back();
      held.pop_back();
      const std::vector<int32_t> pages = world.slot_pages[static_cast<size_t>(lease.slot)];
      world.table.release(lease);
      if (world.use_after_release) read(world, pages);
      try {
        world.table.release(lease);
        die("a lease was given back twice");
      } catch (const std::invalid_argument&) {
      }
    }
    if (random() % 4 == 0) std::this_thread::yield();
  }
  for (const Lease& lease : held) world.table.release(lease);
}

void administer(World& world, uint64_t seed) {
  std::mt19937_64 random(seed);
  while (!world.over) {
    const std::string name = some_name(random);
    switch (random() % 8) {
      case 0: {
        ++world.on_disk[number_of(name)];
        const auto outcome = world.table.wait(world.table.update(name), 0.05);
        world.updates += outcome && outcome->failure == Failure::none;
        break;
      }
      case 1: {
        world.table.start_unload(name);
        if (world.table.finish_unload(name, 0.01)) {
          ++world.unloads;
        } else {
          world.table.cancel_unload(name);
        }
        break;
      }
      case 2: world.table.forget(name); break;
      case 3: world.table.evict(name); break;
      case 4: world.table.pin(name, random() % 2); break;
      case 5: world.table.pin(name, false); break;
      case 6: world.errors += world.table.error(name).has_value(); break;
      case 7:
        world.table.residents();
        world.table.stats();
        world.table.state(name);
    }
    world.table.check();
    collect(world);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 2.0;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  World world;
  world.use_after_release = argc > 3 && !std::strcmp(argv[3], "use-after-release");
  std::vector<std::thread> loaders, others;
  for (int i = 0; i < LOADERS; ++i) loaders.emplace_back(load, std::ref(world), seed * 100 + static_cast<uint64_t>(i));
  for (int i = 0; i < USERS; ++i) others.emplace_back(use, std::ref(world), seed * 100 + 50 + static_cast<uint64_t>(i));
  others.emplace_back(administer, std::ref(world), seed * 100 + 90);
  others.emplace_back(administer, std::ref(world), seed * 100 + 91);
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  world.over = true;
  for (auto& thread : others) thread.join();
  world.table.close();
  for (auto& thread : loaders) thread.join();
  for (int i = 0; i < NAMES; ++i) world.table.forget("a" + std::to_string(i));
  collect(world);
  world.table.check();
  const Stats stats = world.table.stats();
  if (stats.pages_used || stats.slots_used || stats.known || stats.host_copies || stats.queued || !world.copies.empty())
    die("something is left: pages " + std::to_string(stats.pages_used) + ", known " + std::to_string(stats.known) +
        ", host copies " + std::to_string(stats.host_copies) + " and " + std::to_string(world.copies.size()));
  if (!world.leases || !world.loads || !world.updates || !world.unloads) die("too little happened");
  std::printf("%lld leases, %lld loads, %lld evictions, %lld updates, %lld unloads, %lld failures: all right\n",
              static_cast<long long>(world.leases), static_cast<long long>(world.loads),
              static_cast<long long>(stats.evictions), static_cast<long long>(world.updates),
              static_cast<long long>(world.unloads), static_cast<long long>(stats.failures));
}
