// Pages that a mapping of an assigned device holds in this process: the pin back end does not lock
// them too. All of it under the pin lock, so that a pin sees either side of a hand-over.

#include <fmt/format.h>

#include <utility>

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::domain {

// A granule that the back end had to lock stays as long as some of its pages are ours alone.
void ApiOnlyDomain::on_device_holds(const FileIdentity& identity, PageRun pages) {
  MutexLock lock(pin_mutex_);
  device_held_[identity].add(pages);
  const GuestFile* const file = files_.find(identity);
  if (file == nullptr) return;
  for (const PageRun& run : PinnedRunsLocked({file, pages})) backend_->unpin(*file, run);
  if (ledger_row_ != nullptr) PublishCountsLocked();
}

Result<void> ApiOnlyDomain::on_device_leaves(const FileIdentity& identity, PageRun pages) {
  MutexLock lock(pin_mutex_);
  if (const GuestFile* const file = files_.find(identity); file != nullptr) {
    const std::vector<PageRun> pinned = PinnedRunsLocked({file, pages});
    if (auto locked = LockRunsLocked(*file, pinned); !locked) {
      return tl::unexpected<Error>(std::move(locked).error().in(
          fmt::format("{} has file pages {}-{} pinned, which only a device's mapping holds",
                      options_.name, pinned.front().first, pinned.back().end() - 1)));
    }
    if (ledger_row_ != nullptr) PublishCountsLocked();
  }
  const auto held = device_held_.find(identity);
  MVGPU_CHECK(held != device_held_.end());
  held->second.remove(pages);
  if (held->second.empty()) device_held_.erase(held);
  return {};
}

Result<void> ApiOnlyDomain::LockRestLocked(const FilePages& pages) {
  return LockRunsLocked(*pages.file, NotDeviceHeldLocked(pages));
}

Result<void> ApiOnlyDomain::LockRunsLocked(const GuestFile& file, std::span<const PageRun> runs) {
  for (size_t i = 0; i < runs.size(); ++i) {
    if (auto locked = backend_->pin(file, runs[i]); !locked) {
      while (i > 0) backend_->unpin(file, runs[--i]);
      return locked;
    }
  }
  return {};
}

std::vector<PageRun> ApiOnlyDomain::NotDeviceHeldLocked(const FilePages& pages) const {
  const auto held = device_held_.find(pages.file->identity());
  if (held == device_held_.end()) return {pages.pages};
  return held->second.uncovered(pages.pages);
}

std::vector<PageRun> ApiOnlyDomain::PinnedRunsLocked(const FilePages& pages) const {
  RunCounter pinned;  // by page of the file
  std::vector<PageRun> held;
  for (const MappedFiles::View& view : files_.views(pages)) {
    held.clear();
    for (PinContext* context : contexts_) {
      SpinLockHold hold(context->lock_);
      for (const PinCounts& counts : context->counts_) counts.append_held(view.iova, &held);
    }
    for (const PageRun& run : held) {
      pinned.add({view.file_page + (run.first - view.iova.first), run.count});
    }
  }
  std::vector<PageRun> runs;
  pinned.for_each(pages.pages, [&runs](PageRun run) {
    if (!runs.empty() && runs.back().end() == run.first) {
      runs.back().count += run.count;
    } else {
      runs.push_back(run);
    }
  });
  return runs;
}

}  // namespace mvgpu::domain
