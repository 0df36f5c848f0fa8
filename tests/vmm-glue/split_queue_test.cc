#include "vmm-glue/virtio/split_queue.h"

#include <optional>
#include <string>

#include "tests/vmm-glue/virtio_fixture.h"

namespace mvgpu::glue {
namespace {

using testing::DescriptorChainBuilder;
using testing::FailsWith;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::kVringDescIndirect;
using testing::kVringDescNext;
using testing::kVringDescWrite;
using testing::VirtqueueDriver;
using testing::VringDesc;

constexpr uint16_t kSize = 16;

class SplitQueueTest : public GuestMemoryTest {
 protected:
  void SetUp() override {
    GuestMemoryTest::SetUp();
    Start(/*indirect=*/true, /*event_idx=*/false);
  }
  void Start(bool indirect, bool event_idx) {
    driver_.restart();
    auto created = SplitQueue::Create(domain_.get(), {.size = kSize,
                                                      .descriptors = Iova(driver_.descriptors()),
                                                      .available = Iova(driver_.available()),
                                                      .used = Iova(driver_.used()),
                                                      .indirect = indirect,
                                                      .event_idx = event_idx});
    ASSERT_THAT(created, IsOk());
    queue_ = std::move(*created);
  }
  DescriptorChainBuilder Chain() { return DescriptorChainBuilder(&memory_); }
  Result<bool> Pop() { return queue_->pop(&request_); }

  // One bad thing: the pop fails, and nothing reached the used ring.
  void ExpectRefused() {
    EXPECT_THAT(Pop(), FailsWith(ErrorCode::kInvalid));
    EXPECT_EQ(driver_.used_index(), 0);
  }
  // The available ring lies there; its last words are of no use with a few requests.
  void ExpectNothingReadBehindTheTable() {
    EXPECT_EQ(reads_.count_at(driver_.descriptors() + 16 * kSize + 12), 0u);
  }
  // The descriptors lie at index 0, 1, ... as they are.
  void MakeRaw(std::initializer_list<VringDesc> descriptors) {
    uint16_t index = 0;
    for (const VringDesc& descriptor : descriptors) driver_.put_descriptor(index++, descriptor);
    driver_.make_available(0);
  }
  // A table of `descriptors`, and the queue's descriptor that refers to it.
  VringDesc Table(std::initializer_list<VringDesc> descriptors) {
    const uint64_t table = memory_.allocate(16 * descriptors.size());
    uint64_t at = table;
    for (const VringDesc& descriptor : descriptors) {
      memory_.put(at, descriptor);
      at += 16;
    }
    return {table, static_cast<uint32_t>(16 * descriptors.size()), kVringDescIndirect, 0};
  }
  // Well-formed data to refer to.
  VringDesc Data(uint32_t size = 8, uint16_t flags = 0, uint16_t next = 0) {
    return {memory_.allocate(size), size, flags, next};
  }

  VirtqueueDriver driver_{&memory_, kSize};
  std::unique_ptr<SplitQueue> queue_;
  QueueRequest request_;
};

TEST_F(SplitQueueTest, AnEmptyQueueGivesNothing) { EXPECT_THAT(Pop(), IsOkAndHolds(false)); }

TEST_F(SplitQueueTest, GathersTheReadablePartAndRemembersTheWritable) {
  const uint16_t head =
      driver_.add(Chain().readable("hello ").readable("world").writable(5).writable(7));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(TextOf(request_.readable()), "hello world");
  EXPECT_EQ(request_.writable_size(), 12u);
  EXPECT_THAT(queue_->respond(request_, BytesOf("response")), IsOk());
  EXPECT_THAT(queue_->push(request_, 8), IsOkAndHolds(true));
  const auto used = driver_.take_used();
  ASSERT_TRUE(used.has_value());
  EXPECT_EQ(used->id, head);
  EXPECT_EQ(used->len, 8u);
  EXPECT_THAT(Pop(), IsOkAndHolds(false));
}

TEST_F(SplitQueueTest, ARequestObjectCarriesNothingOverToTheNextChain) {
  driver_.add(Chain().readable("a longer one").writable(100));
  driver_.add(Chain().readable("short"));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(TextOf(request_.readable()), "short");
  EXPECT_EQ(request_.writable_size(), 0u);
}

TEST_F(SplitQueueTest, ChainsOfOneKindOnlyAreFine) {
  driver_.add(Chain().readable("in"));
  driver_.add(Chain().writable(9));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(TextOf(request_.readable()), "in");
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_TRUE(request_.readable().empty());
  EXPECT_EQ(request_.writable_size(), 9u);
}

TEST_F(SplitQueueTest, AChainMayUseTheWholeQueue) {
  auto chain = Chain();
  for (uint16_t i = 0; i < kSize; ++i) chain.readable(std::string(1, static_cast<char>('a' + i)));
  driver_.add(chain);
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(TextOf(request_.readable()), "abcdefghijklmnop");
}

TEST_F(SplitQueueTest, TheDeviceUsesTheCopyAndNotWhatTheGuestMadeOfIt) {
  const auto chain = Chain().readable("honest").writable(8);
  const uint16_t head = driver_.add(chain);
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  memory_.put_bytes(chain.address(0), BytesOf("forged"));
  driver_.put_descriptor(head, {0, 0, kVringDescNext, 999});
  EXPECT_EQ(TextOf(request_.readable()), "honest");
  EXPECT_THAT(queue_->respond(request_, BytesOf("ok")), IsOk());
  EXPECT_THAT(queue_->push(request_, 2), IsOk());
  EXPECT_EQ(TextOf(memory_.get_bytes(chain.address(1), 2)), "ok");
}

// ---- Rings --------------------------------------------------------------------------------------

TEST_F(SplitQueueTest, CreationChecksSizeAlignmentAndWrap) {
  const auto create = [&](uint16_t size, uint64_t descriptors, uint64_t available, uint64_t used) {
    return SplitQueue::Create(domain_.get(), {.size = size,
                                              .descriptors = Iova(descriptors),
                                              .available = Iova(available),
                                              .used = Iova(used)});
  };
  EXPECT_THAT(create(16, 0x1000, 0x2000, 0x3000), IsOk());
  EXPECT_THAT(create(1, 0x1010, 0x2002, 0x3004), IsOk());
  EXPECT_THAT(create(32768, 0, 0x100000, 0x200000), IsOk());
  for (const uint16_t size : std::initializer_list<uint16_t>{0, 3, 32769, 65535}) {
    EXPECT_THAT(create(size, 0x1000, 0x2000, 0x3000), FailsWith(ErrorCode::kInvalid)) << size;
  }
  EXPECT_THAT(create(16, 0x1008, 0x2000, 0x3000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create(16, 0x1000, 0x2001, 0x3000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create(16, 0x1000, 0x2000, 0x3002), FailsWith(ErrorCode::kInvalid));
  // The last place at which each area ends exactly at 2^64, and one step further.
  EXPECT_THAT(create(16, uint64_t{0} - 256, 0x2000, 0x3000), IsOk());
  EXPECT_THAT(create(16, uint64_t{0} - 240, 0x2000, 0x3000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create(16, 0x1000, uint64_t{0} - 38, 0x3000), IsOk());
  EXPECT_THAT(create(16, 0x1000, uint64_t{0} - 36, 0x3000), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(create(16, 0x1000, 0x2000, uint64_t{0} - 136), IsOk());
  EXPECT_THAT(create(16, 0x1000, 0x2000, uint64_t{0} - 132), FailsWith(ErrorCode::kInvalid));
}

TEST_F(SplitQueueTest, AnIndexThatJumpsByMoreThanTheQueueIsRefused) {
  for (const uint16_t index : std::initializer_list<uint16_t>{kSize + 1, 1000, 65535}) {
    Start(true, false);
    driver_.set_available_index(index);
    ExpectRefused();
  }
  Start(true, false);
  for (uint16_t i = 0; i < kSize; ++i) driver_.add(Chain().readable("x"));
  EXPECT_THAT(Pop(), IsOkAndHolds(true)) << "a jump by the queue's size is a full ring";
}

TEST_F(SplitQueueTest, AnIndexThatGoesBackIsRefused) {
  driver_.add(Chain().readable("x"));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  driver_.set_available_index(0);
  ExpectRefused();
}

TEST_F(SplitQueueTest, AHeadOutsideTheQueueIsRefused) {
  driver_.make_available(kSize);
  ExpectRefused();
  ExpectNothingReadBehindTheTable();
  Start(true, false);
  driver_.put_descriptor(kSize - 1, Data());
  driver_.make_available(kSize - 1);
  EXPECT_THAT(Pop(), IsOkAndHolds(true));
}

TEST_F(SplitQueueTest, UnmappedRingsAreReported) {
  auto created = SplitQueue::Create(domain_.get(), {.size = kSize,
                                                    .descriptors = Iova(0x1000),
                                                    .available = Iova(0x2000),
                                                    .used = Iova(0x3000)});
  ASSERT_THAT(created, IsOk());
  EXPECT_THAT((*created)->pop(&request_), FailsWith(ErrorCode::kNotMapped));
}

// ---- Chains -------------------------------------------------------------------------------------

TEST_F(SplitQueueTest, LoopsAreRefused) {
  MakeRaw({Data(8, kVringDescNext, 0)});
  ExpectRefused();
  Start(true, false);
  MakeRaw({Data(8, kVringDescNext, 1), Data(8, kVringDescNext, 2), Data(8, kVringDescNext, 1)});
  ExpectRefused();
}

TEST_F(SplitQueueTest, ASuccessorOutsideTheQueueIsRefused) {
  MakeRaw({Data(8, kVringDescNext, kSize)});
  ExpectRefused();
  ExpectNothingReadBehindTheTable();
  Start(true, false);
  MakeRaw({Data(8, 0, kSize)});
  EXPECT_THAT(Pop(), IsOkAndHolds(true)) << "without the flag, next means nothing";
}

TEST_F(SplitQueueTest, ReadableBehindWritableIsRefused) {
  driver_.add(Chain().readable("a").writable(8).readable("b"));
  ExpectRefused();
}

TEST_F(SplitQueueTest, EmptyDescriptorsAreRefused) {
  for (const uint16_t flags : {uint16_t{0}, kVringDescWrite}) {
    Start(true, false);
    driver_.add(Chain().readable("a").raw(kIovaBase, 0, flags));
    ExpectRefused();
  }
}

TEST_F(SplitQueueTest, AddressesThatWrapAreRefused) {
  for (const uint16_t flags : {uint16_t{0}, kVringDescWrite}) {
    Start(true, false);
    driver_.add(Chain().raw(0xffff'ffff'ffff'fff0, 0x11, flags));
    ExpectRefused();
  }
}

TEST_F(SplitQueueTest, UnmappedRequestsAreReported) {
  driver_.add(Chain().readable("a").raw(0x7000'0000'0000, 8, 0));
  EXPECT_THAT(Pop(), FailsWith(ErrorCode::kNotMapped));
  Start(true, false);
  driver_.add(Chain().raw(kIovaBase + kRamSize - 8, 9, 0));
  EXPECT_THAT(Pop(), FailsWith(ErrorCode::kNotMapped)) << "one byte beyond the end";
  Start(true, false);
  driver_.add(Chain().raw(kIovaBase + kRamSize - 8, 8, 0));
  EXPECT_THAT(Pop(), IsOkAndHolds(true));
}

TEST_F(SplitQueueTest, ARequestIsNotTakenWhileItsResponseCannotBeWritten) {
  driver_.add(Chain().readable("a").writable(4).raw(0x7000'0000'0000, 8, kVringDescWrite));
  EXPECT_THAT(Pop(), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(Pop(), FailsWith(ErrorCode::kNotMapped)) << "the same request comes again";
  Start(true, false);
  driver_.add(Chain().readable("a").writable(4));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_THAT(queue_->respond(request_, BytesOf("1234")), IsOk());
}

TEST_F(SplitQueueTest, RequestsAreLimitedInSum) {
  constexpr uint32_t kHalf = SplitQueue::kMaxReadableBytes / 2;
  driver_.add(Chain().raw(kIovaBase, kHalf, 0).raw(kIovaBase, kHalf, 0));
  EXPECT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(request_.readable().size(), SplitQueue::kMaxReadableBytes);
  driver_.add(Chain().raw(kIovaBase, kHalf, 0).raw(kIovaBase, kHalf, 0).raw(kIovaBase, 1, 0));
  ExpectRefused();
  Start(true, false);
  driver_.add(Chain().raw(kIovaBase, 0xffffffff, 0));
  ExpectRefused();
}

TEST_F(SplitQueueTest, MoreRoomThanAResponseTakesIsUsedUpToTheLimit) {
  driver_.add(Chain().readable("a").raw(kIovaBase, 0x40000000, kVringDescWrite).writable(8));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(request_.writable_size(), SplitQueue::kMaxWritableBytes);
}

TEST_F(SplitQueueTest, AChainOfMoreThan4GiBIsRefused) {
  driver_.add(Chain()
                  .raw(kIovaBase, 0x80000000, kVringDescWrite)
                  .raw(kIovaBase, 0x80000000, kVringDescWrite));
  EXPECT_THAT(Pop(), IsOkAndHolds(true)) << "2^32 itself is allowed";
  driver_.add(Chain()
                  .raw(kIovaBase, 0x80000000, kVringDescWrite)
                  .raw(kIovaBase, 0x80000000, kVringDescWrite)
                  .raw(kIovaBase, 1, kVringDescWrite));
  ExpectRefused();
}

// ---- Indirect tables ----------------------------------------------------------------------------

TEST_F(SplitQueueTest, AnIndirectTableIsOneChain) {
  const uint16_t head = driver_.add_indirect(Chain().readable("in ").readable("table").writable(6));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(TextOf(request_.readable()), "in table");
  EXPECT_EQ(request_.writable_size(), 6u);
  EXPECT_THAT(queue_->push(request_, 0), IsOk());
  EXPECT_EQ(driver_.take_used()->id, head);
}

TEST_F(SplitQueueTest, ATableMayEndADirectChainAndItsWriteFlagMeansNothing) {
  const VringDesc table = Table({Data(8, kVringDescWrite)});
  driver_.add(
      Chain().readable("direct").raw(table.addr, table.len, kVringDescIndirect | kVringDescWrite));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(TextOf(request_.readable()), "direct");
  EXPECT_EQ(request_.writable_size(), 8u);
}

TEST_F(SplitQueueTest, ATableMayBeLongerThanTheQueueUpToALimit) {
  for (const uint32_t count :
       {SplitQueue::kMaxIndirectDescriptors, SplitQueue::kMaxIndirectDescriptors + 1}) {
    Start(true, false);
    auto chain = Chain();
    for (uint32_t i = 0; i < count; ++i) chain.readable("x");
    driver_.add_indirect(chain);
    if (count == SplitQueue::kMaxIndirectDescriptors) {
      ASSERT_THAT(Pop(), IsOkAndHolds(true));
      EXPECT_EQ(request_.readable().size(), count);
    } else {
      ExpectRefused();
    }
  }
}

TEST_F(SplitQueueTest, EntriesOfATableAreFollowedInItsOwnOrder) {
  const VringDesc table = Table({Data(1, kVringDescNext, 2), Data(99, 0), Data(2, 0)});
  driver_.add(Chain().raw(table.addr, table.len, table.flags));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(request_.readable().size(), 3u);
}

TEST_F(SplitQueueTest, EntriesOfAnEarlierTableAreNotThereAnyMore) {
  driver_.add_indirect(Chain().readable("three").readable("entries").readable("long"));
  ASSERT_THAT(Pop(), IsOkAndHolds(true));
  const VringDesc table = Table({Data(8, kVringDescNext, 2), Data()});
  driver_.add(Chain().raw(table.addr, table.len, table.flags));
  ExpectRefused();
}

TEST_F(SplitQueueTest, TablesThatWereNotNegotiatedAreRefused) {
  Start(/*indirect=*/false, /*event_idx=*/false);
  driver_.add_indirect(Chain().readable("x"));
  ExpectRefused();
}

TEST_F(SplitQueueTest, MalformedTablesAreRefused) {
  const VringDesc good = Table({Data()});
  const VringDesc nested = Table({good});
  const VringDesc looping = Table({Data(8, kVringDescNext, 1), Data(8, kVringDescNext, 0)});
  const VringDesc beyond = Table({Data(8, kVringDescNext, 1)});
  const VringDesc unordered = Table({Data(8, kVringDescWrite | kVringDescNext, 1), Data(8)});
  const VringDesc empty_entry = Table({VringDesc{kIovaBase, 0, 0, 0}});
  for (const VringDesc& bad :
       {nested, looping, beyond, unordered, empty_entry, VringDesc{good.addr, 0, good.flags, 0},
        VringDesc{good.addr, 15, good.flags, 0}, VringDesc{good.addr, 17, good.flags, 0},
        VringDesc{good.addr, 0xfffffff0, good.flags, 0},
        VringDesc{good.addr, 16, kVringDescIndirect | kVringDescNext, 1}}) {
    Start(true, false);
    driver_.put_descriptor(1, Data());
    driver_.put_descriptor(0, bad);
    driver_.make_available(0);
    ExpectRefused();
  }
  Start(true, false);
  MakeRaw({good});
  EXPECT_THAT(Pop(), IsOkAndHolds(true)) << "what the bad ones were made of";
  Start(true, false);
  MakeRaw({{0x7000'0000'0000, 16, kVringDescIndirect, 0}});
  EXPECT_THAT(Pop(), FailsWith(ErrorCode::kNotMapped));
  Start(true, false);
  MakeRaw({{0xffff'ffff'ffff'fff0, 32, kVringDescIndirect, 0}});
  ExpectRefused();
}

// ---- Suppression --------------------------------------------------------------------------------

TEST_F(SplitQueueTest, TheDriversFlagDecidesWithoutEventIndex) {
  for (const bool quiet : {true, false}) {
    driver_.set_no_interrupt(quiet);
    driver_.add(Chain().readable("x"));
    ASSERT_THAT(Pop(), IsOkAndHolds(true));
    EXPECT_THAT(queue_->push(request_, 0), IsOkAndHolds(!quiet));
  }
}

TEST_F(SplitQueueTest, TheDriversEventDecidesWithEventIndex) {
  Start(true, /*event_idx=*/true);
  driver_.set_used_event(1);
  for (const bool expected : {false, true, false}) {
    driver_.add(Chain().readable("x"));
    ASSERT_THAT(Pop(), IsOkAndHolds(true));
    EXPECT_THAT(queue_->push(request_, 0), IsOkAndHolds(expected));
  }
}

TEST_F(SplitQueueTest, TheIndexIsReadOnlyWhenWhatItAnnouncedIsUsedUp) {
  for (int i = 0; i < 3; ++i) driver_.add(Chain().readable("x"));
  for (int i = 0; i < 3; ++i) ASSERT_THAT(Pop(), IsOkAndHolds(true));
  EXPECT_EQ(reads_.count_at(driver_.available() + 2), 1u);
  EXPECT_THAT(Pop(), IsOkAndHolds(false));
  EXPECT_EQ(reads_.count_at(driver_.available() + 2), 2u);
}

}  // namespace
}  // namespace mvgpu::glue
