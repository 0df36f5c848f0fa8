#pragma once

// What a guest does with DMA, as pinning policies see it: which buffers its drivers map for a
// device and when, and what the device then touches. All addresses are guest-physical, which is
// what a VMM maps as IOVAs; a guest's own IOMMU has been taken out by who made the trace.
//
// Where traces come from: session_import.h (sessions of our GPU), dma_text_import.h (the kernel's
// dma:*, iommu:* and intel_iommu:* events), workloads.h (generated). Who plays them: policy_run.h.

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "dma-cache/dma_mapping.h"

namespace mvgpu::backend {

// What one map call maps: the pages that its parts touch, in the order of the buffer.
struct DmaBuffer {
  std::vector<PageRun> parts;
  dma::Direction direction = dma::Direction::kBidirectional;

  uint64_t pages() const;
  // Those parts, or parts of parts, that hold the buffer's pages [first, first + count).
  std::vector<PageRun> slice(uint64_t first, uint64_t count) const;
};

struct DmaEvent {
  enum class Kind : uint8_t { kMap, kUnmap, kAccess };

  uint64_t time_ns = 0;  // since the trace began; never less than that of the event before
  Kind kind = Kind::kMap;
  uint32_t buffer = 0;  // in DmaTrace::buffers
  // kAccess: which pages of the buffer the device touches.
  uint64_t first = 0;
  uint64_t count = 0;
};

// Made by DmaTraceBuilder.
struct DmaTrace {
  std::string name;
  std::vector<IovaRange> memory;  // of the guest: in order, apart, whole pages
  std::vector<DmaBuffer> buffers;
  std::vector<DmaEvent> events;
  uint64_t skipped = 0;  // records of the source that a policy cannot be shown, see its importer
  std::map<std::string, uint64_t, std::less<>> skipped_by_name;  // of those that have one
  uint64_t repeated = 0;  // records that say again what another one said

  uint64_t memory_pages() const;
};

// Makes a trace that makes sense: each buffer is mapped while it is not, unmapped and accessed
// while it is, within the guest's memory, and time does not run backwards.
class DmaTraceBuilder {
 public:
  static constexpr uint64_t kMaxMemoryBytes = uint64_t{1} << 40;
  // Above it, memory of which nobody knows where in the guest it is.
  static constexpr uint64_t kMaxApartBytes = uint64_t{1} << 40;
  static constexpr uint64_t kMaxDurationNs = 7 * 24 * 3600 * uint64_t{1'000'000'000};
  static constexpr size_t kMaxEvents = size_t{1} << 26;
  // At a time, a page of two buffers twice. Policies look at each page.
  static constexpr uint64_t kMaxMappedBytes = uint64_t{64} << 30;

  explicit DmaTraceBuilder(std::string name) { trace_.name = std::move(name); }

  // More memory, not used by anybody else; whole pages. kLimit: kMaxApartBytes are handed out.
  Result<IovaRange> add_apart(uint64_t bytes);
  bool has_apart() const { return apart_bytes_ != 0; }

  // A new buffer, not mapped. Empty ranges do not exist; kInvalid: there is nothing in it, or it is
  // beyond kMaxMemoryBytes and not of add_apart().
  Result<uint32_t> add_buffer(std::span<const IovaRange> ranges, dma::Direction direction);
  // kInvalid: the buffer is (is not) mapped already, no such page, longer than kMaxDurationNs;
  // kLimit: more than kMaxEvents or kMaxMappedBytes. Time that runs backwards stands still.
  Result<void> map(uint64_t time_ns, uint32_t buffer);
  Result<void> unmap(uint64_t time_ns, uint32_t buffer);
  Result<void> access(uint64_t time_ns, uint32_t buffer, uint64_t first, uint64_t count);
  Result<void> access_all(uint64_t time_ns, uint32_t buffer) {
    return access(time_ns, buffer, 0, trace_.buffers[buffer].pages());
  }
  void skip() { ++trace_.skipped; }
  void skip(std::string_view name);  // of a kind of records, of which there are few
  void repeat() { ++trace_.repeated; }

  // The guest's memory, in any order, overlapping or not; whole pages. Ranges that touch become
  // one.
  void add_memory(IovaRange range) { memory_.push_back(range.page_expanded()); }
  // The end of the last page that a buffer has below kMaxMemoryBytes, 0 without one.
  uint64_t end_of_buffers() const { return end_; }
  // The same below 4 GiB, where a PC's RAM ends somewhere.
  uint64_t end_of_low_buffers() const { return low_end_; }
  bool is_mapped(uint32_t buffer) const { return mapped_[buffer]; }
  uint64_t pages_of(uint32_t buffer) const { return trace_.buffers[buffer].pages(); }

  // kInvalid: there is no memory, more than kMaxMemoryBytes, or buffers lie outside; says where.
  Result<DmaTrace> build() &&;

 private:
  Result<void> Append(DmaEvent event);
  Result<void> CheckBuffers() const;
  bool IsApart(const IovaRange& range) const;

  DmaTrace trace_;
  std::vector<IovaRange> memory_;
  std::vector<bool> mapped_;  // by buffer
  uint64_t mapped_pages_ = 0;
  uint64_t end_ = 0;
  uint64_t low_end_ = 0;
  uint64_t apart_bytes_ = 0;  // from kMaxMemoryBytes on
};

// RAM of `size` bytes as a PC has it: from 0 up to `low_end`, the rest from 4 GiB on.
inline constexpr uint64_t kPcLowEnd = uint64_t{3} << 30;
inline constexpr uint64_t kPcHighStart = uint64_t{4} << 30;
std::vector<IovaRange> PcMemory(uint64_t size, uint64_t low_end = kPcLowEnd);

}  // namespace mvgpu::backend
