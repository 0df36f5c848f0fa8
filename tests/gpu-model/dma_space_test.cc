// Backings in an address space that is translated: what is asked for, what is held, what goes.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "tests/gpu-model/gpu_fixture.h"

namespace mvgpu::gpu {
namespace {

using namespace testing;  // NOLINT: the fixture of this folder

// Pages of the device that lie where a test says.
class FakeDmaSpace final : public domain::DmaSpace {
 public:
  void set_user(User* user) override { user_ = user; }
  Result<std::vector<domain::DmaRun>> translate(IovaRange range, domain::Access access) override {
    EXPECT_EQ(access, domain::Access::kRead);
    std::vector<domain::DmaRun> runs;
    for (Iova at = range.start();;) {
      const Iova last(std::min(at.value() | kPageMask, range.last().value()));
      asked.push_back(at.page());
      const auto found = pages.find(at.page());
      if (found == pages.end()) {
        if (pending.contains(at.page())) return Fail(ErrorCode::kPending, "a page is on its way");
        return Fail(ErrorCode::kNotMapped, "no such page");
      }
      const Iova to(found->second | (at.value() & kPageMask));
      if (!runs.empty() && runs.back().to + runs.back().from.size() == to) {
        runs.back().from = IovaRange::FromFirstAndLast(runs.back().from.start(), last);
      } else {
        runs.push_back({IovaRange::FromFirstAndLast(at, last), to});
      }
      if (last == range.last()) return runs;
      at = last + 1;
    }
  }
  void invalidate(uint64_t address, uint64_t size) {
    user_->on_invalidated(mvgpu::testing::MakeRange(address, size));
  }
  std::vector<uint64_t> take_asked() { return std::exchange(asked, {}); }
  bool has_user() const { return user_ != nullptr; }

  std::map<uint64_t, uint64_t> pages;  // number of the device's page -> address of guest memory
  std::set<uint64_t> pending;          // of those that are not there
  std::vector<uint64_t> asked;

 private:
  User* user_ = nullptr;
};

// A picture of 8 pages, at kGva for the device, at every other page of RAM.
class DmaSpaceTest : public GpuTest {
 protected:
  static constexpr uint64_t kGva = 0x7f12'3456'7000;
  static constexpr uint64_t kFirst = kGva / kPageSize;
  static constexpr uint32_t kPages = 8;
  static constexpr WireRect kWhole{0, 0, 512, 2 * kPages};  // two lines a page

  explicit DmaSpaceTest(GpuConfig config = {}) : GpuTest(config) {}
  void SetUp() override {
    GpuTest::SetUp();
    auto device = GpuDevice::Create(config_, &*cache_, domain_.get(), &display_, &owner_, &space_);
    ASSERT_THAT(device, mvgpu::testing::IsOk());
    device_ = std::move(*device);
    for (uint64_t i = 0; i < kPages; ++i) space_.pages[kFirst + i] = PageAt(2 * i);
    ASSERT_EQ(Create(1, 512, 2 * kPages), kOk);
  }
  static constexpr uint64_t PageAt(uint64_t ram_page) { return kRam + ram_page * kPageSize; }
  uint32_t AttachWhole() { return Attach(1, {{kGva, kPages * kPageSize}}); }
  // What the picture shows after a transfer of all of it.
  std::vector<std::byte> Picture() {
    EXPECT_EQ(Transfer(1, kWhole), kOk);
    EXPECT_EQ(SetScanout(0, 1, kWhole), kOk);
    EXPECT_EQ(Flush(1, kWhole), kOk);
    return LastPixels();
  }
  std::vector<std::byte> PagesOfRam(const std::vector<uint64_t>& pages) {
    std::vector<std::byte> bytes;
    for (const uint64_t page : pages) {
      const auto more = RamBytes(page * kPageSize, kPageSize);
      bytes.insert(bytes.end(), more.begin(), more.end());
    }
    return bytes;
  }
  std::set<uint64_t> HeldRamPages() {
    std::set<uint64_t> held;
    for (const uint64_t page : mapper_.mapped_iova_pages()) held.insert(page - kRam / kPageSize);
    return held;
  }
  // As Execute(), where the request may have to come again.
  Result<uint32_t> Try(const RequestBytes& request) {
    std::vector<std::byte> response(24);
    return device_->execute_control(request.bytes(), response);
  }

  FakeDmaSpace space_;
};

TEST_F(DmaSpaceTest, PagesAreThoseThatTheSpaceSays) {
  ASSERT_EQ(AttachWhole(), kOk);
  EXPECT_EQ(PinnedPages(), kPages);
  EXPECT_EQ(HeldRamPages(), (std::set<uint64_t>{0, 2, 4, 6, 8, 10, 12, 14}));
  EXPECT_EQ(Picture(), PagesOfRam({0, 2, 4, 6, 8, 10, 12, 14}));
  EXPECT_EQ(device_->counters().translated_pages, kPages);
  ASSERT_EQ(Detach(1), kOk);
  EXPECT_EQ(device_->counters().translated_pages, 0u);
}

TEST_F(DmaSpaceTest, ATranslationIsAskedForOnce) {
  ASSERT_EQ(AttachWhole(), kOk);
  EXPECT_EQ(space_.take_asked().size(), kPages);
  const auto before = cache_->counters();
  Picture();
  Picture();
  EXPECT_TRUE(space_.take_asked().empty());
  EXPECT_EQ(cache_->counters().miss_pages, before.miss_pages);
}

TEST_F(DmaSpaceTest, PagesInARowAreOneMapping) {
  for (uint64_t i = 0; i < kPages; ++i) space_.pages[kFirst + i] = PageAt(i);
  const auto before = cache_->counters();
  ASSERT_EQ(AttachWhole(), kOk);
  EXPECT_EQ(cache_->counters().map_calls - before.map_calls, 1u);
}

TEST_F(DmaSpaceTest, EntriesMayBeginAndEndInPages) {
  ASSERT_EQ(Create(2, 128, 16), kOk);  // 8 KiB
  ASSERT_EQ(Attach(2, {{kGva + 0x800, 0x1000}, {kGva + 5 * kPageSize + 0x400, 0x1000}}), kOk);
  EXPECT_EQ(HeldRamPages(), (std::set<uint64_t>{0, 2, 10, 12}));
  EXPECT_EQ(device_->counters().translated_pages, 4u);
  ASSERT_EQ(Transfer(2, {0, 0, 128, 16}), kOk);
  ASSERT_EQ(SetScanout(0, 2, {0, 0, 128, 16}), kOk);
  ASSERT_EQ(Flush(2, {0, 0, 128, 16}), kOk);
  std::vector<std::byte> expected = RamBytes(0x800, 0x800);
  for (const auto& [offset, size] : std::vector<std::pair<uint64_t, uint64_t>>{
           {2 * kPageSize, 0x800}, {10 * kPageSize + 0x400, 0xc00}, {12 * kPageSize, 0x400}}) {
    const auto more = RamBytes(offset, size);
    expected.insert(expected.end(), more.begin(), more.end());
  }
  EXPECT_EQ(LastPixels(), expected);
}

TEST_F(DmaSpaceTest, AFaultAtAnyPageOfAnAttachLeavesNothing) {
  for (uint64_t n = 0; n < kPages; ++n) {
    const uint64_t page = space_.pages.extract(kFirst + n).mapped();
    EXPECT_EQ(AttachWhole(), kErrUnspec) << n;
    EXPECT_EQ(PinnedPages(), 0u) << n;
    EXPECT_EQ(device_->counters().translated_pages, 0u) << n;
    space_.pages[kFirst + n] = page;
  }
  EXPECT_EQ(AttachWhole(), kOk);
}

TEST_F(DmaSpaceTest, ATranslationToNoMemoryLeavesNothing) {
  space_.pages[kFirst + 5] = kRam + kRamSize;
  EXPECT_EQ(AttachWhole(), kErrUnspec);
  EXPECT_EQ(PinnedPages(), 0u);
  space_.pages[kFirst + 5] = PageAt(10);
  EXPECT_EQ(AttachWhole(), kOk);
}

TEST_F(DmaSpaceTest, AnInvalidationGivesUpWhatItNamesAtOnce) {
  ASSERT_EQ(AttachWhole(), kOk);
  space_.invalidate(kGva + 3 * kPageSize, kPageSize);
  EXPECT_EQ(HeldRamPages(), (std::set<uint64_t>{0, 2, 4, 8, 10, 12, 14}));
  space_.invalidate(kGva - kPageSize, kPageSize);
  space_.invalidate(kGva + kPages * kPageSize, kPageSize);
  EXPECT_EQ(PinnedPages(), kPages - 1) << "others";
  space_.invalidate(kGva + 6 * kPageSize, 16 * kPageSize);
  EXPECT_EQ(HeldRamPages(), (std::set<uint64_t>{0, 2, 4, 8, 10}));
  EXPECT_EQ(device_->counters().translated_pages, kPages) << "the list stays";
}

TEST_F(DmaSpaceTest, TheNextUseTranslatesAgain) {
  ASSERT_EQ(AttachWhole(), kOk);
  Picture();
  space_.take_asked();
  space_.pages[kFirst + 3] = PageAt(100);
  EXPECT_EQ(Picture(), PagesOfRam({0, 2, 4, 6, 8, 10, 12, 14})) << "nobody said so yet";
  space_.invalidate(kGva + 3 * kPageSize, kPageSize);
  EXPECT_EQ(Picture(), PagesOfRam({0, 2, 4, 100, 8, 10, 12, 14}));
  EXPECT_EQ(space_.take_asked(), std::vector<uint64_t>{kFirst + 3});
  EXPECT_EQ(HeldRamPages(), (std::set<uint64_t>{0, 2, 4, 8, 10, 12, 14, 100}));
}

TEST_F(DmaSpaceTest, ATransferTranslatesOnlyWhatItNeeds) {
  ASSERT_EQ(AttachWhole(), kOk);
  space_.invalidate(kGva, kPages * kPageSize);
  EXPECT_EQ(PinnedPages(), 0u);
  space_.take_asked();
  space_.pages.erase(kFirst + 4);
  ASSERT_EQ(Transfer(1, {8, 4, 16, 3}, 2 * kPageSize + 32), kOk);
  EXPECT_EQ(space_.take_asked(), (std::vector<uint64_t>{kFirst + 2, kFirst + 3}));
  EXPECT_EQ(HeldRamPages(), (std::set<uint64_t>{4, 6}));
  EXPECT_EQ(Transfer(1, {8, 6, 16, 3}, 3 * kPageSize + 32), kErrUnspec) << "line 8 has no page";
  EXPECT_EQ(HeldRamPages(), (std::set<uint64_t>{4, 6}));
  space_.pages[kFirst + 4] = PageAt(50);
  EXPECT_EQ(Picture(), PagesOfRam({0, 2, 4, 6, 50, 10, 12, 14}));
}

TEST_F(DmaSpaceTest, ManyInvalidationsDoNotCutABackingToPieces) {
  for (uint64_t i = 0; i < kPages; ++i) space_.pages[kFirst + i] = PageAt(i);
  ASSERT_EQ(AttachWhole(), kOk);
  for (uint64_t i = 0; i < kPages; ++i) {
    space_.invalidate(kGva, kPages * kPageSize);
    ASSERT_EQ(Transfer(1, {0, static_cast<uint32_t>(2 * i), 512, 2}, i * kPageSize), kOk);
  }
  space_.invalidate(kGva, kPages * kPageSize);
  const auto before = cache_->counters();
  EXPECT_EQ(Picture(), RamBytes(0, kPages * kPageSize));
  EXPECT_LE(cache_->counters().map_calls - before.map_calls, 2u) << "a hold and a use";
}

TEST_F(DmaSpaceTest, UnboundIsGivenUpAndBoundAgainIsOtherMemory) {
  ASSERT_EQ(AttachWhole(), kOk);
  Picture();
  const auto pages = std::exchange(space_.pages, {});
  space_.invalidate(0, uint64_t{1} << 63);
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(Transfer(1, kWhole), kErrUnspec);
  EXPECT_EQ(PinnedPages(), 0u);
  for (const auto& [page, target] : pages) space_.pages[page] = target + 200 * kPageSize;
  EXPECT_EQ(Picture(), PagesOfRam({200, 202, 204, 206, 208, 210, 212, 214}));
}

TEST_F(DmaSpaceTest, OnePageAtTwoAddressesIsHeldUntilBothAreGone) {
  space_.pages[kFirst + 1] = PageAt(0);
  ASSERT_EQ(AttachWhole(), kOk);
  space_.invalidate(kGva, kPageSize);
  EXPECT_TRUE(HeldRamPages().contains(0));
  space_.invalidate(kGva + kPageSize, kPageSize);
  EXPECT_FALSE(HeldRamPages().contains(0));
}

TEST_F(DmaSpaceTest, MemoryThatTheVmmTakesIsFoundAgainWithoutTranslation) {
  ASSERT_EQ(AttachWhole(), kOk);
  ASSERT_NO_FATAL_FAILURE(UnmapAll());
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(Transfer(1, kWhole), kErrUnspec);
  ASSERT_NO_FATAL_FAILURE(MapRam(0, kRamSize));
  space_.take_asked();
  EXPECT_EQ(Picture(), PagesOfRam({0, 2, 4, 6, 8, 10, 12, 14}));
  EXPECT_TRUE(space_.take_asked().empty());
}

TEST_F(DmaSpaceTest, MemoryWithoutAFileIsCopiedUntilItsTranslationGoes) {
  ASSERT_THAT(
      container_.map({Iova(kRemote), kRemoteSize, domain::Access::kReadWrite, UniqueFd(), 0}),
      mvgpu::testing::IsOk());
  space_.pages[kFirst + 2] = kRemote + kPageSize;
  ASSERT_EQ(AttachWhole(), kOk);
  EXPECT_EQ(PinnedPages(), kPages - 1);
  auto expected = PagesOfRam({0, 2, 4, 6, 8, 10, 12, 14});
  std::ranges::fill(remote_.bytes().subspan(kPageSize, kPageSize), std::byte{0x5a});
  std::fill_n(expected.begin() + 2 * kPageSize, kPageSize, std::byte{0x5a});
  EXPECT_EQ(Picture(), expected);
  space_.pages[kFirst + 2] = PageAt(4);
  space_.invalidate(kGva + 2 * kPageSize, kPageSize);
  EXPECT_EQ(Picture(), PagesOfRam({0, 2, 4, 6, 8, 10, 12, 14}));
  EXPECT_EQ(PinnedPages(), kPages);
}

TEST_F(DmaSpaceTest, ARequestThatWaitsForPagesIsUndoneAndComesAgain) {
  space_.pages.erase(kFirst + 6);
  space_.pending.insert(kFirst + 6);
  const RequestBytes attach = AttachRequest(1, {{kGva, kPages * kPageSize}});
  const auto before = device_->counters();
  EXPECT_THAT(Try(attach), mvgpu::testing::FailsWith(ErrorCode::kPending));
  EXPECT_EQ(PinnedPages(), 0u);
  EXPECT_EQ(device_->counters().control_commands, before.control_commands);
  space_.pages[kFirst + 6] = PageAt(12);
  EXPECT_EQ(Execute(attach), kOk);
  space_.invalidate(kGva + 6 * kPageSize, kPageSize);
  space_.pages.erase(kFirst + 6);
  EXPECT_THAT(Try(RequestBytes(kCmdTransfer).add(kWhole).add(uint64_t{0}).u32({1, 0})),
              mvgpu::testing::FailsWith(ErrorCode::kPending));
  EXPECT_EQ(PinnedPages(), kPages - 1);
  space_.pages[kFirst + 6] = PageAt(60);
  EXPECT_EQ(Picture(), PagesOfRam({0, 2, 4, 6, 8, 10, 60, 14}));
}

TEST_F(DmaSpaceTest, ADeviceThatGoesLeavesTheSpace) {
  ASSERT_EQ(AttachWhole(), kOk);
  EXPECT_TRUE(space_.has_user());
  device_.reset();
  EXPECT_FALSE(space_.has_user());
  EXPECT_EQ(PinnedPages(), 0u);
  auto device = GpuDevice::Create(config_, &*cache_, domain_.get(), &display_, &owner_, &space_);
  ASSERT_THAT(device, mvgpu::testing::IsOk());
  device_ = std::move(*device);
}

class SmallDmaSpaceTest : public DmaSpaceTest {
 protected:
  SmallDmaSpaceTest() : DmaSpaceTest({.max_translated_pages = 10}) {}
};

TEST_F(SmallDmaSpaceTest, AGuestCannotMakeTheDeviceTranslateWithoutEnd) {
  ASSERT_EQ(Create(2, 64, 64), kOk);
  EXPECT_EQ(Attach(2, {{kGva, 0xffff'f000}}), kErrOutOfMemory);
  EXPECT_TRUE(space_.take_asked().empty()) << "it is refused before any walk";
  ASSERT_EQ(AttachWhole(), kOk);
  EXPECT_EQ(Attach(2, {{kGva, 3 * kPageSize}}), kErrOutOfMemory);
  EXPECT_EQ(Attach(2, {{kGva, 2 * kPageSize}}), kOk);
  EXPECT_EQ(device_->counters().translated_pages, 10u);
  ASSERT_EQ(Unref(1), kOk);
  EXPECT_EQ(device_->counters().translated_pages, 2u);
  ASSERT_EQ(Detach(2), kOk);
  EXPECT_EQ(Attach(2, {{kGva, kPages * kPageSize}}), kOk);
}

}  // namespace
}  // namespace mvgpu::gpu
