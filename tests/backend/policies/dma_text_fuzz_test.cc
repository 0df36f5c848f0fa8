// Text that nobody's kernel printed. Whatever stands there is taken or refused, in one line that
// names a line, and costs no more memory than the text is long.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <string_view>

#include "backend/policies/kernel_text.h"
#include "tests/backend/policies/kernel_lines.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {
namespace {

using ::testing::HasSubstr;
using testing::Import;
using testing::IsOk;
using testing::Line;
using testing::MessageOf;
using ::testing::StartsWith;

const std::array<std::string, 9> kGood{
    Line("dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=123456000 size=8192 phys_addr=abcd000 "
         "attrs="),
    Line("dma_map_sg: 0000:00:02.0 dir=TO_DEVICE nents=2/2 ents=2/2 dma_addrs={0x1000,0x9000} "
         "sizes={0x2000,0x1000} phys_addrs={0x5000,0x9000} attrs="),
    Line("dma_unmap_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=123456000 size=8192 attrs="),
    Line("map: IOMMU: iova=0x0000000000100000 - 0x0000000000102000 paddr=0x00000000abcd0000 "
         "size=8192"),
    Line("unmap: IOMMU: iova=0x0000000000100000 size=8192 unmapped_size=8192"),
    Line("io_page_fault: IOMMU:vfio-pci 0000:00:02.0 iova=0x00000000fee01000 flags=0x0000"),
    Line("prq_report: dmar0/0000:3a:12.1 seq# 7: rid=0x3a91 addr=0x7f1234567 rw--l pasid=0x12345 "
         "index=0x1a5"),
    Line("prq_report: [FAILED TO PARSE] dw0=0x123453a910101 dw1=0x7f1234567d2f dw2=0 dw3=0 seq=7 "
         "iommu=dmar0 dev=d"),
    Line("qi_submit: p_dev_tlb_inv dmar0: 0x123453a910108 0x7f1234567800 0x0 0x0")};

// What may come of any text.
void ExpectTakenOrRefused(const std::string& text, unsigned* taken) {
  const auto trace = Import(text);
  if (trace) {
    ++*taken;
    // Of one line come at most three maps, two of them rests, and an unmap of each that it ends.
    const auto lines = static_cast<size_t>(std::count(text.begin(), text.end(), '\n')) + 1;
    EXPECT_LE(trace->buffers.size(), 3 * lines);
    EXPECT_LE(trace->events.size(), 9 * lines);
    return;
  }
  const std::string& message = trace.error().message();
  EXPECT_THAT(message, StartsWith("t.txt: "));
  EXPECT_LT(message.size(), 600u);
  for (const char letter : message) EXPECT_TRUE(letter >= ' ' && letter <= '~') << message;
}

TEST(DmaTextFuzzTest, LettersThatChange) {
  std::mt19937 random(1);
  constexpr std::string_view kLetters("0f ={},:-x/\n\0\r\xff\x1b", 16);
  unsigned taken = 0;
  constexpr unsigned kRuns = 4000;
  for (unsigned i = 0; i < kRuns; ++i) {
    std::string text;
    for (unsigned line = 0; line < 6; ++line) text += kGood[random() % kGood.size()];
    for (unsigned change = 0; change <= random() % 4; ++change) {
      text[random() % text.size()] = kLetters[random() % kLetters.size()];
    }
    ExpectTakenOrRefused(text, &taken);
  }
  EXPECT_GT(taken, kRuns / 20);
  EXPECT_LT(taken, kRuns);
}

// Numbers at the edges in the place of each number.
TEST(DmaTextFuzzTest, NumbersThatChange) {
  std::mt19937 random(1);
  constexpr std::array<std::string_view, 14> kNumbers{"0",
                                                      "-1",
                                                      "1",
                                                      "4096",
                                                      "0xfff",
                                                      "0x1000",
                                                      "18446744073709551615",
                                                      "0xfffffffffffff000",
                                                      "18446744073709551616",
                                                      "0x8000000000000000",
                                                      "0xffffffffff",
                                                      "99999999999999999999999",
                                                      "0x",
                                                      "0x10000000000"};
  unsigned taken = 0;
  constexpr unsigned kRuns = 4000;
  for (unsigned i = 0; i < kRuns; ++i) {
    std::string text;
    for (unsigned line = 0; line < 6; ++line) {
      std::string one = kGood[random() % kGood.size()];
      const size_t start = one.find("=0x");
      const size_t digits =
          start == std::string::npos || random() % 2 == 0 ? one.rfind('=') : start;
      if (digits != std::string::npos && random() % 2 == 0) {
        const size_t end = one.find_first_of(" \n", digits);
        one.replace(digits + 1, end - digits - 1, kNumbers[random() % kNumbers.size()]);
      }
      text += one;
    }
    ExpectTakenOrRefused(text, &taken);
  }
  EXPECT_GT(taken, kRuns / 50);
  EXPECT_LT(taken, kRuns);
}

TEST(DmaTextFuzzTest, LinesThatNeverEnd) {
  for (const std::string& good : kGood) {
    const std::string text = good + good.substr(0, good.size() - 1);
    EXPECT_THAT(MessageOf(text + std::string(3 << 20, '0') + "\n"),
                HasSubstr("t.txt: line 2: longer"));
    EXPECT_THAT(MessageOf(text + std::string(1 << 16, '\0')), HasSubstr("t.txt: line 2: longer"));
  }
  // As long as a line may be, and all of it looks like the beginning of something.
  for (const std::string& piece :
       {std::string(": "), std::string("1.0: "), std::string("1.0: map: "), std::string("iova="),
        std::string("{1,")}) {
    std::string line = "x 1 [0] 1.0: map: IOMMU: ";
    while (line.size() + piece.size() < 65000) line += piece;
    unsigned taken = 0;
    ExpectTakenOrRefused(kGood[0] + line + "\n" + line, &taken);
  }
}

TEST(DmaTextFuzzTest, MessagesShowNoControlCharacters) {
  const std::string message = MessageOf(
      Line("map: IOMMU: iova=\x1b[31m" + std::string(1000, '\xff') + " paddr=0 size=4096"));
  EXPECT_THAT(message, HasSubstr("iova='?[31m???"));
  EXPECT_LT(message.size(), 200u);
  EXPECT_EQ(Quoted("a\tb"), "'a?b'");
  EXPECT_EQ(Quoted(std::string(40, 'a')), "'" + std::string(40, 'a') + "'");
  EXPECT_EQ(Quoted(std::string(41, 'a')), "'" + std::string(40, 'a') + "...'");
}

// A NUL ends a line as nothing else does.
TEST(DmaTextFuzzTest, NulsAreNoText) {
  const std::string map = "x 1 [0] 1.0: map: IOMMU: iova=0x1000 paddr=0x1000 size=4096";
  EXPECT_THAT(Import(map + std::string(5, '\0') + "\n"), IsOk());
  std::string inside = map + "\n";
  inside[inside.find("size") + 6] = '\0';
  EXPECT_THAT(MessageOf(inside), HasSubstr("size='4?96'"));
  EXPECT_THAT(MessageOf(std::string(1000, '\0')), HasSubstr("no dma event in 1 lines"));
}

// Unmaps and invalidations cost what they end, however often they come.
TEST(DmaTextFuzzTest, ManyLinesAreNotSlow) {
  std::string text;
  for (int i = 0; i < 3000; ++i) {
    text += Line("map: IOMMU: iova=0x1000 paddr=0x1000 size=4096") +
            Line("unmap: IOMMU: iova=0x0 size=18446744073709547520 unmapped_size=4096") + kGood[6] +
            Line("qi_submit: p_dev_tlb_inv dmar0: 0x123453a910108 0x7ffffffffffff801 0x0 0x0");
  }
  const auto trace = Import(text);
  ASSERT_THAT(trace, IsOk());
  EXPECT_GT(trace->events.size(), 12000u);
}

}  // namespace
}  // namespace mvgpu::backend
