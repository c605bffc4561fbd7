// Copies of adapters in host memory: which are kept under a cap of bytes. The copies themselves belong to the caller.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastft::runtime {

struct HostCopy {
  std::string name;
  std::string digest;
  int64_t bytes = 0;
  int32_t pages = 0;
  bool wanted = false;  // its load waits for room on the device: not evicted
  bool in_use = false;  // it is being copied to the device: neither evicted nor dropped
  bool on_device = false;
  bool dropped = false;  // drop it as soon as it is no longer in use
  uint64_t last_used = 0;
};

// Copies of what lies on the device go first, and of these the youngest, which stays there longest: so the tiers together
// hold as many adapters as they have room for. Then the least recently used go. One wanted copy may exceed the cap on its
// own, or a small cap would load nothing.
class HostTier {
 public:
  struct Gone {
    uint64_t id;
    std::string name;
  };

  explicit HostTier(int64_t cap) : cap_(cap) {}

  // Takes in a wanted copy. False, and no copy, where it fits only beside other wanted ones that it may not push out.
  bool add(uint64_t id, HostCopy copy, std::vector<Gone>& gone);
  const HostCopy* find(uint64_t id) const;
  void want(uint64_t id, bool wanted, std::vector<Gone>& gone);
  void use(uint64_t id, bool in_use, std::vector<Gone>& gone);
  void drop(uint64_t id, std::vector<Gone>& gone);
  void on_device(uint64_t id, bool there);

  int64_t cap() const { return cap_; }
  int64_t bytes() const { return bytes_; }
  int64_t held_bytes() const;  // of copies that can't be evicted
  int32_t held() const;
  size_t size() const { return copies_.size(); }
  int64_t evictions() const { return evictions_; }

 private:
  using Copies = std::unordered_map<uint64_t, HostCopy>;
  void erase(Copies::iterator copy, std::vector<Gone>& gone);
  void trim(std::vector<Gone>& gone);

  Copies copies_;
  int64_t cap_;
  int64_t bytes_ = 0;
  int64_t evictions_ = 0;
  uint64_t uses_ = 0;
};

}  // namespace fastft::runtime
