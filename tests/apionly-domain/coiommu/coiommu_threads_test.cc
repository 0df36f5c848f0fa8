// A guest's vCPUs map and unmap while the host scans.

#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "tests/apionly-domain/coiommu/coiommu_fixture.h"

namespace mvgpu::domain {
namespace {

class CoiommuThreadsTest : public CoiommuTest {};

// What a guest has mapped is there until it unmaps it, whatever the host scans meanwhile.
TEST_F(CoiommuThreadsTest, AMappedPageIsNeverUnpinned) {
  constexpr int kSteps = 800;
  constexpr uint64_t kHot = 24;
  Begin({.busy_rounds = 4, .old_every = 2});
  target_->checks_pins = false;
  guest_->prepare(0, kHot);
  // A guest for each vCPU, with one table between them.
  std::vector<std::unique_ptr<testing::CoiommuGuest>> vcpus;
  for (size_t vcpu = 0; vcpu < 2; ++vcpu) {
    vcpus.push_back(std::make_unique<testing::CoiommuGuest>(
        &ram_, testing::CoiommuGuest::Options{
                   .tables = kTables,
                   .batch = kBatch + vcpu * 0x1000,
                   .ask = [this, vcpu](uint64_t request) { Ask(request, vcpu); }}));
  }
  std::atomic<int> left{2};
  std::atomic<uint64_t> lost{0};
  std::vector<std::thread> threads;
  for (size_t vcpu = 0; vcpu < 2; ++vcpu) {
    threads.emplace_back([&, vcpu] {
      std::mt19937_64 random(vcpu);
      for (int i = 0; i < kSteps; ++i) {
        const uint64_t frame = random() % kHot;
        if (!vcpus[vcpu]->map(frame)) ++lost;
        if (!pins_of_guest_->is_pinned(frame)) ++lost;
        std::this_thread::yield();
        if (!pins_of_guest_->is_pinned(frame)) ++lost;
        vcpus[vcpu]->unmap(frame);
      }
      --left;
    });
  }
  std::mt19937_64 random(9);
  while (left.load() > 0) {
    pins_of_guest_->scan();
    static_cast<void>(pins_of_guest_->release_for_balloon(random() % kHot));
    std::this_thread::yield();
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(lost.load(), 0u);
  ExpectConsistent();
  for (int i = 0; i < 10; ++i) pins_of_guest_->scan();
  EXPECT_EQ(pins_of_guest_->counters().pinned_pages, 0u);
  for (uint64_t frame = 0; frame < kHot; ++frame) EXPECT_EQ(Word(frame), 0u);
}

// The guest's memory goes and comes back under it.
TEST_F(CoiommuThreadsTest, UnmapsOfTheVmmLeaveNothingPinned) {
  End();
  Start({.unmap_deadline = std::chrono::minutes(1)});
  Begin({});
  Map(0x40'0000, 0x5000, 0x1'0000);
  target_->checks_pins = false;
  guest_->prepare(0x400, 16);
  std::atomic<bool> is_over{false};
  std::thread vcpu([&] {
    for (uint64_t i = 0; i < 1000; ++i) {
      if (guest_->map(0x400 + i % 16)) guest_->unmap(0x400 + i % 16);
    }
    is_over = true;
  });
  while (!is_over.load()) {
    ASSERT_THAT(container_.unmap(Iova(0x40'0000), 0x1'0000), testing::IsOk());
    EXPECT_TRUE(Shown().empty() || *Shown().rbegin() < 0x400);
    Map(0x40'0000, 0x5000, 0x1'0000);
  }
  vcpu.join();
  ExpectConsistent();
}

}  // namespace
}  // namespace mvgpu::domain
