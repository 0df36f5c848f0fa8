// First pins and last releases: what changes which pages are held. All of it under the pin lock, so
// that one miss at a time decides who is first and who is last, and so that an unmap that has the
// pin lock sees every pin that got past its mark.

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::domain {

Result<void> ApiOnlyDomain::PinMiss(PinContext* context, IovaRange pages, Access access,
                                    PinCounts::Form form, PinnedRuns* runs) {
  const bool for_write = PinContext::IsForWrite(access);
  MutexLock lock(pin_mutex_);
  std::optional<PageDirectory::Stop> stop;
  scratch_.unheld.clear();
  {
    SpinLockHold hold(context->lock_);
    stop = directory_.walk(pages, static_cast<uint64_t>(access), [&](auto extent) {
      runs->push_back({extent.iova, extent.host});
    });
    context->CountsLocked(for_write).append_unheld(PagesOf(pages), &scratch_.unheld);
  }
  if (stop) return tl::unexpected<Error>(StopError(pages, *stop, access));
  // The context's lock is free during the system calls. What it holds cannot change meanwhile: that
  // takes the pin lock.
  MVGPU_RETURN_IF_ERROR(HoldLocked(UnheldLocked()));
  {
    SpinLockHold hold(context->lock_);
    context->CountsLocked(for_write).add(PagesOf(pages), form);
    context->CountPinLocked(PagesOf(pages).count);
  }
  PublishCountsLocked();
  return {};
}

void ApiOnlyDomain::ReleaseMiss(PinContext* context, PageRun run, bool for_write,
                                PinCounts::Form form) {
  MutexLock lock(pin_mutex_);
  scratch_.unheld.clear();
  {
    SpinLockHold hold(context->lock_);
    context->CountsLocked(for_write).remove(run, form, &scratch_.unheld);
    context->figures_.pinned_pages -= run.count;
  }
  // Pages that stay held for write are dirty by that; these are once more, after the release.
  if (for_write && dirty_.is_on()) {
    for (const PageRun& freed : scratch_.unheld) dirty_.mark(freed);
  }
  for (const FilePages& pages : UnheldLocked()) {
    LetGoLocked(pages);
    counters_.unique_pages -= pages.pages.count;
  }
  PublishCountsLocked();
  if (unmap_waits_) released_.notify_all();
}

void ApiOnlyDomain::SubtractHeldLocked(std::vector<PageRun>* runs) {
  for (PinContext* context : contexts_) {
    SpinLockHold hold(context->lock_);
    for (const PinCounts& counts : context->counts_) {
      if (counts.empty()) continue;
      scratch_.rest.clear();
      for (const PageRun& run : *runs) counts.append_unheld(run, &scratch_.rest);
      runs->swap(scratch_.rest);
    }
  }
}

std::span<const FilePages> ApiOnlyDomain::UnheldLocked() {
  SubtractHeldLocked(&scratch_.unheld);
  scratch_.parts.clear();
  for (PageRun rest : scratch_.unheld) {
    while (rest.count != 0) {
      // Mapped: a pin has just looked, or a pin that is being released kept the mapping.
      const PageDirectory::Found found = directory_.find(Iova(BytesIn(rest.first)));
      const FilePages pages = files_.at(found.host, std::min(rest.count, PagesIn(found.left)));
      AppendUnaliasedLocked(pages, &scratch_.parts);
      rest = {rest.first + pages.pages.count, rest.count - pages.pages.count};
    }
  }
  return scratch_.parts;
}

void ApiOnlyDomain::AppendUnaliasedLocked(const FilePages& pages, std::vector<FilePages>* parts) {
  const auto append = [parts](const FilePages& part) {
    if (!parts->empty() && parts->back().file == part.file &&
        parts->back().pages.end() == part.pages.first) {
      parts->back().pages.count += part.pages.count;
    } else {
      parts->push_back(part);
    }
  };
  const std::vector<MappedFiles::View> views = files_.aliases(pages);
  if (views.empty()) return append(pages);
  RunCounter held;
  for (const FilePages& part : *parts) {  // the same page at another IOVA of the same request
    if (part.file == pages.file) held.add(part.pages);
  }
  for (const MappedFiles::View& view : views) {
    std::vector<PageRun> unheld{view.iova};
    SubtractHeldLocked(&unheld);
    RunCounter held_here;
    held_here.add({view.file_page, view.iova.count});
    for (const PageRun& run : unheld) {
      held_here.clear({view.file_page + (run.first - view.iova.first), run.count});
    }
    held_here.for_each(pages.pages, [&held](PageRun run) { held.add(run); });
  }
  for (const PageRun& run : held.uncovered(pages.pages)) append({pages.file, run});
}

Result<void> ApiOnlyDomain::HoldLocked(std::span<const FilePages> fresh) {
  uint64_t wanted = 0;
  for (const FilePages& part : fresh) wanted += part.pages.count;
  if (wanted > options_.pin_limit_pages - counters_.unique_pages) {
    return Fail(
        ErrorCode::kLimit,
        fmt::format("{}: {} of at most {} pages are pinned, {} more do not fit; raise --pin-limit "
                    "to at least {}K",
                    options_.name, counters_.unique_pages, options_.pin_limit_pages, wanted,
                    BytesIn(counters_.unique_pages + wanted) / 1024));
  }
  for (size_t i = 0; i < fresh.size(); ++i) {
    if (auto held = HoldOneLocked(fresh[i]); !held) {
      while (i > 0) LetGoLocked(fresh[--i]);
      return held;
    }
  }
  counters_.unique_pages += wanted;
  counters_.peak_unique_pages = std::max(counters_.peak_unique_pages, counters_.unique_pages);
  counters_.pages_locked_first += wanted;
  return {};
}

Result<void> ApiOnlyDomain::HoldOneLocked(const FilePages& fresh) {
  MVGPU_RETURN_IF_ERROR(backend_->pin(*fresh.file, fresh.pages));
  if (ledger_row_ == nullptr) return {};
  auto charged = ledger_row_->hold(fresh.file->identity(), fresh.file->pages(), fresh.pages);
  if (!charged) {
    backend_->unpin(*fresh.file, fresh.pages);
    return charged;
  }
  if (const uint32_t granule = backend_->granule_pages(*fresh.file); granule > granule_pages_) {
    granule_pages_ = granule;
    ledger_row_->set_granule_pages(granule);
  }
  return {};
}

void ApiOnlyDomain::LetGoLocked(const FilePages& pages) {
  // The charge goes last: at no instant is a page held by the kernel for us without being
  // accounted.
  backend_->unpin(*pages.file, pages.pages);
  if (ledger_row_ != nullptr) ledger_row_->release(pages.file->identity(), pages.pages);
}

}  // namespace mvgpu::domain
