#include "apionly-domain/faults/vtd_page_records.h"

#include <fmt/format.h>

#include "apionly-domain/base/address.h"

namespace mvgpu::domain {

namespace {

constexpr uint64_t kRequestType = 1;
constexpr uint64_t kResponseType = 9;
constexpr uint64_t kResponseReserved0 = 0xfff0'0000'0000'0fe0;
constexpr uint64_t kResponseReserved1 = 0xffff'ffff'ffff'f003;
constexpr uint64_t kPasidMask = 0xfffff;
constexpr uint64_t kGroupMask = 0x1ff;
constexpr uint64_t kFailureCode = 0xf;

constexpr uint64_t Bit(bool value, unsigned at) { return uint64_t{value} << at; }
constexpr bool IsSet(uint64_t word, unsigned at) { return (word >> at & 1) != 0; }
constexpr uint32_t PasidOf(uint64_t word) { return static_cast<uint32_t>(word >> 32 & kPasidMask); }

// What the first words of both have: requester and PASID.
constexpr uint64_t Source(uint16_t requester, std::optional<uint32_t> pasid) {
  return uint64_t{requester} << 16 | (uint64_t{pasid.value_or(0)} & kPasidMask) << 32;
}

}  // namespace

VtdPageRequest::Words VtdPageRequest::encode() const {
  return {kRequestType | Bit(pasid.has_value(), 8) | Source(requester, pasid) | Bit(executes, 52) |
              Bit(is_privileged, 53),
          Bit(reads, 0) | Bit(writes, 1) | Bit(is_last, 2) | (group & kGroupMask) << 3 |
              (address & ~kPageMask),
          0, 0};
}

Result<VtdPageRequest> VtdPageRequest::Decode(const Words& words) {
  if ((words[0] & 0xff) != kRequestType) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("an entry of a page request queue is of type {}", words[0] & 0xff));
  }
  VtdPageRequest request;
  request.requester = static_cast<uint16_t>(words[0] >> 16);
  if (IsSet(words[0], 8)) request.pasid = PasidOf(words[0]);
  request.executes = IsSet(words[0], 52);
  request.is_privileged = IsSet(words[0], 53);
  request.reads = IsSet(words[1], 0);
  request.writes = IsSet(words[1], 1);
  request.is_last = IsSet(words[1], 2);
  request.group = static_cast<uint16_t>(words[1] >> 3 & kGroupMask);
  request.address = words[1] & ~kPageMask;
  return request;
}

VtdGroupResponse::Words VtdGroupResponse::encode() const {
  const uint64_t code =
      answer == FaultAnswer::kFailure ? kFailureCode : static_cast<uint64_t>(answer);
  return {kResponseType | Bit(pasid.has_value(), 4) | code << 12 | Source(requester, pasid),
          Bit(is_last, 2) | (group & kGroupMask) << 3};
}

Result<VtdGroupResponse> VtdGroupResponse::Decode(const Words& words) {
  const uint64_t code = words[0] >> 12 & 0xf;
  const bool is_known =
      code <= static_cast<uint64_t>(FaultAnswer::kInvalid) || code == kFailureCode;
  if ((words[0] & 0xf) != kResponseType || (words[0] & kResponseReserved0) != 0 ||
      (words[1] & kResponseReserved1) != 0 || !is_known) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{:#x} {:#x} is no page group response: wrong type, "
                            "code or reserved bits",
                            words[0], words[1]));
  }
  VtdGroupResponse response;
  response.requester = static_cast<uint16_t>(words[0] >> 16);
  if (IsSet(words[0], 4)) response.pasid = PasidOf(words[0]);
  response.group = static_cast<uint16_t>(words[1] >> 3 & kGroupMask);
  response.is_last = IsSet(words[1], 2);
  response.answer = code == kFailureCode ? FaultAnswer::kFailure : static_cast<FaultAnswer>(code);
  return response;
}

}  // namespace mvgpu::domain
