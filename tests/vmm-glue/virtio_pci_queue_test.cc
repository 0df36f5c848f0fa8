// Requests through the whole transport: notify, process_one, response, interrupts, errors and
// resets.

#include <algorithm>

#include "tests/vmm-glue/virtio_fixture.h"

namespace mvgpu::glue {
namespace {

using testing::IsOk;
using testing::kVringDescWrite;
using testing::VirtioPciDriver;
using testing::VirtqueueDriver;
using enum VirtioPciDriver::Structure;

TEST_F(VirtioPciTest, ANotifiedQueueHasWorkUntilItWasFoundEmpty) {
  StartDriver(kAllFeatures);
  EXPECT_FALSE(device_->has_work());
  AddRequest("one");
  EXPECT_FALSE(device_->has_work()) << "nobody said so yet";
  driver_->notify(0);
  EXPECT_TRUE(device_->has_work());
  EXPECT_TRUE(ProcessOne(0));
  EXPECT_TRUE(device_->has_work());
  EXPECT_FALSE(ProcessOne(0));
  EXPECT_FALSE(device_->has_work());
}

TEST_F(VirtioPciTest, ANotificationBeforeDriverOkIsRemembered) {
  ASSERT_TRUE(driver_->negotiate(kAllFeatures));
  driver_->set_up_queue(0, queue_, 1);
  AddRequest("early");
  driver_->notify(0);
  EXPECT_TRUE(notified_.empty());
  EXPECT_FALSE(device_->has_work());
  EXPECT_FALSE(ProcessOne(0)) << "the driver is not ready";
  driver_->driver_ok();
  EXPECT_EQ(notified_, (std::vector<uint16_t>{0}));
  EXPECT_TRUE(ProcessOne(0));
}

TEST_F(VirtioPciTest, NotificationsOfQueuesThatDoNotRunAreIgnored) {
  ASSERT_TRUE(driver_->negotiate(kAllFeatures));
  driver_->set_up_queue(0, queue_, 1);
  driver_->driver_ok();
  driver_->put<uint16_t>(kNotify, 4, 1);      // never enabled
  driver_->put<uint16_t>(kNotify, 8, 2);      // no such queue
  driver_->put<uint16_t>(kNotify, 0xffe, 9);  // the end of the page
  EXPECT_TRUE(notified_.empty());
  EXPECT_FALSE(ProcessOne(1));
  EXPECT_FALSE(ProcessOne(2));
  driver_->put<uint8_t>(kNotify, 3, 0);  // anywhere in its slot, any value
  EXPECT_EQ(notified_, (std::vector<uint16_t>{0}));
}

TEST_F(VirtioPciTest, ARegisterAccessTouchesNoGuestMemory) {
  StartDriver(kAllFeatures);
  AddRequest("waits");
  driver_->notify(0);
  EXPECT_TRUE(reads_.entries.empty());
  EXPECT_TRUE(ProcessOne(0));
  EXPECT_FALSE(reads_.entries.empty());
}

TEST_F(VirtioPciTest, EachGuestByteIsReadOncePerRequest) {
  for (const uint64_t features : {kAllFeatures, kNoEventIdx}) {
    StartDriver(features);
    queue_.add(Chain().readable("first").readable("second").writable(8).writable(64));
    queue_.add_indirect(Chain().readable("third").writable(64));
    while (true) {
      reads_.entries.clear();
      const bool found = ProcessOne(0);
      EXPECT_FALSE(reads_.any_byte_twice());
      EXPECT_LE(reads_.count_at(queue_.available() + 2), 1u) << "avail.idx";
      if (!found) break;
    }
    EXPECT_EQ(queue_.used_index(), 2);
  }
}

TEST_F(VirtioPciTest, ARequestWhoseMemoryIsNotAtHandComesAgain) {
  for (const uint64_t features : {kAllFeatures, kNoEventIdx}) {
    ExpectRecovers(features);
    const uint16_t used = queue_.used_index();
    AddRequest("one");
    AddRequest("two");
    int tries = 0;
    fake_.on_handle = [&tries](uint16_t, std::span<const std::byte>,
                               std::span<std::byte>) -> Result<uint32_t> {
      if (++tries % 3 != 0) return Fail(ErrorCode::kPending, "on its way");
      return 0u;
    };
    fake_.handled.clear();
    for (int i = 0; i < 6; ++i) {
      const auto processed = device_->process_one(0);
      EXPECT_EQ(processed, i % 3 == 2 ? VirtioPciDevice::Processed::kOne
                                      : VirtioPciDevice::Processed::kPending);
      EXPECT_EQ(queue_.used_index(), used + (i + 1) / 3);
    }
    EXPECT_FALSE(ProcessOne(0));
    ASSERT_EQ(fake_.handled.size(), 6u);
    for (size_t i = 0; i < 6; ++i) {
      EXPECT_EQ(TextOf(fake_.handled[i].request), i < 3 ? "one" : "two");
    }
    EXPECT_EQ(driver_->status(), 0x0f);
    EXPECT_TRUE(errors_.empty());
    EXPECT_TRUE(waiting_.empty());
    fake_.on_handle = nullptr;
  }
}

TEST_F(VirtioPciTest, InterruptsWaitUntilTheOwnerDeliversThem) {
  StartDriver(kNoEventIdx);
  AddRequest("one");
  EXPECT_EQ(device_->process_one(0), VirtioPciDevice::Processed::kOne);
  EXPECT_EQ(events_[1].take(), 0u);
  device_->deliver_interrupts();
  EXPECT_EQ(events_[1].take(), 1u);
  device_->deliver_interrupts();
  EXPECT_EQ(events_[1].take(), 0u) << "once";
  AddRequest("two");
  EXPECT_EQ(device_->process_one(0), VirtioPciDevice::Processed::kOne);
  driver_->set_status(0);
  device_->deliver_interrupts();
  EXPECT_EQ(events_[1].take(), 0u) << "the driver has reset since";
}

TEST_F(VirtioPciTest, ResponsesAreScatteredOverTheWritablePart) {
  StartDriver(kAllFeatures);
  fake_.on_handle = [](uint16_t, std::span<const std::byte>, std::span<std::byte> response) {
    for (size_t i = 0; i < 10; ++i) response[i] = static_cast<std::byte>('a' + i);
    return 10u;
  };
  const auto chain = Chain().readable("x").writable(3).writable(4).writable(16);
  const uint16_t head = queue_.add(chain);
  ASSERT_TRUE(ProcessOne(0));
  EXPECT_EQ(fake_.handled[0].response_space, 23u);
  EXPECT_EQ(TextOf(memory_.get_bytes(chain.address(1), 3)), "abc");
  EXPECT_EQ(TextOf(memory_.get_bytes(chain.address(2), 4)), "defg");
  EXPECT_EQ(memory_.get_bytes(chain.address(3), 4),
            (std::vector<std::byte>{std::byte{'h'}, std::byte{'i'}, std::byte{'j'}, std::byte{0}}));
  const auto used = queue_.take_used();
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->id, head);
  EXPECT_EQ(used->len, 10u);
}

TEST_F(VirtioPciTest, BothQueuesWorkBesideEachOther) {
  StartDriver(kAllFeatures);
  queue_.add(Chain().readable("control").writable(16));
  cursor_.add(Chain().readable("cursor"));
  EXPECT_TRUE(ProcessOne(1));
  EXPECT_TRUE(ProcessOne(0));
  ASSERT_EQ(fake_.handled.size(), 2u);
  EXPECT_EQ(fake_.handled[0].queue, 1);
  EXPECT_EQ(TextOf(fake_.handled[0].request), "cursor");
  EXPECT_EQ(fake_.handled[0].response_space, 0u);
  EXPECT_EQ(events_[2].take(), 1u);
  EXPECT_EQ(events_[1].take(), 1u);
  EXPECT_EQ(cursor_.take_used()->len, 0u);
}

TEST_F(VirtioPciTest, IndicesWrapAfter65536RequestsInBothForms) {
  for (const uint64_t features : {kAllFeatures, kNoEventIdx}) {
    StartDriver(features);
    const uint64_t mark = memory_.mark();
    fake_.handled.clear();
    uint32_t sent = 0;
    uint32_t back = 0;
    while (back < 66000) {
      memory_.release_to(mark);
      // Batches of changing size, so that they lie across the ends of ring and index.
      for (uint32_t i = 0; i < 1 + sent % 7; ++i) {
        const auto chain = Chain().readable("r").writable(4);
        sent % 3 == 0 ? queue_.add_indirect(chain) : queue_.add(chain);
        ++sent;
      }
      queue_.set_used_event(static_cast<uint16_t>(sent - 1));
      while (ProcessOne(0)) {
      }
      while (const auto used = queue_.take_used()) {
        ASSERT_EQ(used->len, 1u);
        ++back;
      }
      ASSERT_EQ(back, sent);
    }
    EXPECT_EQ(fake_.handled.size(), sent);
    EXPECT_EQ(queue_.free_descriptors(), 64);
    EXPECT_EQ(driver_->status(), 0x0f);
    memory_.release_to(mark);
  }
}

TEST_F(VirtioPciTest, AFullRingIsWorkedOff) {
  StartDriver(kAllFeatures);
  for (int i = 0; i < 64; ++i) queue_.add(Chain().readable("x"));
  int handled = 0;
  while (ProcessOne(0)) ++handled;
  EXPECT_EQ(handled, 64);
}

// ---- Interrupts ---------------------------------------------------------------------------------

TEST_F(VirtioPciTest, WithoutAVectorNobodyIsInterruptedButTheIsrTells) {
  StartDriver(kAllFeatures);
  driver_->set_up_queue(0, queue_, 0xffff);
  queue_.set_used_event(0);
  AddRequest("silent");
  ASSERT_TRUE(ProcessOne(0));
  for (auto& event : events_) EXPECT_EQ(event.take(), 0u);
  EXPECT_EQ(driver_->read_isr(), 1);
  EXPECT_TRUE(queue_.take_used().has_value());
}

TEST_F(VirtioPciTest, NoInterruptFlagSuppressesWhenThereIsNoEventIndex) {
  StartDriver(kNoEventIdx);
  queue_.set_no_interrupt(true);
  queue_.set_used_event(0);  // not looked at
  AddRequest("quiet");
  ASSERT_TRUE(ProcessOne(0));
  EXPECT_EQ(events_[1].take(), 0u);
  queue_.set_no_interrupt(false);
  AddRequest("loud");
  ASSERT_TRUE(ProcessOne(0));
  EXPECT_EQ(events_[1].take(), 1u);
}

TEST_F(VirtioPciTest, UsedEventChoosesTheRequestThatInterrupts) {
  StartDriver(kAllFeatures);
  queue_.set_no_interrupt(true);  // not looked at
  queue_.set_used_event(2);
  for (int i = 0; i < 5; ++i) {
    AddRequest("x");
    ASSERT_TRUE(ProcessOne(0));
    EXPECT_EQ(events_[1].take(), i == 2 ? 1u : 0u) << i;
  }
}

TEST_F(VirtioPciTest, AvailableEventSparesNotificationsWhileTheDeviceIsBusy) {
  StartDriver(kAllFeatures);
  AddRequest("a");
  EXPECT_TRUE(queue_.must_notify());
  ASSERT_TRUE(ProcessOne(0));  // the device has not seen the queue empty yet
  AddRequest("b");
  EXPECT_FALSE(queue_.must_notify());
  AddRequest("c");
  EXPECT_FALSE(queue_.must_notify());
  while (ProcessOne(0)) {
  }
  EXPECT_EQ(fake_.handled.size(), 3u) << "nothing is overlooked";
  AddRequest("d");
  EXPECT_TRUE(queue_.must_notify()) << "it sleeps now";
}

TEST_F(VirtioPciTest, WithoutEventIndexEveryNotificationIsWanted) {
  StartDriver(kNoEventIdx);
  AddRequest("a");
  ASSERT_TRUE(ProcessOne(0));
  EXPECT_FALSE(ProcessOne(0));
  EXPECT_EQ(memory_.get<uint16_t>(queue_.used()), 0) << "used.flags: never NO_NOTIFY";
  EXPECT_EQ(queue_.available_event(), 0) << "not written when it was not negotiated";
}

// ---- A guest that breaks the rules --------------------------------------------------------------

TEST_F(VirtioPciTest, ABrokenChainStopsItsQueueOnlyAndAResetHeals) {
  StartDriver(kAllFeatures);
  queue_.put_descriptor(0, {kIovaBase, 16, 1, 0});  // its own successor
  queue_.make_available(0);
  driver_->notify(0);
  EXPECT_FALSE(ProcessOne(0));
  ExpectNeedsReset();
  EXPECT_FALSE(device_->has_work());

  cursor_.add(Chain().readable("cursor"));
  driver_->notify(1);
  EXPECT_TRUE(ProcessOne(1)) << "the other queue goes on";
  driver_->set_status(0x0f);
  EXPECT_EQ(driver_->status(), 0x4f) << "only a reset takes the bit away";
  ExpectRecovers(kAllFeatures);
}

TEST_F(VirtioPciTest, AQueueWaitsForRingsThatAreNotMapped) {
  for (const uint32_t area : {32u, 40u, 48u}) {  // descriptors, available, used
    ASSERT_TRUE(driver_->negotiate(kAllFeatures));
    driver_->set_config_vector(0);
    queue_.restart();
    AddRequest("x");
    driver_->put<uint16_t>(kCommon, 22, 0);
    const uint64_t addresses[] = {queue_.descriptors(), queue_.available(), queue_.used()};
    for (uint32_t i = 0; i < 3; ++i) driver_->put<uint64_t>(kCommon, 32 + 8 * i, addresses[i]);
    driver_->put<uint64_t>(kCommon, area, 0x7000'0000'0000);
    driver_->put<uint16_t>(kCommon, 28, 1);
    driver_->driver_ok();
    EXPECT_FALSE(ProcessOne(0));
    EXPECT_FALSE(ProcessOne(0)) << "asked again, it says nothing new";
    ExpectWaits();
    EXPECT_TRUE(fake_.handled.empty());
    ExpectRecovers(kAllFeatures);
    driver_->set_status(0);
    for (auto& event : events_) event.take();
    fake_.handled.clear();
  }
}

TEST_F(VirtioPciTest, RingsThatAreMisalignedOrWrapStopTheQueue) {
  const std::pair<uint32_t, uint64_t> cases[] = {
      {32, kIovaBase + 8},      {40, kIovaBase + 1},      {48, kIovaBase + 2},
      {32, 0xfffffffffffffff0}, {40, 0xfffffffffffffffe}, {48, 0xfffffffffffffffc}};
  for (const auto& [offset, address] : cases) {
    ASSERT_TRUE(driver_->negotiate(kAllFeatures));
    driver_->set_config_vector(0);
    driver_->put<uint16_t>(kCommon, 22, 0);
    driver_->put<uint64_t>(kCommon, offset, address);
    driver_->put<uint16_t>(kCommon, 28, 1);
    driver_->driver_ok();
    reads_.entries.clear();
    EXPECT_FALSE(ProcessOne(0)) << offset;
    EXPECT_TRUE(reads_.entries.empty());
    ExpectNeedsReset();
    ExpectRecovers(kAllFeatures);
    driver_->set_status(0);
    for (auto& event : events_) event.take();
  }
}

TEST_F(VirtioPciTest, ARequestWhoseResponseCannotBeWrittenIsNotTaken) {
  StartDriver(kAllFeatures);
  queue_.add(Chain().readable("x").raw(0x7000'0000'0000, 64, kVringDescWrite));
  EXPECT_FALSE(ProcessOne(0));
  EXPECT_EQ(queue_.used_index(), 0);
  EXPECT_TRUE(fake_.handled.empty());
  ExpectWaits();
  ExpectRecovers(kAllFeatures);
}

TEST_F(VirtioPciTest, AResponseIntoReadOnlyMemoryStopsTheQueue) {
  ASSERT_THAT(
      device_->dma_map(ram_.map_request(0x7000'0000'0000, 0, kPageSize, domain::Access::kRead)),
      IsOk());
  StartDriver(kAllFeatures);
  queue_.add(Chain().readable("x").raw(0x7000'0000'0000, 64, kVringDescWrite));
  EXPECT_FALSE(ProcessOne(0));
  ExpectNeedsReset();
  ExpectRecovers(kAllFeatures);
}

// QEMU unmaps and maps RAM again when it re-arranges memory, whatever the guest is doing.
TEST_F(VirtioPciTest, MemoryThatGoesAwayUnderARunningQueueIsWaitedFor) {
  StartDriver(kAllFeatures);
  ExpectWorks();
  const size_t handled = fake_.handled.size();
  AddRequest("x");
  ASSERT_THAT(device_->dma_unmap_all(), IsOk());
  EXPECT_FALSE(ProcessOne(0));
  ExpectWaits();
  notified_.clear();
  ASSERT_THAT(device_->dma_map(ram_.map_request(kIovaBase, 0, kRamSize)), IsOk());
  EXPECT_EQ(notified_, std::vector<uint16_t>{0}) << "the owner is told to look again";
  EXPECT_TRUE(ProcessOne(0));
  EXPECT_EQ(fake_.handled.size(), handled + 1) << "the request is handled, once";
  EXPECT_TRUE(queue_.take_used().has_value());
  ExpectWorks();
}

TEST_F(VirtioPciTest, AnErrorWithoutAConfigVectorOnlyShowsInTheStatus) {
  StartDriver(kAllFeatures);
  driver_->set_config_vector(0xffff);
  queue_.set_available_index(1000);
  EXPECT_FALSE(ProcessOne(0));
  EXPECT_EQ(driver_->status(), 0x4f);
  for (auto& event : events_) EXPECT_EQ(event.take(), 0u);
  ExpectRecovers(kAllFeatures);
}

// ---- Resets -------------------------------------------------------------------------------------

TEST_F(VirtioPciTest, AResetInTheMiddleForgetsQueuedRequests) {
  StartDriver(kAllFeatures);
  for (int i = 0; i < 10; ++i) AddRequest("x");
  driver_->notify(0);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(ProcessOne(0));
  driver_->set_status(0);
  EXPECT_FALSE(ProcessOne(0));
  EXPECT_EQ(fake_.handled.size(), 4u);
  EXPECT_EQ(queue_.used_index(), 4) << "rings are left as they are";
  ExpectRecovers(kNoEventIdx);
  EXPECT_EQ(queue_.used_index(), 1) << "the new driver starts at zero";
}

TEST_F(VirtioPciTest, AnInterruptOfTheOldDriverDoesNotReachTheNewOne) {
  StartDriver(kAllFeatures);
  device_->set_irq_masked(kIrqMsix, 1, true);
  AddRequest("x");
  ASSERT_TRUE(ProcessOne(0));
  driver_->set_status(0);
  device_->set_irq_masked(kIrqMsix, 1, false);
  EXPECT_EQ(events_[1].take(), 0u);
}

TEST_F(VirtioPciTest, AMaskedVectorFiresWhenItIsUnmasked) {
  StartDriver(kAllFeatures);
  device_->set_irq_masked(kIrqMsix, 1, true);
  AddRequest("x");
  ASSERT_TRUE(ProcessOne(0));
  EXPECT_EQ(events_[1].take(), 0u);
  device_->set_irq_masked(kIrqMsix, 1, false);
  EXPECT_EQ(events_[1].take(), 1u);
}

}  // namespace
}  // namespace mvgpu::glue
