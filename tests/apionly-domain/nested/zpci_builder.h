#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>

#include "tests/fakes/guest_ram.h"

namespace mvgpu::testing {

// Builds s390 DMA tables as a guest's operating system does, with bits of its own, and remembers
// what they should translate. Tables lie in guest memory at addresses equal to RAM offsets.
class ZpciBuilder {
 public:
  static constexpr uint64_t kOrigin = 0x10'0000;
  static constexpr uint64_t kIota = kOrigin | 0x804;  // a region-third table, T

  explicit ZpciBuilder(GuestRam* ram) : ram_(*ram), next_(kOrigin) {
    AllocateUpper();  // the root, at kOrigin
  }

  void put(uint64_t address, uint64_t entry) { ram_.put(address, __builtin_bswap64(entry)); }
  uint64_t get(uint64_t address) { return __builtin_bswap64(ram_.get<uint64_t>(address)); }

  // Addresses of the entries of an IOVA; tables are made where there are none.
  uint64_t region_entry(uint64_t iova) const { return kOrigin + (iova >> 31) % 2048 * 8; }
  uint64_t segment_entry(uint64_t iova) {
    const uint64_t entry = region_entry(iova);
    if ((get(entry) & 0x20) != 0) put(entry, AllocateUpper() | 0x7);  // TT third, TL full
    return (get(entry) & ~uint64_t{0x3fff}) + (iova >> 20) % 2048 * 8;
  }
  uint64_t page_entry(uint64_t iova) {
    const uint64_t entry = segment_entry(iova);
    if ((get(entry) & 0x20) != 0) put(entry, AllocatePageTable());
    return (get(entry) & ~uint64_t{0x7ff}) + (iova >> 12) % 256 * 8;
  }
  bool has_page_table(uint64_t iova) {
    return (get(region_entry(iova)) & 0x20) == 0 && (get(segment_entry(iova)) & 0x420) == 0;
  }

  void map(uint64_t iova, uint64_t frame, bool read_only = false) {
    put(page_entry(iova), frame | (read_only ? 0x200 : 0));
  }
  void unmap(uint64_t iova) { put(page_entry(iova), 0x400); }

  // Tables with all entries invalid.
  uint64_t AllocateUpper() { return Allocate(0x4000, 2048, 0x20); }
  uint64_t AllocatePageTable() { return Allocate(0x800, 256, 0x400); }

 private:
  uint64_t Allocate(uint64_t align, uint64_t entries, uint64_t empty) {
    next_ = (next_ + align - 1) & ~(align - 1);
    const uint64_t table = next_;
    next_ += entries * 8;
    for (uint64_t i = 0; i < entries; ++i) put(table + i * 8, empty);
    return table;
  }

  GuestRam& ram_;
  uint64_t next_;
};

}  // namespace mvgpu::testing
