#include "apionly-domain/pin/device_pins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using testing::IsOk;

constexpr FileIdentity kRam{1, 100};
constexpr FileIdentity kOther{1, 101};

// Keeps what it was told of, and complains when it is told what it knows.
class Listener final : public DevicePins::Sharer {
 public:
  void on_device_holds(const FileIdentity& file, PageRun pages) override {
    for (uint64_t page = pages.first; page < pages.end(); ++page) {
      EXPECT_TRUE(held.insert({file.inode, page}).second) << page;
    }
  }
  Result<void> on_device_leaves(const FileIdentity& file, PageRun pages) override {
    asked.push_back(pages);
    if (refuses_at != 0 && --refuses_at == 0) return Fail(ErrorCode::kLimit, "no");
    for (uint64_t page = pages.first; page < pages.end(); ++page) {
      EXPECT_EQ(held.erase({file.inode, page}), 1u) << page;
    }
    return {};
  }
  std::set<std::pair<uint64_t, uint64_t>> held;
  std::vector<PageRun> asked;
  int refuses_at = 0;  // 1 = the next one; 0 = never
};

class DevicePinsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    pins_.join(&a_);
    pins_.join(&b_);
  }
  void TearDown() override {
    EXPECT_EQ(a_.held, b_.held);
    EXPECT_EQ(a_.held.size(), pins_.unique_pages());
    pins_.leave(&a_);
    pins_.leave(&b_);
  }
  DevicePins pins_;
  Listener a_;
  Listener b_;
};

TEST_F(DevicePinsTest, SharersHearOfTheFirstMappingAndOfTheLast) {
  pins_.add(kRam, {10, 10});
  pins_.add(kRam, {15, 10});
  pins_.add(kOther, {15, 1});
  EXPECT_EQ(a_.held.size(), 16u);
  ASSERT_THAT(pins_.remove(kRam, {10, 10}), IsOk());
  EXPECT_THAT(a_.asked, ElementsAre(PageRun{10, 5}));
  ASSERT_THAT(pins_.remove(kRam, {20, 5}), IsOk());  // in another cut
  ASSERT_THAT(pins_.remove(kRam, {15, 5}), IsOk());
  EXPECT_EQ(pins_.unique_pages(), 1u);
  ASSERT_THAT(pins_.remove(kOther, {15, 1}), IsOk());
}

TEST_F(DevicePinsTest, WhereOneCannotTakeThemNobodyHas) {
  pins_.add(kRam, {10, 20});
  pins_.add(kRam, {15, 2});
  for (const int call : {1, 2}) {  // the last pages are two runs
    b_.refuses_at = call;
    EXPECT_THAT(pins_.remove(kRam, {10, 20}), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(pins_.unique_pages(), 20u);
    EXPECT_EQ(a_.held, b_.held);
  }
  ASSERT_THAT(pins_.remove(kRam, {10, 20}), IsOk());
  EXPECT_EQ(pins_.unique_pages(), 2u);
  ASSERT_THAT(pins_.remove(kRam, {15, 2}), IsOk());
}

TEST_F(DevicePinsTest, WhoComesLateHearsOfAllThatIsHeld) {
  pins_.add(kRam, {10, 5});
  pins_.add(kRam, {12, 10});
  pins_.add(kOther, {1, 1});
  Listener late;
  pins_.join(&late);
  EXPECT_EQ(late.held, a_.held);
  ASSERT_THAT(pins_.remove(kRam, {10, 5}), IsOk());
  ASSERT_THAT(pins_.remove(kRam, {12, 10}), IsOk());
  pins_.leave(&late);
  ASSERT_THAT(pins_.remove(kOther, {1, 1}), IsOk());
  EXPECT_EQ(late.held.size(), 1u) << "it has left";
}

}  // namespace
}  // namespace mvgpu::domain
