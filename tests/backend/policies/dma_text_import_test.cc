// The lines of these tests are as Linux 6.12 and 7.2 print them, in the frames of ftrace, trace-cmd
// and perf.

#include "backend/policies/dma_text_import.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "backend/policies/kernel_text.h"
#include "tests/backend/policies/kernel_lines.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using ::testing::HasSubstr;
using testing::Import;
using testing::IsOk;
using testing::KindsOf;
using testing::Line;
using testing::MakeRange;
using testing::MessageOf;
using ::testing::Pair;
using Kind = DmaEvent::Kind;

constexpr uint64_t kGiB = uint64_t{1} << 30;

const std::string kMap =
    "dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=123456000 size=8192 phys_addr=abcd000 "
    "attrs=";

TEST(DmaTextImportTest, AMapIsABufferThatTheDeviceTouches) {
  const auto trace = Import(Line(kMap));
  ASSERT_THAT(trace, IsOk());
  ASSERT_EQ(trace->buffers.size(), 1u);
  EXPECT_THAT(trace->buffers[0].parts,
              ElementsAre(PageRun{0xabcd000 >> kPageShift, 0x2000 >> kPageShift}));
  EXPECT_EQ(trace->buffers[0].direction, dma::Direction::kToDevice);
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess));
  EXPECT_EQ(trace->events[1].count, 2u);
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0, kGiB)));
  EXPECT_EQ(trace->skipped, 0u);
}

TEST(DmaTextImportTest, UnmapsFindTheirMapByDeviceAndAddress) {
  const auto trace = Import(
      "# tracer: nop\n#\n" + Line(kMap, 1) +
      Line("dma_map_page: 0000:00:03.0 dir=FROM_DEVICE dma_addr=123456000 size=100 "
           "phys_addr=1ff0 attrs=",
           3) +
      Line("dma_unmap_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=123456000 size=8192 attrs=", 5) +
      Line("sched_switch: prev_comm=dma_x", 6) +
      Line("dma_unmap_page: 0000:00:02.0 dir=TO_DEVICE dma_addr=123456000 size=8192 attrs=", 7));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace),
              ElementsAre(Kind::kMap, Kind::kAccess, Kind::kMap, Kind::kAccess, Kind::kUnmap));
  EXPECT_EQ(trace->events[4].buffer, 0u);
  EXPECT_EQ(trace->events[2].time_ns, 2000u);
  EXPECT_EQ(trace->events[4].time_ns, 4000u);
  EXPECT_THAT(trace->buffers[1].parts, ElementsAre(PageRun{1, 2}));
  EXPECT_EQ(trace->skipped, 1u);  // unmapped twice
}

TEST(DmaTextImportTest, ReadsTheFramesOfTraceCmdAndPerf) {
  const auto trace = Import(
      "  dma_map: x-y-1 [000] d..1  12.000001: dma_map_page:         0000:00:02.0 "
      "dir=BIDIRECTIONAL dma_addr=1000 size=4096 phys_addr=1000 attrs=\n"
      "  a b  77 [000]    12.000002000: dma:dma_unmap_page: 0000:00:02.0 dir=BIDIRECTIONAL "
      "dma_addr=1000 size=4096 attrs=\r\n");
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kUnmap));
  EXPECT_EQ(trace->events[2].time_ns, 1000u);
  EXPECT_EQ(trace->buffers[0].direction, dma::Direction::kBidirectional);
}

TEST(DmaTextImportTest, ListsAreOneBuffer) {
  const auto trace = Import(
      Line("dma_map_sg: 0000:00:02.0 dir=TO_DEVICE nents=2/2 ents=2/2 dma_addrs={0x1000,0x9000} "
           "sizes={0x2000,0x1000} phys_addrs={0x5000,0x9000} attrs=") +
      Line("dma_unmap_sg: 0000:00:02.0 dir=TO_DEVICE phys_addrs={0x5000,0x9000} attrs=", 2));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->buffers.at(0).parts, ElementsAre(PageRun{5, 2}, PageRun{9, 1}));
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kUnmap));
  EXPECT_EQ(trace->events[1].count, 3u);
}

TEST(DmaTextImportTest, SyncsAreAccessesOfTheBufferAround) {
  const auto trace = Import(
      Line(kMap) +
      Line("dma_sync_single_for_device: 0000:00:02.0 dir=TO_DEVICE dma_addr=123457fff size=1") +
      Line("dma_sync_single_for_cpu: 0000:00:02.0 dir=TO_DEVICE dma_addr=123458000 size=1") +
      Line("dma_sync_single_for_cpu: 0000:00:03.0 dir=TO_DEVICE dma_addr=123457000 size=1"));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kAccess));
  EXPECT_EQ(trace->skipped, 2u);
}

TEST(DmaTextImportTest, WhatSaysTooLittleIsSkippedAndCounted) {
  const auto trace = Import(
      Line(kMap) +
      Line("dma_alloc: 0000:00:02.0 dir=BIDIRECTIONAL dma_addr=1000 size=4096 virt_addr=00000000ab "
           "flags=GFP_KERNEL attrs=") +
      Line("dma_map_phys: 0000:00:02.0 dir=NONE dma_addr=2000 size=1 phys_addr=2000 attrs=") +
      Line("dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=2000 size=1 phys_addr=fe000000 "
           "attrs=MMIO") +
      Line("dma_map_sg: 0000:00:02.0 dir=TO_DEVICE nents=2/2 ents=1/1 dma_addrs={0x1000} "
           "sizes={0x3000} phys_addrs={0x5000,0x9000} attrs=") +
      Line("dma_map_sg: 0000:00:02.0 dir=TO_DEVICE nents=1/2 ents=1/2 [TRUNCATED] "
           "dma_addrs={0x1000} sizes={0x3000} phys_addrs={0x5000} attrs="));
  ASSERT_THAT(trace, IsOk());
  EXPECT_EQ(trace->buffers.size(), 1u);
  EXPECT_EQ(trace->skipped, 5u);
  EXPECT_THAT(trace->skipped_by_name,
              ElementsAre(Pair("dma_alloc", 1), Pair("dma_map_phys", 2), Pair("dma_map_sg", 2)));
}

TEST(DmaTextImportTest, EventsOfOthersAreNoDma) {
  const auto trace =
      Import(Line(kMap) + Line("dma_fence_init: driver=x timeline=y context=1") +
             "a 1 [000] 12.1: dma_fence:dma_alloc: x\n" + "a 1 [000] 12.1: scsi:dma_map_phys: x\n" +
             Line("map: not of these") + Line("unmap: 0x1"));
  ASSERT_THAT(trace, IsOk());
  EXPECT_EQ(trace->events.size(), 2u);
  EXPECT_EQ(trace->skipped, 0u);
}

TEST(DmaTextImportTest, AMapAtATakenAddressEndsTheOneBefore) {
  const auto trace = Import(Line(kMap) + Line(kMap, 1));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace),
              ElementsAre(Kind::kMap, Kind::kAccess, Kind::kUnmap, Kind::kMap, Kind::kAccess));
  EXPECT_NE(trace->events[3].buffer, trace->events[0].buffer);
}

TEST(DmaTextImportTest, MemoryIsWhatTheHighestBufferNeedsOrWhatIsSaid) {
  const std::string high =
      "dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=0 size=1 phys_addr=140000000 attrs=";
  const auto trace = Import(Line(high));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0, 3 * kGiB), MakeRange(4 * kGiB, 2 * kGiB)));
  const auto more = Import(Line(high), 32 * kGiB);
  ASSERT_THAT(more, IsOk());
  EXPECT_EQ(more->memory_pages(), PagesIn(32 * kGiB));
  EXPECT_THAT(Import(Line(high), 4 * kGiB), FailsWith(ErrorCode::kInvalid));
}

// As QEMU's i440fx has it with more than 3.5 GiB.
TEST(DmaTextImportTest, ALowBufferAbove3GiBMakesTheHoleSmaller) {
  const std::string low =
      "dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=0 size=1 phys_addr=d8000000 attrs=";
  const std::string high =
      "dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=1 size=1 phys_addr=140000000 attrs=";
  constexpr uint64_t kLowEnd = 3 * kGiB + kGiB / 2;
  const auto trace = Import(Line(low));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0, kLowEnd)));
  const auto both = Import(Line(low) + Line(high));
  ASSERT_THAT(both, IsOk());
  EXPECT_THAT(both->memory, ElementsAre(MakeRange(0, kLowEnd), MakeRange(4 * kGiB, 2 * kGiB)));
  const auto more = Import(Line(low), 8 * kGiB);
  ASSERT_THAT(more, IsOk());
  EXPECT_EQ(more->memory_pages(), PagesIn(8 * kGiB));
  EXPECT_THAT(Import(Line(low), kGiB), FailsWith(ErrorCode::kInvalid));
}

TEST(KernelTextTest, AFieldIsAllOfItsName) {
  EXPECT_EQ(FieldOf("dma_addr=1 addr=2 x=3", "addr"), "2");
  EXPECT_EQ(FieldOf("addr=1 addr=2", "addr"), "1");
  EXPECT_EQ(FieldOf("unmapped_size=1", "size"), std::nullopt);
  EXPECT_EQ(FieldOf("size=", "size"), "");
}

TEST(KernelTextTest, AnEventStandsBehindItsTime) {
  const auto event = FindKernelEvent("a: 1.b: map: 7 [0] 12.000001500: iommu:map:   IOMMU: x=1");
  ASSERT_TRUE(event);
  EXPECT_EQ(event->system, "iommu");
  EXPECT_EQ(event->name, "map");
  EXPECT_EQ(event->fields, "IOMMU: x=1");
  EXPECT_EQ(event->time_ns, 12'000'001'500u);
  for (const char* line : {"", ": ", "1.0: ", "1.0: map", "1.0: a b: c", "1: map: c", "x.0: map: c",
                           "1.0000000000: map: c", "18446744074.0: map: c"}) {
    EXPECT_FALSE(FindKernelEvent(line)) << line;
  }
}

TEST(DmaTextImportTest, ANumberMayBeTheLastOfItsLine) {
  const std::string start =
      "x-1 [000] d 1.000000: dma_map_phys: d dir=TO_DEVICE dma_addr=0 size=1 ";
  for (const char* end : {"phys_addr=1000", "phys_addr=1000\n", "phys_addr=1000\r\n"}) {
    EXPECT_THAT(Import(start + end), IsOk()) << end;
  }
}

TEST(DmaTextImportTest, MistakesNameTheirLine) {
  const std::string start = "dma_map_phys: 0000:00:02.0 dir=TO_DEVICE";
  EXPECT_THAT(MessageOf(Line(kMap) + Line(start + " dma_addr=1000 size=12 attrs=")),
              HasSubstr("t.txt: line 2: a dma_map_phys event without"));
  for (const char* fields :
       {" dma_addr=xyz size=1 phys_addr=0", " dma_addr=1 size=-1 phys_addr=0",
        " dma_addr=1 size=0 phys_addr=0", " dma_addr=1 size=1 phys_addr=ffffffffffffffffff",
        " dma_addr=1 size=18446744073709551615 phys_addr=1000", "",
        " dma_addr=1 size=1 phys_addr=fffffffffffff000"}) {
    EXPECT_THAT(MessageOf(Line(start + fields)), HasSubstr("line 1: "));
  }
  for (const char* fields : {" sizes={0x1 phys_addrs={0x1}", " sizes={0x1,} phys_addrs={0x1,x}",
                             " sizes={0x0} phys_addrs={0x1}", " phys_addrs={0x1}"}) {
    MessageOf(Line("dma_map_sg: d dir=TO_DEVICE" + std::string(fields)));
  }
  MessageOf(Line("dma_unmap_sg: d dir=TO_DEVICE phys_addrs={}"));
  MessageOf(Line("dma_unmap_phys: d dir=TO_DEVICE"));
  MessageOf(Line("dma_sync_single_for_cpu: d dir=TO_DEVICE"));
}

TEST(DmaTextImportTest, ATextWithoutDmaIsNone) {
  EXPECT_THAT(MessageOf("", ErrorCode::kCorrupt), HasSubstr("no dma event in 0 lines"));
  EXPECT_THAT(MessageOf(""), HasSubstr("trace-cmd record -e dma -e iommu -e intel_iommu"));
  EXPECT_THAT(MessageOf("hello\ndma_map_phys: no time\n", ErrorCode::kCorrupt),
              HasSubstr("no dma event in 2 lines"));
  EXPECT_THAT(MessageOf("#\n" + std::string(1 << 20, 'x') + "\n"), HasSubstr("line 2: longer"));
}

// Whatever stands there is taken or refused.
TEST(DmaTextImportTest, NoiseDoesNoHarm) {
  std::mt19937 random(1);
  const std::string good =
      Line(kMap) +
      Line(
          "dma_map_sg: 0000:00:02.0 dir=TO_DEVICE nents=2/2 ents=2/2 dma_addrs={0x1000,0x9000} "
          "sizes={0x2000,0x1000} phys_addrs={0x5000,0x9000} attrs=") +
      Line("dma_unmap_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=123456000 size=8192 attrs=", 5);
  unsigned taken = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string text = good;
    for (unsigned change = 0; change <= random() % 4; ++change) {
      text[random() % text.size()] = static_cast<char>("0f ={},:x\n"[random() % 10]);
    }
    if (Import(text)) ++taken;
  }
  EXPECT_GT(taken, 100u);
  EXPECT_LT(taken, 2000u);
}

}  // namespace
}  // namespace mvgpu::backend
