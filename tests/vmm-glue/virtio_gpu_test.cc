#include "vmm-glue/virtio/virtio_gpu.h"

#include <cstring>

#include "dma-cache/dma_cache.h"
#include "tests/vmm-glue/virtio_fixture.h"
#include "vmm-glue/virtio/virtio_gpu_pci.h"

namespace mvgpu::glue {
namespace {

using testing::DescriptorChainBuilder;
using testing::EventCounter;
using testing::FailsWith;
using testing::IsOk;
using testing::VirtioPciDriver;
using testing::VirtqueueDriver;
using enum VirtioPciDriver::Structure;

// Says what it was asked.
class FakeGpu final : public gpu::GpuDevice {
 public:
  explicit FakeGpu(Owner* owner) : owner_(owner) {}
  void show_another_size() { owner_->on_display_event(); }

  uint64_t features() const override { return 2; }
  void set_driver_features(uint64_t features) override { driver_features = features; }
  void read_config(uint32_t offset, std::span<std::byte> data) const override {
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(offset + i);
  }
  void write_config(uint32_t offset, std::span<const std::byte> data) override {
    log += "config@" + std::to_string(offset) + "=" + TextOf(data) + ";";
  }
  Result<uint32_t> execute_control(std::span<const std::byte> request,
                                   std::span<std::byte> response) override {
    log += "control:" + TextOf(request) + ";";
    if (response.empty()) return 0u;
    response[0] = std::byte{'!'};
    return 1u;
  }
  void execute_cursor(std::span<const std::byte> request) override {
    log += "cursor:" + TextOf(request) + ";";
  }
  void reset() override { log += "reset;"; }
  std::optional<gpu::FrameView> frame(uint32_t) const override { return std::nullopt; }
  gpu::CursorState cursor(uint32_t) const override { return {}; }
  Result<void> set_preferred_mode(uint32_t, gpu::Size) override { return {}; }
  Counters counters() const override { return {}; }

  std::string log;
  uint64_t driver_features = 0;

 private:
  Owner* const owner_;
};

class VirtioGpuTest : public GuestMemoryTest, protected VirtioPciDevice::Owner {
 protected:
  void SetUp() override {
    GuestMemoryTest::SetUp();
    auto created = VirtioGpuPci::Create(
        [this](gpu::GpuDevice::Owner* owner) -> Result<std::unique_ptr<gpu::GpuDevice>> {
          owner->on_display_event();  // before there is anybody to tell
          auto fake = std::make_unique<FakeGpu>(owner);
          gpu_ = fake.get();
          return fake;
        },
        domain_.get(), &container_, this);
    ASSERT_THAT(created, IsOk());
    device_ = std::move(*created);
    driver_ = std::make_unique<VirtioPciDriver>(&device_->vfio_device());
    ASSERT_TRUE(driver_->probe());
    std::vector<UniqueFd> fds;
    for (const EventCounter& event : events_) fds.push_back(event.duplicate());
    device_->vfio_device().bind_irqs(kIrqMsix, 0, std::move(fds));
  }
  void StartDriver() {
    ASSERT_TRUE(driver_->negotiate(VirtioPciDriver::kVersion1 | 2));
    driver_->set_config_vector(0);
    driver_->set_up_queue(0, control_, 1);
    driver_->set_up_queue(1, cursor_, 2);
    driver_->driver_ok();
    gpu_->log.clear();
  }
  DescriptorChainBuilder Chain() { return DescriptorChainBuilder(&memory_); }

  void on_notify(uint16_t) override {}
  void on_queue_error(uint16_t, const Error& error) override { ADD_FAILURE() << error.message(); }
  void on_queue_waiting(uint16_t, const Error& error) override { ADD_FAILURE() << error.message(); }

  FakeGpu* gpu_ = nullptr;  // owned by device_
  std::unique_ptr<VirtioGpuPci> device_;
  std::unique_ptr<VirtioPciDriver> driver_;
  VirtqueueDriver control_{&memory_, 256};
  VirtqueueDriver cursor_{&memory_, 16};
  std::array<EventCounter, 3> events_;
};

TEST_F(VirtioGpuTest, LooksLikeQemusVirtioGpuPci) {
  EXPECT_EQ(driver_->read_config<uint32_t>(0x00), 0x10501af4u);
  EXPECT_EQ(driver_->read_config<uint32_t>(0x08), 0x03800001u);
  EXPECT_EQ(driver_->queue_count(), 2);
  EXPECT_EQ(driver_->queue_size(0), 256);
  EXPECT_EQ(driver_->queue_size(1), 16);
  EXPECT_EQ(driver_->device_features() & 0xffffff, 2u);
}

TEST_F(VirtioGpuTest, QueuesReachTheGpu) {
  StartDriver();
  const auto control = Chain().readable("show").writable(24);
  control_.add(control);
  cursor_.add(Chain().readable("move"));
  for (const uint16_t queue : {VirtioGpu::kControlQueue, VirtioGpu::kCursorQueue}) {
    EXPECT_EQ(device_->process_one(queue), VirtioPciDevice::Processed::kOne);
    EXPECT_EQ(device_->process_one(queue), VirtioPciDevice::Processed::kNothing);
  }
  EXPECT_EQ(gpu_->log, "control:show;cursor:move;");
  EXPECT_EQ(gpu_->driver_features, 2u);
  EXPECT_EQ(TextOf(memory_.get_bytes(control.address(1), 1)), "!");
  EXPECT_EQ(control_.take_used()->len, 1u);
  EXPECT_EQ(cursor_.take_used()->len, 0u);
}

TEST_F(VirtioGpuTest, HasWorkForEitherQueue) {
  StartDriver();
  for (const uint16_t queue : {VirtioGpu::kControlQueue, VirtioGpu::kCursorQueue}) {
    EXPECT_FALSE(device_->has_work());
    driver_->notify(queue);
    EXPECT_TRUE(device_->has_work());
    EXPECT_EQ(device_->process_one(queue), VirtioPciDevice::Processed::kNothing);
  }
}

TEST_F(VirtioGpuTest, ConfigAndResetReachTheGpu) {
  EXPECT_EQ(driver_->get<uint32_t>(kDevice, 8), 0x0b0a0908u);
  StartDriver();
  driver_->put<uint32_t>(kDevice, 4, 0x41414141);
  driver_->set_status(0);
  EXPECT_EQ(gpu_->log, "config@4=AAAA;reset;");
}

TEST_F(VirtioGpuTest, ADisplayEventRaisesTheConfigInterrupt) {
  StartDriver();
  const uint8_t before = driver_->generation();
  gpu_->show_another_size();
  EXPECT_EQ(events_[0].take(), 1u);
  EXPECT_EQ(driver_->generation(), static_cast<uint8_t>(before + 1));
}

TEST_F(VirtioGpuTest, AGpuThatCannotBeMadeIsReported) {
  const auto created = VirtioGpuPci::Create(
      [](gpu::GpuDevice::Owner*) -> Result<std::unique_ptr<gpu::GpuDevice>> {
        return Fail(ErrorCode::kInvalid, "17 scanouts");
      },
      domain_.get(), &container_, this);
  EXPECT_THAT(created, FailsWith(ErrorCode::kInvalid));
}

// ---- With the real GPU --------------------------------------------------------------------------

class NoDisplay final : public gpu::Display {
 public:
  void on_frame(uint32_t, const gpu::FrameView&, const gpu::Rect&) override {}
  void on_disabled(uint32_t) override {}
};

class RealGpuTest : public GuestMemoryTest, protected VirtioPciDevice::Owner {
 protected:
  // virtio 1.2, 5.7.6.7 and 5.7.6.8; this test's own copies.
  struct Header {
    uint32_t type;
    uint32_t flags = 0;
    uint64_t fence = 0;
    uint32_t context = 0;
    uint32_t padding = 0;
  };
  struct CreateAndAttach {
    Header create{0x0101};
    uint32_t create_id = 1, format = 1, width = 64, height = 64;
    Header attach{0x0106};
    uint32_t attach_id = 1, entries = 1;
    uint64_t address = 0;
    uint32_t length = 64 * 64 * 4, padding = 0;
  };

  void SetUp() override {
    GuestMemoryTest::SetUp();
    mapper_ = dma::MakeNoneMapper();
    cache_ = std::make_unique<dma::DmaCache>(domain_.get(), mapper_.get());
    auto created = VirtioGpuPci::Create(
        [this](gpu::GpuDevice::Owner* owner) {
          return gpu::GpuDevice::Create({}, cache_.get(), domain_.get(), &display_, owner);
        },
        domain_.get(), &container_, this);
    ASSERT_THAT(created, IsOk());
    device_ = std::move(*created);
    driver_ = std::make_unique<VirtioPciDriver>(&device_->vfio_device());
    ASSERT_TRUE(driver_->probe());
    ASSERT_TRUE(driver_->negotiate(driver_->device_features()));
    driver_->set_up_queue(0, control_, 1);
    driver_->driver_ok();
  }
  void TearDown() override {
    device_.reset();
    cache_.reset();
    GuestMemoryTest::TearDown();
  }
  // The type of the response.
  uint32_t Ask(std::span<const std::byte> request, uint32_t space = 24) {
    const auto chain = DescriptorChainBuilder(&memory_).readable(request).writable(space);
    control_.add_indirect(chain);
    driver_->notify(0);
    EXPECT_EQ(device_->process_one(VirtioGpu::kControlQueue), VirtioPciDevice::Processed::kOne);
    const auto used = control_.take_used();
    if (!used || used->len < 24) return 0;
    return memory_.get<uint32_t>(chain.address(1));
  }
  void AttachBacking() {
    CreateAndAttach r;
    r.address = memory_.allocate(r.length, 4096);
    const auto bytes = std::as_bytes(std::span(&r, 1));
    EXPECT_EQ(Ask(bytes.first(40)), 0x1100u);
    EXPECT_EQ(Ask(bytes.subspan(40, 48)), 0x1100u);
  }

  void on_notify(uint16_t) override {}
  void on_queue_error(uint16_t, const Error& error) override { ADD_FAILURE() << error.message(); }
  void on_queue_waiting(uint16_t, const Error& error) override { ADD_FAILURE() << error.message(); }

  NoDisplay display_;
  std::unique_ptr<dma::Mapper> mapper_;
  std::unique_ptr<dma::DmaCache> cache_;
  std::unique_ptr<VirtioGpuPci> device_;
  std::unique_ptr<VirtioPciDriver> driver_;
  VirtqueueDriver control_{&memory_, 256};
};

TEST_F(RealGpuTest, AnswersDisplayInfoAndEdid) {
  EXPECT_EQ(driver_->get<uint32_t>(kDevice, 8), 1u) << "num_scanouts";
  const Header display_info{0x0100};
  EXPECT_EQ(Ask(std::as_bytes(std::span(&display_info, 1)), 408), 0x1101u);
  const struct {
    Header header{0x010a};
    uint32_t scanout = 0, padding = 0;
  } edid;
  EXPECT_EQ(Ask(std::as_bytes(std::span(&edid, 1)), 1056), 0x1104u);
}

TEST_F(RealGpuTest, AttachedBackingIsPinnedUntilTheDriverResets) {
  AttachBacking();
  EXPECT_EQ(domain_->counters().pinned_pages, 4u);
  driver_->set_status(0);
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
}

TEST_F(RealGpuTest, ThePciResetReleasesBackingToo) {
  AttachBacking();
  device_->vfio_device().reset();
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
}

TEST_F(RealGpuTest, AnUnmapTakesThePinsAndTheDeviceLivesOn) {
  AttachBacking();
  EXPECT_THAT(device_->vfio_device().dma_unmap_all(), IsOk());
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
  EXPECT_THAT(device_->vfio_device().dma_map(ram_.map_request(kIovaBase, 0, kRamSize)), IsOk());
  const Header display_info{0x0100};
  EXPECT_EQ(Ask(std::as_bytes(std::span(&display_info, 1)), 408), 0x1101u);
}

}  // namespace
}  // namespace mvgpu::glue
