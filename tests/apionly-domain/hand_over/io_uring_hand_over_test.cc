// The hand-over of what the io_uring back end pins: on the real kernel, which counts it as VmPin,
// and with a table of buffers that fails.

#include "apionly-domain/pin/io_uring_pin_backend.h"
#include "tests/apionly-domain/hand_over/hand_over_fixture.h"
#include "tests/fakes/fake_buffer_table.h"
#include "tests/fakes/kernel_counters.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::FakeBufferTable;
using testing::GuestRam;
using testing::IsOk;
using testing::KernelPinnedPages;
using testing::PageKeeper;

IovaRange Pages(uint64_t first, uint64_t count) { return RangeOf({first, count}); }

// A VM of 64 pages from IOVA page 100 on with a vGPU, and a device that may be assigned.
class IoUringHandOverTest : public ::testing::Test, public PinOwner {
 protected:
  void Start(std::unique_ptr<PinBackend> backend) {
    keeper_.add_view(FileIn(container_, ram_));
    auto vgpu = ApiOnlyDomain::Create(
        {.unmap_deadline = std::chrono::milliseconds(0), .device_pins = &device_pins_},
        std::move(backend), nullptr, nullptr);
    ASSERT_THAT(vgpu, IsOk());
    vgpu_ = std::move(*vgpu);
    ASSERT_THAT(container_.attach(vgpu_.get()), IsOk());
    ASSERT_THAT(container_.map(ram_.map_request(BytesIn(100), 0, ram_.size())), IsOk());
    context_ = vgpu_->open_context(this);
  }
  void TearDown() override {
    pins_.clear();
    context_.reset();
    EXPECT_THAT(container_.unmap_all(), IsOk());
    if (is_attached_) {
      EXPECT_THAT(container_.detach(nic_.get()), IsOk());
    }
    if (vgpu_ != nullptr) {
      EXPECT_EQ(vgpu_->counters().locked_pages, 0u);
      EXPECT_THAT(container_.detach(vgpu_.get()), IsOk());
    }
    EXPECT_EQ(keeper_.problem(), "");
  }
  void Pin(uint64_t first, uint64_t count) {
    auto pin = context_->pin(Pages(first, count), Access::kReadWrite);
    ASSERT_THAT(pin, IsOk());
    pins_.push_back(std::move(*pin));
  }
  Result<void> Attach() {
    auto done = container_.attach(nic_.get());
    is_attached_ |= done.has_value();
    return done;
  }
  Result<void> Detach() {
    auto done = container_.detach(nic_.get());
    is_attached_ &= !done.has_value();
    return done;
  }
  uint64_t locked() const { return vgpu_->counters().locked_pages; }
  void on_revoke(IovaRange) override {}
  std::string_view pin_owner_name() const override { return "test"; }

  GuestRam ram_{64 * kPageSize};
  PageKeeper keeper_;
  DevicePins device_pins_;
  Container container_;
  std::unique_ptr<ApiOnlyDomain> vgpu_;
  WatchedDevice nic_{"nic", &keeper_, &device_pins_, nullptr};
  bool is_attached_ = false;
  std::unique_ptr<PinContext> context_;
  std::vector<PinnedRange> pins_;
};

TEST_F(IoUringHandOverTest, TheKernelCountsPinsOnlyWhileNoDeviceHoldsThePages) {
  auto backend = MakeIoUringPinBackend();
  if (!backend) GTEST_SKIP() << backend.error().message();
  ASSERT_NO_FATAL_FAILURE(Start(std::move(*backend)));
  const uint64_t before = KernelPinnedPages();
  const auto pinned = [&] {
    EXPECT_EQ(locked(), KernelPinnedPages() - before);  // what we say, the kernel says
    return KernelPinnedPages() - before;
  };
  Pin(102, 8);
  Pin(120, 1);
  EXPECT_EQ(pinned(), 9u);
  ASSERT_THAT(Attach(), IsOk());
  EXPECT_EQ(pinned(), 0u);
  Pin(130, 4);  // the device holds those too
  pins_.erase(pins_.begin());
  EXPECT_EQ(pinned(), 0u);
  ASSERT_THAT(Detach(), IsOk());
  EXPECT_EQ(pinned(), 5u) << "what is held by then: 120, 130-133";
  ASSERT_THAT(Attach(), IsOk());
  pins_.clear();
  ASSERT_THAT(Detach(), IsOk());
  EXPECT_EQ(pinned(), 0u);
}

TEST_F(IoUringHandOverTest, APinUnderADeviceThatComesAndGoesKeepsItsBytes) {
  auto backend = MakeIoUringPinBackend();
  if (!backend) GTEST_SKIP() << backend.error().message();
  ASSERT_NO_FATAL_FAILURE(Start(std::move(*backend)));
  ram_.fill_pattern();
  Pin(100, 64);
  const std::byte* const host = pins_[0].runs().front().host;
  for (int i = 0; i < 20; ++i) {
    ASSERT_THAT(Attach(), IsOk());
    ASSERT_THAT(Detach(), IsOk());
  }
  EXPECT_EQ(locked(), 64u);
  EXPECT_EQ(std::memcmp(host, ram_.at(0), ram_.size()), 0);
}

TEST_F(IoUringHandOverTest, ADeviceStaysWhenAPinCannotBeHadBack) {
  auto state = std::make_shared<FakeBufferTable::State>();
  auto backend = IoUringPinBackend::Create([state]() -> Result<std::unique_ptr<BufferTable>> {
    return std::make_unique<FakeBufferTable>(state);
  });
  ASSERT_THAT(backend, IsOk());
  ASSERT_NO_FATAL_FAILURE(Start(std::move(*backend)));
  Pin(102, 8);
  Pin(120, 1);
  ASSERT_THAT(Attach(), IsOk());
  EXPECT_EQ(state->pages(), 0u);
  for (const uint64_t most : {0, 8}) {  // none of the runs, and the first one of them
    state->max_pages = most;
    EXPECT_THAT(Detach(), FailsWith(ErrorCode::kLimit)) << most;
    EXPECT_EQ(state->pages(), 0u) << "what was had back is given up again";
    EXPECT_EQ(device_pins_.unique_pages(), 64u);
  }
  state->max_pages = 9;
  EXPECT_THAT(Detach(), IsOk());
  EXPECT_EQ(state->pages(), 9u);
}

// The kernel may refuse to drop a buffer, for want of memory: the pages are counted twice for a
// while, and are not lost.
TEST_F(IoUringHandOverTest, ABufferThatTheKernelDoesNotDropIsDroppedLater) {
  auto state = std::make_shared<FakeBufferTable::State>();
  auto backend = IoUringPinBackend::Create([state]() -> Result<std::unique_ptr<BufferTable>> {
    return std::make_unique<FakeBufferTable>(state);
  });
  ASSERT_THAT(backend, IsOk());
  ASSERT_NO_FATAL_FAILURE(Start(std::move(*backend)));
  Pin(102, 8);
  state->refuses_empty = true;
  ASSERT_THAT(Attach(), IsOk());
  EXPECT_EQ(state->pages(), 8u);
  EXPECT_EQ(locked(), 8u);
  state->refuses_empty = false;
  ASSERT_THAT(Detach(), IsOk());
  EXPECT_EQ(state->pages(), 8u) << "the pin's own again";
  EXPECT_EQ(locked(), 8u);
}

}  // namespace
}  // namespace mvgpu::domain
