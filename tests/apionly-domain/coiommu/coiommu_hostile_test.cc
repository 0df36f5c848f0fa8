// A guest that writes into the table and into requests whatever it likes.

#include <random>

#include "tests/apionly-domain/coiommu/coiommu_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::IsOk;

class CoiommuHostileTest : public CoiommuTest {};

TEST_F(CoiommuHostileTest, AGuestThatSaysPinnedIsNotBelieved) {
  guest_->word(5).store(0x8000'0000);
  EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_TRUE(pins_of_guest_->release_for_balloon(5));
  EXPECT_FALSE(pins_of_guest_->is_pinned(5));
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
  ASSERT_THAT(pins_of_guest_->pin(5), IsOk());  // it is pinned because it was asked for
  ExpectConsistent();
  EXPECT_EQ(pins_of_guest_->counters().pins, 1u);
}

TEST_F(CoiommuHostileTest, AGuestThatAsksTwiceIsPinnedOnce) {
  guest_->prepare(5, 1);
  for (int i = 0; i < 3; ++i) {
    Ask(5 << 16 | 0x28);
    guest_->word(5).store(0);  // and denies it
  }
  EXPECT_EQ(pins_of_guest_->counters().pins, 1u);
  EXPECT_EQ(pins_of_guest_->counters().pinned_already, 2u);
  ExpectConsistent();
  EXPECT_EQ(pins_of_guest_->scan(), 1u);
  ExpectConsistent();
}

TEST_F(CoiommuHostileTest, AGuestThatClearsPinnedWhileItUsesThePageKeepsIt) {
  ASSERT_TRUE(guest_->map(5));
  guest_->word(5).store(1);
  EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_EQ(Word(5), 0x8000'0001u);
  ExpectConsistent();
}

TEST_F(CoiommuHostileTest, BitsWithoutAMeaningKeepAPageAndNoMore) {
  ASSERT_TRUE(guest_->map(5));
  guest_->word(5).store(0xbfff'0000);
  for (int i = 0; i < 30; ++i) EXPECT_EQ(pins_of_guest_->scan(), 0u);
  EXPECT_TRUE(pins_of_guest_->release_for_balloon(5));  // its count is 0
  ExpectConsistent();
}

TEST_F(CoiommuHostileTest, AGuestThatTearsTheTableDownHasItsPagesUnpinned) {
  for (uint64_t frame = 0; frame < 100; ++frame) ASSERT_TRUE(guest_->map(frame));
  ram_.put(kTables, uint64_t{0});
  EXPECT_EQ(pins_of_guest_->scan(), 100u);
  ExpectConsistent();
}

TEST_F(CoiommuHostileTest, ATableThatPointsIntoItselfIsOnlyWords) {
  for (uint64_t i = 0; i < 512; ++i) ram_.put(kTables + i * 8, kTables | 1);
  for (uint64_t frame = 0; frame < 600; ++frame) static_cast<void>(pins_of_guest_->pin(frame));
  for (int i = 0; i < 30; ++i) pins_of_guest_->scan();
  ExpectConsistent();
}

// The limit bounds what the worst guest pins; nothing else of it reaches the host's books.
TEST_F(CoiommuHostileTest, RandomTablesAndRequestsLeaveNothingBehind) {
  std::mt19937_64 random(11);
  Begin({.max_pinned_pages = 50, .busy_rounds = 2, .old_every = 3});
  guest_->prepare(0, kFrames);
  for (int i = 0; i < 12000; ++i) {
    const uint64_t at = kTables + random() % 0x8000 / 8 * 8;
    switch (random() % 8) {
      case 0:
        ram_.put(at, random());
        break;
      case 1:
        ram_.put(at, (kTables + random() % 0x8000) | 1);
        break;
      case 2:
        ram_.put(kBatch, random() % 2 == 0 ? random() : uint64_t{0x28});
        ram_.put(kBatch + 8, random() % 3 == 0 ? random() : random() % 20);
        for (uint64_t word = 16; word < 256; word += 8) {
          ram_.put(kBatch + word, random() % 3 == 0 ? random() : random() % 0x400);
        }
        Ask(uint64_t{1} << 63 | (kBatch + random() % 64));
        break;
      case 3:
        Ask(random());
        break;
      case 4:
        Ask(random() % 0x400 << 16 | 0x28);
        break;
      case 5:
        pins_of_guest_->scan();
        break;
      case 6:
        static_cast<void>(pins_of_guest_->release_for_balloon(random() % 0x400));
        break;
      default:
        // Never a doorbell: its request would be the one of the last time.
        device_->write(random() % 0x18, random() % 8);
    }
    ASSERT_LE(pins_of_guest_->counters().pinned_pages, 50u);
    if (i % 500 == 0) ExpectConsistent();
  }
  EXPECT_GT(pins_of_guest_->counters().pins, 100u);
  pins_of_guest_->deactivate();
  ExpectConsistent();
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
}

}  // namespace
}  // namespace mvgpu::domain
