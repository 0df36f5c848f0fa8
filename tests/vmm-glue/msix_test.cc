#include "vmm-glue/pci/msix.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "tests/fakes/event_counter.h"

namespace mvgpu::glue {
namespace {

using testing::EventCounter;

class MsixTest : public ::testing::Test {
 protected:
  template <typename T>
  T Get(uint64_t offset) {
    T value{};
    msix_.read(offset, std::as_writable_bytes(std::span(&value, 1)));
    return value;
  }
  template <typename T>
  void Put(uint64_t offset, T value) {
    msix_.write(offset, std::as_bytes(std::span(&value, 1)));
  }

  Msix msix_{3};
  EventCounter event_;
  EventCounter other_;
};

TEST_F(MsixTest, NotifySignalsTheEventfdOfItsVectorOnly) {
  msix_.bind(0, event_.duplicate());
  msix_.bind(1, other_.duplicate());
  msix_.notify(1);
  msix_.notify(1);
  EXPECT_EQ(event_.take(), 0u);
  EXPECT_EQ(other_.take(), 2u);
}

TEST_F(MsixTest, VectorsThatDoNotExistAreIgnored) {
  for (uint16_t i = 0; i < 3; ++i) msix_.bind(i, event_.duplicate());
  msix_.notify(3);
  msix_.notify(0xffff);
  EXPECT_EQ(event_.take(), 0u);
  msix_.notify(2);
  EXPECT_EQ(event_.take(), 1u);
}

TEST_F(MsixTest, AMaskedVectorFiresOnceWhenUnmasked) {
  msix_.bind(2, event_.duplicate());
  msix_.set_masked(2, true);
  msix_.notify(2);
  msix_.notify(2);
  EXPECT_EQ(event_.take(), 0u);
  msix_.set_masked(2, false);
  EXPECT_EQ(event_.take(), 1u);
  msix_.set_masked(2, true);
  msix_.set_masked(2, false);
  EXPECT_EQ(event_.take(), 0u) << "nothing was pending any more";
}

TEST_F(MsixTest, AnInterruptBetweenTwoBindingsIsNotLost) {
  msix_.bind(0, event_.duplicate());
  msix_.bind(0, UniqueFd());
  msix_.notify(0);
  msix_.bind(0, other_.duplicate());
  EXPECT_EQ(event_.take(), 0u);
  EXPECT_EQ(other_.take(), 1u);
  msix_.notify(0);
  EXPECT_EQ(other_.take(), 1u);
}

TEST_F(MsixTest, PendingIsForgottenOnResetAndDisable) {
  msix_.notify(0);
  msix_.clear_pending();
  msix_.bind(0, event_.duplicate());
  EXPECT_EQ(event_.take(), 0u);

  msix_.set_masked(0, true);
  msix_.notify(0);
  msix_.disable();
  msix_.bind(0, event_.duplicate());
  EXPECT_EQ(event_.take(), 0u);
  msix_.notify(0);
  EXPECT_EQ(event_.take(), 1u) << "the mask went with the binding";
}

TEST_F(MsixTest, DescriptorsAreClosedWhenReplacedOrDisabled) {
  UniqueFd mine = event_.duplicate();
  const int number = mine.get();
  msix_.bind(0, std::move(mine));
  EXPECT_NE(fcntl(number, F_GETFD), -1);
  msix_.bind(0, other_.duplicate());
  EXPECT_EQ(fcntl(number, F_GETFD), -1);
  msix_.disable();
  msix_.notify(0);
  EXPECT_EQ(other_.take(), 0u);
}

TEST_F(MsixTest, AFullCounterNeverBlocks) {
  EventCounter blocking(/*flags=*/0);
  const uint64_t full = std::numeric_limits<uint64_t>::max() - 1;
  for (EventCounter* counter : {&blocking, &event_}) {
    ASSERT_EQ(::write(counter->fd(), &full, sizeof(full)), 8);
    msix_.bind(0, counter->duplicate());
    msix_.notify(0);  // would hang here
    uint64_t value = 0;
    ASSERT_EQ(::read(counter->fd(), &value, sizeof(value)), 8);
    EXPECT_EQ(value, full);
    msix_.notify(0);
    ASSERT_EQ(::read(counter->fd(), &value, sizeof(value)), 8);
    EXPECT_EQ(value, 1u) << "with room again it fires";
  }
}

TEST_F(MsixTest, CapabilityPlacesTableAndPbaOnPagesOfTheirOwn) {
  const auto body = msix_.capability_body(1);
  uint16_t control;
  uint32_t table;
  uint32_t pba;
  std::memcpy(&control, &body[0], 2);
  std::memcpy(&table, &body[2], 4);
  std::memcpy(&pba, &body[6], 4);
  EXPECT_EQ(control, 2) << "three vectors";
  EXPECT_EQ(table, 0x0000u | 1);
  EXPECT_EQ(pba, 0x1000u | 1);
}

TEST_F(MsixTest, TheTableIsPlainStorageAndThePbaReadsZero) {
  EXPECT_EQ(Get<uint32_t>(12), 1u) << "masked at power-on";
  Put<uint64_t>(16, 0x1122334455667788);
  Put<uint32_t>(28, 0);
  EXPECT_EQ(Get<uint64_t>(16), 0x1122334455667788u);
  EXPECT_EQ(Get<uint32_t>(28), 0u);
  EXPECT_EQ(Get<uint16_t>(19), 0x4455);

  Put<uint64_t>(48, ~uint64_t{0});  // behind the third entry
  EXPECT_EQ(Get<uint64_t>(48), 0u);
  Put<uint64_t>(44, ~uint64_t{0});  // half in, half out
  EXPECT_EQ(Get<uint64_t>(44), 0xffffffffu);
  Put<uint64_t>(Msix::kPbaOffset, ~uint64_t{0});
  msix_.notify(0);
  EXPECT_EQ(Get<uint64_t>(Msix::kPbaOffset), 0u);

  msix_.reset_table();
  EXPECT_EQ(Get<uint64_t>(16), 0u);
  EXPECT_EQ(Get<uint32_t>(28), 1u);
}

}  // namespace
}  // namespace mvgpu::glue
