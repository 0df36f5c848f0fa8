// What the listeners of an IOMMU object hear of what the guest does with a remapping unit.

#include <gmock/gmock.h>

#include "tests/apionly-domain/viommu/viommu_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::MakeRange;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

class VtdIommuBindingsTest : public VtdIommuTest {
 protected:
  static constexpr DeviceSpace kSpace{kSource, kPasid};
  static constexpr DeviceSpace kRidSpace{kSource, std::nullopt};

  void SetUp() override {
    VtdIommuTest::SetUp();
    Put(kEntryAt, 0);
    Put(kRidEntryAt, 0);
  }
  void Listen(IommuObject::Filter filter = {}) { object_->add(&listener_, filter); }
  static PasidBinding Nested() {
    return {.translation = vtd::Translation::kNested,
            .pasid = kPasid,
            .domain = kDomain,
            .first_stage = 0x40'0000,
            .first_stage_levels = 4,
            .second_stage = 0x30'0000,
            .second_stage_levels = 4};
  }
  static PasidBinding Second() {
    return {.translation = vtd::Translation::kSecondStage,
            .pasid = 0,
            .domain = 0x43,
            .second_stage = 0x30'0000,
            .second_stage_levels = 4};
  }
  static IovaRange All() { return IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0})); }
  // As the guest's driver does for a new entry.
  void BindNested() {
    Put(kEntryAt, kNested);
    Invalidate(0x0001'2345'0042'0017);
  }
  void BindRid() {
    Put(kRidEntryAt, kSecondOnly);
    Invalidate(0x0000'0000'0043'0017);
  }
};

TEST_F(VtdIommuBindingsTest, AListenerInBypassHearsWhatIsBound) {
  iommu_->set_translating(false);
  iommu_->add_device(kSource);
  Listen();
  BindNested();
  EXPECT_TRUE(object_->is_bypassed());
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, BindPasidEvent{Nested()}}));
}

TEST_F(VtdIommuBindingsTest, AnEntryThatGoesOrChangesIsUnbound) {
  iommu_->add_device(kSource);
  BindNested();
  Listen({.kinds = IommuEventKind::kBindPasid | IommuEventKind::kUnbindPasid});
  listener_.take();
  Invalidate(0x0001'2345'0042'0017);
  EXPECT_THAT(listener_.take(), IsEmpty()) << "nothing has changed";
  Put(kEntryAt + 16, 0x40'0001);  // SRE
  Invalidate(0x0001'2345'0042'0017);
  PasidBinding changed = Nested();
  changed.takes_supervisors = true;
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, UnbindPasidEvent{Nested()}},
                                            IommuEvent{kSpace, BindPasidEvent{changed}}));
  Put(kEntryAt, kNested & ~uint64_t{1});
  Invalidate(0x0001'2345'0042'0017);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, UnbindPasidEvent{changed}}));
}

TEST_F(VtdIommuBindingsTest, ThePasidOfRequestsWithoutOneIsASpaceOfItsOwn) {
  iommu_->add_device(kSource);
  Listen({.kinds = IommuEventKind::kBindPasid | IommuEventKind::kUnbindPasid});
  BindRid();
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kRidSpace, BindPasidEvent{Second()}}));
  Put(kContextAt + 8, kPasid);  // another PASID is that one now
  Put(kEntryAt, kNested);
  Invalidate(0x0000'3a91'0000'0031);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kRidSpace, UnbindPasidEvent{Second()}},
                                            IommuEvent{{kSource, 0}, BindPasidEvent{Second()}},
                                            IommuEvent{kRidSpace, BindPasidEvent{Nested()}}));
}

TEST_F(VtdIommuBindingsTest, InvalidationsOfADomainOrOfAllLookAtAllEntries) {
  iommu_->add_device(kSource);
  Listen({.kinds = IommuEventKind::kBindPasid | IommuEventKind::kUnbindPasid});
  Put(kEntryAt, kNested);
  Put(kRidEntryAt, kSecondOnly);
  Invalidate(0x42'0007);
  EXPECT_EQ(listener_.take().size(), 2);
  Put(kEntryAt, 0);
  Put(kRidEntryAt, 0);
  Invalidate(0x37);
  EXPECT_EQ(listener_.take().size(), 2);
  EXPECT_TRUE(object_->bindings().empty());
}

TEST_F(VtdIommuBindingsTest, ADeviceOrARootThatComesLaterIsLookedAt) {
  Put(kEntryAt, kNested);
  Listen({.kinds = IommuEventKind::kBindPasid | IommuEventKind::kUnbindPasid});
  iommu_->add_device(kSource);
  iommu_->add_device(kSource);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, BindPasidEvent{Nested()}}));
  iommu_->set_root(0);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, UnbindPasidEvent{Nested()}}));
  iommu_->set_root(kRoot);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, BindPasidEvent{Nested()}}));
  Put(kContextAt, 0);
  Invalidate(0x0000'3a92'0000'0031);
  EXPECT_THAT(listener_.take(), IsEmpty()) << "another device";
  Invalidate(0x0000'3a91'0000'0031);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, UnbindPasidEvent{Nested()}}));
}

TEST_F(VtdIommuBindingsTest, EntriesThatAreNoneAreNotBound) {
  iommu_->add_device(kSource);
  Listen();
  for (const uint64_t q0 : {kNested & ~uint64_t{1}, kNested | 1 << 10, kNested | 0x140}) {
    Put(kEntryAt, q0);
    Invalidate(0x0001'2345'0042'0017);
    Invalidate(0x37);
  }
  EXPECT_THAT(listener_.take(), IsEmpty());
}

TEST_F(VtdIommuBindingsTest, PasidCacheInvalidationsAreToldToThoseThatAreBound) {
  iommu_->add_device(kSource);
  BindNested();
  BindRid();
  Listen({.kinds = static_cast<IommuEventKinds>(IommuEventKind::kPasidCache)});
  const IommuEvent nested{kSpace, PasidCacheEvent{}};
  const IommuEvent rid{kRidSpace, PasidCacheEvent{}};
  Invalidate(0x0001'2345'0042'0017);
  EXPECT_THAT(listener_.take(), ElementsAre(nested));
  Invalidate(0x0001'2345'0043'0017);
  EXPECT_THAT(listener_.take(), IsEmpty());
  Invalidate(0x43'0007);
  EXPECT_THAT(listener_.take(), ElementsAre(rid));
  Invalidate(0x37);
  EXPECT_THAT(listener_.take(), ElementsAre(rid, nested));
}

TEST_F(VtdIommuBindingsTest, PasidIotlbInvalidationsAreToldWithTheirRange) {
  iommu_->add_device(kSource);
  BindNested();
  Listen();
  listener_.take();
  const IovaRange pages = MakeRange(0x7f12'3456'0000, 0x1'0000);
  Invalidate(0x0001'2345'0042'0036, 0x7f12'3456'0044);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, UnmapEvent{pages}},
                                            IommuEvent{kSpace, PasidIotlbEvent{pages, true}}));
  Invalidate(0x0001'2345'0042'0026);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, UnmapEvent{All()}},
                                            IommuEvent{kSpace, PasidIotlbEvent{All(), false}}));
  Invalidate(0x0001'2345'0043'0026);
  Invalidate(0x0001'2346'0042'0026);
  EXPECT_THAT(listener_.take(), IsEmpty());
}

TEST_F(VtdIommuBindingsTest, IotlbInvalidationsUnmapPagesOfTheSecondStageAlone) {
  iommu_->add_device(kSource);
  BindNested();
  BindRid();
  Listen();
  listener_.take();
  Invalidate(0x43'0032, 0x567'8000);
  EXPECT_THAT(listener_.take(),
              ElementsAre(IommuEvent{kRidSpace, UnmapEvent{MakeRange(0x567'8000, 0x1000)}}));
  Invalidate(0x42'0032, 0x567'8000);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, UnmapEvent{All()}},
                                            IommuEvent{kSpace, PasidIotlbEvent{All(), false}}));
  Invalidate(0x12);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kRidSpace, UnmapEvent{All()}},
                                            IommuEvent{kSpace, UnmapEvent{All()}},
                                            IommuEvent{kSpace, PasidIotlbEvent{All(), false}}));
  Invalidate(0x44'0022);
  EXPECT_THAT(listener_.take(), IsEmpty());
}

TEST_F(VtdIommuBindingsTest, DeviceTlbInvalidationsGoToTheDevice) {
  iommu_->add_device(kSource);
  BindNested();
  BindRid();
  Listen({.kinds = static_cast<IommuEventKinds>(IommuEventKind::kDeviceTlbUnmap)});
  const DeviceTlbUnmapEvent pages{MakeRange(0x7f12'3456'0000, 0x1'0000)};
  Invalidate(0x0000'3a91'0010'0003, 0x7f12'3456'7001);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kRidSpace, pages}));
  Invalidate(0x0001'2345'3a91'0108, 0x7f12'3456'7800);
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, pages}));
  Invalidate(0x0000'0000'3a91'0108, 0x7f12'3456'7801);  // of all PASIDs
  EXPECT_THAT(listener_.take(), ElementsAre(IommuEvent{kSpace, pages}));
  Invalidate(0x0000'3a92'0010'0003, 0x7f12'3456'7001);
  EXPECT_THAT(listener_.take(), IsEmpty()) << "not behind this unit";
}

TEST_F(VtdIommuBindingsTest, PagesAreRequestedAndAnswered) {
  iommu_->add_device(kSource);
  BindNested();
  Listen({.kinds = IommuEventKind::kPageRequest | IommuEventKind::kPageResponse});
  EXPECT_TRUE(Translate());
  EXPECT_EQ(iommu_->cached().pages, 1);
  EXPECT_TRUE(RequestPage(Request(kGva, Access::kReadWrite), 0x1a5));
  EXPECT_EQ(iommu_->cached().pages, 0) << "what is known of it may be old";
  EXPECT_EQ(page_request_events_, 1);
  EXPECT_EQ(Get(kPageRequests), 0x0001'2345'3a91'0101u) << "as in seed-systems 2.7";
  EXPECT_EQ(Get(kPageRequests + 8), 0x7f12'3456'7d2fu);
  EXPECT_TRUE(asking_.answers.empty());
  Invalidate(0x0001'2345'3a91'1019, 0xd2c);
  EXPECT_THAT(listener_.take(),
              ElementsAre(IommuEvent{kSpace, PageRequestEvent{Iova(kGva & ~kPageMask),
                                                              Access::kReadWrite, 0x1a5, true}},
                          IommuEvent{kSpace, PageResponseEvent{0x1a5, FaultAnswer::kInvalid}}));
  EXPECT_EQ(asking_.answers, (std::vector{std::pair{0x1a5u, FaultAnswer::kInvalid}}));
  Invalidate(0x0001'2345'3a91'1019, 0xd2c);
  EXPECT_EQ(asking_.answers.size(), 1u) << "nobody waits any more";
  listener_.take();
  Invalidate(0x0001'2345'3a92'1019, 0xd2c);
  EXPECT_THAT(listener_.take(), IsEmpty()) << "not behind this unit";
}

TEST_F(VtdIommuBindingsTest, AGroupIsAskedForInOrderAndAnsweredOnce) {
  iommu_->add_device(kSource);
  BindNested();
  Listen({.kinds = IommuEventKind::kPageRequest | IommuEventKind::kPageResponse});
  const FaultGroup group{.device = kSource,
                         .pasid = kPasid,
                         .id = 7,
                         .requests = {{.rights = kFaultWrite, .address = kGva},
                                      {.rights = kFaultRead, .address = kGva + kPageSize}}};
  EXPECT_THAT(iommu_->submit(group, &asking_), mvgpu::testing::IsOk());
  EXPECT_THAT(iommu_->submit(group, &asking_), mvgpu::testing::FailsWith(ErrorCode::kBusy));
  const Iova page(kGva & ~kPageMask);
  const IommuEvent first{kSpace, PageRequestEvent{page, Access::kWrite, 7, false}};
  const IommuEvent last{kSpace, PageRequestEvent{page + kPageSize, Access::kRead, 7, true}};
  EXPECT_THAT(listener_.take(),
              ElementsAre(first, last, first, last,
                          IommuEvent{kSpace, PageResponseEvent{7, FaultAnswer::kInvalid}}))
      << "what is refused is answered for those who heard of it";
  EXPECT_EQ(iommu_->page_requests().tail(), 64u);
  Invalidate(0x0001'2345'3a91'0019, 7 << 3 | 4);
  EXPECT_EQ(asking_.answers, (std::vector{std::pair{7u, FaultAnswer::kSuccess}}));
  EXPECT_THAT(iommu_->submit(group, &asking_), mvgpu::testing::IsOk());
  EXPECT_EQ(iommu_->page_requests().drop(kSource), 1u) << "a reset of the device";
  EXPECT_EQ(asking_.answers.size(), 2u);
}

TEST_F(VtdIommuBindingsTest, NumbersThatNoDeviceHasAreRefused) {
  for (const FaultGroup& group :
       {FaultGroup{.device = 0x1'0000, .pasid = kPasid, .id = 1, .requests = {{.address = kGva}}},
        FaultGroup{.device = kSource, .pasid = 0x10'0000, .id = 1, .requests = {{.address = kGva}}},
        FaultGroup{.device = kSource, .pasid = kPasid, .id = 512, .requests = {{.address = kGva}}},
        FaultGroup{.device = kSource, .pasid = kPasid, .id = 1}}) {
    EXPECT_THAT(iommu_->submit(group, &asking_), mvgpu::testing::FailsWith(ErrorCode::kInvalid));
  }
  EXPECT_TRUE(asking_.answers.empty());
}

TEST_F(VtdIommuBindingsTest, PagesOfTheSecondStageAloneAreForgottenToo) {
  iommu_->add_device(kSource);
  BindRid();
  EXPECT_TRUE(iommu_->translate(WithoutPasid(kGpa)));
  EXPECT_TRUE(iommu_->translate(WithoutPasid(0x40'0000)));
  EXPECT_TRUE(RequestPage(WithoutPasid(kGpa), 1));
  EXPECT_EQ(iommu_->cached().pages, 1);
}

TEST_F(VtdIommuBindingsTest, RequestsThatTheContextDoesNotTakeAreFaults) {
  iommu_->add_device(kSource);
  BindNested();
  Put(kContextAt, kContext & ~uint64_t{0x10});
  Listen();
  listener_.take();
  EXPECT_THAT(RequestPage(Request(kGva), 1), mvgpu::testing::FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(iommu_->faults().words(0).high >> 32 & 0xff, 0x47);
  EXPECT_THAT(listener_.take(), IsEmpty());
}

// Four devices of the guest's choice, each with all the PASIDs there are, all in one table.
TEST_F(VtdIommuBindingsTest, AGuestCannotBindMoreThanTheLimit) {
  Make({}, {.mappings = 10, .bindings = 100});
  for (uint64_t i = 0; i < 64; ++i) PutEntry(0x21'0000 + i * 64, kFirstOnly, i, 0x40'0000);
  for (uint64_t at = 0x20'0000; at < 0x20'2000; at += 8) Put(at, 0x21'0001);
  iommu_->add_device(kSource);
  EXPECT_EQ(object_->bindings().size(), 100);
  EXPECT_EQ(iommu_->counters().bindings_refused, 1) << "and it did not try all the others";
  Put(0x20'0000, 0);
  Invalidate(0x37);
  EXPECT_EQ(object_->bindings().size(), 100);
  EXPECT_EQ(object_->binding({kSource, 1}), nullptr);
}

// What the guest binds, a host follows: a listener that came late, in bypass or not, knows what the
// tables say.
TEST_F(VtdIommuBindingsTest, BindingsAreThoseOfTheTablesAfterEachInvalidation) {
  std::mt19937_64 random(11);
  iommu_->add_device(kSource);
  Put(kDirectoryAt, 0x21'0001);
  for (int i = 0; i < 300; ++i) {
    const uint64_t slot = random() % 4;
    const Pasid pasid = (kPasid & ~Pasid{63}) + static_cast<Pasid>(slot);
    const DomainId domain = static_cast<DomainId>(1 + random() % 2);
    const uint64_t q0 = std::array{kNested,      kSecondOnly, kFirstOnly,
                                   kPassThrough, uint64_t{0}, kNested | 1 << 10}[random() % 6];
    PutEntry(0x21'0000 + slot * 64, q0, domain, 0x40'0000);
    iommu_->set_translating(random() % 2 == 0);
    if (random() % 2 == 0) {
      Invalidate(uint64_t{pasid} << 32 | uint64_t{domain} << 16 | 0x17);
    } else {
      Invalidate(uint64_t{domain} << 16 | 0x07);
    }
    for (uint64_t k = 0; k < 64; ++k) {
      const auto table_pasid = static_cast<Pasid>((kPasid & ~Pasid{63}) + k);
      const uint64_t word = Get(0x21'0000 + k * 64);
      const bool is_good = (word & 1) != 0 && (word & 0xc00) == 0;
      const PasidBinding* binding = object_->binding({kSource, table_pasid});
      ASSERT_EQ(binding != nullptr, is_good) << k;
      if (binding == nullptr) continue;
      ASSERT_EQ(static_cast<uint64_t>(binding->translation), word >> 6 & 7);
      ASSERT_EQ(binding->domain, Get(0x21'0000 + k * 64 + 8) & 0xffff);
    }
  }
}

}  // namespace
}  // namespace mvgpu::domain
