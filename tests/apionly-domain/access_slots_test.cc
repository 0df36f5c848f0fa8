#include "apionly-domain/translation/access_slots.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "tests/fakes/guest_ram.h"

namespace mvgpu::domain {
namespace {

using std::chrono::milliseconds;
using testing::MakeRange;

class AccessSlotsTest : public ::testing::Test {
 protected:
  bool IsUnused(IovaRange range, milliseconds patience = milliseconds(0)) const {
    return slots_.wait_until_unused(range, std::chrono::steady_clock::now() + patience);
  }

  AccessSlots slots_;
  const IovaRange here_ = MakeRange(0x10000, 0x4000);
  const IovaRange there_ = MakeRange(0x20000, 0x4000);
};

TEST_F(AccessSlotsTest, NobodyThereIsNobodyToWaitFor) {
  EXPECT_TRUE(IsUnused(here_));
  slots_.wait_for_lookups();
}

TEST_F(AccessSlotsTest, ALookupHoldsUpEveryRangeUntilItEnds) {
  std::optional<AccessSlots::Section> section(slots_);
  EXPECT_FALSE(IsUnused(here_));
  EXPECT_FALSE(IsUnused(there_));
  section.reset();
  EXPECT_TRUE(IsUnused(here_));
}

TEST_F(AccessSlotsTest, ACopyHoldsUpItsOwnRangesOnly) {
  AccessSlots::Section section(slots_);
  section.begin_copy(here_);
  EXPECT_FALSE(IsUnused(here_));
  EXPECT_FALSE(IsUnused(MakeRange(0x13fff, 1))) << "its last byte";
  EXPECT_TRUE(IsUnused(MakeRange(0x14000, 0x1000)));
  EXPECT_TRUE(IsUnused(there_));
  slots_.wait_for_lookups();  // it looks nothing up any more
}

TEST_F(AccessSlotsTest, ACopyFromGuestToGuestHoldsUpBothSides) {
  AccessSlots::Section section(slots_);
  section.begin_copy(here_, there_);
  EXPECT_FALSE(IsUnused(here_));
  EXPECT_FALSE(IsUnused(there_));
  EXPECT_TRUE(IsUnused(MakeRange(0x18000, 0x1000)));
}

TEST_F(AccessSlotsTest, WhoWaitsSeesTheEndOfASectionInAnotherThread) {
  auto section = std::make_unique<AccessSlots::Section>(slots_);
  section->begin_copy(here_);
  std::thread ender([&section] {
    std::this_thread::sleep_for(milliseconds(20));
    section.reset();
  });
  EXPECT_TRUE(IsUnused(here_, milliseconds(10000)));
  ender.join();
}

// More threads than there are slots: the last ones wait, nobody is lost.
TEST_F(AccessSlotsTest, MoreThreadsThanSlotsTakeTurns) {
  std::atomic<int> inside = 0;
  std::vector<std::unique_ptr<AccessSlots::Section>> sections;
  for (int i = 0; i < 64; ++i) sections.push_back(std::make_unique<AccessSlots::Section>(slots_));
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([this, &inside] {
      AccessSlots::Section section(slots_);
      ++inside;
    });
  }
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_EQ(inside, 0);
  sections.clear();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(inside, 8);
  EXPECT_TRUE(IsUnused(here_));
}

}  // namespace
}  // namespace mvgpu::domain
