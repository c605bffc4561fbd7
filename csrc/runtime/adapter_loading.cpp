// The part of the table that the loading thread calls: what is loaded next, and what must go for it.
#include "adapter_table.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace fastft::runtime {

std::optional<Task> AdapterTable::next_task(double seconds) {
  std::unique_lock lock(mutex_);
  const auto deadline = after(seconds);
  while (!closed_) {
    auto wake = deadline;
    if (auto task = choose(wake)) return task;
    if (Clock::now() >= deadline) break;
    work_.wait_until(lock, wake);
  }
  return std::nullopt;
}

// What somebody waits for is read before what may be needed is placed; what can't be placed yet lets others be read.
std::optional<Task> AdapterTable::choose(Clock::time_point& wake) {
  if (!garbage_.copies.empty() || !garbage_.slots.empty()) return Task{};
  bool blocked = !reclaiming_.empty();  // another thread is about to give pages back
  const bool may_read = !host_full_ || host_.held() == 0;
  const std::string* read = nullptr;
  for (auto at = queue_.order().begin(); at != queue_.order().end();) {
    const bool urgent = at->first.first == 0;
    const std::string& queued = at->second;
    ++at;
    Entry& entry = entries_.at(queued);
    if (entry.work != Work::none || entry.unloading) continue;
    if (!entry.copy) {
      if (!read) read = &queued;
      continue;
    }
    if (read && may_read && !urgent) break;
    if (blocked) {
      entry.no_room = urgent && reclaiming_.empty();
      continue;
    }
    const std::string name = queued;  // leaving the queue ends the other
    const int32_t pages = host_.find(entry.copy)->pages;
    switch (make_room(name, pages, urgent, wake)) {
      case Room::ready: return start_place(name, entry);
      case Room::retiring: return Task{};
      case Room::never: fail(name, entry, Failure::room, why_never(name, pages)); return Task{};  // so that others are told
      case Room::none_now:
        if (urgent) {
          blocked = entry.no_room = true;
        } else {  // it stays in host memory
          dequeue(name, entry);
          end_load(entry, {Failure::room, "no room on the device for a prefetch", 0, ""});
          tidy(name);
        }
    }
  }
  if (!garbage_.copies.empty()) return Task{};
  if (read && (!host_full_ || host_.held() == 0)) return start_read(*read, entries_.at(*read));
  return std::nullopt;
}

Task AdapterTable::start_read(const std::string& name, Entry& entry) {
  entry.work = Work::reading;
  ++counts_.reads;
  Task task;
  task.kind = Task::Kind::read;
  task.name = name;
  task.epoch = entry.epoch;
  task.copy = ++copies_;
  return task;
}

Task AdapterTable::start_place(const std::string& name, Entry& entry) {
  const HostCopy& copy = *host_.find(entry.copy);
  const uint64_t generation = ++generations_;
  Version& version = versions_[generation];
  version.name = name;
  version.digest = copy.digest;
  version.epoch = entry.epoch;
  version.slot = slots_.allocate(1)->front();
  version.pages = *pages_.allocate(copy.pages);
  entry.work = Work::placing;
  entry.placing = generation;
  entry.no_room = false;
  std::vector<HostTier::Gone> gone;
  host_.use(entry.copy, true, gone);
  dequeue(name, entry);
  settle(gone);
  Task task;
  task.kind = Task::Kind::place;
  task.name = name;
  task.epoch = entry.epoch;
  task.copy = entry.copy;
  task.generation = generation;
  task.slot = version.slot;
  task.pages = version.pages;
  return task;
}

AdapterTable::Room AdapterTable::make_room(const std::string& name, int32_t pages, bool urgent, Clock::time_point& wake) {
  if (!why_never(name, pages).empty()) return Room::never;
  int32_t slots_free = slots_.available(), pages_free = pages_.available();
  if (slots_free > 0 && pages_free >= pages) return Room::ready;
  struct Victim {
    int order;
    uint64_t last_used;
    uint64_t generation;
    bool operator<(const Victim& other) const { return std::tie(order, last_used) < std::tie(other.order, other.last_used); }
  };
  std::vector<Victim> victims;
  const auto now = Clock::now();
  for (const auto& [generation, version] : versions_) {
    if (!version.visible || !version.leases.empty()) continue;
    const Entry& owner = entries_.at(version.name);  // what nobody uses is there because it is current
    if (owner.unloading) continue;
    // The version that this load replaces goes anyway, so before others.
    if (version.name == name) {
      victims.push_back({0, version.last_used, generation});
      continue;
    }
    if (owner.pinned) continue;
    const bool reserved = version.reserved != Urgency::load && version.reserved_until > now;
    if (reserved && (!urgent || version.reserved == Urgency::demand)) {
      wake = std::min(wake, version.reserved_until);
      continue;
    }
    victims.push_back({reserved ? 2 : 1, version.last_used, generation});
  }
  std::sort(victims.begin(), victims.end());
  size_t going = 0;
  while (going < victims.size() && (slots_free < 1 || pages_free < pages)) {
    ++slots_free;
    pages_free += static_cast<int32_t>(versions_.at(victims[going++].generation).pages.size());
  }
  if (slots_free < 1 || pages_free < pages) return Room::none_now;
  for (size_t i = 0; i < going; ++i) demote(victims[i].generation);
  return Room::retiring;
}

// Nothing but pinned adapters and the pool's own size can keep an adapter out for ever: users leave.
std::string AdapterTable::why_never(const std::string& name, int32_t pages) const {
  int32_t pinned_slots = 0, pinned_pages = 0;
  for (const auto& [generation, version] : versions_) {
    if (version.name == name || !is_current(generation, version) || !entries_.at(version.name).pinned) continue;
    ++pinned_slots;
    pinned_pages += static_cast<int32_t>(version.pages.size());
  }
  const auto mib = [&](int32_t count) {
    return std::to_string(count) + " pages of " + std::to_string(limits_.page_bytes) + " bytes";
  };
  if (pages > limits_.pages)
    return "adapter '" + name + "' needs " + mib(pages) + " and device memory has " + std::to_string(limits_.pages) +
           ": raise device_bytes";
  if (pages > limits_.pages - pinned_pages)
    return "adapter '" + name + "' needs " + mib(pages) + " and pinned adapters hold " + std::to_string(pinned_pages) +
           " of " + std::to_string(limits_.pages) + ": unpin one or raise device_bytes";
  if (pinned_slots >= limits_.slots)
    return "adapter '" + name + "' needs a slot and pinned adapters hold all " + std::to_string(limits_.slots) +
           ": unpin one or raise slots";
  return "";
}

bool AdapterTable::read_done(const Task& task, int64_t bytes, int32_t pages, const std::string& digest) {
  std::lock_guard lock(mutex_);
  Entry& entry = entries_.at(task.name);
  entry.work = Work::none;
  bool kept = false;
  if (task.epoch == entry.epoch && queue_.contains(task.name) && !closed_) {
    HostCopy copy;
    copy.name = task.name;
    copy.digest = digest;
    copy.bytes = bytes;
    copy.pages = pages;
    std::vector<HostTier::Gone> gone;
    kept = host_.add(task.copy, std::move(copy), gone);
    if (kept) entry.copy = task.copy;
    host_full_ = !kept;
    settle(gone);
  }
  tidy(task.name);
  notify();
  return kept;
}

void AdapterTable::placed(const Task& task) {
  std::lock_guard lock(mutex_);
  Entry& entry = entries_.at(task.name);
  Version& version = versions_.at(task.generation);
  entry.work = Work::none;
  entry.placing = 0;
  std::vector<HostTier::Gone> gone;
  host_.on_device(task.copy, true);
  host_.use(task.copy, false, gone);
  host_full_ = false;
  version.visible = true;
  version.last_used = ++uses_;
  if (version.epoch == entry.epoch) {
    ++counts_.loads;
    version.reserved = entry.urgency;
    version.reserved_until = after(limits_.reserve_seconds);
    supersede(entry);
    entry.current = task.generation;
    entry.error.clear();
    end_load(entry, {Failure::none, "", task.generation, version.digest});
  } else {  // the folder has changed meanwhile, or the adapter was forgotten
    retire(task.generation);
  }
  settle(gone);
  tidy(task.name);
  notify();
}

void AdapterTable::failed(const Task& task, Failure failure, const std::string& error) {
  std::lock_guard lock(mutex_);
  Entry& entry = entries_.at(task.name);
  entry.work = Work::none;
  if (task.kind == Task::Kind::place) {
    entry.placing = 0;
    std::vector<HostTier::Gone> gone;
    host_.use(task.copy, false, gone);
    host_full_ = false;
    retire(task.generation);
    settle(gone);
  }
  if (task.epoch == entry.epoch && entry.load) fail(task.name, entry, failure, error);
  tidy(task.name);
  notify();
}

Garbage AdapterTable::take_garbage() {
  std::lock_guard lock(mutex_);
  return std::exchange(garbage_, {});
}

void AdapterTable::reclaimed(const std::vector<int32_t>& slots) {
  std::lock_guard lock(mutex_);
  for (int32_t slot : slots) {
    const auto pages = reclaiming_.find(slot);
    if (pages == reclaiming_.end()) throw std::logic_error("slot " + std::to_string(slot) + " was not given up");
    pages_.free(pages->second);
    slots_.free({slot});
    reclaiming_.erase(pages);
  }
  notify();
}

}  // namespace fastft::runtime
