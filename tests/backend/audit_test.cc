// mvgpu-audit as its users run it.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "tests/backend/audit_fixture.h"
#include "tests/fakes/kernel_counters.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::IsOk;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

using AuditTest = AuditFixture;

TEST_F(AuditTest, TableShowsEveryDomainAndEveryPageOnceInTheTotal) {
  auto ledger = Open();
  auto vgpu = Join(*ledger, "vgpu");
  auto assigned = ledger->join(DomainKind::kAssignedDevice, "nic", "vfio");
  ASSERT_THAT(assigned, IsOk());
  vgpu->set_mapped_pages(40000);
  vgpu->set_pinned_pages(123);
  vgpu->set_locked_pages(112);
  vgpu->set_locked_areas(37, 16382);
  vgpu->set_cache({1760, 8, 70, 2000, 240, 232, 0, 41, 30, 3, 0});
  ASSERT_THAT(vgpu->hold(kRam, 50000, {0, 100}), IsOk());
  ASSERT_THAT((*assigned)->hold(kRam, 50000, {50, 1000}), IsOk());
  const Outcome outcome = Show();
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.err, IsEmpty());
  const std::string pid = std::to_string(getpid());
  EXPECT_THAT(outcome.out, HasSubstr(std::string("VM ") + kVm));
  std::istringstream lines(outcome.out);
  bool vgpu_seen = false;
  bool nic_seen = false;
  bool total_seen = false;
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("VM ")) {
      EXPECT_LE(line.size(), 100u) << line;
    }
    std::istringstream words(line);
    const std::vector<std::string> cells{std::istream_iterator<std::string>(words), {}};
    if (cells.empty()) continue;
    if (cells[0] == "vgpu") {
      vgpu_seen = true;
      EXPECT_THAT(cells, ::testing::ElementsAre("vgpu", "api-only", pid, "alive", "40000", "123",
                                                "0.25", "100", "100", "112"));
    }
    if (cells[0] == "nic") {
      nic_seen = true;
      EXPECT_THAT(cells, ::testing::ElementsAre("nic", "assigned", pid, "alive", "0", "0", "-",
                                                "1000", "950", "0"));
    }
    if (cells[0] == "total") {
      total_seen = true;
      EXPECT_EQ(cells[cells.size() - 2], "1050");
      EXPECT_EQ(cells.back(), "1050");
    }
  }
  EXPECT_TRUE(vgpu_seen && nic_seen && total_seen) << outcome.out;
  EXPECT_THAT(outcome.out, HasSubstr("pid " + pid + ": kernel VmLck"));
  EXPECT_THAT(outcome.out, HasSubstr(", 37 of 16382 memory areas\n"));
  EXPECT_THAT(outcome.out,
              HasSubstr("  vgpu: dma cache: 1760 pages (7040 kB), 8 of them idle (32 kB)\n"
                        "  vgpu: dma cache: 70 hits, 2000 misses; 41 maps, 30 mapper calls\n"
                        "  vgpu: dma cache: 240 unmapped: 232 revoked (3 users told), "
                        "0 evicted\n"));
  EXPECT_THAT(outcome.out, Not(HasSubstr("moved by the kernel")));
  EXPECT_THAT(outcome.out, Not(HasSubstr("nic: dma cache")));
  vgpu->set_cache({1760, 8, 70, 2000, 240, 232, 0, 41, 30, 3, 6});
  EXPECT_THAT(Show().out,
              HasSubstr("0 evicted\n  vgpu: dma cache: 6 of those revoked had been moved by the "
                        "kernel\n"));
  vgpu->release(kRam, {0, 100});
  (*assigned)->release(kRam, {50, 1000});
}

TEST_F(AuditTest, JsonHasTheDocumentedFields) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  row->set_mapped_pages(400);
  row->set_granule_pages(8);
  row->set_locked_areas(37, 16382);
  row->set_cache({90, 10, 70, 100, 15, 4, 3, 61, 52, 7, 2});
  ASSERT_THAT(row->hold(kRam, 1000, {0, 100}), IsOk());
  const nlohmann::json json = ShowJson();
  EXPECT_EQ(json["runtime_dir"], dir_);
  EXPECT_EQ(json["page_size"], 4096);
  EXPECT_EQ(json["errors"].size(), 0u);
  ASSERT_EQ(json["vms"].size(), 1u);
  const nlohmann::json& vm = json["vms"][0];
  EXPECT_EQ(vm["vm"], kVm);
  EXPECT_EQ(vm["ledger"], path());
  EXPECT_EQ(vm["consistent"], true);
  EXPECT_EQ(vm["in_motion"], false);
  EXPECT_EQ(vm["totals"]["unique_pages"], 100);
  EXPECT_EQ(vm["totals"]["charged_pages"], 100);
  ASSERT_EQ(vm["domains"].size(), 1u);
  const nlohmann::json& domain = vm["domains"][0];
  EXPECT_EQ(domain["name"], "vgpu");
  EXPECT_EQ(domain["kind"], "api-only");
  EXPECT_EQ(domain["pid"], getpid());
  EXPECT_EQ(domain["state"], "alive");
  EXPECT_EQ(domain["pin_backend"], "mlock");
  EXPECT_EQ(domain["granule_pages"], 8);
  EXPECT_EQ(domain["locked_areas"], 37);
  EXPECT_EQ(domain["area_budget"], 16382);
  EXPECT_EQ(domain["dma_cache"].dump(),
            R"({"cached_bytes":368640,"cached_pages":90,"evicted_pages":3,"hit_pages":70,)"
            R"("idle_bytes":40960,"idle_pages":10,"map_calls":61,"mapper_calls":52,)"
            R"("miss_pages":100,"moved_pages":2,"revocations":7,"revoked_pages":4,)"
            R"("unmapped_pages":15})");
  EXPECT_EQ(domain["mapped_pages"], 400);
  EXPECT_EQ(domain["unique_pages"], 100);
  EXPECT_EQ(domain["charged_pages"], 100);
  EXPECT_EQ(domain["percent_of_mapped"], 25.0);
  ASSERT_EQ(vm["files"].size(), 1u);
  EXPECT_EQ(vm["files"][0]["inode"], kRam.inode);
  EXPECT_EQ(vm["files"][0]["unique_pages"], 100);
  row->release(kRam, {0, 100});
}

// Large counts, and a long name; what would not be true bytes is not shown wrapped around.
TEST_F(AuditTest, CacheOfALedgerThatSaysWhatItLikesIsShownInItsBounds) {
  auto ledger = Open();
  auto row = Join(*ledger, "a-name-of-fifteen-and-more");
  constexpr uint64_t kMany = 16'777'216;  // 64 GiB
  row->set_cache({kMany, kMany, 9'999'999'999, kMany, kMany, kMany, 9'999'999, kMany, kMany, 99});
  std::istringstream lines(Show().out);
  for (std::string line; std::getline(lines, line);) {
    if (line.find("dma cache") != std::string::npos) {
      EXPECT_LE(line.size(), 100u) << line;
    }
  }
  row->set_cache({UINT64_MAX, uint64_t{1} << 52});
  EXPECT_EQ(ShowJson()["vms"][0]["domains"][0]["dma_cache"]["cached_bytes"], UINT64_MAX);
  EXPECT_EQ(ShowJson()["vms"][0]["domains"][0]["dma_cache"]["idle_bytes"], UINT64_MAX);
}

TEST_F(AuditTest, KernelsOwnFigureOfTheProcessStandsBeside) {
  auto ledger = Open();
  auto row = Join(*ledger);
  const auto vm_lck = [this] {
    return ShowJson()["vms"][0]["domains"][0]["kernel"]["vm_lck_kb"].get<uint64_t>();
  };
  const uint64_t before = vm_lck();
  void* page = mmap(nullptr, 16384, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_EQ(syscall(SYS_mlock, page, 16384), 0);  // sanitizers replace mlock()
  EXPECT_EQ(vm_lck(), before + 16);
  munmap(page, 16384);
  EXPECT_EQ(vm_lck(), before);
}

TEST_F(AuditTest, NothingRunningIsNoError) {
  const Outcome outcome = Show();
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_EQ(outcome.out, "no VM has a ledger in " + dir_ + "\n");
  EXPECT_THAT(outcome.err, IsEmpty());
  EXPECT_EQ(ShowJson()["vms"], nlohmann::json::array());
  const Outcome missing = Run("show --runtime-dir=" + dir_ + "/none");
  EXPECT_EQ(missing.exit_code, 0);
  EXPECT_EQ(missing.out, "no VM has a ledger in " + dir_ + "/none\n");
}

TEST_F(AuditTest, OneVmIsShownAloneAndAnUnknownOneIsReported) {
  auto ledger = Open();
  auto row = Join(*ledger);
  auto other = Ledger::Open({dir_, kOtherVm});
  ASSERT_THAT(other, IsOk());
  auto other_row = Join(**other);
  EXPECT_EQ(ShowJson()["vms"].size(), 2u);
  const nlohmann::json one = ShowJson(std::string("--vm=") + kOtherVm);
  ASSERT_EQ(one["vms"].size(), 1u);
  EXPECT_EQ(one["vms"][0]["vm"], kOtherVm);
  const Outcome unknown = Show("--vm=12345678-0000-4000-8000-000000000000");
  EXPECT_EQ(unknown.exit_code, 3);
  EXPECT_THAT(unknown.err,
              MatchesRegex("mvgpu-audit: vm 12345678-[^\n]* has no ledger in [^\n]*\n"));
  EXPECT_THAT(unknown.out, IsEmpty());
}

TEST_F(AuditTest, DeadOwnersAreShownAndStillReadable) {
  const pid_t child = Fork([&] {
    auto ledger = Ledger::Open({dir_, kVm});
    auto row = (*ledger)->join(DomainKind::kApiOnly, "gone", "none");
    if ((*row)->hold(kRam, 1000, {0, 10})) kill(getpid(), SIGKILL);
  });
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  const Outcome outcome = Show();
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, AllOf(HasSubstr(" dead "), HasSubstr("rows of dead processes")));
  const nlohmann::json domain = ShowJson()["vms"][0]["domains"][0];
  EXPECT_EQ(domain["state"], "dead");
  EXPECT_EQ(domain["charged_pages"], 10);
  EXPECT_TRUE(domain["kernel"].is_null());
}

TEST_F(AuditTest, DamagedLedgerIsReportedAndTheOthersAreShown) {
  auto ledger = Open();
  auto row = Join(*ledger);
  std::ofstream(dir_ + "/" + kOtherVm + ".ledger") << "noise";
  const Outcome outcome = Show();
  EXPECT_EQ(outcome.exit_code, 4);
  EXPECT_THAT(outcome.out, HasSubstr(kVm));
  EXPECT_THAT(outcome.err,
              MatchesRegex("mvgpu-audit: [^\n]*ffffffff-[^\n]*the size is 5, expected[^\n]*\n"));
  const nlohmann::json json = ShowJson();
  EXPECT_EQ(json["vms"].size(), 1u);
  ASSERT_EQ(json["errors"].size(), 1u);
  EXPECT_EQ(json["errors"][0]["vm"], kOtherVm);
  EXPECT_EQ(json["errors"][0]["error"]["code"], "corrupt");
}

TEST_F(AuditTest, BrokenInvariantsAreWarnedOf) {
  auto ledger = Open();
  auto row = Join(*ledger);
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t seven = 7;
  // held_pages of row 0, ledger_format.h
  ASSERT_EQ(pwrite(file.get(), &seven, 8, 4096 + 200), 8);
  const Outcome outcome = Show();
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, HasSubstr("warning: row 0 (domain) counts 7 unique pages but holds 0"));
  EXPECT_EQ(ShowJson()["vms"][0]["consistent"], false);
}

// Pages of a file that this process has mapped, held by a row of it.
class AuditVerifyTest : public AuditTest {
 protected:
  AuditVerifyTest() : ledger_(Open()), row_(Join(*ledger_, "vgpu")) {
    const UniqueFd file(memfd_create("ram", MFD_CLOEXEC));
    EXPECT_EQ(ftruncate(file.get(), kBytes), 0);
    struct stat st = {};
    EXPECT_EQ(fstat(file.get(), &st), 0);
    ram_ = {st.st_dev, st.st_ino};
    memory_ = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    EXPECT_NE(memory_, MAP_FAILED);
    EXPECT_THAT(row_->hold(ram_, kBytes / 4096, {0, 10}), IsOk());
  }
  ~AuditVerifyTest() override {
    row_->release(ram_, {0, 10});
    munmap(memory_, kBytes);
  }
  Outcome Verify(const std::string& options = "") const {
    return Run("verify --runtime-dir=" + dir_ + " " + options);
  }
  void ExpectWrong(const std::string& message, const std::string& kind) const {
    const Outcome outcome = Verify();
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_THAT(outcome.out, MatchesRegex(std::string("vm ") + kVm + ": [^\n]*\n"));
    EXPECT_THAT(outcome.out, HasSubstr(message));
    const Outcome json_outcome = Verify("--json");
    EXPECT_EQ(json_outcome.exit_code, 1);
    const auto json = nlohmann::json::parse(json_outcome.out, nullptr, false);
    ASSERT_FALSE(json.is_discarded()) << json_outcome.out;
    EXPECT_EQ(json["ok"], false);
    ASSERT_EQ(json["findings"].size(), 1u);
    EXPECT_EQ(json["findings"][0]["vm"], kVm);
    EXPECT_EQ(json["findings"][0]["kind"], kind);
    EXPECT_THAT(json["findings"][0]["message"].get<std::string>(), HasSubstr(message));
  }

  static constexpr size_t kBytes = 1 << 20;
  std::unique_ptr<Ledger> ledger_;
  std::unique_ptr<LedgerRow> row_;
  FileIdentity ram_;
  void* memory_ = nullptr;
};

TEST_F(AuditVerifyTest, AccountsThatAreRightAreNotSpokenOf) {
  ASSERT_EQ(syscall(SYS_mlock, memory_, 40960), 0);  // sanitizers replace mlock()
  row_->set_locked_pages(10);
  const Outcome outcome = Verify();
  EXPECT_EQ(outcome.exit_code, 0) << outcome.out;
  EXPECT_THAT(outcome.out, IsEmpty());
  EXPECT_THAT(outcome.err, IsEmpty());
  EXPECT_EQ(nlohmann::json::parse(Verify("--json").out)["ok"], true);
  EXPECT_EQ(Verify("--vm=12345678-0000-4000-8000-000000000000").exit_code, 3);
}

TEST_F(AuditVerifyTest, LockedPagesThatTheKernelDoesNotCountAreFound) {
  row_->set_locked_pages(uint64_t{1} << 40);
  ExpectWrong("row 0 (vgpu): process " + std::to_string(getpid()) + " says that ", "not_locked");
}

TEST_F(AuditVerifyTest, WhatVfioMapsIsCountedWithWhatIsLocked) {
  ASSERT_EQ(syscall(SYS_mlock, memory_, 40960), 0);
  row_->set_locked_pages(6);
  auto nic = ledger_->join(DomainKind::kAssignedDevice, "nic", "vfio-type1");
  ASSERT_THAT(nic, IsOk());
  (*nic)->set_locked_pages(4);
  EXPECT_THAT(Verify().out, IsEmpty());
  (*nic)->set_locked_pages(uint64_t{1} << 40);  // neither row alone
  ExpectWrong("row 0 (vgpu): process " + std::to_string(getpid()) + " says that ", "not_locked");
}

TEST_F(AuditVerifyTest, LocksOfAllDomainsOfAProcessAreAddedUp) {
  ASSERT_EQ(syscall(SYS_mlock, memory_, 40960), 0);
  const uint64_t locked = mvgpu::testing::KernelLockedPages();
  auto nic = ledger_->join(DomainKind::kAssignedDevice, "nic", "vfio-type1");
  ASSERT_THAT(nic, IsOk());
  row_->set_locked_pages(4);
  (*nic)->set_locked_pages(locked - 3);  // one too many, by both
  ExpectWrong("says that " + std::to_string((locked + 1) * 4) + " kB are locked", "not_locked");
}

TEST_F(AuditVerifyTest, PinsThatTheKernelDoesNotCountAreFound) {
  auto ring = ledger_->join(DomainKind::kApiOnly, "ring", "io-uring");
  ASSERT_THAT(ring, IsOk());
  EXPECT_THAT(Verify().out, IsEmpty());
  (*ring)->set_locked_pages(uint64_t{1} << 40);
  ExpectWrong("the kernel counts 0 kB (VmPin)", "not_locked");
}

// A process of another pid namespace: its number here is another's.
TEST_F(AuditVerifyTest, WhatIsOutOfSightIsHeldAgainstNobody) {
  ASSERT_THAT(row_->hold(kOtherRam, 100, {7, 3}), IsOk());
  row_->set_locked_pages(uint64_t{1} << 40);
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t other_namespace = 1;
  // pid_namespace of row 0, ledger_format.h
  ASSERT_EQ(pwrite(file.get(), &other_namespace, 8, 4096 + 24), 8);
  const Outcome outcome = Verify();
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, IsEmpty());
  row_->release(kOtherRam, {7, 3});
}

TEST_F(AuditTest, WhatVfioCountsAgainIsNamed) {
  auto ledger = Open();
  auto nic = ledger->join(DomainKind::kAssignedDevice, "nic", "vfio-type1");
  ASSERT_THAT(nic, IsOk());
  ASSERT_THAT((*nic)->hold(kRam, 50000, {0, 100}), IsOk());
  (*nic)->set_locked_pages(100);
  EXPECT_THAT(Show().out, Not(HasSubstr("counted again")));
  (*nic)->set_locked_pages(164);
  EXPECT_THAT(Show().out, HasSubstr("  nic: pinned by vfio-type1 (VmLck), 1-page granules\n"
                                    "  nic: 64 pages counted again by vfio-type1, at each further "
                                    "iova\n"));
  auto disk = ledger->join(DomainKind::kAssignedDevice, "disk", "iommufd");
  ASSERT_THAT(disk, IsOk());
  ASSERT_THAT((*disk)->hold(kRam, 50000, {0, 10}), IsOk());
  (*disk)->set_locked_pages(13);
  EXPECT_THAT(Show().out, HasSubstr("  disk: 3 pages counted again by iommufd, at each further "
                                    "iova\n"));
  (*disk)->release(kRam, {0, 10});
  (*nic)->release(kRam, {0, 100});
}

TEST_F(AuditVerifyTest, RowOfADeadProcessIsFound) {
  const pid_t child = Fork([&] {
    auto ledger = Ledger::Open({dir_, kVm});
    auto row = (*ledger)->join(DomainKind::kApiOnly, "gone", "none");
    if ((*row)->hold(ram_, kBytes / 4096, {5, 10})) kill(getpid(), SIGKILL);
  });
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  ExpectWrong("row 1 (gone) holds 10 pages for process " + std::to_string(child), "dead_owner");
}

TEST_F(AuditVerifyTest, FileThatNobodyMapsAnyMoreIsFound) {
  ASSERT_THAT(row_->hold(kOtherRam, 100, {7, 3}), IsOk());
  ExpectWrong("3 pages of file 1:101 are held", "not_mapped");
  row_->release(kOtherRam, {7, 3});
}

TEST_F(AuditVerifyTest, BitsThatTheOwnerDidNotCountAreFound) {
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t seven = 7;
  // held_pages of row 0, ledger_format.h
  ASSERT_EQ(pwrite(file.get(), &seven, 8, 4096 + 200), 8);
  ExpectWrong("row 0 (vgpu) counts 7 unique pages but holds 10", "ledger");
}

TEST_F(AuditTest, ReadingChangesNothing) {
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_THAT(row->hold(kRam, 1000, {0, 10}), IsOk());
  const std::string before = ReadBytes();
  EXPECT_EQ(Show().exit_code, 0);
  EXPECT_EQ(ReadBytes(), before);
  row->release(kRam, {0, 10});
}

TEST_F(AuditTest, WrongUsageIsOneLineAndExitsWith2) {
  for (const char* arguments : {"", "show --no-such-option", "no-such-verb", "show --vm=12345"}) {
    const Outcome outcome = Run(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << arguments;
    EXPECT_THAT(outcome.err, MatchesRegex("mvgpu-audit: [^\n]*\n")) << arguments;
    EXPECT_THAT(outcome.out, IsEmpty()) << arguments;
  }
}

TEST_F(AuditTest, HelpAndVersionAreWrittenToStdout) {
  const Outcome help = Run("--help");
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_THAT(help.out, AllOf(HasSubstr("show"), HasSubstr("Exit codes:")));
  const Outcome show_help = Run("show --help");
  EXPECT_EQ(show_help.exit_code, 0);
  EXPECT_THAT(show_help.out,
              AllOf(HasSubstr("--vm"), HasSubstr("--runtime-dir"), HasSubstr("--json")));
  const Outcome version = Run("--version");
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.out, StartsWith("mvgpu-audit "));
}

}  // namespace
}  // namespace mvgpu::domain
