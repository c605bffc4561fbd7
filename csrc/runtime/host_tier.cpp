#include "host_tier.h"

#include <utility>

namespace fastft::runtime {

bool HostTier::add(uint64_t id, HostCopy copy, std::vector<Gone>& gone) {
  if (held() > 0 && held_bytes() + copy.bytes > cap_) return false;
  bytes_ += copy.bytes;
  copy.wanted = true;
  copy.last_used = ++uses_;
  copies_.emplace(id, std::move(copy));
  trim(gone);
  return true;
}

const HostCopy* HostTier::find(uint64_t id) const {
  const auto copy = copies_.find(id);
  return copy == copies_.end() ? nullptr : &copy->second;
}

void HostTier::want(uint64_t id, bool wanted, std::vector<Gone>& gone) {
  HostCopy& copy = copies_.at(id);
  copy.wanted = wanted;
  copy.last_used = ++uses_;
  trim(gone);
}

void HostTier::use(uint64_t id, bool in_use, std::vector<Gone>& gone) {
  const auto copy = copies_.find(id);
  copy->second.in_use = in_use;
  copy->second.last_used = ++uses_;
  if (!in_use && copy->second.dropped) erase(copy, gone);
  trim(gone);
}

void HostTier::drop(uint64_t id, std::vector<Gone>& gone) {
  const auto copy = copies_.find(id);
  copy->second.wanted = false;
  copy->second.dropped = true;
  if (!copy->second.in_use) erase(copy, gone);
}

int64_t HostTier::held_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, copy] : copies_) bytes += copy.wanted || copy.in_use ? copy.bytes : 0;
  return bytes;
}

int32_t HostTier::held() const {
  int32_t count = 0;
  for (const auto& [id, copy] : copies_) count += copy.wanted || copy.in_use;
  return count;
}

void HostTier::erase(Copies::iterator copy, std::vector<Gone>& gone) {
  bytes_ -= copy->second.bytes;
  gone.push_back({copy->first, copy->second.name});
  copies_.erase(copy);
}

void HostTier::on_device(uint64_t id, bool there) {
  HostCopy& copy = copies_.at(id);
  copy.on_device = there;
  copy.last_used = ++uses_;
}

void HostTier::trim(std::vector<Gone>& gone) {
  const auto sooner = [](const HostCopy& a, const HostCopy& b) {
    if (a.on_device != b.on_device) return a.on_device;
    return a.on_device ? a.last_used > b.last_used : a.last_used < b.last_used;
  };
  while (bytes_ > cap_) {
    auto first = copies_.end();
    for (auto copy = copies_.begin(); copy != copies_.end(); ++copy) {
      if (copy->second.wanted || copy->second.in_use) continue;
      if (first == copies_.end() || sooner(copy->second, first->second)) first = copy;
    }
    if (first == copies_.end()) return;
    ++evictions_;
    erase(first, gone);
  }
}

}  // namespace fastft::runtime
