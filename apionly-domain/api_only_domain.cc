#include "apionly-domain/api_only_domain.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace mvgpu::domain {

namespace {

std::string_view AccessName(Access access) {
  switch (access) {
    case Access::kRead:
      return "read";
    case Access::kWrite:
      return "write";
    case Access::kReadWrite:
      return "read-write";
  }
  return "no";
}

PageRun PagesOf(IovaRange range) {
  const IovaRange pages = range.page_expanded();
  return {pages.start().page(), PagesIn(pages.size())};
}

}  // namespace

Result<std::unique_ptr<ApiOnlyDomain>> ApiOnlyDomain::Create(Options options,
                                                             std::unique_ptr<PinBackend> backend,
                                                             Ledger* ledger,
                                                             AccessObserver* observer) {
  std::unique_ptr<ApiOnlyDomain> domain(
      new ApiOnlyDomain(std::move(options), std::move(backend), observer));
  if (ledger != nullptr) {
    MVGPU_ASSIGN_OR_RETURN(
        domain->ledger_row_,
        ledger->join(DomainKind::kApiOnly, domain->options_.name, domain->backend_name_));
  }
  return domain;
}

ApiOnlyDomain::ApiOnlyDomain(Options options, std::unique_ptr<PinBackend> backend,
                             AccessObserver* observer)
    : options_(std::move(options)),
      observer_(observer),
      backend_name_(backend->name()),
      backend_(std::move(backend)) {}

ApiOnlyDomain::~ApiOnlyDomain() {
  MVGPU_CHECK(pins_by_owner_.empty());
  MVGPU_CHECK(pins_by_file_.empty());
  MVGPU_CHECK(mappings_.empty());
}

template <typename Visit>
Result<void> ApiOnlyDomain::WalkLocked(IovaRange range, Access access, Visit visit) const {
  Iova at = range.start();
  while (true) {
    auto it = mappings_.upper_bound(at.value());
    if (it == mappings_.begin() || !std::prev(it)->second.iova.contains(at)) {
      return Fail(
          ErrorCode::kNotMapped,
          fmt::format("{}: iova {:#x} (of {:#x}-{:#x}) is not mapped by the vmm", options_.name,
                      at.value(), range.start().value(), range.last().value()));
    }
    const Mapping& mapping = std::prev(it)->second;
    if (!Allows(mapping.access, access)) {
      return Fail(ErrorCode::kPermission,
                  fmt::format("{}: {} access to iova {:#x}, which is mapped {}", options_.name,
                              AccessName(access), at.value(), AccessName(mapping.access)));
    }
    if (mapping.file == nullptr) {
      return Fail(ErrorCode::kNotReachable,
                  fmt::format("{}: iova {:#x} is mapped without a file; give the vm shared memory",
                              options_.name, at.value()));
    }
    const Iova last = std::min(range.last(), mapping.iova.last());
    MVGPU_RETURN_IF_ERROR(visit(mapping, IovaRange::FromFirstAndLast(at, last)));
    if (last == range.last()) return {};
    at = last + 1;
  }
}

Result<void> ApiOnlyDomain::check(IovaRange range, Access access) const {
  ReaderMutexLock lock(mutex_);
  return WalkLocked(range, access, [](const Mapping&, IovaRange) { return Result<void>(); });
}

Result<PinnedRange> ApiOnlyDomain::pin(IovaRange range, Access access, PinOwner* owner) {
  const IovaRange pages = range.page_expanded();
  MutexLock lock(mutex_);
  for (const IovaRange& going : revoking_) {
    if (going.overlaps(pages)) {
      return Fail(ErrorCode::kBusy,
                  fmt::format("{}: iova {:#x}-{:#x} is being unmapped by the vmm", options_.name,
                              going.start().value(), going.last().value()));
    }
  }
  std::vector<PinnedRun> runs;
  MVGPU_RETURN_IF_ERROR(WalkLocked(pages, access, [&runs](const Mapping& mapping, IovaRange part) {
    const uint64_t offset = mapping.offset_of(part.start());
    if (!runs.empty() && runs.back().file == mapping.file &&
        runs.back().file_offset + runs.back().iova.size() == offset) {
      runs.back().iova = IovaRange::FromFirstAndLast(runs.back().iova.start(), part.last());
    } else {
      runs.push_back({part, mapping.file, offset});
    }
    return Result<void>();
  }));
  for (size_t i = 0; i < runs.size(); ++i) {
    if (auto pinned = PinRunLocked(runs[i]); !pinned) {
      while (i > 0) UnpinRunLocked(runs[--i]);
      return tl::unexpected<Error>(std::move(pinned).error());
    }
  }
  pins_by_owner_[owner].add(PagesOf(pages));
  ++counters_.pin_calls;
  counters_.pinned_pages += PagesIn(pages.size());
  counters_.pages_pinned += PagesIn(pages.size());
  PublishCountsLocked();
  return PinnedRange(this, owner, std::move(runs));
}

Result<void> ApiOnlyDomain::PinRunLocked(const PinnedRun& run) {
  FilePins& pins = pins_by_file_[run.file->identity()];
  if (pins.file == nullptr) pins.file = run.file;
  const std::vector<PageRun> fresh = pins.pages.uncovered(run.file_pages());
  auto outcome = HoldLocked(*pins.file, fresh);
  if (outcome) {
    pins.pages.add(run.file_pages());
  } else if (pins.pages.empty()) {
    pins_by_file_.erase(run.file->identity());
  }
  return outcome;
}

Result<void> ApiOnlyDomain::HoldLocked(const GuestFile& file, const std::vector<PageRun>& fresh) {
  uint64_t wanted = 0;
  for (const PageRun& run : fresh) wanted += run.count;
  if (wanted > options_.pin_limit_pages - counters_.unique_pages) {
    return Fail(
        ErrorCode::kLimit,
        fmt::format("{}: {} of at most {} pages are pinned, {} more do not fit; raise --pin-limit "
                    "to at least {}K",
                    options_.name, counters_.unique_pages, options_.pin_limit_pages, wanted,
                    BytesIn(counters_.unique_pages + wanted) / 1024));
  }
  Result<void> outcome;
  size_t done = 0;
  for (; done < fresh.size() && outcome; ++done) {
    outcome = backend_->pin(file, fresh[done]);
    if (outcome && ledger_row_ != nullptr) {
      outcome = ledger_row_->hold(file.identity(), file.pages(), fresh[done]);
      if (!outcome) backend_->unpin(file, fresh[done]);
    }
  }
  if (!outcome) {
    for (--done; done > 0; --done) LetGoLocked(file, fresh[done - 1]);
    return outcome;
  }
  if (const uint32_t granule = backend_->granule_pages(file);
      ledger_row_ != nullptr && granule > granule_pages_) {
    granule_pages_ = granule;
    ledger_row_->set_granule_pages(granule);
  }
  counters_.unique_pages += wanted;
  counters_.peak_unique_pages = std::max(counters_.peak_unique_pages, counters_.unique_pages);
  counters_.pages_locked_first += wanted;
  return {};
}

void ApiOnlyDomain::LetGoLocked(const GuestFile& file, PageRun pages) {
  // The charge goes last: at no instant is a page held by the kernel for us without being
  // accounted.
  backend_->unpin(file, pages);
  if (ledger_row_ != nullptr) ledger_row_->release(file.identity(), pages);
}

void ApiOnlyDomain::UnpinRunLocked(const PinnedRun& run) {
  const auto pins = pins_by_file_.find(run.file->identity());
  MVGPU_CHECK(pins != pins_by_file_.end());
  for (const PageRun& free : pins->second.pages.remove(run.file_pages())) {
    LetGoLocked(*pins->second.file, free);
    counters_.unique_pages -= free.count;
  }
  if (pins->second.pages.empty()) pins_by_file_.erase(pins);
}

void ApiOnlyDomain::release(std::span<const PinnedRun> runs, PinOwner* owner) {
  MutexLock lock(mutex_);
  const auto held = pins_by_owner_.find(owner);
  MVGPU_CHECK(held != pins_by_owner_.end());
  for (const PinnedRun& run : runs) {
    UnpinRunLocked(run);
    held->second.remove(run.iova_pages());
    counters_.pinned_pages -= PagesIn(run.iova.size());
  }
  if (held->second.empty()) pins_by_owner_.erase(held);
  PublishCountsLocked();
}

void ApiOnlyDomain::PublishCountsLocked() {
  counters_.locked_pages = backend_->locked_pages();
  if (ledger_row_ == nullptr) return;
  ledger_row_->set_mapped_pages(counters_.mapped_pages);
  ledger_row_->set_pinned_pages(counters_.pinned_pages);
  ledger_row_->set_locked_pages(counters_.locked_pages);
}

Result<void> ApiOnlyDomain::read(Iova iova, std::span<std::byte> destination) const {
  const auto range = IovaRange::FromStartAndSize(iova, destination.size());
  if (!range) return CopyRangeError(iova, destination.size());
  {
    ReaderMutexLock lock(mutex_);
    MVGPU_RETURN_IF_ERROR(
        WalkLocked(*range, Access::kRead, [&](const Mapping& mapping, IovaRange part) {
          return mapping.file->read(mapping.offset_of(part.start()),
                                    destination.subspan(part.start() - iova, part.size()));
        }));
  }
  if (observer_ != nullptr) observer_->on_guest_read(iova, destination);
  return {};
}

Result<void> ApiOnlyDomain::write(Iova iova, std::span<const std::byte> source) {
  const auto range = IovaRange::FromStartAndSize(iova, source.size());
  if (!range) return CopyRangeError(iova, source.size());
  ReaderMutexLock lock(mutex_);
  // Two walks, so that nothing is written when a later part of the range turns out to be closed.
  MVGPU_RETURN_IF_ERROR(
      WalkLocked(*range, Access::kWrite, [](const Mapping&, IovaRange) { return Result<void>(); }));
  return WalkLocked(*range, Access::kWrite, [&](const Mapping& mapping, IovaRange part) {
    return mapping.file->write(mapping.offset_of(part.start()),
                               source.subspan(part.start() - iova, part.size()));
  });
}

tl::unexpected<Error> ApiOnlyDomain::CopyRangeError(Iova iova, uint64_t size) const {
  return Fail(ErrorCode::kInvalid, fmt::format("{}: {} bytes at iova {:#x} are no range below 2^64",
                                               options_.name, size, iova.value()));
}

Result<void> ApiOnlyDomain::read_pinned(const PinnedRun& run, Iova iova,
                                        std::span<std::byte> destination) const {
  MVGPU_DCHECK(run.iova.contains(iova) && destination.size() <= run.iova.last() - iova + 1);
  MVGPU_RETURN_IF_ERROR(run.file->read(run.file_offset + (iova - run.iova.start()), destination));
  if (observer_ != nullptr) observer_->on_guest_read(iova, destination);
  return {};
}

Result<void> ApiOnlyDomain::publish(Iova iova, std::span<const std::byte> source) {
  std::atomic_thread_fence(std::memory_order_release);
  return write(iova, source);
}

ApiOnlyDomain::Counters ApiOnlyDomain::counters() const {
  ReaderMutexLock lock(mutex_);
  Counters counters = counters_;
  if (ledger_row_ != nullptr) {
    counters.charged_pages = ledger_row_->counts().charged_pages;
  }
  return counters;
}

Result<void> ApiOnlyDomain::on_map(const Mapping& mapping) {
  MutexLock lock(mutex_);
  mappings_.emplace(mapping.iova.start().value(), mapping);
  if (mapping.file != nullptr) counters_.mapped_pages += mapping.pages();
  PublishCountsLocked();
  return {};
}

Result<void> ApiOnlyDomain::on_unmap(IovaRange range) {
  std::vector<PinOwner*> holders;
  {
    MutexLock lock(mutex_);
    revoking_.push_back(range);
    holders = HoldersLocked(range);
    counters_.revocations += holders.size();
  }
  for (PinOwner* holder : holders) holder->on_revoke(range);
  if (holders.empty()) return {};

  ReaderMutexLock lock(mutex_);
  holders = HoldersLocked(range);
  if (holders.empty()) return {};
  std::string names;
  for (const PinOwner* holder : holders) {
    names += names.empty() ? "" : ", ";
    names += holder->pin_owner_name();
  }
  return Fail(ErrorCode::kBusy,
              fmt::format("{}: iova {:#x}-{:#x} stays mapped, it is still held by {}",
                          options_.name, range.start().value(), range.last().value(), names));
}

void ApiOnlyDomain::on_unmap_done(IovaRange range, bool unmapped) {
  MutexLock lock(mutex_);
  if (auto it = std::find(revoking_.begin(), revoking_.end(), range); it != revoking_.end()) {
    revoking_.erase(it);
  }
  if (!unmapped) return;
  auto it = mappings_.lower_bound(range.start().value());
  while (it != mappings_.end() && range.contains(it->second.iova)) {
    if (it->second.file != nullptr) counters_.mapped_pages -= it->second.pages();
    it = mappings_.erase(it);
  }
  PublishCountsLocked();
}

std::vector<PinOwner*> ApiOnlyDomain::HoldersLocked(IovaRange range) const {
  std::vector<PinOwner*> holders;
  for (const auto& [owner, pages] : pins_by_owner_) {
    if (pages.any(PagesOf(range))) holders.push_back(owner);
  }
  return holders;
}

}  // namespace mvgpu::domain
