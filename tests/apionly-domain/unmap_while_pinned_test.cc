// Revocation: what owners hear, how long they have, and what stays when they keep their pins.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/apionly-domain/domain_fixture.h"
#include "tests/fakes/fake_remote_memory.h"

namespace mvgpu::domain {
namespace {

using std::chrono::milliseconds;
using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::FailsWith;
using testing::FakeRemoteMemory;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;

constexpr auto kLong = milliseconds(20000);  // never reached by a test that passes

class UnmapWhilePinnedTest : public DomainTest {
 protected:
  void SetUp() override {
    DomainTest::SetUp();
    Map(kHere, 0, kSize);
    Map(kThere, kSize, kSize);
  }
  void HoldHere(HoldingOwner& owner, PinContext& context, uint64_t offset = 0,
                uint64_t size = kPageSize) {
    auto pin = context.pin(MakeRange(kHere + offset, size), Access::kRead);
    ASSERT_THAT(pin, IsOk());
    owner.held = std::move(*pin);
  }
  Result<uint64_t> UnmapHere() { return container_.unmap(Iova(kHere), kSize); }
  Result<uint64_t> UnmapThere() { return container_.unmap(Iova(kThere), kSize); }
  bool IsHereMapped() { return domain_->check(here_, Access::kReadWrite).has_value(); }
  Result<PinnedRange> OtherPins(uint64_t iova) {
    return other_context_->pin(MakeRange(iova, kPageSize), Access::kRead);
  }

  static constexpr uint64_t kHere = 0x10000;
  static constexpr uint64_t kThere = 0x40000;
  static constexpr uint64_t kSize = 8 * kPageSize;
  const IovaRange here_ = MakeRange(kHere, kSize);
};

TEST_F(UnmapWhilePinnedTest, AnOwnerIsToldOnceWithTheRangeHoweverManyPinsItHas) {
  HoldHere(owner_, *context_);
  const auto second_context = domain_->open_context(&owner_);
  std::vector<PinnedRange> more;
  for (uint64_t i = 0; i < 4; ++i) {
    auto pin = second_context->pin(MakeRange(kHere + BytesIn(i), kPageSize), Access::kWrite);
    ASSERT_THAT(pin, IsOk());
    more.push_back(std::move(*pin));
  }
  owner_.during_revoke = [&more] { more.clear(); };
  EXPECT_THAT(UnmapHere(), IsOkAndHolds(kSize));
  EXPECT_THAT(owner_.revoked, ElementsAre(here_));
  EXPECT_EQ(domain_->counters().revocations, 1u);
}

TEST_F(UnmapWhilePinnedTest, OnlyOwnersWithPinsInTheRangeAreTold) {
  HoldHere(owner_, *context_);
  auto elsewhere = OtherPins(kThere);
  ASSERT_THAT(elsewhere, IsOk());
  EXPECT_THAT(UnmapHere(), IsOk());
  EXPECT_THAT(other_.revoked, IsEmpty());
  EXPECT_EQ(PagesPinnedOnce(), 1u) << "the other range is pinned as before";
}

TEST_F(UnmapWhilePinnedTest, SinglePagesAreLetGoInTheCallback) {
  const std::vector<Iova> pages = {Iova(kHere), Iova(kHere), Iova(kHere + kPageSize)};
  ASSERT_THAT(PinPages(pages), IsOk());
  owner_.during_revoke = [&] {
    EXPECT_THAT(context_->unpin_pages(pages, Access::kReadWrite), IsOk());
  };
  EXPECT_THAT(UnmapHere(), IsOk());
  EXPECT_EQ(owner_.revoked.size(), 1u);
  EXPECT_THAT(context_->unpin_pages(pages, Access::kReadWrite), FailsWith(ErrorCode::kInvalid));
}

TEST_F(UnmapWhilePinnedTest, AReleaseByAnotherThreadBeforeTheDeadlineIsInTime) {
  Stop();
  Start({.unmap_deadline = kLong});
  HoldHere(owner_, *context_, 0, kSize);
  owner_.lets_go = false;
  std::thread releaser;
  owner_.during_revoke = [&] {
    releaser = std::thread([this] {
      std::this_thread::sleep_for(milliseconds(20));
      PinnedRange tail = owner_.held->split_off(Iova(kHere + kPageSize));
      tail.reset();
      std::this_thread::sleep_for(milliseconds(5));
      owner_.held.reset();
    });
  };
  EXPECT_THAT(UnmapHere(), IsOk());
  releaser.join();
  EXPECT_FALSE(IsHereMapped());
}

TEST_F(UnmapWhilePinnedTest, WhoKeepsItsPinsIsNamedWithItsPages) {
  HoldHere(owner_, *context_, kPageSize, 2 * kPageSize);
  HoldHere(other_, *other_context_, 5 * kPageSize);
  owner_.lets_go = other_.lets_go = false;
  const auto start = std::chrono::steady_clock::now();
  const auto refused = UnmapHere();
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(50));
  ASSERT_THAT(refused, FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(refused.error().errno_value(), EBUSY);
  EXPECT_THAT(refused.error().message(),
              AllOf(HasSubstr("iova 0x10000-0x17fff stays mapped"), HasSubstr("after 50 ms"),
                    HasSubstr("held by holder (2 pages from 0x11000 on)"),
                    HasSubstr("other holder (1 pages from 0x15000 on)")));
}

TEST_F(UnmapWhilePinnedTest, OnlyThoseWhoKeptTheirPinsAreNamed) {
  HoldHere(owner_, *context_);
  HoldHere(other_, *other_context_);
  other_.lets_go = false;
  const auto refused = UnmapHere();
  ASSERT_THAT(refused, FailsWith(ErrorCode::kBusy));
  EXPECT_THAT(refused.error().message(), HasSubstr("held by other holder"));
  EXPECT_EQ(owner_.revoked.size(), 1u);
  EXPECT_FALSE(owner_.held.has_value());
}

// iommufd leaves the area closed to new pins after a failed unmap (lesson 9).
TEST_F(UnmapWhilePinnedTest, ARefusedUnmapLeavesTheRangeFullyUsable) {
  HoldHere(owner_, *context_);
  owner_.lets_go = false;
  ASSERT_THAT(UnmapHere(), FailsWith(ErrorCode::kBusy));
  EXPECT_TRUE(IsHereMapped());
  {
    auto pin = other_context_->pin(here_, Access::kReadWrite);
    EXPECT_THAT(pin, IsOk());
    EXPECT_THAT(PinPages(std::vector{Iova(kHere + kPageSize)}), IsOk());
    EXPECT_THAT(context_->unpin_pages(std::vector{Iova(kHere + kPageSize)}, Access::kReadWrite),
                IsOk());
  }
  std::array<std::byte, 16> bytes{};
  EXPECT_THAT(domain_->read(Iova(kHere), bytes), IsOk());
  EXPECT_THAT(domain_->write(Iova(kHere), bytes), IsOk());
  EXPECT_NE(ApiOnlyDomain::Translator(*domain_).translate(Iova(kHere), Access::kRead), nullptr);
  owner_.lets_go = true;
  EXPECT_THAT(UnmapHere(), IsOkAndHolds(kSize));
  EXPECT_EQ(owner_.revoked.size(), 2u) << "told again by the second unmap";
}

TEST_F(UnmapWhilePinnedTest, OtherRangesGoOnWhileAnOwnerTakesItsTime) {
  HoldHere(owner_, *context_);
  owner_.during_revoke = [this] {
    EXPECT_THAT(OtherPins(kHere + kPageSize), FailsWith(ErrorCode::kBusy));
    EXPECT_THAT(OtherPins(kThere), IsOk());
    std::array<std::byte, 8> bytes{};
    EXPECT_THAT(domain_->write(Iova(kThere), bytes), IsOk());
    EXPECT_THAT(domain_->read(Iova(kHere), bytes), FailsWith(ErrorCode::kBusy));
    EXPECT_THAT(domain_->write(Iova(kHere), bytes), FailsWith(ErrorCode::kBusy));
    EXPECT_THAT(domain_->copy(Iova(kThere), Iova(kHere), 8), FailsWith(ErrorCode::kBusy));
    const ApiOnlyDomain::Translator translator(*domain_);
    EXPECT_EQ(translator.translate(Iova(kHere), Access::kRead), nullptr);
    EXPECT_NE(translator.translate(Iova(kThere), Access::kRead), nullptr);
    std::vector<std::byte*> host(1);
    EXPECT_THAT(other_context_->pin_pages(std::vector{Iova(kHere)}, Access::kRead, host),
                FailsWith(ErrorCode::kBusy));
  };
  EXPECT_THAT(UnmapHere(), IsOk());
}

TEST_F(UnmapWhilePinnedTest, AnOwnerMayMoveItsWorkElsewhereInTheCallback) {
  HoldHere(owner_, *context_);
  owner_.lets_go = false;
  owner_.during_revoke = [this] {
    auto elsewhere = Pin(kThere, kPageSize, Access::kRead);
    ASSERT_THAT(elsewhere, IsOk());
    owner_.held = std::move(*elsewhere);
  };
  EXPECT_THAT(UnmapHere(), IsOk());
  EXPECT_EQ(owner_.held->runs()[0].iova.start(), Iova(kThere));
}

// Lesson 25 (2b48f52f2bff): a callback takes a lock under which the owner also pins.
TEST_F(UnmapWhilePinnedTest, ACallbackMayTakeTheLockUnderWhichItsOwnerPins) {
  Stop();
  Start({.unmap_deadline = kLong});
  std::mutex owners_lock;
  owner_.lets_go = false;
  owner_.during_revoke = [&] {
    const std::lock_guard lock(owners_lock);
    owner_.held.reset();
  };
  std::atomic<bool> stop = false;
  std::thread worker([&] {
    while (!stop) {
      const std::lock_guard lock(owners_lock);
      auto pin = Pin(kHere, kPageSize, Access::kRead);
      if (pin) owner_.held = std::move(*pin);
    }
  });
  for (int i = 0; i < 200; ++i) {
    ASSERT_THAT(UnmapHere(), IsOk());
    Map(kHere, 0, kSize);
  }
  stop = true;
  worker.join();
}

TEST_F(UnmapWhilePinnedTest, ASplitAsksOnlyForTheParts) {
  HoldHere(owner_, *context_);                                      // stays
  HoldHere(other_, *other_context_, 4 * kPageSize, 2 * kPageSize);  // goes
  const IovaRange part = MakeRange(kHere + 4 * kPageSize, 2 * kPageSize);
  EXPECT_THAT(container_.unmap(part.start(), part.size(), Container::Cut::kSplit),
              IsOkAndHolds(part.size()));
  EXPECT_THAT(owner_.revoked, IsEmpty());
  EXPECT_THAT(other_.revoked, ElementsAre(part));
  EXPECT_EQ(FilePageOf(owner_.held->runs()[0]), 0u);
  EXPECT_EQ(PagesPinnedOnce(), 1u);
  EXPECT_THAT(OtherPins(kHere + 3 * kPageSize), IsOk());
  EXPECT_THAT(OtherPins(kHere + 4 * kPageSize), FailsWith(ErrorCode::kNotMapped));
  auto behind = OtherPins(kHere + 6 * kPageSize);
  ASSERT_THAT(behind, IsOk());
  EXPECT_EQ(FilePageOf(behind->runs()[0]), 6u);
}

TEST_F(UnmapWhilePinnedTest, APinAcrossTheCutHasToGoWhole) {
  HoldHere(owner_, *context_, 2 * kPageSize, 4 * kPageSize);
  owner_.lets_go = false;
  const auto cut = [this] {
    return container_.unmap(Iova(kHere + 4 * kPageSize), kSize / 2, Container::Cut::kSplit);
  };
  EXPECT_THAT(cut(), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(container_.totals().mappings, 2u);
  owner_.during_revoke = [this] { owner_.held->split_off(Iova(kHere + 4 * kPageSize)).reset(); };
  EXPECT_THAT(cut(), IsOk()) << "what reached into the cut has gone, the rest may stay";
  EXPECT_EQ(PagesPinnedOnce(), 2u);
}

TEST_F(UnmapWhilePinnedTest, AnUnmapOverSeveralMappingsIsAllOrNothing) {
  HoldHere(owner_, *context_);
  auto there = OtherPins(kThere);
  ASSERT_THAT(there, IsOk());
  other_.held = std::move(*there);
  other_.lets_go = false;
  EXPECT_THAT(container_.unmap_all(), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(container_.totals().mappings, 2u);
  EXPECT_TRUE(IsHereMapped());
  EXPECT_THAT(owner_.revoked, ElementsAre(MakeRange(kHere, kThere + kSize - kHere)));
  other_.lets_go = true;
  EXPECT_THAT(container_.unmap_all(), IsOkAndHolds(2 * kSize));
}

// The same page at another IOVA is another mapping: its pins are none of this unmap's business.
TEST_F(UnmapWhilePinnedTest, PinsOfTheSamePageAtAnotherIovaStay) {
  constexpr uint64_t kAlias = 0x80000;
  Map(kAlias, 0, kSize);
  HoldHere(owner_, *context_);
  auto alias = OtherPins(kAlias);
  ASSERT_THAT(alias, IsOk());
  EXPECT_THAT(UnmapHere(), IsOk());
  EXPECT_THAT(other_.revoked, IsEmpty());
  EXPECT_EQ(PagesPinnedOnce(), 1u);
}

TEST_F(UnmapWhilePinnedTest, ACachedTranslationSeesByItsGenerationThatItIsOld) {
  const auto generation = [this](uint64_t iova) {
    return ApiOnlyDomain::Translator(*domain_).generation(Iova(iova));
  };
  constexpr uint64_t kFarAway = uint64_t{64} << 30;
  Map(kFarAway, 0, kPageSize);
  const uint64_t here = generation(kHere);
  const uint64_t far_away = generation(kFarAway);
  HoldHere(owner_, *context_);
  owner_.lets_go = false;
  ASSERT_THAT(UnmapHere(), FailsWith(ErrorCode::kBusy));
  EXPECT_EQ(generation(kHere), here) << "nothing was taken away";
  owner_.held.reset();
  ASSERT_THAT(UnmapHere(), IsOk());
  EXPECT_NE(generation(kHere), here);
  EXPECT_EQ(generation(kFarAway), far_away);
  const uint64_t unmapped = generation(kHere);
  Map(kHere, 0, kSize);
  EXPECT_NE(generation(kHere), here) << "the old one never comes back";
  EXPECT_EQ(generation(kHere), unmapped);
}

TEST_F(UnmapWhilePinnedTest, AnUnmapWaitsForSectionsThatLookTranslationsUp) {
  std::optional<ApiOnlyDomain::Translator> translator(*domain_);
  const auto refused = UnmapHere();
  ASSERT_THAT(refused, FailsWith(ErrorCode::kBusy));
  EXPECT_THAT(refused.error().message(), HasSubstr("a copy has not ended"));
  EXPECT_NE(translator->translate(Iova(kHere), Access::kRead), nullptr) << "usable again";
  translator.reset();
  EXPECT_THAT(UnmapHere(), IsOk());
}

// Lesson 26: type1 copies with the container's mutex held; one stalled fault stops everybody.
TEST_F(UnmapWhilePinnedTest, ACopyThatStandsStillHoldsUpItsOwnRangeOnly) {
  constexpr uint64_t kRemote = kHere + kSize;  // behind kHere: one copy goes over both
  FakeRemoteMemory remote(Iova(kRemote), kPageSize);
  Stop();
  Start({.remote = &remote});
  MapWithoutFile(kRemote, kPageSize);
  remote.stall();
  std::thread reader([this] {
    std::vector<std::byte> bytes(2 * kPageSize);
    EXPECT_THAT(domain_->read(Iova(kRemote - kPageSize), bytes), IsOk());
  });
  remote.wait_until_somebody_waits();
  EXPECT_THAT(Pin(kHere, kPageSize), IsOk());
  EXPECT_THAT(OtherPins(kThere), IsOk());
  EXPECT_THAT(UnmapThere(), IsOkAndHolds(kSize));
  EXPECT_THAT(UnmapHere(), FailsWith(ErrorCode::kBusy)) << "the copy may still touch it";
  EXPECT_THAT(OtherPins(kHere), IsOk());
  Map(kThere, 0, kSize);
  remote.go_on();
  reader.join();
  EXPECT_THAT(UnmapHere(), IsOk());
}

TEST_F(UnmapWhilePinnedTest, DetachingIsAnUnmapOfEverything) {
  HoldHere(owner_, *context_);
  owner_.lets_go = false;
  const auto refused = container_.detach(domain_.get());
  ASSERT_THAT(refused, FailsWith(ErrorCode::kBusy));
  EXPECT_THAT(refused.error().message(), HasSubstr("held by holder"));
  EXPECT_TRUE(IsHereMapped()) << "still attached";
  owner_.lets_go = true;
}

TEST_F(UnmapWhilePinnedTest, NothingPinnedMeansNobodyIsAskedAndNobodyWaits) {
  Stop();
  Start({.unmap_deadline = kLong});
  HoldHere(owner_, *context_);
  owner_.held.reset();
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THAT(UnmapHere(), IsOk());
  EXPECT_LT(std::chrono::steady_clock::now() - start, kLong / 2);
  EXPECT_THAT(owner_.revoked, IsEmpty());
  EXPECT_EQ(domain_->counters().revocations, 0u);
}

TEST_F(UnmapWhilePinnedTest, HoldersAreListedWithDistinctPages) {
  EXPECT_THAT(domain_->holders(here_), IsEmpty());
  HoldHere(owner_, *context_, kPageSize, 3 * kPageSize);
  auto again = Pin(kHere + 2 * kPageSize, 4 * kPageSize, Access::kWrite);
  ASSERT_THAT(again, IsOk());
  const auto holders = domain_->holders(here_);
  ASSERT_EQ(holders.size(), 1u);
  EXPECT_EQ(holders[0].owner, "holder");
  EXPECT_EQ(holders[0].pages, 5u);
  EXPECT_EQ(holders[0].first, Iova(kHere + kPageSize));
  EXPECT_THAT(domain_->holders(MakeRange(kThere, kSize)), IsEmpty());
  EXPECT_THAT(domain_->holders(MakeRange(kHere, kPageSize)), IsEmpty());
}

}  // namespace
}  // namespace mvgpu::domain
