#include "apionly-domain/assigned/mapped_charges.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "apionly-domain/container.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;

// Keeps what is held, and complains about pages that are held twice.
class FakeRow final : public LedgerRow {
 public:
  struct State {
    std::set<uint64_t> pages;
    uint64_t mapped_pages = 0;
    uint64_t pinned_pages = 0;
    std::vector<LedgerMapping> listed;
    std::vector<IovaRange> unlisted;
    int fail_at_call = 0;  // 1 = the next one; 0 = never
  };
  explicit FakeRow(State* state) : state_(*state) {}

  Result<void> hold(const FileIdentity&, uint64_t file_pages, PageRun pages) override {
    EXPECT_LE(pages.end(), file_pages);
    if (state_.fail_at_call != 0 && --state_.fail_at_call == 0) {
      return Fail(ErrorCode::kLimit, "fake ledger failure");
    }
    for (uint64_t page = pages.first; page < pages.end(); ++page) {
      EXPECT_TRUE(state_.pages.insert(page).second) << page;
    }
    return {};
  }
  void release(const FileIdentity&, PageRun pages) override {
    for (uint64_t page = pages.first; page < pages.end(); ++page) {
      EXPECT_EQ(state_.pages.erase(page), 1u) << page;
    }
  }
  void set_mapped_pages(uint64_t pages) override { state_.mapped_pages = pages; }
  void set_pinned_pages(uint64_t pages) override { state_.pinned_pages = pages; }
  void set_locked_pages(uint64_t) override {}
  void set_locked_areas(uint64_t, uint64_t) override {}
  void set_granule_pages(uint32_t) override {}
  void set_cache(const CacheFigures&) override {}
  void list_mapping(const LedgerMapping& mapping) override { state_.listed.push_back(mapping); }
  void unlist_mapping(IovaRange part) override { state_.unlisted.push_back(part); }
  Counts counts() const override { return {}; }

 private:
  State& state_;
};

class MappedChargesTest : public ::testing::Test {
 protected:
  MappedChargesTest() {
    EXPECT_THAT(container_.map(ram_.map_request(0, 0, ram_.size())), IsOk());
    whole_ = container_.mappings().front();
  }
  ~MappedChargesTest() override { EXPECT_THAT(container_.unmap_all(), IsOk()); }
  Mapping At(uint64_t file_page, uint64_t pages) const {
    return {RangeOf({1000 + file_page, pages}), Access::kRead, whole_.file, BytesIn(file_page)};
  }

  GuestRam ram_{64 * kPageSize};
  Container container_;
  Mapping whole_{RangeOf({0, 1}), Access::kRead, nullptr, 0};
  FakeRow::State row_;
  MappedCharges charges_{std::make_unique<FakeRow>(&row_)};
};

TEST_F(MappedChargesTest, APageIsHeldOnceAndReleasedWithItsLastMapping) {
  ASSERT_THAT(charges_.hold(At(4, 8)), IsOk());
  ASSERT_THAT(charges_.hold(At(0, 16)), IsOk());
  EXPECT_EQ(row_.pages.size(), 16u);
  EXPECT_EQ(row_.mapped_pages, 24u);
  EXPECT_EQ(row_.pinned_pages, 24u);
  charges_.release(At(0, 16));
  EXPECT_EQ(row_.pages.size(), 8u);
  charges_.release(At(4, 2));  // in cuts
  charges_.release(At(6, 6));
  EXPECT_TRUE(row_.pages.empty());
  EXPECT_EQ(row_.mapped_pages, 0u);
}

TEST_F(MappedChargesTest, ReadersSeeWhereThePagesAreUntilTheyGo) {
  ASSERT_THAT(charges_.hold(At(4, 8)), IsOk());
  ASSERT_EQ(row_.listed.size(), 1u);
  EXPECT_EQ(row_.listed[0].iova, RangeOf({1004, 8}));
  EXPECT_EQ(row_.listed[0].access, Access::kRead);
  EXPECT_EQ(row_.listed[0].file, whole_.file->identity());
  EXPECT_EQ(row_.listed[0].file_offset, BytesIn(4));
  row_.fail_at_call = 1;
  EXPECT_THAT(charges_.hold(At(20, 8)), FailsWith(ErrorCode::kLimit));
  EXPECT_EQ(row_.listed.size(), 1u);
  EXPECT_TRUE(row_.unlisted.empty());
  charges_.release(At(4, 2));
  charges_.release(At(6, 6));
  EXPECT_EQ(row_.unlisted, (std::vector{RangeOf({1004, 2}), RangeOf({1006, 6})}));
}

TEST_F(MappedChargesTest, OnAnErrorNothingHasChanged) {
  ASSERT_THAT(charges_.hold(At(4, 2)), IsOk());
  ASSERT_THAT(charges_.hold(At(8, 2)), IsOk());
  for (int call = 1; call <= 3; ++call) {  // what is fresh comes in three runs
    row_.fail_at_call = call;
    EXPECT_THAT(charges_.hold(At(0, 16)), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(row_.pages, (std::set<uint64_t>{4, 5, 8, 9}));
    EXPECT_EQ(row_.mapped_pages, 4u);
  }
  ASSERT_THAT(charges_.hold(At(0, 16)), IsOk());
  EXPECT_EQ(row_.pages.size(), 16u);
  charges_.release(At(0, 16));
  charges_.release(At(4, 2));
  charges_.release(At(8, 2));
}

}  // namespace
}  // namespace mvgpu::domain
