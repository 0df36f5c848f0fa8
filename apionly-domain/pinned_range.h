#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

class ApiOnlyDomain;
class PinOwner;

// Contiguous IOVAs with contiguous backing. Whole pages.
struct PinnedRun {
  IovaRange iova;
  std::shared_ptr<GuestFile> file;
  uint64_t file_offset = 0;  // bytes; of the first IOVA

  std::byte* host_address() const { return file->host_address(file_offset); }
  PageRun file_pages() const { return {PagesIn(file_offset), PagesIn(iova.size())}; }
  PageRun iova_pages() const { return {iova.start().page(), PagesIn(iova.size())}; }
  // The part of this run in `part`. REQUIRES: iova.contains(part).
  PinnedRun slice(IovaRange part) const {
    return {part, file, file_offset + (part.start() - iova.start())};
  }
};

// A hold on guest pages: while it lives, the pages stay pinned and charged. Move-only; the
// destructor releases. Not thread-safe itself; different ranges may be used by different threads.
class PinnedRange {
 public:
  PinnedRange() = default;
  PinnedRange(PinnedRange&& other) noexcept;
  PinnedRange& operator=(PinnedRange&& other) noexcept;
  PinnedRange(const PinnedRange&) = delete;
  PinnedRange& operator=(const PinnedRange&) = delete;
  ~PinnedRange() { reset(); }

  // In ascending IOVA order, page-aligned; neighbours differ in backing or mapping.
  std::span<const PinnedRun> runs() const { return runs_; }
  bool empty() const { return runs_.empty(); }

  // Takes the part from `at` on out of this range. REQUIRES: `at` is page-aligned.
  PinnedRange split_off(Iova at);
  // Releases everything.
  void reset();

 private:
  friend class ApiOnlyDomain;
  PinnedRange(ApiOnlyDomain* domain, PinOwner* owner, std::vector<PinnedRun> runs);

  ApiOnlyDomain* domain_ = nullptr;  // outlives all pins: checked in its destructor
  PinOwner* owner_ = nullptr;        // outlives its pins: contract of ApiOnlyDomain::pin()
  std::vector<PinnedRun> runs_;
};

}  // namespace mvgpu::domain
