#include <fmt/format.h>

#include <bit>
#include <span>
#include <utility>
#include <vector>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/unique_fd.h"
#include "vmm-glue/vfio_user/commands.h"
#include "vmm-glue/vfio_user/protocol.h"

namespace mvgpu::glue::vfio_user {

namespace {

// A SET_IRQS request after validation.
struct Request {
  SetIrqs head{};
  std::span<const std::byte> bools;

  uint32_t data() const { return head.flags & kIrqDataMask; }
  uint32_t action() const { return head.flags & kIrqActionsMask; }
};

Result<void> CheckFlags(const SetIrqs& head) {
  const uint32_t data = head.flags & kIrqDataMask;
  const uint32_t action = head.flags & kIrqActionsMask;
  if (head.flags != (data | action) || !std::has_single_bit(data) || !std::has_single_bit(action)) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("flags are {:#x}, one data type and one action are needed", head.flags));
  }
  // An eventfd by which the client masks or unmasks is of use for INTx under KVM only, which no
  // device here has.
  if (data == kIrqDataEventfd && action != kIrqActionTrigger) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("flags are {:#x}, eventfds can only be triggered", head.flags));
  }
  if ((head.index == kIrqErr || head.index == kIrqReq) && action != kIrqActionTrigger) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("interrupt {} can only be triggered, flags are {:#x}", head.index, head.flags));
  }
  return {};
}

Result<void> CheckVectors(const SetIrqs& head, uint32_t available) {
  if (head.count == 0) {
    if (head.start == 0 && head.flags == (kIrqDataNone | kIrqActionTrigger)) return {};
    return Fail(
        ErrorCode::kInvalid,
        fmt::format("count 0 with start {} and flags {:#x}, it disables with 0 and {:#x} only",
                    head.start, head.flags, kIrqDataNone | kIrqActionTrigger));
  }
  const auto end = CheckedAdd(head.start, head.count);
  if (!end || *end > available) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("start {} and count {}, interrupt {} has {} vectors", head.start,
                            head.count, head.index, available));
  }
  return {};
}

Result<void> CheckData(const Request& request, size_t fds) {
  const SetIrqs& head = request.head;
  const bool is_eventfd = request.data() == kIrqDataEventfd;
  if (fds != 0 && (!is_eventfd || fds != head.count)) {
    return Fail(ErrorCode::kInvalid, fmt::format("{} descriptors for count {} and flags {:#x}", fds,
                                                 head.count, head.flags));
  }
  if (request.data() == kIrqDataBool && request.bools.size() != head.count) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{} bools for count {}", request.bools.size(), head.count));
  }
  return {};
}

Result<Request> ParseRequest(const VfioDevice& device, const Message& message) {
  Request request;
  MVGPU_ASSIGN_OR_RETURN(request.head, ReadArguments<SetIrqs>(message.payload));
  request.bools = std::span(message.payload).subspan(sizeof(SetIrqs));
  if (request.head.index >= kIrqCount) {
    return Fail(ErrorCode::kInvalid, fmt::format("interrupt index is {}, the device has {}",
                                                 request.head.index, kIrqCount));
  }
  MVGPU_RETURN_IF_ERROR(CheckFlags(request.head));
  MVGPU_RETURN_IF_ERROR(CheckVectors(request.head, device.irq_info(request.head.index).count));
  MVGPU_RETURN_IF_ERROR(CheckData(request, message.fds.size()));
  return request;
}

}  // namespace

// The forms of linux/vfio.h's VFIO_DEVICE_SET_IRQS. Eventfds without any descriptor unbind those
// vectors and leave the index enabled: QEMU says "MSI-X is on, no vector yet" that way.
Result<void> SetDeviceIrqs(VfioDevice& device, Message& message, Payload&) {
  MVGPU_ASSIGN_OR_RETURN(const Request request, ParseRequest(device, message));
  const SetIrqs& head = request.head;
  if (head.count == 0) {
    device.disable_irqs(head.index);
    return {};
  }
  if (request.data() == kIrqDataEventfd) {
    std::vector<UniqueFd> eventfds = std::move(message.fds);
    eventfds.resize(head.count);
    device.bind_irqs(head.index, head.start, std::move(eventfds));
    return {};
  }
  for (uint32_t i = 0; i < head.count; ++i) {
    if (request.data() == kIrqDataBool && request.bools[i] == std::byte{0}) continue;
    if (request.action() == kIrqActionTrigger) {
      device.trigger_irq(head.index, head.start + i);
    } else {
      device.set_irq_masked(head.index, head.start + i, request.action() == kIrqActionMask);
    }
  }
  return {};
}

}  // namespace mvgpu::glue::vfio_user
