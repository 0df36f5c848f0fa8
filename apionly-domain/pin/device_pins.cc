#include "apionly-domain/pin/device_pins.h"

#include <utility>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

DevicePins::~DevicePins() {
  MutexLock lock(mutex_);
  MVGPU_CHECK(held_.empty() && sharers_.empty());
}

void DevicePins::join(Sharer* sharer) {
  MutexLock lock(mutex_);
  sharers_.push_back(sharer);
  for (const auto& held : held_) {
    held.second.for_each({0, UINT64_MAX},
                         [&](PageRun run) { sharer->on_device_holds(held.first, run); });
  }
}

void DevicePins::leave(Sharer* sharer) {
  MutexLock lock(mutex_);
  std::erase(sharers_, sharer);
}

void DevicePins::add(const FileIdentity& file, PageRun pages) {
  MutexLock lock(mutex_);
  RunCounter& held = held_[file];
  const Runs fresh = held.uncovered(pages);
  held.add(pages);
  for (Sharer* sharer : sharers_) {
    for (const PageRun& run : fresh) sharer->on_device_holds(file, run);
  }
}

Result<void> DevicePins::remove(const FileIdentity& file, PageRun pages) {
  MutexLock lock(mutex_);
  const auto held = held_.find(file);
  MVGPU_CHECK(held != held_.end());
  const Runs last = held->second.remove(pages);
  if (auto told = TellLeavingLocked(file, last); !told) {
    held->second.add(pages);
    return told;
  }
  if (held->second.empty()) held_.erase(held);
  return {};
}

Result<void> DevicePins::TellLeavingLocked(const FileIdentity& file, const Runs& runs) {
  std::vector<std::pair<Sharer*, PageRun>> told;
  for (Sharer* sharer : sharers_) {
    for (const PageRun& run : runs) {
      if (auto done = sharer->on_device_leaves(file, run); !done) {
        for (const auto& [before, kept] : told) before->on_device_holds(file, kept);
        return done;
      }
      told.emplace_back(sharer, run);
    }
  }
  return {};
}

uint64_t DevicePins::unique_pages() const {
  ReaderMutexLock lock(mutex_);
  uint64_t pages = 0;
  for (const auto& [file, held] : held_) pages += held.unique_pages();
  return pages;
}

}  // namespace mvgpu::domain
