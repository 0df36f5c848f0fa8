// A VMM's own assigned devices join the ledger. The VMM is a process of ours; what the kernel would
// say of one with VFIO devices stands in a directory in place of /proc.

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/backend/audit_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::IsOk;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;

constexpr uint64_t kRamBytes = 16u << 20;
constexpr uint64_t kRamPages = kRamBytes / 4096;

class AuditRegisterTest : public AuditFixture {
 protected:
  AuditRegisterTest() {
    vmm_ = Fork([] {
      while (true) pause();
    });
    proc_ = dir_ + "/proc";
    EXPECT_EQ(mkdir(proc_.c_str(), 0700), 0);
    EXPECT_EQ(mkdir(of_vmm().c_str(), 0700), 0);
    EXPECT_EQ(mkdir((of_vmm() + "/fd").c_str(), 0700), 0);
    std::ofstream(of_vmm() + "/comm") << "qemu-system-x86\n";
    SetFd(0, "/dev/null");
    SetFd(9, "/dev/vfio/vfio");
    SetFd(10, "/dev/vfio/12");
    SetFd(11, "anon_inode:[vfio-device]");
    SetCounters(kRamBytes / 1024, 0);
    SetMaps(Line("7f0000000000-7f0001000000", "rw-s", 0, ram_));
  }
  ~AuditRegisterTest() override {
    if (vmm_ > 0) Kill(vmm_);
  }

  std::string of_vmm() const { return proc_ + "/" + std::to_string(vmm_); }
  void SetFd(int fd, const char* target) const {
    const std::string link = of_vmm() + "/fd/" + std::to_string(fd);
    unlink(link.c_str());
    if (target != nullptr) {
      EXPECT_EQ(symlink(target, link.c_str()), 0);
    }
  }
  void SetCounters(uint64_t lck_kb, uint64_t pin_kb) const {
    std::ofstream(of_vmm() + "/status")
        << "Name:\tqemu\nVmLck:\t" << lck_kb << " kB\nVmPin:\t" << pin_kb << " kB\n";
  }
  static std::string Line(const std::string& range, const std::string& rights, uint64_t offset,
                          const FileIdentity& file) {
    char text[200];
    snprintf(text, sizeof text, "%s %s %08lx %02x:%02x %lu    /memfd:ram (deleted)\n",
             range.c_str(), rights.c_str(), offset, major(file.device), minor(file.device),
             file.inode);
    return text;
  }
  void SetMaps(const std::string& lines) const {
    std::ofstream(of_vmm() + "/maps")
        << "55d0c0000000-55d0c0100000 r-xp 00000000 fe:01 77    /usr/bin/qemu\n"
        << lines << "7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0    [stack]\n";
  }
  Outcome Register(const std::string& options = "") const {
    return Run("register --runtime-dir=" + dir_ + " --proc=" + proc_ +
               " --pid=" + std::to_string(vmm_) + " " + options);
  }
  // One line says why, and the ledger has no row more.
  void ExpectRefusal(const std::string& text, const std::string& options = "") const {
    const size_t rows = Look().rows.size();
    const Outcome outcome = Register(options);
    EXPECT_EQ(outcome.exit_code, 1) << outcome.out;
    EXPECT_THAT(outcome.out, IsEmpty());
    EXPECT_THAT(outcome.err, MatchesRegex("mvgpu-audit: [^\n]*\n"));
    EXPECT_THAT(outcome.err, HasSubstr(text));
    EXPECT_EQ(Look().rows.size(), rows);
  }

  const FileIdentity ram_{makedev(0, 42), 4711};
  std::string proc_;
  pid_t vmm_ = -1;
};

// A ledger in which the vgpu holds some of the RAM.
class AuditRegisterVmTest : public AuditRegisterTest {
 protected:
  AuditRegisterVmTest() : ledger_(Open()), vgpu_(Join(*ledger_, "vgpu")) {
    EXPECT_THAT(vgpu_->hold(ram_, kRamPages, {100, 50}), IsOk());
  }
  ~AuditRegisterVmTest() override { vgpu_->release(ram_, {100, 50}); }

  std::unique_ptr<Ledger> ledger_;
  std::unique_ptr<LedgerRow> vgpu_;
};

TEST_F(AuditRegisterVmTest, TheVmmsDevicesHoldAllOfItsMemoryUntilItEnds) {
  const Outcome outcome = Register();
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, std::string("vm ") + kVm + ": registered process " + std::to_string(vmm_) +
                             " (qemu-system-x86): row 1, 4096 pages, devices /dev/vfio/12 "
                             "anon_inode:[vfio-device]\n");
  ASSERT_THAT(vgpu_->hold(ram_, kRamPages, {1000, 50}), IsOk());  // not charged again
  EXPECT_EQ(vgpu_->counts(), (LedgerRow::Counts{100, 50}));
  const nlohmann::json row = ShowJson()["vms"][0]["domains"][1];
  EXPECT_EQ(row["name"], "qemu-system-x86");
  EXPECT_EQ(row["kind"], "assigned");
  EXPECT_EQ(row["pid"], vmm_);
  EXPECT_EQ(row["state"], "alive");
  EXPECT_EQ(row["registered"], true);
  EXPECT_EQ(row["pin_backend"], "vfio-type1");
  EXPECT_EQ(row["unique_pages"], kRamPages);
  EXPECT_EQ(row["charged_pages"], kRamPages - 50);
  ExpectRefusal("registered already, as row 1");
  vgpu_->release(ram_, {1000, 50});

  Kill(vmm_);
  EXPECT_THAT(Run("repair --runtime-dir=" + dir_).out, HasSubstr("dropped row 1"));
  vmm_ = -1;
  EXPECT_EQ(Look().rows.size(), 1u);
  EXPECT_EQ(vgpu_->counts(), (LedgerRow::Counts{50, 50}));
  ExpectInOrder();
}

TEST_F(AuditRegisterVmTest, UndoTakesTheRowOutAgain) {
  ExpectRefusal("is not registered", "--undo");
  ASSERT_EQ(Register().exit_code, 0);
  const Outcome outcome = Register("--undo");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, std::string("vm ") + kVm + ": withdrawn process " + std::to_string(vmm_) +
                             " (qemu-system-x86): row 1, 4096 pages\n");
  EXPECT_EQ(Look().rows.size(), 1u);
  ExpectInOrder();
  ASSERT_EQ(Register("--json").exit_code, 0);  // once more
  EXPECT_EQ(Look().rows.size(), 2u);
  // Also when its process has gone.
  Kill(vmm_);
  EXPECT_EQ(Register("--undo").exit_code, 0);
  vmm_ = -1;
  EXPECT_EQ(Look().rows.size(), 1u);
}

TEST_F(AuditRegisterVmTest, JsonSaysWhatWasDone) {
  const nlohmann::json json = JsonOf(Register("--json"));
  EXPECT_EQ(json["vm"], kVm);
  EXPECT_EQ(json["action"], "registered");
  EXPECT_EQ(json["pid"], vmm_);
  EXPECT_EQ(json["row"], 1);
  EXPECT_EQ(json["name"], "qemu-system-x86");
  EXPECT_EQ(json["pages"], kRamPages);
  EXPECT_EQ(json["devices"].dump(), R"(["/dev/vfio/12","anon_inode:[vfio-device]"])");
  EXPECT_EQ(JsonOf(Register("--undo --json"))["action"], "withdrawn");
}

TEST_F(AuditRegisterVmTest, ExplainShowsWhereTheVmmsDevicesSeeAPage) {
  const FileIdentity rom{makedev(0, 42), 4713};  // that the VMM maps in part
  const auto at = [](uint64_t start, uint64_t size) {
    return *IovaRange::FromStartAndSize(Iova(start), size);
  };
  vgpu_->list_mapping({at(0, 1 << 20), Access::kReadWrite, ram_, 0});
  vgpu_->list_mapping({at(1ull << 32, 15 << 20), Access::kRead, ram_, 1 << 20});
  vgpu_->list_mapping({at(3ull << 30, 4096), Access::kRead, rom, 0});
  auto second = Join(*ledger_, "vgpu1");  // sees what the first one does
  second->list_mapping({at(0, 1 << 20), Access::kReadWrite, ram_, 0});
  ASSERT_EQ(Register().exit_code, 0);

  const auto explain = [this](const std::string& question) {
    return Run("explain --runtime-dir=" + dir_ + " " + question);
  };
  const Outcome text = explain("0x64000");  // page 100, which vgpu has
  EXPECT_EQ(text.exit_code, 0) << text.err;
  EXPECT_THAT(text.out, HasSubstr("vgpu sees it read-write at iova 0x64000, in 0x0-0xfffff\n"));
  EXPECT_THAT(text.out, HasSubstr("qemu-system-x86 sees it read-write at iova 0x64000, in "
                                  "0x0-0xfffff (as a vgpu does)\n"));
  const auto high = JsonOf(explain("0x100005000 --json"))["vms"][0]["places"][0]["mappings"];
  ASSERT_EQ(high.size(), 2u);
  EXPECT_EQ(high[1]["name"], "qemu-system-x86");
  EXPECT_EQ(high[1]["first"], "0x100000000");
  EXPECT_EQ(high[1]["access"], "read");
  // Not what it does not hold.
  EXPECT_EQ(JsonOf(explain("0xc0000000 --json"))["vms"][0]["places"][0]["mappings"].size(), 1u);
  ASSERT_EQ(Register("--undo").exit_code, 0);
  EXPECT_EQ(JsonOf(explain("0x64000 --json"))["vms"][0]["places"][0]["mappings"].size(), 2u);
}

TEST_F(AuditRegisterVmTest, IommufdCountsAsPinned) {
  SetFd(9, "/dev/iommu");
  SetFd(10, "/dev/vfio/devices/vfio0");
  SetFd(11, nullptr);
  SetCounters(0, kRamBytes / 1024);
  ASSERT_EQ(Register().exit_code, 0);
  EXPECT_EQ(Look().rows[1].pin_backend, "iommufd");
}

TEST_F(AuditRegisterVmTest, MemoryThatIsMappedInPiecesIsWhole) {
  SetMaps(Line("7f0000800000-7f0001000000", "rw-s", 0x800000, ram_) +
          Line("7f1000000000-7f1000900000", "rw-s", 0, ram_));
  ASSERT_EQ(Register().exit_code, 0);
  EXPECT_EQ(Look().rows[1].unique_pages, kRamPages);
}

TEST_F(AuditRegisterVmTest, FileThatIsMappedButNotYetHeldIsKnown) {
  const FileIdentity dimm{makedev(0, 42), 4712};
  vgpu_->list_mapping(
      {*IovaRange::FromStartAndSize(Iova(1ull << 32), 1 << 20), Access::kReadWrite, dimm, 0});
  SetMaps(Line("7f0000000000-7f0000100000", "rw-s", 0, dimm) +
          Line("7f1000000000-7f1001000000", "rw-s", 0, ram_));
  SetCounters((kRamBytes + (1 << 20)) / 1024, 0);
  ASSERT_EQ(Register().exit_code, 0);
  EXPECT_EQ(Look().rows[1].unique_pages, kRamPages + 256);
}

TEST_F(AuditRegisterVmTest, ProcessWithoutVfioDevicesIsRefused) {
  SetFd(10, nullptr);
  SetFd(11, "anon_inode:[eventfd]");  // the container alone is no device
  ExpectRefusal("has no vfio device open");
  SetFd(10, "/tmp/dev/vfio/12");
  ExpectRefusal("has no vfio device open");
}

TEST_F(AuditRegisterVmTest, ProcessThatDoesNotMapAllTheMemoryIsRefused) {
  const std::string range = "7f0000000000-7f0001000000";
  const FileIdentity other_device{makedev(0, 43), ram_.inode};
  for (const std::string& maps :
       {std::string(), Line(range, "rw-p", 0, ram_), Line(range, "r--s", 0, ram_),
        Line("7f0000000000-7f0000fff000", "rw-s", 0, ram_),
        Line("7f0000000000-7f0000fff000", "rw-s", 4096, ram_), Line(range, "rw-s", 0, other_device),
        std::string("noise\n-\n7f-7e rw-s 0 0:2a 4711\n"),
        Line("7f0000000000-7f0000800000", "rw-s", 0, ram_) +
            Line("7f0000900000-7f0001000000", "rw-s", 0x801000, ram_)}) {
    SetMaps(maps);
    ExpectRefusal("maps no whole file of memory that a ledger in " + dir_ + " knows");
  }
}

TEST_F(AuditRegisterVmTest, ProcessForWhichTheKernelCountsTooLittleIsRefused) {
  SetCounters(kRamBytes / 1024 - 4, 12);
  ExpectRefusal("has 16380 kB locked (VmLck) and 12 kB pinned (VmPin) of the vm's 16384 kB");
}

TEST_F(AuditRegisterVmTest, ProcessesThatAreNotThereAreRefused) {
  const std::string proc = " --proc=" + proc_ + " --runtime-dir=" + dir_;
  const Outcome none = Run("register --pid=4194304" + proc);
  EXPECT_EQ(none.exit_code, 1);
  EXPECT_EQ(none.err, "mvgpu-audit: there is no process 4194304 here\n");
  // There, but not in that /proc.
  const Outcome hidden = Run("register --pid=" + std::to_string(getpid()) + proc);
  EXPECT_EQ(hidden.exit_code, 1);
  EXPECT_THAT(hidden.err, HasSubstr("there is no process " + std::to_string(getpid())));
  ExpectRefused("register --pid=0" + proc, "--pid");
  ExpectRefused("register --pid=x" + proc, "--pid");
  ExpectRefused("register" + proc, "--pid");
}

TEST_F(AuditRegisterVmTest, ProcessOfAnotherUserIsRefused) {
  ASSERT_EQ(chmod((of_vmm() + "/fd").c_str(), 0), 0);
  std::string before;
  if (geteuid() == 0) {  // root may look at everybody
    before = "setpriv --reuid=65534 --regid=65534 --clear-groups ";
    for (const std::string& of_nobody : {dir_, path(), proc_, of_vmm()}) {
      ASSERT_EQ(chown(of_nobody.c_str(), 65534, 65534), 0);
    }
  }
  const Outcome outcome =
      Run("register --runtime-dir=" + dir_ + " --proc=" + proc_ + " --pid=" + std::to_string(vmm_),
          before);
  EXPECT_EQ(outcome.exit_code, 1) << outcome.out;
  EXPECT_THAT(outcome.err, MatchesRegex("mvgpu-audit: process [^\n]* may not be looked at by user "
                                        "[^\n]*; run this as its user or as root\n"));
  EXPECT_EQ(chown(path().c_str(), geteuid(), getegid()), 0);
  EXPECT_EQ(chown(dir_.c_str(), geteuid(), getegid()), 0);
  EXPECT_EQ(Look().rows.size(), 1u);
  ASSERT_EQ(chmod((of_vmm() + "/fd").c_str(), 0700), 0);
}

TEST_F(AuditRegisterVmTest, MemoryOfTwoVmsNeedsTheirName) {
  auto other = Ledger::Open({dir_, kOtherVm});
  ASSERT_THAT(other, IsOk());
  auto row = Join(**other);
  ASSERT_THAT(row->hold(ram_, kRamPages, {0, 1}), IsOk());
  ExpectRefusal("say which with --vm");
  EXPECT_EQ(Register(std::string("--vm=") + kOtherVm).exit_code, 0);
  EXPECT_EQ(Look().rows.size(), 1u);
  EXPECT_EQ(Register(std::string("--undo --vm=") + kVm).exit_code, 1);
  EXPECT_EQ(Register("--undo").exit_code, 0);
  EXPECT_EQ(Register("--vm=12345678-0000-4000-8000-000000000000").exit_code, 3);
  row->release(ram_, {0, 1});
}

TEST_F(AuditRegisterVmTest, VerifyHoldsTheRowAgainstTheKernel) {
  ASSERT_EQ(Register().exit_code, 0);
  // The real /proc knows nothing of locked pages, nor of the file.
  const Outcome outcome = Run("verify --runtime-dir=" + dir_);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.out, HasSubstr("row 1 (qemu-system-x86): process " + std::to_string(vmm_) +
                                     " says that 16384 kB are locked, the kernel counts 0 kB "
                                     "(VmLck); if its devices were unplugged: register --undo "
                                     "--pid=" +
                                     std::to_string(vmm_)));
}

TEST_F(AuditRegisterTest, WithoutALedgerThereIsNothingToJoin) {
  const Outcome outcome = Register();
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("maps no whole file of memory that a ledger in"));
  EXPECT_FALSE(ledger_exists());
}

TEST_F(AuditRegisterTest, DamagedLedgerIsReportedAndLeftAlone) {
  { auto ledger = Open(); }
  WriteBytes("noise");
  for (const char* options : {"", "--undo"}) {
    const Outcome outcome = Register(options);
    EXPECT_EQ(outcome.exit_code, 4);
    EXPECT_THAT(outcome.err, MatchesRegex("mvgpu-audit: [^\n]*the size is 5, expected [^\n]*\n"));
    EXPECT_EQ(ReadBytes(), "noise");
  }
}

}  // namespace
}  // namespace mvgpu::domain
