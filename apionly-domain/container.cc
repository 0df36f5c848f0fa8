#include "apionly-domain/container.h"

#include <absl/container/flat_hash_set.h>
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

// REQUIRES: not empty.
template <typename Mappings>
Unmapping AllOf(const Mappings& mappings) {
  return {IovaRange::FromFirstAndLast(mappings.front().iova.start(), mappings.back().iova.last()),
          mappings};
}

// Makes the domains let go of the mappings; either all did, or all go on as if nothing had been
// asked.
Result<void> Revoke(const Unmapping& unmapping, std::span<Domain* const> domains) {
  Result<void> outcome;
  size_t asked = 0;
  for (; asked < domains.size() && outcome; ++asked) outcome = domains[asked]->on_unmap(unmapping);
  for (Domain* domain : domains.first(asked)) domain->on_unmap_done(unmapping, outcome.has_value());
  return outcome;
}

}  // namespace

Container::~Container() { MVGPU_CHECK(domains_.empty()); }

Result<void> Container::map(MapRequest request) {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, AlignedRange(request.iova, request.size));
  MutexLock change(change_mutex_);
  MVGPU_ASSIGN_OR_RETURN(Mapping mapping, MappingFor(std::move(request), range));
  MVGPU_ASSIGN_OR_RETURN(const bool is_new, CheckNew(mapping));
  if (!is_new) return {};
  Result<void> outcome;
  size_t told = 0;
  for (; told < domains_.size() && outcome; ++told) outcome = domains_[told]->on_map(mapping);
  if (!outcome) --told;  // the one that refused has nothing to take back
  for (Domain* domain : std::span(domains_).first(told)) {
    domain->on_map_done(mapping, outcome.has_value());
  }
  if (outcome) AddToTable(std::move(mapping));
  return outcome;
}

Result<Mapping> Container::MappingFor(MapRequest request, IovaRange range) {
  Mapping mapping{range, request.access, nullptr, request.file_offset};
  if (!request.fd.is_valid()) return mapping;
  if ((request.file_offset & kPageMask) != 0) {
    return Fail(ErrorCode::kInvalid, fmt::format("file offset {:#x} of {} is not page-aligned",
                                                 request.file_offset, Describe(range)));
  }
  MVGPU_ASSIGN_OR_RETURN(mapping.file, FileOf(std::move(request.fd)));
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
  return mapping;
}

Result<bool> Container::CheckNew(const Mapping& mapping) const {
  ReaderMutexLock lock(table_mutex_);
  const auto next = mappings_.upper_bound(mapping.iova.last().value());
  if (next != mappings_.begin()) {
    const Mapping& other = std::prev(next)->second;
    if (other.iova == mapping.iova && other.access == mapping.access &&
        other.file == mapping.file && other.file_offset == mapping.file_offset) {
      return false;
    }
    if (other.iova.overlaps(mapping.iova)) {
      return Fail(ErrorCode::kOverlap,
                  fmt::format("{} overlaps the mapping of {}; unmap that first",
                              Describe(mapping.iova), Describe(other.iova)));
    }
  }
  const bool merges = NeighboursLocked(mapping, next) > 0;
  if ((!merges && totals_.merged_mappings >= limits_.max_mappings) ||
      totals_.mappings >= limits_.max_pieces) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{} mappings in {} pieces are there, {} and {} are the limits; {} does "
                            "not fit, unmap another",
                            totals_.merged_mappings, totals_.mappings, limits_.max_mappings,
                            limits_.max_pieces, Describe(mapping.iova)));
  }
  if (mapping.file != nullptr &&
      mapping.pages() > PagesIn(limits_.max_mapped_bytes) - totals_.reachable_pages) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{} bytes are mapped and {} is the limit; {} does not fit",
                            BytesIn(totals_.reachable_pages), limits_.max_mapped_bytes,
                            Describe(mapping.iova)));
  }
  return true;
}

Result<uint64_t> Container::unmap(Iova start, uint64_t size, Cut cut) {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, AlignedRange(start, size));
  MutexLock change(change_mutex_);
  MVGPU_ASSIGN_OR_RETURN(const Mappings going, MappingsIn(range, cut));
  return Unmap(going);
}

Result<uint64_t> Container::unmap_all() {
  MutexLock change(change_mutex_);
  const auto everything = IovaRange::FromFirstAndLast(Iova(0), Iova(UINT64_MAX));
  MVGPU_ASSIGN_OR_RETURN(const Mappings going, MappingsIn(everything, Cut::kRefuse));
  return Unmap(going);
}

Result<Container::Mappings> Container::MappingsIn(IovaRange range, Cut cut) const {
  ReaderMutexLock lock(table_mutex_);
  Mappings found;
  uint64_t new_pieces = 0;
  auto it = mappings_.upper_bound(range.start().value());
  if (it != mappings_.begin()) --it;
  for (; it != mappings_.end() && it->second.iova.start() <= range.last(); ++it) {
    const Mapping& mapping = it->second;
    const auto part = mapping.iova.intersection(range);
    if (!part) continue;
    if (*part != mapping.iova && cut == Cut::kRefuse) {
      return Fail(ErrorCode::kWouldSplit,
                  fmt::format("unmap of {} would cut the mapping of {}; unmap it as a whole",
                              Describe(range), Describe(mapping.iova)));
    }
    if (part->start() > mapping.iova.start() && part->last() < mapping.iova.last()) ++new_pieces;
    found.push_back(*part == mapping.iova ? mapping : mapping.slice(*part));
  }
  if (new_pieces != 0 &&
      (totals_.merged_mappings >= limits_.max_mappings || totals_.mappings >= limits_.max_pieces)) {
    return Fail(ErrorCode::kLimit,
                fmt::format("unmap of {} would split a mapping, and {} are there already",
                            Describe(range), totals_.merged_mappings));
  }
  return found;
}

Result<uint64_t> Container::Unmap(const Mappings& going) {
  if (going.empty()) return 0;
  MVGPU_RETURN_IF_ERROR(Revoke(AllOf(going), domains_));
  uint64_t bytes = 0;
  for (const Mapping& mapping : going) {
    RemoveFromTable(mapping);
    bytes += mapping.iova.size();
  }
  return bytes;
}

void Container::AddToTable(Mapping mapping) {
  MutexLock lock(table_mutex_);
  const uint64_t first = mapping.iova.start().value();
  const auto next = mappings_.upper_bound(first);
  totals_.merged_mappings += 1 - NeighboursLocked(mapping, next);
  totals_.mappings += 1;
  totals_.mapped_pages += mapping.pages();
  if (mapping.file != nullptr) totals_.reachable_pages += mapping.pages();
  mappings_.emplace_hint(next, first, std::move(mapping));
}

void Container::RemoveFromTable(const Mapping& going) {
  MutexLock lock(table_mutex_);
  const auto it = std::prev(mappings_.upper_bound(going.iova.start().value()));
  const Mapping whole = std::move(it->second);
  auto next = mappings_.erase(it);
  totals_.mappings -= 1;
  totals_.merged_mappings -= 1 - NeighboursLocked(whole, next);
  totals_.mapped_pages -= going.pages();
  if (going.file != nullptr) totals_.reachable_pages -= going.pages();
  // From the end on, so that `next` stays the mapping behind.
  const auto keep = [&](Iova first, Iova last) ABSL_EXCLUSIVE_LOCKS_REQUIRED(table_mutex_) {
    const Mapping part = whole.slice(IovaRange::FromFirstAndLast(first, last));
    totals_.mappings += 1;
    totals_.merged_mappings += 1 - NeighboursLocked(part, next);
    next = mappings_.emplace_hint(next, first.value(), part);
  };
  if (going.iova.last() < whole.iova.last()) keep(going.iova.last() + 1, whole.iova.last());
  if (whole.iova.start() < going.iova.start()) {
    keep(whole.iova.start(), Iova(going.iova.start().value() - 1));
  }
}

uint64_t Container::NeighboursLocked(const Mapping& mapping,
                                     MappingTable::const_iterator next) const {
  uint64_t neighbours = 0;
  if (next != mappings_.end() && mapping.continues_in(next->second)) ++neighbours;
  if (next != mappings_.begin() && std::prev(next)->second.continues_in(mapping)) ++neighbours;
  return neighbours;
}

Result<void> Container::attach(Domain* domain) {
  MutexLock change(change_mutex_);
  MVGPU_CHECK(std::find(domains_.begin(), domains_.end(), domain) == domains_.end());
  const std::vector<Mapping> all = mappings();
  Result<void> outcome;
  size_t told = 0;
  for (; told < all.size() && outcome; ++told) outcome = domain->on_map(all[told]);
  if (!outcome) --told;
  for (const Mapping& mapping : std::span(all).first(told)) {
    domain->on_map_done(mapping, outcome.has_value());
  }
  if (outcome) {
    const auto behind = std::find_if(domains_.begin(), domains_.end(), [domain](Domain* other) {
      return other->is_relied_on() && !domain->is_relied_on();
    });
    domains_.insert(behind, domain);
  }
  return outcome;
}

Result<void> Container::detach(Domain* domain) {
  MutexLock change(change_mutex_);
  const auto position = std::find(domains_.begin(), domains_.end(), domain);
  MVGPU_CHECK(position != domains_.end());
  const std::vector<Mapping> all = mappings();
  if (!all.empty()) MVGPU_RETURN_IF_ERROR(Revoke(AllOf(all), {&domain, 1}));
  domains_.erase(position);
  return {};
}

Container::Totals Container::totals() const {
  ReaderMutexLock lock(table_mutex_);
  Totals totals = totals_;
  absl::flat_hash_set<const GuestFile*> files;
  for (const auto& [first, mapping] : mappings_) {
    if (mapping.file != nullptr) files.insert(mapping.file.get());
  }
  totals.files = files.size();
  return totals;
}

std::vector<Mapping> Container::mappings() const {
  ReaderMutexLock lock(table_mutex_);
  std::vector<Mapping> all;
  for (const auto& [first, mapping] : mappings_) all.push_back(mapping);
  return all;
}

std::optional<IovaRange> Container::mapping_at(Iova iova) const {
  ReaderMutexLock lock(table_mutex_);
  const auto next = mappings_.upper_bound(iova.value());
  if (next == mappings_.begin()) return std::nullopt;
  const IovaRange range = std::prev(next)->second.iova;
  return range.contains(iova) ? std::optional(range) : std::nullopt;
}

Result<std::shared_ptr<GuestFile>> Container::FileOf(UniqueFd fd) {
  MVGPU_ASSIGN_OR_RETURN(const struct stat status, GuestFile::Inspect(fd.get()));
  const FileIdentity identity = GuestFile::IdentityOf(status);
  const auto known = files_.find(identity);
  if (known != files_.end()) {
    if (auto file = known->second.lock()) return file;
  }
  MVGPU_ASSIGN_OR_RETURN(auto created, GuestFile::Create(std::move(fd), status));
  absl::erase_if(files_, [](const auto& entry) { return entry.second.expired(); });
  std::shared_ptr<GuestFile> file = std::move(created);
  files_[identity] = file;
  if (!file->is_sealed_against_shrinking()) ++unsealed_files_seen_;
  return file;
}

}  // namespace mvgpu::domain
