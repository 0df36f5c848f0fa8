#pragma once

// Page tables as a guest's operating system writes them into its memory.

#include <array>
#include <cstdint>
#include <span>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "backend/scenario/world.h"

namespace mvgpu::backend::scenario {

// Takes tables out of guest memory one behind the other. The guest outlives it.
class TableBuilder {
 public:
  explicit TableBuilder(Guest* guest) : guest_(*guest) {}

  void set_next(uint64_t place) { next_ = place; }
  // A table of `words` words, each with this value, aligned to its size.
  Result<uint64_t> make_table(uint64_t words, uint64_t value) {
    const uint64_t bytes = words * sizeof(uint64_t);
    const uint64_t table = (next_ + bytes - 1) & ~(bytes - 1);
    MVGPU_RETURN_IF_ERROR(guest_.at(table, bytes));
    for (uint64_t i = 0; i < words; ++i) {
      MVGPU_RETURN_IF_ERROR(guest_.store64(table + i * sizeof(uint64_t), value));
    }
    next_ = table + bytes;
    return table;
  }

  // The entry of 4 KiB for an address in four levels of 512 entries, little-endian, as VT-d's are;
  // missing tables are made, and entered with `table_flags`.
  Result<uint64_t> find_entry(uint64_t root, uint64_t address, uint64_t table_flags) {
    uint64_t table = root & ~kPageMask;
    for (const unsigned shift : {39u, 30u, 21u}) {
      const uint64_t place = table + (address >> shift & 511) * sizeof(uint64_t);
      MVGPU_ASSIGN_OR_RETURN(uint64_t entry, guest_.load64(place));
      if (entry == 0) {
        MVGPU_ASSIGN_OR_RETURN(const uint64_t made, make_table(512, 0));
        entry = made | table_flags;
        MVGPU_RETURN_IF_ERROR(guest_.store64(place, entry));
      }
      table = entry & 0x000f'ffff'ffff'f000;
    }
    return table + (address >> kPageShift & 511) * sizeof(uint64_t);
  }

 private:
  Guest& guest_;
  uint64_t next_ = 0;
};

}  // namespace mvgpu::backend::scenario
