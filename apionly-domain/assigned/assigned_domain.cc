#include "apionly-domain/assigned/assigned_domain.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace mvgpu::domain {

Result<std::unique_ptr<AssignedDomain>> AssignedDomain::Create(Options options,
                                                               AssignedSpace* space,
                                                               Ledger* ledger) {
  std::unique_ptr<LedgerRow> row;
  if (ledger != nullptr) {
    MVGPU_ASSIGN_OR_RETURN(
        row, ledger->join(DomainKind::kAssignedDevice, options.name, space->iommu_name()));
  }
  return std::unique_ptr<AssignedDomain>(
      new AssignedDomain(std::move(options), space, std::move(row)));
}

AssignedDomain::AssignedDomain(Options options, AssignedSpace* space,
                               std::unique_ptr<LedgerRow> row)
    : options_(std::move(options)), space_(space), charges_(std::move(row)) {}

AssignedDomain::~AssignedDomain() {
  MutexLock lock(mutex_);
  MVGPU_CHECK(mappings_.empty() && used_.empty() && handed_over_.empty());
}

// The charge comes first and goes last: at no instant does the kernel hold a page for us that is
// not accounted.
Result<void> AssignedDomain::on_map(const Mapping& mapping) {
  if (mapping.file == nullptr) return {};
  MVGPU_RETURN_IF_ERROR(charges_.hold(mapping));
  auto mapped =
      space_->map_at(mapping.iova, mapping.file->host_address(mapping.file_offset), mapping.access);
  if (!mapped) {
    charges_.release(mapping);
    return mapped;
  }
  locked_pages_ += mapping.pages();
  ShowLockedPages();
  return {};
}

void AssignedDomain::on_map_done(const Mapping& mapping, bool mapped) {
  if (mapping.file == nullptr) return;
  if (!mapped) {
    UnmapFromDevice(mapping);
    space_->flush();
    charges_.release(mapping);
    return;
  }
  {
    MutexLock lock(mutex_);
    mappings_.emplace(mapping.iova.start().value(), mapping);
  }
  HandOver(PagesOf(mapping.iova));
}

Result<void> AssignedDomain::on_unmap(const Unmapping& unmapping) {
  MVGPU_RETURN_IF_ERROR(BeginUnmap(unmapping.range));
  for (const Mapping& mapping : unmapping.mappings) {
    if (mapping.file != nullptr) MVGPU_RETURN_IF_ERROR(Isolate(mapping));
  }
  return {};
}

Result<void> AssignedDomain::BeginUnmap(IovaRange range) {
  MutexLock lock(mutex_);
  if (used_.any(PagesOf(range))) {
    return Fail(ErrorCode::kBusy,
                fmt::format("iova {:#x}-{:#x} cannot be unmapped from {}: a vgpu's device uses "
                            "its addresses",
                            range.start().value(), range.last().value(), options_.name));
  }
  going_ = range;
  return {};
}

Result<void> AssignedDomain::Isolate(const Mapping& mapping) {
  const IovaRange hull = space_->cut_hull(mapping.iova);
  MVGPU_RETURN_IF_ERROR(TakeBack(hull));
  const uint64_t shown = ShownPages(hull);
  const auto isolated = space_->isolate(mapping.iova);
  locked_pages_ -= shown - ShownPages(hull);
  ShowLockedPages();
  const PageRun cut = PagesOf(hull);
  const PageRun going = PagesOf(mapping.iova);
  HandOver({cut.first, going.first - cut.first});
  HandOver({going.end(), cut.end() - going.end()});
  return isolated;
}

void AssignedDomain::on_unmap_done(const Unmapping& unmapping, bool unmapped) {
  for (const Mapping& mapping : unmapping.mappings) {
    if (mapping.file == nullptr) continue;
    if (!unmapped) {
      HandOver(PagesOf(mapping.iova));
      continue;
    }
    UnmapFromDevice(mapping);
    MutexLock lock(mutex_);
    RemoveLocked(mapping.iova);
  }
  {
    MutexLock lock(mutex_);
    going_.reset();
  }
  if (!unmapped) return;
  space_->flush();
  for (const Mapping& mapping : unmapping.mappings) {
    if (mapping.file != nullptr) charges_.release(mapping);
  }
}

void AssignedDomain::UnmapFromDevice(const Mapping& mapping) {
  locked_pages_ -= ShownPages(mapping.iova);
  space_->unmap(mapping.iova);
  ShowLockedPages();
}

std::vector<Mapping> AssignedDomain::MappingsIn(PageRun pages) const {
  std::vector<Mapping> found;
  if (pages.count == 0) return found;
  const IovaRange range = RangeOf(pages);
  ReaderMutexLock lock(mutex_);
  auto it = mappings_.upper_bound(range.start().value());
  if (it != mappings_.begin()) --it;
  for (; it != mappings_.end() && it->second.iova.start() <= range.last(); ++it) {
    if (const auto part = it->second.iova.intersection(range)) {
      found.push_back(it->second.slice(*part));
    }
  }
  return found;
}

void AssignedDomain::HandOver(PageRun pages) {
  if (!hands_over()) return;
  for (const Mapping& mapping : MappingsIn(pages)) {
    for (const PageRun& shown : space_->shown_pages(mapping.iova)) {
      for (const PageRun& run : handed_over_.uncovered(shown)) {
        handed_over_.add(run);
        options_.device_pins->add(mapping.file->identity(),
                                  {PagesIn(mapping.offset_of(RangeOf(run).start())), run.count});
      }
    }
  }
}

Result<void> AssignedDomain::TakeBack(IovaRange range) {
  if (!hands_over()) return {};
  const PageRun pages = PagesOf(range);
  for (const Mapping& mapping : MappingsIn(pages)) {
    std::vector<PageRun> handed_over;
    handed_over_.for_each(PagesOf(mapping.iova),
                          [&handed_over](PageRun run) { handed_over.push_back(run); });
    for (const PageRun& run : handed_over) {
      auto taken = options_.device_pins->remove(
          mapping.file->identity(), {PagesIn(mapping.offset_of(RangeOf(run).start())), run.count});
      if (!taken) {
        HandOver(pages);
        return tl::unexpected<Error>(std::move(taken).error().in(
            fmt::format("iova {:#x}-{:#x} stays mapped for {}", RangeOf(run).start().value(),
                        RangeOf(run).last().value(), options_.name)));
      }
      handed_over_.remove(run);
    }
  }
  return {};
}

uint64_t AssignedDomain::ShownPages(IovaRange range) const {
  uint64_t pages = 0;
  for (const PageRun& run : space_->shown_pages(range)) pages += run.count;
  return pages;
}

void AssignedDomain::ShowLockedPages() {
  if (space_->holds_memory()) charges_.set_locked_pages(locked_pages_);
}

// Keeps the parts outside of the range of a mapping that it cuts.
void AssignedDomain::RemoveLocked(IovaRange range) {
  const auto found = std::prev(mappings_.upper_bound(range.start().value()));
  const Mapping whole = found->second;
  MVGPU_CHECK(whole.iova.contains(range));
  mappings_.erase(found);
  if (whole.iova.start() < range.start()) {
    const Iova last(range.start().value() - 1);
    mappings_.emplace(whole.iova.start().value(),
                      whole.slice(IovaRange::FromFirstAndLast(whole.iova.start(), last)));
  }
  if (range.last() < whole.iova.last()) {
    const Iova next = range.last() + 1;
    mappings_.emplace(next.value(),
                      whole.slice(IovaRange::FromFirstAndLast(next, whole.iova.last())));
  }
}

AssignedDomain::Found AssignedDomain::use(const PinnedRun& run, Access access) {
  MutexLock lock(mutex_);
  Found found = FindLocked(run, access);
  if (found.address) used_.add({found.address->page(), found.pages});
  return found;
}

// The VMM's own address of the page is the device's, if the device sees it at all.
AssignedDomain::Found AssignedDomain::FindLocked(const PinnedRun& run, Access access) const {
  const Found none{std::nullopt, run.iova_pages().count};
  if (going_ && going_->overlaps(run.iova)) return none;
  auto it = mappings_.upper_bound(run.iova.start().value());
  if (it != mappings_.begin() && std::prev(it)->second.iova.contains(run.iova.start())) {
    const Mapping& mapping = std::prev(it)->second;
    const IovaRange part = *mapping.iova.intersection(run.iova);
    const bool is_same = mapping.file->host_address(mapping.offset_of(part.start())) == run.host;
    const uint64_t pages = PagesIn(part.size());
    // Lost pages are no addresses either.
    if (is_same && Allows(mapping.access, access) && space_->shows(part, run.host)) {
      return {run.iova.start(), pages};
    }
    return {std::nullopt, pages};
  }
  if (it == mappings_.end() || !it->second.iova.overlaps(run.iova)) return none;
  return {std::nullopt, PagesIn(it->second.iova.start() - run.iova.start())};
}

void AssignedDomain::give_back(IovaRange addresses) {
  MutexLock lock(mutex_);
  used_.remove(PagesOf(addresses));
}

uint64_t AssignedDomain::used_pages() const {
  ReaderMutexLock lock(mutex_);
  return used_.total();
}

}  // namespace mvgpu::domain
