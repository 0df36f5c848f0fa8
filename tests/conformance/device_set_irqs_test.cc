// DEVICE_SET_IRQS (libvfio-user test/py/test_device_set_irqs.py, test_irq_trigger.py).

#include "tests/conformance/server_fixture.h"

namespace mvgpu::testing {
namespace {

constexpr uint32_t kIntx = 0, kMsix = 2, kErr = 3, kReq = 4;
constexpr uint32_t kNone = 1, kBool = 2, kEventfd = 4;
constexpr uint32_t kMask = 8, kUnmask = 0x10, kTrigger = 0x20;

class DeviceSetIrqsTest : public NegotiatedServerTest {
 protected:
  Reply Set(uint32_t flags, uint32_t index, uint32_t start, uint32_t count,
            const std::vector<int>& fds = {}, const Bytes& bools = {}) {
    const auto argsz = static_cast<uint32_t>(20 + bools.size());
    return Transact(kSetIrqs,
                    Bytes{}.U32(argsz).U32(flags).U32(index).U32(start).U32(count).Add(bools), fds);
  }
  bool IsBound(uint32_t irq, uint32_t vector) { return device_.eventfds.contains({irq, vector}); }
};

TEST_F(DeviceSetIrqsTest, RefusesShortBodyAndSmallArgsz) {
  EXPECT_THAT(Transact(kSetIrqs, {}), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kSetIrqs, Bytes{}.U32(20).U32(0x21)), IsErrorReply(EINVAL));
  const auto with_argsz = [](uint32_t argsz) {
    return Bytes{}.U32(argsz).U32(kNone | kTrigger).U32(kReq).U32(0).U32(0);
  };
  EXPECT_THAT(Transact(kSetIrqs, with_argsz(3)), IsErrorReply(EINVAL));
  EXPECT_THAT(Transact(kSetIrqs, with_argsz(19)), IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_THAT(Transact(kSetIrqs, with_argsz(20)), IsReplyOfSize(16));
}

TEST_F(DeviceSetIrqsTest, RefusesUnknownIndex) {
  EXPECT_THAT(Set(kNone | kTrigger, 5, 0, 0), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, 0xffffffff, 0, 0), IsErrorReply(EINVAL));
}

TEST_F(DeviceSetIrqsTest, RefusesFlagsWithoutExactlyOneDataTypeAndAction) {
  for (const uint32_t flags :
       {kNone | kMask | kUnmask, kNone | kBool | kMask, kNone | kBool | kEventfd | kTrigger, kNone,
        kTrigger, 0u, kNone | kTrigger | 0x40, kNone | kTrigger | 0x80000000}) {
    EXPECT_THAT(Set(flags, kMsix, 0, 1), IsErrorReply(EINVAL)) << flags;
  }
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 0, 1), IsReplyOfSize(16));
}

TEST_F(DeviceSetIrqsTest, RefusesRangesBeyondTheVectors) {
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 2047, 2), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 2049, 1), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 284, 0xffffffff), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 0xffffffff, 0xffffffff), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kErr, 0, 2), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kReq, 0, 2), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kIntx, 0, 1), IsErrorReply(EINVAL)) << "has no vectors";
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 2047, 1), IsReplyOfSize(16));
}

TEST_F(DeviceSetIrqsTest, ErrorAndRequestInterruptsCanOnlyBeTriggered) {
  for (const uint32_t index : {kErr, kReq}) {
    EXPECT_THAT(Set(kNone | kMask, index, 0, 1), IsErrorReply(EINVAL));
    EXPECT_THAT(Set(kNone | kUnmask, index, 0, 1), IsErrorReply(EINVAL));
    EXPECT_THAT(Set(kNone | kTrigger, index, 0, 1), IsReplyOfSize(16));
  }
}

TEST_F(DeviceSetIrqsTest, CountZeroMustBeAPlainDisable) {
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 1, 0), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kMask, kMsix, 0, 0), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kBool | kTrigger, kMsix, 0, 0), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 0), IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 0, 0), IsReplyOfSize(16));
  EXPECT_THAT(device_.calls, ::testing::ElementsAre("disable irq=2"));
}

// libvfio-user refuses the second one; clients that disable everything before they leave want it.
TEST_F(DeviceSetIrqsTest, IndexWithOrWithoutVectorsCanBeDisabled) {
  EXPECT_THAT(Set(kNone | kTrigger, kReq, 0, 0), IsReplyOfSize(16));
  EXPECT_THAT(Set(kNone | kTrigger, kIntx, 0, 0), IsReplyOfSize(16));
}

TEST_F(DeviceSetIrqsTest, RefusesDescriptorsThatDoNotFit) {
  const int fd = NewEventfd();
  const size_t before = OpenFds();
  EXPECT_THAT(Set(kBool | kTrigger, kMsix, 0, 1, {fd}, Bytes{}.U8(1)), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 0, 1, {fd}), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 0, 0, {fd}), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 2, {fd}), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 1, {fd, fd}), IsErrorReply(EINVAL));
  EXPECT_EQ(OpenFds(), before);
  EXPECT_TRUE(device_.calls.empty());
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 2, {fd, fd}), IsReplyOfSize(16));
}

// Needed for INTx under KVM only, and there is no INTx.
TEST_F(DeviceSetIrqsTest, RefusesEventfdsThatMaskOrUnmask) {
  const int fd = NewEventfd();
  EXPECT_THAT(Set(kEventfd | kMask, kMsix, 0, 1, {fd}), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kEventfd | kUnmask, kMsix, 0, 1, {fd}), IsErrorReply(EINVAL));
}

TEST_F(DeviceSetIrqsTest, BindsAndRebindsAVector) {
  const int first = NewEventfd();
  const int second = NewEventfd();
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 1, {first}), IsReplyOfSize(16));
  device_.fire(kMsix, 0);
  EXPECT_EQ(Counter(first), 1u);
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 1, {second}), IsReplyOfSize(16));
  device_.fire(kMsix, 0);
  EXPECT_EQ(Counter(first), 0u);
  EXPECT_EQ(Counter(second), 1u);
}

TEST_F(DeviceSetIrqsTest, BindsDescriptorsInOrder) {
  const std::vector<int> fds = {NewEventfd(), NewEventfd(), NewEventfd()};
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 2045, 3, fds), IsReplyOfSize(16));
  device_.fire(kMsix, 2046);
  EXPECT_EQ(Counter(fds[0]), 0u);
  EXPECT_EQ(Counter(fds[1]), 1u);
  EXPECT_EQ(Counter(fds[2]), 0u);
}

TEST_F(DeviceSetIrqsTest, DeviceRaisesABoundVector) {
  const int fd = NewEventfd(4);
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 8, 1, {fd}), IsReplyOfSize(16));
  device_.fire(kMsix, 8);
  EXPECT_EQ(Counter(fd), 5u);
}

TEST_F(DeviceSetIrqsTest, EventfdsWithoutDescriptorsUnbindThoseVectorsOnly) {
  const int fd = NewEventfd();
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 4, {fd, fd, fd, fd}), IsReplyOfSize(16));
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 1, 2), IsReplyOfSize(16));
  EXPECT_TRUE(IsBound(kMsix, 0));
  EXPECT_FALSE(IsBound(kMsix, 1));
  EXPECT_FALSE(IsBound(kMsix, 2));
  EXPECT_TRUE(IsBound(kMsix, 3));
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 2048), IsReplyOfSize(16));
  EXPECT_TRUE(device_.eventfds.empty());
}

TEST_F(DeviceSetIrqsTest, DisableUnbindsTheIndexAndClosesItsDescriptors) {
  const int fd = NewEventfd();
  const size_t before = OpenFds();
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 2, {fd, fd}), IsReplyOfSize(16));
  EXPECT_THAT(Set(kEventfd | kTrigger, kErr, 0, 1, {fd}), IsReplyOfSize(16));
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 0, 0), IsReplyOfSize(16));
  EXPECT_TRUE(IsBound(kErr, 0));
  EXPECT_THAT(Set(kEventfd | kTrigger, kErr, 0, 1), IsReplyOfSize(16)) << "how QEMU ends it";
  EXPECT_TRUE(device_.eventfds.empty());
  EXPECT_EQ(OpenFds(), before);
}

TEST_F(DeviceSetIrqsTest, TriggersWithoutData) {
  const int first = NewEventfd(4);
  const int second = NewEventfd(8);
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 2, {first, second}), IsReplyOfSize(16));
  EXPECT_THAT(Set(kNone | kTrigger, kMsix, 1, 1), IsReplyOfSize(16));
  EXPECT_EQ(Counter(first), 4u);
  EXPECT_EQ(Counter(second), 9u);
}

TEST_F(DeviceSetIrqsTest, TriggersWhereTheBoolIsSet) {
  const int first = NewEventfd(4);
  const int second = NewEventfd(8);
  EXPECT_THAT(Set(kEventfd | kTrigger, kMsix, 0, 2, {first, second}), IsReplyOfSize(16));
  EXPECT_THAT(Set(kBool | kTrigger, kMsix, 0, 2, {}, Bytes{}.U8(0).U8(1)), IsReplyOfSize(16));
  EXPECT_EQ(Counter(first), 4u);
  EXPECT_EQ(Counter(second), 9u);
}

TEST_F(DeviceSetIrqsTest, RefusesTooFewAndTooManyBools) {
  EXPECT_THAT(Set(kBool | kTrigger, kMsix, 0, 2, {}, Bytes{}.U8(1)), IsErrorReply(EINVAL));
  EXPECT_THAT(Set(kBool | kTrigger, kMsix, 0, 2, {}, Bytes{}.Fill(3, 1)), IsErrorReply(EINVAL));
  EXPECT_TRUE(device_.calls.empty());
}

TEST_F(DeviceSetIrqsTest, DeviceSeesMaskAndUnmask) {
  EXPECT_THAT(Set(kNone | kMask, kMsix, 0, 2), IsReplyOfSize(16));
  EXPECT_TRUE(device_.masked.contains({kMsix, 0}));
  EXPECT_THAT(Set(kNone | kUnmask, kMsix, 0, 1), IsReplyOfSize(16));
  EXPECT_FALSE(device_.masked.contains({kMsix, 0}));
  EXPECT_TRUE(device_.masked.contains({kMsix, 1}));
  EXPECT_THAT(Set(kBool | kUnmask, kMsix, 0, 2, {}, Bytes{}.U8(0).U8(1)), IsReplyOfSize(16));
  EXPECT_FALSE(device_.masked.contains({kMsix, 1}));
}

}  // namespace
}  // namespace mvgpu::testing
