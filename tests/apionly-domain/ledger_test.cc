#include "apionly-domain/accounting/ledger.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <chrono>
#include <cstddef>
#include <thread>
#include <vector>

#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;
using Counts = LedgerRow::Counts;

class LedgerTest : public LedgerFixture {};

TEST_F(LedgerTest, HeldPagesAreChargedAndReleasedInPieces) {
  auto ledger = Open();
  auto row = Join(*ledger);
  EXPECT_THAT(row->hold(kRam, 1000, {60, 10}), IsOk());  // over a word boundary
  EXPECT_EQ(row->counts(), (Counts{10, 10}));
  row->release(kRam, {63, 2});
  EXPECT_EQ(row->counts(), (Counts{8, 8}));
  row->release(kRam, {60, 3});
  row->release(kRam, {65, 5});
  EXPECT_EQ(row->counts(), (Counts{0, 0}));
  ExpectInOrder();
}

TEST_F(LedgerTest, EveryAlignmentAroundWordAndChunkBoundariesCountsExactly) {
  auto ledger = Open();
  auto row = Join(*ledger);
  for (const uint64_t boundary : {uint64_t{64}, uint64_t{4096}, uint64_t{32768}, uint64_t{65536}}) {
    for (uint64_t before = 0; before <= 2; ++before) {
      for (uint64_t count = 1; count <= 4; ++count) {
        const PageRun run{boundary - before, count};
        ASSERT_THAT(row->hold(kRam, 100000, run), IsOk());
        ASSERT_EQ(Look().unique_pages, count);
        row->release(kRam, run);
        ASSERT_EQ(Look().unique_pages, 0u);
      }
    }
  }
  ExpectInOrder();
}

TEST_F(LedgerTest, SecondHolderIsNotChargedUntilThePayerLeaves) {
  auto ledger = Open();
  auto first = Join(*ledger, "first");
  auto second = Join(*ledger, "second");
  EXPECT_THAT(first->hold(kRam, 1000, {0, 100}), IsOk());
  EXPECT_THAT(second->hold(kRam, 1000, {50, 100}), IsOk());
  EXPECT_EQ(first->counts(), (Counts{100, 100}));
  EXPECT_EQ(second->counts(), (Counts{100, 50}));
  EXPECT_EQ(Look().unique_pages, 150u);
  first->release(kRam, {0, 100});
  EXPECT_EQ(first->counts(), (Counts{0, 0}));
  EXPECT_EQ(second->counts(), (Counts{100, 100}));
  ExpectInOrder();
  second->release(kRam, {50, 100});
}

TEST_F(LedgerTest, ChargeStaysWithThePayerWhenALowerRowComesLater) {
  auto ledger = Open();
  auto lower = Join(*ledger, "lower");
  auto higher = Join(*ledger, "higher");
  EXPECT_THAT(higher->hold(kRam, 100000, {0, 70000}), IsOk());
  EXPECT_THAT(lower->hold(kRam, 100000, {10, 69000}), IsOk());
  EXPECT_EQ(higher->counts(), (Counts{70000, 70000}));
  EXPECT_EQ(lower->counts(), (Counts{69000, 0}));
  ExpectInOrder();
  // Coming and going of the one who does not pay changes nothing.
  lower->release(kRam, {10, 69000});
  EXPECT_THAT(lower->hold(kRam, 100000, {10, 69000}), IsOk());
  EXPECT_EQ(higher->counts(), (Counts{70000, 70000}));
  higher->release(kRam, {0, 70000});
  EXPECT_EQ(lower->counts(), (Counts{69000, 69000}));
  // Nor does a payer that comes back get its charge back.
  EXPECT_THAT(higher->hold(kRam, 100000, {0, 70000}), IsOk());
  EXPECT_EQ(lower->counts(), (Counts{69000, 69000}));
  EXPECT_EQ(higher->counts(), (Counts{70000, 1000}));
  ExpectInOrder();
  lower->release(kRam, {10, 69000});
  higher->release(kRam, {0, 70000});
}

TEST_F(LedgerTest, ThreeSharersHandTheChargeOnUntilTheLastHasGone) {
  auto ledger = Open();
  auto a = Join(*ledger, "a");
  auto b = Join(*ledger, "b");
  auto c = Join(*ledger, "c");
  for (auto* row : {b.get(), a.get(), c.get()}) EXPECT_THAT(row->hold(kRam, 64, {0, 64}), IsOk());
  EXPECT_EQ(b->counts().charged_pages, 64u);
  b->release(kRam, {0, 64});
  EXPECT_EQ(a->counts().charged_pages + c->counts().charged_pages, 64u);
  a->release(kRam, {0, 64});
  EXPECT_EQ(c->counts(), (Counts{64, 64}));
  c->release(kRam, {0, 64});
  EXPECT_EQ(Look().charged_pages(), 0u);
  ExpectInOrder();
}

TEST_F(LedgerTest, FilesAreApartAlsoAtTheSamePage) {
  auto ledger = Open();
  auto row = Join(*ledger);
  EXPECT_THAT(row->hold(kRam, 10, {3, 1}), IsOk());
  EXPECT_THAT(row->hold(kOtherRam, 10, {3, 1}), IsOk());
  EXPECT_EQ(row->counts(), (Counts{2, 2}));
  row->release(kRam, {3, 1});
  EXPECT_EQ(row->counts(), (Counts{1, 1}));
  row->release(kOtherRam, {3, 1});
}

TEST_F(LedgerTest, TwoLedgerObjectsOnOneFileShareTheAccounts) {
  auto one = Open();
  auto two = Open();
  auto a = Join(*one, "a");
  auto b = Join(*two, "b");
  EXPECT_THAT(a->hold(kRam, 100000, {0, 40000}), IsOk());
  EXPECT_THAT(b->hold(kRam, 100000, {0, 40000}), IsOk());
  EXPECT_EQ(b->counts(), (Counts{40000, 0}));
  a->release(kRam, {0, 40000});
  EXPECT_EQ(b->counts(), (Counts{40000, 40000}));
  a.reset();
  one.reset();
  EXPECT_TRUE(ledger_exists());
  ExpectInOrder();
  b->release(kRam, {0, 40000});
}

TEST_F(LedgerTest, FiguresOfTheDomainAreShown) {
  auto ledger = Open();
  auto row = Join(*ledger, "gpu0");
  row->set_mapped_pages(1000);
  row->set_pinned_pages(30);
  row->set_locked_pages(64);
  const LedgerSnapshot snapshot = Look();
  ASSERT_EQ(snapshot.rows.size(), 1u);
  EXPECT_EQ(snapshot.rows[0].name, "gpu0");
  EXPECT_EQ(snapshot.rows[0].pin_backend, "mlock");
  EXPECT_EQ(snapshot.rows[0].owner.pid, static_cast<uint32_t>(getpid()));
  EXPECT_EQ(snapshot.rows[0].liveness, Liveness::kAlive);
  EXPECT_EQ(snapshot.rows[0].mapped_pages, 1000u);
  EXPECT_EQ(snapshot.rows[0].pinned_pages, 30u);
  EXPECT_EQ(snapshot.rows[0].locked_pages, 64u);
}

TEST_F(LedgerTest, FileIsPrivateAndGoesWithTheLastRow) {
  auto ledger = Open();
  auto a = Join(*ledger);
  auto b = Join(*ledger);
  struct stat st = {};
  ASSERT_EQ(stat(path().c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0600u);
  a.reset();
  EXPECT_TRUE(ledger_exists());
  b.reset();
  EXPECT_FALSE(ledger_exists());
}

TEST_F(LedgerTest, LedgerWithoutAnyRowGoesWhenItIsClosed) {
  auto ledger = Open();
  EXPECT_TRUE(ledger_exists());
  ledger.reset();
  EXPECT_FALSE(ledger_exists());
}

TEST_F(LedgerTest, JoiningAgainAfterTheFileWasRemovedMakesANewOneThatAllShare) {
  auto one = Open();
  auto two = Open();
  Join(*one).reset();  // removes the file under both
  ASSERT_FALSE(ledger_exists());
  auto a = Join(*one);
  auto b = Join(*two);
  EXPECT_THAT(a->hold(kRam, 10, {0, 10}), IsOk());
  EXPECT_THAT(b->hold(kRam, 10, {0, 10}), IsOk());
  EXPECT_EQ(b->counts(), (Counts{10, 0}));
  EXPECT_EQ(Look().rows.size(), 2u);
  a->release(kRam, {0, 10});
  b->release(kRam, {0, 10});
}

TEST_F(LedgerTest, SixtyFourDomainsJoinAndTheNextOneWhenOneHasLeft) {
  auto ledger = Open();
  std::vector<std::unique_ptr<LedgerRow>> rows;
  for (int i = 0; i < 64; ++i) rows.push_back(Join(*ledger));
  EXPECT_THAT(ledger->join(DomainKind::kApiOnly, "one more", "none"), FailsWith(ErrorCode::kLimit));
  rows[20].reset();
  auto late = Join(*ledger, "late");
  EXPECT_THAT(late->hold(kRam, 10, {0, 10}), IsOk());
  late->release(kRam, {0, 10});
}

TEST_F(LedgerTest, AllSixtyFourMayShareAPage) {
  auto ledger = Open();
  std::vector<std::unique_ptr<LedgerRow>> rows;
  for (int i = 0; i < 64; ++i) rows.push_back(Join(*ledger));
  for (size_t i = 64; i-- > 0;) ASSERT_THAT(rows[i]->hold(kRam, 300, {0, 200}), IsOk());
  EXPECT_EQ(rows[63]->counts().charged_pages, 200u);
  for (size_t i = 64; i-- > 0;) {
    EXPECT_EQ(Look().charged_pages(), 200u);
    rows[i]->release(kRam, {0, 200});
  }
  EXPECT_EQ(Look().charged_pages(), 0u);
  ExpectInOrder();
}

TEST_F(LedgerTest, FilesBeyondTheTableAreRefusedUntilOneIsNoLongerHeld) {
  auto ledger = Open();
  auto row = Join(*ledger);
  auto other = Join(*ledger);
  for (uint64_t i = 0; i < 256; ++i) ASSERT_THAT(row->hold({1, i}, 10, {0, 1}), IsOk());
  EXPECT_THAT(other->hold({1, 256}, 10, {0, 1}), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(other->counts(), (Counts{0, 0}));
  row->release({1, 77}, {0, 1});
  EXPECT_THAT(other->hold({1, 256}, 100000, {90000, 10}), IsOk());
  EXPECT_EQ(row->counts(), (Counts{255, 255}));
  EXPECT_EQ(other->counts(), (Counts{10, 10}));
  ExpectInOrder();
  other->release({1, 256}, {90000, 10});
  for (uint64_t i = 0; i < 256; ++i) {
    if (i != 77) row->release({1, i}, {0, 1});
  }
}

TEST_F(LedgerTest, FileMayGrowWhileItsPagesAreHeld) {
  auto ledger = Open();
  auto lower = Join(*ledger);
  auto higher = Join(*ledger);
  EXPECT_THAT(higher->hold(kRam, 100, {0, 100}), IsOk());
  EXPECT_THAT(lower->hold(kRam, 100, {0, 100}), IsOk());  // names payers
  EXPECT_THAT(higher->hold(kRam, 1 << 20, {500000, 100000}), IsOk());
  EXPECT_THAT(lower->hold(kRam, 1 << 20, {500000, 100000}), IsOk());
  EXPECT_EQ(higher->counts(), (Counts{100100, 100100}));
  EXPECT_EQ(lower->counts(), (Counts{100100, 0}));
  ExpectInOrder();
  for (auto* row : {higher.get(), lower.get()}) {
    row->release(kRam, {0, 100});
    row->release(kRam, {500000, 100000});
  }
}

// Also where there is room for the bits already, and the change could be made without a look at it.
TEST_F(LedgerTest, LargerFileIsKnownAsSuchWhenItsNewPagesAreHeld) {
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_THAT(row->hold(kRam, 100, {0, 10}), IsOk());
  ASSERT_THAT(row->hold(kRam, 100, {20, 10}), IsOk());
  ASSERT_THAT(row->hold(kRam, 200, {150, 10}), IsOk());
  EXPECT_EQ(Look().files[0].pages, 200u);
  ExpectInOrder();
  for (const uint64_t page : {0, 20, 150}) row->release(kRam, {page, 10});
}

TEST_F(LedgerTest, ShortRunsBeyondTheFileAreRefusedWhereThereIsRoomForThem) {
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_THAT(row->hold(kRam, 100, {0, 10}), IsOk());
  EXPECT_THAT(row->hold(kRam, 100, {90, 20}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(row->hold(kRam, 100, {100, 1}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(row->hold(kRam, 80, {79, 2}), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(Look().unique_pages, 10u);
  row->release(kRam, {0, 10});
}

TEST_F(LedgerTest, PagesBeyondTheFileAreRefused) {
  auto ledger = Open();
  auto row = Join(*ledger);
  EXPECT_THAT(row->hold(kRam, 10, {9, 2}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(row->hold(kRam, 10, {UINT64_MAX, 2}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(row->hold(kRam, UINT64_MAX, {0, 1}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(row->hold(kRam, uint64_t{1} << 36, {0, 1}), IsOk());
  row->release(kRam, {0, 1});
}

TEST_F(LedgerTest, AllOf64GiBCostsOneBitPerPageAndOwner) {
  constexpr uint64_t kPages = (uint64_t{64} << 30) / 4096;
  auto ledger = Open();
  auto a = Join(*ledger);
  auto b = Join(*ledger);
  EXPECT_THAT(a->hold(kRam, kPages, {0, kPages}), IsOk());
  EXPECT_THAT(b->hold(kRam, kPages, {0, kPages}), IsOk());
  struct stat st = {};
  ASSERT_EQ(stat(path().c_str(), &st), 0);
  EXPECT_LE(static_cast<uint64_t>(st.st_blocks) * 512, 2 * kPages / 8 + 64 * 1024);
  EXPECT_EQ(Look().unique_pages, kPages);
  a->release(kRam, {0, kPages});
  b->release(kRam, {0, kPages});
  a.reset();  // gives its memory back
  ASSERT_EQ(stat(path().c_str(), &st), 0);
  EXPECT_LE(static_cast<uint64_t>(st.st_blocks) * 512, kPages / 8 + 64 * 1024);
}

TEST_F(LedgerTest, FileSizeLimitOfTheProcessFailsAHoldCleanly) {
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_THAT(row->hold(kRam, 10, {0, 1}), IsOk());
  rlimit saved = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &saved), 0);
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  const rlimit tight = {300 * 1024, saved.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &tight), 0);
  const auto outcome = row->hold(kOtherRam, 1 << 20, {0, 1});
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &saved), 0);
  signal(SIGXFSZ, handler);
  EXPECT_THAT(outcome, FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(row->counts(), (Counts{1, 1}));
  ExpectInOrder();
  EXPECT_THAT(row->hold(kOtherRam, 1 << 20, {0, 1}), IsOk());
  row->release(kOtherRam, {0, 1});
  row->release(kRam, {0, 1});
}

TEST_F(LedgerTest, FullFileSystemFailsAHoldInsteadOfKillingTheProcess) {
  if (mount("tmpfs", dir_.c_str(), "tmpfs", 0, "size=256k,mode=700") != 0) {
    GTEST_SKIP() << "may not mount a small tmpfs";
  }
  {
    auto ledger = Open();
    auto lower = Join(*ledger);
    auto higher = Join(*ledger);
    constexpr uint64_t kPages = 1 << 24;
    EXPECT_THAT(higher->hold(kRam, kPages, {0, 100}), IsOk());
    EXPECT_THAT(higher->hold(kRam, kPages, {100, kPages - 100}), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(higher->counts(), (Counts{100, 100}));
    // No room for payer bytes either: the lower row does not become a holder.
    EXPECT_THAT(lower->hold(kRam, kPages, {0, 100}), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(lower->counts(), (Counts{0, 0}));
    ExpectInOrder();
    higher->release(kRam, {0, 100});
  }
  umount(dir_.c_str());
}

TEST_F(LedgerTest, ThreadsOfOneProcessMayShareAllOfIt) {
  auto ledger = Open();
  std::vector<std::unique_ptr<LedgerRow>> rows;
  for (int i = 0; i < 4; ++i) rows.push_back(Join(*ledger));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < rows.size(); ++i) {
    threads.emplace_back([row = rows[i].get(), i] {
      for (uint64_t round = 0; round < 200; ++round) {
        const PageRun run{(round * 37 + i * 50) % 900, 100};
        ASSERT_THAT(row->hold(kRam, 1000, run), IsOk());
        row->set_pinned_pages(round);
        row->release(kRam, run);
      }
    });
  }
  for (int i = 0; i < 20; ++i) (void)rows[0]->counts();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Look().unique_pages, 0u);
  ExpectInOrder();
}

TEST_F(LedgerTest, HoldsAndReleasesDoNotWaitForWhoeverHasTheLock) {
  auto ledger = Open();
  auto a = Join(*ledger);
  auto b = Join(*ledger);
  for (LedgerRow* row : {a.get(), b.get()}) {
    ASSERT_THAT(row->hold(kRam, 1000, {0, 10}), IsOk());
    ASSERT_THAT(row->hold(kRam, 1000, {100, 10}), IsOk());
  }
  // Now there is room for the bits of both and for payer bytes.
  for (LedgerRow* row : {b.get(), a.get()}) ASSERT_THAT(row->hold(kRam, 1000, {999, 1}), IsOk());
  for (LedgerRow* row : {b.get(), a.get()}) row->release(kRam, {999, 1});
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  void* header = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  ASSERT_NE(header, MAP_FAILED);
  auto* lock = reinterpret_cast<pthread_mutex_t*>(static_cast<std::byte*>(header) + 128);
  ASSERT_EQ(pthread_mutex_lock(lock), 0);
  const auto start = std::chrono::steady_clock::now();
  b->release(kRam, {0, 10});
  EXPECT_THAT(b->hold(kRam, 1000, {200, 300}), IsOk());
  EXPECT_THAT(a->hold(kRam, 1000, {200, 300}), IsOk());
  a->release(kRam, {200, 300});
  b->release(kRam, {200, 300});
  // Those that need the lock wait for 5 s.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(4));
  ASSERT_EQ(pthread_mutex_unlock(lock), 0);
  munmap(header, 4096);
  EXPECT_EQ(a->counts(), (Counts{20, 20}));
  EXPECT_EQ(b->counts(), (Counts{10, 0}));
  ExpectInOrder();
  a->release(kRam, {0, 10});
  a->release(kRam, {100, 10});
  b->release(kRam, {100, 10});
}

TEST_F(LedgerTest, DirectoryIsMadeForThisUserOnly) {
  const std::string fresh = dir_ + "/run";
  auto ledger = Ledger::Open({fresh, kVm});
  ASSERT_THAT(ledger, IsOk());
  struct stat st = {};
  ASSERT_EQ(stat(fresh.c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0700u);
  EXPECT_EQ((*ledger)->path(), fresh + "/" + kVm + ".ledger");
}

TEST_F(LedgerTest, DirectoryThatOthersMayWriteIsRefused) {
  ASSERT_EQ(chmod(dir_.c_str(), 0777), 0);
  EXPECT_THAT(TryOpen(), FailsWith(ErrorCode::kPermission));
  ASSERT_EQ(chmod(dir_.c_str(), 0700), 0);
  EXPECT_THAT(TryOpen(), IsOk());
}

TEST_F(LedgerTest, DirectoryThatIsALinkOrAFileOrMissingIsRefused) {
  ASSERT_EQ(symlink(dir_.c_str(), (dir_ + "/link").c_str()), 0);
  EXPECT_THAT(Ledger::Open({dir_ + "/link", kVm}), FailsWith(ErrorCode::kInvalid));
  std::ofstream(dir_ + "/file") << "x";
  EXPECT_THAT(Ledger::Open({dir_ + "/file", kVm}), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Ledger::Open({dir_ + "/no/such", kVm}), FailsWith(ErrorCode::kSystem));
  ASSERT_EQ(mkdir((dir_ + "/real").c_str(), 0700), 0);
  EXPECT_THAT(Ledger::Open({dir_ + "/real", kVm}), IsOk());
}

TEST_F(LedgerTest, UuidIsCheckedAndWrittenInLowerCase) {
  for (const char* bad :
       {"", "x", "0a1b2c3d-0000-4000-8000-00000000abc", "../../../../../../../etc/passwd/xxxx",
        "0a1b2c3d-0000-4000-8000-00000000abcg", "0a1b2c3d00000-4000-8000-00000000abcd"}) {
    EXPECT_THAT(Ledger::Open({dir_, bad}), FailsWith(ErrorCode::kInvalid)) << bad;
  }
  auto ledger = Ledger::Open({dir_, "0A1B2C3D-0000-4000-8000-00000000ABCD"});
  ASSERT_THAT(ledger, IsOk());
  EXPECT_EQ((*ledger)->path(), path());
}

TEST_F(LedgerTest, LedgerOfAnotherUserIsRefusedAndLeftAlone) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to give a file away";
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_EQ(chown(path().c_str(), 12345, 12345), 0);
  EXPECT_THAT(TryOpen(), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(TryLook(), FailsWith(ErrorCode::kPermission));
  EXPECT_TRUE(ledger_exists());
  ASSERT_EQ(chown(path().c_str(), 0, 0), 0);
  EXPECT_THAT(TryOpen(), IsOk());
}

TEST_F(LedgerTest, DirectoryOfAnotherUserIsRefused) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to give a directory away";
  ASSERT_EQ(chown(dir_.c_str(), 12345, 12345), 0);
  EXPECT_THAT(TryOpen(), FailsWith(ErrorCode::kPermission));
  ASSERT_EQ(chown(dir_.c_str(), 0, 0), 0);
  EXPECT_THAT(TryOpen(), IsOk());
}

TEST_F(LedgerTest, LedgerThatOthersMayOpenIsRefused) {
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_EQ(chmod(path().c_str(), 0644), 0);
  EXPECT_THAT(TryOpen(), FailsWith(ErrorCode::kPermission));
  ASSERT_EQ(chmod(path().c_str(), 0600), 0);
  EXPECT_THAT(TryOpen(), IsOk());
}

TEST(LedgerDefaultDirTest, IsRunForRootAndXdgForOthers) {
  if (geteuid() == 0) {
    EXPECT_THAT(Ledger::DefaultRuntimeDir(), testing::IsOkAndHolds("/run/mvgpu"));
    return;
  }
  setenv("XDG_RUNTIME_DIR", "/run/user/7", 1);
  EXPECT_THAT(Ledger::DefaultRuntimeDir(), testing::IsOkAndHolds("/run/user/7/mvgpu"));
  unsetenv("XDG_RUNTIME_DIR");
  EXPECT_THAT(Ledger::DefaultRuntimeDir(), FailsWith(ErrorCode::kInvalid));
}

}  // namespace
}  // namespace mvgpu::domain
