// Pages that a cache maps through an IOMMU of which the kernel holds what is mapped: it counts each
// of them once, and the accounts say so.
#include "apionly-domain/assigned/mapping_pin_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "dma-cache/iommu_mapper.h"
#include "tests/apionly-domain/hand_over/hand_over_fixture.h"
#include "tests/fakes/dma_party.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/page_keeper.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using domain::ApiOnlyDomain;
using domain::AssignedSpace;
using testing::DmaParty;
using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;
using testing::KeepingIommu;
using testing::KeepingPinBackend;
using testing::MakeRange;
using testing::PageKeeper;

constexpr uint64_t kPages = 64;
constexpr uint64_t kAgain = 1000;  // where the same RAM is mapped once more
constexpr uint64_t kPiece = 16;    // pages of a mapping of the VMM

class MappingPinsTest : public domain::LedgerFixture {
 protected:
  void SetUp() override { Start({}); }
  void Start(AssignedSpace::Options options, bool with_locks = false, uint64_t idle_pages = 0) {
    ledger_ = Open();
    space_.emplace(std::make_unique<KeepingIommu>(&keeper_), options);
    mapper_.emplace(&*space_);
    auto pins = with_locks ? std::make_unique<KeepingPinBackend>(&keeper_, 0)
                           : domain::MakeMappingPinBackend(&*space_);
    auto domain = ApiOnlyDomain::Create({.name = "vgpu"}, std::move(pins), ledger_.get(), nullptr);
    ASSERT_THAT(domain, IsOk());
    domain_ = std::move(*domain);
    keeper_.add_view(domain::FileIn(container_, ram_));
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    cache_.emplace(domain_.get(), &*mapper_, DmaCache::Options{idle_pages});
    for (std::optional<DmaParty>& user : users_) user.emplace(&*cache_);
  }
  void TearDown() override { Stop(); }
  void Stop() {
    for (std::optional<DmaParty>& user : users_) user.reset();
    cache_.reset();
    EXPECT_EQ(KernelCount(), 0u);
    ASSERT_THAT(container_.unmap_all(), IsOk());
    ASSERT_THAT(container_.detach(domain_.get()), IsOk());
    domain_.reset();
    mapper_.reset();
    space_.reset();
    ledger_.reset();
  }

  Result<void> MapPiece(uint64_t first, uint64_t file_page) {
    return container_.map(ram_.map_request(BytesIn(first), BytesIn(file_page), BytesIn(kPiece)));
  }
  Result<DmaMapping> Use(uint64_t first, uint64_t pages, size_t user = 0,
                         Direction direction = Direction::kBidirectional) {
    return (*users_[user])->map(MakeRange(BytesIn(first), BytesIn(pages)), direction);
  }
  // What the kernel counts: each mapping of the IOMMU, and each lock.
  uint64_t KernelCount() const {
    uint64_t pages = keeper_.locked_pages(0);
    for (uint64_t page = 0; page < kPages; ++page) pages += keeper_.mappings_of(page);
    return pages;
  }
  domain::LedgerSnapshot::Row Row() const { return Look().rows.at(0); }

  GuestRam ram_{BytesIn(kPages)};
  PageKeeper keeper_;
  std::unique_ptr<domain::Ledger> ledger_;
  domain::Container container_;
  std::optional<AssignedSpace> space_;
  std::optional<IommuMapper> mapper_;
  std::unique_ptr<ApiOnlyDomain> domain_;
  std::optional<DmaCache> cache_;
  std::optional<DmaParty> users_[2];
};

TEST_F(MappingPinsTest, APageThatIsPinnedAndMappedCountsOnce) {
  ASSERT_THAT(MapPiece(0, 0), IsOk());
  {
    const auto use = Use(4, 8);
    ASSERT_THAT(use, IsOk());
    EXPECT_EQ(KernelCount(), 8u);
    EXPECT_EQ(keeper_.lock_calls(), 0u);
    EXPECT_EQ(domain_->counters().locked_pages, 8u);
    domain_->show_locked();
    EXPECT_EQ(Row().pin_backend, "vfio-type1");
    EXPECT_EQ(domain::KernelCounterName(Row().pin_backend), "VmLck");
    EXPECT_EQ(Row().locked_pages, 8u);
    EXPECT_EQ(Row().unique_pages, 8u);
    EXPECT_EQ(Row().charged_pages, 8u);
  }
  EXPECT_EQ(KernelCount(), 0u);
  EXPECT_EQ(Row().locked_pages, 0u) << "also without being asked: the mapping went first";
  EXPECT_EQ(Row().charged_pages, 0u);
}

TEST_F(MappingPinsTest, WithALockBesideItItWouldCountTwice) {
  Stop();
  Start({}, /*with_locks=*/true);
  ASSERT_THAT(MapPiece(0, 0), IsOk());
  const auto use = Use(4, 8);
  ASSERT_THAT(use, IsOk());
  EXPECT_EQ(KernelCount(), 16u);
}

// The kernel counts mappings, and the row says it; the VM is charged for pages.
TEST_F(MappingPinsTest, APageAtTwoIovasCountsTwiceAndIsChargedOnce) {
  ASSERT_THAT(MapPiece(0, 0), IsOk());
  ASSERT_THAT(MapPiece(kAgain, 0), IsOk());
  const auto use = Use(0, 4);
  const auto again = Use(kAgain + 2, 4);
  ASSERT_THAT(again, IsOk());
  EXPECT_EQ(KernelCount(), 8u);
  domain_->show_locked();
  EXPECT_EQ(Row().locked_pages, 8u);
  EXPECT_EQ(Row().unique_pages, 6u);
  EXPECT_EQ(Row().charged_pages, 6u);
}

TEST_F(MappingPinsTest, AMappingThatTheKernelRefusesLeavesNothingPinned) {
  ASSERT_THAT(MapPiece(0, 0), IsOk());
  keeper_.fail_at_call(1, /*more=*/8);
  EXPECT_THAT(Use(0, 4), FailsWith(ErrorCode::kLimit));
  keeper_.fail_at_call(0);
  EXPECT_EQ(KernelCount(), 0u);
  EXPECT_EQ(domain_->counters().unique_pages, 0u);
  EXPECT_EQ(Row().charged_pages, 0u);
  EXPECT_THAT(Use(0, 4), IsOk());
}

// Two users, two views of the same RAM, a VMM that takes pieces away and brings them back, idle
// pages, and a kernel that refuses now and then.
class MappingPinsModelTest : public MappingPinsTest {
 protected:
  struct Held {
    PageRun pages;
    DmaMapping mapping;
  };
  void Run(bool each_page, bool with_failures, unsigned seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    Stop();
    each_page_ = each_page;
    Start({.maps_each_page = each_page}, /*with_locks=*/false, /*idle_pages=*/8);
    random_.seed(seed);
    for (int step = 0; step < 600; ++step) {
      if (with_failures && random_() % 8 == 0) keeper_.fail_at_call(1 + random_() % 3);
      Step();
      keeper_.fail_at_call(0);
      ASSERT_NO_FATAL_FAILURE(Compare(with_failures));
    }
    EXPECT_GT(cache_->counters().revoked_pages, 40u);
    EXPECT_EQ(keeper_.lock_calls(), 0u);
    EXPECT_EQ(keeper_.problem(), "");
    held_.clear();
    keeper_.want(0, {});
    is_mapped_.clear();
  }
  void Step() {
    switch (random_() % 8) {
      case 0:
        return Toggle(kPiece * (random_() % (kPages / kPiece)) + (random_() % 2) * kAgain);
      case 1:
      case 2:
      case 3:
        if (!held_.empty()) Release(random_() % held_.size());
        return;
      default:
        return Hold();
    }
  }
  void Hold() {
    const PageRun pages{random_() % (kPages - 6) + (random_() % 2) * kAgain, 1 + random_() % 6};
    auto use = Use(pages.first, pages.count, random_() % 2,
                   random_() % 2 == 0 ? Direction::kToDevice : Direction::kBidirectional);
    if (use) held_.push_back({pages, std::move(*use)});
    Want({});
  }
  void Release(size_t index) {
    std::swap(held_[index], held_.back());
    const Held going = std::move(held_.back());
    held_.pop_back();
    Want({});
  }
  // But for those in `going`: from now on pages that are used are mapped at every instant. That is
  // so where nothing is cut.
  void Want(PageRun going) {
    if (!each_page_) return;
    PageKeeper::Pages pages;
    for (const Held& held : held_) {
      for (uint64_t page = held.pages.first; page < held.pages.end(); ++page) {
        if (!going.contains(page)) pages.insert(page % kAgain);
      }
    }
    keeper_.want(0, std::move(pages));
  }
  void Toggle(uint64_t first) {
    if (is_mapped_.erase(first) != 0) {
      Want({first, kPiece});
      ASSERT_THAT(container_.unmap(Iova(BytesIn(first)), BytesIn(kPiece)), IsOk());
      std::erase_if(held_, [](const Held& held) { return !held.mapping.is_valid(); });
    } else {
      ASSERT_THAT(MapPiece(first, first % kAgain), IsOk());
      is_mapped_.insert(first);
    }
  }
  void Compare(bool with_failures) {
    const uint64_t counted = KernelCount();
    const uint64_t lost = space_->counters().lost_pages;
    ASSERT_EQ(domain_->counters().locked_pages, counted);
    ASSERT_EQ(cache_->counters().cached_pages, counted + lost) << "each cached page counts once";
    ASSERT_TRUE(with_failures || lost == 0);
    has_lost_ |= lost != 0;
    domain_->show_locked();
    ASSERT_EQ(Row().locked_pages, counted);
    ASSERT_EQ(Row().unique_pages, domain_->counters().unique_pages);
    if (lost != 0) return;
    for (const Held& held : held_) {
      for (uint64_t page = held.pages.first; page < held.pages.end(); ++page) {
        ASSERT_GT(keeper_.mappings_of(page % kAgain), 0u) << "a page that is used is not held";
      }
    }
  }

  std::mt19937 random_;
  bool each_page_ = false;
  bool has_lost_ = false;  // ever
  std::set<uint64_t> is_mapped_;
  std::vector<Held> held_;
};

TEST_F(MappingPinsModelTest, TheKernelCountsWhatIsCached) {
  for (unsigned seed = 0; seed < 4; ++seed) {
    ASSERT_NO_FATAL_FAILURE(Run(/*each_page=*/false, /*with_failures=*/false, seed));
  }
}

TEST_F(MappingPinsModelTest, AlsoPageByPage) {
  for (unsigned seed = 10; seed < 14; ++seed) {
    ASSERT_NO_FATAL_FAILURE(Run(/*each_page=*/true, /*with_failures=*/false, seed));
  }
}

TEST_F(MappingPinsModelTest, AlsoWhereTheKernelRefuses) {
  for (unsigned seed = 20; seed < 24; ++seed) {
    ASSERT_NO_FATAL_FAILURE(Run(/*each_page=*/false, /*with_failures=*/true, seed));
  }
  EXPECT_TRUE(has_lost_);
}

}  // namespace
}  // namespace mvgpu::dma
