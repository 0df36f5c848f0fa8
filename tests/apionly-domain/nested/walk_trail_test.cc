// Walks that begin where an earlier one came by: with the same results, and fewer loads.

#include <optional>
#include <random>

#include "apionly-domain/nested/vtd_second_stage.h"
#include "tests/apionly-domain/nested/tables_fixture.h"

namespace mvgpu::domain {
namespace {

class CountingTables final : public GuestTables {
 public:
  explicit CountingTables(const GuestTables* tables) : tables_(*tables) {}
  tl::expected<void, Fault> load(uint64_t address, std::span<uint64_t> words) const override {
    ++loads;
    return tables_.load(address, words);
  }
  tl::expected<uint64_t, Fault> compare_exchange(uint64_t address, uint64_t expected,
                                                 uint64_t desired) const override {
    ++exchanges;
    return tables_.compare_exchange(address, expected, desired);
  }
  mutable uint64_t loads = 0;
  mutable uint64_t exchanges = 0;

 private:
  const GuestTables& tables_;
};

// Four levels: 0x1000 -> 0x2000 -> 0x3000 and 0x4000 -> 0x5000, 0x6000 and a page of 2 MiB.
class WalkTrailTest : public TablesTest {
 protected:
  static constexpr uint64_t kRoot = 0x1000;
  void SetUp() override {
    TablesTest::SetUp();
    counting_.emplace(tables_.get());
    walker_.emplace(VtdSecondStageFormat{}, &*counting_, &trail_);
    for (uint64_t at = 0; at < 0x8000; at += 8) Enter(at, 0);
    Enter(0x1000, 0x2003);
    Enter(0x2000, 0x3003);
    Enter(0x2008, 0x4003);
    Enter(0x3000, 0x5003);
    Enter(0x3008, 0x6003);
    Enter(0x4000, 0x60'0083);
    for (uint64_t i = 0; i < 512; ++i) {
      Enter(0x5000 + i * 8, (0x100 + i) << 12 | 3);
      Enter(0x6000 + i * 8, (0x400 + i) << 12 | 1);
    }
  }
  void Enter(uint64_t at, uint64_t entry) { ram_.put(at, entry); }
  uint64_t LoadsOf(uint64_t address, Wanted wanted = Access::kRead, uint64_t root = kRoot) {
    const uint64_t before = counting_->loads;
    const WalkResult along = walker_->walk(root, address, wanted);
    const uint64_t loads = counting_->loads - before;
    const VtdSecondStage plain({}, tables_.get());
    EXPECT_EQ(along, plain.walk(root, address, wanted)) << std::hex << address;
    return loads;
  }

  std::optional<CountingTables> counting_;
  VtdSecondStage::Trail trail_;
  std::optional<VtdSecondStage> walker_;
};

TEST_F(WalkTrailTest, AWalkBeginsAtTheLowestTableThatItShares) {
  EXPECT_EQ(LoadsOf(0x1000), 4);
  EXPECT_EQ(LoadsOf(0x1'f000), 1) << "the same last table";
  EXPECT_EQ(LoadsOf(0x20'0000), 2) << "the next of 2 MiB";
  EXPECT_EQ(LoadsOf(0x1000), 2) << "back";
  EXPECT_EQ(LoadsOf(0x4000'0000), 2) << "another GiB, a large page";
  EXPECT_EQ(LoadsOf(0x4000'1000), 1);
  EXPECT_EQ(LoadsOf(0x1000), 3);
  EXPECT_EQ(LoadsOf(uint64_t{1} << 39), 1) << "a hole in the first table";
  EXPECT_EQ(LoadsOf(0x1000), 4) << "which leaves no trail";
}

TEST_F(WalkTrailTest, AHoleOrARefusalOnTheWayLeavesWhatIsAbove) {
  EXPECT_EQ(LoadsOf(0x1000), 4);
  EXPECT_EQ(LoadsOf(0x40'0000), 1) << "a hole in the table of 2 MiB pages";
  EXPECT_EQ(LoadsOf(0x1000), 2);
  EXPECT_EQ(LoadsOf(0x20'0000, Access::kWrite), 2) << "refused";
  EXPECT_EQ(LoadsOf(0x20'1000), 1);
}

TEST_F(WalkTrailTest, AnotherRootIsAnotherTrail) {
  EXPECT_EQ(LoadsOf(0x1000), 4);
  Enter(0x7000, 0x2003);
  EXPECT_EQ(LoadsOf(0x1000, Access::kRead, 0x7000), 4);
  EXPECT_EQ(LoadsOf(0x1000, Access::kRead, 0x7000), 1);
  EXPECT_EQ(LoadsOf(0x1000), 4);
}

// Such a walk sets no flags: the next one has to come by all tables.
TEST_F(WalkTrailTest, WhoWantsNothingLeavesNoTrail) {
  EXPECT_EQ(LoadsOf(0x1000, {}), 4);
  EXPECT_EQ(LoadsOf(0x1000), 4);
  EXPECT_EQ(LoadsOf(0x2000, {}), 1) << "but may follow one";
  EXPECT_EQ(LoadsOf(0x3000), 1);
}

// Tables at random that point to each other: the same results, and the same flags set.
TEST_F(WalkTrailTest, ResultsAndFlagsAreThoseOfAWholeWalk) {
  std::mt19937_64 random(7);
  const VtdSecondStageFormat format({.keeps_accessed = true});
  VtdSecondStage::Trail trail;
  const VtdSecondStage along(format, &*counting_, &trail);
  CountingTables checking(tables_.get());
  const VtdSecondStage whole(format, &checking);
  uint64_t found = 0;
  uint64_t address = 0;
  for (uint64_t at = kRoot; at < 0x8000; at += 8) {
    const uint64_t flags = 7 & ~(random() & random() & random());
    const uint64_t large = random() % 8 == 0 ? 0x80 : 0;
    Enter(at, (1 + random() % 7) << 12 | flags | large);
  }
  for (int i = 0; i < 20000; ++i) {
    address = i % 8 == 0 ? random() >> 16 : address ^ random() % (uint64_t{1} << 32);
    const uint64_t root = kRoot + random() % 16 / 15 * 0x1000;
    const Wanted wanted(static_cast<Rights>(random() % 4), false);
    const WalkResult result = along.walk(root, address, wanted);
    ASSERT_EQ(result, whole.walk(root, address, wanted)) << std::hex << address;
    ASSERT_EQ(checking.exchanges, 0) << "a flag was not set: " << std::hex << address;
    found += result ? 1 : 0;
  }
  EXPECT_GT(found, 2000);
  EXPECT_GT(counting_->exchanges, 100);
  EXPECT_LT(counting_->loads, checking.loads * 9 / 10);
}

}  // namespace
}  // namespace mvgpu::domain
