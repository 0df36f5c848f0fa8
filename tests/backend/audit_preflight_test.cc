// mvgpu-audit preflight, and what of the kernel's accounting it relies on.

#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "tests/backend/audit_fixture.h"

namespace mvgpu::domain {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using ::testing::Not;

constexpr uint64_t kMiB = 1ull << 20;
constexpr uint64_t kGiB = 1ull << 30;

class AuditPreflightTest : public AuditFixture {
 protected:
  // On any host: what it has is not looked at.
  nlohmann::json Plan(const std::string& arguments) const {
    const Outcome outcome = Run("preflight --json " + arguments);
    EXPECT_THAT(outcome.exit_code, AnyOf(0, 1)) << arguments;
    EXPECT_THAT(outcome.err, IsEmpty());
    return JsonOf(outcome);
  }
  static uint64_t LimitOf(const nlohmann::json& plan, const std::string& process) {
    for (const nlohmann::json& limit : plan["limits"]) {
      if (limit["process"] == process) return limit["bytes"];
    }
    return 0;
  }
  uint64_t VmmLimit(const std::string& arguments) const { return LimitOf(Plan(arguments), "VMM"); }
  uint64_t BackendLimit(const std::string& arguments) const {
    return LimitOf(Plan(arguments), "backend");
  }
  static uint64_t Charged(const nlohmann::json& plan, const std::string& counter) {
    uint64_t sum = 0;
    for (const nlohmann::json& charge : plan["charges"]) {
      if (charge["counter"] == counter) sum += charge["bytes"].get<uint64_t>();
    }
    return sum;
  }
  static nlohmann::json CheckOf(const nlohmann::json& plan, const std::string& what) {
    for (const nlohmann::json& check : plan["host"]["checks"]) {
      if (check["what"] == what) return check;
    }
    return nullptr;
  }
};

TEST_F(AuditPreflightTest, DevicesOfOneContainerShareItsMemory) {
  EXPECT_EQ(VmmLimit("--memory=8G --device=vfio"), 9 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --device=vfio=3"), 9 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --device=vfio --device=mdev"), 9 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --device=mdev"), 9 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --device=iommufd=3"), 9 * kGiB);
}

TEST_F(AuditPreflightTest, BehindAVirtualIommuEveryDevicePaysForItself) {
  EXPECT_EQ(VmmLimit("--memory=8G --viommu --device=vfio"), 9 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --viommu --device=vfio=3"), 25 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --viommu --device=vfio --device=mdev"), 17 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --viommu --device=iommufd=3"), 25 * kGiB);
}

TEST_F(AuditPreflightTest, VdpaAndNvmeDevicesPayForThemselvesAlways) {
  EXPECT_EQ(VmmLimit("--memory=8G --device=vdpa=2"), 17 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --device=nvme=2"), 17 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --device=nvme=2 --device=vfio"), 25 * kGiB);
}

TEST_F(AuditPreflightTest, TheLargestCounterDecidesNotTheSum) {
  const auto plan = Plan("--memory=8G --device=vfio --device=vdpa=2 --device=iommufd");
  EXPECT_EQ(Charged(plan, "VmLck"), 8 * kGiB);
  EXPECT_EQ(Charged(plan, "VmPin"), 16 * kGiB);
  EXPECT_EQ(Charged(plan, "user"), 8 * kGiB);
  EXPECT_EQ(LimitOf(plan, "VMM"), 17 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --device=vfio --device=iommufd --iommufd-per-process"),
            17 * kGiB);
}

TEST_F(AuditPreflightTest, LockedMemoryAddsToVfioInTheSameCounter) {
  EXPECT_EQ(VmmLimit("--memory=8G --locked"), 9 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --locked --device=vfio"), 17 * kGiB);
  EXPECT_EQ(VmmLimit("--memory=8G --locked --device=vdpa"), 9 * kGiB);
}

TEST_F(AuditPreflightTest, AVgpuNeedsItsPinLimitInAProcessOfItsOwn) {
  const auto plan = Plan("--memory=8G --device=vgpu=2 --vgpu-pin-limit=64M");
  EXPECT_EQ(LimitOf(plan, "VMM"), 0u);
  EXPECT_EQ(LimitOf(plan, "backend"), 64 * kMiB);
  EXPECT_EQ(plan["limits"][0]["processes"], 2);
  EXPECT_EQ(Charged(plan, "VmLck"), 128 * kMiB);
  EXPECT_EQ(plan["shared"]["bytes"], 128 * kMiB);
  EXPECT_EQ(BackendLimit("--memory=8G --device=vgpu"), 8 * kGiB);
  EXPECT_EQ(BackendLimit("--memory=8G --device=vgpu --vgpu-pin-limit=9G"), 8 * kGiB);
  EXPECT_EQ(BackendLimit("--memory=8G --device=vgpu --vgpu-pin=none"), 0u);
}

TEST_F(AuditPreflightTest, WhatCountsPerUserAddsUpOverProcesses) {
  const auto plan =
      Plan("--memory=8G --device=iommufd --device=vgpu=2 --vgpu-pin=io-uring --vgpu-pin-limit=64M");
  EXPECT_EQ(Charged(plan, "user"), 8 * kGiB + 128 * kMiB);
  EXPECT_EQ(LimitOf(plan, "VMM"), 9 * kGiB + 128 * kMiB);
  EXPECT_EQ(LimitOf(plan, "backend"), 8 * kGiB + 128 * kMiB + 2 * 2 * kMiB);
  EXPECT_EQ(BackendLimit("--memory=8G --device=vgpu --vgpu-pin=io-uring --vgpu-pin-limit=64M"),
            66 * kMiB);
  // A VMM that has nothing in that counter is not held to it.
  EXPECT_EQ(VmmLimit("--memory=1G --device=vfio --device=vgpu=9 --vgpu-pin=io-uring"), 2 * kGiB);
}

TEST_F(AuditPreflightTest, SharedMemoryIsNeverMoreThanTheGuests) {
  EXPECT_EQ(Plan("--memory=8G --viommu --device=vfio=3 --device=vgpu")["shared"]["bytes"],
            8 * kGiB);
  EXPECT_EQ(Plan("--memory=8G --device=vgpu=3 --vgpu-pin-limit=5G")["shared"]["bytes"], 8 * kGiB);
  EXPECT_EQ(Plan("--memory=8G")["shared"]["bytes"], 0);
}

// qemuDomainGetMemLockLimitBytes(): (vdpa + nvme + hostdevs, or 1 for all of these without a
// vIOMMU) x memory + 1 GiB.
TEST_F(AuditPreflightTest, LibvirtsRuleIsShownBeside) {
  const auto libvirt = [this](const std::string& arguments) {
    return Plan(arguments)["libvirt"]["bytes"];
  };
  EXPECT_EQ(libvirt("--memory=8G --device=vfio=2"), 9 * kGiB);
  // What libvirt tried to set in kubevirt/kubevirt#17805: 2 GPUs, a vIOMMU and 8 GiB.
  EXPECT_EQ(libvirt("--memory=8G --device=vfio=2 --viommu"), 18253611008);
  EXPECT_EQ(libvirt("--memory=8G --device=vfio=2 --device=vdpa=2 --device=nvme"), 33 * kGiB);
  EXPECT_EQ(libvirt("--memory=8G --device=iommufd --device=mdev --viommu"), 17 * kGiB);
  EXPECT_EQ(libvirt("--memory=8G --device=vgpu"), 0);
  EXPECT_EQ(libvirt("--memory=8G --device=vfio --locked"), nullptr);
}

TEST_F(AuditPreflightTest, TheLargestRequestIsExact) {
  const auto plan = Plan("--memory=4P --device=vfio=1024 --viommu --locked");
  EXPECT_EQ(LimitOf(plan, "VMM"), (1025ull << 52) + kGiB);
  EXPECT_EQ(plan["host"]["enough"], false);
}

TEST_F(AuditPreflightTest, SizesHaveBinaryUnits) {
  for (const char* size : {"1073741824", "1048576K", "1024m", "1G", "1GB", "1GiB"}) {
    EXPECT_EQ(Plan(std::string("--memory=") + size)["memory_bytes"], kGiB) << size;
  }
}

TEST_F(AuditPreflightTest, RoomForOneMoreDeviceIsTold) {
  const auto room = [this](const std::string& arguments) {
    const auto figure = Plan(arguments)["hot_plug"];
    EXPECT_THAT(figure["why"].get<std::string>(), HasSubstr("to plug in one more vfio device"));
    return figure;
  };
  // The first one has all of the memory mapped at the attach, others come into its container.
  EXPECT_EQ(room("--memory=8G --device=vgpu")["bytes"], 9 * kGiB);
  EXPECT_THAT(room("--memory=8G --device=vgpu")["why"].get<std::string>(),
              HasSubstr("9 GiB more, or the attach fails"));
  EXPECT_EQ(room("--memory=8G --device=vfio")["bytes"], 9 * kGiB);
  EXPECT_THAT(room("--memory=8G --device=vfio")["why"].get<std::string>(), HasSubstr("as now"));
  EXPECT_EQ(room("--memory=8G --device=vfio=2 --viommu")["bytes"], 25 * kGiB);
  // Another counter than iommufd's, which needs as much.
  EXPECT_EQ(room("--memory=8G --device=iommufd")["bytes"], 9 * kGiB);
  EXPECT_THAT(room("--memory=8G --device=nvme")["why"].get<std::string>(),
              HasSubstr("8 GiB more, or the attach fails"));
  EXPECT_EQ(room("--memory=8G --device=nvme=1024")["bytes"], (1025 * 8 + 1) * kGiB);
}

TEST_F(AuditPreflightTest, SnippetsAreReadyToPaste) {
  const auto plan =
      Plan("--memory=8G --viommu --device=vfio=2 --device=vgpu --vgpu-pin-limit=64M")["snippets"];
  EXPECT_EQ(plan["systemd"],
            "# unit of the VMM\n"
            "[Service]\n"
            "LimitMEMLOCK=18253611008\n"
            "# unit of mvgpu-backend\n"
            "[Service]\n"
            "LimitMEMLOCK=67108864\n");
  EXPECT_EQ(plan["libvirt"],
            "<!-- also limits the memory that QEMU may use: add what it needs beside the guest's "
            "-->\n"
            "<memtune>\n"
            "  <hard_limit unit='KiB'>17825792</hard_limit>\n"
            "</memtune>\n");
  EXPECT_EQ(plan["kubevirt"],
            "# feature gate ReservedOverheadMemlock; the pod requests the overhead as memory, too\n"
            "spec:\n"
            "  domain:\n"
            "    memory:\n"
            "      guest: 8Gi\n"
            "      reservedOverhead:\n"
            "        addedOverhead: 9Gi\n"
            "        memLock: Required\n"
            "# mvgpu-backend's container has the limit of the container runtime's unit:\n"
            "# LimitMEMLOCK=67108864 or more\n");
}

TEST_F(AuditPreflightTest, SnippetsSetNothingWhereNothingIsNeeded) {
  const auto plan = Plan("--memory=8G --device=vgpu --vgpu-pin=none")["snippets"];
  EXPECT_EQ(plan["systemd"], "# nothing to set: no process locks memory\n");
  EXPECT_EQ(plan["libvirt"], "<!-- nothing to set: no device in the VMM locks memory -->\n");
  EXPECT_EQ(plan["kubevirt"], "# nothing to set: no device in the VMM locks memory\n");
}

TEST_F(AuditPreflightTest, TextExplainsEveryFigureInALineThatFits) {
  const std::vector<std::string> requests = {
      "--memory=8G",
      "--memory=8G --viommu --device=vfio=2 --device=vdpa --device=vgpu --vgpu-pin-limit=64M",
      "--memory=512G --viommu --device=vfio=200 --device=mdev=200 --device=iommufd=200 "
      "--device=vdpa=100 --device=nvme=100 --device=vgpu=200 --locked --vgpu-pin=io-uring",
      "--memory=8G --device=iommufd=200 --device=vgpu=200 --vgpu-pin-limit=9G",
      "--memory=8G --device=iommufd=200 --iommufd-per-process --viommu"};
  for (const std::string& request : requests) {
    const Outcome outcome = Run("preflight " + request);
    std::istringstream lines(outcome.out);
    for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
    const auto plan = Plan(request);
    for (const char* part : {"charges", "limits"}) {
      for (const auto& entry : plan[part]) {
        EXPECT_THAT(outcome.out, HasSubstr(entry["why"].get<std::string>() + "\n"));
      }
    }
    EXPECT_THAT(outcome.out, HasSubstr(plan["libvirt"]["why"].get<std::string>() + "\n"));
    EXPECT_THAT(outcome.out, HasSubstr(plan["shared"]["why"].get<std::string>() + "\n"));
    for (const auto& check : plan["host"]["checks"]) {
      EXPECT_THAT(outcome.out, HasSubstr(check["message"].get<std::string>() + "\n"));
    }
  }
}

TEST_F(AuditPreflightTest, ALimitThatIsTooSmallIsNamedWithItsRemedy) {
  const std::string request = "preflight --memory=64M --device=vgpu --vgpu-pin-limit=128K";
  const Outcome enough = Run(request, "ulimit -S -l 128; ");
  EXPECT_EQ(enough.exit_code, 0);
  EXPECT_THAT(enough.out, AllOf(HasSubstr("enough  RLIMIT_MEMLOCK, backend: 128 KiB, 128 KiB "
                                          "needed\n"),
                                Not(HasSubstr("too small"))));
  const Outcome soft = Run(request, "ulimit -S -l 127; ");
  EXPECT_EQ(soft.exit_code, 1);
  EXPECT_THAT(soft.out, HasSubstr("too small  RLIMIT_MEMLOCK, backend: 127 KiB, 128 KiB needed; "
                                  "ulimit -l 128\n"));
  const Outcome hard = Run(request, "ulimit -l 64; ");
  EXPECT_EQ(hard.exit_code, 1);
  EXPECT_THAT(hard.out, HasSubstr("too small  RLIMIT_MEMLOCK, backend: 64 KiB, 128 KiB needed; "
                                  "hard limit 64 KiB, see snippets\n"));
  const auto check =
      CheckOf(JsonOf(Run(request + " --json", "ulimit -l 64; ")), "RLIMIT_MEMLOCK, backend");
  EXPECT_EQ(check["current"], 64 * 1024);
  EXPECT_EQ(check["needed"], 128 * 1024);
  EXPECT_EQ(check["enough"], false);
}

TEST_F(AuditPreflightTest, AHostWithLessMemoryThanWillBeHeldIsTooSmall) {
  const auto plan = Plan("--memory=4P --device=vgpu");
  const auto check = CheckOf(plan, "memory of the host");
  EXPECT_EQ(check["enough"], false);
  EXPECT_EQ(check["needed"], 1ull << 52);
  EXPECT_EQ(CheckOf(Plan("--memory=4P --device=vgpu --vgpu-pin-limit=1M"),
                    "memory of the host")["enough"],
            true);
}

TEST_F(AuditPreflightTest, IoUringIsLookedAtWhereItIsUsed) {
  uint64_t disabled = 0;
  std::ifstream file("/proc/sys/kernel/io_uring_disabled");
  const std::string request = "--memory=64M --device=vgpu --vgpu-pin-limit=1M";
  EXPECT_EQ(CheckOf(Plan(request), "kernel.io_uring_disabled"), nullptr);
  const auto check = CheckOf(Plan(request + " --vgpu-pin=io-uring"), "kernel.io_uring_disabled");
  if (!(file >> disabled)) {
    EXPECT_EQ(check, nullptr);  // Linux before 6.6
  } else {
    EXPECT_EQ(check["current"], disabled);
    EXPECT_EQ(check["enough"], disabled == 0);
  }
}

TEST_F(AuditPreflightTest, HostileRequestsAreRefusedInOneLine) {
  ExpectRefused("preflight", "--memory is required");
  const auto refused = [this](const std::string& arguments, const std::string& text) {
    ExpectRefused("preflight " + arguments, text);
  };
  refused("--memory=", "--memory");
  refused("--memory=8", "of 8 bytes is no size of a guest's memory");
  refused("--memory=0", "no size of a guest's memory");
  refused("--memory=-1G", "'-1G' is no size");
  refused("--memory=-18446744065119617024", "is no size");  // 8G, were it to wrap around
  refused("--memory=99999999999999999999G", "is no size");
  refused("--memory=18446744073709551616", "is no size");  // 2^64
  refused("--memory=17E", "overflow");
  refused("--memory=8P", "give 1 MiB to 4 PiB");
  refused("--memory=1048577", "no whole number of pages");
  refused("--memory=1.5G", "--memory");
  refused("--memory=8X", "--memory");
  refused("--memory=8G --memory=4G", "--memory");
  refused("--memory=8G --device=teapot", "choose one of: vfio, iommufd, mdev, vdpa, nvme, vgpu");
  refused("--memory=8G --device=", "--device");
  for (const char* count : {"", "0", "-1", "1025", "4294967297", "99999999999999999999", "2x"}) {
    refused(std::string("--memory=8G --device=vfio=") + count, "give 1 to 1024");
  }
  refused("--memory=8G --device=vfio=1024 --device=vdpa", "1025 devices in all");
  refused("--memory=8G --vgpu-pin-limit=4095", "less than a page");
  refused("--memory=8G --vgpu-pin-limit=4097", "no whole number of pages");
  refused("--memory=8G --vgpu-pin-limit=-4K", "is no size");
  refused("--memory=8G --vgpu-pin=glue", "choose one of: io-uring, mlock, none");
  refused("--memory=8G vgpu", "vgpu");
}

TEST_F(AuditPreflightTest, OutputThatCannotBeWrittenIsAnError) {
  for (const char* verb : {"preflight --memory=8G", "show --runtime-dir=/nonexistent",
                           "watch --count=1 --runtime-dir=/nonexistent"}) {
    const Outcome outcome = Run(std::string(verb) + " >/dev/full");
    EXPECT_EQ(outcome.exit_code, 4) << verb;
    EXPECT_THAT(outcome.err, MatchesRegex("mvgpu-audit: cannot write to stdout: [^\n]*\n"));
  }
}

// The rule that preflight rests on, asked of the kernel: a limit of 1 MiB admits 768 KiB of mlock
// and 768 KiB of io_uring's buffers in one process, and neither a second time. (Not 1 MiB: since
// Linux 6.14 the rings themselves count as well.)
enum Answer { kTrue = 10, kNoIoUring, kNoMlock, kNoBuffers, kTooMuchMlock, kTooManyBuffers };
int AskKernel() {
  constexpr size_t kLimit = 1 << 20;
  constexpr size_t kPart = kLimit / 4 * 3;
  char* memory = static_cast<char*>(
      mmap(nullptr, 4 * kPart, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  madvise(memory, 4 * kPart, MADV_NOHUGEPAGE);  // a huge page counts in full
  const struct rlimit limit = {kLimit, kLimit};
  // A user that has no capability, and nothing else that runs.
  constexpr uid_t kNobody = 61234;
  if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || syscall(SYS_setresuid, kNobody, kNobody, kNobody)) {
    return kNoIoUring;
  }
  struct io_uring one = {};
  struct io_uring two = {};
  if (io_uring_queue_init(1, &one, 0) != 0 || io_uring_queue_init(1, &two, 0) != 0) {
    return kNoIoUring;
  }
  // The sanitizers replace mlock().
  if (syscall(SYS_mlock, memory, kPart) != 0) return kNoMlock;
  const struct iovec fits = {memory + 2 * kPart, kPart};
  if (io_uring_register_buffers(&one, &fits, 1) != 0) return kNoBuffers;
  if (syscall(SYS_mlock, memory + kPart, kPart) == 0) return kTooMuchMlock;
  const struct iovec more = {memory + 3 * kPart, kPart};
  if (io_uring_register_buffers(&two, &more, 1) == 0) return kTooManyBuffers;
  return kTrue;
}

TEST_F(AuditPreflightTest, TheKernelComparesEachCounterWithTheLimitByItself) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become a user that has nothing locked";
  const pid_t child = Fork([] { _exit(AskKernel()); });
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == kNoIoUring) GTEST_SKIP() << "io_uring is not to be had here";
  EXPECT_EQ(WEXITSTATUS(status), kTrue);
}

}  // namespace
}  // namespace mvgpu::domain
