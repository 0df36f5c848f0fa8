#include "apionly-domain/viommu/invalidation_queue.h"

#include <functional>

#include "tests/apionly-domain/nested/tables_fixture.h"

namespace mvgpu::domain {
namespace {

class InvalidationQueueTest : public TablesTest, public InvalidationQueue::Owner {
 protected:
  static constexpr uint64_t kQueue = 0x1'0000;
  static constexpr uint64_t kWide = 1 << 11;  // DW
  static constexpr uint64_t kStatus = 0x9000;

  void SetUp() override {
    TablesTest::SetUp();
    queue_ = std::make_unique<InvalidationQueue>(DescriptorRules{}, tables_.get(), this);
  }
  void on_invalidation(const InvalidationDescriptor& invalidation) override {
    done_.push_back(invalidation);
    if (during_) during_();
  }
  bool write_status(uint64_t address, uint32_t status) override {
    if (address != kStatus) return false;
    status_.push_back(status);
    return true;
  }
  void on_wait_complete() override { ++interrupts_; }
  void on_queue_error(QueueError error) override { errors_.push_back(error); }

  void Start(uint64_t iqa) {
    queue_->write_address(iqa);
    queue_->enable();
    bytes_ = (iqa & kWide) != 0 ? 32 : 16;
    size_ = kPageSize << (iqa & 7);
  }
  void Put(uint64_t offset, uint64_t low, uint64_t high = 0) {
    TablesTest::Put(kQueue + offset, low);
    TablesTest::Put(kQueue + offset + 8, high);
  }
  // As a driver does: writes the descriptor, advances the tail.
  void Submit(uint64_t low, uint64_t high = 0) {
    Put(tail_, low, high);
    if (bytes_ == 32) Put(tail_ + 16, 0);
    tail_ = (tail_ + bytes_) % size_;
    queue_->write_tail(tail_);
  }
  void Run() { queue_->run(1 << 20); }

  std::unique_ptr<InvalidationQueue> queue_;
  std::vector<InvalidationDescriptor> done_;
  std::vector<uint32_t> status_;
  std::vector<QueueError> errors_;
  std::function<void()> during_;
  int interrupts_ = 0;
  uint64_t bytes_ = 0;
  uint64_t size_ = 0;
  uint64_t tail_ = 0;
};

constexpr uint64_t kGlobalContext = 0x11;
constexpr uint64_t kGlobalIotlb = 0x12;
constexpr uint64_t kWaitStatus = 0x25;

TEST_F(InvalidationQueueTest, DescriptorsAreDoneInOrder) {
  Start(kQueue);
  Submit(kGlobalContext);
  Submit(kGlobalIotlb);
  Submit(uint64_t{7} << 32 | kWaitStatus | 0x10, kStatus);
  EXPECT_TRUE(done_.empty());
  Run();
  ASSERT_EQ(done_.size(), 2);
  EXPECT_TRUE(std::holds_alternative<ContextInvalidation>(done_[0]));
  EXPECT_TRUE(std::holds_alternative<IotlbInvalidation>(done_[1]));
  EXPECT_EQ(status_, std::vector<uint32_t>{7});
  EXPECT_EQ(interrupts_, 1);
  EXPECT_EQ(queue_->head(), 48);
  EXPECT_FALSE(queue_->has_more());
}

TEST_F(InvalidationQueueTest, BothWidthsGoRoundTheRing) {
  for (const uint64_t width : {uint64_t{0}, kWide}) {
    tail_ = 0;
    queue_ = std::make_unique<InvalidationQueue>(DescriptorRules{}, tables_.get(), this);
    Start(kQueue | width | 1);  // two pages
    EXPECT_EQ(size_ / bytes_, width == 0 ? 512 : 256);
    status_.clear();
    for (uint32_t i = 0; i < 1100; ++i) {
      Submit(uint64_t{i} << 32 | kWaitStatus, kStatus);
      if (i % 7 == 0) Run();
    }
    Run();
    ASSERT_EQ(status_.size(), 1100);
    for (uint32_t i = 0; i < 1100; ++i) ASSERT_EQ(status_[i], i);
    EXPECT_EQ(queue_->head(), 1100 * bytes_ % size_);
  }
}

TEST_F(InvalidationQueueTest, AWholeRingButOneFits) {
  Start(kQueue);
  for (uint32_t i = 0; i < 255; ++i) Submit(uint64_t{i} << 32 | kWaitStatus, kStatus);
  Run();
  EXPECT_EQ(status_.size(), 255);
}

TEST_F(InvalidationQueueTest, TheLargestRingHasItsSize) {
  Start(kQueue | kWide | 7);
  EXPECT_EQ(size_, 0x8'0000);
  queue_->write_tail(~uint64_t{0} & ~uint64_t{0x1f});
  queue_->run(1);
  EXPECT_EQ(queue_->tail(), 0x7'ffe0);
  EXPECT_EQ(errors_.front(), QueueError::kType) << "the tail is in place";
}

TEST_F(InvalidationQueueTest, ARunDoesAsMuchAsItIsGivenTimeFor) {
  Start(kQueue);
  for (int i = 0; i < 5; ++i) Submit(kGlobalIotlb);
  queue_->run(2);
  EXPECT_EQ(done_.size(), 2);
  EXPECT_TRUE(queue_->has_more());
  queue_->run(2);
  queue_->run(2);
  EXPECT_EQ(done_.size(), 5);
  EXPECT_FALSE(queue_->has_more());
}

TEST_F(InvalidationQueueTest, ABadDescriptorStopsTheQueueAtTheHead) {
  Start(kQueue);
  Submit(kGlobalContext);
  Submit(0x02);  // no granularity
  Submit(kGlobalIotlb);
  Run();
  EXPECT_EQ(done_.size(), 1);
  EXPECT_EQ(queue_->head(), 16);
  EXPECT_EQ(queue_->error(), QueueError::kReserved);
  EXPECT_EQ(errors_, std::vector{QueueError::kReserved});
  Submit(kGlobalIotlb);
  Run();
  EXPECT_EQ(done_.size(), 1) << "stopped until the error is cleared";
  EXPECT_EQ(errors_.size(), 1);
}

TEST_F(InvalidationQueueTest, ClearingTheErrorFetchesTheDescriptorAgain) {
  Start(kQueue);
  Submit(0x0f);
  Submit(kGlobalIotlb);
  Run();
  EXPECT_EQ(errors_, std::vector{QueueError::kType});
  queue_->clear_error();
  Run();
  EXPECT_EQ(errors_.size(), 2) << "it is still bad";
  EXPECT_EQ(queue_->head(), 0);
  Put(0, uint64_t{5} << 32 | kWaitStatus, kStatus);  // as Linux does: a harmless one in its place
  queue_->clear_error();
  Run();
  EXPECT_EQ(status_, std::vector<uint32_t>{5});
  EXPECT_EQ(done_.size(), 1);
  EXPECT_EQ(queue_->error(), std::nullopt);
  EXPECT_EQ(queue_->head(), 32);
}

TEST_F(InvalidationQueueTest, ATailOutOfPlaceIsAnError) {
  Start(kQueue | kWide);
  queue_->write_tail(0x1000);
  Run();
  EXPECT_EQ(queue_->error(), QueueError::kTail);
  queue_->clear_error();
  queue_->write_tail(0x10);
  Run();
  EXPECT_EQ(queue_->error(), QueueError::kAlignment);
  EXPECT_EQ(queue_->head(), 0);
  queue_->write_tail(0x20);
  Put(0, kGlobalContext);
  Run();
  EXPECT_TRUE(done_.empty());
  queue_->clear_error();
  Run();
  EXPECT_EQ(done_.size(), 1);
}

TEST_F(InvalidationQueueTest, AWideQueueReadsAllFourWords) {
  Start(kQueue | kWide);
  Submit(kGlobalContext);
  TablesTest::Put(kQueue + 24, 1);
  Run();
  EXPECT_EQ(queue_->error(), QueueError::kReserved);
}

TEST_F(InvalidationQueueTest, AQueueOutsideOfMemoryIsAFetchError) {
  Start(0x7f00'0000'0000);
  queue_->write_tail(16);
  Run();
  EXPECT_EQ(queue_->error(), QueueError::kFetch);
}

TEST_F(InvalidationQueueTest, AStatusThatCannotBeWrittenIsAnError) {
  Start(kQueue);
  Submit(kWaitStatus | 0x10, kStatus + kPageSize);
  Run();
  EXPECT_EQ(queue_->error(), QueueError::kUnknown);
  EXPECT_EQ(queue_->head(), 0);
  EXPECT_EQ(interrupts_, 0);
}

TEST_F(InvalidationQueueTest, NothingIsFetchedWhileItIsDisabled) {
  queue_->write_address(kQueue);
  Put(0, kGlobalContext);
  queue_->write_tail(16);
  Run();
  EXPECT_TRUE(done_.empty());
  queue_->enable();
  Run();
  EXPECT_EQ(done_.size(), 1);
  queue_->disable();
  EXPECT_EQ(queue_->head(), 0);
  queue_->write_tail(32);
  Run();
  EXPECT_EQ(done_.size(), 1);
}

TEST_F(InvalidationQueueTest, RegistersMayBeWrittenInACallback) {
  Start(kQueue);
  during_ = [&] {
    Submit(kGlobalIotlb);
    Run();  // is running already
  };
  Submit(kGlobalContext);
  queue_->run(100);
  EXPECT_EQ(done_.size(), 100);
  during_ = [&] { queue_->disable(); };
  Run();
  EXPECT_EQ(queue_->head(), 0);
  EXPECT_FALSE(queue_->is_enabled());
}

TEST_F(InvalidationQueueTest, AHeadThatNoLongerFitsIsAnError) {
  Start(kQueue | 1);
  for (int i = 0; i < 300; ++i) Submit(kGlobalIotlb);
  Run();
  EXPECT_EQ(queue_->head(), 4800);
  queue_->write_address(kQueue);  // smaller
  queue_->write_tail(16);
  Run();
  EXPECT_EQ(queue_->error(), QueueError::kUnknown);
  EXPECT_EQ(done_.size(), 300);
}

}  // namespace
}  // namespace mvgpu::domain
