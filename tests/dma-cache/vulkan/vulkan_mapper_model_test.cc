#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

#include "tests/dma-cache/vulkan/vulkan_mapper_fixture.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using testing::FailsWith;

// Random runs against a plain count for each page: what is mapped is imported and translates, what
// is imported after a flush has a mapped page in its piece.
TEST_F(VulkanMapperTest, AgreesWithACountForEachPage) {
  constexpr unsigned kSeed = 1;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  ImportLimits limits;
  limits.most_imports = 24;
  Open(limits);
  const uint64_t pages = PagesIn(ram_.size());
  std::vector<MappedRun> live;
  std::map<uint64_t, uint64_t> counts;  // by page of guest memory; none is 0
  for (int step = 0; step < 3000; ++step) {
    if (live.empty() || random() % 100 < (step < 2000 ? 55u : 30u)) {
      const uint64_t first = random() % pages;
      const uint64_t count = 1 + random() % std::min<uint64_t>(pages - first, 40);
      const domain::PinnedRun run = RunOf(first, count);
      const size_t before = live.size();
      auto mapped = mapper_->map({&run, 1}, domain::Access::kReadWrite, &live);
      if (!mapped) {
        EXPECT_THAT(mapped, FailsWith(ErrorCode::kLimit));
        EXPECT_EQ(live.size(), before);
        continue;
      }
      for (uint64_t page = first; page < first + count; ++page) ++counts[page];
    } else {
      const size_t at = random() % live.size();
      MappedRun& run = live[at];
      const uint64_t count = 1 + random() % PagesIn(run.iova.size());  // from its beginning
      mapper_->unmap(run.address, BytesIn(count));
      for (uint64_t page = run.iova.start().page(), n = 0; n < count; ++n, ++page) {
        if (--counts[page] == 0) counts.erase(page);
      }
      if (count == PagesIn(run.iova.size())) {
        live.erase(live.begin() + static_cast<ptrdiff_t>(at));
      } else {
        run = {IovaRange::FromFirstAndLast(run.iova.start() + BytesIn(count), run.iova.last()),
               run.address + BytesIn(count)};
      }
    }
    if (step % 50 != 0) continue;
    mapper_->flush();
    uint64_t held = 0;
    for (const auto& [page, count] : counts) held += count;
    ASSERT_EQ(Figure("mapped_pages"), held);
    for (const MappedRun& run : live) {
      ASSERT_EQ(device_.at(run.address + (run.iova.size() - 1)),
                reinterpret_cast<std::byte*>(host_ + run.iova.last().value()));
    }
    for (const auto& [handle, memory] : device_.memories) {
      const auto next = counts.lower_bound(PagesIn(memory.host - host_));
      ASSERT_TRUE(next != counts.end() && next->first < PagesIn(memory.host + memory.size - host_));
    }
  }
  for (const MappedRun& run : live) mapper_->unmap(run.address, run.iova.size());
  mapper_->flush();
  EXPECT_TRUE(device_.is_empty());
}

}  // namespace
}  // namespace mvgpu::dma
