// Lines as drivers/iommu/intel/trace.h and decode_prq_descriptor() print them.

#include "backend/policies/page_request_events.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>

#include "backend/policies/policy_run.h"
#include "tests/backend/policies/kernel_lines.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using domain::VtdPageRequest;
using ::testing::ElementsAre;
using testing::FailsWith;
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
using ::testing::SizeIs;
using Kind = DmaEvent::Kind;

constexpr uint64_t kApart = DmaTraceBuilder::kMaxMemoryBytes;
constexpr uint64_t kBlock = 2 << 20;

const std::string kSeed =
    "prq_report: dmar0/0000:3a:12.1 seq# 7: rid=0x3a91 addr=0x7f1234567000 rw--l pasid=0x12345 "
    "index=0x1a5";

Result<VtdPageRequest> RequestIn(std::string line) {
  line.pop_back();  // its end
  const auto event = FindKernelEvent(line);
  if (!event) return Fail(ErrorCode::kInvalid, "no event: " + line);
  return PageRequestOf(*event);
}
// As the kernel prints it.
std::string Printed(const VtdPageRequest& request, const std::string& unit = "dmar0") {
  return fmt::format(
      "prq_report: {}/0000:{:02x}:{:02x}.{} seq# 1: rid=0x{:x} addr=0x{:x} "
      "{}{}{}{}{} pasid=0x{:x} index=0x{:x}",
      unit, request.requester >> 8, request.requester >> 3 & 31, request.requester & 7,
      request.requester, request.address >> 12, request.reads ? 'r' : '-',
      request.writes ? 'w' : '-', request.executes ? 'x' : '-', request.is_privileged ? 'p' : '-',
      request.is_last ? 'l' : '-', request.pasid.value_or(0), request.group);
}
VtdPageRequest MakeRequest(uint64_t address, bool writes = true, uint32_t pasid = 0x12345) {
  VtdPageRequest request;
  request.requester = 0x3a91;
  request.pasid = pasid;
  request.reads = true;
  request.writes = writes;
  request.is_last = true;
  request.address = address;
  return request;
}
std::string Request(uint64_t address, bool writes = true, uint32_t pasid = 0x12345) {
  return Line(Printed(MakeRequest(address, writes, pasid)));
}
std::string DeviceTlb(uint64_t low, uint64_t high, const std::string& unit = "dmar0") {
  return Line(fmt::format("qi_submit: p_dev_tlb_inv {}: 0x{:x} 0x{:x} 0x0 0x0", unit, low, high));
}
constexpr uint64_t kDeviceTlb = 0x123453a910108;  // requester 0x3a91, PASID 0x12345

// The text, the words, and what the project's decoder of the queue's entries makes of these.
TEST(PageRequestEventsTest, TheRequestOfTheSeed) {
  const auto decoded = VtdPageRequest::Decode({0x123453a910101, 0x7f1234567d2f, 0, 0});
  ASSERT_THAT(decoded, IsOk());
  EXPECT_EQ(decoded->requester, 0x3a91);
  EXPECT_EQ(decoded->address, 0x7f1234567000u);
  const auto from_text = RequestIn(Line(kSeed));
  ASSERT_THAT(from_text, IsOk());
  EXPECT_EQ(*from_text, *decoded);
  // FIELD_GET() shifts: the kernel prints the number of the page.
  const auto from_kernel = RequestIn(Line(Printed(*decoded)));
  ASSERT_THAT(from_kernel, IsOk());
  EXPECT_EQ(*from_kernel, *decoded);
  EXPECT_THAT(Printed(*decoded), HasSubstr("addr=0x7f1234567 rw--l"));
  // trace-cmd and perf have the words only.
  for (const char* words : {"dw0=0x123453a910101 dw1=0x7f1234567d2f dw2=0x0 dw3=0x0",
                            "dw0=320255219007745 dw1=139716164222255 dw2=0 dw3=0"}) {
    const auto from_words = RequestIn(Line(
        fmt::format("prq_report: [FAILED TO PARSE] {} seq=7 iommu=dmar0 dev=0000:3a:12.1", words)));
    ASSERT_THAT(from_words, IsOk()) << words;
    EXPECT_EQ(*from_words, *decoded);
  }
}

TEST(PageRequestEventsTest, TextAndWordsSayTheSameOfAnyRequest) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 500; ++i) {
    VtdPageRequest request;
    request.requester = static_cast<uint16_t>(random());
    request.pasid = static_cast<uint32_t>(1 + random() % 0xfffff);
    request.group = static_cast<uint16_t>(random() % 0x200);
    request.reads = random() % 2 != 0;
    request.writes = random() % 2 != 0;
    request.executes = random() % 2 != 0;
    request.is_privileged = random() % 2 != 0;
    request.is_last = random() % 2 != 0;
    const auto bits = static_cast<unsigned>(1 + random() % 44);
    request.address = (random() & ((uint64_t{1} << bits) - 1)) << 12;
    if (random() % 2 != 0) request.address |= uint64_t{0xff} << 56;
    const auto read = RequestIn(Line(Printed(request)));
    ASSERT_THAT(read, IsOk()) << Printed(request);
    EXPECT_EQ(*read, request) << Printed(request);
    const auto words = request.encode();
    const auto raw =
        RequestIn(Line(fmt::format("prq_report: dw0=0x{:x} dw1=0x{:x} dw2=0x1 dw3=0x2 "
                                   "seq=1 iommu=dmar0",
                                   words[0], words[1])));
    ASSERT_THAT(raw, IsOk());
    EXPECT_EQ(*raw, request);
  }
}

TEST(PageRequestEventsTest, ARequestIsATouchOfMemoryApart) {
  const auto trace = Import(Line(kSeed, 3) + Line(kSeed, 4));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kAccess));
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(kApart, kBlock)));
  // Its place within 2 MiB is the address's.
  EXPECT_THAT(trace->buffers.at(0).parts, ElementsAre(PageRun{(kApart >> 12) + 0x167, 1}));
  EXPECT_EQ(trace->buffers[0].direction, dma::Direction::kBidirectional);
  EXPECT_EQ(trace->events[2].time_ns, 1000u);
  EXPECT_EQ(trace->skipped, 0u);
}

TEST(PageRequestEventsTest, ReadsTheFramesOfTraceCmdAndPerf) {
  const std::string raw =
      "[FAILED TO PARSE] dw0=0x123453a910101 dw1=0x7f1234567d2f dw2=0 dw3=0 seq=7 iommu=dmar0 "
      "dev=0000:3a:12.1 buff=";
  const auto trace = Import("  irq/24-dmar0-prq-99 [002]  12.000001: prq_report:           " + raw +
                            "\n  irq/24-dmar0 99 [002] 12.000002: intel_iommu:prq_report: " + raw +
                            "\n" + Line(kSeed + " private=0x1/0x2\n"));
  ASSERT_THAT(trace, IsOk());
  // All of one page.
  EXPECT_THAT(KindsOf(*trace),
              ElementsAre(Kind::kMap, Kind::kAccess, Kind::kAccess, Kind::kAccess));
}

// The same address in two processes, of two devices, behind two units: four pages, and none of them
// is that of the guest.
TEST(PageRequestEventsTest, SpacesAreApart) {
  VtdPageRequest other = MakeRequest(0x5000);
  other.requester = 0x0100;
  const auto trace =
      Import(Line("dma_map_page: d dir=TO_DEVICE dma_addr=5000 size=4096 phys_addr=5000 attrs=") +
             Request(0x5000) + Request(0x5000, true, 7) + Line(Printed(other)) +
             Line(Printed(other, "dmar1")) + Request(0x6000));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(MappedAtTheEnd(*trace),
              ElementsAre(0x5, (kApart >> 12) + 0x005, (kApart >> 12) + 0x205,
                          (kApart >> 12) + 0x405, (kApart >> 12) + 0x605, (kApart >> 12) + 0x006));
  EXPECT_THAT(trace->memory, ElementsAre(MakeRange(0, 1 << 30), MakeRange(kApart, 4 * kBlock)));
}

TEST(PageRequestEventsTest, WhatThePageIsForAddsUp) {
  const auto trace =
      Import(Request(0x5000, false) + Request(0x5000, true) + Request(0x5000, false));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace), ElementsAre(Kind::kMap, Kind::kAccess, Kind::kMap, Kind::kAccess,
                                           Kind::kUnmap, Kind::kAccess));
  ASSERT_EQ(trace->buffers.size(), 2u);
  EXPECT_EQ(trace->buffers[0].direction, dma::Direction::kToDevice);
  EXPECT_EQ(trace->buffers[1].direction, dma::Direction::kBidirectional);
  EXPECT_EQ(trace->events[4].buffer, 0u);
  EXPECT_EQ(trace->buffers[1].parts, trace->buffers[0].parts);
  VtdPageRequest write = MakeRequest(0x5000);
  write.reads = false;
  const auto only = Import(Line(Printed(write)));
  ASSERT_THAT(only, IsOk());
  EXPECT_EQ(only->buffers[0].direction, dma::Direction::kFromDevice);
}

// As Linux ends a range, a page, and all of a PASID.
TEST(PageRequestEventsTest, AnInvalidationOfTheDevicesTlbGivesPagesUp) {
  std::string requests = Request(0x7f1234563000);
  for (uint64_t i = 0; i < 32; ++i) requests += Request(0x7f1234560000 + 0x1000 * i);
  const auto mapped = [&](const std::string& end) {
    const auto trace = Import(requests + Request(0x7f1234560000, true, 7) + end);
    EXPECT_THAT(trace, IsOk());
    return trace ? MappedAtTheEnd(*trace) : std::vector<uint64_t>();
  };
  EXPECT_THAT(mapped(""), SizeIs(33));
  const auto order4 = mapped(DeviceTlb(kDeviceTlb, 0x7f1234567800));
  ASSERT_THAT(order4, SizeIs(17));
  EXPECT_EQ(order4[0], (kApart >> 12) + 0x170) << "the first 16 are gone";
  EXPECT_THAT(mapped(DeviceTlb(kDeviceTlb, 0x7f1234561000)), SizeIs(32));
  // Order 52, all of a PASID, and all PASIDs.
  EXPECT_THAT(mapped(DeviceTlb(kDeviceTlb, 0x7ffffffffffff800)), SizeIs(1));
  EXPECT_THAT(mapped(DeviceTlb(kDeviceTlb, 0x7ffffffffffff801)), IsEmpty());
  // Another PASID, another device, another unit, no PASID.
  EXPECT_THAT(mapped(DeviceTlb(0x000093a910108, 0x7ffffffffffff800)), SizeIs(33));
  EXPECT_THAT(mapped(DeviceTlb(0x123453a920108, 0x7ffffffffffff800)), SizeIs(33));
  EXPECT_THAT(mapped(DeviceTlb(kDeviceTlb, 0x7ffffffffffff800, "dmar1")), SizeIs(33));
  EXPECT_THAT(mapped(DeviceTlb(0x3a9100100003, 0x7ffffffffffff001)), SizeIs(33));
  EXPECT_THAT(mapped("x 1 [000] 13.0: intel_iommu:qi_submit: qw0=320255219007752 "
                     "qw1=9223372036854773760 qw2=0 qw3=0 iommu=dmar0\n"),
              SizeIs(1));
}

TEST(PageRequestEventsTest, APageThatComesAgainIsTheOneItWas) {
  const auto trace = Import(Request(0x5000) + DeviceTlb(kDeviceTlb, 0x5000) + Request(0x5000));
  ASSERT_THAT(trace, IsOk());
  EXPECT_THAT(KindsOf(*trace),
              ElementsAre(Kind::kMap, Kind::kAccess, Kind::kUnmap, Kind::kMap, Kind::kAccess));
  ASSERT_EQ(trace->buffers.size(), 2u);
  EXPECT_EQ(trace->buffers[1].parts, trace->buffers[0].parts);
}

TEST(PageRequestEventsTest, WhatTellsOfNoPageIsPassedOverOrLeftOut) {
  VtdPageRequest nothing = MakeRequest(0x5000);
  nothing.reads = nothing.writes = false;
  const auto trace =
      Import(Line(kSeed) + Line(Printed(nothing)) +
             Line("qi_submit: p_iotlb_inv dmar0: 0x1234500420036 0x7f1234560004 0x0 0x0") +
             Line("qi_submit: inv_wait dmar0: 0x200000065 0x9000 0x0 0x0") +
             Line("qi_submit: 0xf dmar0: 0xf 0x0 0x0 0x0") +
             Line("cache_tag_assign: dmar0/0000:3a:12.1 type iotlb did 1 pasid 9 ref 1"));
  ASSERT_THAT(trace, IsOk());
  EXPECT_EQ(trace->events.size(), 2u);
  EXPECT_THAT(trace->skipped_by_name,
              ElementsAre(Pair("intel_iommu:prq_report", 1), Pair("intel_iommu:qi_submit", 1)));
}

TEST(PageRequestEventsTest, MistakesNameLineValueAndRemedy) {
  EXPECT_THAT(MessageOf(Line(kSeed) + Line("prq_report: dmar0/d seq# 1: rid=0x10000 addr=0x1 r---- "
                                           "pasid=0x1 index=0x0")),
              HasSubstr("t.txt: line 2: a prq_report event with rid=0x10000, which is at most "
                        "0xffff; correct the line or take it out"));
  const std::string start = "prq_report: dmar0/d seq# 1: ";
  for (const char* fields :
       {"", "rid=0x1 addr=0x1 r---- index=0x0", "rid=0x1 r---- pasid=0x1 index=0x0",
        "rid=0x1 addr=0x1 r---- pasid=0x100000 index=0x0", "rid=0x1 addr=0x1 r---- pasid=0x1",
        "rid=0x1 addr=0x1 r---- pasid=0x1 index=0x200", "rid=0x1 addr=0x1 r--- pasid=0x1 index=0x0",
        "rid=0x1 addr=0x1 r----- pasid=0x1 index=0x0", "rid=0x1 addr=0x1 wr--- pasid=0x1 index=0x0",
        "rid=0x1 pasid=0x1 index=0x0 addr=0x1",
        "rid=0x1 addr=0x100000000001 r---- pasid=0x1 index=0x0",
        "rid=0x1 addr=0xffffffffffffffff r---- pasid=0x1 index=0x0",
        "rid=0x1 addr=0x1234567890abcde0 r---- pasid=0x1 index=0x0"}) {
    EXPECT_THAT(MessageOf(Line(start + fields)), HasSubstr("line 1: a prq_report event with"))
        << fields;
  }
  MessageOf(Line("prq_report: dmar0 seq# 1: rid=0x1 addr=0x1 r---- pasid=0x1 index=0x0"));
  MessageOf(Line("prq_report: [FAILED TO PARSE] dw0=0x1 dw1=0x1 dw2=0x0 seq=1 iommu=dmar0"));
  MessageOf(Line("prq_report: [FAILED TO PARSE] dw0=0x1 dw1=0x1 dw2=0x0 dw3=0x0 seq=1"));
  EXPECT_THAT(MessageOf(Line("prq_report: dw0=0x2 dw1=0x1 dw2=0x0 dw3=0x0 iommu=dmar0")),
              HasSubstr("dw0=0x2"));
  for (const char* fields :
       {"x", "inv_wait dmar0", "inv_wait dmar0: ", "inv_wait dmar0: 0x1 0x2 0x3",
        "inv_wait dmar0: 0x1 0x2 0x3 zz", "qw0=1 qw1=2 qw2=3 qw3=4", "dmar0: 0x1 0x2 0x3 0x4",
        "qw0=1 qw1=2 qw2=3 iommu=dmar0"}) {
    EXPECT_THAT(MessageOf(Line("qi_submit: " + std::string(fields))),
                HasSubstr("line 1: a qi_submit"))
        << fields;
  }
}

// Memory apart is where each policy can pin it, and the device reaches it.
TEST(PageRequestEventsTest, EveryPolicyPlaysThem) {
  std::string text;
  for (uint64_t i = 0; i < 40; ++i) text += Request(0x7f0000000000 + i * 0x7'3000, i % 2 == 0);
  text += Line("map: IOMMU: iova=0x1000 - 0x3000 paddr=0x5000 size=8192");
  text += DeviceTlb(kDeviceTlb, 0x7ffffffffffff800);
  const auto trace = Import(text + Request(0x7f0000000000));
  ASSERT_THAT(trace, IsOk());
  for (const std::string_view name : PolicyNames()) {
    const auto figures = RunPolicy(name, *trace, domain::MakeNonePinBackend());
    ASSERT_THAT(figures, IsOk()) << name;
    EXPECT_GE(figures->pins.peak_pages, 42u) << name;
  }
}

}  // namespace
}  // namespace mvgpu::backend
