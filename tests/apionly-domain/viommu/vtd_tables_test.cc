// The way to a PASID entry, and every condition on it that is a fault.

#include <array>

#include "tests/apionly-domain/viommu/viommu_fixture.h"

namespace mvgpu::domain {
namespace {

class VtdTablesTest : public VtdIommuTest {
 protected:
  // With one word in guest memory changed.
  void ExpectReasonWith(uint64_t at, uint64_t word, VtdReason reason, bool is_hidden = false) {
    const uint64_t before = Get(at);
    Put(at, word);
    const auto result = iommu_->walk(Request(kGva));
    ASSERT_FALSE(result) << std::hex << at << " " << word;
    EXPECT_TRUE(result.error().is(reason)) << result.error().ToString();
    EXPECT_EQ(result.error().is_hidden, is_hidden) << std::hex << at << " " << word;
    EXPECT_EQ(result.error().address, kGva);
    EXPECT_EQ(result.error().stage, 0);
    Put(at, before);
  }
  void ExpectFineWith(uint64_t at, uint64_t word) {
    const uint64_t before = Get(at);
    Put(at, word);
    EXPECT_TRUE(iommu_->walk(Request(kGva))) << std::hex << at << " " << word;
    Put(at, before);
  }
};

TEST_F(VtdTablesTest, VectorLookUp) {
  const VtdTables tables({}, tables_.get());
  const auto context = tables.context({kRoot}, kSource);
  ASSERT_TRUE(context);
  EXPECT_EQ(context->words[0], kContext);
  EXPECT_EQ(context->pasids(), 1u << 20);
  EXPECT_EQ(context->directory(), 0x20'0000);
  const auto entry = tables.pasid_entry(*context, kPasid);
  ASSERT_TRUE(entry);
  EXPECT_EQ(entry->translation(), vtd::Translation::kNested);
  EXPECT_EQ(entry->domain(), kDomain);
  EXPECT_EQ(entry->second_stage(), 0x30'0000);
  EXPECT_EQ(entry->first_stage(), 0x40'0000);
  EXPECT_EQ(entry->second_stage_levels(), 4);
  EXPECT_EQ(entry->first_stage_levels(), 4);
  EXPECT_FALSE(entry->keeps_second_accessed());
  EXPECT_FALSE(entry->takes_supervisors());
}

TEST_F(VtdTablesTest, EachHalfOfARootEntryIsForHalfOfTheFunctions) {
  Put(0x13a0, 0x3001);
  Put(0x3000 + 0x11 * 32, kContext);  // function 0x11 of the same bus
  VtdRequest request = Request(kGva);
  request.source = 0x3a11;
  EXPECT_TRUE(iommu_->walk(request));
  Put(kRootAt, 0);
  EXPECT_TRUE(iommu_->walk(request));
  EXPECT_TRUE(iommu_->walk(Request(kGva)).error().is(VtdReason::kRootNotPresent));
}

TEST_F(VtdTablesTest, RootAddress) {
  iommu_->set_root(0x1000);  // legacy mode
  ExpectRefused(iommu_->walk(Request(kGva)), 0x30);
  iommu_->set_root(0x1000 | 2 << 10);
  ExpectRefused(iommu_->walk(Request(kGva)), 0x30);
  iommu_->set_root(0x1000 | 3 << 10);  // abort mode
  ExpectRefused(iommu_->walk(Request(kGva)), 0, /*is_hidden=*/true);
  iommu_->set_root(uint64_t{1} << 46 | 1 << 10);
  ExpectRefused(iommu_->walk(Request(kGva)), 0x30);
  iommu_->set_root(uint64_t{1} << 45 | 1 << 10);
  ExpectRefused(iommu_->walk(Request(kGva)), 0x38);
  iommu_->set_root(kRoot);
  EXPECT_TRUE(iommu_->walk(Request(kGva)));
}

TEST_F(VtdTablesTest, RootEntry) {
  ExpectReasonWith(kRootAt, 0x2000, VtdReason::kRootNotPresent);
  ExpectReasonWith(kRootAt, 0, VtdReason::kRootNotPresent);
  for (unsigned bit = 1; bit < 12; ++bit) {
    ExpectReasonWith(kRootAt, 0x2001 | uint64_t{1} << bit, VtdReason::kRootReserved);
  }
  for (unsigned bit = 46; bit < 64; ++bit) {
    ExpectReasonWith(kRootAt, 0x2001 | uint64_t{1} << bit, VtdReason::kRootReserved);
  }
}

TEST_F(VtdTablesTest, ContextEntry) {
  ExpectReasonWith(kRootAt, 0x2000'0000'0001, VtdReason::kContextAccess);
  ExpectReasonWith(kContextAt, kContext & ~uint64_t{1}, VtdReason::kContextNotPresent);
  for (unsigned bit = 0; bit < 256; ++bit) {
    const bool is_reserved = (bit >= 5 && bit <= 8) || (bit >= 46 && bit < 64) || bit >= 64 + 21;
    if (!is_reserved) continue;
    const uint64_t at = kContextAt + bit / 64 * 8;
    ExpectReasonWith(at, Get(at) | uint64_t{1} << bit % 64, VtdReason::kContextReserved);
  }
  ExpectFineWith(kContextAt + 8, 0x1f'ffff);
}

TEST_F(VtdTablesTest, RequestsThatTheContextDoesNotTake) {
  ExpectReasonWith(kContextAt, kContext & ~uint64_t{8}, VtdReason::kNoPasids);
  // 2^7 entries of the directory are enough for 0x2000 PASIDs, 2^12 for 0x40000.
  ExpectReasonWith(kContextAt, kContext & ~uint64_t{0xe00}, VtdReason::kPasidTooLarge);
  ExpectReasonWith(kContextAt, (kContext & ~uint64_t{0xe00}) | 3 << 9, VtdReason::kPasidTooLarge);
  ExpectFineWith(kContextAt, (kContext & ~uint64_t{0xe00}) | 4 << 9);
  VtdRequest request = Request(kGva);
  request.pasid = 1u << 20;
  ExpectRefused(iommu_->walk(request), 0x46);

  Put(kContextAt, kContext & ~uint64_t{0x14});  // neither DTE nor PRE
  EXPECT_TRUE(iommu_->walk(Request(kGva)));
  request = Request(kGva);
  request.kind = VtdRequest::Kind::kTranslation;
  ExpectRefused(iommu_->walk(request), 0x44);
  request.kind = VtdRequest::Kind::kPage;
  ExpectRefused(iommu_->walk(request), 0x47);
  Put(kContextAt, kContext);
  EXPECT_TRUE(iommu_->walk(request));
}

TEST_F(VtdTablesTest, RequestsWithoutPasidUseTheOneOfTheContext) {
  ExpectTarget(iommu_->walk(WithoutPasid(kGpa)), kGpa + kOffset);
  Put(kContextAt + 8, kPasid);
  ExpectTarget(iommu_->walk(WithoutPasid(kGva)), kGpa + kOffset);
  Put(kContextAt, kContext & ~uint64_t{0xe00});
  ExpectRefused(iommu_->walk(WithoutPasid(kGva)), 0x48);
  Put(kContextAt + 8, 0);
  Put(kContextAt, kContext & ~uint64_t{8});
  EXPECT_TRUE(iommu_->walk(WithoutPasid(kGpa))) << "PASIDE is not asked";
}

TEST_F(VtdTablesTest, RequestsWithoutPasidAreASupervisorsIfTheContextSaysSo) {
  Put(kContextAt + 8, kPasid);
  Put(kFirstLeafAt, Get(kFirstLeafAt) & ~uint64_t{4});
  ExpectRefused(iommu_->walk(WithoutPasid(kGva)), 0x81);
  Put(kContextAt + 8, kPasid | 1 << 20);
  EXPECT_TRUE(iommu_->walk(WithoutPasid(kGva)));
}

TEST_F(VtdTablesTest, PasidDirectoryEntry) {
  ExpectReasonWith(kContextAt, (kContext & 0xfff) | 0x7000'0000, VtdReason::kDirectoryAccess);
  ExpectReasonWith(kDirectoryAt, 0x21'0000, VtdReason::kDirectoryNotPresent);
  for (unsigned bit = 2; bit < 64; ++bit) {
    if (bit >= 12 && bit < 46) continue;
    ExpectReasonWith(kDirectoryAt, 0x21'0001 | uint64_t{1} << bit, VtdReason::kDirectoryReserved);
  }
}

TEST_F(VtdTablesTest, PasidEntry) {
  ExpectReasonWith(kDirectoryAt, 0x7000'0001, VtdReason::kPasidAccess);
  ExpectReasonWith(kEntryAt, kNested & ~uint64_t{1}, VtdReason::kPasidNotPresent);
  for (unsigned bit = 0; bit < 512; ++bit) {
    const bool is_reserved = bit == 10 || bit == 11 || (bit >= 64 + 16 && bit <= 64 + 22) ||
                             (bit >= 128 + 7 && bit <= 128 + 11) || bit >= 192;
    if (!is_reserved) continue;
    const uint64_t at = kEntryAt + bit / 64 * 8;
    ExpectReasonWith(at, Get(at) | uint64_t{1} << bit % 64, VtdReason::kPasidReserved);
  }
  ExpectFineWith(kEntryAt + 8, 0xffff'ffff'ff80'0042);
  ExpectFineWith(kEntryAt + 16, 0x40'0073);
}

TEST_F(VtdTablesTest, TranslationTypesAndWidthsThatDoNotExist) {
  for (uint64_t pgtt = 0; pgtt < 8; ++pgtt) {
    const uint64_t word = (kNested & ~uint64_t{0x1c0}) | pgtt << 6;
    if (pgtt >= 1 && pgtt <= 4) continue;
    ExpectReasonWith(kEntryAt, word, VtdReason::kPasidInvalid);
  }
  for (uint64_t aw = 0; aw < 8; ++aw) {
    if (aw >= 1 && aw <= 3) continue;
    ExpectReasonWith(kEntryAt, (kNested & ~uint64_t{0x1c}) | aw << 2, VtdReason::kPasidInvalid);
    ExpectReasonWith(kEntryAt, (kSecondOnly & ~uint64_t{0x1c}) | aw << 2, VtdReason::kPasidInvalid);
  }
  for (const uint64_t fspm : {2, 3}) {
    ExpectReasonWith(kEntryAt + 16, 0x40'0000 | fspm << 2, VtdReason::kPasidInvalid);
  }
}

TEST_F(VtdTablesTest, WidthsThatTheUnitHasNot) {
  Make({.abilities = {.has_five_levels = false, .has_three_levels = false}});
  ExpectReasonWith(kEntryAt + 16, 0x40'0004, VtdReason::kPasidInvalid);
  for (const uint64_t aw : {1, 3}) {
    ExpectReasonWith(kEntryAt, (kNested & ~uint64_t{0x1c}) | aw << 2, VtdReason::kPasidInvalid);
  }
  EXPECT_TRUE(iommu_->walk(Request(kGva)));
}

TEST_F(VtdTablesTest, SupervisorsAndExecutionMustBeEnabled) {
  ExpectRefused(iommu_->walk(Request(kGva, Wanted(kMayRead, true))), 0x5d);
  ExpectRefused(iommu_->walk(Request(kGva, Wanted(kMayExecute, false))), 0x5c);
  Put(kEntryAt + 16, 0x40'0003);
  EXPECT_TRUE(iommu_->walk(Request(kGva, Wanted(kMayRead, true))));
  ExpectRefused(iommu_->walk(Request(kGva, Wanted(kMayExecute, false))), 0x82);
}

TEST_F(VtdTablesTest, FaultsAreHiddenByWhatLiesAboveThem) {
  constexpr uint64_t kHide = 2;
  ExpectReasonWith(kContextAt, (kContext | kHide) & ~uint64_t{1}, VtdReason::kContextNotPresent,
                   true);
  ExpectReasonWith(kContextAt, (kContext | kHide) & ~uint64_t{8}, VtdReason::kNoPasids, true);
  ExpectReasonWith(kDirectoryAt, kHide, VtdReason::kDirectoryNotPresent, true);
  ExpectReasonWith(kEntryAt, kHide, VtdReason::kPasidNotPresent, true);
  for (const auto& [at, word] : std::map<uint64_t, uint64_t>{
           {kContextAt, kContext}, {kDirectoryAt, 0x21'0001}, {kEntryAt, kNested}}) {
    Put(at, word | kHide);
    ExpectReasonWith(kEntryAt + 24, 1, VtdReason::kPasidReserved, true);
    Put(kFirstLeafAt, 0);
    ExpectRefused(iommu_->walk(Request(kGva)), 0x71, /*is_hidden=*/true);
    Put(kFirstLeafAt, 0x8000'0000'0567'8067);
    ExpectRefused(iommu_->walk(Request(kGva, Wanted(kMayRead, true))), 0x5d, true);
    Put(at, word);
  }
  Put(kFirstLeafAt, 0);
  ExpectRefused(iommu_->walk(Request(kGva)), 0x71, /*is_hidden=*/false);
}

TEST(VtdFaultTest, EveryReasonHasAName) {
  for (const uint8_t reason :
       std::array<uint8_t, 11>{0x30, 0x38, 0x41, 0x45, 0x52, 0x5d, 0x70, 0x7b, 0x81, 0x87, 0x91}) {
    EXPECT_FALSE(VtdReasonName(reason).empty()) << int{reason};
  }
  EXPECT_TRUE(VtdReasonName(0xff).empty());
  EXPECT_EQ((VtdFault{.reason = 0x41, .address = 0x1000}).ToString(),
            "0x41 (context entry not present) for device address 0x1000, stage 0 with 0x0");
}

}  // namespace
}  // namespace mvgpu::domain
