#include "apionly-domain/api_only_domain.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <thread>
#include <vector>

#include "tests/apionly-domain/domain_fixture.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

using ApiOnlyDomainTest = DomainTest;

TEST_F(ApiOnlyDomainTest, MappingPinsNothing) {
  Map(0, 0, 64 * kPageSize);
  EXPECT_EQ(domain_->counters().mapped_pages, 64u);
  EXPECT_EQ(domain_->counters().unique_pages, 0u);
  EXPECT_EQ(pins_->calls, 0u);
}

TEST_F(ApiOnlyDomainTest, APinReturnsRunsAndReleasesWhenItDies) {
  Map(0x10000, 0x3000, 0x8000);
  {
    auto pin = Pin(0x11800, 0x1000);  // touches two pages
    ASSERT_THAT(pin, IsOk());
    ASSERT_EQ(pin->runs().size(), 1u);
    EXPECT_EQ(pin->runs()[0].iova, MakeRange(0x11000, 0x2000));
    EXPECT_EQ(FilePageOf(pin->runs()[0]), 4u);
    EXPECT_EQ(domain_->counters().unique_pages, 2u);
    EXPECT_EQ(pins_->pages.size(), 2u);
  }
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
  EXPECT_TRUE(pins_->pages.empty());
}

TEST_F(ApiOnlyDomainTest, AdjacentMappingsOfAdjacentPagesAreOneRun) {
  Map(0x10000, 0x0000, 0x2000);
  Map(0x12000, 0x2000, 0x2000);  // continues in the file
  Map(0x14000, 0x8000, 0x2000);  // jumps in the file
  auto pin = Pin(0x10000, 0x6000);
  ASSERT_THAT(pin, IsOk());
  ASSERT_EQ(pin->runs().size(), 2u);
  EXPECT_EQ(pin->runs()[0].iova, MakeRange(0x10000, 0x4000));
  EXPECT_EQ(FilePageOf(pin->runs()[1]), 8u);
}

TEST_F(ApiOnlyDomainTest, APageAtTwoIovasIsPinnedOnce) {
  Map(0x10000, 0x0000, 0x2000);
  Map(0x80000, 0x1000, 0x2000);  // shares file page 1
  auto a = Pin(0x10000, 0x2000);
  auto b = Pin(0x80000, 0x2000);
  ASSERT_THAT(a, IsOk());
  ASSERT_THAT(b, IsOk());
  EXPECT_EQ(domain_->counters().pinned_pages, 4u);
  EXPECT_EQ(domain_->counters().unique_pages, 3u);
  for (const auto& [page, count] : pins_->pages) EXPECT_EQ(count, 1);
  a->reset();
  EXPECT_EQ(domain_->counters().unique_pages, 2u);
  b->reset();
  EXPECT_EQ(domain_->counters().unique_pages, 0u);
}

// The kernel likes to place a file right below the one that was mapped before.
TEST_F(ApiOnlyDomainTest, ARunIsOfOneFileAlsoWhereTheHostAddressesOfTwoContinue) {
  std::vector<std::unique_ptr<GuestRam>> files;
  for (int i = 0; i < 8; ++i) files.push_back(std::make_unique<GuestRam>(BytesIn(4)));
  for (uint64_t i = 0; i < 8; ++i) {
    const uint64_t iova = BytesIn(4 * (7 - i));
    ASSERT_THAT(container_.map(files[i]->map_request(iova, 0, BytesIn(4))), IsOk());
  }
  auto pin = Pin(0, BytesIn(32));
  ASSERT_THAT(pin, IsOk());
  for (const PinnedRun& run : pin->runs()) {
    EXPECT_EQ(domain_->backing_of(run).pages.count, run.iova_pages().count);
  }
}

TEST_F(ApiOnlyDomainTest, PartsCanBeReleasedInAnyOrder) {
  Map(0, 0, 16 * kPageSize);
  auto all = Pin(0, 16 * kPageSize);
  ASSERT_THAT(all, IsOk());
  PinnedRange tail = all->split_off(Iova(12 * kPageSize));
  PinnedRange middle = all->split_off(Iova(4 * kPageSize));
  EXPECT_EQ(domain_->counters().unique_pages, 16u);
  middle.reset();
  EXPECT_EQ(domain_->counters().unique_pages, 8u);
  EXPECT_EQ(pins_->pages.size(), 8u);
  all->reset();
  EXPECT_EQ(FilePageOf(tail.runs()[0]), 12u);
  tail.reset();
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
}

TEST_F(ApiOnlyDomainTest, SeveralRunsArePinnedTogetherOrNotAtAll) {
  Map(0, 0, 1024 * kPageSize);
  auto before = Pin(BytesIn(20), kPageSize, Access::kRead);
  const std::vector<PageRun> runs = {{4, 2}, {20, 3}, {700, 1}};
  for (uint64_t n = 1; n <= 3; ++n) {
    pins_->fail_at_call = n;
    EXPECT_THAT(context_->pin_misses(runs, Access::kReadWrite), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(domain_->counters().unique_pages, 1u);
    EXPECT_EQ(domain_->counters().pinned_pages, 1u);
  }
  const std::vector<PageRun> hole = {{4, 2}, {1024, 1}};
  EXPECT_THAT(context_->pin_misses(hole, Access::kRead), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(domain_->counters().pinned_pages, 1u);
  auto pinned = context_->pin_misses(runs, Access::kReadWrite);
  ASSERT_THAT(pinned, IsOk());
  ASSERT_EQ(pinned->runs().size(), 3u);
  for (size_t i = 0; i < runs.size(); ++i) EXPECT_EQ(pinned->runs()[i].iova_pages(), runs[i]);
  EXPECT_EQ(domain_->counters().unique_pages, 6u);
  EXPECT_EQ(domain_->counters().pinned_pages, 7u);
  context_->release_last(runs, Access::kReadWrite, pinned->keep());
  EXPECT_EQ(domain_->counters().unique_pages, 1u);
  EXPECT_EQ(domain_->counters().pinned_pages, 1u);
}

TEST_F(ApiOnlyDomainTest, APinWithoutItsHandleIsReleasedInAnyParts) {
  Map(0, 0, 1024 * kPageSize);
  auto small = Pin(0, 16 * kPageSize, Access::kRead);
  auto large = Pin(0, 1024 * kPageSize, Access::kReadWrite);
  const auto small_form = small->keep();
  const auto large_form = large->keep();
  EXPECT_TRUE(small->empty() && large->empty());
  EXPECT_EQ(domain_->counters().pinned_pages, 16u + 1024u);
  context_->release_kept({4, 1020}, Access::kReadWrite, large_form);
  EXPECT_EQ(domain_->counters().unique_pages, 16u);
  context_->release_kept({0, 16}, Access::kRead, small_form);
  EXPECT_EQ(domain_->counters().unique_pages, 4u);
  context_->release_kept({0, 4}, Access::kWrite, large_form);
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
}

TEST_F(ApiOnlyDomainTest, AHoleIsRefusedWhole) {
  Map(0x10000, 0, 0x2000);
  Map(0x13000, 0x3000, 0x2000);
  EXPECT_THAT(Pin(0x10000, 0x5000), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(pins_->calls, 0u);
  EXPECT_THAT(Pin(0x10000, 0x2000), IsOk());
}

TEST_F(ApiOnlyDomainTest, PermissionsAreTheMappings) {
  Map(0x10000, 0, 0x1000, Access::kRead);
  EXPECT_THAT(Pin(0x10000, 0x1000, Access::kRead), IsOk());
  EXPECT_THAT(Pin(0x10000, 0x1000, Access::kWrite), FailsWith(ErrorCode::kPermission));
  std::array<std::byte, 4> bytes{};
  EXPECT_THAT(domain_->read(Iova(0x10000), bytes), IsOk());
  EXPECT_THAT(domain_->write(Iova(0x10000), bytes), FailsWith(ErrorCode::kPermission));
}

TEST_F(ApiOnlyDomainTest, MemoryWithoutAFileCannotBePinned) {
  ASSERT_THAT(container_.map({Iova(0xc0000), 0x1000, Access::kReadWrite, UniqueFd(), 0}), IsOk());
  EXPECT_THAT(Pin(0xc0000, 0x1000), FailsWith(ErrorCode::kNotReachable));
  EXPECT_EQ(domain_->counters().mapped_pages, 0u);
}

TEST_F(ApiOnlyDomainTest, AFailureAtAnyStepRollsBackEverything) {
  for (uint64_t i = 0; i < 8; ++i) Map(0x10000 + i * 0x1000, (2 * i) * 0x1000, 0x1000);  // 8 runs
  for (uint64_t n = 1; n <= 8; ++n) {
    SCOPED_TRACE(n);
    pins_->fail_at_call = n;
    EXPECT_THAT(Pin(0x10000, 0x8000), FailsWith(ErrorCode::kLimit));
    EXPECT_TRUE(pins_->pages.empty());
    EXPECT_EQ(domain_->counters().unique_pages, 0u);
    EXPECT_EQ(domain_->counters().pin_calls, 0u);
  }
  EXPECT_THAT(Pin(0x10000, 0x8000), IsOk());
}

TEST_F(ApiOnlyDomainTest, ThePinLimitCountsUniquePages) {
  Start({.name = "limited", .pin_limit_pages = 4});
  Map(0, 0, 16 * kPageSize);
  auto first = Pin(0, 4 * kPageSize);
  ASSERT_THAT(first, IsOk());
  EXPECT_THAT(Pin(0, 4 * kPageSize), IsOk());  // the same pages cost nothing
  auto refused = Pin(2 * kPageSize, 3 * kPageSize);
  ASSERT_THAT(refused, FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(refused.error().message(), ::testing::HasSubstr("4 of at most 4 pages"));
  EXPECT_THAT(refused.error().message(), ::testing::HasSubstr("raise --pin-limit to at least 20K"));
  first->reset();
  EXPECT_THAT(Pin(2 * kPageSize, 3 * kPageSize), IsOk());
}

TEST_F(ApiOnlyDomainTest, AnUnmapMakesHoldersLetGoFirst) {
  Map(0x10000, 0, 0x4000);
  Map(0x20000, 0x8000, 0x4000);
  owner_.held = std::move(*Pin(0x10000, 0x1000));
  owner_.during_revoke = [this] {
    EXPECT_THAT(other_context_->pin(MakeRange(0x11000, 0x1000), Access::kRead),
                FailsWith(ErrorCode::kBusy));
    EXPECT_THAT(other_context_->pin(MakeRange(0x20000, 0x1000), Access::kRead), IsOk());
  };
  EXPECT_THAT(container_.unmap(Iova(0x10000), 0x4000), IsOk());
  EXPECT_EQ(owner_.revoked, std::vector{MakeRange(0x10000, 0x4000)});
  EXPECT_THAT(Pin(0x10000, 0x1000), FailsWith(ErrorCode::kNotMapped));
}

TEST_F(ApiOnlyDomainTest, OwnersWithoutPinsInTheRangeHearNothing) {
  Map(0x10000, 0, 0x4000);
  Map(0x20000, 0x8000, 0x4000);
  owner_.held = std::move(*Pin(0x20000, 0x1000));
  EXPECT_THAT(container_.unmap(Iova(0x10000), 0x4000), IsOk());
  EXPECT_TRUE(owner_.revoked.empty());
}

TEST_F(ApiOnlyDomainTest, AHolderWhoDoesNotLetGoIsNamedAndTheRangeStaysUsable) {
  Map(0x10000, 0, 0x4000);
  owner_.held = std::move(*Pin(0x10000, 0x1000));
  owner_.lets_go = false;
  auto refused = container_.unmap(Iova(0x10000), 0x4000);
  ASSERT_THAT(refused, FailsWith(ErrorCode::kBusy));
  EXPECT_THAT(refused.error().message(), ::testing::HasSubstr("held by holder"));
  EXPECT_THAT(Pin(0x12000, 0x1000), IsOk());
  owner_.held.reset();
  EXPECT_THAT(container_.unmap(Iova(0x10000), 0x4000), IsOk());
}

TEST_F(ApiOnlyDomainTest, ReadsAndWritesAcrossMappingsWithoutAPin) {
  ram_.fill_pattern();
  Map(0x10000, 0x5000, 0x1000);
  Map(0x11000, 0x2000, 0x1000);
  std::vector<std::byte> copy(0x20);
  ASSERT_THAT(domain_->read(Iova(0x10ff0), copy), IsOk());
  EXPECT_EQ(std::memcmp(copy.data(), ram_.at(0x5ff0), 0x10), 0);
  EXPECT_EQ(std::memcmp(copy.data() + 0x10, ram_.at(0x2000), 0x10), 0);
  std::vector<std::byte> news(0x20, std::byte{0xab});
  ASSERT_THAT(domain_->write(Iova(0x10ff0), news), IsOk());
  EXPECT_EQ(*ram_.at(0x5fff), std::byte{0xab});
  EXPECT_EQ(*ram_.at(0x200f), std::byte{0xab});
  EXPECT_EQ(pins_->calls, 0u);
}

TEST_F(ApiOnlyDomainTest, AWriteThatDoesNotFitWritesNothing) {
  Map(0x10000, 0, 0x1000);
  const std::byte before = *ram_.at(0xff0);
  std::vector<std::byte> news(0x20, std::byte{0xcd});
  EXPECT_THAT(domain_->write(Iova(0x10ff0), news), FailsWith(ErrorCode::kNotMapped));
  EXPECT_EQ(*ram_.at(0xff0), before);
  EXPECT_THAT(domain_->read(Iova(UINT64_MAX - 4), news), FailsWith(ErrorCode::kInvalid));
}

TEST_F(ApiOnlyDomainTest, ALateDomainHearsOfTheMappingsThatAreThere) {
  Map(0x10000, 0, 0x4000);
  auto late = ApiOnlyDomain::Create({.name = "late"}, MakeNonePinBackend(), nullptr, nullptr);
  ASSERT_THAT(late, IsOk());
  ASSERT_THAT(container_.attach(late->get()), IsOk());
  const auto pins = (*late)->open_context(&other_);
  EXPECT_THAT(pins->pin(MakeRange(0x10000, 0x4000), Access::kRead), IsOk());
  EXPECT_THAT(container_.detach(late->get()), IsOk());
  EXPECT_THAT(pins->pin(MakeRange(0x10000, 0x4000), Access::kRead),
              FailsWith(ErrorCode::kNotMapped));
}

TEST_F(ApiOnlyDomainTest, ThreadsPinWhileAnotherMapsAndUnmaps) {
  Map(0, 0, 128 * kPageSize);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t) {
    threads.emplace_back([this, t] {
      HoldingOwner mine;
      const auto pins = domain_->open_context(&mine);
      for (uint64_t i = 0; i < 2000; ++i) {
        auto pin = pins->pin(MakeRange(((i * 7 + t * 13) % 120) * kPageSize, 8 * kPageSize),
                             Access::kRead);
        ASSERT_THAT(pin, IsOk());
        std::array<std::byte, 64> bytes;
        ASSERT_THAT(domain_->read(Iova(i % 100 * kPageSize), bytes), IsOk());
      }
    });
  }
  threads.emplace_back([this] {
    for (int i = 0; i < 1000; ++i) {
      ASSERT_THAT(container_.map(ram_.map_request(0x1000000, 128 * kPageSize, 64 * kPageSize)),
                  IsOk());
      ASSERT_THAT(container_.unmap(Iova(0x1000000), 64 * kPageSize), IsOk());
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(domain_->counters().pinned_pages, 0u);
}

}  // namespace
}  // namespace mvgpu::domain
