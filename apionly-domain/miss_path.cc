// First pins and last releases: what changes which pages are held. All of it under the pin lock, so
// that one miss at a time decides who is first and who is last, and so that an unmap that has the
// pin lock sees every pin that got past its mark.
//
// Inline is what lies between a miss and its system calls: after each of these the processor
// mispredicts the return of every frame around it.

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::domain {

void ApiOnlyDomain::SubtractHeld(const PinCounts& counts, std::vector<PageRun>* runs,
                                 std::vector<PageRun>* scratch) {
  if (counts.empty() || runs->empty()) return;
  scratch->clear();
  for (const PageRun& run : *runs) counts.append_unheld(run, scratch);
  runs->swap(*scratch);
}

void ApiOnlyDomain::SubtractHeldLocked(std::vector<PageRun>* runs, const PinContext* except) {
  for (PinContext* context : contexts_) {
    if (context == except) continue;
    SpinLockHold hold(context->lock_);
    for (const PinCounts& counts : context->counts_) SubtractHeld(counts, runs, &scratch_.rest);
  }
}

std::span<const FilePages> ApiOnlyDomain::FilePagesLocked(std::span<const PageRun> runs) {
  scratch_.parts.clear();
  for (PageRun rest : runs) {
    while (rest.count != 0) {
      // Mapped: a pin has just looked, or a pin that is being released kept the mapping.
      const PageDirectory::Found found = directory_.find(Iova(BytesIn(rest.first)));
      const FilePages pages = files_.at(found.host, std::min(rest.count, PagesIn(found.left)));
      if (files_.has_aliases(*pages.file)) {
        AppendUnaliasedLocked(pages, &scratch_.parts);
      } else {
        AppendPages(pages, &scratch_.parts);
      }
      rest = {rest.first + pages.pages.count, rest.count - pages.pages.count};
    }
  }
  return scratch_.parts;
}

void ApiOnlyDomain::AppendPages(const FilePages& pages, std::vector<FilePages>* parts) {
  if (!parts->empty() && parts->back().file == pages.file &&
      parts->back().pages.end() == pages.pages.first) {
    parts->back().pages.count += pages.pages.count;
  } else {
    parts->push_back(pages);
  }
}

void ApiOnlyDomain::AppendUnaliasedLocked(const FilePages& pages, std::vector<FilePages>* parts) {
  RunCounter held;
  for (const FilePages& part : *parts) {  // the same page at another IOVA of the same request
    if (part.file == pages.file) held.add(part.pages);
  }
  for (const MappedFiles::View& view : files_.aliases(pages)) {
    std::vector<PageRun> unheld{view.iova};
    SubtractHeldLocked(&unheld, /*except=*/nullptr);
    RunCounter held_here;
    held_here.add({view.file_page, view.iova.count});
    for (const PageRun& run : unheld) {
      held_here.clear({view.file_page + (run.first - view.iova.first), run.count});
    }
    held_here.for_each(pages.pages, [&held](PageRun run) { held.add(run); });
  }
  for (const PageRun& run : held.uncovered(pages.pages)) AppendPages({pages.file, run}, parts);
}

[[gnu::always_inline]] inline Result<void> ApiOnlyDomain::LockLocked(const FilePages& pages) {
  if (device_held_.empty()) [[likely]]
    return backend_->pin(*pages.file, pages.pages);
  return LockRestLocked(pages);
}

[[gnu::always_inline]] inline void ApiOnlyDomain::UnlockLocked(const FilePages& pages) {
  if (device_held_.empty()) [[likely]]
    return backend_->unpin(*pages.file, pages.pages);
  for (const PageRun& run : NotDeviceHeldLocked(pages)) backend_->unpin(*pages.file, run);
}

[[gnu::always_inline]] inline void ApiOnlyDomain::LetGoLocked(const FilePages& pages) {
  // The charge goes last: at no instant is a page held by the kernel for us without being
  // accounted.
  UnlockLocked(pages);
  if (ledger_row_ != nullptr) ledger_row_->release(pages.file->identity(), pages.pages);
}

[[gnu::always_inline]] inline Result<void> ApiOnlyDomain::HoldOneLocked(const FilePages& fresh) {
  MVGPU_RETURN_IF_ERROR(LockLocked(fresh));
  if (ledger_row_ == nullptr) return {};
  return ChargeLocked(fresh);
}

Result<void> ApiOnlyDomain::ChargeLocked(const FilePages& fresh) {
  auto charged = ledger_row_->hold(fresh.file->identity(), fresh.file->pages(), fresh.pages);
  if (!charged) {
    UnlockLocked(fresh);
    return charged;
  }
  if (const uint32_t granule = backend_->granule_pages(*fresh.file); granule > granule_pages_) {
    granule_pages_ = granule;
    ledger_row_->set_granule_pages(granule);
  }
  return {};
}

[[gnu::always_inline]] inline Result<void> ApiOnlyDomain::HoldLocked(
    std::span<const FilePages> fresh) {
  uint64_t wanted = 0;
  for (const FilePages& part : fresh) wanted += part.pages.count;
  if (wanted > options_.pin_limit_pages - counters_.unique_pages)
    return PinLimitErrorLocked(wanted);
  for (size_t i = 0; i < fresh.size(); ++i) {
    if (auto held = HoldOneLocked(fresh[i]); !held) [[unlikely]] {
      while (i > 0) LetGoLocked(fresh[--i]);
      return held;
    }
  }
  counters_.unique_pages += wanted;
  counters_.peak_unique_pages = std::max(counters_.peak_unique_pages, counters_.unique_pages);
  counters_.pages_locked_first += wanted;
  return {};
}

tl::unexpected<Error> ApiOnlyDomain::PinLimitErrorLocked(uint64_t wanted) const {
  return Fail(
      ErrorCode::kLimit,
      fmt::format("{}: {} of at most {} pages are pinned, {} more do not fit; raise --pin-limit "
                  "to at least {}K",
                  options_.name, counters_.unique_pages, options_.pin_limit_pages, wanted,
                  BytesIn(counters_.unique_pages + wanted) / 1024));
}

Result<void> ApiOnlyDomain::PinMiss(PinContext* context, std::span<const PageRun> pages,
                                    Access access, PinCounts::Form form, PinnedRuns* runs) {
  const bool for_write = PinContext::IsForWrite(access);
  MutexLock lock(pin_mutex_);
  std::optional<PageDirectory::Stop> stop;
  PageRun stopped;
  scratch_.unheld.assign(pages.begin(), pages.end());
  {
    SpinLockHold hold(context->lock_);
    for (const PageRun& run : pages) {
      stop = directory_.walk(RangeOf(run), static_cast<uint64_t>(access), [&](auto extent) {
        runs->push_back({extent.iova, extent.host});
      });
      stopped = run;
      if (stop) break;
    }
    for (const PinCounts& counts : context->counts_) {
      SubtractHeld(counts, &scratch_.unheld, &scratch_.rest);
    }
  }
  if (stop) return tl::unexpected<Error>(StopError(RangeOf(stopped), *stop, access));
  // The context's lock is free during the system calls. What it holds cannot change meanwhile: that
  // takes the pin lock.
  SubtractHeldLocked(&scratch_.unheld, context);
  MVGPU_RETURN_IF_ERROR(HoldLocked(FilePagesLocked(scratch_.unheld)));
  {
    SpinLockHold hold(context->lock_);
    uint64_t count = 0;
    for (const PageRun& run : pages) {
      context->CountsLocked(for_write).add(run, form);
      count += run.count;
    }
    context->CountPinLocked(count);
  }
  if (ledger_row_ != nullptr) PublishCountsLocked();
  return {};
}

void ApiOnlyDomain::ReleaseMiss(PinContext* context, std::span<const PageRun> runs, bool for_write,
                                PinCounts::Form form) {
  MutexLock lock(pin_mutex_);
  std::vector<PageRun>& unheld = scratch_.unheld;
  // Pages that stay held for write are dirty by that; these are once more, after the release.
  const bool is_logged = for_write && dirty_.is_on();
  unheld.clear();
  {
    SpinLockHold hold(context->lock_);
    for (const PageRun& run : runs) {
      context->CountsLocked(for_write).remove(run, form, &unheld);
      context->figures_.pinned_pages -= run.count;
    }
    if (is_logged) scratch_.written = unheld;
    SubtractHeld(context->CountsLocked(!for_write), &unheld, &scratch_.rest);
  }
  if (is_logged) {
    for (const PageRun& written : scratch_.written) dirty_.mark(written);
  }
  SubtractHeldLocked(&unheld, context);
  for (const FilePages& pages : FilePagesLocked(unheld)) {
    counters_.unique_pages -= pages.pages.count;
    LetGoLocked(pages);
  }
  if (ledger_row_ != nullptr) PublishCountsLocked();
  if (unmap_waits_) released_.notify_all();
}

}  // namespace mvgpu::domain
