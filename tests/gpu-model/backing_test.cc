#include <gtest/gtest.h>

#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using namespace testing;  // NOLINT: the fixture of this folder

// What happens to guest pages: pins, device mappings, and the VMM that takes memory away.
class BackingTest : public GpuTest {};

TEST_F(BackingTest, AttachPinsAndMapsExactlyThePagesOfTheList) {
  ASSERT_EQ(Create(1, 64, 64), kOk);
  // Parts of pages 1-2, page 5, and the end of page 9.
  ASSERT_EQ(Attach(1, {{kRam + 0x1800, 0x1000}, {kRam + 0x5000, 0x1000}, {kRam + 0x9ff0, 0x10}}),
            kOk);
  EXPECT_EQ(PinnedPages(), 4u);
  EXPECT_EQ(domain_->counters().unique_pages, 4u);
  EXPECT_EQ(mapper_.mapped_pages(), 4u);
  for (const uint64_t page : {1u, 2u, 5u, 9u}) {
    EXPECT_EQ(mapper_.maps_of_page[(kRam >> 12) + page], 1u) << page;
  }
  EXPECT_EQ(device_->counters().attached_entries, 3u);
}

TEST_F(BackingTest, DetachUnrefAndResetReleaseEverything) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 64, 64, 0));
  ASSERT_NO_FATAL_FAILURE(MakeBacked(2, 64, 64, 0x10000));
  ASSERT_NO_FATAL_FAILURE(MakeBacked(3, 64, 64, 0x20000));
  EXPECT_EQ(PinnedPages(), 12u);
  EXPECT_EQ(Detach(1), kOk);
  EXPECT_EQ(PinnedPages(), 8u);
  EXPECT_EQ(Unref(2), kOk);
  EXPECT_EQ(PinnedPages(), 4u);
  device_->reset();
  ExpectNothingHeld();
  EXPECT_EQ(Create(1, 64, 64), kOk);  // and the device goes on
}

TEST_F(BackingTest, ADestroyedDeviceReleasesEverythingToo) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 64, 64, 0));
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  device_.reset();
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
  auto device = GpuDevice::Create(config_, &*cache_, domain_.get(), &display_, &owner_);
  ASSERT_THAT(device, mvgpu::testing::IsOk());
  device_ = std::move(*device);
}

TEST_F(BackingTest, AdjacentEntriesBecomeOneMapping) {
  ASSERT_EQ(Create(1, 64, 64), kOk);
  std::vector<WireEntry> entries;
  for (uint64_t i = 0; i < 16; ++i) entries.push_back({kRam + i * 0x400, 0x400});
  ASSERT_EQ(Attach(1, entries), kOk);
  EXPECT_EQ(device_->counters().attached_entries, 16u);
  EXPECT_EQ(cache_->counters().map_calls, 1u);
  EXPECT_EQ(PinnedPages(), 4u);
}

TEST_F(BackingTest, EntriesMayOverlap) {
  ASSERT_EQ(Create(1, 32, 32), kOk);  // one page of pixels
  ASSERT_EQ(Attach(1, {{kRam, 0x800}, {kRam + 0x400, 0x800}}), kOk);
  EXPECT_EQ(domain_->counters().unique_pages, 1u);
  ASSERT_EQ(Transfer(1, {0, 0, 32, 32}), kOk);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 32, 32}), kOk);
  std::vector<std::byte> expected = RamBytes(0, 0x800);
  const std::vector<std::byte> second = RamBytes(0x400, 0x800);
  expected.insert(expected.end(), second.begin(), second.end());
  EXPECT_EQ(LastPixels(), expected);
}

TEST_F(BackingTest, TransferAsksTheCacheAgainAndHits) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 1024, 16));  // 16 pages, one per line
  const auto before = cache_->counters();
  ASSERT_EQ(Transfer(1, {0, 0, 1024, 16}), kOk);
  EXPECT_EQ(cache_->counters().hit_pages - before.hit_pages, 16u);
  EXPECT_EQ(cache_->counters().map_calls - before.map_calls, 1u);
  ASSERT_EQ(Transfer(1, {8, 4, 8, 3}, 4 * 4096 + 32), kOk);
  EXPECT_EQ(cache_->counters().hit_pages - before.hit_pages, 19u);
  EXPECT_EQ(cache_->counters().miss_pages, before.miss_pages);
  EXPECT_EQ(mapper_.map_calls, 1u);
}

TEST_F(BackingTest, TwoResourcesShareTheMappingOfTheirPages) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 64, 64, 0));
  ASSERT_NO_FATAL_FAILURE(MakeBacked(2, 64, 64, 0x2000));
  EXPECT_EQ(mapper_.mapped_pages(), 6u);
  for (const auto& [page, times] : mapper_.maps_of_page) EXPECT_EQ(times, 1u) << page;
  EXPECT_EQ(cache_->counters().hit_pages, 2u);
  ASSERT_EQ(Unref(1), kOk);
  EXPECT_EQ(mapper_.mapped_pages(), 4u);
  EXPECT_EQ(Transfer(2, {0, 0, 64, 64}), kOk);
}

TEST_F(BackingTest, MapperFailureLeavesNothingAttached) {
  ASSERT_EQ(Create(1, 64, 64), kOk);
  mapper_.fail_at_call = 2;
  EXPECT_EQ(Attach(1, {{kRam, 0x1000}, {kRam + 0x4000, 0x1000}}), kErrOutOfMemory);
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
  EXPECT_EQ(Attach(1, {{kRam, 0x1000}, {kRam + 0x4000, 0x1000}}), kOk);
}

TEST_F(BackingTest, UnmapTakesThePinsAndTheNextTransferRenewsThem) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 64, 64, 0x3000));
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
  UnmapAll();
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(mapper_.mapped_pages(), 0u);
  EXPECT_EQ(device_->counters().attached_entries, 1u);  // the list stays

  MapRamAt(kRam, 0x100000, kRamSize / 2);  // other memory at the same addresses
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  EXPECT_EQ(PinnedPages(), 4u);
  EXPECT_EQ(mapper_.mapped_pages(), 4u);
  ASSERT_EQ(Flush(1, {0, 0, 64, 64}), kOk);
  EXPECT_EQ(LastPixels(), RamBytes(0x103000, 64 * 64 * 4));
  EXPECT_EQ(Detach(1), kOk);
  EXPECT_EQ(PinnedPages(), 0u);
}

TEST_F(BackingTest, WhileMemoryIsAwayTransfersFailAndTheResourceSurvives) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 64, 64, 0x3000));
  ASSERT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  UnmapAll();
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}), kErrUnspec);
  EXPECT_EQ(PinnedPages(), 0u);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);  // host pixels are as they were
  EXPECT_EQ(LastPixels(), RamBytes(0x3000, 64 * 64 * 4));
  MapRam(0, kRamSize);
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
}

TEST_F(BackingTest, TransferNeedsOnlyThePagesOfItsRectangle) {
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 1024, 16));  // 16 pages, one per line
  UnmapAll();
  MapRam(0, 8 * 4096);
  EXPECT_EQ(Transfer(1, {0, 0, 1024, 8}), kOk);
  EXPECT_EQ(Transfer(1, {0, 4, 10, 4}, 4 * 4096), kOk);
  EXPECT_EQ(Transfer(1, {0, 0, 1024, 9}), kErrUnspec);
  EXPECT_EQ(Transfer(1, {0, 4, 10, 5}, 4 * 4096), kErrUnspec);
  EXPECT_EQ(PinnedPages(), 0u);  // the hold of the whole list cannot be renewed yet
  MapRam(8 * 4096, kRamSize - 8 * 4096);
  EXPECT_EQ(Transfer(1, {0, 0, 1, 1}), kOk);
  EXPECT_EQ(PinnedPages(), 16u);
}

TEST_F(BackingTest, PartsThatStayMappedKeepTheirHold) {
  UnmapAll();
  MapRam(0, 0x2000);
  MapRam(0x2000, 0x2000);
  ASSERT_NO_FATAL_FAILURE(MakeBacked(1, 64, 64, 0));
  ASSERT_THAT(container_.unmap(Iova(kRam + 0x2000), 0x2000), mvgpu::testing::IsOk());
  EXPECT_EQ(PinnedPages(), 2u);
  MapRam(0x2000, 0x2000);
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
  EXPECT_EQ(PinnedPages(), 4u);
  for (const uint64_t page : {0u, 1u}) EXPECT_EQ(mapper_.maps_of_page[(kRam >> 12) + page], 1u);
  for (const uint64_t page : {2u, 3u}) EXPECT_EQ(mapper_.maps_of_page[(kRam >> 12) + page], 2u);
}

TEST_F(BackingTest, LongScatteredListsAreHandled) {
  // 1024 entries of half a page, backwards, so that no two of them can be joined.
  ASSERT_EQ(Create(1, 1024, 512), kOk);
  std::vector<WireEntry> entries;
  std::vector<std::byte> expected;
  for (uint64_t i = 0; i < 1024; ++i) {
    const uint64_t offset = (1023 - i) * 0x1000 + 0x300;
    entries.push_back({kRam + offset, 0x800});
    const auto bytes = RamBytes(offset, 0x800);
    expected.insert(expected.end(), bytes.begin(), bytes.end());
  }
  ASSERT_EQ(Attach(1, entries), kOk);
  EXPECT_EQ(PinnedPages(), 1024u);
  ASSERT_EQ(Transfer(1, {0, 0, 1024, 512}), kOk);
  ASSERT_EQ(SetScanout(0, 1, {0, 0, 1024, 512}), kOk);
  EXPECT_EQ(LastPixels(), expected);
  // The last line only: its two entries, not the 1024.
  const auto before = cache_->counters();
  ASSERT_EQ(Transfer(1, {0, 511, 1024, 1}, 511 * 4096), kOk);
  EXPECT_EQ(cache_->counters().map_calls - before.map_calls, 2u);
}

// Guest memory that nobody can hold.
class RemoteBackingTest : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    for (size_t i = 0; i < remote_.bytes().size(); ++i) {
      remote_.bytes()[i] = static_cast<std::byte>(i * 37 + (i >> 12));
    }
    MapRemote();
    ASSERT_EQ(Create(1, 64, 64), kOk);  // four pages
  }
  void MapRemote() {
    ASSERT_THAT(
        container_.map({Iova(kRemote), kRemoteSize, domain::Access::kReadWrite, UniqueFd(), 0}),
        mvgpu::testing::IsOk());
  }
  void ExpectShows(std::vector<std::byte> expected) {
    ASSERT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
    ASSERT_EQ(SetScanout(0, 1, {0, 0, 64, 64}), kOk);
    ASSERT_EQ(Flush(1, {0, 0, 64, 64}), kOk);
    EXPECT_EQ(LastPixels(), expected);
  }
  std::vector<std::byte> RemoteBytes(uint64_t offset, uint64_t size) {
    const auto bytes = remote_.bytes().subspan(offset, size);
    return {bytes.begin(), bytes.end()};
  }
};

TEST_F(RemoteBackingTest, IsAttachedWithoutAPinAndCopiedAtEachTransfer) {
  ASSERT_EQ(Attach(1, {{kRemote + 0x100, 0x4000}}), kOk);
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(remote_.calls(), 0) << "an attach reads nothing";
  ExpectShows(RemoteBytes(0x100, 0x4000));
  EXPECT_EQ(device_->counters().transferred_bytes, 0x4000u);
  remote_.bytes()[0x100] ^= std::byte{0xff};
  ExpectShows(RemoteBytes(0x100, 0x4000));
}

TEST_F(RemoteBackingTest, PagesThatCanBeHeldAreHeldBesideIt) {
  ASSERT_EQ(Attach(1, {{kRam, 0x1000}, {kRemote, 0x1800}, {kRam + 0x8000, 0x1800}}), kOk);
  EXPECT_EQ(PinnedPages(), 3u);
  std::vector<std::byte> expected = RamBytes(0, 0x1000);
  for (const auto& part : {RemoteBytes(0, 0x1800), RamBytes(0x8000, 0x1800)}) {
    expected.insert(expected.end(), part.begin(), part.end());
  }
  ExpectShows(expected);
  EXPECT_EQ(Detach(1), kOk);
  EXPECT_EQ(PinnedPages(), 0u);
}

TEST_F(RemoteBackingTest, AListThatEndsInAHoleIsRefusedAsAWhole) {
  EXPECT_EQ(Attach(1, {{kRam, 0x1000}, {kRemote + kRemoteSize - 0x1000, 0x3000}}), kErrUnspec);
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(device_->counters().attached_entries, 0u);
}

TEST_F(RemoteBackingTest, WhatTheVmmTakesAwayIsAnErrorUntilItIsBack) {
  ASSERT_EQ(Attach(1, {{kRemote, 0x4000}}), kOk);
  ASSERT_THAT(container_.unmap(Iova(kRemote), kRemoteSize), mvgpu::testing::IsOk());
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}), kErrUnspec);
  MapRemote();
  ExpectShows(RemoteBytes(0, 0x4000));
}

TEST_F(RemoteBackingTest, BytesThatAreOnTheirWayLeaveNoTraceOfTheCommand) {
  ASSERT_EQ(Attach(1, {{kRam, 0x2000}, {kRemote, 0x1000}, {kRam + 0x8000, 0x1000}}), kOk);
  const auto before = device_->counters();
  const uint64_t maps = cache_->counters().map_calls;
  const int calls = remote_.calls();
  remote_.pending_for(1);
  std::vector<std::byte> response(24, std::byte{0xee});
  const auto transfer =
      RequestBytes(kCmdTransfer).add(WireRect{0, 0, 64, 64}).add(uint64_t{0}).u32({1, 0});
  EXPECT_THAT(device_->execute_control(transfer.bytes(), response),
              mvgpu::testing::FailsWith(ErrorCode::kPending));
  EXPECT_EQ(response, std::vector(24, std::byte{0xee}));
  EXPECT_EQ(device_->counters().control_commands, before.control_commands);
  EXPECT_EQ(device_->counters().failed_commands, before.failed_commands);
  EXPECT_EQ(device_->counters().transferred_bytes, before.transferred_bytes);
  EXPECT_EQ(cache_->counters().map_calls, maps) << "the others are not mapped for nothing";
  EXPECT_EQ(remote_.calls(), calls + 1);
  EXPECT_EQ(Transfer(1, {0, 0, 64, 64}), kOk);
}

TEST_F(RemoteBackingTest, AllThatIsMissingIsAskedForAtOnce) {
  ASSERT_EQ(Attach(1, {{kRemote, 0x1000}, {kRemote + 0x2000, 0x1000}, {kRemote + 0x4000, 0x1000}}),
            kOk);
  remote_.pending_for(3);
  std::vector<std::byte> response(24);
  const auto transfer =
      RequestBytes(kCmdTransfer).add(WireRect{0, 0, 64, 48}).add(uint64_t{0}).u32({1, 0});
  EXPECT_THAT(device_->execute_control(transfer.bytes(), response),
              mvgpu::testing::FailsWith(ErrorCode::kPending));
  EXPECT_EQ(remote_.calls(), 3);
}

}  // namespace
}  // namespace mvgpu::gpu
