// Every reading of a ledger, and what changes it, on files with bits and words flipped: whatever
// the damage, an answer or one kCorrupt; and what is refused is left as it is.

#include <fcntl.h>

#include <cstring>
#include <random>

#include "apionly-domain/accounting/ledger_file.h"
#include "apionly-domain/accounting/ledger_lookup.h"
#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;

// Offsets as ledger_format.h documents them, written down again here.
constexpr size_t kRowTableAt = 4096;
constexpr size_t kRowBytes = 320;
constexpr size_t kMappingSegmentAt = kRowTableAt + 112;
constexpr size_t kFileTableAt = 24576;
constexpr size_t kSegmentsAt = 286720;

class LedgerNoiseTest : public LedgerFixture {
 protected:
  // The bytes of a ledger with two rows that share pages and list mappings.
  std::string Sample() {
    auto ledger = Open();
    auto lower = Join(*ledger, "lower");
    auto higher = Join(*ledger, "higher");
    EXPECT_THAT(higher->hold(kRam, 1000, {0, 500}), IsOk());
    EXPECT_THAT(lower->hold(kRam, 1000, {100, 100}), IsOk());
    for (uint64_t i = 0; i < 70; ++i) {
      lower->list_mapping({*IovaRange::FromStartAndSize(Iova(i << 20), 1 << 20), Access::kReadWrite,
                           kRam, i << 20});
    }
    std::string bytes = ReadBytes();
    higher->release(kRam, {0, 500});
    lower->release(kRam, {100, 100});
    return bytes;
  }
  static uint64_t WordAt(const std::string& bytes, size_t at) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, sizeof word);
    return word;
  }
  // Where damage hurts: header, rows, file records, headers and directories of segments, entries.
  static size_t Place(const std::string& bytes, std::mt19937_64& random) {
    const size_t mappings = WordAt(bytes, kMappingSegmentAt) / 8;
    const size_t places[] = {random() % (bytes.size() / 8),
                             random() % 40,
                             kRowTableAt / 8 + random() % (2 * kRowBytes / 8),
                             kFileTableAt / 8 + random() % 80,
                             kSegmentsAt / 8 + random() % 32,
                             mappings + random() % 40,
                             mappings + 4096 / 8 + random() % 64};
    return places[random() % std::size(places)] * 8;
  }
  static void Damage(std::string& bytes, std::mt19937_64& random) {
    const std::string good = bytes;
    const size_t flips = 1 + random() % 6;
    for (size_t i = 0; i < flips; ++i) {
      const size_t at = Place(good, random);
      if (at + 8 > bytes.size()) continue;
      uint64_t word = WordAt(bytes, at);
      const uint64_t values[] = {random(), ~uint64_t{0}, random() % 8,
                                 bytes.size() - random() % 9000};
      word = random() % 2 == 0 ? word ^ (uint64_t{1} << (random() % 64)) : values[random() % 4];
      std::memcpy(bytes.data() + at, &word, sizeof word);
    }
    if (random() % 16 == 0) bytes.resize(random() % bytes.size());
  }
  template <typename T>
  static bool IsAnswer(const Result<T>& result) {
    EXPECT_TRUE(result || result.error().code() == ErrorCode::kCorrupt) << result.error().message();
    return result.has_value();
  }
  // All readings; the number of those that gave an answer.
  int ReadAll(std::mt19937_64& random) const {
    const UniqueFd fd(open(path().c_str(), O_RDONLY | O_CLOEXEC));
    const auto snapshot = ReadLedgerFile(fd.get(), path(), kVm);
    if (snapshot) (void)ProblemsOf(*snapshot);
    const auto row = static_cast<unsigned>(random() % 64);
    return IsAnswer(snapshot) + IsAnswer(ReadLedgerWithout(fd.get(), path(), kVm, row)) +
           IsAnswer(ReadPageHolders(fd.get(), path(), kVm, kRam, random() % 600)) +
           IsAnswer(ReadPageHolders(fd.get(), path(), kVm, kRam, random() >> 13)) +
           IsAnswer(ReadMappings(fd.get(), path(), kVm, Iova(random() % (80 << 20)))) +
           IsAnswer(ReadMappings(fd.get(), path(), kVm, std::nullopt));
  }
};

TEST_F(LedgerNoiseTest, ReadersAnswerOrRefuseAndChangeNothing) {
  const std::string good = Sample();
  int answers = 0;
  int refusals = 0;
  for (uint32_t seed = 1; seed <= 150; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    std::string bytes = good;
    Damage(bytes, random);
    WriteBytes(bytes);
    const int answered = ReadAll(random);
    answers += answered;
    refusals += 6 - answered;
    ASSERT_EQ(ReadBytes(), bytes);
  }
  EXPECT_GT(answers, 150);
  EXPECT_GT(refusals, 150);
}

TEST_F(LedgerNoiseTest, UpkeepRefusesOrRepairsAndNeverWithoutReason) {
  const std::string good = Sample();
  int repaired = 0;
  for (uint32_t seed = 1; seed <= 80; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    std::string bytes = good;
    Damage(bytes, random);
    WriteBytes(bytes);
    auto dir = RuntimeDir::OpenForReading(dir_);
    const auto self = CurrentProcess();
    ASSERT_THAT(dir, IsOk());
    ASSERT_THAT(self, IsOk());
    const LedgerFile file(std::move(*dir), kVm, *self);
    const bool is_readable = TryLook().has_value();
    const auto dropped = file.DropDead();
    ASSERT_EQ(dropped.has_value(), is_readable);
    if (!is_readable) {
      ASSERT_THAT(dropped, FailsWith(ErrorCode::kCorrupt));
      ASSERT_THAT(file.RemoveUnused(), FailsWith(ErrorCode::kCorrupt));
      ASSERT_EQ(ReadBytes(), bytes);
      continue;
    }
    ++repaired;
  }
  EXPECT_GT(repaired, 10);
}

// A domain that lists mappings in a ledger that is damaged under it stays within the file.
TEST_F(LedgerNoiseTest, OwnerWhoseListIsDamagedStaysWithinTheFile) {
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    auto ledger = Open();
    auto row = Join(*ledger);
    const auto list = [&](uint64_t i) {
      row->list_mapping(
          {*IovaRange::FromStartAndSize(Iova(i << 20), 1 << 20), Access::kRead, kRam, 0});
    };
    for (uint64_t i = 0; i < 65; ++i) list(i);
    const std::string bytes = ReadBytes();
    const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
    const size_t segment = WordAt(bytes, kMappingSegmentAt);
    for (int i = 0; i < 4; ++i) {
      const uint64_t value = random() % 2 == 0 ? random() : random() % 300000;
      const size_t places[] = {kMappingSegmentAt, segment + random() % 12 * 8, 200};
      ASSERT_EQ(pwrite(file.get(), &value, 8, static_cast<off_t>(places[random() % 3])), 8);
    }
    for (uint64_t i = 65; i < 200; ++i) list(i);
    for (uint64_t i = 0; i < 200; ++i) {
      row->unlist_mapping(*IovaRange::FromStartAndSize(Iova(i << 20), 1 << 20));
    }
    row.reset();
    ledger.reset();
    ASSERT_FALSE(ledger_exists());
  }
}

}  // namespace
}  // namespace mvgpu::domain
