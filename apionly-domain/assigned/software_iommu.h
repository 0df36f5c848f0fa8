#pragma once

// An IOMMU in software, for machines without one and for devices that are programs: a table of four
// levels as on x86, with pages of 4 KiB, 2 MiB and 1 GiB, and a small cache of translations in
// front of it (an IOTLB). As in hardware, what was unmapped may still be reached through the cache
// until flush(): a user who forgets that is found out.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <absl/container/btree_map.h>

#include "apionly-domain/assigned/assigned_iommu.h"
#include "apionly-domain/base/mutex.h"

namespace mvgpu::domain {

// Thread-safe.
class SoftwareIommu final : public AssignedIommu {
 public:
  static constexpr unsigned kAddressBits = 48;
  struct Counters {
    uint64_t mappings = 0;
    std::array<uint64_t, 3> pages{};  // mapped with 4 KiB, 2 MiB and 1 GiB
    uint64_t tables = 0;              // in use, without the first
    uint64_t spare_tables = 0;        // empty ones, kept for the next that is needed
    uint64_t cached_hits = 0;         // translations that the cache knew
    uint64_t walks = 0;
    uint64_t faults = 0;
  };
  struct Fault {
    Iova iova;
    Access access = Access::kRead;
    bool is_mapped = false;  // it is, but not for this access
  };

  SoftwareIommu();
  ~SoftwareIommu() override;

  // Where a device that does this access at `iova` ends up; null, and a fault counted, when it is
  // refused. The next byte may be somewhere else at every multiple of 4 KiB. The address is not to
  // be dereferenced where it is guest memory: see GuestFile.
  std::byte* translate(Iova iova, Access access);

  Counters counters() const;
  std::optional<Fault> last_fault() const;

  std::string_view name() const override { return "software"; }
  Result<void> map(IovaRange iova, std::byte* host, Access access) override;
  Result<void> unmap(IovaRange iova) override;
  void flush() override;
  bool holds_memory() const override { return false; }
  std::span<const IovaRange> usable_ranges() const override { return usable_; }
  uint64_t page_sizes() const override;

 private:
  static constexpr size_t kCachedTranslations = 256;
  // Enough for a few lone pages that come and go: three tables each, of 12 KiB. To make and to
  // clear them anew costs more than all else of a map.
  static constexpr size_t kMostSpareTables = 16;
  struct Table;
  // A leaf, with `access` and the host memory that it shows, or a table below.
  struct Entry {
    std::unique_ptr<Table> table;
    std::byte* host = nullptr;
    uint8_t access = 0;  // 0: not a leaf
    bool is_used() const { return table != nullptr || access != 0; }
  };
  struct Cached {
    uint64_t page = UINT64_MAX;
    std::byte* host = nullptr;
    uint8_t access = 0;
  };

  std::unique_ptr<Table> TakeTable() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // REQUIRES: it is empty.
  void GiveTableBack(std::unique_ptr<Table> table) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Entry& EntryFor(Iova iova, unsigned level) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Clear(Table& table, unsigned level, IovaRange range) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Cached Walk(Iova iova) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::array<IovaRange, 2> usable_;
  mutable ExclusiveMutex mutex_;
  const std::unique_ptr<Table> root_ ABSL_PT_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Table>> spare_ ABSL_GUARDED_BY(mutex_);      // empty
  absl::btree_map<uint64_t, IovaRange> mappings_ ABSL_GUARDED_BY(mutex_);  // by first page
  std::array<Cached, kCachedTranslations> cached_ ABSL_GUARDED_BY(mutex_);
  bool is_any_cached_ ABSL_GUARDED_BY(mutex_) = false;  // since the last flush
  Counters counters_ ABSL_GUARDED_BY(mutex_);
  std::optional<Fault> last_fault_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
