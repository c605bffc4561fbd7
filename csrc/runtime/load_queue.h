// The order in which adapters are loaded.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>

namespace fastft::runtime {

// Names, each once: those that somebody waits for come before those that somebody will need, else first come, first served.
class LoadQueue {
 public:
  using Place = std::pair<int, uint64_t>;  // (0 urgent, 1 not; arrival)
  using Order = std::map<Place, std::string>;

  // A name that waits already keeps its place, unless it becomes urgent: then it is the last of the urgent.
  void push(const std::string& name, bool urgent) {
    const auto known = places_.find(name);
    if (known != places_.end()) {
      if (!urgent || known->second.first == 0) return;
      order_.erase(known->second);
    }
    const Place place{urgent ? 0 : 1, ++arrivals_};
    order_.emplace(place, name);
    places_[name] = place;
  }

  bool erase(const std::string& name) {
    const auto known = places_.find(name);
    if (known == places_.end()) return false;
    order_.erase(known->second);
    places_.erase(known);
    return true;
  }

  bool contains(const std::string& name) const { return places_.contains(name); }
  bool urgent(const std::string& name) const { return contains(name) && places_.at(name).first == 0; }
  size_t size() const { return order_.size(); }
  const Order& order() const { return order_; }

 private:
  Order order_;
  std::unordered_map<std::string, Place> places_;
  uint64_t arrivals_ = 0;
};

}  // namespace fastft::runtime
