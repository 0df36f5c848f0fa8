// mvgpu-audit watch.

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "apionly-domain/base/unique_fd.h"
#include "tests/backend/audit_fixture.h"
#include "tests/backend/child_process.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::ChildProcess;
using ::mvgpu::testing::IsOk;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

class AuditWatchTest : public AuditFixture {
 protected:
  Outcome Watch(const std::string& options) const {
    return Run("watch --runtime-dir=" + dir_ + " " + options);
  }
  void Start(const std::string& option = "", const std::string& interval = "0.1") {
    std::vector<std::string> command = {MVGPU_AUDIT, "watch", "--runtime-dir=" + dir_,
                                        "--interval=" + interval};
    if (!option.empty()) command.push_back(option);
    child_ = std::make_unique<ChildProcess>(std::move(command));
  }
  // Waits until what was written from `from` on has the text; where it ends.
  size_t WaitFor(const std::string& text, size_t from = 0) const {
    const auto end = std::chrono::steady_clock::now() + ChildProcess::kPatience;
    for (;;) {
      const std::string out = child_->out();
      const size_t at = out.find(text, from);
      if (at != std::string::npos) return at + text.size();
      if (std::chrono::steady_clock::now() > end) {
        ADD_FAILURE() << "'" << text << "' was never written:\n" << out << child_->err();
        return out.size();
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  void ExpectEndsOn(int signal) {
    child_->send_signal(signal);
    EXPECT_EQ(child_->wait(), 0);
    EXPECT_THAT(child_->err(), IsEmpty());
    EXPECT_TRUE(child_->out().ends_with("\n")) << child_->out();
  }

  std::unique_ptr<ChildProcess> child_;
};

TEST_F(AuditWatchTest, ALookIsTheTableOfShow) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  ASSERT_THAT(row->hold(kRam, 1000, {0, 10}), IsOk());
  const Outcome watch = Watch("--count=1");
  EXPECT_EQ(watch.exit_code, 0);
  EXPECT_THAT(watch.out, ContainsRegex("^20..-..-.. ..:..:.. UTC, every 2 s\n"));
  EXPECT_EQ(watch.out.substr(watch.out.find('\n') + 1), Show().out);
  row->release(kRam, {0, 10});
}

TEST_F(AuditWatchTest, LooksFollowEachOtherWhereThereIsNoTerminal) {
  const Outcome outcome = Watch("--count=3 --interval=0.1");
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.out, Not(HasSubstr("\x1b")));
  size_t looks = 0;
  for (size_t at = 0; (at = outcome.out.find("UTC, every 0.1 s\nno VM", at)) != std::string::npos;
       ++at) {
    ++looks;
  }
  EXPECT_EQ(looks, 3u);
  EXPECT_THAT(outcome.out, HasSubstr("\n\n20"));
}

TEST_F(AuditWatchTest, WhatChangedStandsBelowTheDomainInItsColumns) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  row->set_mapped_pages(40000);
  ASSERT_THAT(row->hold(kRam, 1000, {0, 30}), IsOk());
  Start();
  size_t at = WaitFor("pinned by mlock");
  EXPECT_THAT(child_->out(), Not(HasSubstr("change")));
  row->set_mapped_pages(39000);
  // The columns of show: MAPPED ends at 53, UNIQUE at 80, CHARGED at 90.
  const auto change = [](const std::string& figures, size_t end_of_first, size_t first_length) {
    return "    change" + std::string(end_of_first - 10 - first_length, ' ') + figures;
  };
  at = WaitFor(change("-1000 ", 53, 5), at);
  at = WaitFor("pinned by mlock", at);
  row->release(kRam, {0, 10});
  at = WaitFor(change("-10       -10 ", 80, 3), at);
  ASSERT_THAT(row->hold(kRam, 1000, {0, 7}), IsOk());
  at = WaitFor(change("+7        +7 ", 80, 2), at);
  ExpectEndsOn(SIGINT);
  row->release(kRam, {0, 7});
  row->release(kRam, {10, 20});
}

TEST_F(AuditWatchTest, VmsComeAndGo) {
  Start();
  size_t at = WaitFor("no VM has a ledger in " + dir_ + "\n");
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  at = WaitFor("  vgpu            api-only", at);
  auto other = Join(*ledger, "nic");
  at = WaitFor("  nic ", at);
  at = WaitFor("    has joined\n", at - 6);
  other.reset();
  at = WaitFor("  nic             has left, pid " + std::to_string(getpid()) + "\n", at);
  row.reset();
  ledger.reset();
  at = WaitFor(std::string("VM ") + kVm + " has ended\n", at);
  at = WaitFor("no VM has a ledger in", at);
  ExpectEndsOn(SIGINT);
}

TEST_F(AuditWatchTest, TheVmThatWasAskedForMayComeLater) {
  Start(std::string("--vm=") + kVm);
  size_t at = WaitFor(std::string("vm ") + kVm + " does not have a ledger in " + dir_);
  auto other = Ledger::Open({dir_, kOtherVm});
  ASSERT_THAT(other, IsOk());
  auto ledger = Open();
  at = WaitFor(std::string("VM ") + kVm, at);
  EXPECT_THAT(child_->out(), Not(HasSubstr(kOtherVm)));
  ExpectEndsOn(SIGTERM);
}

TEST_F(AuditWatchTest, ADamagedLedgerIsSaidAndTheOthersAreShown) {
  auto ledger = Open();
  auto row = Join(*ledger, "vgpu");
  Start();
  size_t at = WaitFor("  vgpu  ");
  std::ofstream(dir_ + "/" + kOtherVm + ".ledger") << "noise";
  at = WaitFor("error: ", at);
  at = WaitFor("the size is 5, expected", at);
  at = WaitFor("  vgpu  ", at);
  ExpectEndsOn(SIGINT);
}

TEST_F(AuditWatchTest, ASignalEndsALongWait) {
  Start("", "86400");
  WaitFor("no VM has a ledger");
  const auto before = std::chrono::steady_clock::now();
  ExpectEndsOn(SIGINT);
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::minutes(1));
}

// The other end of a pseudo-terminal of 60 columns and 8 rows.
class Terminal {
 public:
  Terminal() : master_(posix_openpt(O_RDWR | O_NOCTTY)) {
    EXPECT_EQ(grantpt(master_.get()), 0);
    EXPECT_EQ(unlockpt(master_.get()), 0);
    slave_ = UniqueFd(open(ptsname(master_.get()), O_RDWR | O_NOCTTY));
    const struct winsize size = {.ws_row = 8, .ws_col = 60, .ws_xpixel = 0, .ws_ypixel = 0};
    EXPECT_EQ(ioctl(slave_.get(), TIOCSWINSZ, &size), 0);
  }
  int slave() const { return slave_.get(); }
  // All that is written until nobody has the other end open.
  std::string ReadAll() {
    slave_ = UniqueFd();
    std::string text;
    char buffer[4096];
    ssize_t n = 0;
    while ((n = read(master_.get(), buffer, sizeof buffer)) > 0) {
      text.append(buffer, static_cast<size_t>(n));
    }
    return text;
  }

 private:
  UniqueFd master_;
  UniqueFd slave_;
};

TEST_F(AuditWatchTest, OnATerminalALookTakesThePlaceOfTheOneBefore) {
  auto ledger = Open();
  std::vector<std::unique_ptr<LedgerRow>> rows;
  for (int i = 0; i < 10; ++i) rows.push_back(Join(*ledger, "domain" + std::to_string(i)));
  Terminal terminal;
  ChildProcess::Options options;
  options.command = {MVGPU_AUDIT, "watch", "--runtime-dir=" + dir_, "--count=2", "--interval=0.1"};
  options.pass_fds = {{terminal.slave(), STDOUT_FILENO}};
  ChildProcess child(options);
  const std::string out = terminal.ReadAll();
  EXPECT_EQ(child.wait(), 0);
  EXPECT_THAT(out, StartsWith("\x1b[H20"));
  EXPECT_TRUE(out.ends_with("\x1b[J")) << out;
  EXPECT_THAT(out, HasSubstr("\x1b[J\x1b[H20"));
  // Two frames of seven lines, none wider than the terminal: it neither scrolls nor wraps.
  std::istringstream lines(out);
  size_t count = 0;
  for (std::string line; std::getline(lines, line);) {
    const size_t end = line.find("\x1b[K");
    if (end == std::string::npos) continue;
    ++count;
    const size_t begin = line.rfind("\x1b[H", end);
    EXPECT_LE(end - (begin == std::string::npos ? 0 : begin + 3), 60u) << line;
  }
  EXPECT_EQ(count, 14u);
}

TEST_F(AuditWatchTest, HostileOptionsAreRefusedInOneLine) {
  const std::string watch = "watch --runtime-dir=" + dir_ + " ";
  for (const char* interval : {"0", "-1", "0.05", "86401", "nan", "-nan", "inf", "1e999"}) {
    ExpectRefused(watch + "--interval=" + interval, "give 0.1 to 86400");
  }
  ExpectRefused(watch + "--interval=soon", "--interval");
  for (const char* count : {"0", "-1", "1.5", "99999999999999999999999"}) {
    ExpectRefused(watch + "--count=" + count, "--count");
  }
  ExpectRefused(watch + "--vm=12345", "is not a uuid");
}

TEST_F(AuditWatchTest, ADirectoryThatCannotBeReadEndsIt) {
  std::ofstream(dir_ + "/file") << "x";
  const Outcome outcome = Run("watch --runtime-dir=" + dir_ + "/file");
  EXPECT_EQ(outcome.exit_code, 4);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr(dir_), StartsWith("mvgpu-audit: ")));
}

}  // namespace
}  // namespace mvgpu::domain
