// The lines of these tests are as Linux 5.10 to 7.2 print them.

#include "backend/policies/iommu_map_events.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <iomanip>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <string>

#include "backend/policies/dma_text_import.h"
#include "tests/backend/policies/kernel_lines.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Import;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::KindsOf;
using testing::Line;
using testing::MakeRange;
using testing::MappedAtTheEnd;
using testing::MessageOf;
using ::testing::Pair;
using ::testing::UnorderedElementsAreArray;
using Kind = DmaEvent::Kind;

constexpr uint64_t kGiB = uint64_t{1} << 30;

std::string Hex(uint64_t value) {
  std::ostringstream text;
  text << "0x" << std::hex << std::setw(16) << std::setfill('0') << value;
  return text.str();
}
std::string MapEvent(uint64_t iova, uint64_t phys, uint64_t size) {
  return "map: IOMMU: iova=" + Hex(iova) + " - " + Hex(iova + size) + " paddr=" + Hex(phys) +
         " size=" + std::to_string(size);
}
std::string UnmapEvent(uint64_t iova, uint64_t size) {
  return "unmap: IOMMU: iova=" + Hex(iova) + " - " + Hex(iova + size) +
         " size=" + std::to_string(size) + " unmapped_size=" + std::to_string(size);
}
std::string DmaMap(const std::string& address, const std::string& phys, int size = 100) {
  return "dma_map_page: 0000:00:02.0 dir=TO_DEVICE dma_addr=" + address +
         " size=" + std::to_string(size) + " phys_addr=" + phys + " attrs=";
}

const std::string kMap =
    "map: IOMMU: iova=0x0000000000100000 - 0x0000000000102000 paddr=0x00000000abcd0000 size=8192";
const std::string kUnmap =
    "unmap: IOMMU: iova=0x0000000000100000 - 0x0000000000102000 size=8192 unmapped_size=8192";

TEST(IommuMapEventsTest, TheMapOfTheSeedIsTwoPages) {
  const auto trace = Import(Line(kMap) + Line(kUnmap, 5));
  ASSERT_THAT(trace, IsOk());
  ASSERT_EQ(trace->buffers.size(), 1u);
  EXPECT_THAT(trace->buffers[0].parts, ElementsAre(PageRun{0xabcd0000 >> kPageShift, 2}));
  EXPECT_EQ(trace->buffers[0].direction, dma::Direction::kBidirectional);
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kUnmap));
  EXPECT_EQ(trace->events[1].count, 2u);
  EXPECT_EQ(trace->events[2].time_ns, 5000u);
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0, 3 * kGiB)));
  EXPECT_EQ(trace->skipped, 0u);
}

// Without the end, as older kernels do; from trace-cmd with its blanks, and from perf; and
// with the numbers as they are stored.
TEST(IommuMapEventsTest, ReadsWhatEachKernelAndToolPrints) {
  const std::string old = "IOMMU: iova=0x0000000000100000 ";
  for (const std::string& text :
       {Line("map: " + old + "paddr=0x00000000abcd0000 size=8192") +
            Line("unmap: " + old + "size=8192 unmapped_size=8192"),
        Line("map: " + old + "paddr=0x00000000abcd0000 size=0x2000") +
            Line("unmap: " + old + "size=0x2000"),
        Line("map: iova=1048576 paddr=2882338816 size=8192 flags=3") +
            Line("unmap: iova=1048576 size=8192 unmapped_size=8192"),
        "  a b-7 [000] d..1  12.000001: map:                  " + kMap.substr(5) + "\n" +
            "  a b-7 [000] d..1  12.000002: unmap:                " + kUnmap.substr(7) + "\r\n",
        "qemu map: 1  77 [003]  12.000001: iommu:" + kMap + "\n" +
            "qemu map: 1  77 [003]  12.000002: iommu:" + kUnmap + "\n",
        std::string("perf  77 [003]  12.0: iommu:map: iova=1048576 paddr=2882338816 size=8192\n") +
            "perf  77 [003]  12.1: iommu:unmap: iova=1048576 size=8192 unmapped_size=8192\n"}) {
    const auto trace = Import(text);
    ASSERT_THAT(trace, IsOk()) << text;
    EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kUnmap)) << text;
    EXPECT_THAT(trace->buffers[0].parts, ElementsAre(PageRun{0xabcd0, 2})) << text;
  }
}

TEST(IommuMapEventsTest, APartOfAMappingMayGo) {
  const auto trace = Import(Line(MapEvent(0x10000, 0x50000, 0x8000)) +
                            Line(UnmapEvent(0x12000, 0x1000), 1) + Line(kMap, 2));
  ASSERT_THAT(trace, IsOk());
  // What stays is mapped before all of it goes, so that nothing is given up in between.
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kMap, Kind::kMap,
                                           Kind::kUnmap, Kind::kMap, Kind::kAccess));
  EXPECT_EQ(trace->events[4].buffer, 0u);
  EXPECT_THAT(trace->buffers[1].parts, ElementsAre(PageRun{0x50, 2}));
  EXPECT_THAT(trace->buffers[2].parts, ElementsAre(PageRun{0x53, 5}));
}

TEST(IommuMapEventsTest, AnUnmapEndsAllThatItCovers) {
  const auto trace =
      Import(Line(MapEvent(0x10000, 0x50000, 0x2000)) + Line(MapEvent(0x12000, 0x90000, 0x1000)) +
             Line(MapEvent(0x14000, 0xa0000, 0x2000)) + Line(UnmapEvent(0x11000, 0x4000)));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*trace), ElementsAre(0x50, 0xa1));
}

// Only what was unmapped, which may be less than what was asked for.
TEST(IommuMapEventsTest, WhatWasNotUnmappedStays) {
  const std::string start = "unmap: IOMMU: iova=0x10000 - 0x12000 size=8192 unmapped_size=";
  const std::string map = Line(MapEvent(0x10000, 0x50000, 0x2000));
  const auto half = Import(map + Line(start + "4096"));
  ASSERT_THAT(half, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*half), ElementsAre(0x51));
  const auto none = Import(map + Line(start + "0"));
  ASSERT_THAT(none, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*none), ElementsAre(0x50, 0x51));
  EXPECT_THAT(none->skipped_by_name, ElementsAre(Pair("iommu:unmap", 1)));
}

// The IOVAs of each device begin at the same address.
TEST(IommuMapEventsTest, TwoMappingsAtOneIovaAreOfTwoDomains) {
  const std::string both = Line(MapEvent(0xff000, 0x5000, 0x1000)) +
                           Line(MapEvent(0xfe000, 0x9000, 0x3000), 1) +
                           Line(MapEvent(0xfd000, 0x6000, 0x1000), 1);
  const auto trace = Import(both);
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*trace), ElementsAre(0x5, 0x9, 0xa, 0xb, 0x6));
  // The second domain has what fits, though the first has something there, too.
  const auto second = Import(both + Line(UnmapEvent(0xfe000, 0x3000), 2));
  ASSERT_THAT(second, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*second), ElementsAre(0x5, 0x6));
  const auto all =
      Import(both + Line(UnmapEvent(0xff000, 0x1000), 2) + Line(UnmapEvent(0xfe000, 0x3000), 2) +
             Line(UnmapEvent(0xfd000, 0x1000), 2));
  ASSERT_THAT(all, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*all), IsEmpty());
  EXPECT_EQ(all->skipped, 0u);
}

TEST(IommuMapEventsTest, DomainsAreBounded) {
  std::string text;
  for (size_t i = 0; i < IommuMapEvents::kMaxDomains + 10; ++i) {
    text += Line(MapEvent(0x1000, 0x1000 * (i + 1), 0x1000));
  }
  const auto trace = Import(text);
  ASSERT_THAT(trace, IsOk());
  EXPECT_EQ(MappedAtTheEnd(*trace).size(), IommuMapEvents::kMaxDomains);
}

// As the kernel does behind an IOMMU: first the map of the IOMMU, then that of the DMA API.
TEST(IommuMapEventsTest, WhatTheDmaApiSaysAgainIsTakenOnce) {
  const auto trace = Import(
      Line(MapEvent(0xfffff000, 0x5000, 0x1000)) + Line(DmaMap("fffff010", "5010"), 1) +
      Line("dma_sync_single_for_cpu: 0000:00:02.0 dir=TO_DEVICE dma_addr=fffff010 size=4", 2) +
      Line(UnmapEvent(0xfffff000, 0x1000), 3) +
      Line("dma_sync_single_for_cpu: 0000:00:02.0 dir=TO_DEVICE dma_addr=fffff010 size=4", 4) +
      Line("dma_unmap_page: 0000:00:02.0 dir=TO_DEVICE dma_addr=fffff010 size=100 attrs=", 5));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kAccess, Kind::kUnmap));
  EXPECT_EQ(trace->repeated, 2u);
  // The sync of what is unmapped.
  EXPECT_THAT(trace->skipped_by_name, ElementsAre(Pair("dma_sync_single_for_cpu", 1)));
}

TEST(IommuMapEventsTest, ASyncTouchesItsPartOfALargeMapping) {
  const auto trace =
      Import(Line(MapEvent(0x100000, 0x500000, 0x10000)) + Line(DmaMap("103ff0", "503ff0"), 1) +
             Line("dma_sync_single_for_cpu: 0000:00:02.0 dir=TO_DEVICE dma_addr=103ff0 size=4", 2));
  ASSERT_THAT(trace, IsOk());
  ASSERT_EQ(trace->events.size(), 3u);
  EXPECT_EQ(trace->events[2].first, 3u);
  EXPECT_EQ(trace->events[2].count, 2u);
}

TEST(IommuMapEventsTest, AListIsTakenOnceIfAllOfItIsMapped) {
  const std::string maps =
      Line(MapEvent(0x10000, 0x5000, 0x2000)) + Line(MapEvent(0x12000, 0x9000, 0x1000));
  const std::string start = "dma_map_sg: 0000:00:02.0 dir=TO_DEVICE nents=2/2 ents=2/2 dma_addrs=";
  const std::string rest = " sizes={0x2000,0x1000} phys_addrs={0x5000,0x9000} attrs=";
  const std::string unmap =
      Line("dma_unmap_sg: 0000:00:02.0 dir=TO_DEVICE phys_addrs={0x5000,0x9000} attrs=");
  const auto told = Import(maps + Line(start + "{0x10000,0x12000}" + rest) + unmap);
  ASSERT_THAT(told, IsOk());
  EXPECT_EQ(told->buffers.size(), 2u);
  EXPECT_EQ(told->repeated, 2u);
  EXPECT_EQ(told->skipped, 0u);
  const auto half = Import(maps + Line(start + "{0x10000,0x20000}" + rest) + unmap);
  ASSERT_THAT(half, IsOk());
  EXPECT_EQ(half->buffers.size(), 3u);
  EXPECT_EQ(half->repeated, 0u);
}

// Another address of the guest, another IOVA, beyond the end of the mapping: another buffer.
TEST(IommuMapEventsTest, WhatIsElsewhereIsNotTheSame) {
  const std::string map = Line(MapEvent(0x10000, 0x5000, 0x2000));
  for (const std::string& other : {DmaMap("10000", "6000"), DmaMap("20000", "5000"),
                                   DmaMap("11fff", "6fff", 2), DmaMap("0", "5000")}) {
    const auto trace = Import(map + Line(other, 1));
    ASSERT_THAT(trace, IsOk()) << other;
    EXPECT_EQ(trace->buffers.size(), 2u) << other;
    EXPECT_EQ(trace->repeated, 0u) << other;
  }
  // The DMA API's own mapping at that address, whose unmap was lost, ends.
  const auto stale = Import(Line(DmaMap("10010", "7010")) + map + Line(DmaMap("10010", "5010")));
  ASSERT_THAT(stale, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*stale), ElementsAre(0x5, 0x6));
}

TEST(IommuMapEventsTest, WhatIsNoMemoryIsLeftOutAndNamed) {
  const auto trace = Import(
      Line("add_device_to_group: IOMMU: groupID=3 device=0000:00:02.0") +
      Line("attach_device_to_domain: IOMMU: device=0000:00:02.0") +
      Line("io_page_fault: IOMMU:vfio-pci 0000:00:02.0 iova=0x00000000fee01000 flags=0x0000") +
      Line(MapEvent(0xfee00000, 0xfee00000, 0x1000)) +
      Line(MapEvent(0x20000000, 0x380000000000, 0x1000)) + Line(MapEvent(0, 0xbffff000, 0x2000)) +
      Line(UnmapEvent(0x7000, 0x1000)) + Line(kMap) +
      Line("detach_device_from_domain: IOMMU: device=0000:00:02.0"));
  ASSERT_THAT(trace, IsOk());
  EXPECT_EQ(trace->buffers.size(), 1u);
  EXPECT_THAT(
      trace->skipped_by_name,
      ElementsAre(Pair("iommu:add_device_to_group", 1), Pair("iommu:attach_device_to_domain", 1),
                  Pair("iommu:detach_device_from_domain", 1), Pair("iommu:io_page_fault", 1),
                  Pair("iommu:map", 3), Pair("iommu:unmap", 1)));
  EXPECT_EQ(trace->skipped, 8u);
}

TEST(IommuMapEventsTest, MistakesNameLineValueAndRemedy) {
  const std::string message =
      MessageOf(Line(kMap) + Line("map: IOMMU: iova=0x1000 - 0x3000 paddr=0x5000 size=4096"));
  EXPECT_THAT(message,
              HasSubstr("t.txt: line 2: a map event of 4096 bytes from 0x1000 to '0x3000', "
                        "which is 0x2000; correct the line or take it out"));
  for (const char* fields :
       {"", "iova=0x1000 size=4096", "paddr=0x1000 size=4096", "iova=0x1000 paddr=0x1000",
        "iova=0x1001 paddr=0x1000 size=4096", "iova=0x1000 paddr=0x1001 size=4096",
        "iova=0x1000 paddr=0x1000 size=0", "iova=0x1000 paddr=0x1000 size=-4096",
        "iova=0x1000 paddr=0x1000 size=100", "iova=0xfffffffffffff000 paddr=0x1000 size=8192",
        "iova=0x1000 paddr=0xfffffffffffff000 size=8192", "iova=0x1000 - 0x paddr=0x0 size=4096",
        "iova=0x1000 paddr=0x10000000000000000 size=4096",
        "iova=0x1000 - 0x1000 paddr=0x1000 size=18446744073709547520"}) {
    EXPECT_THAT(MessageOf(Line("map: IOMMU: " + std::string(fields))), HasSubstr("line 1: a map "));
  }
  for (const char* fields :
       {"", "iova=0x1000", "size=4096 unmapped_size=4096", "iova=0x1000 size=4096 unmapped_size=1",
        "iova=0x1000 - 0x9000 size=4096 unmapped_size=4096",
        "iova=0xfffffffffffff000 size=8192 unmapped_size=8192"}) {
    EXPECT_THAT(MessageOf(Line("unmap: IOMMU: " + std::string(fields))), HasSubstr("line 1: a"));
  }
  // What ends at 2^64 ends at 0 there.
  EXPECT_THAT(Import(Line(MapEvent(0xfffffffffffff000, 0x1000, 0x1000))), IsOk());
}

// Random maps and unmaps of one domain against a table of pages.
TEST(IommuMapEventsTest, ATableOfPagesSaysTheSame) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    std::mt19937 random(seed);
    std::map<uint64_t, uint64_t> table;  // IOVA page -> page of memory
    std::string text;
    uint64_t next = 1;
    for (int i = 0; i < 300; ++i) {
      const uint64_t start = random() % 64;
      const uint64_t count = 1 + random() % 12;
      const auto from = table.lower_bound(start);
      const auto to = table.lower_bound(start + count);
      if (random() % 2 == 0) {
        if (from != to) continue;  // the kernel maps nothing twice
        text += Line(MapEvent(BytesIn(start), BytesIn(next), BytesIn(count)));
        for (uint64_t page = 0; page < count; ++page) table[start + page] = next++;
      } else {
        text += Line(UnmapEvent(BytesIn(start), BytesIn(count)));
        table.erase(from, to);
      }
    }
    const auto trace = Import(text);
    ASSERT_THAT(trace, IsOk()) << seed;
    std::vector<uint64_t> expected;
    for (const auto& [iova, page] : table) expected.push_back(page);
    EXPECT_THAT(MappedAtTheEnd(*trace), UnorderedElementsAreArray(expected)) << seed;
  }
}

}  // namespace
}  // namespace mvgpu::backend
