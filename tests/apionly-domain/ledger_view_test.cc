// The reader of ledgers that may be anything: foreign, damaged, changing.

#include "apionly-domain/accounting/ledger_view.h"

#include <fcntl.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

// Offsets as ledger_format.h documents them, written down again here.
constexpr size_t kVersionAt = 8;
constexpr size_t kUuidAt = 56;
constexpr size_t kSequenceAt = 192;
constexpr size_t kEndAt = 200;
constexpr size_t kRowTableAt = 4096;
constexpr size_t kRowNameAt = kRowTableAt + 32;
constexpr size_t kRowBytes = 320;
constexpr size_t kRowChangesAt = kRowTableAt + 192;
constexpr size_t kRowHeldAt = kRowTableAt + 200;
constexpr size_t kFileTableAt = 24576;
constexpr size_t kHoldSegmentAt = kFileTableAt + 64;
constexpr size_t kSegmentsAt = 286720;

class LedgerViewTest : public LedgerFixture {
 protected:
  // The bytes of a ledger with two rows, two files and payer bytes, without anybody who has it
  // open.
  std::string Sample() {
    auto ledger = Open();
    auto lower = Join(*ledger, "lower");
    auto higher = Join(*ledger, "higher");
    EXPECT_THAT(higher->hold(kRam, 1000, {0, 500}), IsOk());
    EXPECT_THAT(lower->hold(kRam, 1000, {100, 100}), IsOk());
    EXPECT_THAT(lower->hold(kOtherRam, 40000, {39999, 1}), IsOk());
    std::string bytes = ReadBytes();
    higher->release(kRam, {0, 500});
    lower->release(kRam, {100, 100});
    lower->release(kOtherRam, {39999, 1});
    return bytes;
  }
  template <typename T>
  static void Put(std::string& bytes, size_t at, T value) {
    std::memcpy(bytes.data() + at, &value, sizeof value);
  }
  // Both the reader and one who wants to take part refuse it, and leave it as it is.
  void ExpectRefused(const std::string& bytes, const std::string& because) {
    WriteBytes(bytes);
    const auto snapshot = TryLook();
    ASSERT_THAT(snapshot, FailsWith(ErrorCode::kCorrupt)) << because;
    EXPECT_THAT(snapshot.error().message(), AllOf(HasSubstr(path()), HasSubstr(because)));
    ASSERT_THAT(TryOpen(), FailsWith(ErrorCode::kCorrupt)) << because;
    EXPECT_EQ(ReadBytes(), bytes);
  }
};

TEST_F(LedgerViewTest, UntouchedCopyIsReadAndInOrder) {
  WriteBytes(Sample());
  const LedgerSnapshot snapshot = Look();
  EXPECT_THAT(ProblemsOf(snapshot), IsEmpty());
  EXPECT_FALSE(snapshot.in_motion);
  EXPECT_EQ(snapshot.vm_uuid, kVm);
  EXPECT_EQ(snapshot.unique_pages, 501u);
  EXPECT_EQ(snapshot.charged_pages(), 501u);
  ASSERT_EQ(snapshot.rows.size(), 2u);
  EXPECT_EQ(snapshot.rows[0].unique_pages, 101u);
  EXPECT_EQ(snapshot.rows[0].least_unique_pages, 101u);
  EXPECT_EQ(snapshot.rows[0].most_unique_pages, 101u);
  EXPECT_EQ(snapshot.rows[0].charged_pages, 1u);
  EXPECT_EQ(snapshot.rows[1].charged_pages, 500u);
  ASSERT_EQ(snapshot.files.size(), 2u);
  EXPECT_EQ(snapshot.files[0].identity, kRam);
  EXPECT_EQ(snapshot.files[1].unique_pages, 1u);
}

TEST_F(LedgerViewTest, MissingLedgerIsToldApartFromADamagedOne) {
  const auto snapshot = TryLook();
  ASSERT_THAT(snapshot, FailsWith(ErrorCode::kSystem));
  EXPECT_EQ(snapshot.error().sys_errno(), ENOENT);
}

TEST_F(LedgerViewTest, LedgerCutAnywhereIsRefused) {
  const std::string whole = Sample();
  WriteBytes(whole);
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  for (size_t size = (whole.size() - 1) / 64 * 64;; size -= 64) {
    ASSERT_EQ(ftruncate(file.get(), static_cast<off_t>(size)), 0);
    const auto snapshot = TryLook();
    ASSERT_THAT(snapshot, FailsWith(ErrorCode::kCorrupt)) << size;
    ASSERT_THAT(snapshot.error().message(), HasSubstr("the size is " + std::to_string(size)));
    ASSERT_THAT(TryOpen(), FailsWith(ErrorCode::kCorrupt)) << size;
    struct stat st = {};
    ASSERT_EQ(fstat(file.get(), &st), 0);
    ASSERT_EQ(st.st_size, static_cast<off_t>(size)) << "a damaged ledger was changed";
    if (size == 0) break;
  }
}

TEST_F(LedgerViewTest, ForeignVersionSaysWhatWasFoundAndExpected) {
  std::string bytes = Sample();
  for (const uint32_t version : {3, 5}) {
    Put(bytes, kVersionAt, version);
    ExpectRefused(bytes, "the version is " + std::to_string(version) + ", expected 4");
  }
}

TEST_F(LedgerViewTest, FieldsThatLeadOutOfTheFileAreRefused) {
  const std::string good = Sample();
  const auto refuse = [&](size_t at, uint64_t value, const std::string& because) {
    std::string bytes = good;
    Put(bytes, at, value);
    ExpectRefused(bytes, because);
  };
  refuse(0, 0x1234, "the magic number");
  refuse(kUuidAt, 0x3231, "the vm uuid is 12");
  refuse(kEndAt, good.size() + 1, "the size");
  refuse(kEndAt, uint64_t{1} << 60, "the end of its segments");
  refuse(kHoldSegmentAt, 0, "its offset");
  refuse(kHoldSegmentAt, kSegmentsAt + 8, "its offset");
  refuse(kHoldSegmentAt, uint64_t{1} << 63, "its offset");
  refuse(kHoldSegmentAt, kSegmentsAt + 4096, "its magic number");
  refuse(kSegmentsAt + 16, uint64_t{1} << 40, "its pages");
  refuse(kSegmentsAt + 16, uint64_t{1} << 30, "its chunks");
  refuse(kSegmentsAt + 64, ~uint64_t{0}, "its directory");
  refuse(kRowTableAt, 7, "the state of row 0");
  refuse(kFileTableAt, 7, "the state of file 0");
}

TEST_F(LedgerViewTest, AnythingButAFileInItsPlaceIsRefusedWithoutWaiting) {
  const std::string elsewhere = dir_ + "/elsewhere";
  std::ofstream(elsewhere) << "x";
  const auto expect_refused = [&](const char* what) {
    EXPECT_THAT(TryLook(), FailsWith(ErrorCode::kCorrupt)) << what;
    EXPECT_THAT(TryOpen(), FailsWith(ErrorCode::kCorrupt)) << what;
    EXPECT_EQ(remove(path().c_str()), 0) << what;
  };
  ASSERT_EQ(mkdir(path().c_str(), 0700), 0);
  expect_refused("a directory");
  ASSERT_EQ(symlink(elsewhere.c_str(), path().c_str()), 0);
  expect_refused("a link");
  ASSERT_EQ(symlink("nowhere", path().c_str()), 0);
  expect_refused("a dangling link");
  ASSERT_EQ(mkfifo(path().c_str(), 0600), 0);
  expect_refused("a fifo");
  EXPECT_THAT(TryOpen(), IsOk());
}

TEST_F(LedgerViewTest, NoiseNeverCrashesReaderOrOwner) {
  const std::string good = Sample();
  int refused = 0;
  for (uint32_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    std::string bytes = good;
    // All of it, or words in the tables and segment headers, which is where it hurts most.
    const size_t damage = seed % 10 == 0 ? bytes.size() / 8 : 1 + random() % 40;
    for (size_t i = 0; i < damage; ++i) {
      const size_t places[] = {random() % (bytes.size() / 8), random() % 40, 512 + random() % 64,
                               2560 + random() % 256, kSegmentsAt / 8 + random() % 32};
      const uint64_t values[] = {random(), ~uint64_t{0}, random() % 8,
                                 bytes.size() - random() % 9000};
      Put(bytes, places[random() % 5] * 8, values[random() % 4]);
    }
    WriteBytes(bytes);
    const auto snapshot = TryLook();
    if (snapshot) {
      (void)ProblemsOf(*snapshot);
    } else {
      ++refused;
      ASSERT_THAT(snapshot, FailsWith(ErrorCode::kCorrupt));
    }
    const auto ledger = TryOpen();
    ASSERT_EQ(ledger.has_value(), snapshot.has_value());
    if (!ledger) {
      EXPECT_EQ(ReadBytes(), bytes);
    }
  }
  EXPECT_GT(refused, 70);
}

TEST_F(LedgerViewTest, NoiseUnderALivingOwnerNeverLeadsItOutOfTheFile) {
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    auto ledger = Open();
    auto lower = Join(*ledger);
    auto higher = Join(*ledger);
    ASSERT_THAT(higher->hold(kRam, 1000, {0, 500}), IsOk());
    ASSERT_THAT(lower->hold(kRam, 1000, {0, 100}), IsOk());
    const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
    for (int i = 0; i < 10; ++i) {
      const uint64_t value = random() % 2 == 0 ? random() : random() % 300000;
      const uint64_t places[] = {kFileTableAt / 8 + random() % 12, kSegmentsAt / 8 + random() % 12,
                                 kSegmentsAt / 8 + 1024 + random() % 12, kEndAt / 8};
      ASSERT_EQ(pwrite(file.get(), &value, 8, static_cast<off_t>(places[random() % 4] * 8)), 8);
    }
    if (lower->hold(kRam, 1000, {300, 100})) lower->release(kRam, {300, 100});
    if (lower->hold(kOtherRam, 1000, {0, 1000})) lower->release(kOtherRam, {0, 1000});
    lower->release(kRam, {0, 100});
    higher->release(kRam, {0, 500});
    lower.reset();
    higher.reset();
    ledger.reset();
    ASSERT_FALSE(ledger_exists());
  }
}

TEST_F(LedgerViewTest, FileThatShrinksAndGrowsWhileItIsReadDoesNoHarm) {
  const std::string whole = Sample();
  WriteBytes(whole);
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  std::atomic<bool> done = false;
  std::thread shrinker([&] {
    for (size_t size = 0; !done; size = (size + 4093) % whole.size()) {
      (void)!ftruncate(file.get(), static_cast<off_t>(size));
      (void)!pwrite(file.get(), whole.data(), whole.size(), 0);
    }
  });
  for (int i = 0; i < 2000; ++i) {
    const auto snapshot = TryLook();
    if (!snapshot) {
      ASSERT_THAT(snapshot, FailsWith(ErrorCode::kCorrupt));
    }
  }
  done = true;
  shrinker.join();
  WriteBytes(whole);
  EXPECT_THAT(TryLook(), IsOk());
}

TEST_F(LedgerViewTest, ReaderOfABusyLedgerSeesItInOrderOrInMotion) {
  auto ledger = Open();
  auto a = Join(*ledger);
  auto b = Join(*ledger);
  std::atomic<bool> done = false;
  std::thread worker([&] {
    while (!done) {
      for (LedgerRow* row : {b.get(), a.get()}) (void)row->hold(kRam, 5000, {0, 5000});
      for (LedgerRow* row : {b.get(), a.get()}) row->release(kRam, {0, 5000});
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  int quiet = 0;
  for (int i = 0; i < 300; ++i) {
    const LedgerSnapshot snapshot = Look();
    ASSERT_LE(snapshot.unique_pages, 5000u);
    ASSERT_EQ(snapshot.charged_pages(), snapshot.unique_pages);
    if (!snapshot.in_motion) ++quiet;
    ASSERT_THAT(ProblemsOf(snapshot), IsEmpty());
  }
  done = true;
  worker.join();
  EXPECT_GT(quiet, 0);
  EXPECT_FALSE(Look().in_motion);
}

TEST_F(LedgerViewTest, BitsOfARowThatNeverRestsAreWithinWhatItsCountersAllow) {
  auto ledger = Open();
  auto row = Join(*ledger);
  ASSERT_THAT(row->hold(kRam, 100000, {0, 1000}), IsOk());
  std::atomic<bool> done = false;
  std::thread worker([&] {
    for (uint64_t page = 2000; !done; page = page < 90000 ? page + 1 : 2000) {
      (void)row->hold(kRam, 100000, {page, 70});
      row->release(kRam, {page, 70});
    }
  });
  int bounded = 0;
  for (int i = 0; i < 300; ++i) {
    const LedgerSnapshot snapshot = Look();
    ASSERT_THAT(ProblemsOf(snapshot), IsEmpty());
    bounded += snapshot.rows[0].most_unique_pages != UINT64_MAX;
    ASSERT_GE(snapshot.rows[0].unique_pages, 1000u);
  }
  done = true;
  worker.join();
  EXPECT_GT(bounded, 0);
  row->release(kRam, {0, 1000});
}

TEST_F(LedgerViewTest, ChangeThatNobodyFinishedIsReportedAsMotion) {
  std::string bytes = Sample();
  Put(bytes, kSequenceAt, uint64_t{7});
  WriteBytes(bytes);
  EXPECT_TRUE(Look().in_motion);
  Put(bytes, kSequenceAt, uint64_t{8});
  WriteBytes(bytes);
  EXPECT_FALSE(Look().in_motion);
  // The row's owner, this process, is alive and in the midst of a change.
  Put(bytes, kRowChangesAt, uint64_t{7});
  WriteBytes(bytes);
  const LedgerSnapshot snapshot = Look();
  EXPECT_TRUE(snapshot.in_motion);
  EXPECT_EQ(snapshot.rows[0].unique_pages, 101u);
  EXPECT_EQ(snapshot.rows[0].most_unique_pages, UINT64_MAX);
}

TEST_F(LedgerViewTest, BrokenInvariantsAreNamed) {
  std::string bytes = Sample();
  Put(bytes, kRowHeldAt, uint64_t{77});
  WriteBytes(bytes);
  EXPECT_THAT(ProblemsOf(Look()),
              ::testing::ElementsAre(HasSubstr("counts 77 unique pages but holds 101")));
  bytes = Sample();
  Put(bytes, kRowTableAt, uint32_t{0});          // the row is free, and its bits are still there
  Put(bytes, kFileTableAt + 24, uint64_t{150});  // the file is shorter than what is held of it
  WriteBytes(bytes);
  EXPECT_THAT(ProblemsOf(Look()),
              ::testing::ElementsAre(HasSubstr("501 unique pages are held but 500 are charged"),
                                     HasSubstr("of 150 pages: 350 pages are held beyond its end"),
                                     HasSubstr("100 pages are held by rows that nobody has"),
                                     HasSubstr("1 pages are held by rows that nobody has")));
}

TEST_F(LedgerViewTest, NamesAreMadePrintable) {
  std::string bytes = Sample();
  std::memcpy(bytes.data() + kRowNameAt, "\x1b[31mred\n\xff", 11);
  WriteBytes(bytes);
  EXPECT_EQ(Look().rows[0].name, "?[31mred??");
}

TEST_F(LedgerViewTest, DirectoryListsLedgersAndNothingElse) {
  auto ledger = Open();
  for (const char* other :
       {"/notes.ledger", "/0A1B2C3D-0000-4000-8000-00000000ABCD.ledger", "/x.txt"}) {
    std::ofstream(dir_ + other) << "x";
  }
  auto dir = RuntimeDir::OpenForReading(dir_);
  ASSERT_THAT(dir, IsOk());
  EXPECT_THAT(dir->ledgers(), testing::IsOkAndHolds(::testing::ElementsAre(kVm)));
}

}  // namespace
}  // namespace mvgpu::domain
