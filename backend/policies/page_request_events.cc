#include "backend/policies/page_request_events.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <utility>
#include <variant>

namespace mvgpu::backend {

namespace {

using domain::DeviceTlbInvalidation;
using domain::VtdPageRequest;

constexpr uint64_t kBlockPages = 512;  // 2 MiB
constexpr unsigned kAddressBits = 57;  // of five levels, one of them the sign
constexpr std::string_view kLetters = "rwxpl";

tl::unexpected<Error> Wrong(const KernelEvent& event, std::string_view what,
                            std::string_view value) {
  return Fail(ErrorCode::kCorrupt,
              fmt::format("a {} event with {}, which is no {}", event.name, Quoted(value), what));
}

// All bits above are as the highest below.
bool IsCanonical(uint64_t address) {
  const uint64_t above = address >> (kAddressBits - 1);
  return above == 0 || above == ~uint64_t{0} >> (kAddressBits - 1);
}

// See PageRequestOf().
std::optional<uint64_t> AddressOf(uint64_t printed) {
  const bool fits = printed <= PagesIn(~uint64_t{0});
  if (fits && IsCanonical(BytesIn(printed))) return BytesIn(printed);
  if (IsCanonical(printed) && (printed & kPageMask) == 0) return printed;
  return std::nullopt;
}

Result<uint64_t> NumberUpTo(const KernelEvent& event, std::string_view key, uint64_t most) {
  MVGPU_ASSIGN_OR_RETURN(const uint64_t value, NumberOf(event, key));
  if (value <= most) return value;
  return Fail(ErrorCode::kCorrupt, fmt::format("a {} event with {}={:#x}, which is at most {:#x}",
                                               event.name, key, value, most));
}

// `rw--l`: a letter or a dash at each place.
Result<void> TakeLetters(const KernelEvent& event, VtdPageRequest* request) {
  const size_t address = event.fields.find(" addr=");
  const size_t start = event.fields.find(' ', address + 1);
  const std::string_view text =
      start == std::string_view::npos ? "" : event.fields.substr(start + 1);
  const std::string_view word = text.substr(0, text.find(' '));
  const std::array<bool*, 5> flags{&request->reads, &request->writes, &request->executes,
                                   &request->is_privileged, &request->is_last};
  if (word.size() != flags.size()) return Wrong(event, "rwxpl", word);
  for (size_t i = 0; i < flags.size(); ++i) {
    if (word[i] != kLetters[i] && word[i] != '-') return Wrong(event, "rwxpl", word);
    *flags[i] = word[i] != '-';
  }
  return {};
}

Result<VtdPageRequest> DecodedRequest(const KernelEvent& event) {
  VtdPageRequest request;
  MVGPU_ASSIGN_OR_RETURN(const uint64_t requester, NumberUpTo(event, "rid", 0xffff));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t printed, NumberOf(event, "addr"));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t pasid, NumberUpTo(event, "pasid", 0xfffff));
  MVGPU_ASSIGN_OR_RETURN(const uint64_t group, NumberUpTo(event, "index", 0x1ff));
  MVGPU_RETURN_IF_ERROR(TakeLetters(event, &request));
  const auto address = AddressOf(printed);
  if (!address)
    return Wrong(event, "page of a canonical address", fmt::format("addr={:#x}", printed));
  request.requester = static_cast<uint16_t>(requester);
  request.address = *address;
  if (pasid != 0) request.pasid = static_cast<uint32_t>(pasid);
  request.group = static_cast<uint16_t>(group);
  return request;
}

// The words of a record, one field each: `dw0=.. dw1=..`.
Result<std::array<uint64_t, 4>> WordsIn(const KernelEvent& event, std::string_view prefix) {
  std::array<uint64_t, 4> words{};
  for (size_t i = 0; i < words.size(); ++i) {
    MVGPU_ASSIGN_OR_RETURN(words[i], NumberOf(event, fmt::format("{}{}", prefix, i)));
  }
  return words;
}

// `NAME/DEV seq# ..` or `iommu=NAME`.
Result<std::string> UnitOf(const KernelEvent& event) {
  if (const auto field = FieldOf(event.fields, "iommu")) return std::string(*field);
  const std::string_view first = event.fields.substr(0, event.fields.find(' '));
  const size_t slash = first.find('/');
  if (slash == std::string_view::npos) return Wrong(event, "unit/device", first);
  return std::string(first.substr(0, slash));
}

struct Descriptor {
  std::string unit;
  std::array<uint64_t, 4> words{};
};

// `KIND NAME: 0x.. 0x.. 0x.. 0x..` or `qw0=.. qw1=.. qw2=.. qw3=.. iommu=NAME`.
Result<Descriptor> DescriptorOf(const KernelEvent& event) {
  Descriptor descriptor;
  if (FieldOf(event.fields, "qw0")) {
    MVGPU_ASSIGN_OR_RETURN(descriptor.unit, UnitOf(event));
    MVGPU_ASSIGN_OR_RETURN(descriptor.words, WordsIn(event, "qw"));
    return descriptor;
  }
  const size_t colon = event.fields.find(": ");
  const size_t blank = event.fields.find(' ');
  if (colon == std::string_view::npos || blank > colon) {
    return Wrong(event, "kind, unit and words", event.fields);
  }
  descriptor.unit = std::string(event.fields.substr(blank + 1, colon - blank - 1));
  std::string_view rest = event.fields.substr(colon + 2);
  for (uint64_t& value : descriptor.words) {
    const std::string_view word = rest.substr(0, rest.find(' '));
    const auto number = ParseNumber(word, 16);
    if (!number) return Wrong(event, "word of a descriptor", word);
    value = *number;
    rest.remove_prefix(std::min(rest.size(), word.size() + 1));
  }
  return descriptor;
}

}  // namespace

Result<VtdPageRequest> PageRequestOf(const KernelEvent& event) {
  if (!FieldOf(event.fields, "dw0")) return DecodedRequest(event);
  MVGPU_ASSIGN_OR_RETURN(const auto words, WordsIn(event, "dw"));
  auto request = VtdPageRequest::Decode(words);
  if (request) return *request;
  return Fail(ErrorCode::kCorrupt, fmt::format("a {} event with dw0={:#x}: {}", event.name,
                                               words[0], request.error().message()));
}

bool PageRequestEvents::Knows(const KernelEvent& event) {
  return (event.system.empty() || event.system == "intel_iommu") &&
         (event.name == "prq_report" || event.name == "qi_submit");
}

Result<void> PageRequestEvents::take(const KernelEvent& event, uint64_t now_ns) {
  now_ns_ = now_ns;
  return event.name == "prq_report" ? TakeRequest(event) : TakeDescriptor(event);
}

Result<void> PageRequestEvents::Skip(const KernelEvent& event) {
  builder_.skip(fmt::format("intel_iommu:{}", event.name));
  return {};
}

Result<void> PageRequestEvents::TakeRequest(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const VtdPageRequest request, PageRequestOf(event));
  MVGPU_ASSIGN_OR_RETURN(std::string unit, UnitOf(event));
  if (!request.reads && !request.writes) return Skip(event);
  return Touch(request, &spaces_[{std::move(unit), request.requester, request.pasid.value_or(0)}]);
}

Result<void> PageRequestEvents::TakeDescriptor(const KernelEvent& event) {
  MVGPU_ASSIGN_OR_RETURN(const Descriptor descriptor, DescriptorOf(event));
  const auto decoded = domain::DecodeInvalidation(descriptor.words, {});
  if (!decoded) return Skip(event);
  const auto* device_tlb = std::get_if<DeviceTlbInvalidation>(&*decoded);
  return device_tlb == nullptr ? Result<void>() : GiveUp(*device_tlb, descriptor.unit);
}

Result<uint64_t> PageRequestEvents::PlaceOf(uint64_t page, Pages* pages) {
  const uint64_t block = page / kBlockPages;
  auto found = pages->apart.find(block);
  if (found == pages->apart.end()) {
    MVGPU_ASSIGN_OR_RETURN(const IovaRange fresh, builder_.add_apart(BytesIn(kBlockPages)));
    found = pages->apart.emplace(block, fresh.start().page()).first;
  }
  return found->second + page % kBlockPages;
}

Result<void> PageRequestEvents::Touch(const VtdPageRequest& request, Pages* pages) {
  const uint64_t page = PagesIn(request.address);
  const auto found = pages->live.find(page);
  const bool is_live = found != pages->live.end();
  const Live before = is_live ? found->second : Live{};
  const bool reads = request.reads || before.is_readable;
  const bool writes = request.writes || before.is_writable;
  if (is_live && reads == before.is_readable && writes == before.is_writable) {
    return builder_.access_all(now_ns_, before.buffer);
  }
  MVGPU_ASSIGN_OR_RETURN(const uint64_t place, PlaceOf(page, pages));
  const IovaRange memory = RangeOf({place, 1});
  const auto direction = !writes  ? dma::Direction::kToDevice
                         : !reads ? dma::Direction::kFromDevice
                                  : dma::Direction::kBidirectional;
  MVGPU_ASSIGN_OR_RETURN(const uint32_t buffer, builder_.add_buffer({&memory, 1}, direction));
  MVGPU_RETURN_IF_ERROR(builder_.map(now_ns_, buffer));
  pages->live.insert_or_assign(page, Live{buffer, writes, reads});
  MVGPU_RETURN_IF_ERROR(builder_.access_all(now_ns_, buffer));
  return is_live ? builder_.unmap(now_ns_, before.buffer) : Result<void>();
}

Result<void> PageRequestEvents::GiveUp(const DeviceTlbInvalidation& what, const std::string& unit) {
  constexpr uint32_t kLastPasid = 0xfffff;
  const bool is_one = !what.all_pasids;
  const Space first{unit, what.source, is_one ? what.pasid.value_or(0) : 0};
  const Space last{unit, what.source, is_one ? first.pasid : kLastPasid};
  for (auto space = spaces_.lower_bound(first); space != spaces_.end() && space->first <= last;
       ++space) {
    auto& live = space->second.live;
    auto at = live.lower_bound(what.range.start().page());
    while (at != live.end() && at->first <= what.range.last().page()) {
      MVGPU_RETURN_IF_ERROR(builder_.unmap(now_ns_, at->second.buffer));
      at = live.erase(at);
    }
  }
  return {};
}

}  // namespace mvgpu::backend
