#include "backend/policies/iommu_map_events.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <string_view>
#include <utility>

namespace mvgpu::backend {

namespace {

constexpr std::array<std::string_view, 7> kEvents{"map", "unmap",
                                                  // Left out, always.
                                                  "add_device_to_group", "remove_device_from_group",
                                                  "attach_device_to_domain",
                                                  "detach_device_from_domain", "io_page_fault"};
constexpr std::string_view kPrefix = "IOMMU:";
constexpr std::string_view kRawPrefix = "iova=";  // trace-cmd report -R

constexpr uint64_t kGiB = uint64_t{1} << 30;
constexpr IovaRange kRegisters = IovaRange::FromFirstAndLast(Iova(3 * kGiB), Iova(4 * kGiB - 1));

bool IsRam(const IovaRange& range) {
  return !range.overlaps(kRegisters) && range.last().value() < DmaTraceBuilder::kMaxMemoryBytes;
}

// The IOVAs that an event names: `size` bytes of them. Where its end stands there, they agree.
Result<IovaRange> IovasOf(const KernelEvent& event, uint64_t size) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t start, NumberOf(event, "iova"));
  const auto range = IovaRange::FromStartAndSize(Iova(start), size);
  if (range && range->is_page_aligned()) return *range;
  return Fail(
      ErrorCode::kCorrupt,
      fmt::format("a {} event with {} bytes at iova {:#x}: neither empty ranges nor parts of "
                  "pages nor ranges beyond 2^64 can be mapped",
                  event.name, size, start));
}

// `iova=0x.. - 0x..`: the end is exclusive, and 0 at the end of the address space.
Result<void> CheckEnd(const KernelEvent& event, uint64_t start, uint64_t size) {
  constexpr std::string_view kBetween = " - ";
  const size_t at = event.fields.find(kBetween);
  if (at == std::string_view::npos) return {};
  const std::string_view rest = event.fields.substr(at + kBetween.size());
  const std::string_view text = rest.substr(0, rest.find(' '));
  const auto end = ParseNumber(text, 10);
  if (end && *end == start + size) return {};
  return Fail(ErrorCode::kCorrupt,
              fmt::format("a {} event of {} bytes from {:#x} to {}, which is {:#x}", event.name,
                          size, start, Quoted(text), start + size));
}

}  // namespace

bool IommuMapEvents::Knows(const KernelEvent& event) {
  // `map` alone might be anybody's.
  const bool looks_so = event.fields.starts_with(kPrefix) || event.fields.starts_with(kRawPrefix);
  const bool is_iommu = event.system == "iommu" || (event.system.empty() && looks_so);
  return is_iommu && std::find(kEvents.begin(), kEvents.end(), event.name) != kEvents.end();
}

Result<void> IommuMapEvents::take(const KernelEvent& event, uint64_t now_ns) {
  now_ns_ = now_ns;
  if (event.name == "map") return TakeMap(event);
  if (event.name == "unmap") return TakeUnmap(event);
  return Skip(event);
}

Result<void> IommuMapEvents::Skip(const KernelEvent& event) {
  builder_.skip(fmt::format("iommu:{}", event.name));
  return {};
}

std::optional<IommuMapEvents::Found> IommuMapEvents::find(uint64_t iova,
                                                          const IovaRange& phys) const {
  const auto wanted = IovaRange::FromStartAndSize(Iova(iova), phys.size());
  if (!wanted) return std::nullopt;
  for (const Domain& domain : domains_) {
    const auto found = FirstIn(domain, *wanted);
    if (found == domain.end() || !found->second.iova.contains(*wanted)) continue;
    const Mapping& mapping = found->second;
    const uint64_t offset = wanted->start() - mapping.iova.start();
    if (mapping.phys + offset == phys.start().value())
      return Found{mapping.buffer, PagesIn(offset)};
  }
  return std::nullopt;
}

// The first mapping that has something of these IOVAs.
IommuMapEvents::Domain::const_iterator IommuMapEvents::FirstIn(const Domain& domain,
                                                               const IovaRange& iova) {
  auto at = domain.upper_bound(iova.start().value());
  if (at != domain.begin() && std::prev(at)->second.iova.overlaps(iova)) return std::prev(at);
  return at != domain.end() && at->second.iova.overlaps(iova) ? at : domain.end();
}

bool IommuMapEvents::HasAny(const Domain& domain, const IovaRange& iova) {
  return FirstIn(domain, iova) != domain.end();
}

bool IommuMapEvents::HasExactly(const Domain& domain, const IovaRange& iova) {
  const auto first = domain.find(iova.start().value());
  const auto behind = domain.upper_bound(iova.last().value());
  return first != domain.end() && std::prev(behind)->second.iova.last() == iova.last();
}

Result<void> IommuMapEvents::TakeMap(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t size, NumberOf(event, "size"));
  MVGPU_ASSIGN_OR_RETURN(const IovaRange iova, IovasOf(event, size));
  MVGPU_RETURN_IF_ERROR(CheckEnd(event, iova.start().value(), size));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t phys, NumberOf(event, "paddr"));
  const auto memory = IovaRange::FromStartAndSize(Iova(phys), size);
  if (!memory || !memory->is_page_aligned()) {
    return Fail(
        ErrorCode::kCorrupt,
        fmt::format("a map event of {} bytes to paddr {:#x}, which is no range of whole pages",
                    size, phys));
  }
  if (!IsRam(*memory)) return Skip(event);
  auto domain = std::find_if(domains_.begin(), domains_.end(),
                             [&](const Domain& known) { return !HasAny(known, iova); });
  if (domain == domains_.end()) {
    if (domains_.size() < kMaxDomains) domains_.emplace_back();
    domain = std::prev(domains_.end());
    MVGPU_RETURN_IF_ERROR(Cut(iova, &*domain));
  }
  return Map(iova, phys, &*domain, true);
}

Result<void> IommuMapEvents::TakeUnmap(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t asked, NumberOf(event, "size"));
  uint64_t size = asked;
  if (FieldOf(event.fields, "unmapped_size")) {  // old kernels do not say
    MVGPU_ASSIGN_OR_RETURN(size, NumberOf(event, "unmapped_size"));
  }
  MVGPU_ASSIGN_OR_RETURN(const uint64_t start, NumberOf(event, "iova"));
  MVGPU_RETURN_IF_ERROR(CheckEnd(event, start, asked));
  if (size == 0) return Skip(event);  // nothing was there
  MVGPU_ASSIGN_OR_RETURN(const IovaRange iova, IovasOf(event, size));
  auto domain = std::find_if(domains_.begin(), domains_.end(),
                             [&](const Domain& known) { return HasExactly(known, iova); });
  if (domain == domains_.end()) {
    domain = std::find_if(domains_.begin(), domains_.end(),
                          [&](const Domain& known) { return HasAny(known, iova); });
  }
  return domain != domains_.end() ? Cut(iova, &*domain) : Skip(event);
}

Result<void> IommuMapEvents::Map(const IovaRange& iova, uint64_t phys, Domain* domain,
                                 bool is_touched) {
  const auto memory = IovaRange::FromStartAndSize(Iova(phys), iova.size());
  MVGPU_ASSIGN_OR_RETURN(const uint32_t buffer,
                         builder_.add_buffer({&*memory, 1}, dma::Direction::kBidirectional));
  MVGPU_RETURN_IF_ERROR(builder_.map(now_ns_, buffer));
  domain->insert_or_assign(iova.start().value(), Mapping{iova, phys, buffer});
  return is_touched ? builder_.access_all(now_ns_, buffer) : Result<void>();
}

Result<void> IommuMapEvents::Cut(const IovaRange& iova, Domain* domain) {
  for (auto at = FirstIn(*domain, iova); at != domain->end(); at = FirstIn(*domain, iova)) {
    const Mapping mapping = at->second;
    domain->erase(at);
    const IovaRange& all = mapping.iova;
    if (all.start() < iova.start()) {
      const auto rest = IovaRange::FromFirstAndLast(all.start(), Iova(iova.start().value() - 1));
      MVGPU_RETURN_IF_ERROR(Map(rest, mapping.phys, domain, false));
    }
    if (iova.last() < all.last()) {
      const auto rest = IovaRange::FromFirstAndLast(iova.last() + 1, all.last());
      MVGPU_RETURN_IF_ERROR(Map(rest, mapping.phys + (rest.start() - all.start()), domain, false));
    }
    MVGPU_RETURN_IF_ERROR(builder_.unmap(now_ns_, mapping.buffer));
  }
  return {};
}

}  // namespace mvgpu::backend
