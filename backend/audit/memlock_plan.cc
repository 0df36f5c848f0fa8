#include "backend/audit/memlock_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <numeric>
#include <utility>

#include "apionly-domain/base/address.h"
#include "apionly-domain/pin/io_uring_pin_backend.h"
#include "backend/audit/console.h"

namespace mvgpu::backend {

namespace {

using Process = MemlockPlan::Process;
using Counter = MemlockPlan::Counter;

// VFIO, vDPA and mlock also count the VMM's memory that is no RAM of the guest: firmware, option
// ROMs, video memory of emulated devices. Nobody knows how much; libvirt adds this. (BARs are
// mapped, but not counted.)
constexpr uint64_t kHeadroom = 1ull << 30;
// io_uring's back end registers what stays of a buffer before it drops the whole; since Linux 6.14
// its rings count, too.
constexpr uint64_t kIoUringSpare = BytesIn(domain::IoUringPinBackend::kMaxBufferPages);

static_assert(MemlockRequest::kMaxMemory <=
              (UINT64_MAX - kHeadroom) / (MemlockRequest::kMaxDevices + 2) - kIoUringSpare);

constexpr std::array kKindNames = {"vfio", "iommufd", "mdev", "vdpa", "nvme", "vgpu"};
static_assert(kKindNames.size() == kDeviceKinds);

std::string Names() { return fmt::format("{}", fmt::join(kKindNames, ", ")); }

uint64_t VgpuBytes(const MemlockRequest& request) {
  if (request.vgpu_pin == PinMode::kNone) return 0;
  return std::min(request.vgpu_pin_limit_bytes.value_or(UINT64_MAX), request.memory_bytes);
}

// Assembles a plan charge by charge.
class Planner {
 public:
  explicit Planner(const MemlockRequest& request) : request_(request) {}

  MemlockPlan Run() && {
    ChargeVfio();
    ChargeIommufd();
    ChargeOthersOfVmm();
    ChargeVgpus();
    LimitVmm();
    LimitBackends();
    plan_.shared = Shared();
    plan_.libvirt = Libvirt();
    return std::move(plan_);
  }

 private:
  uint32_t Count(DeviceKind kind) const { return request_.count(kind); }

  void Charge(Process process, Counter counter, uint64_t bytes, std::string why) {
    plan_.charges.push_back({process, counter, bytes, std::move(why)});
  }

  // Without a vIOMMU all groups are put into one container; with one each has an address space.
  void ChargeVfio() {
    const uint32_t vfio = Count(DeviceKind::kVfio);
    const uint32_t mdev = Count(DeviceKind::kMdev);
    if (vfio + mdev == 0) return;
    std::string who = vfio == 0   ? fmt::format("{} x mdev", mdev)
                      : mdev == 0 ? fmt::format("{} x vfio", vfio)
                                  : fmt::format("{} x vfio, {} x mdev", vfio, mdev);
    const uint32_t containers = request_.viommu ? vfio + mdev : 1;
    Charge(Process::kVmm, Counter::kVmLck, containers * request_.memory_bytes,
           containers > 1 ? who + ": a container each (vIOMMU), all memory in each"
           : vfio == 0    ? who + ": what it pins, at most all memory, once per container"
                          : who + ": all memory, once, in one container");
  }

  void ChargeIommufd() {
    const uint32_t count = Count(DeviceKind::kIommufd);
    if (count == 0) return;
    const uint32_t spaces = request_.viommu ? count : 1;
    const char* const mode =
        request_.iommufd_per_process ? "per process" : "over all VMs of the user";
    Charge(Process::kVmm, request_.iommufd_per_process ? Counter::kVmLck : Counter::kUser,
           spaces * request_.memory_bytes,
           spaces > 1
               ? fmt::format("{} x iommufd: all memory in an IOAS each (vIOMMU); {}", count, mode)
               : fmt::format("{} x iommufd: all memory, once, in one IOAS; {}", count, mode));
  }

  void ChargeOthersOfVmm() {
    if (const uint32_t count = Count(DeviceKind::kNvme); count > 0) {
      Charge(Process::kVmm, Counter::kVmLck, count * request_.memory_bytes,
             fmt::format("{} x nvme: a container each, all memory in each", count));
    }
    if (const uint32_t count = Count(DeviceKind::kVdpa); count > 0) {
      Charge(Process::kVmm, Counter::kVmPin, count * request_.memory_bytes,
             fmt::format("{} x vdpa: all memory for each, CAP_IPC_LOCK or not", count));
    }
    if (request_.locked) {
      Charge(Process::kVmm, Counter::kVmLck, request_.memory_bytes,
             "memory that the VMM locks: mlock and VFIO both add to VmLck");
    }
  }

  void ChargeVgpus() {
    const uint64_t each = VgpuBytes(request_);
    const uint32_t count = Count(DeviceKind::kVgpu);
    if (count == 0 || each == 0) return;
    const char* const bound = each < request_.memory_bytes    ? "the pin limit each"
                              : request_.vgpu_pin_limit_bytes ? "all memory (pin limit no less)"
                                                              : "all memory (no --vgpu-pin-limit)";
    const Counter counter =
        request_.vgpu_pin == PinMode::kIoUring ? Counter::kUser : Counter::kVmLck;
    Charge(Process::kBackend, counter, count * each,
           fmt::format("{} x vgpu: what it touches, at most {}", count, bound));
  }

  uint64_t Sum(Counter counter) const {
    uint64_t sum = 0;
    for (const MemlockPlan::Charge& charge : plan_.charges) {
      // What counts per user counts for everybody of that user.
      const bool counts = charge.process == Process::kVmm || counter == Counter::kUser;
      if (counts && charge.counter == counter) sum += charge.bytes;
    }
    return sum;
  }

  void LimitVmm() {
    const auto charged = [this](Counter counter) {
      return std::any_of(plan_.charges.begin(), plan_.charges.end(), [&](const auto& charge) {
        return charge.process == Process::kVmm && charge.counter == counter;
      });
    };
    uint64_t largest = 0;
    Counter decides = Counter::kVmLck;
    for (const Counter counter : {Counter::kVmLck, Counter::kVmPin, Counter::kUser}) {
      if (!charged(counter) || Sum(counter) <= largest) continue;
      largest = Sum(counter);
      decides = counter;
    }
    if (largest == 0) return;
    plan_.limits.push_back(
        {Process::kVmm, 1, largest + kHeadroom,
         fmt::format("{}, the largest counter, + 1 GiB for firmware, ROMs and video memory",
                     CounterName(decides))});
  }

  void LimitBackends() {
    const uint64_t each = VgpuBytes(request_);
    const uint32_t count = Count(DeviceKind::kVgpu);
    if (count == 0 || each == 0) return;
    if (request_.vgpu_pin == PinMode::kIoUring) {
      plan_.limits.push_back({Process::kBackend, count, Sum(Counter::kUser) + count * kIoUringSpare,
                              "sum of the user with the VMM, + 2 MiB per vgpu"});
    } else {
      plan_.limits.push_back({Process::kBackend, count, each,
                              "VmLck (scattered pages: whole granules while they fit)"});
    }
  }

  MemlockPlan::Figure Shared() const {
    const bool all =
        std::any_of(plan_.charges.begin(), plan_.charges.end(),
                    [](const auto& charge) { return charge.process == Process::kVmm; });
    const uint64_t vgpus = Count(DeviceKind::kVgpu) * VgpuBytes(request_);
    return {all ? request_.memory_bytes : std::min(request_.memory_bytes, vgpus),
            "every page once: the most that is held at a time, and what mvgpu charges"};
  }

  // libvirt's qemuDomainGetMemLockLimitBytes() of 8.7.0 (commit 8d5704e2c4) and later, for x86.
  // Hostdevs count alike whether they use VFIO, iommufd or mdev.
  MemlockPlan::Figure Libvirt() const {
    if (request_.locked) return {std::nullopt, "no limit, for <memoryBacking><locked/>"};
    const uint32_t hostdevs =
        Count(DeviceKind::kVfio) + Count(DeviceKind::kIommufd) + Count(DeviceKind::kMdev);
    const uint32_t others = Count(DeviceKind::kVdpa) + Count(DeviceKind::kNvme);
    if (hostdevs + others == 0) return {0, "no device that it raises the limit for"};
    const uint32_t factor = others + (request_.viommu ? hostdevs : std::min(hostdevs, 1u));
    return {factor * request_.memory_bytes + kHeadroom,
            fmt::format("{} x memory + 1 GiB: vdpa + nvme + {}", factor,
                        request_.viommu ? "hostdevs (vIOMMU)" : "1 for all hostdevs")};
  }

  const MemlockRequest& request_;
  MemlockPlan plan_;
};

// The limit is compared at the attach, when all of the guest's memory is mapped for the new device.
MemlockPlan::Figure HotPlug(const MemlockPlan& now, const MemlockPlan& then) {
  const MemlockPlan::Limit* const limit = now.limit_of(Process::kVmm);
  const uint64_t bytes = then.limit_of(Process::kVmm)->bytes;
  const uint64_t more = bytes - (limit == nullptr ? 0 : limit->bytes);
  if (more == 0) return {bytes, "VMM, to plug in one more vfio device later: as now"};
  return {bytes, fmt::format("VMM, to plug in one more vfio device later: {} more, or the attach "
                             "fails",
                             SizeText(more))};
}

Result<void> CheckPages(const char* option, uint64_t bytes) {
  if (bytes % kPageSize == 0) return {};
  return Fail(ErrorCode::kInvalid,
              fmt::format("{} of {} bytes is no whole number of pages of {} bytes", option, bytes,
                          kPageSize));
}

}  // namespace

std::string_view DeviceKindName(DeviceKind kind) { return kKindNames[static_cast<size_t>(kind)]; }

std::string_view ProcessName(Process process) {
  return process == Process::kVmm ? "VMM" : "backend";
}

std::string_view CounterName(Counter counter) {
  switch (counter) {
    case Counter::kVmLck:
      return "VmLck";
    case Counter::kVmPin:
      return "VmPin";
    case Counter::kUser:
      break;
  }
  return "user";
}

Result<void> MemlockRequest::add_device(std::string_view text) {
  const std::string_view kind = text.substr(0, text.find('='));
  const auto name = std::find(kKindNames.begin(), kKindNames.end(), kind);
  if (name == kKindNames.end()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("--device '{}' is not known, choose one of: {}", kind, Names()));
  }
  uint32_t added = 1;
  if (kind.size() < text.size()) {
    const std::string_view digits = text.substr(kind.size() + 1);
    const char* const end = digits.data() + digits.size();
    const auto parsed = std::from_chars(digits.data(), end, added);
    if (parsed.ec != std::errc() || parsed.ptr != end || added < 1 || added > kMaxDevices) {
      return Fail(ErrorCode::kInvalid,
                  fmt::format("--device {}: '{}' is no number of devices, give 1 to {}", kind,
                              digits, kMaxDevices));
    }
  }
  const uint32_t before = std::accumulate(devices.begin(), devices.end(), 0u);
  if (before + added > kMaxDevices) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("--device {}: {} devices in all, at most {} can be "
                            "asked about at a time",
                            text, before + added, kMaxDevices));
  }
  devices[static_cast<size_t>(name - kKindNames.begin())] += added;
  return {};
}

Result<void> MemlockRequest::check() const {
  if (memory_bytes < kMinMemory || memory_bytes > kMaxMemory) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("--memory of {} bytes is no size of a guest's memory, give {} to {}, "
                            "for example 8G",
                            memory_bytes, SizeText(kMinMemory), SizeText(kMaxMemory)));
  }
  MVGPU_RETURN_IF_ERROR(CheckPages("--memory", memory_bytes));
  if (!vgpu_pin_limit_bytes) return {};
  if (*vgpu_pin_limit_bytes < kPageSize) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("--vgpu-pin-limit of {} bytes is less than a page; give 4K or more, or "
                            "leave it out for no limit",
                            *vgpu_pin_limit_bytes));
  }
  return CheckPages("--vgpu-pin-limit", *vgpu_pin_limit_bytes);
}

const MemlockPlan::Limit* MemlockPlan::limit_of(Process process) const {
  for (const Limit& limit : limits) {
    if (limit.process == process) return &limit;
  }
  return nullptr;
}

MemlockPlan PlanMemlock(const MemlockRequest& request) {
  MemlockPlan plan = Planner(request).Run();
  MemlockRequest with_one_more = request;
  ++with_one_more.devices[static_cast<size_t>(DeviceKind::kVfio)];
  const MemlockPlan then = Planner(with_one_more).Run();
  plan.hot_plug = HotPlug(plan, then);
  return plan;
}

}  // namespace mvgpu::backend
