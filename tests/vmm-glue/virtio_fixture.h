#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "apionly-domain/container.h"
#include "apionly-domain/pin/pin_backend.h"
#include "tests/fakes/event_counter.h"
#include "tests/fakes/fake_virtio_device.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"
#include "tests/fakes/virtio_pci_driver.h"
#include "tests/fakes/virtqueue_driver.h"
#include "vmm-glue/virtio/virtio_pci.h"

namespace mvgpu::glue {

inline std::vector<std::byte> BytesOf(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}
inline std::string TextOf(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Guest reads in the order in which the device made them.
class ReadLog final : public domain::AccessObserver {
 public:
  struct Entry {
    uint64_t iova = 0;
    uint64_t size = 0;
  };
  void on_guest_read(Iova iova, std::span<const std::byte> bytes) override {
    entries.push_back({iova.value(), bytes.size()});
  }
  size_t count_at(uint64_t iova) const {
    size_t count = 0;
    for (const Entry& entry : entries)
      count += entry.iova <= iova && iova < entry.iova + entry.size;
    return count;
  }
  bool any_byte_twice() const {
    for (size_t i = 0; i < entries.size(); ++i) {
      for (size_t k = i + 1; k < entries.size(); ++k) {
        if (entries[i].iova < entries[k].iova + entries[k].size &&
            entries[k].iova < entries[i].iova + entries[i].size) {
          return true;
        }
      }
    }
    return false;
  }
  std::vector<Entry> entries;
};

// A container and an api-only domain over 4 MiB of guest RAM, mapped at kIovaBase. Neither zero nor
// the RAM offset is a valid IOVA, so that a mix-up shows.
class GuestMemoryTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kIovaBase = 0x1'0000'0000;
  static constexpr uint64_t kRamSize = 4u << 20;

  void SetUp() override {
    auto created = domain::ApiOnlyDomain::Create({}, domain::MakeNonePinBackend(),
                                                 /*ledger=*/nullptr, &reads_);
    ASSERT_THAT(created, testing::IsOk());
    domain_ = std::move(*created);
    ASSERT_THAT(container_.attach(domain_.get()), testing::IsOk());
    ASSERT_THAT(container_.map(ram_.map_request(kIovaBase, 0, kRamSize)), testing::IsOk());
  }
  void TearDown() override {
    EXPECT_EQ(domain_->counters().pinned_pages, 0u);
    EXPECT_THAT(container_.detach(domain_.get()), testing::IsOk());
  }

  testing::GuestRam ram_{kRamSize};
  testing::GuestMemory memory_{&ram_, kIovaBase};
  ReadLog reads_;
  domain::Container container_;
  std::unique_ptr<domain::ApiOnlyDomain> domain_;
};

// A whole device with a fake behind the transport, and a guest's driver in front of it.
class VirtioPciTest : public GuestMemoryTest, protected VirtioPciDevice::Owner {
 protected:
  static constexpr uint64_t kAllFeatures =
      testing::VirtioPciDriver::kVersion1 | testing::VirtioPciDriver::kAccessPlatform |
      testing::VirtioPciDriver::kIndirect | testing::VirtioPciDriver::kEventIdx |
      testing::FakeVirtioDevice::kFeature;
  static constexpr uint64_t kNoEventIdx = kAllFeatures & ~testing::VirtioPciDriver::kEventIdx;

  void SetUp() override {
    GuestMemoryTest::SetUp();
    auto created =
        VirtioPciDevice::Create({.class_code = 0x038000}, &fake_, domain_.get(), &container_, this);
    ASSERT_THAT(created, testing::IsOk());
    device_ = std::move(*created);
    driver_ = std::make_unique<testing::VirtioPciDriver>(device_.get());
    ASSERT_TRUE(driver_->probe());
    std::vector<UniqueFd> fds;
    for (const testing::EventCounter& event : events_) fds.push_back(event.duplicate());
    device_->bind_irqs(kIrqMsix, 0, std::move(fds));
  }

  // As Linux: everything of virtio 1.2, 3.1.1, with vector 0 for the configuration.
  void StartDriver(uint64_t features) {
    ASSERT_TRUE(driver_->negotiate(features));
    ASSERT_EQ(driver_->set_config_vector(0), 0);
    queue_.restart();
    cursor_.restart();
    ASSERT_EQ(driver_->set_up_queue(0, queue_, 1), 1);
    ASSERT_EQ(driver_->set_up_queue(1, cursor_, 2), 2);
    driver_->driver_ok();
    ASSERT_EQ(driver_->status(), 0x0f);
  }

  // One request, and the interrupts for it; false when there was none.
  bool ProcessOne(uint16_t queue) {
    const auto processed = device_->process_one(queue);
    device_->deliver_interrupts();
    return processed == VirtioPciDevice::Processed::kOne;
  }

  testing::DescriptorChainBuilder Chain() { return testing::DescriptorChainBuilder(&memory_); }
  void AddRequest(std::string_view text) { queue_.add(Chain().readable(text).writable(64)); }

  // A request goes all the way: handled, answered, with an interrupt. Clears what was counted
  // before.
  void ExpectWorks() {
    const uint64_t mark = memory_.mark();
    fake_.handled.clear();
    const auto chain = Chain().readable("ping").writable(16);
    queue_.add(chain);
    driver_->notify(0);
    EXPECT_TRUE(ProcessOne(0));
    ASSERT_EQ(fake_.handled.size(), 1u);
    EXPECT_EQ(TextOf(fake_.handled[0].request), "ping");
    const auto used = queue_.take_used();
    ASSERT_TRUE(used.has_value());
    EXPECT_EQ(used->len, 4u);
    EXPECT_EQ(TextOf(memory_.get_bytes(chain.address(1), 4)), "ping");
    memory_.release_to(mark);
  }
  void ExpectNeedsReset() {
    EXPECT_EQ(driver_->status() & 0x40, 0x40);
    EXPECT_EQ(events_[0].take(), 1u) << "one configuration interrupt";
    EXPECT_EQ(errors_.size(), 1u);
    EXPECT_FALSE(ProcessOne(0)) << "the queue stays stopped";
    EXPECT_EQ(errors_.size(), 1u);
  }
  // The queue found its memory unmapped: it says so once, and nothing is broken.
  void ExpectWaits() {
    EXPECT_EQ(waiting_.size(), 1u);
    EXPECT_FALSE(device_->has_work());
    EXPECT_EQ(driver_->status(), 0x0f);
    EXPECT_TRUE(errors_.empty());
    waiting_.clear();
  }
  // A new driver finds a device that remembers nothing.
  void ExpectRecovers(uint64_t features) {
    const int resets = fake_.resets;
    driver_->set_status(0);
    EXPECT_EQ(driver_->status(), 0);
    EXPECT_EQ(fake_.resets, resets + 1);
    EXPECT_FALSE(device_->has_work());
    EXPECT_EQ(driver_->read_isr(), 0);
    errors_.clear();
    StartDriver(features);
    ExpectWorks();
    EXPECT_EQ(driver_->status(), 0x0f);
    EXPECT_TRUE(errors_.empty());
  }

  void on_notify(uint16_t queue) override { notified_.push_back(queue); }
  void on_queue_error(uint16_t queue, const Error& error) override {
    errors_.push_back(std::to_string(queue) + ": " + error.message());
  }

  void on_queue_waiting(uint16_t queue, const Error& error) override {
    waiting_.push_back(std::to_string(queue) + ": " + error.message());
  }

  testing::FakeVirtioDevice fake_;
  std::unique_ptr<VirtioPciDevice> device_;
  std::unique_ptr<testing::VirtioPciDriver> driver_;
  testing::VirtqueueDriver queue_{&memory_, 64};
  testing::VirtqueueDriver cursor_{&memory_, 16};
  std::array<testing::EventCounter, 3> events_;
  std::vector<uint16_t> notified_;
  std::vector<std::string> errors_;
  std::vector<std::string> waiting_;
};

}  // namespace mvgpu::glue
