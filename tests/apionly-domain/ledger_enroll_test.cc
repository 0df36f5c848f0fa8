// Rows for processes that know nothing of the ledger.

#include <fcntl.h>
#include <sys/file.h>

#include <chrono>
#include <vector>

#include "apionly-domain/accounting/ledger_file.h"
#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;
using ::mvgpu::testing::IsOkAndHolds;
using ::testing::HasSubstr;

constexpr uint64_t kPages = 5000;

class LedgerEnrollTest : public LedgerFixture {
 protected:
  ~LedgerEnrollTest() override {
    if (vmm_ > 0) Kill(vmm_);
  }
  // A process that does nothing, as far as we are concerned.
  ProcessId StartVmm() {
    vmm_ = Fork([] {
      while (true) pause();
    });
    const auto process = FindProcess(static_cast<uint32_t>(vmm_));
    EXPECT_THAT(process, IsOk());
    return process ? *process : ProcessId();
  }
  void EndVmm() {
    Kill(vmm_);
    vmm_ = -1;
  }
  static Result<unsigned> Enroll(Ledger& ledger, const ProcessId& owner,
                                 std::vector<Ledger::Enrolment::Holding> holdings = {
                                     {kRam, kPages, {0, kPages}}}) {
    return ledger.enroll({.owner = owner,
                          .kind = DomainKind::kAssignedDevice,
                          .name = "qemu",
                          .pin_backend = "vfio-type1",
                          .holdings = holdings});
  }
  Result<LedgerFile> File() const {
    auto dir = RuntimeDir::OpenForReading(dir_);
    const auto self = CurrentProcess();
    if (!dir || !self) return Fail(ErrorCode::kSystem, "no directory");
    return LedgerFile(std::move(*dir), kVm, *self);
  }

  pid_t vmm_ = -1;
};

TEST_F(LedgerEnrollTest, ItsPagesAreNotChargedAgain) {
  auto ledger = Open();
  auto vgpu = Join(*ledger, "vgpu");
  ASSERT_THAT(vgpu->hold(kRam, kPages, {0, 100}), IsOk());
  const ProcessId vmm = StartVmm();
  ASSERT_THAT(Enroll(*ledger, vmm), IsOkAndHolds(1u));
  ASSERT_THAT(vgpu->hold(kRam, kPages, {200, 100}), IsOk());
  EXPECT_EQ(vgpu->counts(), (LedgerRow::Counts{200, 100}));  // the first 100 stay charged
  const LedgerSnapshot seen = Look();
  ASSERT_EQ(seen.rows.size(), 2u);
  EXPECT_EQ(seen.rows[1].owner, vmm);
  EXPECT_EQ(seen.rows[1].kind, static_cast<uint32_t>(DomainKind::kAssignedDevice));
  EXPECT_EQ(seen.rows[1].name, "qemu");
  EXPECT_EQ(seen.rows[1].pin_backend, "vfio-type1");
  EXPECT_TRUE(seen.rows[1].is_registered);
  EXPECT_FALSE(seen.rows[0].is_registered);
  EXPECT_EQ(seen.rows[1].liveness, Liveness::kAlive);
  EXPECT_EQ(seen.rows[1].unique_pages, kPages);
  EXPECT_EQ(seen.rows[1].charged_pages, kPages - 100);
  EXPECT_EQ(seen.rows[1].mapped_pages, kPages);
  EXPECT_EQ(seen.rows[1].locked_pages, kPages);
  EXPECT_EQ(seen.unique_pages, kPages);
  ExpectInOrder();
  EXPECT_THAT(ledger->withdraw(vmm), IsOk());
  EXPECT_EQ(Look().rows.size(), 1u);
  EXPECT_EQ(vgpu->counts(), (LedgerRow::Counts{200, 200}));
  EXPECT_THAT(ledger->withdraw(vmm), FailsWith(ErrorCode::kNotMapped));
  ExpectInOrder();
  vgpu->release(kRam, {0, 100});
  vgpu->release(kRam, {200, 100});
}

TEST_F(LedgerEnrollTest, ItOutlivesWhoeverAddedItAndEveryOtherDomain) {
  const ProcessId vmm = StartVmm();
  {
    auto ledger = Open();
    ASSERT_THAT(Enroll(*ledger, vmm), IsOkAndHolds(0u));
  }
  ASSERT_TRUE(ledger_exists());
  const ino_t file = inode();
  {
    auto ledger = Open();  // nobody has it open, but it is in use
    auto vgpu = Join(*ledger);
    EXPECT_EQ(inode(), file);
    ASSERT_THAT(vgpu->hold(kRam, kPages, {0, 10}), IsOk());
    EXPECT_EQ(vgpu->counts(), (LedgerRow::Counts{10, 0}));
    vgpu->release(kRam, {0, 10});
  }
  EXPECT_EQ(Look().rows.size(), 1u);
  EXPECT_EQ(Look().rows[0].unique_pages, kPages);
  ExpectInOrder();
}

TEST_F(LedgerEnrollTest, LockThatTheDeadLeftInAFileThatIsInUseIsMadeAnew) {
  const ProcessId vmm = StartVmm();
  {
    auto ledger = Open();
    ASSERT_THAT(Enroll(*ledger, vmm), IsOk());
  }
  {
    const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
    const std::string locked(40, '\x7f');  // as after a power failure: by nobody who is there
    ASSERT_EQ(pwrite(file.get(), locked.data(), locked.size(), 128), 40);
    const uint64_t odd = 9;
    ASSERT_EQ(pwrite(file.get(), &odd, 8, 192), 8);  // in the midst of something
  }
  auto ledger = Open();
  auto vgpu = Join(*ledger);
  ASSERT_THAT(vgpu->hold(kRam, kPages, {0, 10}), IsOk());
  EXPECT_EQ(Look().rows.size(), 2u);
  EXPECT_FALSE(Look().in_motion);
  ExpectInOrder();
  vgpu->release(kRam, {0, 10});
}

TEST_F(LedgerEnrollTest, ItGoesWithItsOwner) {
  auto ledger = Open();
  auto vgpu = Join(*ledger);
  ASSERT_THAT(Enroll(*ledger, StartVmm()), IsOk());
  ASSERT_THAT(vgpu->hold(kRam, kPages, {0, 10}), IsOk());
  EndVmm();
  EXPECT_EQ(Look().rows[1].liveness, Liveness::kDead);
  auto other = Join(*ledger);  // whoever joins next drops it
  EXPECT_EQ(Look().rows.size(), 2u);
  EXPECT_EQ(vgpu->counts(), (LedgerRow::Counts{10, 10}));
  vgpu->release(kRam, {0, 10});
  other.reset();
  vgpu.reset();
  EXPECT_FALSE(ledger_exists());
}

TEST_F(LedgerEnrollTest, FileOfADeadOwnerAloneIsReplaced) {
  {
    auto ledger = Open();
    ASSERT_THAT(Enroll(*ledger, StartVmm()), IsOk());
  }
  EndVmm();
  const ino_t old = inode();
  const UniqueFd keep(open(path().c_str(), O_RDONLY | O_CLOEXEC));  // so its number is not reused
  auto ledger = Open();
  EXPECT_NE(inode(), old);
  EXPECT_TRUE(Look().rows.empty());
}

TEST_F(LedgerEnrollTest, WhatCannotBeEnteredWholeIsNotEntered) {
  auto ledger = Open();
  const ProcessId vmm = StartVmm();
  EXPECT_THAT(Enroll(*ledger, vmm, {{kOtherRam, 10, {0, 10}}, {kRam, kPages, {0, kPages + 1}}}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_TRUE(Look().rows.empty());
  EXPECT_EQ(Look().unique_pages, 0u);
  ASSERT_THAT(Enroll(*ledger, vmm), IsOk());
  const auto again = Enroll(*ledger, vmm);
  ASSERT_THAT(again, FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(again.error().message(), HasSubstr("registered already, as row 0"));
  EndVmm();
  EXPECT_THAT(Enroll(*ledger, vmm), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(Enroll(*ledger, {1, 1, vmm.pid_namespace}), FailsWith(ErrorCode::kNotMapped));
}

TEST_F(LedgerEnrollTest, OwnRowsOfAProcessAreNotWithdrawn) {
  auto ledger = Open();
  auto row = Join(*ledger);
  const auto self = CurrentProcess();
  ASSERT_THAT(self, IsOk());
  EXPECT_THAT(ledger->withdraw(*self), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(Look().rows.size(), 1u);
}

// A registrar that is killed leaves all of the row or nothing.
TEST_F(LedgerEnrollTest, KilledRegistrarLeavesTheWholeRowOrNone) {
  auto ledger = Open();
  auto vgpu = Join(*ledger);
  const ProcessId vmm = StartVmm();
  int whole = 0;
  for (int round = 0; round < 60; ++round) {
    int ready[2];
    ASSERT_EQ(pipe(ready), 0);
    const pid_t child = Fork([&] {
      auto mine = Ledger::Open({dir_, kVm});
      std::vector<Ledger::Enrolment::Holding> holdings;
      for (uint64_t i = 0; i < 40; ++i) holdings.push_back({kRam, kPages, {i * 100, 60}});
      if (!mine || write(ready[1], "x", 1) != 1) return;
      while ((*mine)->enroll({vmm, DomainKind::kAssignedDevice, "qemu", "iommufd", holdings})) {
        if (!(*mine)->withdraw(vmm)) return;
      }
    });
    char byte = 0;
    ASSERT_EQ(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(ready[1]);
    // Somewhere within one of its rounds; where exactly does not matter.
    const auto until = std::chrono::steady_clock::now() + round * std::chrono::microseconds(17);
    while (std::chrono::steady_clock::now() < until) continue;
    Kill(child);
    auto row = Join(*ledger);  // drops what the dead left
    for (const LedgerSnapshot::Row& seen : Look().rows) {
      if (seen.name != "qemu") continue;
      ++whole;
      EXPECT_EQ(seen.owner, vmm);
      EXPECT_EQ(seen.unique_pages, 2400u) << "round " << round;
    }
    ExpectInOrder();
    (void)ledger->withdraw(vmm);
  }
  EXPECT_EQ(Look().unique_pages, 0u);
  std::printf("%d of 60 rounds ended with the row there\n", whole);
}

TEST_F(LedgerEnrollTest, UpkeepDropsTheDeadAndLeavesTheLiving) {
  auto file = File();
  ASSERT_THAT(file, IsOk());
  const auto absent = file->DropDead();
  ASSERT_THAT(absent, FailsWith(ErrorCode::kSystem));
  EXPECT_EQ(absent.error().sys_errno(), ENOENT);
  auto ledger = Open();
  auto vgpu = Join(*ledger, "vgpu");
  ASSERT_THAT(vgpu->hold(kRam, kPages, {0, 10}), IsOk());
  ASSERT_THAT(Enroll(*ledger, StartVmm()), IsOk());
  EXPECT_THAT(file->DropDead(), IsOk());
  EXPECT_EQ(Look().rows.size(), 2u);
  EXPECT_THAT(file->RemoveUnused(), FailsWith(ErrorCode::kBusy));
  EndVmm();
  EXPECT_THAT(file->DropDead(), IsOk());
  EXPECT_EQ(Look().rows.size(), 1u);
  EXPECT_EQ(vgpu->counts(), (LedgerRow::Counts{10, 10}));
  EXPECT_THAT(file->RemoveUnused(), FailsWith(ErrorCode::kBusy));
  EXPECT_TRUE(ledger_exists());
  vgpu->release(kRam, {0, 10});
}

TEST_F(LedgerEnrollTest, LedgerOfTheDeadIsEmptiedInPlaceOrRemoved) {
  const pid_t child = Fork([&] {
    auto ledger = Ledger::Open({dir_, kVm});
    auto row = (*ledger)->join(DomainKind::kApiOnly, "gone", "none");
    if ((*row)->hold(kRam, kPages, {0, 10})) kill(getpid(), SIGKILL);
  });
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  auto file = File();
  ASSERT_THAT(file, IsOk());
  const ino_t old = inode();
  EXPECT_THAT(file->DropDead(), IsOk());
  EXPECT_EQ(inode(), old);
  EXPECT_TRUE(Look().rows.empty());
  EXPECT_EQ(Look().unique_pages, 0u);
  ExpectInOrder();
  EXPECT_THAT(file->RemoveUnused(), IsOk());
  EXPECT_FALSE(ledger_exists());
}

TEST_F(LedgerEnrollTest, OwnerWhoIsAliveKeepsTheFileThoughNobodyHasItOpen) {
  {
    auto ledger = Open();
    ASSERT_THAT(Enroll(*ledger, StartVmm()), IsOk());
  }
  auto file = File();
  ASSERT_THAT(file, IsOk());
  EXPECT_THAT(file->RemoveUnused(), FailsWith(ErrorCode::kBusy));
  EXPECT_TRUE(ledger_exists());
  EndVmm();
  EXPECT_THAT(file->RemoveUnused(), IsOk());
  EXPECT_FALSE(ledger_exists());
}

}  // namespace
}  // namespace mvgpu::domain
