#include "adapter_table.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace fastft::runtime {

namespace {
constexpr const char* CLOSED = "the adapter memory was closed";
}

AdapterTable::AdapterTable(Limits limits)
    : limits_(limits), pages_(limits.pages), slots_(limits.slots), host_(limits.host_bytes) {
  if (limits.slots < 1 || limits.pages < 1 || limits.page_bytes < 1 || limits.host_bytes < 0)
    throw std::invalid_argument(
        "an adapter table needs at least one slot, one page and one byte a page, and no negative caps");
}

// ---- requests

std::variant<Lease, Miss> AdapterTable::acquire(const std::string& name, double waited) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(name);
  if (found == entries_.end()) return Miss::absent;
  Entry& entry = found->second;
  if (entry.unloading) return Miss::pending;
  if (entry.current) {
    Version& version = versions_.at(entry.current);
    version.leases.insert(++leases_);
    version.last_used = ++uses_;
    version.reserved = Urgency::load;
    ++counts_.hits;
    return Lease{leases_, entry.current, version.slot, name, version.digest};
  }
  if (entry.load) {
    entry.urgency = Urgency::demand;
    if (queue_.contains(name)) queue_.push(name, true);
    return Miss::pending;
  }
  return remembers_error(entry, waited) ? Miss::failed : Miss::absent;
}

void AdapterTable::release(const Lease& lease) {
  std::lock_guard lock(mutex_);
  const auto found = versions_.find(lease.generation);
  if (found == versions_.end() || !found->second.leases.erase(lease.id))
    throw std::invalid_argument("this lease of adapter '" + lease.name + "' (generation " +
                                std::to_string(lease.generation) + ") is not held: it was released before");
  found->second.last_used = ++uses_;
  if (!found->second.leases.empty()) return;
  if (!is_current(lease.generation, found->second)) retire(lease.generation);
  notify();
}

bool AdapterTable::holds(const Lease& lease) const {
  std::lock_guard lock(mutex_);
  const auto found = versions_.find(lease.generation);
  return found != versions_.end() && found->second.leases.contains(lease.id);
}

AdapterTable::Ticket AdapterTable::want(const std::string& name, Urgency urgency) {
  std::lock_guard lock(mutex_);
  return ask(name, urgency);
}

AdapterTable::Ticket AdapterTable::update(const std::string& name) {
  std::lock_guard lock(mutex_);
  Entry& entry = entries_[name];
  ++entry.epoch;
  drop_copy(entry);
  return ask(name, Urgency::load);
}

std::optional<Outcome> AdapterTable::wait(const Ticket& ticket, double seconds) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return ticket->ended; });
  return ticket->ended ? std::optional(ticket->outcome) : std::nullopt;
}

// ---- administration

void AdapterTable::start_unload(const std::string& name) {
  std::lock_guard lock(mutex_);
  Entry& entry = entries_[name];
  ++entry.unloading;
  queue_.erase(name);  // its host copy is held until the end, which counts it
  end_load(entry, {Failure::unloaded, "adapter '" + name + "' was unloaded while it was loading", 0, ""});
  notify();
}

std::optional<int64_t> AdapterTable::finish_unload(const std::string& name, double seconds) {
  std::unique_lock lock(mutex_);
  const auto unused = [&] {
    return entries_.at(name).work == Work::none && std::all_of(versions_.begin(), versions_.end(), [&](const auto& item) {
             return item.second.name != name || item.second.leases.empty();
           });
  };
  if (!changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return closed_ || unused(); }) || !unused())
    return std::nullopt;
  Entry& entry = entries_.at(name);
  int64_t bytes = 0;
  if (entry.current) {
    bytes += static_cast<int64_t>(versions_.at(entry.current).pages.size()) * limits_.page_bytes;
    supersede(entry);
  }
  if (entry.copy) bytes += host_.find(entry.copy)->bytes;
  drop_copy(entry);
  entry.pinned = false;
  entry.error.clear();
  --entry.unloading;
  tidy(name);
  notify();
  return bytes;
}

void AdapterTable::cancel_unload(const std::string& name) {
  std::lock_guard lock(mutex_);
  Entry& entry = entries_.at(name);
  --entry.unloading;
  if (!entry.unloading && entry.load && entry.current && versions_.at(entry.current).epoch == entry.epoch) {
    // Asked for meanwhile, and still here.
    dequeue(name, entry);
    end_load(entry, {Failure::none, "", entry.current, versions_.at(entry.current).digest});
  }
  if (entry.copy && !queue_.contains(name)) {
    std::vector<HostTier::Gone> gone;
    host_.want(entry.copy, false, gone);
    settle(gone);
  }
  tidy(name);
  notify();
}

void AdapterTable::forget(const std::string& name) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(name);
  if (found == entries_.end()) return;
  Entry& entry = found->second;
  ++entry.epoch;
  entry.pinned = false;
  entry.error.clear();
  dequeue(name, entry);
  end_load(entry, {Failure::unloaded, "adapter '" + name + "' was forgotten while it was loading", 0, ""});
  drop_copy(entry);
  supersede(entry);
  tidy(name);
  notify();
}

bool AdapterTable::evict(const std::string& name) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(name);
  if (found == entries_.end() || found->second.pinned || found->second.unloading || !found->second.current) return false;
  if (!versions_.at(found->second.current).leases.empty()) return false;
  demote(found->second.current);
  notify();
  return true;
}

void AdapterTable::pin(const std::string& name, bool pinned) {
  std::lock_guard lock(mutex_);
  entries_[name].pinned = pinned;
  tidy(name);
  notify();
}

void AdapterTable::close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  for (auto& [name, entry] : entries_) {
    dequeue(name, entry);
    end_load(entry, {Failure::closed, CLOSED, 0, ""});
  }
  notify();
}

// ---- steps that several methods share; the lock is held

AdapterTable::Ticket AdapterTable::ask(const std::string& name, Urgency urgency) {
  if (closed_) return ended({Failure::closed, CLOSED, 0, ""});
  Entry& entry = entries_[name];
  if (entry.current && !entry.unloading && !entry.load) {
    Version& version = versions_.at(entry.current);
    if (version.epoch == entry.epoch || urgency == Urgency::prefetch) {
      version.last_used = ++uses_;
      if (urgency == Urgency::prefetch) {
        version.reserved = urgency;
        version.reserved_until = after(limits_.reserve_seconds);
      }
      return ended({Failure::none, "", entry.current, version.digest});
    }
  }
  if (urgency == Urgency::prefetch && remembers_error(entry)) return ended({Failure::files, entry.error, 0, ""});
  entry.error.clear();
  if (!entry.load) {
    entry.load = std::make_shared<Load>();
    entry.urgency = urgency;
    counts_.misses += urgency != Urgency::prefetch;
    counts_.host_hits += entry.copy != 0;
  }
  entry.urgency = std::max(entry.urgency, urgency);
  const bool on_its_way = entry.work == Work::placing && versions_.at(entry.placing).epoch == entry.epoch;
  if (!on_its_way) {
    queue_.push(name, urgency != Urgency::prefetch);
    std::vector<HostTier::Gone> gone;
    if (entry.copy) host_.want(entry.copy, true, gone);
    settle(gone);
  }
  Ticket ticket = entry.load;
  work_.notify_all();
  return ticket;
}

void AdapterTable::end_load(Entry& entry, Outcome outcome) {
  if (!entry.load) return;
  entry.load->outcome = std::move(outcome);
  entry.load->ended = true;
  entry.load.reset();
  entry.no_room = false;
  entry.urgency = Urgency::prefetch;
}

void AdapterTable::fail(const std::string& name, Entry& entry, Failure failure, const std::string& error) {
  ++counts_.failures;
  dequeue(name, entry);
  end_load(entry, {failure, error, 0, ""});
  entry.error = error;
  entry.error_at = Clock::now();
  // Failures are remembered for a while: here the old ones end, so that their number stays bounded.
  std::vector<std::string> names;
  for (const auto& [other, its] : entries_)
    if (!its.error.empty()) names.push_back(other);
  for (const std::string& other : names) tidy(other);
  notify();
}

void AdapterTable::dequeue(const std::string& name, Entry& entry) {
  if (!queue_.erase(name) || !entry.copy) return;
  std::vector<HostTier::Gone> gone;
  host_.want(entry.copy, false, gone);
  host_full_ = false;
  settle(gone);
}

void AdapterTable::drop_copy(Entry& entry) {
  if (!entry.copy) return;
  std::vector<HostTier::Gone> gone;
  host_.drop(std::exchange(entry.copy, 0), gone);
  host_full_ = false;
  settle(gone);
}

// The current version is current no more: it goes now, or with its last user.
void AdapterTable::supersede(Entry& entry) {
  const uint64_t old = std::exchange(entry.current, 0);
  if (old && versions_.at(old).leases.empty()) retire(old);
}

void AdapterTable::demote(uint64_t generation) {
  const std::string name = versions_.at(generation).name;
  const Entry& entry = entries_.at(name);
  if (entry.copy) host_.on_device(entry.copy, false);
  ++counts_.evictions;
  retire(generation);
  tidy(name);
}

void AdapterTable::retire(uint64_t generation) {
  const auto found = versions_.find(generation);
  const auto owner = entries_.find(found->second.name);
  if (owner != entries_.end() && owner->second.current == generation) owner->second.current = 0;
  garbage_.slots.push_back(found->second.slot);
  reclaiming_[found->second.slot] = std::move(found->second.pages);
  versions_.erase(found);
}

void AdapterTable::settle(std::vector<HostTier::Gone>& gone) {
  for (const auto& [id, name] : gone) {
    garbage_.copies.push_back(id);
    const auto owner = entries_.find(name);
    if (owner == entries_.end() || owner->second.copy != id) continue;
    owner->second.copy = 0;
    tidy(name);
  }
  gone.clear();
}

// An adapter about which there is nothing to know has no entry, so that names asked for take no memory.
void AdapterTable::tidy(const std::string& name) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return;
  const Entry& entry = found->second;
  if (entry.current || entry.copy || entry.load || entry.work != Work::none || entry.pinned || entry.unloading) return;
  if (remembers_error(entry)) return;
  entries_.erase(found);
}

bool AdapterTable::remembers_error(const Entry& entry, double waited) const {
  const std::chrono::duration<double> limit(std::max(limits_.retry_seconds, waited));
  return !entry.error.empty() && Clock::now() - entry.error_at < limit;
}

bool AdapterTable::is_current(uint64_t generation, const Version& version) const {
  const auto owner = entries_.find(version.name);
  return owner != entries_.end() && owner->second.current == generation;
}

void AdapterTable::notify() {
  work_.notify_all();
  changed_.notify_all();
}

}  // namespace fastft::runtime
