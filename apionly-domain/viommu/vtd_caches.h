#pragma once

// What a remapping unit remembers (VT-d specification 4.1, chapter 6). Software sees the caches
// only where it changed tables and has not said so yet; then either answer is right. Tags, and what
// each invalidation takes away, are those of section 6.2 and 6.5.2:
//
//   context cache   source                       entries of context tables
//   PASID cache     source, PASID | domain       PASID entries; `domain` is in the entry
//   IOTLB           domain, PASID, page          results of walks; without PASID for those of the
//                                                second stage alone
//
// Nothing is remembered of what is not present or not allowed. An invalidation may take away more
// than it must.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

#include "apionly-domain/nested/table_walker.h"
#include "apionly-domain/viommu/invalidation_descriptor.h"
#include "apionly-domain/viommu/tagged_cache.h"
#include "apionly-domain/viommu/vtd_entries.h"

namespace mvgpu::domain {

// Not thread-safe.
class VtdCaches {
 public:
  struct Sizes {  // entries
    size_t contexts = 64;
    size_t pasids = 256;
    size_t pages = 1024;
  };
  explicit VtdCaches(Sizes sizes)
      : contexts_(sizes.contexts), pasids_(sizes.pasids), pages_(sizes.pages) {}

  const vtd::ContextEntry* context(SourceId source) const { return contexts_.find(source); }
  void remember(SourceId source, const vtd::ContextEntry& entry) {
    contexts_.insert(source, entry);
  }

  const vtd::PasidEntry* pasid(SourceId source, Pasid pasid) const {
    return pasids_.find({source, pasid});
  }
  void remember(SourceId source, Pasid pasid, const vtd::PasidEntry& entry) {
    pasids_.insert({source, pasid}, entry);
  }

  // Whose translations these are.
  struct Tag {
    DomainId domain = 0;
    std::optional<Pasid> pasid = std::nullopt;  // with a first stage
    bool privileged = false;
    bool operator==(const Tag&) const = default;
    // All of it in one word, below bit 48: fewer steps for a hash.
    uint64_t packed() const {
      const uint64_t flags = (pasid ? 1u : 0u) | (privileged ? 2u : 0u);
      return domain | uint64_t{pasid.value_or(0)} << 16 | flags << 40;
    }
  };
  static Tag TagOf(const vtd::PasidEntry& entry, Pasid pasid, bool privileged);

  // The leaf for an address, if a walk that wants `wanted` would find no flag to set. REQUIRES:
  // something is wanted.
  std::optional<Leaf> page(const Tag& tag, uint64_t address, Rights wanted) const;
  void remember(const Tag& tag, uint64_t address, const Leaf& leaf);

  void invalidate(const ContextInvalidation& invalidation);
  void invalidate(const PasidCacheInvalidation& invalidation);
  void invalidate(const IotlbInvalidation& invalidation);
  void invalidate(const PasidIotlbInvalidation& invalidation);
  void clear();

  struct Counters {
    size_t contexts;
    size_t pasids;
    size_t pages;
  };
  Counters counters() const { return {contexts_.size(), pasids_.size(), pages_.size()}; }

 private:
  struct PasidKey {
    SourceId source;
    Pasid pasid;
    bool operator==(const PasidKey&) const = default;
    template <typename H>
    friend H AbslHashValue(H hash, const PasidKey& key) {
      return H::combine(std::move(hash), uint64_t{key.pasid} << 16 | key.source);
    }
  };
  struct PageKey {
    Tag tag;
    uint64_t page;  // address >> shift
    uint8_t shift;  // log2 of the bytes
    bool operator==(const PageKey&) const = default;
    template <typename H>
    friend H AbslHashValue(H hash, const PageKey& key) {
      return H::combine(std::move(hash), key.tag.packed() | uint64_t{key.shift} << 48, key.page);
    }
    bool overlaps(const IovaRange& range) const;
  };
  struct Page {
    uint64_t frame;
    Rights rights;
    Rights marked;  // as in Leaf
  };

  TaggedCache<SourceId, vtd::ContextEntry> contexts_;
  TaggedCache<PasidKey, vtd::PasidEntry> pasids_;
  TaggedCache<PageKey, Page> pages_;
};

}  // namespace mvgpu::domain
