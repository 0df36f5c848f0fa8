#include <vector>

#include "apionly-domain/faults/balloon.h"
#include "tests/apionly-domain/coiommu/coiommu_fixture.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using testing::IsOk;

class CoiommuBalloonTest : public CoiommuTest, public Balloon::Owner {
 protected:
  Result<void> give_back(IovaRange range) override {
    given_.push_back(PagesOf(range));
    for (uint64_t page = given_.back().first; page < given_.back().end(); ++page) {
      EXPECT_FALSE(pins_of_guest_->is_pinned(page));
    }
    return {};
  }
  std::vector<PageRun> given_;
};

TEST_F(CoiommuBalloonTest, WhatADriverHasMappedStays) {
  for (const uint64_t frame : {4, 5, 6}) ASSERT_TRUE(guest_->map(frame));
  guest_->unmap(4);
  guest_->unmap(6);
  const std::vector<uint32_t> frames{6, 5, 4, 3};
  const auto given = Balloon({nullptr, pins_of_guest_.get(), this}).inflate(frames);
  ASSERT_THAT(given, IsOk());
  EXPECT_EQ(given->pages, 3u);
  EXPECT_EQ(given->in_use, 1u);
  EXPECT_THAT(given_, ElementsAre(PageRun{3, 2}, PageRun{6, 1}));
  EXPECT_TRUE(pins_of_guest_->is_pinned(5));
  EXPECT_EQ(pins_of_guest_->counters().forced, 2u);
  ExpectConsistent();
  guest_->unmap(5);
}

}  // namespace
}  // namespace mvgpu::domain
