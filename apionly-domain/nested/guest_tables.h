#pragma once

#include <cstdint>
#include <span>

#include <tl/expected.hpp>

#include "apionly-domain/nested/table_walker.h"

namespace mvgpu::domain {

class ApiOnlyDomain;

// Where a walker reads tables. Addresses are what the tables' own pointers are: guest-physical, or,
// for tables of the first of two stages, input of the second (two_stage.h).
//
// A failure is a Fault of code kTableAccess (of kUpdateFailed for compare_exchange); its stage is 0
// when the walker is to fill in where it happened. Thread-safe.
class GuestTables {
 public:
  virtual ~GuestTables() = default;

  // Reads words.size() words of 8 bytes, each in one access, in the byte order of memory.
  // REQUIRES: `address` is aligned to 8, and they lie in one page.
  virtual tl::expected<void, Fault> load(uint64_t address, std::span<uint64_t> words) const = 0;

  // Stores `desired` if the word is `expected`, in one step. Returns what the word was.
  // REQUIRES: `address` is aligned to 8.
  virtual tl::expected<uint64_t, Fault> compare_exchange(uint64_t address, uint64_t expected,
                                                         uint64_t desired) const = 0;
};

// Tables in the memory of a guest.
class DomainTables final : public GuestTables {
 public:
  // The domain must outlive this.
  explicit DomainTables(ApiOnlyDomain* domain) : domain_(*domain) {}

  tl::expected<void, Fault> load(uint64_t address, std::span<uint64_t> words) const override;
  tl::expected<uint64_t, Fault> compare_exchange(uint64_t address, uint64_t expected,
                                                 uint64_t desired) const override;

 private:
  ApiOnlyDomain& domain_;
};

}  // namespace mvgpu::domain
