#pragma once

// What software writes into an invalidation queue (VT-d specification 4.1, section 6.5.2). All
// values are those of the guest, checked against the reserved bits and encodings of the
// specification and against nothing else: whether there is such a device is for the user to say.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <variant>

#include <tl/expected.hpp>

#include "apionly-domain/base/address.h"
#include "apionly-domain/faults/vtd_page_records.h"
#include "apionly-domain/viommu/vtd_entries.h"

namespace mvgpu::domain {

struct ContextInvalidation {
  enum class Granularity : uint8_t { kGlobal = 1, kDomain = 2, kDevice = 3 };
  Granularity granularity = Granularity::kGlobal;
  DomainId domain = 0;
  SourceId source = 0;
  uint8_t function_mask = 0;  // FM: 0 none, 1 bit 2, 2 bits 2:1, 3 bits 2:0 of the source

  // The bits of a source that count.
  SourceId source_mask() const;
  bool operator==(const ContextInvalidation&) const = default;
};

struct IotlbInvalidation {
  enum class Granularity : uint8_t { kGlobal = 1, kDomain = 2, kPages = 3 };
  Granularity granularity = Granularity::kGlobal;
  DomainId domain = 0;
  std::optional<IovaRange> range = std::nullopt;  // of kPages
  bool leaf_only = false;                         // IH: only last entries were changed
  bool operator==(const IotlbInvalidation&) const = default;
};

struct DeviceTlbInvalidation {
  SourceId source = 0;
  std::optional<Pasid> pasid = std::nullopt;
  bool all_pasids = false;  // G
  IovaRange range = IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0}));
  bool operator==(const DeviceTlbInvalidation&) const = default;
};

struct InterruptEntryInvalidation {
  bool is_global = true;
  uint16_t index = 0;
  uint8_t index_mask = 0;  // log2 of the entries
  bool operator==(const InterruptEntryInvalidation&) const = default;
};

struct InvalidationWait {
  bool interrupts = false;                                // IF
  std::optional<uint64_t> status_address = std::nullopt;  // with SW; aligned to 4
  uint32_t status = 0;
  bool is_fence = false;              // FN: what follows waits for what came before
  bool drains_page_requests = false;  // PD
  bool operator==(const InvalidationWait&) const = default;
};

struct PasidIotlbInvalidation {
  DomainId domain = 0;
  Pasid pasid = 0;
  std::optional<IovaRange> range = std::nullopt;  // nullopt: all of the PASID
  bool leaf_only = false;
  bool operator==(const PasidIotlbInvalidation&) const = default;
};

struct PasidCacheInvalidation {
  enum class Granularity : uint8_t { kDomain = 0, kPasid = 1, kGlobal = 3 };
  Granularity granularity = Granularity::kDomain;
  DomainId domain = 0;
  Pasid pasid = 0;
  bool operator==(const PasidCacheInvalidation&) const = default;
};

using InvalidationDescriptor =
    std::variant<ContextInvalidation, IotlbInvalidation, DeviceTlbInvalidation,
                 InterruptEntryInvalidation, InvalidationWait, PasidIotlbInvalidation,
                 PasidCacheInvalidation, VtdGroupResponse>;

// Why a queue stops, as IQERCD_REG.IQEI has it.
enum class QueueError : uint8_t {
  kUnknown = 0,  // a status could not be written
  kTail = 1,     // the tail lies beyond the queue
  kFetch = 2,
  kType = 3,
  kReserved = 4,   // a reserved bit or encoding
  kWidth = 5,      // a descriptor of 256 bits in a queue of 128
  kAlignment = 6,  // the tail is not between descriptors
};

struct DescriptorRules {
  uint8_t most_address_mask = 18;  // MAMV: log2 of the pages of the largest range
  bool may_drain = true;           // PD is known
};

// REQUIRES: `words` has 2 or 4.
tl::expected<InvalidationDescriptor, QueueError> DecodeInvalidation(std::span<const uint64_t> words,
                                                                    const DescriptorRules& rules);

}  // namespace mvgpu::domain
