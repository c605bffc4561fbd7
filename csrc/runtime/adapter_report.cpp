// What the table tells, and whether its books are right.
#include "adapter_table.h"

#include <set>
#include <stdexcept>

namespace fastft::runtime {

State AdapterTable::state(const std::string& name) const {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(name);
  if (found == entries_.end()) return State::on_disk;
  const Entry& entry = found->second;
  if (entry.unloading) return State::draining;
  if (entry.current) return State::on_device;
  if (entry.load) return State::loading;
  return entry.copy ? State::in_host : State::on_disk;
}

bool AdapterTable::waits_for_room(const std::string& name) const {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(name);
  return found != entries_.end() && found->second.no_room;
}

std::optional<std::string> AdapterTable::error(const std::string& name, double waited) const {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(name);
  if (found == entries_.end() || !remembers_error(found->second, waited)) return std::nullopt;
  return found->second.error;
}

std::vector<Resident> AdapterTable::residents() const {
  std::lock_guard lock(mutex_);
  std::vector<Resident> all;
  for (const auto& [generation, version] : versions_) {
    const auto owner = entries_.find(version.name);
    const bool current = is_current(generation, version);
    const bool leaving = version.visible && (!current || owner->second.unloading);
    Resident one;
    one.name = version.name;
    one.digest = version.digest;
    one.state = leaving ? State::draining : version.visible ? State::on_device : State::loading;
    one.generation = generation;
    one.slot = version.slot;
    one.bytes = static_cast<int64_t>(version.pages.size()) * limits_.page_bytes;
    one.leases = static_cast<int64_t>(version.leases.size());
    one.pinned = current && owner->second.pinned;
    all.push_back(std::move(one));
  }
  return all;
}

Stats AdapterTable::stats() const {
  std::lock_guard lock(mutex_);
  Stats stats = counts_;
  stats.slots = limits_.slots;
  stats.slots_used = limits_.slots - slots_.available();
  stats.pages = limits_.pages;
  stats.pages_used = limits_.pages - pages_.available();
  stats.page_bytes = limits_.page_bytes;
  stats.host_bytes = host_.bytes();
  stats.host_cap = host_.cap();
  stats.host_copies = static_cast<int64_t>(host_.size());
  stats.host_evictions = host_.evictions();
  for (const auto& [generation, version] : versions_) stats.leases += static_cast<int64_t>(version.leases.size());
  stats.queued = static_cast<int64_t>(queue_.size());
  stats.known = static_cast<int64_t>(entries_.size());
  return stats;
}

void AdapterTable::check() const {
  std::lock_guard lock(mutex_);
  const auto require = [](bool right, const std::string& what) {
    if (!right) throw std::logic_error("adapter table: " + what);
  };
  std::set<int32_t> pages, slots;
  size_t owned = 0;
  const auto own = [&](int32_t slot, const std::vector<int32_t>& its) {
    require(slots.insert(slot).second, "two versions in slot " + std::to_string(slot));
    pages.insert(its.begin(), its.end());
    owned += its.size();
  };
  for (const auto& [slot, its] : reclaiming_) own(slot, its);
  for (const auto& [generation, version] : versions_) {
    own(version.slot, version.pages);
    const auto owner = entries_.find(version.name);
    const bool placing = owner != entries_.end() && owner->second.placing == generation;
    require(placing == !version.visible, "generation " + std::to_string(generation) + " is neither there nor on its way");
    require(placing || is_current(generation, version) || !version.leases.empty(),
            "generation " + std::to_string(generation) + " is of no use to anybody");
  }
  require(pages.size() == owned, "a page has two owners");
  require(static_cast<int32_t>(owned) + pages_.available() == pages_.capacity(), "pages are lost");
  require(static_cast<int32_t>(slots.size()) + slots_.available() == slots_.capacity(), "slots are lost");
  size_t copies = 0, queued = 0;
  for (const auto& [name, entry] : entries_) {
    const bool working = entry.work != Work::none;
    if (entry.current) {
      const auto current = versions_.find(entry.current);
      require(current != versions_.end() && current->second.visible && current->second.name == name,
              "the current version of " + name + " is not there");
    }
    if (entry.copy) {
      ++copies;
      const HostCopy* copy = host_.find(entry.copy);
      require(copy && copy->name == name && !copy->dropped, "the host copy of " + name + " is not there");
    }
    queued += queue_.contains(name);
    require(!queue_.contains(name) || entry.load, name + " is queued and nobody asked for it");
    require(!entry.load || queue_.contains(name) || working, name + " was asked for and nobody loads it");
    require(entry.current || entry.copy || entry.load || working || entry.pinned || entry.unloading || !entry.error.empty(),
            "nothing is to be known about " + name);
  }
  require(queued == queue_.size(), "the queue holds unknown names");
  require(host_.size() >= copies && host_.size() <= copies + versions_.size(), "host copies without an owner");
  require(host_.bytes() <= host_.cap() || host_.held() == static_cast<int32_t>(host_.size()),
          "host memory is above its cap");
}

}  // namespace fastft::runtime
