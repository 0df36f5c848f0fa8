// A vGPU whose guest has memory without a file: the VMM is asked for every access, without the
// lock, and anything may happen in between.

#include <algorithm>
#include <functional>
#include <set>

#include "backend/replay/player.h"
#include "tests/backend/vgpu_fixture.h"
#include "tests/fakes/event_counter.h"

namespace mvgpu::backend {
namespace {

using ::testing::ElementsAre;
using testing::EventCounter;
using testing::GpuGuest;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::RawRecord;
using ::testing::SizeIs;

// The VMM as the vGPU asks it: the guest's RAM, and whatever else happens at that moment.
class AskedVmm final : public domain::RemoteMemory {
 public:
  struct Access {
    int number;  // from 0
    bool is_write;
    Iova iova;
    uint64_t size;
  };
  Result<void> read(Iova iova, std::span<std::byte> destination) override {
    MVGPU_RETURN_IF_ERROR(Enter({accesses++, false, iova, destination.size()}));
    std::copy_n(ram->at(iova.value() - GpuGuest::kRam), destination.size(), destination.begin());
    return {};
  }
  Result<void> write(Iova iova, std::span<const std::byte> source) override {
    MVGPU_RETURN_IF_ERROR(Enter({accesses++, true, iova, source.size()}));
    std::ranges::copy(source, ram->at(iova.value() - GpuGuest::kRam));
    return {};
  }

  testing::GuestRam* ram = nullptr;
  int accesses = 0;
  std::function<Result<void>(const Access&)> on_access;

 private:
  Result<void> Enter(const Access& access) {
    return on_access ? on_access(access) : Result<void>();
  }
};

class RemoteVgpuTest : public RecordedVgpuTest {
 protected:
  void SetUp() override {
    RecordedVgpuTest::SetUp();
    vmm_.ram = &guest_->ram();
  }
  domain::RemoteMemory* remote() override { return &vmm_; }

  void StartGuestWithFiles(bool low, bool pictures) {
    guest_->set_files(low, pictures);
    ASSERT_NO_FATAL_FAILURE(StartGuest());
  }
  // Does `act` at access `number` of what follows; further ones are handed to `later`.
  using Later = std::function<Result<void>(const AskedVmm::Access&)>;
  void At(int number, std::function<void()> act, Later later = {}) {
    vmm_.accesses = 0;
    has_acted_ = false;
    vmm_.on_access = [=, this](const AskedVmm::Access& access) -> Result<void> {
      if (access.number == number) {
        act();
        has_acted_ = true;
      } else if (has_acted_ && later) {
        return later(access);
      }
      return {};
    };
  }
  void MapSomethingElse() {
    const Iova elsewhere(uint64_t{1} << 40);
    EXPECT_THAT(vgpu_->dma_map({elsewhere, 0x1000, domain::Access::kRead, UniqueFd(), 0}), IsOk());
    EXPECT_THAT(vgpu_->dma_unmap(elsewhere, 0x1000), IsOk());
  }
  Result<uint64_t> UnmapLow() { return vgpu_->dma_unmap(Iova(GpuGuest::kRam), GpuGuest::kLowSize); }
  void EndAndExpectItReplays() {
    vmm_.on_access = nullptr;
    ASSERT_NO_FATAL_FAILURE(EndSession());
    auto reader = TraceReader::Open(trace_path());
    ASSERT_THAT(reader, IsOk());
    auto player = Player::Create(reader->get(), {});
    ASSERT_THAT(player, IsOk());
    const auto outcome = (*player)->play({});
    ASSERT_THAT(outcome, IsOk());
    EXPECT_THAT(outcome->described, IsEmpty());
    EXPECT_TRUE(outcome->is_complete);
    EXPECT_TRUE(outcome->all_released);
    EXPECT_EQ((*player)->picture().hash(0), vgpu_->picture().hash(0));
  }
  void ExpectNoTrouble() {
    EXPECT_THAT(queue_errors_, IsEmpty());
    EXPECT_THAT(refusals_, IsEmpty());
    EXPECT_THAT(waiting_, IsEmpty());
  }

  AskedVmm vmm_;
  bool has_acted_ = false;
};

TEST_F(RemoteVgpuTest, GuestWithoutAnyFileDrawsWhatItWouldDrawWithOne) {
  StartGuestWithFiles(true, true);
  ASSERT_TRUE(guest_->draw(1, 2));
  const auto wanted = vgpu_->picture().hash(0);
  EXPECT_EQ(vmm_.accesses, 0);
  EXPECT_THAT(remote_, IsEmpty());
  vgpu_->reset();
  ASSERT_THAT(vgpu_->dma_unmap_all(), IsOk());
  StartGuestWithFiles(false, false);
  ASSERT_TRUE(guest_->draw(1, 1));
  EXPECT_NE(vgpu_->picture().hash(0), wanted);
  guest_->paint(2);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(guest_->flush(1), kOk);
  EXPECT_EQ(vgpu_->picture().hash(0), wanted);
  EXPECT_TRUE(guest_->move_cursor(1, 2));
  EXPECT_EQ(vgpu_->counters().domain.pinned_pages, 0u);
  EXPECT_EQ(vgpu_->counters().gpu.failed_commands, 0u);
  EXPECT_THAT(remote_, SizeIs(1)) << "said once";
  ExpectNoTrouble();
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, RingsAndPicturesMayDifferInHowTheyAreReached) {
  for (const bool low_has_file : {true, false}) {
    StartGuestWithFiles(low_has_file, !low_has_file);
    ASSERT_TRUE(guest_->draw(1, 2)) << low_has_file;
    EXPECT_EQ(vgpu_->counters().domain.pinned_pages, low_has_file ? 0u : 3u);
    EXPECT_GT(vmm_.accesses, 0);
    vgpu_->reset();
    ASSERT_THAT(vgpu_->dma_unmap_all(), IsOk());
  }
  ExpectNoTrouble();
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, OneBackingMayHavePagesOfBothKinds) {
  StartGuestWithFiles(true, false);
  EXPECT_EQ(guest_->create(1), kOk);
  const uint64_t shared = guest_->memory().allocate(kPageSize, kPageSize);
  EXPECT_EQ(
      guest_->attach(
          1, {{GpuGuest::kPictures, 4096}, {shared, 4096}, {GpuGuest::kPictures + 8192, 4096}}),
      kOk);
  EXPECT_EQ(vgpu_->counters().domain.pinned_pages, 1u);
  EXPECT_EQ(guest_->set_scanout(1), kOk);
  guest_->paint(3);
  guest_->memory().put_bytes(shared, guest_->memory().get_bytes(GpuGuest::kPictures + 4096, 4096));
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(guest_->flush(1), kOk);
  const auto mixed = vgpu_->picture().hash(0);
  EXPECT_EQ(guest_->detach(1), kOk);
  EXPECT_EQ(guest_->attach_picture(1), kOk);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(guest_->flush(1), kOk);
  EXPECT_EQ(vgpu_->picture().hash(0), mixed);
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, MemoryThatComesBackWithoutItsFileIsCopied) {
  StartGuestWithFiles(true, true);
  ASSERT_TRUE(guest_->draw(1, 1));
  const auto wanted = vgpu_->picture().hash(0);
  ASSERT_THAT(guest_->unmap_pictures(), IsOk());
  guest_->set_files(true, false);
  ASSERT_THAT(guest_->map_pictures(), IsOk());
  guest_->paint(7);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(guest_->flush(1), kOk);
  EXPECT_NE(vgpu_->picture().hash(0), wanted);
  guest_->paint(1);
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_EQ(guest_->flush(1), kOk);
  EXPECT_EQ(vgpu_->picture().hash(0), wanted);
  ExpectNoTrouble();
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, GuestIsInterruptedWhenItsAnswerIsInMemory) {
  StartGuestWithFiles(false, false);
  EventCounter event;
  std::vector<UniqueFd> fds(1);
  fds[0] = event.duplicate();
  vgpu_->bind_irqs(glue::kIrqMsix, 1, std::move(fds));
  int writes = 0;
  vmm_.on_access = [&](const AskedVmm::Access& access) -> Result<void> {
    if (!access.is_write) return {};
    ++writes;
    EXPECT_EQ(event.take(), 0u) << "before write " << writes;
    return {};
  };
  EXPECT_EQ(guest_->create(1), kOk);
  EXPECT_EQ(writes, 3) << "the response, the used element, the used index";
  EXPECT_EQ(event.take(), 1u);
}

TEST_F(RemoteVgpuTest, EveryAccessToMemoryWithoutAFileIsMadeWithoutTheLock) {
  StartGuestWithFiles(false, false);
  vmm_.on_access = [&](const AskedVmm::Access&) -> Result<void> {
    uint32_t status = 0;  // what a VMM asks for while it is asked itself
    vgpu_->region_read(glue::kRegionBar0 + 4, 0x14, std::as_writable_bytes(std::span(&status, 1)));
    return {};
  };
  EXPECT_TRUE(guest_->draw(1, 1));
}

TEST_F(RemoteVgpuTest, MapsAndUnmapsAtAnyPointOnlyCostAnotherTry) {
  StartGuestWithFiles(false, false);
  ASSERT_TRUE(guest_->draw(1, 1));
  int number = 0;
  do {
    At(number, [this] { MapSomethingElse(); });
    EXPECT_EQ(guest_->transfer(1), kOk) << number;
    ++number;
  } while (has_acted_);
  EXPECT_GT(number, 8);
  EXPECT_EQ(guest_->flush(1), kOk);
  ExpectNoTrouble();
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, AfterAResetNothingIsWrittenAnyMore) {
  StartGuestWithFiles(false, false);
  int number = 0;
  do {
    ASSERT_TRUE(guest_->boot());
    int writes = 0;
    At(
        number, [this] { guest_->driver().set_status(0); },
        [&writes](const AskedVmm::Access& access) -> Result<void> {
          writes += access.is_write;
          return {};
        });
    const uint32_t answer = guest_->create(1);
    EXPECT_EQ(writes, 0) << number;
    if (!has_acted_) {
      EXPECT_EQ(answer, kOk);
    }
    ++number;
  } while (has_acted_);
  EXPECT_GT(number, 6);
  vmm_.on_access = nullptr;
  ASSERT_TRUE(guest_->boot());
  EXPECT_TRUE(guest_->draw(1, 1));
  ExpectNoTrouble();
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, RingsMayGoAndComeBackAtAnyPoint) {
  StartGuestWithFiles(false, false);
  uint32_t id = 0;
  int number = 0;
  do {
    int writes = 0;
    At(
        number, [this] { EXPECT_THAT(UnmapLow(), IsOk()); },
        [&writes](const AskedVmm::Access& access) -> Result<void> {
          writes += access.is_write;
          return {};
        });
    const uint32_t answer = guest_->create(++id);
    vmm_.on_access = nullptr;
    EXPECT_EQ(writes, 0) << "into memory that is not mapped, at " << number;
    ++number;
    if (!has_acted_) {
      EXPECT_EQ(answer, kOk);
      break;
    }
    doorbells_.clear();
    ASSERT_THAT(guest_->map_low(), IsOk());
    StepAll();
    if (answer == 0) {
      EXPECT_THAT(doorbells_, ::testing::Contains(0)) << number;
      EXPECT_TRUE(guest_->control().take_used().has_value()) << number;
    }
  } while (has_acted_);
  EXPECT_GT(number, 6);
  EXPECT_EQ(vgpu_->counters().gpu.failed_commands, 0u) << "each was done once";
  EXPECT_EQ(vgpu_->counters().gpu.control_commands, id);
  EXPECT_THAT(queue_errors_, IsEmpty());
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, PicturesThatGoInTheMiddleAreAnErrorForTheGuest) {
  StartGuestWithFiles(true, false);
  ASSERT_TRUE(guest_->draw(1, 1));
  At(0, [this] { EXPECT_THAT(guest_->unmap_pictures(), IsOk()); });
  EXPECT_EQ(guest_->transfer(1), testing::wire::kErrUnspec);
  EXPECT_TRUE(has_acted_);
  ASSERT_THAT(guest_->map_pictures(), IsOk());
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_THAT(queue_errors_, IsEmpty());
  EndAndExpectItReplays();
}

TEST_F(RemoteVgpuTest, ARefusedPictureIsAnErrorForTheGuest) {
  StartGuestWithFiles(true, false);
  ASSERT_TRUE(guest_->draw(1, 1));
  vmm_.on_access = [](const AskedVmm::Access&) -> Result<void> {
    return Fail(ErrorCode::kNotReachable, "the vmm refuses");
  };
  EXPECT_EQ(guest_->transfer(1), testing::wire::kErrUnspec);
  EXPECT_THAT(refusals_, ElementsAre(HasSubstr("the vmm refuses")));
  vmm_.on_access = nullptr;
  EXPECT_EQ(guest_->transfer(1), kOk);
}

TEST_F(RemoteVgpuTest, ARefusedRingStandsStillUntilTheDriverResets) {
  StartGuestWithFiles(false, false);
  int number = 0;
  bool refused = true;
  for (; refused; ++number) {
    ASSERT_TRUE(guest_->boot());
    vmm_.accesses = 0;
    refused = false;
    queue_errors_.clear();
    vmm_.on_access = [&](const AskedVmm::Access& access) -> Result<void> {
      if (access.number < number) return {};
      refused = true;
      return Fail(ErrorCode::kNotReachable, "the vmm refuses");
    };
    guest_->create(1);
    vmm_.on_access = nullptr;
    if (!refused) break;
    EXPECT_THAT(queue_errors_, ::testing::Contains(HasSubstr("the vmm refuses"))) << number;
    EXPECT_EQ(guest_->driver().status() & 0x40, 0x40) << "needs reset";
  }
  EXPECT_GT(number, 6);
  ASSERT_TRUE(guest_->boot());
  EXPECT_TRUE(guest_->draw(1, 1));
}

TEST_F(RemoteVgpuTest, AVmmThatHasGoneEndsTheStepAndNothingIsComplainedAbout) {
  StartGuestWithFiles(false, false);
  for (int number = 0; number < 8; ++number) {
    ASSERT_TRUE(guest_->boot());
    vmm_.accesses = 0;
    vmm_.on_access = [&](const AskedVmm::Access& access) -> Result<void> {
      if (access.number < number) return {};
      return Fail(ErrorCode::kProtocol, "the vmm has gone");
    };
    guest_->create(1);
    EXPECT_EQ(vmm_.accesses, number + 2) << "each queue asks once more and gives up";
    vmm_.on_access = nullptr;
  }
  ExpectNoTrouble();
}

TEST_F(RemoteVgpuTest, ATransferBeyondTheLimitIsAnErrorThatCostsNothing) {
  StartGuestWithFiles(true, false);
  constexpr uint32_t kPart = 4u << 20;
  constexpr uint32_t kParts = StepMemory::kMaxStepBytes / kPart + 1;
  EXPECT_EQ(guest_->run(testing::wire::RequestBytes(testing::wire::kCmdCreate2d)
                            .u32({1, testing::wire::kFormatB8G8R8X8, 4096, 256 * kParts})),
            kOk);
  // The same memory again and again.
  EXPECT_EQ(guest_->attach(
                1, std::vector<testing::wire::WireEntry>(kParts, {GpuGuest::kPictures, kPart})),
            kOk);
  EXPECT_EQ(guest_->run(testing::wire::RequestBytes(testing::wire::kCmdTransfer)
                            .add(testing::wire::WireRect{0, 0, 4096, 256 * kParts})
                            .add(uint64_t{0})
                            .u32({1, 0})),
            testing::wire::kErrOutOfMemory);
  EXPECT_THAT(refusals_, ElementsAre(HasSubstr("more than 68 MiB of memory without a file")));
  EXPECT_EQ(vmm_.accesses, 0);
}

TEST_F(RemoteVgpuTest, ARecordingHasEachReadOfAStepOnce) {
  StartGuestWithFiles(false, false);
  ASSERT_TRUE(guest_->draw(1, 1));
  At(3, [this] { MapSomethingElse(); });  // which costs another try
  EXPECT_EQ(guest_->transfer(1), kOk);
  EXPECT_TRUE(has_acted_);
  EndAndExpectItReplays();
  std::multiset<std::pair<uint64_t, size_t>> reads;
  size_t requests = 0;
  size_t steps = 0;
  for (const RawRecord& record : Records()) {
    if (record.type == testing::kRawMemory) {
      const std::pair read(record.number(0), record.payload.size());
      EXPECT_EQ(reads.count(read), 0u) << "iova " << read.first << " in step " << steps;
      reads.insert(read);
    }
    requests += record.type == testing::kRawRequest;
    if (record.type != testing::kRawStep) continue;
    reads.clear();
    ++steps;
  }
  EXPECT_EQ(requests, 6u) << "create, attach, scanout, transfer, flush, transfer";
}

}  // namespace
}  // namespace mvgpu::backend
