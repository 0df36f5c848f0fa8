#include "apionly-domain/translation/page_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/fakes/guest_ram.h"

namespace mvgpu::domain {

namespace {

using testing::MakeRange;

constexpr uint64_t kGranule = uint64_t{1} << PageDirectory::kGranuleShift;
constexpr uint64_t kChunk = uint64_t{1} << PageDirectory::kChunkShift;
constexpr uint64_t kFar = PageDirectory::kNearChunks * kChunk;
constexpr uint64_t kReadWrite = PageDirectory::kRead | PageDirectory::kWrite;

class PageDirectoryTest : public ::testing::Test {
 protected:
  // A host address; never touched.
  static std::byte* Host(uint64_t address) { return reinterpret_cast<std::byte*>(address); }
  void Map(uint64_t iova, uint64_t size, uint64_t host, uint64_t rights = kReadWrite) {
    directory_.map(MakeRange(iova, size), Host(host), rights);
  }
  void Unmap(uint64_t iova, uint64_t size) { directory_.unmap(MakeRange(iova, size)); }
  std::byte* HostOf(uint64_t iova) const {
    const auto found = directory_.find(Iova(iova));
    return found.flags == 0 ? nullptr : found.host;
  }
  // What one word tells, from an IOVA on.
  uint64_t LeftAt(uint64_t iova) const { return directory_.find(Iova(iova)).left; }
  std::optional<PageDirectory::Stop> Walk(uint64_t iova, uint64_t size,
                                          uint64_t wanted = PageDirectory::kRead) {
    extents_.clear();
    return directory_.walk(MakeRange(iova, size), wanted,
                           [this](auto extent) { extents_.push_back(extent); });
  }

  PageDirectory directory_;
  std::vector<PageDirectory::Extent> extents_;
};

constexpr uint64_t kBase = uint64_t{0x7f} << 40;  // of the host

TEST_F(PageDirectoryTest, TranslatesAtEveryLevelUpToTheEdges) {
  struct Place {
    uint64_t iova, size;
  };
  // A page, a granule, a chunk, all of them ragged; near and far, up to the end.
  for (const Place place :
       {Place{kChunk, kPageSize}, Place{kChunk, kGranule}, Place{kChunk, 2 * kChunk},
        Place{kChunk - kPageSize, 2 * kPageSize}, Place{kGranule - kPageSize, kChunk + kGranule},
        Place{kFar - kGranule - kPageSize, 2 * kGranule}, Place{kFar + 5 * kChunk, kChunk},
        Place{UINT64_MAX - kPageMask, kPageSize},
        Place{~(kChunk + kGranule + kPageSize) + 1, kChunk + kGranule + kPageSize}}) {
    SCOPED_TRACE(place.iova);
    SCOPED_TRACE(place.size);
    Map(place.iova, place.size, kBase);
    const uint64_t last = place.iova + (place.size - 1);
    EXPECT_EQ(HostOf(place.iova), Host(kBase));
    EXPECT_EQ(HostOf(place.iova + 1), Host(kBase + 1));
    EXPECT_EQ(HostOf(last), Host(kBase + place.size - 1));
    EXPECT_EQ(HostOf(place.iova - 1), nullptr);
    if (last != UINT64_MAX) {
      EXPECT_EQ(HostOf(last + 1), nullptr);
    }
    Unmap(place.iova, place.size);
    EXPECT_EQ(HostOf(place.iova), nullptr);
    EXPECT_EQ(HostOf(last), nullptr);
  }
}

TEST_F(PageDirectoryTest, WhatIsWholeCostsNoTable) {
  Map(0, 3 * kChunk, kBase);
  EXPECT_EQ(LeftAt(2 * kChunk), kChunk) << "one word for the chunk";
  Map(4 * kChunk, 8 * kGranule, kBase + 4 * kChunk);
  EXPECT_EQ(LeftAt(4 * kChunk), kGranule) << "a table of granules";
  Map(5 * kChunk, kPageSize, kBase + 5 * kChunk);
  EXPECT_EQ(LeftAt(5 * kChunk), kPageSize) << "and one of pages";
  Unmap(0, 6 * kChunk);
  EXPECT_EQ(directory_.take_retired().size(), 3u);
}

TEST_F(PageDirectoryTest, APageTakenOutOfAChunkLeavesItsNeighbours) {
  Map(kChunk, kChunk, kBase);
  const uint64_t hole = kChunk + 100 * kGranule + 7 * kPageSize;
  Unmap(hole, kPageSize);
  EXPECT_EQ(HostOf(hole - 1), Host(kBase + (hole - 1 - kChunk)));
  EXPECT_EQ(HostOf(hole), nullptr);
  EXPECT_EQ(HostOf(hole + kPageMask), nullptr);
  EXPECT_EQ(HostOf(hole + kPageSize), Host(kBase + (hole + kPageSize - kChunk)));
  EXPECT_EQ(HostOf(kChunk), Host(kBase));
  EXPECT_EQ(HostOf(2 * kChunk - 1), Host(kBase + kChunk - 1));
  Map(hole, kPageSize, kBase + (hole - kChunk));
  EXPECT_FALSE(Walk(kChunk, kChunk));
  EXPECT_EQ(extents_.size(), 1u) << "one piece again, however it is stored";
}

TEST_F(PageDirectoryTest, TablesThatAreEmptyAreHandedOutOnce) {
  Map(kChunk + kPageSize, kPageSize, kBase);
  Unmap(kChunk + kPageSize, kPageSize);
  EXPECT_EQ(directory_.take_retired().size(), 2u);
  EXPECT_TRUE(directory_.take_retired().empty());
  EXPECT_EQ(LeftAt(kChunk), kChunk);
}

TEST_F(PageDirectoryTest, ATableThatComesAgainSaysNothingOfWhatItSaidBefore) {
  for (uint64_t round = 0; round < 8; ++round) {  // more tables than are kept
    Map(round * kChunk + 3 * kPageSize, 7 * kGranule, kBase);
    Unmap(round * kChunk + 3 * kPageSize, 7 * kGranule);
    directory_.recycle(directory_.take_retired());
    Map(round * kChunk, kPageSize, kBase);
    EXPECT_EQ(HostOf(round * kChunk), Host(kBase));
    EXPECT_FALSE(Walk(round * kChunk, kPageSize));
    for (const uint64_t beside : {kPageSize, 3 * kPageSize, kGranule, 2 * kGranule}) {
      EXPECT_EQ(HostOf(round * kChunk + beside), nullptr) << beside;
    }
  }
}

TEST_F(PageDirectoryTest, AWalkMergesWhatContinuesInTheHost) {
  Map(0, kGranule, kBase);
  Map(kGranule, kPageSize, kBase + kGranule);                   // continues
  Map(kGranule + kPageSize, kPageSize, kBase + 64 * kGranule);  // jumps
  Map(kGranule + 2 * kPageSize, kPageSize, kBase + 32 * kGranule);
  EXPECT_FALSE(Walk(0x800, kGranule + 2 * kPageSize));
  ASSERT_EQ(extents_.size(), 3u);
  EXPECT_EQ(extents_[0].iova, MakeRange(0x800, kGranule + kPageSize - 0x800));
  EXPECT_EQ(extents_[0].host, Host(kBase + 0x800));
  EXPECT_EQ(extents_[1].iova, MakeRange(kGranule + kPageSize, kPageSize));
  EXPECT_EQ(extents_[2].iova, MakeRange(kGranule + 2 * kPageSize, 0x800));
}

TEST_F(PageDirectoryTest, AWalkStopsWhereTheRightsEnd) {
  Map(0, 2 * kPageSize, kBase);
  Map(2 * kPageSize, kPageSize, kBase + 2 * kPageSize, PageDirectory::kRead);
  EXPECT_FALSE(Walk(0, 3 * kPageSize, PageDirectory::kRead));
  const auto readonly = Walk(0, 3 * kPageSize, PageDirectory::kWrite);
  ASSERT_TRUE(readonly);
  EXPECT_EQ(readonly->at, Iova(2 * kPageSize));
  EXPECT_EQ(readonly->flags, PageDirectory::kRead);
  ASSERT_EQ(extents_.size(), 1u) << "what came before is told";
  const auto hole = Walk(0, 4 * kPageSize);
  ASSERT_TRUE(hole);
  EXPECT_EQ(hole->at, Iova(3 * kPageSize));
  EXPECT_EQ(hole->flags, 0u);
}

TEST_F(PageDirectoryTest, WhatIsGoingIsNotUsableUntilItStays) {
  Map(0, kChunk, kBase);
  directory_.set_going(MakeRange(kGranule, kPageSize), true);
  EXPECT_TRUE(Walk(0, kChunk));
  EXPECT_FALSE(Walk(0, kGranule));
  EXPECT_FALSE(Walk(kGranule + kPageSize, kGranule));
  EXPECT_NE(directory_.find(Iova(kGranule)).flags & PageDirectory::kGoing, 0u);
  EXPECT_FALSE(PageDirectory::IsUsable(kReadWrite | PageDirectory::kGoing, PageDirectory::kRead));
  directory_.set_going(MakeRange(kGranule, kPageSize), false);
  EXPECT_FALSE(Walk(0, kChunk));
  directory_.set_going(MakeRange(kChunk, kPageSize), true);
  EXPECT_EQ(directory_.find(Iova(kChunk)).flags, 0u) << "what is not there cannot go";
}

// What hits look up, against what everything else does.
TEST_F(PageDirectoryTest, TheNearViewAgreesWithTheWalk) {
  Map(0, kChunk, kBase);
  Map(kChunk, kGranule, kBase + kChunk);
  Map(kChunk + kGranule, kPageSize, kBase, PageDirectory::kRead);
  Map(2 * kChunk, kChunk, kBase + 8 * kChunk, PageDirectory::kRead);
  Map(3 * kChunk, kChunk, kBase + 3 * kChunk);
  directory_.set_going(MakeRange(3 * kChunk, kChunk), true);
  Map(kFar, kChunk, kBase + 5 * kChunk);
  const PageDirectory::Near near(directory_);
  for (const uint64_t wanted : {PageDirectory::kRead, PageDirectory::kWrite, kReadWrite}) {
    for (uint64_t iova = 0x800; iova < 5 * kChunk; iova += kGranule / 2 - kPageSize) {
      std::byte* host = nullptr;
      const bool found = near.find(Iova(iova), wanted, &host);
      ASSERT_EQ(found, !Walk(iova, 1, wanted)) << iova << " " << wanted;
      if (found) {
        ASSERT_EQ(host, HostOf(iova)) << iova;
      }
    }
    std::byte* host = nullptr;
    EXPECT_FALSE(near.find(Iova(kFar), wanted, &host)) << "beyond 16 TiB";
  }
}

TEST_F(PageDirectoryTest, TheNearViewAnswersForRangesThatOneWordCovers) {
  Map(0, 2 * kChunk, kBase);
  Map(2 * kChunk, kGranule, kBase + 2 * kChunk);
  const PageDirectory::Near near(directory_);
  std::byte* host = nullptr;
  EXPECT_TRUE(near.find(MakeRange(kChunk - kGranule, kGranule), kReadWrite, &host));
  EXPECT_EQ(host, Host(kBase + kChunk - kGranule));
  EXPECT_FALSE(near.find(MakeRange(kChunk - kPageSize, 2 * kPageSize), kReadWrite, &host));
  EXPECT_FALSE(near.find(MakeRange(2 * kChunk, kPageSize), kReadWrite, &host)) << "a table";
  EXPECT_FALSE(near.find(MakeRange(4 * kChunk, kPageSize), kReadWrite, &host));
  EXPECT_FALSE(near.find(MakeRange(kFar, kPageSize), kReadWrite, &host));
  directory_.set_going(MakeRange(0, kChunk), true);
  EXPECT_FALSE(near.find(MakeRange(0, kPageSize), kReadWrite, &host));
}

TEST_F(PageDirectoryTest, OnlyAnUnmapMakesANewGenerationAndOnlyNearby) {
  const uint64_t here = directory_.generation(Iova(kChunk));
  const uint64_t there = directory_.generation(Iova(9 * kChunk));
  Map(kChunk, kPageSize, kBase);
  directory_.set_going(MakeRange(kChunk, kPageSize), true);
  directory_.set_going(MakeRange(kChunk, kPageSize), false);
  EXPECT_EQ(directory_.generation(Iova(kChunk)), here);
  Unmap(kChunk, kPageSize);
  EXPECT_NE(directory_.generation(Iova(kChunk)), here);
  EXPECT_NE(directory_.generation(Iova(kChunk + kGranule)), here) << "all of the chunk";
  EXPECT_EQ(directory_.generation(Iova(9 * kChunk)), there);
}

TEST_F(PageDirectoryTest, AnUnmapOverManyChunksTouchesTheGenerationOfEach) {
  std::vector<uint64_t> before;
  for (uint64_t chunk = 0; chunk < 300; ++chunk) {
    before.push_back(directory_.generation(Iova(chunk * kChunk)));
  }
  Map(0, 300 * kChunk, kBase);
  Unmap(0, 300 * kChunk);
  for (uint64_t chunk = 0; chunk < 300; ++chunk) {
    EXPECT_NE(directory_.generation(Iova(chunk * kChunk)), before[chunk]) << chunk;
  }
}

}  // namespace
}  // namespace mvgpu::domain
