#pragma once

#include <cstdint>

#include <tl/expected.hpp>

#include "apionly-domain/viommu/vtd_tables.h"

namespace mvgpu::domain {

// Where a request may go. What lies behind `address` in the same page of the tables is contiguous.
struct VtdTarget {
  uint64_t address = 0;            // after the last stage
  uint64_t length = 0;             // bytes from there on to the end of that page
  Rights rights = 0;               // for requests of the same privilege
  uint64_t page_size = kPageSize;  // bytes of that page: an invalidation of any part is of it all
  bool operator==(const VtdTarget&) const = default;
};

using VtdResult = tl::expected<VtdTarget, VtdFault>;

// The part of a translation that walks paging structures: what a PASID entry says about an address
// (VT-d specification 4.1, sections 3.6 to 3.8). Nothing is remembered. Thread-safe, as the tables
// are.
class VtdTranslator {
 public:
  // The tables must outlive this.
  explicit VtdTranslator(const VtdTables* tables) : tables_(*tables) {}

  // All of it, from the root table on.
  VtdResult translate(vtd::RootAddress root, const VtdRequest& request) const;

  // The walk alone, with the stages that the entry asks for. The span of a leaf ends where
  // addresses of interrupts begin.
  tl::expected<Leaf, VtdFault> walk(const vtd::PasidEntry& entry, uint64_t address,
                                    Wanted wanted) const;
  static VtdTarget TargetOf(const Leaf& leaf) {
    return {leaf.out, leaf.span - (leaf.out & (leaf.span - 1)), leaf.rights, leaf.span};
  }

 private:
  tl::expected<Leaf, VtdFault> PassThrough(const vtd::PasidEntry& entry, uint64_t address) const;
  WalkResult Walk(const vtd::PasidEntry& entry, uint64_t address, Wanted wanted) const;

  const VtdTables& tables_;  // outlives this: contract of the constructor
};

}  // namespace mvgpu::domain
