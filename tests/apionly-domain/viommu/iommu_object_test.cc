#include "apionly-domain/viommu/iommu_object.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "apionly-domain/viommu/device_address_space.h"
#include "tests/apionly-domain/viommu/viommu_fixture.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;
using ::mvgpu::testing::MakeRange;
using ::testing::ElementsAre;

constexpr DeviceSpace kSpace{0x3a91, 0x12345};
constexpr DeviceSpace kOther{0x3a91, std::nullopt};

MapEvent Mapping(uint64_t start, uint64_t pages, uint64_t out) {
  return {MakeRange(start, BytesIn(pages)), GuestPhys(out), Access::kReadWrite};
}

class IommuObjectTest : public ::testing::Test {
 protected:
  void TearDown() override {
    object_.remove(&listener_);
    object_.remove(&second_);
  }
  void Map(uint64_t start, uint64_t pages, uint64_t out, DeviceSpace space = kSpace) {
    ASSERT_THAT(object_.map(space, Mapping(start, pages, out)), IsOk());
  }
  static IommuEvent Mapped(uint64_t start, uint64_t pages, uint64_t out,
                           DeviceSpace space = kSpace) {
    return {space, Mapping(start, pages, out)};
  }
  static IommuEvent Unmapped(uint64_t start, uint64_t pages, DeviceSpace space = kSpace) {
    return {space, UnmapEvent{MakeRange(start, BytesIn(pages))}};
  }
  static PasidBinding Binding(DomainId domain) { return {.pasid = 0x12345, .domain = domain}; }

  IommuObject object_{{.mappings = 8, .bindings = 3}};
  RecordingListener listener_;
  RecordingListener second_;
};

TEST_F(IommuObjectTest, AnAddressSpaceSaysThatItIsThereAlsoInBypass) {
  using Kind = DeviceAddressSpace::Kind;
  struct Translations final : DmaSpace {
    void set_user(User*) override {}
    Result<std::vector<DmaRun>> translate(IovaRange, Access) override {
      return std::vector<DmaRun>();
    }
  } translations;
  const DeviceAddressSpace bare;
  EXPECT_EQ(bare.iommu(), nullptr);
  EXPECT_EQ(bare.translations(), nullptr);
  EXPECT_EQ(AddressesName(bare.kind()), "guest-memory");
  const DeviceAddressSpace space(&translations, &object_);
  EXPECT_TRUE(object_.is_bypassed());
  EXPECT_EQ(space.iommu(), &object_);
  EXPECT_EQ(space.translations(), &translations);
  EXPECT_EQ(space.kind(), Kind::kBypassed);
  EXPECT_EQ(AddressesName(space.kind()), "bypassed");
  object_.set_bypassed(false);
  EXPECT_EQ(space.kind(), Kind::kTranslated);
  EXPECT_EQ(AddressesName(space.kind()), "translated");
}

TEST_F(IommuObjectTest, AListenerInBypassHearsOfBindings) {
  object_.add(&listener_, {.kinds = static_cast<IommuEventKinds>(IommuEventKind::kBindPasid)});
  ASSERT_TRUE(object_.is_bypassed());
  ASSERT_THAT(object_.bind(kSpace, Binding(1)), IsOk());
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, BindPasidEvent{Binding(1)}}));
}

TEST_F(IommuObjectTest, EachKindOfEventIsHeardByWhoAskedForIt) {
  const std::vector<IommuEvent> events{
      {kSpace, DeviceTlbUnmapEvent{MakeRange(0x1000, 0x1000)}},
      {kSpace, PasidIotlbEvent{MakeRange(0x1000, 0x1000)}},
      {kSpace, PasidCacheEvent{}},
      {kSpace, PageRequestEvent{.page = Iova(0x1000), .access = Access::kWrite, .group = 5}},
      {kSpace, PageResponseEvent{.group = 5, .answer = FaultAnswer::kFailure}}};
  for (const IommuEvent& event : events) {
    object_.add(&listener_, {.kinds = static_cast<IommuEventKinds>(event.kind())});
    object_.add(&second_, {.kinds = static_cast<IommuEventKinds>(
                               kAllIommuEvents & ~static_cast<unsigned>(event.kind()))});
    EXPECT_TRUE(object_.is_heard(event.kind()));
    object_.notify(event);
    EXPECT_THAT(listener_.take(), ElementsAre(event));
    EXPECT_TRUE(second_.take().empty());
    object_.remove(&listener_);
    object_.notify(event);
    EXPECT_TRUE(listener_.events.empty());
    EXPECT_FALSE(object_.is_heard(event.kind()));
    object_.remove(&second_);
  }
}

TEST_F(IommuObjectTest, MapAndUnmapAreToldAndRemembered) {
  object_.add(&listener_, {});
  Map(0x10000, 16, 0x100000);
  object_.unmap(kSpace, MakeRange(0x10000, 0x10000));
  EXPECT_EQ(object_.mappings(), 0);
  object_.unmap(kSpace, MakeRange(0x50000, 0x1000));
  EXPECT_THAT(listener_.take(), ElementsAre(Mapped(0x10000, 16, 0x100000), Unmapped(0x10000, 16),
                                            Unmapped(0x50000, 1)));
}

TEST_F(IommuObjectTest, WhatCannotBeMappedIsRefusedAndNotTold) {
  Map(0x10000, 16, 0x100000);
  object_.add(&listener_, {});
  listener_.take();
  for (const uint64_t start : {0xf000, 0x10000, 0x14000, 0x1f000}) {
    EXPECT_THAT(object_.map(kSpace, Mapping(start, 2, 0)), FailsWith(ErrorCode::kOverlap));
  }
  EXPECT_THAT(object_.map(kSpace, Mapping(0xf000, 64, 0)), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(object_.map(kSpace, {MakeRange(0x800, 0x1000), GuestPhys(0), Access::kRead}),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(object_.map(kSpace, Mapping(0x40000, 1, 0x801)), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(object_.map(kSpace, Mapping(0x40000, 2, ~uint64_t{0xfff})),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_TRUE(listener_.events.empty());
  Map(0xf000, 1, 0);
  Map(0x20000, 1, 0);
  Map(0x10000, 16, 0x100000, kOther);
  Map(0x10000, 16, 0x100000, DeviceSpace{0x3a92, 0x12345});
  for (uint64_t i = 0; i < 3; ++i) Map(0x100000 + i * 0x1000, 1, 0);
  EXPECT_THAT(object_.map(kSpace, Mapping(0x200000, 1, 0)), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(object_.mappings(), 8);
}

TEST_F(IommuObjectTest, AnUnmapCutsWhatReachesBeyondIt) {
  Map(0x10000, 16, 0x100000);
  Map(0x10000, 16, 0x900000, kOther);
  object_.unmap(kSpace, MakeRange(0x14000, 0x2000));
  object_.add(&listener_, {.space = kSpace});
  EXPECT_THAT(listener_.take(),
              ElementsAre(Mapped(0x10000, 4, 0x100000), Mapped(0x16000, 10, 0x106000)));
  object_.unmap(kSpace, MakeRange(0x13000, 0x4000));
  listener_.take();
  object_.add(&second_, {});
  EXPECT_THAT(second_.take(),
              ElementsAre(Mapped(0x10000, 16, 0x900000, kOther), Mapped(0x10000, 3, 0x100000),
                          Mapped(0x17000, 9, 0x107000)));
}

TEST_F(IommuObjectTest, APartOfAPageTakesThePage) {
  Map(0x10000, 2, 0x100000);
  object_.add(&listener_, {.kinds = static_cast<IommuEventKinds>(IommuEventKind::kUnmap)});
  object_.unmap(kSpace, MakeRange(0x10800, 0x100));
  EXPECT_THAT(listener_.take(), ElementsAre(Unmapped(0x10000, 1)));
  EXPECT_EQ(object_.mappings(), 1);
}

TEST_F(IommuObjectTest, WithoutRoomForBothEndsTheSecondOneGoesAndIsTold) {
  Map(0x10000, 16, 0x100000);
  for (uint64_t i = 0; i < 7; ++i) Map(0x100000 + i * 0x1000, 1, 0);
  object_.add(&listener_, {.kinds = static_cast<IommuEventKinds>(IommuEventKind::kUnmap)});
  object_.unmap(kSpace, MakeRange(0x14000, 0x1000));
  EXPECT_EQ(object_.mappings(), 8);
  EXPECT_THAT(listener_.take(), ElementsAre(Unmapped(0x14000, 12)));
  object_.add(&second_, {.range = MakeRange(0x10000, 0x10000)});
  EXPECT_THAT(second_.take(), ElementsAre(Mapped(0x10000, 4, 0x100000)));
}

TEST_F(IommuObjectTest, EventsAreCutToTheRangeOfTheFilter) {
  object_.add(&listener_, {.range = MakeRange(0x14000, 0x4000)});
  Map(0x10000, 16, 0x100000);
  object_.unmap(kSpace, MakeRange(0, 0x15000));
  object_.notify({kSpace, DeviceTlbUnmapEvent{MakeRange(0x17000, 0x10000)}});
  object_.notify({kSpace, PasidIotlbEvent{MakeRange(0x18000, 0x1000)}});
  object_.notify({kSpace, PageRequestEvent{.page = Iova(0x13000)}});
  object_.notify({kSpace, PageRequestEvent{.page = Iova(0x14000)}});
  object_.notify({kSpace, PasidCacheEvent{}});
  EXPECT_THAT(listener_.take(),
              ElementsAre(Mapped(0x14000, 4, 0x104000), Unmapped(0x14000, 1),
                          IommuEvent{kSpace, DeviceTlbUnmapEvent{MakeRange(0x17000, 0x1000)}},
                          IommuEvent{kSpace, PageRequestEvent{.page = Iova(0x14000)}},
                          IommuEvent{kSpace, PasidCacheEvent{}}));
}

TEST_F(IommuObjectTest, AFilterOfOneSpaceHearsNothingOfOthers) {
  object_.add(&listener_, {.space = kSpace});
  object_.add(&second_, {.space = kOther});
  object_.notify({kSpace, PasidCacheEvent{}});
  object_.notify({kOther, PasidCacheEvent{}});
  object_.notify({{0x3a92, 0x12345}, PasidCacheEvent{}});
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, PasidCacheEvent{}}));
  EXPECT_THAT(second_.take(), ElementsAre(IommuEvent{kOther, PasidCacheEvent{}}));
}

TEST_F(IommuObjectTest, ALateListenerHearsOfEverythingThatIs) {
  ASSERT_THAT(object_.bind(kSpace, Binding(1)), IsOk());
  Map(0x10000, 16, 0x100000);
  Map(0x40000, 1, 0x300000);
  object_.unmap(kSpace, MakeRange(0x40000, 0x1000));
  object_.add(&listener_, {.range = MakeRange(0x18000, 0x100000)});
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, BindPasidEvent{Binding(1)}},
                                            Mapped(0x18000, 8, 0x108000)));
  object_.add(&second_, {.kinds = static_cast<IommuEventKinds>(IommuEventKind::kUnmap)});
  EXPECT_TRUE(second_.events.empty());
}

TEST_F(IommuObjectTest, AnotherBindingUnbindsTheOldOne) {
  object_.add(&listener_, {});
  ASSERT_THAT(object_.bind(kSpace, Binding(1)), IsOk());
  ASSERT_THAT(object_.bind(kSpace, Binding(1)), IsOk());
  Map(0x10000, 1, 0);
  ASSERT_THAT(object_.bind(kSpace, Binding(2)), IsOk());
  EXPECT_EQ(object_.mappings(), 0);
  object_.unbind(kSpace);
  object_.unbind(kSpace);
  EXPECT_THAT(listener_.take(),
              ElementsAre(IommuEvent{kSpace, BindPasidEvent{Binding(1)}}, Mapped(0x10000, 1, 0),
                          IommuEvent{kSpace, UnbindPasidEvent{Binding(1)}},
                          IommuEvent{kSpace, BindPasidEvent{Binding(2)}},
                          IommuEvent{kSpace, UnbindPasidEvent{Binding(2)}}));
  EXPECT_EQ(object_.binding(kSpace), nullptr);
}

TEST_F(IommuObjectTest, UnbindingOneSpaceLeavesTheOthers) {
  ASSERT_THAT(object_.bind(kSpace, Binding(1)), IsOk());
  ASSERT_THAT(object_.bind(kOther, Binding(1)), IsOk());
  Map(0x10000, 1, 0, kOther);
  object_.unbind(kSpace);
  EXPECT_EQ(object_.mappings(), 1);
  ASSERT_NE(object_.binding(kOther), nullptr);
}

TEST_F(IommuObjectTest, BindingsHaveALimit) {
  for (Pasid pasid = 0; pasid < 3; ++pasid) {
    ASSERT_THAT(object_.bind({1, pasid}, Binding(1)), IsOk());
  }
  object_.add(&listener_, {});
  listener_.take();
  EXPECT_THAT(object_.bind({1, 3}, Binding(1)), FailsWith(ErrorCode::kLimit));
  EXPECT_TRUE(listener_.events.empty());
  ASSERT_THAT(object_.bind({1, 2}, Binding(2)), IsOk());
}

TEST_F(IommuObjectTest, AListenerMayGoInItsCallback) {
  object_.add(&listener_, {});
  object_.add(&second_, {});
  listener_.during = [&](const IommuEvent&) { object_.remove(&listener_); };
  object_.notify({kSpace, PasidCacheEvent{}});
  object_.notify({kSpace, PasidCacheEvent{}});
  EXPECT_EQ(listener_.events.size(), 1);
  EXPECT_EQ(second_.events.size(), 2);
}

TEST_F(IommuObjectTest, WhoIsRemovedByAnotherHearsNoMore) {
  object_.add(&listener_, {});
  object_.add(&second_, {});
  listener_.during = [&](const IommuEvent&) { object_.remove(&second_); };
  object_.notify({kSpace, PasidCacheEvent{}});
  EXPECT_TRUE(second_.events.empty());
}

TEST_F(IommuObjectTest, AListenerMayGoWhileItHearsWhatIs) {
  Map(0x10000, 1, 0);
  Map(0x20000, 1, 0);
  listener_.during = [&](const IommuEvent&) { object_.remove(&listener_); };
  object_.add(&listener_, {});
  EXPECT_EQ(listener_.events.size(), 1);
  EXPECT_FALSE(object_.is_heard(IommuEventKind::kMap));
}

TEST_F(IommuObjectTest, WhoIsAddedInACallbackHearsAnEventOnce) {
  object_.add(&listener_, {});
  listener_.during = [&](const IommuEvent& event) {
    // Enough that entries move.
    if (event.kind() == IommuEventKind::kMap && second_.events.empty()) {
      for (int i = 0; i < 20; ++i) object_.add(&second_, {});
    }
  };
  Map(0x10000, 1, 0);
  EXPECT_EQ(second_.count(IommuEventKind::kMap), 20) << "by replay, and not again";
  object_.notify({kSpace, PasidCacheEvent{}});
  EXPECT_EQ(second_.count(IommuEventKind::kPasidCache), 20);
}

TEST_F(IommuObjectTest, AnAnswerMayBeToldInACallback) {
  object_.add(&listener_, {});
  object_.add(&second_, {});
  listener_.during = [&](const IommuEvent& event) {
    if (event.kind() != IommuEventKind::kPageRequest) return;
    object_.remove(&listener_);
    object_.notify({event.space, PageResponseEvent{.group = 5}});
  };
  object_.notify({kSpace, PageRequestEvent{.page = Iova(0x1000), .group = 5}});
  EXPECT_EQ(listener_.events.size(), 1);
  EXPECT_EQ(second_.events.size(), 2);
}

// Whoever comes at any time knows the same as who was there from the start.
TEST_F(IommuObjectTest, AFollowerKnowsWhatIsMappedWheneverItCame) {
  using Known = std::map<std::pair<DeviceSpace, uint64_t>, uint64_t>;  // page -> page
  struct Follower final : IommuListener {
    Known known;
    void on_iommu_event(const IommuEvent& event) override {
      if (const auto* map = std::get_if<MapEvent>(&event.what)) {
        const PageRun pages = PagesOf(map->range);
        for (uint64_t i = 0; i < pages.count; ++i) {
          EXPECT_TRUE(
              known.emplace(std::pair{event.space, pages.first + i}, map->out.page() + i).second);
        }
      } else if (const auto* unmap = std::get_if<UnmapEvent>(&event.what)) {
        std::erase_if(known, [&](const auto& entry) {
          return entry.first.first == event.space &&
                 PagesOf(unmap->range).contains(entry.first.second);
        });
      }
    }
  };
  std::mt19937_64 random(3);
  Follower early;
  object_.add(&early, {});
  size_t most = 0;
  for (int i = 0; i < 3000; ++i) {
    const DeviceSpace space = random() % 2 == 0 ? kSpace : kOther;
    const uint64_t start = BytesIn(random() % 64);
    const uint64_t pages = 1 + random() % 16;
    if (random() % 2 == 0) {
      const auto mapped = object_.map(space, Mapping(start, pages, BytesIn(random() % 1000)));
      if (!mapped) {
        ASSERT_NE(mapped.error().code(), ErrorCode::kInvalid);
      }
    } else {
      object_.unmap(space, MakeRange(start, BytesIn(1 + random() % 4)));
    }
    ASSERT_LE(object_.mappings(), 8);
    most = std::max(most, object_.mappings());
    Follower late;
    object_.add(&late, {});
    object_.remove(&late);
    ASSERT_EQ(late.known, early.known);
  }
  EXPECT_EQ(most, 8);
  object_.remove(&early);
}

}  // namespace
}  // namespace mvgpu::domain
