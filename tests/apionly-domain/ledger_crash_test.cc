// Processes are killed while they hold pages and in the midst of changes; the others lose nothing.

#include <fcntl.h>
#include <sys/ptrace.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;
using ::testing::IsEmpty;

constexpr uint64_t kPages = 200000;

class LedgerCrashTest : public LedgerFixture {
 protected:
  // A child that joins, holds and says so, then waits to be killed: idle, or sharing pages 60 to 89
  // and letting them go again and again.
  pid_t ForkHolder(PageRun pages, bool and_share = false) {
    int ready[2];
    EXPECT_EQ(pipe(ready), 0);
    const pid_t child = Fork([&] {
      auto ledger = Ledger::Open({dir_, kVm});
      if (!ledger) return;
      auto row = (*ledger)->join(DomainKind::kApiOnly, "child", "none");
      if (!row || !(*row)->hold(kRam, kPages, pages)) return;
      if (write(ready[1], "x", 1) != 1) return;
      while (!and_share) pause();
      while ((*row)->hold(kRam, kPages, {60, 30})) (*row)->release(kRam, {60, 30});
    });
    char byte = 0;
    close(ready[1]);
    EXPECT_EQ(read(ready[0], &byte, 1), 1) << "the child could not hold its pages";
    close(ready[0]);
    return child;
  }

  // Holds and releases at random until it is killed.
  void Churn(uint32_t seed) {
    std::mt19937 random(seed);
    auto ledger = Ledger::Open({dir_, kVm});
    if (!ledger) return;
    while (true) {
      auto row = (*ledger)->join(DomainKind::kApiOnly, "churn", "none");
      if (!row) return;
      for (int i = 0; i < 20; ++i) {
        const FileIdentity& file = random() % 2 == 0 ? kRam : kOtherRam;
        const uint64_t first = random() % (kPages / 2);
        const uint64_t count = 1 + random() % (kPages / 2);
        if (!(*row)->hold(file, kPages, {first, count})) return;
        const uint64_t part = random() % count;
        (*row)->release(file, {first, part});
        (*row)->release(file, {first + part, count - part});
      }
    }
  }

  // At least so many rounds, and more until some of the killed died in the midst of a change.
  void ChurnAndKill(size_t processes, int rounds, uint32_t seed);
};

TEST_F(LedgerCrashTest, RowsOfAKilledProcessAreShownAsDeadAndDroppedAtTheNextJoin) {
  auto ledger = Open();
  auto mine = Join(*ledger, "mine");
  const pid_t child = ForkHolder({0, 1000});
  ASSERT_THAT(mine->hold(kRam, kPages, {500, 1000}), IsOk());
  EXPECT_EQ(mine->counts().charged_pages, 500u);
  EXPECT_EQ(Look().rows[1].liveness, Liveness::kAlive);
  kill(child, SIGKILL);
  siginfo_t info = {};
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);  // a zombie now
  EXPECT_EQ(Look().rows[1].liveness, Liveness::kDead);
  ExpectInOrder();
  auto late = Join(*ledger, "late");
  EXPECT_EQ(mine->counts().charged_pages, 1000u);
  EXPECT_EQ(Look().rows.size(), 2u);
  EXPECT_EQ(Look().unique_pages, 1000u);
  ExpectInOrder();
  Kill(child);
  mine->release(kRam, {500, 1000});
}

TEST_F(LedgerCrashTest, RowsOfAKilledProcessAreDroppedWhenSomebodyOpens) {
  auto ledger = Open();
  auto mine = Join(*ledger, "mine");
  ASSERT_THAT(mine->hold(kRam, kPages, {0, 10}), IsOk());
  Kill(ForkHolder({0, 1000}));
  EXPECT_EQ(Look().unique_pages, 1000u);
  auto second = Open();
  EXPECT_EQ(Look().unique_pages, 10u);
  EXPECT_EQ(Look().rows.size(), 1u);
  mine->release(kRam, {0, 10});
}

TEST_F(LedgerCrashTest, LedgerThatOnlyDeadProcessesHadOpenIsReplaced) {
  Kill(ForkHolder({0, 1000}));
  EXPECT_EQ(Look().rows[0].liveness, Liveness::kDead);  // readable after the crash
  EXPECT_EQ(Look().charged_pages(), 1000u);
  const ino_t before = inode();
  // Until we let go of the old file its inode cannot be used again.
  UniqueFd old_file(open(path().c_str(), O_RDONLY | O_CLOEXEC));
  auto ledger = Open();
  EXPECT_NE(inode(), before);
  EXPECT_THAT(Look().rows, IsEmpty());
}

TEST_F(LedgerCrashTest, LastOneAliveTakesTheLedgerAwayAlsoFromTheDead) {
  auto ledger = Open();
  auto mine = Join(*ledger, "mine");
  Kill(ForkHolder({0, 1000}));
  mine.reset();
  EXPECT_FALSE(ledger_exists());
}

TEST_F(LedgerCrashTest, LivingProcessIsNotTakenForDead) {
  auto ledger = Open();
  const pid_t child = ForkHolder({0, 1000});
  auto mine = Join(*ledger, "mine");
  ASSERT_THAT(mine->hold(kRam, kPages, {0, 1000}), IsOk());
  EXPECT_EQ(mine->counts().charged_pages, 0u);
  mine->release(kRam, {0, 1000});
  EXPECT_EQ(Look().unique_pages, 1000u);
  Kill(child);
}

// Offsets as ledger_format.h documents them, written down again here.
constexpr off_t kFirstRow = 4096;
constexpr off_t kRowStartTime = 16;
constexpr off_t kRowPidNamespace = 24;
constexpr off_t kRowChanges = 192;
constexpr off_t kRowHeldPages = 200;
constexpr off_t kRowToken = 216;

TEST_F(LedgerCrashTest, ReusedProcessNumberDoesNotKeepARowAlive) {
  auto ledger = Open();
  const pid_t child = ForkHolder({0, 1000});
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t other_start = 1;
  ASSERT_EQ(pwrite(file.get(), &other_start, 8, kFirstRow + kRowStartTime), 8);
  EXPECT_EQ(Look().rows[0].liveness, Liveness::kDead);
  auto second = Open();
  EXPECT_THAT(Look().rows, IsEmpty());
  Kill(child);
}

TEST_F(LedgerCrashTest, ProcessOfAnotherPidNamespaceIsLeftAlone) {
  auto ledger = Open();
  const pid_t child = ForkHolder({0, 1000});
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t other_namespace = 1;
  ASSERT_EQ(pwrite(file.get(), &other_namespace, 8, kFirstRow + kRowPidNamespace), 8);
  Kill(child);
  EXPECT_EQ(Look().rows[0].liveness, Liveness::kUnknown);
  auto second = Open();
  EXPECT_EQ(Look().rows.size(), 1u);
}

TEST_F(LedgerCrashTest, RowThatOthersTookForDeadIsRevoked) {
  auto ledger = Open();
  auto mine = Join(*ledger, "mine");
  ASSERT_THAT(mine->hold(kRam, kPages, {0, 10}), IsOk());
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t other_start = 1;
  ASSERT_EQ(pwrite(file.get(), &other_start, 8, kFirstRow + kRowStartTime), 8);
  auto second = Open();
  auto other = Join(*second, "other");  // gets the same row
  EXPECT_THAT(mine->hold(kRam, kPages, {10, 10}), FailsWith(ErrorCode::kRevoked));
  mine->set_mapped_pages(7);
  mine->release(kRam, {0, 10});
  EXPECT_EQ(mine->counts(), (LedgerRow::Counts{0, 0}));
  EXPECT_EQ(Look().rows[0].mapped_pages, 0u);
  EXPECT_EQ(Look().unique_pages, 0u);
  mine.reset();
  EXPECT_EQ(Look().rows.size(), 1u);
  EXPECT_THAT(other->hold(kRam, kPages, {0, 10}), IsOk());
  other->release(kRam, {0, 10});
}

// Its bits go without being counted, and whoever does that may die of it.
TEST_F(LedgerCrashTest, RowThatIsBeingDroppedIsNotHeldToItsCounters) {
  auto ledger = Open();
  auto mine = Join(*ledger, "mine");
  ASSERT_THAT(mine->hold(kRam, kPages, {0, 10}), IsOk());
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t other_count = 7;
  ASSERT_EQ(pwrite(file.get(), &other_count, 8, kFirstRow + kRowHeldPages), 8);
  EXPECT_THAT(ProblemsOf(Look()), ::testing::SizeIs(1));
  const uint64_t no_token = 0;
  ASSERT_EQ(pwrite(file.get(), &no_token, 8, kFirstRow + kRowToken), 8);
  EXPECT_THAT(ProblemsOf(Look()), IsEmpty());
  EXPECT_TRUE(Look().in_motion);
  const auto second = Open();  // finishes it
  EXPECT_THAT(Look().rows, IsEmpty());
  EXPECT_EQ(Look().unique_pages, 0u);
  mine->release(kRam, {0, 10});
}

TEST_F(LedgerCrashTest, FileThatWasRemovedUnderItsRowsIsNotLeftBehindInTwoParts) {
  auto ledger = Open();
  auto mine = Join(*ledger, "mine");
  ASSERT_EQ(unlink(path().c_str()), 0);
  EXPECT_THAT(ledger->join(DomainKind::kApiOnly, "second", "none"), FailsWith(ErrorCode::kRevoked));
  mine.reset();
  EXPECT_THAT(ledger->join(DomainKind::kApiOnly, "second", "none"), IsOk());
}

TEST_F(LedgerCrashTest, ProcessKilledAtAnyTimeLosesItsShareAndNothingElse) {
  const char* option = std::getenv("MVGPU_LEDGER_KILLS");
  const int kills = option != nullptr ? std::atoi(option) : 200;
  auto ledger = Open();
  auto lower = Join(*ledger, "lower");
  auto gap = Join(*ledger, "gap");  // becomes the child's row
  auto higher = Join(*ledger, "higher");
  gap.reset();
  ASSERT_THAT(lower->hold(kRam, kPages, {50, 30}), IsOk());
  ASSERT_THAT(higher->hold(kRam, kPages, {70, 40}),
              IsOk());  // 10 of them shared with the lower row
  std::mt19937 random(3);
  for (int i = 0; i < kills; ++i) {
    const pid_t child = ForkHolder({100, 20}, /*and_share=*/true);
    // Not asleep: that would be too coarse.
    const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(random() % 200000);
    while (std::chrono::steady_clock::now() < end) {
    }
    Kill(child);
    Open().reset();  // drops the dead
    const LedgerSnapshot snapshot = Look();
    ASSERT_THAT(ProblemsOf(snapshot), IsEmpty()) << "kill " << i;
    ASSERT_EQ(snapshot.rows.size(), 2u) << "kill " << i;
    ASSERT_EQ(snapshot.unique_pages, 60u) << "kill " << i;
    ASSERT_EQ(lower->counts(), (LedgerRow::Counts{30, 30})) << "kill " << i;
    ASSERT_EQ(higher->counts(), (LedgerRow::Counts{40, 30})) << "kill " << i;
  }
  const auto repairs = static_cast<int>(Look().repairs);
  std::printf("%d of %d kills were in the midst of a change\n", repairs, kills);
  EXPECT_GT(repairs, 0);
  lower->release(kRam, {50, 30});
  higher->release(kRam, {70, 40});
}

// Three rows on pages 50 to 119, each of which somebody else than the middle one holds, or the
// middle one all the time: so whatever it does, who pays stays the same.
//   lower   50 .. 79     pays for all of them
//   middle  60 .. 89 now and then, 100 .. 119; pays for 110 .. 119
//   higher  70 .. 109    pays for 80 .. 109, also where the middle row is the lower one
class LedgerStepTest : public LedgerCrashTest {
 protected:
  LedgerStepTest() : ledger_(Open()) {
    lower_ = Join(*ledger_, "lower");
    auto gap = Join(*ledger_, "gap");  // becomes the middle row
    higher_ = Join(*ledger_, "higher");
    gap.reset();
    EXPECT_THAT(lower_->hold(kRam, kPages, {50, 30}), IsOk());
    EXPECT_THAT(higher_->hold(kRam, kPages, {70, 40}), IsOk());
  }
  ~LedgerStepTest() override {
    lower_->release(kRam, {50, 30});
    higher_->release(kRam, {70, 40});
  }

  // A process that stops, takes pages 60 to 89 and lets go of them, and stops again. With `is_warm`
  // it has done so before; otherwise it has to make room first.
  pid_t ForkMiddle(bool is_warm) {
    const pid_t child = Fork([&] {
      auto ledger = Ledger::Open({dir_, kVm});
      auto row = (*ledger)->join(DomainKind::kApiOnly, "middle", "none");
      if (is_warm) {
        if (!(*row)->hold(kRam, kPages, {100, 20}) || !(*row)->hold(kRam, kPages, {60, 30})) return;
        (*row)->release(kRam, {60, 30});
      }
      if (ptrace(PTRACE_TRACEME) != 0) return;
      raise(SIGSTOP);
      if (!(*row)->hold(kRam, kPages, {60, 30})) return;
      (*row)->release(kRam, {60, 30});
      raise(SIGSTOP);
    });
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSTOPPED(status)) << "the child left with " << WEXITSTATUS(status);
    return child;
  }
  // To the next instruction, or into or out of the next system call. False when the child has
  // stopped by itself: it is done.
  static bool Step(pid_t child, bool by_call = false) {
    int status = 0;
    EXPECT_EQ(ptrace(by_call ? PTRACE_SYSCALL : PTRACE_SINGLESTEP, child, nullptr, nullptr), 0);
    EXPECT_EQ(waitpid(child, &status, 0), child);
    return WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
  }
  void KillAtManySteps(bool is_warm, int points);

  std::unique_ptr<Ledger> ledger_;
  std::unique_ptr<LedgerRow> lower_;
  std::unique_ptr<LedgerRow> higher_;
};

TEST_F(LedgerStepTest, NoChargeMovesAtAnyInstructionOfAHoldAndAReleaseOfSharedPages) {
  const pid_t child = ForkMiddle(/*is_warm=*/true);
  int steps = 0;
  while (Step(child) && !HasFailure()) {
    ++steps;
    ASSERT_EQ(lower_->counts(), (LedgerRow::Counts{30, 30})) << "instruction " << steps;
    ASSERT_EQ(higher_->counts(), (LedgerRow::Counts{40, 30})) << "instruction " << steps;
  }
  EXPECT_GT(steps, 100);
  const LedgerSnapshot snapshot = Look();
  EXPECT_EQ(snapshot.unique_pages, 70u);
  EXPECT_EQ(snapshot.rows[1].charged_pages, 10u);
  Kill(child);
}

// Of a change that has room, instructions; of one that makes room first, system calls.
void LedgerStepTest::KillAtManySteps(bool is_warm, int points) {
  pid_t child = ForkMiddle(is_warm);
  int steps = 0;
  while (Step(child, !is_warm)) ++steps;
  Kill(child);
  points = std::clamp(40000 / (steps + 1), 8, points);  // fewer of code that sanitizers made longer
  const uint64_t before = Look().repairs;
  for (int point = 0; point < points && !HasFailure(); ++point) {
    const auto at = static_cast<int>(int64_t{steps} * point / points);
    SCOPED_TRACE(::testing::Message() << "killed at step " << at << " of " << steps);
    child = ForkMiddle(is_warm);
    for (int step = 0; step < at && Step(child, !is_warm);
         ++step) {  // one run may be shorter than another
    }
    Kill(child);
    const LedgerSnapshot dead = Look();
    ASSERT_THAT(ProblemsOf(dead), IsEmpty());
    ASSERT_EQ(dead.charged_pages(), dead.unique_pages);
    Open().reset();  // drops the dead
    const LedgerSnapshot snapshot = Look();
    ASSERT_THAT(ProblemsOf(snapshot), IsEmpty());
    ASSERT_FALSE(snapshot.in_motion);
    ASSERT_EQ(snapshot.rows.size(), 2u);
    ASSERT_EQ(snapshot.unique_pages, 60u);
    ASSERT_EQ(lower_->counts(), (LedgerRow::Counts{30, 30}));
    ASSERT_EQ(higher_->counts(), (LedgerRow::Counts{40, 30}));
  }
  std::printf("%d of %d kills were in the midst of a change or inside the lock\n",
              static_cast<int>(Look().repairs - before), points);
  EXPECT_GT(Look().repairs, before) << "the test did not test";
}

TEST_F(LedgerStepTest, ProcessKilledAtAnyInstructionOfAChangeLosesItsShareAndNothingElse) {
  KillAtManySteps(/*is_warm=*/true, 60);
}

TEST_F(LedgerStepTest, ProcessKilledAtAnySystemCallOfMakingRoomLosesItsShareAndNothingElse) {
  KillAtManySteps(/*is_warm=*/false, 30);
}

TEST_F(LedgerCrashTest, RowLeavesWithItsBitsAlsoWhileAnotherIsStoppedInTheMidstOfAChange) {
  auto ledger = Open();
  auto stopped = Join(*ledger, "stopped");
  auto leaving = Join(*ledger, "leaving");
  ASSERT_THAT(stopped->hold(kRam, kPages, {0, 10}), IsOk());
  ASSERT_THAT(leaving->hold(kRam, kPages, {5, 10}), IsOk());
  leaving->release(kRam, {5, 10});
  Kill(ForkHolder({100, 50}));
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t odd = 101;
  ASSERT_EQ(pwrite(file.get(), &odd, 8, kFirstRow + kRowChanges), 8);
  leaving.reset();  // and drops the dead
  const LedgerSnapshot snapshot = Look();
  ASSERT_EQ(snapshot.rows.size(), 1u);
  EXPECT_EQ(snapshot.unique_pages, 10u);
  // Whoever gets the rows next finds them empty.
  auto one = Join(*ledger, "one");
  auto two = Join(*ledger, "two");
  for (LedgerRow* row : {one.get(), two.get()}) {
    ASSERT_THAT(row->hold(kRam, kPages, {120, 1}), IsOk());
  }
  EXPECT_EQ(Look().unique_pages, 11u);
  for (LedgerRow* row : {one.get(), two.get()}) row->release(kRam, {120, 1});
  stopped->release(kRam, {0, 10});
  ExpectInOrder();
}

// Segments come and go, and with them the memory behind them, under rows that change their bits.
TEST_F(LedgerCrashTest, RowsThatJoinGrowAndLeaveDoNotDisturbThoseThatHoldAndRelease) {
  auto ledger = Open();
  auto first = Join(*ledger, "first");
  auto steady = Join(*ledger, "steady");
  std::atomic<bool> done = false;
  std::thread worker([&] {
    for (uint64_t page = 0; !done; page = (page + 61) % 1000) {
      ASSERT_THAT(steady->hold(kRam, kPages, {page, 100}), IsOk());
      steady->release(kRam, {page, 100});
    }
  });
  for (int i = 0; i < 100; ++i) {
    auto visitor = Join(*ledger, "visitor");
    ASSERT_THAT(visitor->hold(kRam, kPages, {0, 1500}), IsOk());
    // Named as the payer by the rows below it, in segments that grow with every round.
    ASSERT_THAT(first->hold(kRam, kPages + static_cast<uint64_t>(i) * 40000, {500, 1000}), IsOk());
    first->release(kRam, {500, 1000});
    visitor->release(kRam, {0, 1500});
  }
  done = true;
  worker.join();
  EXPECT_EQ(Look().unique_pages, 0u);
  ExpectInOrder();
}

// The parent's holds overlap everything that its children do, and its charges must come out right.
void LedgerCrashTest::ChurnAndKill(size_t processes, int rounds, uint32_t seed) {
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  auto ledger = Open();
  auto padding = Join(*ledger, "padding");  // so that children get rows on both sides of ours
  auto mine = Join(*ledger, "mine");
  padding.reset();
  ASSERT_THAT(mine->hold(kRam, kPages, {0, kPages}), IsOk());
  int round = 0;
  for (; round < rounds || (Look().repairs < 3 && round < 20 * rounds); ++round) {
    std::vector<pid_t> children;
    for (size_t i = 0; i < processes; ++i) {
      const auto child_seed = static_cast<uint32_t>(random());
      children.push_back(Fork([&] { Churn(child_seed); }));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(2000 * processes + random() % 8000));
    for (const pid_t child : children) {
      kill(child, SIGKILL);
      // With the lock in whatever state it was left, and the other children going on.
      ASSERT_THAT(mine->hold(kOtherRam, kPages, {0, 1000}), IsOk());
      mine->release(kOtherRam, {0, 1000});
    }
    for (const pid_t child : children) Kill(child);
    Open().reset();
    const LedgerSnapshot snapshot = Look();
    ASSERT_THAT(ProblemsOf(snapshot), IsEmpty()) << "round " << round;
    ASSERT_EQ(snapshot.rows.size(), 1u) << "round " << round;
    ASSERT_EQ(snapshot.unique_pages, kPages) << "round " << round;
    ASSERT_EQ(mine->counts(), (LedgerRow::Counts{kPages, kPages})) << "round " << round;
  }
  const auto repairs = static_cast<int>(Look().repairs);
  std::printf("%d rounds, %d processes died in the midst of a change\n", round, repairs);
  EXPECT_GT(repairs, 0) << "the test did not test";
  mine->release(kRam, {0, kPages});
  EXPECT_EQ(Look().unique_pages, 0u);
  mine.reset();
  EXPECT_FALSE(ledger_exists());
}

TEST_F(LedgerCrashTest, TwoProcessesKilledAnywhereLeaveTheLedgerEmpty) { ChurnAndKill(2, 60, 1); }

TEST_F(LedgerCrashTest, TenProcessesKilledAnywhereLeaveTheLedgerEmpty) { ChurnAndKill(10, 15, 2); }

}  // namespace
}  // namespace mvgpu::domain
