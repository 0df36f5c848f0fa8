#include "apionly-domain/pin/area_pin_backend.h"

#include <algorithm>
#include <iterator>

#include "apionly-domain/base/check.h"

namespace mvgpu::domain {

AreaPinBackend::FileAreas& AreaPinBackend::EntryOf(const GuestFile& file) {
  if (last_used_ != nullptr && last_used_->identity == file.identity()) return *last_used_;
  auto known = files_.find(file.identity());
  if (known == files_.end()) {
    if (files_.size() >= kKeptFiles) {
      absl::erase_if(files_, [](const auto& entry) { return entry.second->pinned_pages == 0; });
    }
    known = files_.emplace(file.identity(), std::make_unique<FileAreas>(file.identity())).first;
  }
  last_used_ = known->second.get();
  return *last_used_;
}

// Inline: after a system call the processor mispredicts the return of every frame around it.
[[gnu::always_inline]] inline Result<uint64_t> AreaPinBackend::PinSome(const GuestFile& file,
                                                                       FileAreas& entry,
                                                                       PageRun pages) {
  const auto next = entry.areas.upper_bound(pages.first);
  uint64_t count = 0;
  if (next != entry.areas.begin() && RunOf(*std::prev(next)).end() > pages.first) {
    Areas::value_type& area = *std::prev(next);
    count = std::min(RunOf(area).end(), pages.end()) - pages.first;
    MVGPU_RETURN_IF_ERROR(Reuse(file, area, {pages.first, count}));
    area.second.pinned_pages += count;
    MVGPU_DCHECK(area.second.pinned_pages <= area.second.pages);
  } else {
    const uint64_t end =
        next == entry.areas.end() ? pages.end() : std::min(pages.end(), next->first);
    MVGPU_ASSIGN_OR_RETURN(count, Cover(file, entry.areas, next, {pages.first, end - pages.first}));
  }
  entry.pinned_pages += count;
  return count;
}

Result<void> AreaPinBackend::pin(const GuestFile& file, PageRun pages) {
  FileAreas& entry = EntryOf(file);
  if (entry.pinned_pages == 0) {
    entry.file_pages = file.pages();
    total_file_pages_ += entry.file_pages;
  }
  for (uint64_t at = pages.first; at < pages.end();) {
    auto done = PinSome(file, entry, {at, pages.end() - at});
    if (!done) {
      for (uint64_t back = pages.first; back < at;)
        back += UnpinSome(file, entry, {back, at - back});
      ForgetIfUnused(file, entry);
      return tl::unexpected<Error>(std::move(done).error());
    }
    at += *done;
  }
  return {};
}

void AreaPinBackend::unpin(const GuestFile& file, PageRun pages) {
  FileAreas& entry = EntryOf(file);
  for (uint64_t at = pages.first; at < pages.end();)
    at += UnpinSome(file, entry, {at, pages.end() - at});
  ForgetIfUnused(file, entry);
}

uint64_t AreaPinBackend::UnpinSome(const GuestFile& file, FileAreas& entry, PageRun pages) {
  auto area = entry.areas.upper_bound(pages.first);
  MVGPU_CHECK(area != entry.areas.begin());
  --area;
  const PageRun whole = RunOf(*area);
  MVGPU_CHECK(whole.end() > pages.first);
  const PageRun part{pages.first, std::min(whole.end(), pages.end()) - pages.first};
  MVGPU_CHECK(area->second.pinned_pages >= part.count);
  entry.pinned_pages -= part.count;
  if (part != whole && area->second.is_full() && Cut(file, entry.areas, area, part))
    return part.count;
  area->second.pinned_pages -= part.count;
  if (area->second.pinned_pages == 0) Release(file, entry.areas, area);
  return part.count;
}

void AreaPinBackend::ForgetIfUnused(const GuestFile& file, FileAreas& entry) {
  if (entry.pinned_pages != 0) return;
  total_file_pages_ -= entry.file_pages;
  if (entry.areas.empty()) return;
  ReleaseRefused(file, entry.areas);
  for (auto area = entry.areas.begin(); area != entry.areas.end();)
    area = RemoveArea(entry.areas, area);
}

AreaPinBackend::Areas::iterator AreaPinBackend::AddArea(Areas& areas, Areas::iterator hint,
                                                        uint64_t first, Area area) {
  locked_pages_ += area.pages;
  ++area_count_;
  return areas.emplace_hint(hint, first, area);
}

AreaPinBackend::Areas::iterator AreaPinBackend::RemoveArea(Areas& areas, Areas::iterator area) {
  locked_pages_ -= area->second.pages;
  --area_count_;
  return areas.erase(area);
}

void AreaPinBackend::GrowArea(Areas::iterator area, uint64_t pages) {
  area->second.pages += pages;
  area->second.pinned_pages += pages;
  locked_pages_ += pages;
}

void AreaPinBackend::SplitArea(Areas& areas, Areas::iterator area, PageRun part, uint32_t left_tag,
                               uint32_t right_tag) {
  const PageRun whole = RunOf(*area);
  const uint64_t left = part.first - whole.first;
  const uint64_t right = whole.end() - part.end();
  auto next = RemoveArea(areas, area);
  if (right > 0) next = AddArea(areas, next, part.end(), {right, right, right_tag});
  if (left > 0) AddArea(areas, next, whole.first, {left, left, left_tag});
}

}  // namespace mvgpu::domain
