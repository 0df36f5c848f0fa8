#include "apionly-domain/nested/zpci_table.h"

#include <array>

#include "tests/apionly-domain/nested/nested_fixture.h"
#include "tests/apionly-domain/nested/zpci_builder.h"

namespace mvgpu::domain {
namespace {

constexpr uint64_t kTwoGiB = uint64_t{2} << 30;

// The tables of the vectors: IOTA 0x100804, a segment table at 0x104000, a page table at 0x108000.
class ZpciTableTest : public NestedTest {
 protected:
  static constexpr uint64_t kIota = 0x10'0804;

  void SetUp() override {
    NestedTest::SetUp();
    walker_ = std::make_unique<ZpciTable>(tables_.get());
    FillInvalid(0x10'0000, 2048, 0x20);
    FillInvalid(0x10'4000, 2048, 0x20);
    FillInvalid(0x10'8000, 256, 0x400);
    Put(0x10'0010, 0x0000'0000'0010'4007);
    Put(0x10'51a0, 0x0000'0000'0010'8000);
    Put(0x10'82b0, 0x0abc'd000);
    Put(0x10'82b8, 0x0abc'e200);
    Put(0x10'82c0, 0x400);
    Put(0x10'82c8, 0);
    Put(0x10'51a8, 0x5ff0'0400);
  }
  void Put(uint64_t address, uint64_t entry) { ram_.put(address, __builtin_bswap64(entry)); }
  void FillInvalid(uint64_t table, uint64_t entries, uint64_t empty) {
    for (uint64_t i = 0; i < entries; ++i) Put(table + i * 8, empty);
  }
  WalkResult Walk(uint64_t address, Wanted wanted = Access::kRead, uint64_t iota = kIota) {
    return walker_->walk(iota, address, wanted);
  }
  void ExpectFault(const WalkResult& result, FaultCode code, uint8_t level, uint64_t span) {
    ASSERT_FALSE(result.has_value());
    EXPECT_EQ(result.error().code, code) << result.error().ToString();
    EXPECT_EQ(result.error().level, level);
    EXPECT_EQ(result.error().span, span);
    EXPECT_EQ(result.error().stage, 1);
  }

  std::unique_ptr<ZpciTable> walker_;
};

TEST_F(ZpciTableTest, VectorRegionEntryBytesAreBigEndian) {
  const std::array<uint8_t, 8> bytes{0x00, 0x00, 0x00, 0x00, 0x00, 0x10, 0x40, 0x07};
  EXPECT_EQ((ram_.get<std::array<uint8_t, 8>>(0x10'0010)), bytes);
}

TEST_F(ZpciTableTest, VectorWalkOfAWritablePage) {
  const auto leaf = Walk(0x1'2345'6789, Access::kReadWrite);
  ASSERT_TRUE(leaf) << leaf.error().ToString();
  EXPECT_EQ(*leaf, (Leaf{0x0abc'd789, 4096, kMayRead | kMayWrite}));
}

TEST_F(ZpciTableTest, VectorWalkOfAReadOnlyPage) {
  const auto leaf = Walk(0x1'2345'7000);
  ASSERT_TRUE(leaf);
  EXPECT_EQ(*leaf, (Leaf{0x0abc'e000, 4096, kMayRead}));
  ExpectFault(Walk(0x1'2345'7000, Access::kWrite), FaultCode::kNoWrite, 0, 4096);
}

TEST_F(ZpciTableTest, VectorInvalidPageIsAHoleOf4K) {
  ExpectFault(Walk(0x1'2345'8000), FaultCode::kNotPresent, 0, 4096);
}

TEST_F(ZpciTableTest, VectorPageEntryOfValueZeroIsAnError) {
  ExpectFault(Walk(0x1'2345'9000), FaultCode::kNullEntry, 0, 4096);
}

TEST_F(ZpciTableTest, VectorSegmentFrameOf1M) {
  const auto leaf = Walk(0x1'2355'6789, Access::kReadWrite);
  ASSERT_TRUE(leaf);
  EXPECT_EQ(*leaf, (Leaf{0x5ff5'6789, 1 << 20, kMayRead | kMayWrite}));
}

TEST_F(ZpciTableTest, VectorRegionEntryOfLength2) {
  Put(0x10'0010, 0x11'0006);
  ExpectFault(Walk(0x1'2345'6789), FaultCode::kTableLength, 2, kTwoGiB);
}

TEST_F(ZpciTableTest, VectorRegionEntryOfAnotherType) {
  Put(0x10'0010, 0x11'000b);
  ExpectFault(Walk(0x1'2345'6789), FaultCode::kTableType, 2, kTwoGiB);
}

TEST_F(ZpciTableTest, VectorInvalidRegionEntryIsAHoleOf2G) {
  Put(0x10'0010, 0x20);
  ExpectFault(Walk(0x1'2345'6789), FaultCode::kNotPresent, 2, kTwoGiB);
}

TEST_F(ZpciTableTest, VectorFiveLevelIndexes) {
  // 0x0123456789abc000: RFX 0x9, RSX 0xd1, RTX 0x2cf, SX 0x9a, PX 0xbc.
  constexpr uint64_t kRf = 0x11'0000;
  constexpr uint64_t kRs = 0x11'4000;
  constexpr uint64_t kRt = 0x11'8000;
  constexpr uint64_t kSt = 0x11'c000;
  constexpr uint64_t kPt = 0x12'0000;
  Put(kRf + 0x9 * 8, kRs | 0xf);
  Put(kRs + 0xd1 * 8, kRt | 0xb);
  Put(kRt + 0x2cf * 8, kSt | 0x7);
  Put(kSt + 0x9a * 8, kPt);
  Put(kPt + 0xbc * 8, 0x0abc'd000);
  const auto leaf = Walk(0x0123'4567'89ab'c123, Access::kReadWrite, kRf | 0x80c);
  ASSERT_TRUE(leaf) << leaf.error().ToString();
  EXPECT_EQ(leaf->out, 0x0abc'd123);
}

TEST_F(ZpciTableTest, TableOffsetMustBeZero) {
  Put(0x10'0010, 0x10'4047);
  ExpectFault(Walk(0x1'2345'6789), FaultCode::kTableLength, 2, kTwoGiB);
}

TEST_F(ZpciTableTest, SegmentEntryOfARegionTypeIsAnError) {
  Put(0x10'51a0, 0x10'8004);
  ExpectFault(Walk(0x1'2345'6789), FaultCode::kTableType, 1, 1 << 20);
}

TEST_F(ZpciTableTest, ATableAtAddressZeroIsAnError) {
  Put(0x10'0010, 0x7);
  ExpectFault(Walk(0x1'2345'6789), FaultCode::kTableType, 2, kTwoGiB);
}

// QEMU calls this an error.
TEST_F(ZpciTableTest, AProtectedPageOfFrameZeroIsAPage) {
  Put(0x10'82b0, 0x200);
  const auto leaf = Walk(0x1'2345'6789);
  ASSERT_TRUE(leaf);
  EXPECT_EQ(*leaf, (Leaf{0x789, 4096, kMayRead}));
}

TEST_F(ZpciTableTest, ProtectionCountsAtEveryLevel) {
  for (const auto& [address, entry] : std::map<uint64_t, uint64_t>{
           {0x10'0010, 0x10'4207}, {0x10'51a0, 0x10'8200}, {0x10'82b0, 0x0abc'd200}}) {
    const auto before = ram_.get<uint64_t>(address);
    EXPECT_TRUE(Walk(0x1'2345'6789, Access::kWrite));
    Put(address, entry);
    EXPECT_FALSE(Walk(0x1'2345'6789, Access::kWrite)) << std::hex << address;
    EXPECT_TRUE(Walk(0x1'2345'6789, Access::kRead)) << std::hex << address;
    ram_.put(address, before);
  }
  EXPECT_FALSE(Walk(0x1'2345'6789, Access::kWrite, kIota | 0x200));
}

TEST_F(ZpciTableTest, EveryDesignationCoversItsOwnWidth) {
  struct Case {
    uint64_t iota;
    unsigned width;
  };
  for (const Case c : {Case{0x10'8000 | 0x81c, 20}, Case{0x10'4000 | 0x800, 31},
                       Case{0x10'0000 | 0x804, 42}, Case{0x10'0000 | 0x808, 53}}) {
    const auto inside = Walk((uint64_t{1} << c.width) - 4096, Access::kRead, c.iota);
    ASSERT_FALSE(inside);
    EXPECT_NE(inside.error().code, FaultCode::kInputRange) << std::hex << c.iota;
    const auto outside = Walk(uint64_t{1} << c.width, Access::kRead, c.iota);
    ASSERT_FALSE(outside);
    EXPECT_EQ(outside.error().code, FaultCode::kInputRange) << std::hex << c.iota;
  }
}

TEST_F(ZpciTableTest, ASegmentTableOrAPageTableMayBeTheFirst) {
  const auto by_segment = Walk(0x2345'6789, Access::kRead, 0x10'4000 | 0x800);
  ASSERT_TRUE(by_segment);
  EXPECT_EQ(by_segment->out, 0x0abc'd789);
  const auto by_page = Walk(0x5'6789, Access::kRead, 0x10'8000 | 0x81c);
  ASSERT_TRUE(by_page);
  EXPECT_EQ(by_page->out, 0x0abc'd789);
}

TEST_F(ZpciTableTest, APageFrameNeedsNoTables) {
  const uint64_t frame = uint64_t{5} << 31;
  const auto leaf = Walk(0x7654'3210, Access::kReadWrite, frame | 0x812);
  ASSERT_TRUE(leaf);
  EXPECT_EQ(*leaf, (Leaf{frame + 0x7654'3210, kTwoGiB, kMayRead | kMayWrite}));
  EXPECT_FALSE(Walk(kTwoGiB, Access::kRead, frame | 0x812));
  EXPECT_FALSE(Walk(0, Access::kRead, frame | 0x813));  // no such size
  EXPECT_FALSE(Walk(0, Access::kWrite, frame | 0xa12));
  EXPECT_TRUE(Walk(0, Access::kRead, frame | 0xa12));
}

TEST_F(ZpciTableTest, ARootWithoutTranslationOrOfNoTypeIsRefused) {
  for (const uint64_t iota : {0x10'0004, 0x10'0814, 0x10'0818, 0x10'0010}) {
    const auto result = Walk(0, Access::kRead, iota);
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, FaultCode::kBadRoot) << std::hex << iota;
  }
}

TEST_F(ZpciTableTest, TablesOutsideOfGuestMemoryAreFaults) {
  Put(0x10'0010, 0x7fff'ffff'ffff'c007);
  ExpectFault(Walk(0x1'2345'6789), FaultCode::kTableAccess, 1, 1 << 20);
  const auto root = Walk(0x1'2345'6789, Access::kRead, 0xffff'ffff'ffff'c804);
  ExpectFault(root, FaultCode::kTableAccess, 2, kTwoGiB);
}

TEST_F(ZpciTableTest, TablesThatPointToThemselvesEnd) {
  Put(0x10'0010, 0x10'0007);  // the region table as a segment table
  EXPECT_FALSE(Walk(0x1'2345'6789));
}

TEST_F(ZpciTableTest, PagesOfOneTableAreReadTogether) {
  std::array<PageWord, 512> words;
  words.fill(1);
  const Stretch stretch = walker_->walk_pages(kIota, 0x1'2345'6000, words);
  EXPECT_EQ(stretch.pages, 3);
  EXPECT_FALSE(stretch.is_hole);
  EXPECT_EQ(words[0], 0x0abc'd003);
  EXPECT_EQ(words[1], 0x0abc'e001);
  EXPECT_EQ(words[2], 0);
  ASSERT_TRUE(stretch.fault);
  EXPECT_EQ(stretch.fault->code, FaultCode::kNullEntry);
  EXPECT_EQ(stretch.fault->device_address, 0x1'2345'9000);
  EXPECT_EQ(stretch.fault_pages, 1);
}

TEST_F(ZpciTableTest, AHoleEndsWhereItsEntryDoes) {
  std::array<PageWord, 512> words;
  Put(0x10'0010, 0x20);
  const Stretch stretch = walker_->walk_pages(kIota, 0x1'2345'6000, words);
  EXPECT_TRUE(stretch.is_hole);
  EXPECT_EQ(BytesIn(stretch.pages), 0x1'8000'0000 - 0x1'2345'6000);
}

TEST_F(ZpciTableTest, PagesOfASegmentFrameGoOnToItsEnd) {
  std::array<PageWord, 512> words;
  const Stretch stretch = walker_->walk_pages(kIota, 0x1'235f'e000, words);
  EXPECT_EQ(stretch.pages, 2);
  EXPECT_EQ(words[0], 0x5fff'e003);
  EXPECT_EQ(words[1], 0x5fff'f003);
}

}  // namespace
}  // namespace mvgpu::domain
