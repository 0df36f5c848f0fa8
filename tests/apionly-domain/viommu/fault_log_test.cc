#include "apionly-domain/viommu/fault_log.h"

#include <gtest/gtest.h>

namespace mvgpu::domain {
namespace {

class FaultLogTest : public ::testing::Test, public FaultLog::Owner {
 protected:
  void on_fault_event() override { ++events_; }
  void SetUp() override { log_.set_masked(false); }
  static FaultRecord At(uint64_t address, SourceId source = 0x3a91) {
    return {.source = source,
            .pasid = std::nullopt,
            .address = address,
            .reason = 0x71,
            .wanted = Access::kRead};
  }
  size_t Used() const {
    size_t used = 0;
    for (size_t i = 0; i < log_.size(); ++i) used += log_.words(i).high >> 63;
    return used;
  }

  int events_ = 0;
  FaultLog log_{4, this};
};

TEST_F(FaultLogTest, ARecordIsAsTheSpecificationHasIt) {
  log_.record({.source = 0x3a91,
               .pasid = 0x12345,
               .address = 0x7f12'3456'7abc,
               .reason = 0x71,
               .wanted = Access::kRead});
  EXPECT_EQ(log_.words(0).low, 0x7f12'3456'7000);
  EXPECT_EQ(log_.words(0).high, 0xc123'4571'8000'3a91);
  log_.record({.source = 0x3a91,
               .pasid = 0x12345,
               .address = 0x5000,
               .reason = 0x82,
               .wanted = Wanted(kMayRead | kMayExecute, /*as_supervisor=*/true),
               .is_translation_request = true});
  EXPECT_EQ(log_.words(1).high, 0xd123'4582'e000'3a91);
  log_.record({.source = 0x10,
               .pasid = std::nullopt,
               .address = 0x6000,
               .reason = 0x85,
               .wanted = Wanted(kMayRead | kMayWrite, /*as_supervisor=*/true)});
  EXPECT_EQ(log_.words(2).high, 0x8000'0085'0000'0010) << "no PASID, no attributes; a write";
}

TEST_F(FaultLogTest, TheFirstFaultIsAnEventAndTheNextAreNot) {
  log_.record(At(0x1000));
  log_.record(At(0x2000));
  EXPECT_EQ(events_, 1);
  EXPECT_EQ(log_.status(), FaultLog::kPending);
  log_.release(0);
  EXPECT_EQ(log_.status(), FaultLog::kPending);
  log_.release(1);
  EXPECT_EQ(log_.status(), 0);
  log_.record(At(0x1000));
  EXPECT_EQ(events_, 2);
  EXPECT_EQ(log_.status(), FaultLog::kPending | 2 << 8) << "FRI: the record that set it";
  log_.record(At(0x2000));
  EXPECT_EQ(log_.status(), FaultLog::kPending | 2 << 8);
}

TEST_F(FaultLogTest, OneThatIsInTheLogIsNotLoggedAgain) {
  log_.record(At(0x1000));
  log_.record(At(0x1fff));
  EXPECT_EQ(Used(), 1);
  EXPECT_EQ(log_.collapsed(), 1);
  log_.record(At(0x1000, 0x3a92));
  FaultRecord with_pasid = At(0x1000);
  with_pasid.pasid = 0;
  log_.record(with_pasid);
  with_pasid.pasid = 1;
  log_.record(with_pasid);
  EXPECT_EQ(Used(), 4) << "another device, and other address spaces";
  log_.release(0);
  log_.record(At(0x1000));
  EXPECT_EQ(log_.collapsed(), 1);
  EXPECT_EQ(Used(), 4);
}

TEST_F(FaultLogTest, AFullLogLosesFaultsUntilOverflowIsCleared) {
  for (uint64_t i = 0; i < 4; ++i) log_.record(At(i * kPageSize));
  EXPECT_EQ(log_.status(), FaultLog::kPending);
  log_.record(At(0x9000));
  EXPECT_EQ(log_.status(), FaultLog::kPending | FaultLog::kOverflow);
  EXPECT_EQ(log_.lost(), 1);
  log_.release(0);
  log_.record(At(0x9000));
  EXPECT_EQ(Used(), 3) << "there would be room";
  EXPECT_EQ(log_.lost(), 2);
  log_.clear(FaultLog::kOverflow);
  EXPECT_EQ(log_.status(), FaultLog::kPending);
  log_.record(At(0x9000));
  EXPECT_EQ(log_.words(0).low, 0x9000);
  EXPECT_EQ(events_, 1);
}

TEST_F(FaultLogTest, PendingIsNotClearedByTheStatusRegister) {
  log_.record(At(0x1000));
  log_.clear(~uint32_t{0});
  EXPECT_EQ(log_.status(), FaultLog::kPending);
}

TEST_F(FaultLogTest, AMaskedEventComesWhenItIsUnmasked) {
  log_.set_masked(true);
  log_.record(At(0x1000));
  EXPECT_EQ(events_, 0);
  EXPECT_TRUE(log_.is_event_pending());
  log_.set_masked(false);
  EXPECT_EQ(events_, 1);
  EXPECT_FALSE(log_.is_event_pending());
  log_.set_masked(true);
  log_.set_masked(false);
  EXPECT_EQ(events_, 1);
}

TEST_F(FaultLogTest, AMaskedEventGoesWithItsReason) {
  log_.set_masked(true);
  log_.record(At(0x1000));
  log_.release(0);
  EXPECT_FALSE(log_.is_event_pending());
  log_.set_masked(false);
  EXPECT_EQ(events_, 0);
  log_.set_masked(true);
  log_.raise(FaultLog::kQueueError);
  log_.clear(FaultLog::kQueueError);
  log_.set_masked(false);
  EXPECT_EQ(events_, 0);
}

TEST_F(FaultLogTest, AQueueErrorIsAnEventUnlessSomethingElseIsPending) {
  log_.raise(FaultLog::kQueueError);
  EXPECT_EQ(events_, 1);
  EXPECT_EQ(log_.status(), FaultLog::kQueueError);
  log_.record(At(0x1000));
  EXPECT_EQ(events_, 1);
  log_.clear(FaultLog::kQueueError);
  log_.raise(FaultLog::kQueueError);
  EXPECT_EQ(events_, 1);
  log_.clear(FaultLog::kQueueError);
  log_.release(0);
  log_.raise(FaultLog::kTimeout);
  EXPECT_EQ(events_, 2);
}

TEST_F(FaultLogTest, ARecordBeyondTheLastOneIsNone) {
  log_.record(At(0x1000));
  log_.release(4);
  log_.release(~size_t{0});
  EXPECT_EQ(Used(), 1);
}

TEST_F(FaultLogTest, ItIsMaskedAtFirst) {
  FaultLog fresh(1, this);
  fresh.record(At(0x1000));
  EXPECT_EQ(events_, 0);
}

}  // namespace
}  // namespace mvgpu::domain
