#include "backend/policies/dma_trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace mvgpu::backend {

namespace {

// In order, without overlaps; what touches becomes one.
std::vector<IovaRange> Union(std::vector<IovaRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const IovaRange& a, const IovaRange& b) { return a.start() < b.start(); });
  std::vector<IovaRange> joined;
  for (const IovaRange& range : ranges) {
    if (joined.empty() || range.start().value() > joined.back().last().value() + 1) {
      joined.push_back(range);
    } else if (range.last() > joined.back().last()) {
      joined.back() = IovaRange::FromFirstAndLast(joined.back().start(), range.last());
    }
  }
  return joined;
}

}  // namespace

uint64_t DmaBuffer::pages() const {
  uint64_t pages = 0;
  for (const PageRun& part : parts) pages += part.count;
  return pages;
}

std::vector<PageRun> DmaBuffer::slice(uint64_t first, uint64_t count) const {
  std::vector<PageRun> found;
  uint64_t at = 0;  // of the part, in the buffer
  for (const PageRun& part : parts) {
    const uint64_t from = std::max(first, at);
    const uint64_t end = std::min(first + count, at + part.count);
    if (from < end) found.push_back({part.first + (from - at), end - from});
    at += part.count;
  }
  return found;
}

uint64_t DmaTrace::memory_pages() const {
  uint64_t pages = 0;
  for (const IovaRange& range : memory) pages += PagesIn(range.size());
  return pages;
}

void DmaTraceBuilder::skip(std::string_view name) {
  skip();
  const auto found = trace_.skipped_by_name.find(name);
  if (found == trace_.skipped_by_name.end()) {
    trace_.skipped_by_name.emplace(name, 1);
  } else {
    ++found->second;
  }
}

Result<IovaRange> DmaTraceBuilder::add_apart(uint64_t bytes) {
  const auto range = IovaRange::FromStartAndSize(Iova(kMaxMemoryBytes + apart_bytes_), bytes);
  if (!range || !range->is_page_aligned() || bytes > kMaxApartBytes - apart_bytes_) {
    return Fail(
        ErrorCode::kLimit,
        fmt::format("{}: {} more bytes than {} of memory that has no place in the guest, {} "
                    "are possible; cut the trace into shorter ones",
                    trace_.name, bytes, apart_bytes_, kMaxApartBytes));
  }
  apart_bytes_ += bytes;
  return *range;
}

bool DmaTraceBuilder::IsApart(const IovaRange& range) const {
  return range.start().value() >= kMaxMemoryBytes &&
         range.last().value() < kMaxMemoryBytes + apart_bytes_;
}

Result<uint32_t> DmaTraceBuilder::add_buffer(std::span<const IovaRange> ranges,
                                             dma::Direction direction) {
  if (ranges.empty() || trace_.buffers.size() >= kMaxEvents) {
    return Fail(ErrorCode::kInvalid, "a dma buffer without memory, or too many of them");
  }
  DmaBuffer buffer{{}, direction};
  for (const IovaRange& range : ranges) {
    if (range.last().value() >= kMaxMemoryBytes && !IsApart(range)) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("dma at guest-physical {:#x}-{:#x}: there may be memory below {:#x}",
                              range.start().value(), range.last().value(), kMaxMemoryBytes));
    }
    buffer.parts.push_back(PagesOf(range));
    if (IsApart(range)) continue;
    const uint64_t end = range.page_expanded().last().value() + 1;
    end_ = std::max(end_, end);
    if (range.start().value() < kPcHighStart) {
      low_end_ = std::max(low_end_, std::min(end, kPcHighStart));
    }
  }
  trace_.buffers.push_back(std::move(buffer));
  mapped_.push_back(false);
  return static_cast<uint32_t>(trace_.buffers.size() - 1);
}

Result<void> DmaTraceBuilder::Append(DmaEvent event) {
  if (trace_.events.size() >= kMaxEvents) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{}: more than {} events of dma, cut the trace into shorter ones",
                            trace_.name, kMaxEvents));
  }
  if (!trace_.events.empty()) event.time_ns = std::max(event.time_ns, trace_.events.back().time_ns);
  if (event.time_ns > kMaxDurationNs) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{}: longer than {} hours, cut the trace into shorter ones",
                            trace_.name, kMaxDurationNs / 3'600'000'000'000));
  }
  trace_.events.push_back(event);
  return {};
}

Result<void> DmaTraceBuilder::map(uint64_t time_ns, uint32_t buffer) {
  if (mapped_[buffer]) return Fail(ErrorCode::kInvalid, "a dma buffer is mapped twice");
  const uint64_t pages = pages_of(buffer);
  if (pages > PagesIn(kMaxMappedBytes) - mapped_pages_) {
    return Fail(ErrorCode::kLimit,
                fmt::format("{}: {} MiB are mapped for devices at a time, {} more do not fit into "
                            "the {} that can be played; take such maps out",
                            trace_.name, BytesIn(mapped_pages_) >> 20, BytesIn(pages) >> 20,
                            kMaxMappedBytes >> 20));
  }
  MVGPU_RETURN_IF_ERROR(Append({time_ns, DmaEvent::Kind::kMap, buffer}));
  mapped_[buffer] = true;
  mapped_pages_ += pages;
  return {};
}

Result<void> DmaTraceBuilder::unmap(uint64_t time_ns, uint32_t buffer) {
  if (!mapped_[buffer]) return Fail(ErrorCode::kInvalid, "a dma buffer is unmapped twice");
  MVGPU_RETURN_IF_ERROR(Append({time_ns, DmaEvent::Kind::kUnmap, buffer}));
  mapped_[buffer] = false;
  mapped_pages_ -= pages_of(buffer);
  return {};
}

Result<void> DmaTraceBuilder::access(uint64_t time_ns, uint32_t buffer, uint64_t first,
                                     uint64_t count) {
  const auto end = CheckedAdd(first, count);
  if (!mapped_[buffer] || count == 0 || !end || *end > trace_.buffers[buffer].pages()) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("a device touches pages {}+{} of a dma buffer that has {} and is {}mapped",
                    first, count, trace_.buffers[buffer].pages(), mapped_[buffer] ? "" : "not "));
  }
  return Append({time_ns, DmaEvent::Kind::kAccess, buffer, first, count});
}

Result<void> DmaTraceBuilder::CheckBuffers() const {
  for (const DmaBuffer& buffer : trace_.buffers) {
    for (const PageRun& part : buffer.parts) {
      const IovaRange range = RangeOf(part);
      const bool is_inside =
          std::any_of(trace_.memory.begin(), trace_.memory.end(),
                      [&](const IovaRange& memory) { return memory.contains(range); });
      if (is_inside) continue;
      return Fail(ErrorCode::kInvalid,
                  fmt::format("{}: dma at guest-physical {:#x}-{:#x}, which is not in the guest's "
                              "{} MiB of memory; give more with --memory",
                              trace_.name, range.start().value(), range.last().value(),
                              BytesIn(trace_.memory_pages()) >> 20));
    }
  }
  return {};
}

Result<DmaTrace> DmaTraceBuilder::build() && {
  trace_.memory = Union(std::move(memory_));
  if (!trace_.memory.empty() && trace_.memory.back().last().value() >= kMaxMemoryBytes) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{}: the guest's memory ends at {:#x}, it may end at {:#x}",
                            trace_.name, trace_.memory.back().last().value(), kMaxMemoryBytes));
  }
  if (const auto apart = IovaRange::FromStartAndSize(Iova(kMaxMemoryBytes), apart_bytes_)) {
    trace_.memory.push_back(*apart);
  }
  if (trace_.memory.empty()) {
    return Fail(ErrorCode::kInvalid, trace_.name + ": the guest has no memory");
  }
  MVGPU_RETURN_IF_ERROR(CheckBuffers());
  return std::move(trace_);
}

std::vector<IovaRange> PcMemory(uint64_t size, uint64_t low_end) {
  std::vector<IovaRange> memory;
  const uint64_t low = std::min(size, low_end);
  if (const auto range = IovaRange::FromStartAndSize(Iova(0), low)) memory.push_back(*range);
  if (const auto range = IovaRange::FromStartAndSize(Iova(kPcHighStart), size - low)) {
    memory.push_back(*range);
  }
  return memory;
}

}  // namespace mvgpu::backend
