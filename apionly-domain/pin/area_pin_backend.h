#pragma once

#include <absl/container/btree_map.h>
#include <absl/container/flat_hash_map.h>

#include <cstdint>
#include <memory>

#include "apionly-domain/pin/pin_backend.h"

namespace mvgpu::domain {

// What the back ends that hold memory have in common: the record of what is held.
//
// An area is what one decision asked the kernel to hold: an mlocked stretch, a registered buffer.
// It goes when none of its pages is pinned any more. Kept per area, never per page: how many of its
// pages are pinned. That is enough to know which ones while it is full, so a full area can be cut
// exactly; one that is not only counts, and is held as a whole.
class AreaPinBackend : public PinBackend {
 public:
  Result<void> pin(const GuestFile& file, PageRun pages) final;
  void unpin(const GuestFile& file, PageRun pages) final;
  uint64_t locked_pages() const override { return locked_pages_; }

 protected:
  struct Area {
    uint64_t pages = 0;
    uint64_t pinned_pages = 0;  // 0 only where the kernel refused to let go
    uint32_t tag = 0;           // of the back end

    bool is_full() const { return pinned_pages == pages; }
  };
  using Areas = absl::btree_map<uint64_t, Area>;  // by first page; disjoint
  struct FileAreas {
    explicit FileAreas(const FileIdentity& id) : identity(id) {}
    const FileIdentity identity;
    Areas areas;
    uint64_t pinned_pages = 0;
    uint64_t file_pages = 0;
  };

  static PageRun RunOf(const Areas::value_type& entry) { return {entry.first, entry.second.pages}; }

  // Holds the first pages of `gap`, which no area covers, and adds the area, with these pages
  // counted as pinned. Answers how many. `next` is the first area behind the gap.
  virtual Result<uint64_t> Cover(const GuestFile& file, Areas& areas, Areas::iterator next,
                                 PageRun gap) = 0;
  // Pages of an area that is held, none of them pinned, are about to be.
  virtual Result<void> Reuse(const GuestFile& file, Areas::value_type& area, PageRun pages) = 0;
  // Lets go of a part of a full area and replaces that by what is left, or changes nothing and
  // answers false.
  virtual bool Cut(const GuestFile& file, Areas& areas, Areas::iterator area, PageRun part) = 0;
  // Lets go of an area without pinned pages and removes it, unless the kernel refuses.
  virtual void Release(const GuestFile& file, Areas& areas, Areas::iterator area) = 0;
  // No page of the file is pinned any more; `areas` has those that the kernel refused to release.
  // They are forgotten afterwards.
  virtual void ReleaseRefused(const GuestFile& file, const Areas& areas) = 0;

  Areas::iterator AddArea(Areas& areas, Areas::iterator hint, uint64_t first, Area area);
  Areas::iterator RemoveArea(Areas& areas, Areas::iterator area);
  // A full area that has grown at its end, and is full again.
  void GrowArea(Areas::iterator area, uint64_t pages);
  // Replaces a full area by what is before and behind `part`, if anything, with these tags.
  void SplitArea(Areas& areas, Areas::iterator area, PageRun part, uint32_t left_tag,
                 uint32_t right_tag);

  uint64_t area_count() const { return area_count_; }
  uint64_t total_file_pages() const { return total_file_pages_; }

 private:
  FileAreas& EntryOf(const GuestFile& file);
  // Pins the first pages of `pages` and answers how many.
  Result<uint64_t> PinSome(const GuestFile& file, FileAreas& entry, PageRun pages);
  // Unpins the first pages of `pages` and answers how many.
  uint64_t UnpinSome(const GuestFile& file, FileAreas& entry, PageRun pages);
  void ForgetIfUnused(const GuestFile& file, FileAreas& entry);

  static constexpr size_t kKeptFiles = 64;

  // Those with pinned pages, and up to kKeptFiles that had some: a guest that pins and unpins one
  // page, here and there, does not make an entry each time.
  absl::flat_hash_map<FileIdentity, std::unique_ptr<FileAreas>> files_;
  FileAreas* last_used_ = nullptr;  // one of files_: the next question is often about the same
  uint64_t locked_pages_ = 0;
  uint64_t area_count_ = 0;
  uint64_t total_file_pages_ = 0;  // sizes of those with pinned pages
};

}  // namespace mvgpu::domain
