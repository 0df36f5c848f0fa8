// Random tables and random changes, against what the guest meant and against a full walk.

#include <map>
#include <random>

#include "apionly-domain/nested/nested_domain.h"
#include "apionly-domain/nested/zpci_table.h"
#include "tests/apionly-domain/nested/nested_fixture.h"
#include "tests/apionly-domain/nested/zpci_builder.h"

namespace mvgpu::domain {
namespace {

using testing::RecordingTarget;
using Pages = std::map<uint64_t, RecordingTarget::Page>;  // by IOVA, bytes

constexpr uint64_t kMiB = 1 << 20;

class NestedPropertyTest : public NestedTest, public ::testing::WithParamInterface<unsigned> {
 protected:
  // Around the end of a region entry, so that all levels have something to say.
  static constexpr uint64_t kStart = 0x1'7fe0'0000;
  static constexpr uint64_t kSize = 4 * kMiB;

  void SetUp() override {
    NestedTest::SetUp();
    walker_ = std::make_unique<ZpciTable>(tables_.get());
    Nest(walker_.get(), testing::ZpciBuilder::kIota, RangeAt(kStart, kSize));
  }
  uint64_t Random(uint64_t below) {
    return std::uniform_int_distribution(uint64_t{0}, below - 1)(random_);
  }
  uint64_t RandomPage() { return kStart + Random(kSize / kPageSize) * kPageSize; }

  // One change of the tables, as a guest makes it, and of what it means by them.
  void Change() {
    switch (Random(10)) {
      case 0:
        return DropSegment(RandomPage());
      case 1:
        return ShowSegmentFrame(RandomPage());
      case 2:
      case 3:
        return UnmapRun(RandomPage(), 1 + Random(40));
      default:
        return MapRun(RandomPage(), 1 + Random(40), Random(3) == 0);
    }
  }
  void MapRun(uint64_t iova, uint64_t count, bool read_only) {
    uint64_t frame = kFrames + Random(kFramesSize / kPageSize - count) * kPageSize;
    const bool scattered = Random(2) == 0;
    for (; count > 0 && iova < kStart + kSize; --count, iova += kPageSize) {
      if (!HasTable(iova)) return;
      guest_.map(iova, frame, read_only);
      meant_[iova] = {frame, read_only ? Access::kRead : Access::kReadWrite};
      frame = scattered ? kFrames + Random(kFramesSize / kPageSize) * kPageSize : frame + kPageSize;
    }
  }
  // Under a frame of a segment there is no table to write to, until it is dropped.
  bool HasTable(uint64_t iova) { return (guest_.get(guest_.segment_entry(iova)) & 0x400) == 0; }
  void UnmapRun(uint64_t iova, uint64_t count) {
    for (; count > 0 && iova < kStart + kSize; --count, iova += kPageSize) {
      if (!HasTable(iova)) return;
      guest_.unmap(iova);
      meant_.erase(iova);
    }
  }
  void DropSegment(uint64_t iova) {
    guest_.put(guest_.segment_entry(iova), 0x20);
    const uint64_t start = iova & ~(kMiB - 1);
    meant_.erase(meant_.lower_bound(start), meant_.lower_bound(start + kMiB));
  }
  void ShowSegmentFrame(uint64_t iova) {
    DropSegment(iova);
    const uint64_t start = iova & ~(kMiB - 1);
    const uint64_t frame = kFrames + Random(2) * kMiB;
    guest_.put(guest_.segment_entry(iova), frame | 0x400);
    for (uint64_t done = 0; done < kMiB; done += kPageSize) {
      meant_[start + done] = {frame + done, Access::kReadWrite};
    }
  }

  static Pages PartOf(const Pages& pages, uint64_t start, uint64_t end) {
    return {pages.lower_bound(start), pages.lower_bound(end)};
  }
  Pages FullWalk() {
    Pages pages;
    for (uint64_t iova = kStart; iova < kStart + kSize; iova += kPageSize) {
      const auto leaf = walker_->walk(testing::ZpciBuilder::kIota, iova, {});
      if (leaf) pages[iova] = {leaf->out, static_cast<Access>(leaf->rights)};
    }
    return pages;
  }

  std::mt19937_64 random_{GetParam()};
  std::unique_ptr<ZpciTable> walker_;
  testing::ZpciBuilder guest_{&ram_};
  Pages meant_;
};

TEST_P(NestedPropertyTest, ARefreshMakesItsRangeWhatTheGuestMeantAndTouchesNothingElse) {
  for (int round = 0; round < 60; ++round) {
    for (uint64_t changes = 1 + Random(5); changes > 0; --changes) Change();
    const uint64_t start = RandomPage();
    const uint64_t end = start + (1 + Random((kStart + kSize - start) / kPageSize)) * kPageSize;
    const Pages before = target_->pages;
    const Refreshed refreshed = nested_->refresh(RangeAt(start, end - start));
    ASSERT_EQ(refreshed.end, Refreshed::End::kDone);
    ASSERT_EQ(PartOf(target_->pages, start, end), PartOf(meant_, start, end)) << "round " << round;
    ASSERT_EQ(PartOf(target_->pages, 0, start), PartOf(before, 0, start));
    ASSERT_EQ(PartOf(target_->pages, end, ~uint64_t{0}), PartOf(before, end, ~uint64_t{0}));
    ASSERT_EQ(PinnedPages(), target_->pages.size());
    ASSERT_EQ(credits_->available(), MapCredits::kVfioDefault - target_->pages.size());
  }
}

TEST_P(NestedPropertyTest, AfterARefreshOfEverythingTheShadowIsAFullWalk) {
  for (int round = 0; round < 10; ++round) {
    for (uint64_t changes = Random(30); changes > 0; --changes) Change();
    ASSERT_EQ(nested_->refresh_all().end, Refreshed::End::kDone);
    ASSERT_EQ(target_->pages, FullWalk());
    ASSERT_EQ(target_->pages, meant_);
    for (const auto& [iova, page] : meant_) {
      ASSERT_EQ(nested_->translate(Iova(iova), page.access), GuestPhys(page.guest));
    }
  }
}

// Memory comes and goes; what is left is what a fresh domain would make of the tables.
TEST_P(NestedPropertyTest, RevocationsLeaveNothingThatARefreshDoesNotPutRight) {
  for (int round = 0; round < 10; ++round) {
    for (uint64_t changes = Random(20); changes > 0; --changes) Change();
    nested_->refresh_all();
    ASSERT_TRUE(container_.unmap(Iova(kFrames), kFramesSize).has_value());
    ASSERT_EQ(PinnedPages(), 0);
    Map(kFrames, kTablesSize, kFramesSize);
    ASSERT_EQ(nested_->refresh_all().end, Refreshed::End::kDone);
    ASSERT_EQ(target_->pages, meant_);
  }
}

// Entries of all kinds, plausible and not, anywhere in the tables, changed between refreshes.
TEST_P(NestedPropertyTest, HostileTablesEndInTypedFaultsAndLeaveNothing) {
  constexpr uint64_t kRoot = 0x10'0000;
  const auto entry = [&]() -> uint64_t {
    const uint64_t table = kRoot + Random(16) * 0x4000;
    switch (Random(8)) {
      case 0:
        return random_();
      case 1:
        return 0;
      case 2:
        return 0x20;
      case 3:
        return table | 0x4003 | Random(4) << 2;  // any type
      case 4:
        return table + Random(8) * 0x800;
      case 5:
        return kFrames + Random(1024) * kPageSize;  // half of them outside
      default:
        return table | 0x7;
    }
  };
  for (int round = 0; round < 6; ++round) {
    for (uint64_t at = kRoot; at < kRoot + 0x4'0000; at += 8) guest_.put(at, entry());
    for (const uint64_t iota : {kRoot | 0x804, kRoot | 0x80c, kRoot | 0x808, kRoot | 0x800,
                                kRoot | 0x81c, kRoot | 0x812, random_()}) {
      const auto whole = IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0}));
      Nest(walker_.get(), iota, whole, NestedDomain::OnFault::kSkip);
      for (int part = 0; part < 4; ++part) {
        const Refreshed refreshed =
            nested_->refresh(IovaRange::FromFirstAndLast(Iova(Random(4) << 31), Iova(~uint64_t{0})),
                             /*max_steps=*/200);
        ASSERT_LE(refreshed.steps, 200 + ShadowTable::kChunkPages);
        ASSERT_EQ(PinnedPages(), target_->pages.size());
        static_cast<void>(walker_->walk(iota, random_(), Access::kReadWrite));
      }
      nested_.reset();
      ASSERT_EQ(PinnedPages(), 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, NestedPropertyTest, ::testing::Range(1u, 5u));

}  // namespace
}  // namespace mvgpu::domain
