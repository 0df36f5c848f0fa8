// Faults from several threads, while memory is given back and taken away.

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "tests/apionly-domain/faults/faulting_fixture.h"

namespace mvgpu::domain {
namespace {

// Something that a thread waits for and another one lets happen.
class Gate {
 public:
  void open() {
    std::lock_guard lock(mutex_);
    is_open_ = true;
    opened_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    opened_.wait(lock, [this] { return is_open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool is_open_ = false;
};

class FaultingThreadsTest : public FaultingTest {};

TEST_F(FaultingThreadsTest, FaultsInDifferentBlocksDoNotWaitForEachOther) {
  Map(0, 0, 0x40'0000);
  Gate is_in;
  Gate may_go;
  target_->during_map = [&](IovaRange iova) {
    if (iova.start() != Iova(0x5000)) return;
    is_in.open();
    may_go.wait();
  };
  std::thread stalled([&] { EXPECT_EQ(OutcomeAt(5), Outcome::kMapped); });
  is_in.wait();
  EXPECT_EQ(OutcomeAt(0x205), Outcome::kMapped);  // returns: that is the test
  EXPECT_EQ(faulting_->invalidate(Pages(0x205, 1)), 1u);
  may_go.open();
  stalled.join();
  EXPECT_EQ(Shown(), Numbers(5, 1));
}

// A fault that has pinned, and memory that is given back before it has mapped: what
// mmu_notifier sequences are for.
TEST_F(FaultingThreadsTest, AFaultUnderWayDoesNotOutliveAnInvalidation) {
  Map(0, 0, 0x40'0000);
  Gate is_in;
  Gate may_go;
  target_->during_map = [&](IovaRange) {
    is_in.open();
    may_go.wait();
  };
  std::thread fault([&] { static_cast<void>(At(5)); });
  is_in.wait();
  std::atomic<bool> is_over{false};
  std::thread giver([&] {
    EXPECT_EQ(faulting_->invalidate(Pages(0, 0x400)), 1u);
    is_over = true;
  });
  EXPECT_FALSE(is_over.load());  // it cannot be: the fault's page is about to be mapped
  may_go.open();
  giver.join();
  fault.join();
  EXPECT_TRUE(Shown().empty());
  ExpectConsistent();
}

TEST_F(FaultingThreadsTest, AFaultUnderWayDoesNotOutliveAnUnmap) {
  Restart({.unmap_deadline = std::chrono::minutes(1)}, {});
  Map(0, 0, 0x40'0000);
  Gate is_in;
  Gate may_go;
  target_->during_map = [&](IovaRange) {
    is_in.open();
    may_go.wait();
  };
  std::thread fault([&] { static_cast<void>(At(5)); });
  is_in.wait();
  std::thread vmm([&] { EXPECT_THAT(container_.unmap(Iova(0), 0x40'0000), testing::IsOk()); });
  may_go.open();
  vmm.join();
  fault.join();
  EXPECT_TRUE(Shown().empty());
  ExpectConsistent();
}

TEST_F(FaultingThreadsTest, TwoFaultsOfOnePageMapItOnce) {
  Map(0, 0, 0x40'0000);
  Gate is_in;
  Gate may_go;
  target_->during_map = [&](IovaRange) {
    is_in.open();
    may_go.wait();
  };
  std::thread first([&] { EXPECT_EQ(OutcomeAt(5), Outcome::kMapped); });
  is_in.wait();
  std::thread second([&] { EXPECT_EQ(OutcomeAt(5), Outcome::kThere); });
  may_go.open();
  first.join();
  second.join();
  EXPECT_EQ(target_->map_calls, 1u);
}

// Everything at once, with a limit; the target checks that nothing is mapped over or reached
// without a pin.
TEST_F(FaultingThreadsTest, NothingIsLostBetweenThreads) {
  constexpr int kSteps = 1500;
  Restart({.unmap_deadline = std::chrono::minutes(1)}, {.around_pages = 8, .max_pinned_pages = 60});
  target_->checks_pins = false;
  Map(0, 0, 0x20'0000);
  Map(0x20'0000, 0x20'0000, 0x20'0000);
  std::atomic<int> devices_left{2};
  std::vector<std::thread> threads;
  for (unsigned device = 0; device < 2; ++device) {
    threads.emplace_back([&, device] {
      std::mt19937 random(device);
      for (int i = 0; i < kSteps; ++i) {
        const auto resolved = At(random() % 0x400);
        if (!resolved) {
          EXPECT_EQ(resolved.error().code(), ErrorCode::kNotMapped);
        }
      }
      --devices_left;
    });
  }
  threads.emplace_back([&] {
    std::mt19937 random(17);
    while (devices_left.load() > 0) {
      const auto going = faulting_->begin_invalidate(Pages(random() % 0x400, 1 + random() % 100));
      faulting_->drop_unused();
      static_cast<void>(faulting_->counters());
    }
  });
  while (devices_left.load() > 0) {
    ASSERT_THAT(container_.unmap(Iova(0x20'0000), 0x20'0000), testing::IsOk());
    Map(0x20'0000, 0x20'0000, 0x20'0000);
  }
  for (std::thread& thread : threads) thread.join();
  ExpectConsistent();
  EXPECT_LE(faulting_->counters().peak_pinned_pages, 60u);
  faulting_->invalidate(Pages(0, 0x400));
  EXPECT_TRUE(Shown().empty());
}

}  // namespace
}  // namespace mvgpu::domain
