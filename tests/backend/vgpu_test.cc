#include "backend/vgpu.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "apionly-domain/accounting/ledger_view.h"
#include "backend/device_thread.h"
#include "backend/replay/player.h"
#include "tests/backend/vgpu_fixture.h"
#include "tests/fakes/counting_mapper.h"
#include "tests/fakes/kernel_counters.h"

namespace mvgpu::backend {
namespace {

using testing::FailsWith;
using testing::GpuGuest;
using testing::IsOk;
using testing::IsOkAndHolds;

constexpr uint64_t kPicturePages = 3;

class VgpuLifeTest : public VgpuTest {
 protected:
  Vgpu::Counters Now() const { return vgpu_->counters(); }
};

TEST_F(VgpuLifeTest, GuestPagesAreHeldFromAttachToDetach) {
  StartGuest();
  EXPECT_EQ(Now().domain.pinned_pages, 0u) << "a mapping pins nothing";
  EXPECT_EQ(Now().domain.mapped_pages, 2048u);
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(Now().domain.pinned_pages, 0u);
  EXPECT_EQ(guest_->attach_picture(1), kOk);
  EXPECT_EQ(Now().domain.unique_pages, kPicturePages);
  EXPECT_EQ(Now().cache.cached_pages, kPicturePages);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(Now().domain.unique_pages, kPicturePages) << "a transfer hits";
  EXPECT_EQ(guest_->detach(1), kOk);
  EXPECT_EQ(Now().domain.pinned_pages, 0u);
  EXPECT_EQ(Now().cache.cached_pages, 0u);
  EXPECT_EQ(Now().gpu.resources, 1u);
  EXPECT_EQ(guest_->unref(1), kOk);
  EXPECT_EQ(Now().gpu.resources, 0u);
}

TEST_F(VgpuLifeTest, EverythingIsReleasedByResetAndUnmap) {
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 2));
  EXPECT_FALSE(Now().all_released());
  vgpu_->reset();
  EXPECT_EQ(Now().domain.pinned_pages, 0u);
  EXPECT_FALSE(Now().all_released()) << "the mappings are the VMM's";
  EXPECT_THAT(vgpu_->dma_unmap_all(), IsOkAndHolds(8u << 20));
  EXPECT_TRUE(Now().all_released());
  EXPECT_EQ(Now().gpu.frames, 2u) << "what was done is remembered";
  EXPECT_TRUE(vgpu_->picture().hash(0).has_value()) << "and the last picture";
}

TEST_F(VgpuLifeTest, MemoryThatTheVmmMayTruncateIsReportedOnceForEachFile) {
  StartGuest();
  EXPECT_TRUE(unsealed_.empty()) << "the guest's RAM is sealed";
  testing::GuestRam unsealed(16 * kPageSize, /*seals=*/0);
  const uint64_t iova = uint64_t{1} << 40;
  EXPECT_THAT(vgpu_->dma_map(unsealed.map_request(iova, 0, 4 * kPageSize)), IsOk());
  EXPECT_THAT(vgpu_->dma_map(unsealed.map_request(iova * 2, 0, 4 * kPageSize)), IsOk());
  EXPECT_EQ(unsealed_, std::vector{testing::MakeRange(iova, 4 * kPageSize)});
}

TEST_F(VgpuLifeTest, MappingWithoutAFileIsSomethingToRelease) {
  ASSERT_THAT(vgpu_->dma_map({Iova(0x10000), 0x1000, domain::Access::kRead, UniqueFd(), 0}),
              IsOk());
  EXPECT_EQ(Now().domain.mapped_pages, 0u) << "it cannot be reached";
  EXPECT_FALSE(Now().all_released());
}

TEST_F(VgpuLifeTest, UnmapTakesThePinsAndTheNextTransferComesBackToThePages) {
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 1));
  const auto before = vgpu_->picture().hash(0);
  EXPECT_THAT(guest_->unmap_pictures(), IsOkAndHolds(GpuGuest::kPicturesSize));
  EXPECT_EQ(Now().domain.pinned_pages, 0u);
  EXPECT_EQ(Now().domain.revocations, 1u);
  EXPECT_EQ(guest_->transfer(1), testing::wire::kErrUnspec) << "there is nothing to read";
  ASSERT_THAT(guest_->map_pictures(), IsOk());
  guest_->paint(9);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(Now().domain.unique_pages, kPicturePages);
  EXPECT_EQ(guest_->flush(1), kOk);
  EXPECT_NE(vgpu_->picture().hash(0), before);
  EXPECT_TRUE(queue_errors_.empty());
}

TEST_F(VgpuLifeTest, QueueWhoseRingsAreUnmappedWaitsUntilTheyAreBack) {
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 1));
  ASSERT_THAT(vgpu_->dma_unmap(Iova(GpuGuest::kRam), GpuGuest::kLowSize), IsOk());
  EXPECT_EQ(guest_->flush(1), 0u) << "no answer";
  EXPECT_THAT(waiting_, ::testing::ElementsAre(0, 1)) << "the cursor's queue was looked at, too";
  EXPECT_EQ(Now().gpu.frames, 1u);
  doorbells_.clear();
  ASSERT_THAT(guest_->map_low(), IsOk());
  EXPECT_THAT(doorbells_, ::testing::ElementsAre(0, 1)) << "they are to be looked at again";
  EXPECT_TRUE(StepAll());
  EXPECT_EQ(Now().gpu.frames, 2u) << "the request was not lost";
  EXPECT_TRUE(guest_->control().take_used().has_value());
  EXPECT_TRUE(queue_errors_.empty());
  EXPECT_EQ(guest_->flush(1), kOk);
}

TEST_F(VgpuLifeTest, GuestThatBreaksItsQueueStopsItUntilItsDriverResets) {
  StartGuest();
  guest_->control().set_available_index(1000);
  EXPECT_FALSE(StepAll());
  EXPECT_EQ(queue_errors_.size(), 1u);
  EXPECT_EQ(guest_->driver().status() & 0x40, 0x40) << "needs reset";
  EXPECT_TRUE(guest_->move_cursor(1, 2)) << "the other queue goes on";
  ASSERT_TRUE(guest_->boot());
  EXPECT_TRUE(guest_->draw(1, 1));
}

TEST_F(VgpuLifeTest, StepsOfQueuesThatAreNotThereAreNone) {
  EXPECT_FALSE(vgpu_->step(0)) << "no driver yet";
  StartGuest();
  EXPECT_FALSE(vgpu_->step(2));
  EXPECT_FALSE(vgpu_->step(65535));
}

TEST_F(VgpuLifeTest, DoorbellReachesTheOwner) {
  StartGuest();
  doorbells_.clear();
  guest_->ring_control();
  EXPECT_EQ(doorbells_, std::vector<uint16_t>{0});
}

TEST_F(VgpuLifeTest, MappingThatMakesNoSenseChangesNothing) {
  StartGuest();
  const auto mapped = Now().container.mappings;
  EXPECT_THAT(guest_->map_low(), IsOk()) << "the same once more";
  EXPECT_THAT(vgpu_->dma_map(guest_->ram().map_request(GpuGuest::kRam, 4096, 4096)),
              FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(vgpu_->dma_unmap(Iova(GpuGuest::kRam), 4096), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(vgpu_->dma_unmap(Iova(0), 4096), IsOkAndHolds(0u));
  EXPECT_EQ(Now().container.mappings, mapped);
  EXPECT_TRUE(guest_->draw(1, 1));
}

class PinLimitTest : public VgpuLifeTest {
 protected:
  PinLimitTest() { config_.pin_limit_bytes = kPicturePages * kPageSize; }
};

TEST_F(PinLimitTest, PagesBeyondTheLimitAreACleanErrorForTheGuest) {
  StartGuest();
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(guest_->attach(1, {{GpuGuest::kPictures, 4 * 4096}}), testing::wire::kErrOutOfMemory);
  EXPECT_EQ(Now().domain.pinned_pages, 0u) << "nothing of it was kept";
  ASSERT_EQ(refusals_.size(), 1u) << "the operator is told, too";
  EXPECT_THAT(refusals_[0], ::testing::HasSubstr("limit"));
  EXPECT_EQ(guest_->attach_picture(1), kOk) << "what fits goes on";
  EXPECT_EQ(guest_->create(2), kOk);
  EXPECT_EQ(guest_->attach(2, {{GpuGuest::kPictures + 0x10000, 4096}}),
            testing::wire::kErrOutOfMemory);
  EXPECT_EQ(guest_->attach_picture(2), kOk) << "a page counts once, however often it is pinned";
  EXPECT_EQ(Now().domain.peak_unique_pages, kPicturePages);
  EXPECT_EQ(guest_->detach(1), kOk);
  EXPECT_EQ(guest_->detach(2), kOk);
  EXPECT_EQ(guest_->attach(2, {{GpuGuest::kPictures + 0x10000, 4096}}), kOk) << "room again";
  EXPECT_TRUE(queue_errors_.empty());
  EXPECT_EQ(guest_->driver().status(), 0x0f);
}

class MlockTest : public VgpuLifeTest {
 protected:
  MlockTest() { config_.pin = PinMode::kMlock; }
};

TEST_F(MlockTest, KernelAgreesThatPagesAreLockedOnlyWhileAttached) {
  const uint64_t before = testing::KernelLockedPages();
  StartGuest();
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(testing::KernelLockedPages(), before);
  EXPECT_EQ(guest_->attach_picture(1), kOk);
  EXPECT_EQ(testing::KernelLockedPages(), before + Now().domain.locked_pages);
  EXPECT_GE(Now().domain.locked_pages, kPicturePages);
  ASSERT_THAT(guest_->unmap_pictures(), IsOk());
  EXPECT_EQ(testing::KernelLockedPages(), before);
  ASSERT_THAT(guest_->map_pictures(), IsOk());
  EXPECT_EQ(guest_->set_scanout(1), kOk);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_GT(testing::KernelLockedPages(), before);
  EXPECT_EQ(guest_->unref(1), kOk);
  EXPECT_EQ(testing::KernelLockedPages(), before);
}

class IoUringTest : public VgpuLifeTest {
 protected:
  IoUringTest() { config_.pin = PinMode::kIoUring; }
};

TEST_F(IoUringTest, KernelAgreesThatPagesArePinnedOnlyWhileAttached) {
  const uint64_t before = testing::KernelPinnedPages();
  StartGuest();
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(guest_->attach_picture(1), kOk);
  EXPECT_EQ(Now().domain.locked_pages, kPicturePages);
  EXPECT_EQ(testing::KernelPinnedPages(), before + kPicturePages);
  ASSERT_THAT(guest_->unmap_pictures(), IsOk());
  EXPECT_EQ(testing::KernelPinnedPages(), before);
  ASSERT_THAT(guest_->map_pictures(), IsOk());
  EXPECT_EQ(guest_->set_scanout(1), kOk);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_GT(testing::KernelPinnedPages(), before);
  EXPECT_EQ(guest_->unref(1), kOk);
  EXPECT_EQ(testing::KernelPinnedPages(), before);
}

class LedgerTest : public VgpuLifeTest {
 protected:
  static constexpr const char* kVm = "00112233-4455-6677-8899-aabbccddeeff";
  LedgerTest() {
    config_.vm_uuid = kVm;
    config_.runtime_dir = dir_ / "run";
  }
  domain::LedgerSnapshot Snapshot() {
    auto dir = domain::RuntimeDir::OpenForReading(config_.runtime_dir);
    EXPECT_THAT(dir, IsOk());
    auto snapshot = domain::ReadLedger(*dir, kVm);
    EXPECT_THAT(snapshot, IsOk());
    return snapshot ? std::move(*snapshot) : domain::LedgerSnapshot{};
  }
  testing::TempDir dir_;
};

TEST_F(LedgerTest, AccountsFollowTheGuest) {
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 1));
  const auto snapshot = Snapshot();
  ASSERT_EQ(snapshot.rows.size(), 1u);
  EXPECT_EQ(snapshot.rows[0].name, "vgpu0");
  EXPECT_EQ(snapshot.rows[0].mapped_pages, 2048u);
  EXPECT_EQ(snapshot.rows[0].unique_pages, kPicturePages);
  EXPECT_EQ(snapshot.rows[0].charged_pages, kPicturePages);
  EXPECT_EQ(snapshot.rows[0].cache.cached_pages, kPicturePages);
  EXPECT_EQ(snapshot.rows[0].cache.miss_pages, kPicturePages);
  EXPECT_EQ(snapshot.rows[0].cache.hit_pages, Now().cache.hit_pages);
  EXPECT_THAT(domain::ProblemsOf(snapshot), ::testing::IsEmpty());
  EndVm();
  EXPECT_EQ(Snapshot().charged_pages(), 0u);
  EXPECT_EQ(Snapshot().rows[0].cache.cached_pages, 0u);
  EXPECT_EQ(Snapshot().rows[0].cache.unmapped_pages, kPicturePages);
}

// Room for two pages that nobody uses.
class IdleTest : public LedgerTest {
 protected:
  IdleTest() {
    config_.pin = PinMode::kMlock;
    config_.dma_idle_bytes = 2 * kPageSize;
  }
};

TEST_F(IdleTest, PagesThatNobodyUsesStayPinnedAndChargedUpToTheLimit) {
  StartGuest();
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(guest_->attach_picture(1), kOk);
  EXPECT_EQ(guest_->detach(1), kOk);
  EXPECT_EQ(Now().cache.idle_pages, 2u);
  EXPECT_EQ(Now().cache.evicted_pages, 1u);
  EXPECT_EQ(Now().domain.pinned_pages, 2u);
  EXPECT_EQ(Now().domain.charged_pages, 2u);
  EXPECT_EQ(Snapshot().rows[0].charged_pages, 2u);
  EXPECT_EQ(Snapshot().rows[0].cache.idle_pages, 2u);
  EXPECT_EQ(guest_->attach_picture(1), kOk);
  EXPECT_EQ(Now().cache.hit_pages, 2u);
  EXPECT_EQ(Now().cache.idle_pages, 0u);
  EXPECT_EQ(Now().peak_idle_pages, 2u);
}

// A driver that starts anew resets by a register; the accounts follow at once.
TEST_F(IdleTest, DriversResetLeavesPagesIdleAndTheVmmsEndTakesThem) {
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 1));
  EXPECT_EQ(Now().peak_idle_pages, 0u);
  ASSERT_TRUE(guest_->boot());
  EXPECT_EQ(Now().peak_idle_pages, 2u);
  EXPECT_EQ(Snapshot().rows[0].cache.idle_pages, 2u);
  EXPECT_EQ(Snapshot().rows[0].cache.cached_pages, 2u);
  vgpu_->reset();
  EXPECT_FALSE(Now().all_released());
  EXPECT_GT(Now().domain.locked_pages, 0u);
  EXPECT_THAT(vgpu_->dma_unmap_all(), IsOk());
  EXPECT_TRUE(Now().all_released());
  EXPECT_EQ(Snapshot().charged_pages(), 0u);
  EXPECT_EQ(Snapshot().rows[0].cache.idle_pages, 0u);
}

class IdleUnderLimitTest : public IdleTest {
 protected:
  IdleUnderLimitTest() { config_.pin_limit_bytes = kPicturePages * kPageSize; }
};

TEST_F(IdleUnderLimitTest, IdlePagesGoFirst) {
  StartGuest();
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(guest_->attach(1, {{GpuGuest::kPictures + 0x10000, 2 * kPageSize}}), kOk);
  EXPECT_EQ(guest_->detach(1), kOk);
  EXPECT_EQ(Now().cache.idle_pages, 2u);
  EXPECT_EQ(guest_->attach_picture(1), kOk) << "needs all of the limit";
  EXPECT_EQ(Now().cache.idle_pages, 0u);
  EXPECT_EQ(Now().domain.unique_pages, kPicturePages);
  EXPECT_TRUE(refusals_.empty());
}

// A mapper that knows which pages moved.
class RecheckTest : public RecordedVgpuTest {
 protected:
  static constexpr uint64_t kFirst = GpuGuest::kPictures / kPageSize;

  RecheckTest() {
    auto mapper = std::make_unique<testing::CountingMapper>();
    counting_ = mapper.get();
    mapper_ = std::move(mapper);
    config_.vm_uuid = "00112233-4455-6677-8899-aabbccddeeff";
    config_.runtime_dir = dir_ / "run";
  }
  Vgpu::Counters Now() const { return vgpu_->counters(); }
  domain::CacheFigures Shown() {
    auto dir = domain::RuntimeDir::OpenForReading(config_.runtime_dir);
    EXPECT_THAT(dir, IsOk());
    auto snapshot = domain::ReadLedger(*dir, config_.vm_uuid);
    EXPECT_THAT(snapshot, IsOk());
    return snapshot ? snapshot->rows[0].cache : domain::CacheFigures{};
  }
  testing::CountingMapper* counting_;
};

TEST_F(RecheckTest, PagesThatMovedAreTakenFromTheDeviceAndMappedAnewWhenNeeded) {
  EXPECT_FALSE(vgpu_->recheck()) << "nothing is cached";
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 1));
  counting_->moved = {kFirst, kFirst + 2, kFirst + 100};
  EXPECT_TRUE(vgpu_->recheck());
  EXPECT_EQ(moved_, std::vector<uint64_t>{2});
  EXPECT_EQ(Now().moved_pages, 2u);
  EXPECT_EQ(Now().cache.revoked_pages, 2u);
  EXPECT_EQ(Now().cache.cached_pages, 1u);
  EXPECT_EQ(Now().domain.pinned_pages, 1u);
  EXPECT_EQ(Shown().moved_pages, 2u);
  EXPECT_EQ(Shown().cached_pages, 1u);
  EXPECT_EQ(counting_->mapped_iova_pages(), std::set<uint64_t>{kFirst + 1});
  counting_->moved.clear();
  guest_->paint(7);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(guest_->flush(1), kOk);
  EXPECT_EQ(Now().cache.cached_pages, kPicturePages);
  EXPECT_TRUE(vgpu_->recheck());
  EXPECT_EQ(moved_.size(), 1u) << "told once";
  EXPECT_EQ(guest_->detach(1), kOk);
  EXPECT_FALSE(vgpu_->recheck());
}

TEST_F(RecheckTest, ALookThatFindsNothingLeavesNoTraceInARecording) {
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 1));
  const uint64_t records = writer_->records();
  const std::string before = vgpu_->session_json();
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(vgpu_->recheck());
  EXPECT_EQ(writer_->records(), records);
  EXPECT_EQ(vgpu_->session_json(), before);
  EXPECT_TRUE(moved_.empty());
  counting_->moved = {kFirst};
  EXPECT_TRUE(vgpu_->recheck());
  EXPECT_EQ(writer_->records(), records + 1) << "the accounts changed";
}

TEST(VgpuCreateTest, ConfigurationsThatCannotBeAreRefused) {
  struct NoOwner final : Vgpu::Owner {
    void on_doorbell(uint16_t) override {}
    void on_queue_waiting(uint16_t, const Error&) override {}
    void on_queue_error(uint16_t, const Error&) override {}
    void on_refused(const Error&) override {}
    void on_unsealed_memory(IovaRange) override {}
    void on_remote_memory(Iova) override {}
    void on_moved_pages(uint64_t) override {}
  } owner;
  const auto create = [&owner](const VgpuConfig& config) {
    return Vgpu::Create(config, std::move(*Vgpu::MakeParts(config)), nullptr, &owner);
  };
  VgpuConfig config;
  config.pin = PinMode::kNone;
  EXPECT_THAT(create(config), IsOk());
  config.gpu.scanouts = 17;
  EXPECT_THAT(create(config), FailsWith(ErrorCode::kInvalid));
  config.gpu.scanouts = 1;
  config.vm_uuid = "no uuid";
  config.runtime_dir = "/nonexistent";
  EXPECT_THAT(create(config), FailsWith(ErrorCode::kInvalid));
}

// The VMM's thread takes the pictures away and gives them back while the device thread works on
// requests that need them: each request sees all of them or none, and so does a replay.
class TwoThreadsTest : public RecordedVgpuTest {
 protected:
  void on_doorbell(uint16_t queue) override {
    if (device_thread_ != nullptr) device_thread_->kick(queue);
  }
  bool Wait() override {
    if (device_thread_ == nullptr) return StepAll();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    return std::chrono::steady_clock::now() < give_up_;
  }
  void StartDeviceThread() {
    device_thread_ =
        std::make_unique<DeviceThread>([this](uint16_t queue) { return vgpu_->step(queue); });
  }
  void StopDeviceThread() {
    device_thread_->stop();
    device_thread_.reset();
  }
  // The recorder saw one order of events, which a replay can follow.
  void ExpectReplaysEqual() {
    ASSERT_NO_FATAL_FAILURE(EndSession());
    auto reader = TraceReader::Open(trace_path());
    ASSERT_THAT(reader, IsOk());
    auto player = Player::Create(reader->get(), {});
    ASSERT_THAT(player, IsOk());
    const auto outcome = (*player)->play({});
    ASSERT_THAT(outcome, IsOk());
    EXPECT_THAT(outcome->described, ::testing::IsEmpty());
    EXPECT_TRUE(outcome->all_released);
    EXPECT_EQ(outcome->counters_json, summary_);
  }

  const std::chrono::steady_clock::time_point give_up_ =
      std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::unique_ptr<DeviceThread> device_thread_;
};

TEST_F(TwoThreadsTest, MemoryComesAndGoesWhileTheDeviceWorks) {
  StartGuest();
  ASSERT_TRUE(guest_->draw(1, 1));
  StartDeviceThread();
  GpuGuest* guest = guest_.get();
  std::atomic<bool> stop = false;
  uint64_t moved = 0;
  std::thread vmm([&] {
    while (!stop) {
      ASSERT_THAT(guest->unmap_pictures(), IsOk());
      ASSERT_THAT(guest->map_pictures(), IsOk());
      ++moved;
      std::this_thread::yield();
    }
  });
  uint32_t succeeded = 0;
  uint32_t refused = 0;
  for (int i = 0; i < 500 && !HasFailure(); ++i) {
    const uint32_t answer = guest->transfer(1);
    (answer == kOk ? succeeded : refused) += 1;
    EXPECT_TRUE(answer == kOk || answer == testing::wire::kErrUnspec) << answer;
    EXPECT_EQ(guest->flush(1), kOk);
  }
  stop = true;
  vmm.join();
  StopDeviceThread();
  EXPECT_GT(moved, 0u);
  EXPECT_EQ(guest->transfer(1), kOk) << "they are there now";
  EXPECT_TRUE(queue_errors_.empty());
  ExpectReplaysEqual();
  RecordProperty("succeeded", static_cast<int>(succeeded));
  RecordProperty("refused", static_cast<int>(refused));
}

TEST_F(TwoThreadsTest, ResetComesAtAnyTime) {
  StartGuest();
  StartDeviceThread();
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(guest_->boot());
    ASSERT_TRUE(guest_->draw(1, 1));
    guest_->paint(static_cast<uint32_t>(i));
    guest_->ring_control();
    vgpu_->reset();
    EXPECT_EQ(vgpu_->counters().domain.pinned_pages, 0u);
  }
  StopDeviceThread();
  EXPECT_EQ(vgpu_->counters().gpu.resources, 0u);
  ExpectReplaysEqual();
}

}  // namespace
}  // namespace mvgpu::backend
