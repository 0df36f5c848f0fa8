// Words in guest memory that guest and host change under each other's eyes: page table entries.

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/base/check.h"
#include "apionly-domain/memory/guarded_copy.h"

namespace mvgpu::domain {

inline bool ApiOnlyDomain::TryLoadWords(Iova iova, std::span<uint64_t> words) const {
  if (words.empty()) return false;
  AccessSlots::Section section(slots_);
  const PageDirectory::Found found = directory_.find(iova);
  if (!PageDirectory::IsUsable(found.flags, static_cast<uint64_t>(Access::kRead))) return false;
  // Does not wrap: it ends in the page in which it begins.
  section.begin_copy(IovaRange::FromFirstAndLast(iova, iova + (words.size_bytes() - 1)));
  return LoadWordsGuarded(words, found.host);
}

// First the way without anything unusual: a walk of page tables is loads that wait for each other,
// and what lies between two of them adds up.
Result<void> ApiOnlyDomain::load_words(Iova iova, std::span<uint64_t> words) const {
  MVGPU_DCHECK(iova.value() % sizeof(uint64_t) == 0 &&
               iova.offset_in_page() + words.size_bytes() <= kPageSize);
  if (!TryLoadWords(iova, words)) [[unlikely]]
    return LoadWordsSlowly(iova, words);
  if (observer_ != nullptr) observer_->on_guest_read(iova, std::as_bytes(words));
  return {};
}

// Without a file, or an error.
Result<void> ApiOnlyDomain::LoadWordsSlowly(Iova iova, std::span<uint64_t> words) const {
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, CopyRange(iova, words.size_bytes()));
  {
    AccessSlots::Section section(slots_);
    // Mappings are whole pages: there is one piece.
    MVGPU_ASSIGN_OR_RETURN(const Pieces pieces, PiecesOf(range, Access::kRead));
    std::byte* host = pieces.front().host;
    section.begin_copy(range);
    if (host == nullptr) {
      MVGPU_RETURN_IF_ERROR(ReadPiece({range, nullptr}, std::as_writable_bytes(words)));
    } else if (!LoadWordsGuarded(words, host)) {
      return tl::unexpected<Error>(TruncatedError(iova, words.size_bytes()));
    }
  }
  if (observer_ != nullptr) observer_->on_guest_read(iova, std::as_bytes(words));
  return {};
}

Result<uint64_t> ApiOnlyDomain::compare_exchange(Iova iova, uint64_t expected, uint64_t desired) {
  MVGPU_DCHECK(iova.value() % sizeof(uint64_t) == 0);
  MVGPU_ASSIGN_OR_RETURN(const IovaRange range, CopyRange(iova, sizeof(uint64_t)));
  uint64_t word = expected;
  {
    AccessSlots::Section section(slots_);
    const PageDirectory::Found found = directory_.find(iova);
    if (!PageDirectory::IsUsable(found.flags, static_cast<uint64_t>(Access::kReadWrite))) {
      return tl::unexpected<Error>(StopError(range, {iova, found.flags}, Access::kReadWrite));
    }
    section.begin_copy(range);
    if (!CompareExchangeGuarded(found.host, &word, desired)) {
      return tl::unexpected<Error>(TruncatedError(iova, sizeof(uint64_t)));
    }
    if (word == expected) MarkWritten(range);
  }
  if (observer_ != nullptr) observer_->on_guest_read(iova, std::as_bytes(std::span(&word, 1)));
  return word;
}

}  // namespace mvgpu::domain
