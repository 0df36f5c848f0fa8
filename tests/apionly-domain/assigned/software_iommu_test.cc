#include "apionly-domain/assigned/software_iommu.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <random>
#include <vector>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::IsOk;
using testing::MakeRange;

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kGiB = 1 << 30;

// Nothing is dereferenced here: any address will do for host memory.
std::byte* Host(uint64_t address) { return std::bit_cast<std::byte*>(address); }

TEST(SoftwareIommuTest, TranslatesEveryByteOfAMappingAndNoOther) {
  SoftwareIommu iommu;
  ASSERT_THAT(iommu.map(MakeRange(0x10000, 0x3000), Host(0x700000), Access::kReadWrite), IsOk());
  EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kRead), Host(0x700000));
  EXPECT_EQ(iommu.translate(Iova(0x12fff), Access::kWrite), Host(0x702fff));
  EXPECT_EQ(iommu.translate(Iova(0xffff), Access::kRead), nullptr);
  EXPECT_EQ(iommu.translate(Iova(0x13000), Access::kRead), nullptr);
  EXPECT_EQ(iommu.counters().faults, 2u);
  EXPECT_EQ(iommu.last_fault()->iova, Iova(0x13000));
  EXPECT_FALSE(iommu.last_fault()->is_mapped);
}

TEST(SoftwareIommuTest, RefusesAccessesThatTheMappingDoesNotAllow) {
  SoftwareIommu iommu;
  ASSERT_THAT(iommu.map(MakeRange(0x10000, 0x1000), Host(0x700000), Access::kRead), IsOk());
  for (int i = 0; i < 2; ++i) {  // walked, then remembered
    EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kRead), Host(0x700000));
    EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kWrite), nullptr);
    EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kReadWrite), nullptr);
    EXPECT_TRUE(iommu.last_fault()->is_mapped);
  }
  EXPECT_EQ(iommu.counters().faults, 4u);
}

TEST(SoftwareIommuTest, WhatWasUnmappedIsReachedThroughTheCacheUntilTheFlush) {
  SoftwareIommu iommu;
  const IovaRange range = MakeRange(0x10000, 0x2000);
  ASSERT_THAT(iommu.map(range, Host(0x700000), Access::kReadWrite), IsOk());
  ASSERT_NE(iommu.translate(Iova(0x10000), Access::kWrite), nullptr);
  ASSERT_THAT(iommu.unmap(range), IsOk());
  EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kWrite), Host(0x700000));  // stale
  EXPECT_EQ(iommu.translate(Iova(0x11000), Access::kWrite), nullptr);         // never used before
  iommu.flush();
  EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kWrite), nullptr);
}

TEST(SoftwareIommuTest, AStaleTranslationHidesANewMapping) {
  SoftwareIommu iommu;
  const IovaRange range = MakeRange(0x10000, 0x1000);
  ASSERT_THAT(iommu.map(range, Host(0x700000), Access::kReadWrite), IsOk());
  ASSERT_NE(iommu.translate(Iova(0x10000), Access::kRead), nullptr);
  ASSERT_THAT(iommu.unmap(range), IsOk());
  ASSERT_THAT(iommu.map(range, Host(0x900000), Access::kReadWrite), IsOk());
  EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kRead), Host(0x700000));
  iommu.flush();
  EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kRead), Host(0x900000));
}

TEST(SoftwareIommuTest, EveryFlushForgetsWhatWasRememberedSinceTheOneBefore) {
  SoftwareIommu iommu;
  const IovaRange range = MakeRange(0x10000, 0x1000);
  for (uint64_t host = 0x700000; host < 0x703000; host += 0x1000) {
    ASSERT_THAT(iommu.map(range, Host(host), Access::kReadWrite), IsOk());
    EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kRead), Host(host));
    ASSERT_THAT(iommu.unmap(range), IsOk());
    iommu.flush();
    EXPECT_EQ(iommu.translate(Iova(0x10000), Access::kRead), nullptr);
    iommu.flush();
  }
}

TEST(SoftwareIommuTest, EmptyTablesAreKeptForTheNextMappingsButNotMany) {
  SoftwareIommu iommu;
  const IovaRange near = MakeRange(0x10000, 0x1000);
  ASSERT_THAT(iommu.map(near, Host(0x700000), Access::kReadWrite), IsOk());
  EXPECT_EQ(iommu.counters().tables, 3u);
  EXPECT_EQ(iommu.counters().spare_tables, 0u);
  ASSERT_THAT(iommu.unmap(near), IsOk());
  EXPECT_EQ(iommu.counters().tables, 0u);
  EXPECT_EQ(iommu.counters().spare_tables, 3u);
  // A table that was used shows nothing of that elsewhere.
  const IovaRange far = MakeRange(0x12'3456'7000, 0x1000);
  ASSERT_THAT(iommu.map(far, Host(0x900000), Access::kReadWrite), IsOk());
  EXPECT_EQ(iommu.counters().tables, 3u);
  EXPECT_EQ(iommu.counters().spare_tables, 0u);
  EXPECT_EQ(iommu.translate(Iova(0x12'3451'0000), Access::kRead), nullptr);
  EXPECT_EQ(iommu.translate(far.start(), Access::kRead), Host(0x900000));
  ASSERT_THAT(iommu.unmap(far), IsOk());
  // Sixty pages far from each other.
  for (uint64_t i = 0; i < 60; ++i) {
    ASSERT_THAT(iommu.map(MakeRange(i * kGiB, 0x1000), Host(0x700000), Access::kReadWrite), IsOk());
  }
  EXPECT_EQ(iommu.counters().tables, 121u);
  for (uint64_t i = 0; i < 60; ++i) {
    ASSERT_THAT(iommu.unmap(MakeRange(i * kGiB, 0x1000)), IsOk());
  }
  EXPECT_EQ(iommu.counters().tables, 0u);
  EXPECT_EQ(iommu.counters().spare_tables, 16u);
}

TEST(SoftwareIommuTest, UsesTheLargestPagesThatFit) {
  SoftwareIommu iommu;
  // 4 KiB short of 1 GiB, 1 GiB, then 2 MiB and 4 KiB, congruent in IOVA and host.
  const uint64_t host = 64 * kGiB + kGiB - 0x1000;
  const IovaRange range = MakeRange(5 * kGiB - 0x1000, 0x1000 + kGiB + 2 * kMiB + 0x1000);
  ASSERT_THAT(iommu.map(range, Host(host), Access::kReadWrite), IsOk());
  EXPECT_THAT(iommu.counters().pages, ::testing::ElementsAre(2u, 1u, 1u));
  for (uint64_t at = 0; at < range.size(); at += 0x1ff000) {
    EXPECT_EQ(iommu.translate(range.start() + at, Access::kRead), Host(host + at));
  }
  ASSERT_THAT(iommu.unmap(range), IsOk());
  EXPECT_THAT(iommu.counters().pages, ::testing::ElementsAre(0u, 0u, 0u));
  EXPECT_EQ(iommu.counters().tables, 0u);
}

TEST(SoftwareIommuTest, HostMemoryThatLiesOtherwiseGetsSmallPages) {
  SoftwareIommu iommu;
  ASSERT_THAT(iommu.map(MakeRange(2 * kMiB, 2 * kMiB), Host(0x701000), Access::kRead), IsOk());
  EXPECT_THAT(iommu.counters().pages, ::testing::ElementsAre(512u, 0u, 0u));
}

TEST(SoftwareIommuTest, RefusesOverlapsAndAddressesThatItDoesNotHave) {
  SoftwareIommu iommu;
  ASSERT_THAT(iommu.map(MakeRange(0x10000, 0x3000), Host(0x700000), Access::kRead), IsOk());
  EXPECT_THAT(iommu.map(MakeRange(0x12000, 0x2000), Host(0), Access::kRead),
              FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(iommu.map(MakeRange(0xf000, 0x2000), Host(0), Access::kRead),
              FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(iommu.map(MakeRange(0xfee00000, 0x1000), Host(0), Access::kRead),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(iommu.map(MakeRange(1ull << 48, 0x1000), Host(0), Access::kRead),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(iommu.translate(Iova(1ull << 48 | 0x10000), Access::kRead), nullptr);
}

TEST(SoftwareIommuTest, MappingsGoOnlyAsAWhole) {
  SoftwareIommu iommu;
  ASSERT_THAT(iommu.map(MakeRange(0x10000, 0x3000), Host(0x700000), Access::kRead), IsOk());
  EXPECT_THAT(iommu.unmap(MakeRange(0x10000, 0x1000)), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(iommu.unmap(MakeRange(0x11000, 0x2000)), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(iommu.unmap(MakeRange(0x20000, 0x1000)), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(iommu.unmap(MakeRange(0x10000, 0x3000)), IsOk());
}

TEST(SoftwareIommuTest, AgreesWithAPlainTableOfPages) {
  SoftwareIommu iommu;
  std::mt19937 random(7);
  constexpr uint64_t kPages = 4096;
  std::vector<uint64_t> wanted(kPages, 0);  // host page of each IOVA page; 0: none
  std::vector<PageRun> held;
  for (int step = 0; step < 1200; ++step) {
    if (random() % 2 == 0 || held.empty()) {
      const PageRun run{random() % kPages, 1 + random() % 700};
      const bool fits =
          run.end() <= kPages && std::all_of(wanted.begin() + static_cast<ptrdiff_t>(run.first),
                                             wanted.begin() + static_cast<ptrdiff_t>(run.end()),
                                             [](uint64_t host) { return host == 0; });
      if (!fits) continue;
      const uint64_t host = 0x100000 + run.first % 512 + 512 * (random() % 64);
      ASSERT_THAT(iommu.map(RangeOf(run), Host(BytesIn(host)), Access::kRead), IsOk());
      for (uint64_t i = 0; i < run.count; ++i) wanted[run.first + i] = host + i;
      held.push_back(run);
    } else {
      const size_t index = random() % held.size();
      ASSERT_THAT(iommu.unmap(RangeOf(held[index])), IsOk());
      for (uint64_t i = 0; i < held[index].count; ++i) wanted[held[index].first + i] = 0;
      held.erase(held.begin() + static_cast<ptrdiff_t>(index));
      iommu.flush();
    }
    for (int probe = 0; probe < 20; ++probe) {
      const uint64_t page = random() % kPages;
      ASSERT_EQ(iommu.translate(Iova(BytesIn(page) + 8), Access::kRead),
                wanted[page] == 0 ? nullptr : Host(BytesIn(wanted[page]) + 8));
    }
  }
  for (const PageRun& run : held) ASSERT_THAT(iommu.unmap(RangeOf(run)), IsOk());
  EXPECT_EQ(iommu.counters().tables, 0u);
  EXPECT_EQ(iommu.counters().mappings, 0u);
}

}  // namespace
}  // namespace mvgpu::domain
