#include "backend/policies/dma_text_import.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "backend/policies/dma_api_events.h"
#include "backend/policies/iommu_map_events.h"
#include "backend/policies/kernel_text.h"
#include "backend/policies/page_request_events.h"

namespace mvgpu::backend {

namespace {

constexpr size_t kMaxLine = 1 << 16;
constexpr uint64_t kGiB = uint64_t{1} << 30;

class Importer {
 public:
  Importer(const std::string& name, DmaTextOptions options)
      : name_(name), options_(options), builder_(name) {}

  Result<DmaTrace> import(std::istream& lines) {
    std::string line(kMaxLine, '\0');
    while (lines.getline(line.data(), static_cast<std::streamsize>(line.size()))) {
      ++line_;
      const auto length = static_cast<size_t>(lines.gcount());
      MVGPU_RETURN_IF_ERROR(TakeLine(std::string_view(line.data(), length)));
    }
    if (!lines.eof()) {
      ++line_;
      return Corrupt(fmt::format("longer than {} bytes, or not readable: no text", kMaxLine));
    }
    if (!first_ns_) {
      return Fail(ErrorCode::kCorrupt,
                  fmt::format("{}: no dma event in {} lines; it takes a session's trace, or what "
                              "the kernel prints of dma:*, iommu:* and intel_iommu:* ({})",
                              name_, line_, kHowToRecordDma));
    }
    AddMemory();
    return std::move(builder_).build();
  }

 private:
  static uint64_t RoundUp(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }
  // RAM whose last byte is in the GiB of `end`.
  static uint64_t SizeFor(uint64_t end, uint64_t low_end) {
    const uint64_t rounded = RoundUp(std::max<uint64_t>(end, 1), kGiB);
    return rounded > kPcHighStart ? rounded - kPcHighStart + low_end : std::min(rounded, low_end);
  }
  void AddMemory() {
    const uint64_t end = builder_.end_of_buffers();
    // A trace of page requests alone says nothing of what else the guest has.
    if (options_.memory == 0 && end == 0 && builder_.has_apart()) return;
    // Not every PC's hole for devices begins at 3 GiB.
    const uint64_t low_end = std::max(kPcLowEnd, RoundUp(builder_.end_of_low_buffers(), kGiB / 4));
    const uint64_t size = options_.memory != 0 ? options_.memory : SizeFor(end, low_end);
    for (const IovaRange& range : PcMemory(size, low_end)) builder_.add_memory(range);
  }

  Result<void> TakeLine(std::string_view text) {
    while (!text.empty() && (text.back() == '\0' || text.back() == '\r')) text.remove_suffix(1);
    if (text.starts_with('#')) return {};
    const auto event = FindKernelEvent(text);
    if (!event) return {};
    const bool is_dma = DmaApiEvents::Knows(*event);
    const bool is_iommu = IommuMapEvents::Knows(*event);
    if (!is_dma && !is_iommu && !PageRequestEvents::Knows(*event)) return {};
    if (!first_ns_) first_ns_ = event->time_ns;
    now_ns_ = std::max(now_ns_, event->time_ns - std::min(event->time_ns, *first_ns_));
    Result<void> taken = is_dma     ? dma_.take(*event, now_ns_)
                         : is_iommu ? iommu_.take(*event, now_ns_)
                                    : requests_.take(*event, now_ns_);
    if (taken || taken.error().code() != ErrorCode::kCorrupt) return taken;
    return Corrupt(taken.error().message() + "; correct the line or take it out");
  }

  tl::unexpected<Error> Corrupt(std::string_view what) const {
    return Fail(ErrorCode::kCorrupt, fmt::format("{}: line {}: {}", name_, line_, what));
  }

  const std::string name_;
  const DmaTextOptions options_;
  DmaTraceBuilder builder_;
  IommuMapEvents iommu_{&builder_};
  DmaApiEvents dma_{&builder_, &iommu_};
  PageRequestEvents requests_{&builder_};
  uint64_t line_ = 0;
  std::optional<uint64_t> first_ns_;
  uint64_t now_ns_ = 0;
};

}  // namespace

Result<DmaTrace> ImportDmaText(std::istream& lines, const std::string& name,
                               DmaTextOptions options) {
  return Importer(name, options).import(lines);
}

}  // namespace mvgpu::backend
