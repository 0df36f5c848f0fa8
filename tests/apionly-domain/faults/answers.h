#pragma once

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "apionly-domain/faults/page_request.h"

namespace mvgpu::testing {

// A device that remembers what it was answered, by the groups' tags.
class Answers final : public domain::FaultSource {
 public:
  void on_answer(const domain::FaultGroup& group, domain::FaultAnswer answer) override {
    std::lock_guard lock(mutex_);
    by_tag_[group.tag].push_back(answer);
    last_ = group;
  }
  std::vector<domain::FaultAnswer> of(uint64_t tag) const {
    std::lock_guard lock(mutex_);
    const auto found = by_tag_.find(tag);
    return found == by_tag_.end() ? std::vector<domain::FaultAnswer>() : found->second;
  }
  // How many groups have had an answer, and whether any had two.
  size_t size() const {
    std::lock_guard lock(mutex_);
    return by_tag_.size();
  }
  bool any_twice() const {
    std::lock_guard lock(mutex_);
    for (const auto& [tag, answers] : by_tag_) {
      if (answers.size() > 1) return true;
    }
    return false;
  }
  domain::FaultGroup last() const {
    std::lock_guard lock(mutex_);
    return last_;
  }

 private:
  mutable std::mutex mutex_;
  std::map<uint64_t, std::vector<domain::FaultAnswer>> by_tag_;
  domain::FaultGroup last_;
};

// A group that asks to write consecutive pages.
inline domain::FaultGroup MakeGroup(uint64_t tag, size_t pages = 1, uint64_t address = 0x1000,
                                    uint32_t device = 7) {
  domain::FaultGroup group;
  group.device = device;
  group.id = static_cast<uint32_t>(tag % 512);
  group.tag = tag;
  for (size_t i = 0; i < pages; ++i) {
    group.requests.push_back({domain::kFaultWrite, address + i * 0x1000});
  }
  return group;
}

}  // namespace mvgpu::testing
