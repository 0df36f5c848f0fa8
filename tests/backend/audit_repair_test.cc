#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
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

class AuditRepairTest : public AuditFixture {
 protected:
  Outcome Repair(const std::string& options = "") const {
    return Run("repair --runtime-dir=" + dir_ + " " + options);
  }
  // A process joins this VM, holds pages 0 to 9 and is killed.
  pid_t LeaveDeadRow(const char* vm = kVm) const {
    const pid_t child = Fork([&] {
      auto ledger = Ledger::Open({dir_, vm});
      auto row = (*ledger)->join(DomainKind::kApiOnly, "gone", "none");
      if ((*row)->hold(kRam, 1000, {0, 10})) kill(getpid(), SIGKILL);
    });
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status));
    return child;
  }
  void ExpectNothingDone(const std::string& options = "") const {
    const std::string before = ReadBytes();
    const Outcome outcome = Repair(options);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    EXPECT_EQ(outcome.out, "nothing to do\n");
    EXPECT_THAT(outcome.err, IsEmpty());
    EXPECT_EQ(ReadBytes(), before);
  }
};

TEST_F(AuditRepairTest, NothingIsDoneWhereNothingIsToBeDone) {
  ExpectNothingDone();
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_THAT(row->hold(kRam, 1000, {0, 10}), IsOk());
  ExpectNothingDone();
  ExpectNothingDone("--remove");  // in use, and nobody said that it is not
  ExpectNothingDone(std::string("--vm=") + kVm);
  EXPECT_EQ(JsonOf(Repair("--json"))["actions"], nlohmann::json::array());
  row->release(kRam, {0, 10});
}

TEST_F(AuditRepairTest, RowsOfTheDeadGo) {
  auto ledger = Open();  // somebody has it open
  const pid_t dead = LeaveDeadRow();
  EXPECT_EQ(Run("verify --runtime-dir=" + dir_).exit_code, 1);
  const nlohmann::json json = JsonOf(Repair("--json"));
  ASSERT_EQ(json["actions"].size(), 1u) << json.dump();
  EXPECT_EQ(json["errors"].size(), 0u);
  const nlohmann::json& action = json["actions"][0];
  EXPECT_EQ(action["vm"], kVm);
  EXPECT_EQ(action["action"], "dropped_row");
  EXPECT_EQ(action["row"], 0);
  EXPECT_EQ(action["name"], "gone");
  EXPECT_EQ(action["pid"], dead);
  EXPECT_EQ(action["unique_pages"], 10);
  EXPECT_EQ(action["charged_pages"], 10);
  EXPECT_EQ(Run("verify --runtime-dir=" + dir_).exit_code, 0);
  EXPECT_TRUE(ledger_exists());
  ExpectNothingDone();
}

TEST_F(AuditRepairTest, LivingDomainsThatSharedNothingAreNotSpokenOf) {
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_THAT(row->hold(kRam, 1000, {500, 10}), IsOk());
  LeaveDeadRow();
  const nlohmann::json json = JsonOf(Repair("--json"));
  ASSERT_EQ(json["actions"].size(), 1u) << json.dump();
  EXPECT_EQ(json["actions"][0]["action"], "dropped_row");
  row->release(kRam, {500, 10});
}

TEST_F(AuditRepairTest, LivingDomainsPayForWhatTheyShared) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  int ready[2];
  int go[2];
  ASSERT_EQ(pipe(ready), 0);
  ASSERT_EQ(pipe(go), 0);
  const pid_t child = Fork([&] {
    auto mine = Ledger::Open({dir_, kVm});
    auto payer = (*mine)->join(DomainKind::kApiOnly, "gone", "none");
    if (!(*payer)->hold(kRam, 1000, {0, 10})) return;
    if (write(ready[1], "x", 1) != 1) return;
    pause();
  });
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  ASSERT_THAT(row->hold(kRam, 1000, {4, 100}), IsOk());
  EXPECT_EQ(row->counts(), (LedgerRow::Counts{100, 94}));
  ExpectNothingDone();  // its owner is alive
  Kill(child);
  const Outcome outcome = Repair();
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.out, std::string("vm ") + kVm + ": row 0 (vgpu) pays for 6 pages more: 100\n" +
                             "vm " + kVm + ": dropped row 1 (gone) of process " +
                             std::to_string(child) +
                             ", which is dead: it held 10 pages and paid for 10\n");
  EXPECT_EQ(row->counts(), (LedgerRow::Counts{100, 100}));
  ExpectInOrder();
  row->release(kRam, {4, 100});
  for (const int fd : {ready[0], ready[1], go[0], go[1]}) close(fd);
}

TEST_F(AuditRepairTest, LedgerOfTheDeadIsEmptiedAndRemovedOnlyWhenAsked) {
  LeaveDeadRow();
  EXPECT_THAT(Repair().out, HasSubstr("dropped row 0 (gone)"));
  EXPECT_TRUE(ledger_exists());
  ExpectNothingDone();
  const Outcome outcome = Repair("--remove");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.out, std::string("vm ") + kVm + ": removed " + path() +
                             ", which nobody used: 0 rows of dead processes\n");
  EXPECT_FALSE(ledger_exists());
  ExpectNothingDone("--remove");
  LeaveDeadRow();
  const nlohmann::json json = JsonOf(Repair("--remove --json"));
  ASSERT_EQ(json["actions"].size(), 1u);
  EXPECT_EQ(json["actions"][0]["action"], "removed");
  EXPECT_FALSE(ledger_exists());
}

TEST_F(AuditRepairTest, LedgerInUseIsNotRemoved) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  const std::string vm = std::string(" --vm=") + kVm;
  const Outcome outcome = Repair("--remove" + vm);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.out, MatchesRegex("vm [^\n]* stays: a process has it open; [^\n]*\n"));
  EXPECT_EQ(JsonOf(Repair("--remove --json" + vm))["actions"][0]["action"], "refused");
  EXPECT_TRUE(ledger_exists());
  LeaveDeadRow();  // this is dropped nevertheless
  EXPECT_THAT(Repair("--remove" + vm).out, AllOf(HasSubstr("stays"), HasSubstr("dropped row 1")));
  EXPECT_EQ(Look().rows.size(), 1u);
}

TEST_F(AuditRepairTest, OneVmAlone) {
  LeaveDeadRow();
  LeaveDeadRow(kOtherVm);
  EXPECT_EQ(Repair(std::string("--remove --vm=") + kOtherVm).exit_code, 0);
  EXPECT_TRUE(ledger_exists());
  EXPECT_EQ(access((dir_ + "/" + kOtherVm + ".ledger").c_str(), F_OK), -1);
  EXPECT_EQ(Repair("--vm=12345678-0000-4000-8000-000000000000").exit_code, 3);
}

TEST_F(AuditRepairTest, WhatIsNoLedgerOfOursIsLeftAlone) {
  LeaveDeadRow();
  std::string bytes = ReadBytes();
  bytes[8] = 2;  // an earlier version
  for (const std::string& content : {bytes, std::string("noise"), bytes.substr(0, 100000)}) {
    WriteBytes(content);
    for (const char* options : {"", "--remove"}) {
      const Outcome outcome = Repair(options);
      EXPECT_EQ(outcome.exit_code, 4);
      EXPECT_THAT(outcome.out, IsEmpty());
      EXPECT_THAT(outcome.err, MatchesRegex("mvgpu-audit: [^\n]*, expected [^\n]*\n"));
      EXPECT_EQ(ReadBytes(), content);
    }
  }
}

TEST_F(AuditRepairTest, LedgerThatOthersMayOpenIsLeftAlone) {
  LeaveDeadRow();
  ASSERT_EQ(chmod(path().c_str(), 0644), 0);
  const std::string before = ReadBytes();
  const Outcome outcome = Repair("--remove");
  EXPECT_EQ(outcome.exit_code, 4);
  EXPECT_THAT(outcome.err, HasSubstr("chmod it to 0600"));
  EXPECT_EQ(ReadBytes(), before);
}

}  // namespace
}  // namespace mvgpu::domain
