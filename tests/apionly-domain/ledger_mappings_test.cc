// The lists of mappings in the ledger, and questions about single pages and addresses.

#include <fcntl.h>

#include <atomic>
#include <thread>
#include <vector>

#include "apionly-domain/accounting/ledger_lookup.h"
#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::FailsWith;
using ::mvgpu::testing::IsOk;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr uint64_t kMiB = 1u << 20;
constexpr uint32_t kPlaces = 16384;  // ledger_format.h, of one row

LedgerMapping MappingAt(uint64_t iova, uint64_t size, uint64_t offset,
                        const FileIdentity& file = kRam, Access access = Access::kReadWrite) {
  return {*IovaRange::FromStartAndSize(Iova(iova), size), access, file, offset};
}

IovaRange RangeAt(uint64_t iova, uint64_t size) {
  return *IovaRange::FromStartAndSize(Iova(iova), size);
}

class LedgerMappingsTest : public LedgerFixture {
 protected:
  UniqueFd OpenToRead() const { return UniqueFd(open(path().c_str(), O_RDONLY | O_CLOEXEC)); }
  RowMappingList Mappings(std::optional<Iova> around = std::nullopt) const {
    const UniqueFd fd = OpenToRead();
    const auto list = ReadMappings(fd.get(), path(), kVm, around);
    EXPECT_THAT(list, IsOk());
    return list ? *list : RowMappingList();
  }
  // The file offset behind an IOVA, by the first row that maps it.
  std::optional<uint64_t> OffsetAt(uint64_t iova) const {
    const RowMappingList list = Mappings(Iova(iova));
    if (list.entries.empty()) return std::nullopt;
    const LedgerMapping& mapping = list.entries[0].mapping;
    return mapping.file_offset + (iova - mapping.iova.start().value());
  }
  PageHolders Holders(uint64_t page, const FileIdentity& file = kRam) const {
    const UniqueFd fd = OpenToRead();
    const auto holders = ReadPageHolders(fd.get(), path(), kVm, file, page);
    EXPECT_THAT(holders, IsOk());
    return holders ? *holders : PageHolders();
  }
};

TEST_F(LedgerMappingsTest, AddressLeadsToTheFileAndPlaceBehindIt) {
  auto ledger = Open();
  auto vgpu = Join(*ledger, "vgpu");
  auto nic = Join(*ledger, "nic");
  EXPECT_THAT(Mappings().entries, IsEmpty());
  vgpu->list_mapping(MappingAt(0, kMiB, 4 * kMiB));
  vgpu->list_mapping(MappingAt(2 * kMiB, kMiB, 0, kOtherRam, Access::kRead));
  nic->list_mapping(MappingAt(0x8000, 0x4000, 0));

  const RowMappingList one = Mappings(Iova(2 * kMiB + 5));
  ASSERT_EQ(one.entries.size(), 1u);
  EXPECT_FALSE(one.in_motion);
  EXPECT_EQ(one.entries[0].row, 0u);
  EXPECT_EQ(one.entries[0].mapping.file, kOtherRam);
  EXPECT_EQ(one.entries[0].mapping.access, Access::kRead);
  EXPECT_EQ(one.entries[0].mapping.iova, RangeAt(2 * kMiB, kMiB));
  EXPECT_EQ(OffsetAt(kMiB - 1), 5 * kMiB - 1);
  EXPECT_EQ(OffsetAt(kMiB), std::nullopt);
  const RowMappingList both = Mappings(Iova(0x9000));
  ASSERT_EQ(both.entries.size(), 2u);
  EXPECT_EQ(both.entries[0].row, 0u);
  EXPECT_EQ(both.entries[1].row, 1u);
  EXPECT_EQ(both.entries[1].mapping.file_offset, 0u);
  EXPECT_EQ(Mappings().entries.size(), 3u);
}

TEST_F(LedgerMappingsTest, WhatIsUnmappedIsGoneAndCutsLeaveTheRest) {
  auto ledger = Open();
  auto row = Join(*ledger);
  row->list_mapping(MappingAt(0, 16 * kMiB, kMiB));
  row->unlist_mapping(RangeAt(4 * kMiB, kMiB));
  EXPECT_EQ(Mappings().entries.size(), 2u);
  EXPECT_EQ(OffsetAt(4 * kMiB - 1), 5 * kMiB - 1);
  EXPECT_EQ(OffsetAt(4 * kMiB), std::nullopt);
  EXPECT_EQ(OffsetAt(5 * kMiB - 1), std::nullopt);
  EXPECT_EQ(OffsetAt(5 * kMiB), 6 * kMiB);
  row->unlist_mapping(RangeAt(0, 4 * kMiB));
  row->unlist_mapping(RangeAt(15 * kMiB, kMiB));
  EXPECT_EQ(OffsetAt(15 * kMiB), std::nullopt);
  EXPECT_EQ(OffsetAt(15 * kMiB - 1), 16 * kMiB - 1);
  ASSERT_EQ(Mappings().entries.size(), 1u);
  row->unlist_mapping(RangeAt(5 * kMiB, 10 * kMiB));
  EXPECT_THAT(Mappings().entries, IsEmpty());
  row->unlist_mapping(RangeAt(5 * kMiB, 10 * kMiB));  // nothing is there
  EXPECT_EQ(Look().rows[0].unlisted_mappings, 0u);
}

TEST_F(LedgerMappingsTest, PlacesAreUsedAgain) {
  auto ledger = Open();
  auto row = Join(*ledger);
  for (uint64_t i = 0; i < 3 * kPlaces; ++i) {
    row->list_mapping(MappingAt(i * kMiB, kMiB, 0));
    if (i >= 2) row->unlist_mapping(RangeAt((i - 2) * kMiB, kMiB));
  }
  EXPECT_EQ(Mappings().entries.size(), 2u);
  EXPECT_EQ(Look().rows[0].unlisted_mappings, 0u);
}

TEST_F(LedgerMappingsTest, WhatDoesNotFitIsCountedAndCountedOffAgain) {
  auto ledger = Open();
  auto row = Join(*ledger);
  for (uint64_t i = 0; i < kPlaces + 3; ++i) row->list_mapping(MappingAt(i * kMiB, kMiB, i * kMiB));
  EXPECT_EQ(Look().rows[0].unlisted_mappings, 3u);
  EXPECT_EQ(Mappings().entries.size(), kPlaces);
  EXPECT_EQ(OffsetAt((kPlaces - 1) * kMiB), (kPlaces - 1) * kMiB);
  EXPECT_EQ(OffsetAt(kPlaces * kMiB), std::nullopt);
  row->unlist_mapping(RangeAt(kPlaces * kMiB, kMiB));  // one of those that did not fit
  EXPECT_EQ(Look().rows[0].unlisted_mappings, 2u);
  row->unlist_mapping(RangeAt(0, kMiB));  // makes room for one
  row->list_mapping(MappingAt(uint64_t{1} << 40, kMiB, 7 * kMiB));
  EXPECT_EQ(OffsetAt(uint64_t{1} << 40), 7 * kMiB);
  EXPECT_EQ(Look().rows[0].unlisted_mappings, 2u);
  ExpectInOrder();
}

TEST_F(LedgerMappingsTest, TheNextOwnerOfARowBeginsWithAnEmptyList) {
  auto ledger = Open();
  auto other = Join(*ledger);
  auto row = Join(*ledger);
  for (uint64_t i = 0; i < 100; ++i) row->list_mapping(MappingAt(i * kMiB, kMiB, 0));
  EXPECT_EQ(Mappings().entries.size(), 100u);
  const auto bytes = ReadBytes().size();
  row.reset();
  EXPECT_THAT(Mappings().entries, IsEmpty());
  row = Join(*ledger);
  EXPECT_THAT(Mappings().entries, IsEmpty());
  row->list_mapping(MappingAt(3 * kMiB, kMiB, 9 * kMiB));
  EXPECT_EQ(OffsetAt(3 * kMiB), 9 * kMiB);
  EXPECT_EQ(Mappings().entries.size(), 1u);
  EXPECT_EQ(ReadBytes().size(), bytes) << "the list took new space";
}

TEST_F(LedgerMappingsTest, ReadersSeeTheListBeforeOrAfterAChange) {
  auto ledger = Open();
  auto row = Join(*ledger);
  std::atomic<bool> done = false;
  // The offset of a mapping always tells its place and size.
  std::thread worker([&] {
    for (uint64_t i = 0; !done; ++i) {
      const uint64_t size = (i % 7 + 1) * kMiB;
      row->list_mapping(MappingAt(64 * kMiB, size, 64 * kMiB + size, {i % 7, i % 7}));
      row->unlist_mapping(RangeAt(64 * kMiB, size));
      std::this_thread::yield();
    }
  });
  int quiet = 0;
  for (int i = 0; i < 2000 || (quiet == 0 && i < 200000); ++i) {
    const RowMappingList list = Mappings(Iova(64 * kMiB));
    if (list.in_motion) continue;
    ++quiet;
    for (const auto& entry : list.entries) {
      const uint64_t size = entry.mapping.iova.size();
      ASSERT_EQ(entry.mapping.file_offset, 64 * kMiB + size);
      ASSERT_EQ(entry.mapping.file.device, size / kMiB - 1);
      ASSERT_EQ(entry.mapping.file.inode, size / kMiB - 1);
    }
  }
  done = true;
  worker.join();
  EXPECT_GT(quiet, 0);
}

TEST_F(LedgerMappingsTest, ChangeOfALivingOwnerThatDoesNotEndIsMotion) {
  auto ledger = Open();
  auto row = Join(*ledger);
  row->list_mapping(MappingAt(0, kMiB, 0));
  EXPECT_FALSE(Mappings().in_motion);
  const UniqueFd file(open(path().c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t odd = 77;
  ASSERT_EQ(pwrite(file.get(), &odd, 8, 4096 + 120), 8);  // mapping_sequence of row 0
  EXPECT_TRUE(Mappings().in_motion);
}

TEST_F(LedgerMappingsTest, HoldersPayerAndNextPayerOfAPageFollowTheRule) {
  auto ledger = Open();
  auto first = Join(*ledger, "first");
  auto second = Join(*ledger, "second");
  auto third = Join(*ledger, "third");
  ASSERT_THAT(third->hold(kRam, 1000, {100, 200}), IsOk());
  ASSERT_THAT(second->hold(kRam, 1000, {150, 50}), IsOk());
  ASSERT_THAT(first->hold(kRam, 1000, {199, 2}), IsOk());

  const PageHolders three = Holders(199);
  EXPECT_THAT(three.rows, ElementsAre(0u, 1u, 2u));
  EXPECT_EQ(three.payer, 2u);       // who came first pays
  EXPECT_EQ(three.next_payer, 0u);  // then the lowest of the others
  EXPECT_EQ(three.file_pages, 1000u);
  EXPECT_FALSE(three.in_motion);
  EXPECT_THAT(Holders(150).rows, ElementsAre(1u, 2u));
  EXPECT_EQ(Holders(150).next_payer, 1u);
  EXPECT_THAT(Holders(100).rows, ElementsAre(2u));
  EXPECT_EQ(Holders(100).next_payer, std::nullopt);
  EXPECT_THAT(Holders(99).rows, IsEmpty());
  EXPECT_EQ(Holders(99).payer, std::nullopt);
  EXPECT_THAT(Holders(uint64_t{1} << 51).rows, IsEmpty());
  EXPECT_EQ(Holders(150, kOtherRam).file_pages, 0u);

  // What is foretold is what comes.
  third->release(kRam, {100, 200});
  EXPECT_EQ(Holders(199).payer, 0u);
  EXPECT_EQ(Holders(150).payer, 1u);
  second->release(kRam, {150, 50});
  first->release(kRam, {199, 2});
}

TEST_F(LedgerMappingsTest, LedgerWithoutARowIsWhatItWillBeWhenThatHasLeft) {
  auto ledger = Open();
  auto a = Join(*ledger);
  auto b = Join(*ledger);
  auto c = Join(*ledger);
  ASSERT_THAT(b->hold(kRam, 100000, {0, 70000}), IsOk());
  ASSERT_THAT(a->hold(kRam, 100000, {1000, 40000}), IsOk());
  ASSERT_THAT(c->hold(kRam, 100000, {30000, 60000}), IsOk());
  const UniqueFd fd = OpenToRead();
  const auto without = ReadLedgerWithout(fd.get(), path(), kVm, 1);
  ASSERT_THAT(without, IsOk());
  b->release(kRam, {0, 70000});
  b.reset();
  const LedgerSnapshot then = Look();
  ASSERT_EQ(without->rows.size(), 2u);
  ASSERT_EQ(then.rows.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(without->rows[i].index, then.rows[i].index);
    EXPECT_EQ(without->rows[i].unique_pages, then.rows[i].unique_pages);
    EXPECT_EQ(without->rows[i].charged_pages, then.rows[i].charged_pages);
  }
  EXPECT_EQ(without->unique_pages, then.unique_pages);
  EXPECT_THAT(ProblemsOf(*without), IsEmpty());
  a->release(kRam, {1000, 40000});
  c->release(kRam, {30000, 60000});
}

TEST_F(LedgerMappingsTest, LookupsOfAnythingButALedgerAreRefused) {
  { auto ledger = Open(); }
  WriteBytes("noise");
  const UniqueFd fd = OpenToRead();
  EXPECT_THAT(ReadMappings(fd.get(), path(), kVm, Iova(0)), FailsWith(ErrorCode::kCorrupt));
  EXPECT_THAT(ReadPageHolders(fd.get(), path(), kVm, kRam, 0), FailsWith(ErrorCode::kCorrupt));
  EXPECT_THAT(ReadLedgerWithout(fd.get(), path(), kVm, 0), FailsWith(ErrorCode::kCorrupt));
}

}  // namespace
}  // namespace mvgpu::domain
