#include "apionly-domain/container.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace mvgpu::domain {

namespace {

std::string Describe(IovaRange range) {
  return fmt::format("iova {:#x}-{:#x}", range.start().value(), range.last().value());
}

Result<IovaRange> AlignedRange(Iova start, uint64_t size) {
  const auto range = IovaRange::FromStartAndSize(start, size);
  if (!range || !range->is_page_aligned()) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format(
            "iova {:#x} size {:#x} is not a non-empty range of whole {}-byte pages below 2^64",
            start.value(), size, kPageSize));
  }
  return *range;
}

}  // namespace

Container::~Container() { MVGPU_CHECK(domains_.empty()); }

Result<void> Container::map(MapRequest request) {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, AlignedRange(request.iova, request.size));
  if ((request.file_offset & kPageMask) != 0) {
    return Fail(ErrorCode::kInvalid, fmt::format("file offset {:#x} of {} is not page-aligned",
                                                 request.file_offset, Describe(range)));
  }
  MutexLock lock(mutex_);
  Mapping mapping{range, request.access, nullptr, request.file_offset};
  if (request.fd.is_valid()) {
    MVGPU_ASSIGN_OR_RETURN(mapping.file, FileOfLocked(std::move(request.fd)));
    const auto file_end = CheckedAdd(request.file_offset, request.size);
    if (!file_end || *file_end > mapping.file->size()) {
      return Fail(
          ErrorCode::kInvalid,
          fmt::format("{} needs {} bytes at offset {:#x} of a file of {} bytes", Describe(range),
                      request.size, request.file_offset, mapping.file->size()));
    }
    if (Allows(request.access, Access::kWrite) && !mapping.file->is_writable()) {
      return Fail(
          ErrorCode::kPermission,
          fmt::format("{} is to be writable, but its file was opened read-only", Describe(range)));
    }
  }
  if (const Mapping* other = FirstOverlapLocked(range)) {
    const bool same = other->iova == range && other->access == mapping.access &&
                      other->file == mapping.file && other->file_offset == mapping.file_offset;
    if (same) return {};
    return Fail(ErrorCode::kOverlap, fmt::format("{} overlaps the mapping of {}; unmap that first",
                                                 Describe(range), Describe(other->iova)));
  }
  if (mappings_.size() >= limits_.max_mappings) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{} mappings are the limit; {} does not fit, unmap another",
                            limits_.max_mappings, Describe(range)));
  }
  for (size_t i = 0; i < domains_.size(); ++i) {
    if (auto told = domains_[i]->on_map(mapping); !told) {
      for (size_t k = 0; k < i; ++k) domains_[k]->on_unmap_done(range, /*unmapped=*/true);
      return told;
    }
  }
  mappings_.emplace(range.start().value(), std::move(mapping));
  return {};
}

Result<uint64_t> Container::unmap(Iova start, uint64_t size) {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, AlignedRange(start, size));
  MutexLock lock(mutex_);
  return UnmapLocked(range);
}

Result<uint64_t> Container::unmap_all() {
  MutexLock lock(mutex_);
  return UnmapLocked(std::nullopt);
}

Result<uint64_t> Container::UnmapLocked(std::optional<IovaRange> range) {
  std::vector<IovaRange> doomed;
  uint64_t bytes = 0;
  for (const auto& [first, mapping] : mappings_) {
    if (range && !range->overlaps(mapping.iova)) {
      if (mapping.iova.start() > range->last()) break;
      continue;
    }
    if (range && !range->contains(mapping.iova)) {
      return Fail(ErrorCode::kWouldSplit,
                  fmt::format("unmap of {} would cut the mapping of {}; unmap it as a whole",
                              Describe(*range), Describe(mapping.iova)));
    }
    doomed.push_back(mapping.iova);
    bytes += mapping.iova.size();
  }
  if (auto told = RevokeLocked(doomed, domains_); !told) {
    return tl::unexpected<Error>(std::move(told).error());
  }
  for (const IovaRange& one : doomed) mappings_.erase(one.start().value());
  absl::erase_if(files_, [](const auto& entry) { return entry.second.expired(); });
  return bytes;
}

Result<void> Container::RevokeLocked(const std::vector<IovaRange>& ranges,
                                     const std::vector<Domain*>& domains) {
  Result<void> outcome;
  std::vector<std::pair<Domain*, IovaRange>> asked;
  for (Domain* domain : domains) {
    for (const IovaRange& range : ranges) {
      if (!outcome) break;
      outcome = domain->on_unmap(range);
      asked.emplace_back(domain, range);
    }
  }
  for (auto& [domain, range] : asked) domain->on_unmap_done(range, outcome.has_value());
  return outcome;
}

Result<void> Container::attach(Domain* domain) {
  MutexLock lock(mutex_);
  MVGPU_CHECK(std::find(domains_.begin(), domains_.end(), domain) == domains_.end());
  std::vector<IovaRange> told_ranges;
  for (const auto& [first, mapping] : mappings_) {
    if (auto told = domain->on_map(mapping); !told) {
      for (const IovaRange& range : told_ranges) domain->on_unmap_done(range, /*unmapped=*/true);
      return told;
    }
    told_ranges.push_back(mapping.iova);
  }
  domains_.push_back(domain);
  return {};
}

Result<void> Container::detach(Domain* domain) {
  MutexLock lock(mutex_);
  const auto position = std::find(domains_.begin(), domains_.end(), domain);
  MVGPU_CHECK(position != domains_.end());
  std::vector<IovaRange> all;
  for (const auto& [first, mapping] : mappings_) all.push_back(mapping.iova);
  MVGPU_RETURN_IF_ERROR(RevokeLocked(all, {domain}));
  domains_.erase(position);
  return {};
}

Container::Totals Container::totals() const {
  ReaderMutexLock lock(mutex_);
  Totals totals;
  totals.mappings = mappings_.size();
  totals.files = files_.size();
  for (const auto& [first, mapping] : mappings_) {
    totals.mapped_pages += mapping.pages();
    if (mapping.file) totals.reachable_pages += mapping.pages();
  }
  return totals;
}

std::vector<Mapping> Container::mappings() const {
  ReaderMutexLock lock(mutex_);
  std::vector<Mapping> all;
  for (const auto& [first, mapping] : mappings_) all.push_back(mapping);
  return all;
}

Result<std::shared_ptr<GuestFile>> Container::FileOfLocked(UniqueFd fd) {
  MVGPU_ASSIGN_OR_RETURN(const FileIdentity identity, GuestFile::IdentityOf(fd.get()));
  auto& known = files_[identity];
  if (auto file = known.lock()) return file;
  auto created = GuestFile::Create(std::move(fd));
  if (!created) {
    files_.erase(identity);
    return tl::unexpected<Error>(std::move(created).error());
  }
  std::shared_ptr<GuestFile> file = std::move(*created);
  known = file;
  return file;
}

const Mapping* Container::FirstOverlapLocked(IovaRange range) const {
  auto it = mappings_.upper_bound(range.last().value());
  if (it == mappings_.begin()) return nullptr;
  const Mapping& candidate = std::prev(it)->second;
  return candidate.iova.overlaps(range) ? &candidate : nullptr;
}

}  // namespace mvgpu::domain
