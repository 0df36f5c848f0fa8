// Which pages the domain reports as dirty: copies and pins for write, in which round.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/apionly-domain/domain_fixture.h"
#include "tests/fakes/fake_remote_memory.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using testing::FakeRemoteMemory;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeRange;

class DomainDirtyTest : public DomainTest {
 protected:
  void SetUp() override {
    DomainTest::SetUp();
    Map(0, 0, BytesIn(kPages));
    domain_->start_dirty_log();
  }
  // What is dirty since the last round, by page (or by larger bit).
  std::vector<uint64_t> Round(uint64_t bit_size = kPageSize,
                              DirtyLog::Read read = DirtyLog::Read::kClear) {
    std::vector<uint64_t> bitmap(PagesIn(BytesIn(kPages)) / 64);
    EXPECT_THAT(domain_->read_dirty(range_, bit_size, read, bitmap), IsOk());
    std::vector<uint64_t> set;
    for (uint64_t bit = 0; bit < bitmap.size() * 64; ++bit) {
      if ((bitmap[bit / 64] >> bit % 64 & 1) != 0) set.push_back(bit);
    }
    return set;
  }
  Result<void> Write(uint64_t iova, size_t size) {
    return domain_->write(Iova(iova), std::vector<std::byte>(size));
  }

  static constexpr uint64_t kPages = 1024;
  const IovaRange range_ = MakeRange(0, BytesIn(kPages));
};

TEST_F(DomainDirtyTest, WritesAndTheTargetsOfCopiesMarkReadsDoNot) {
  ASSERT_THAT(Write(0x1ff0, 0x20), IsOk());
  ASSERT_THAT(domain_->copy(Iova(BytesIn(10)), Iova(BytesIn(20)), BytesIn(2)), IsOk());
  ASSERT_THAT(domain_->publish(Iova(BytesIn(30)), std::vector<std::byte>(2)), IsOk());
  std::vector<std::byte> bytes(BytesIn(2));
  ASSERT_THAT(domain_->read(Iova(BytesIn(40)), bytes), IsOk());
  EXPECT_THAT(Round(), ElementsAre(1, 2, 10, 11, 30));
  EXPECT_THAT(Round(), IsEmpty());
}

TEST_F(DomainDirtyTest, WritesByMessageMarkToo) {
  FakeRemoteMemory remote(Iova(BytesIn(kPages)), kPageSize);
  Stop();
  Start({.remote = &remote});
  MapWithoutFile(BytesIn(kPages), kPageSize);
  domain_->start_dirty_log();
  ASSERT_THAT(Write(BytesIn(kPages), 8), IsOk());
  std::vector<uint64_t> bitmap(1);
  ASSERT_THAT(domain_->read_dirty(MakeRange(BytesIn(kPages), kPageSize), kPageSize,
                                  DirtyLog::Read::kClear, bitmap),
              IsOk());
  EXPECT_THAT(bitmap, ElementsAre(1));
}

TEST_F(DomainDirtyTest, ARefusedWriteMarksNothing) {
  EXPECT_THAT(Write(BytesIn(kPages) - 4, 8), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(Round(), IsEmpty());
}

// type1 reports every pinned page in each round.
TEST_F(DomainDirtyTest, APinForWriteIsReportedInEveryRoundAndOnceAfterItsEnd) {
  auto write = Pin(BytesIn(5), BytesIn(3), Access::kWrite);
  auto read_write = Pin(BytesIn(10), kPageSize, Access::kReadWrite);
  auto read = Pin(BytesIn(20), BytesIn(3), Access::kRead);
  for (int round = 0; round < 3; ++round) EXPECT_THAT(Round(), ElementsAre(5, 6, 7, 10)) << round;
  write->reset();
  read->reset();
  EXPECT_THAT(Round(), ElementsAre(5, 6, 7, 10)) << "written until it was released";
  EXPECT_THAT(Round(), ElementsAre(10));
  read_write->reset();
  EXPECT_THAT(Round(), ElementsAre(10));
  EXPECT_THAT(Round(), IsEmpty());
}

TEST_F(DomainDirtyTest, SinglePagesAndLargePinsAreReportedLikewise) {
  const std::vector<Iova> pages = {Iova(BytesIn(700)), Iova(BytesIn(700)), Iova(BytesIn(900))};
  ASSERT_THAT(PinPages(pages, Access::kWrite), IsOk());
  EXPECT_THAT(Round(), ElementsAre(700, 900));
  ASSERT_THAT(context_->unpin_pages(std::span(pages).first(1), Access::kWrite), IsOk());
  EXPECT_THAT(Round(), ElementsAre(700, 900));
  ASSERT_THAT(context_->unpin_pages(std::span(pages).last(2), Access::kWrite), IsOk());
  EXPECT_THAT(Round(), ElementsAre(700, 900));
  EXPECT_THAT(Round(), IsEmpty());
  auto large = Pin(0, BytesIn(600), Access::kWrite);
  EXPECT_EQ(Round().size(), 600u);
  large->split_off(Iova(BytesIn(100))).reset();
  EXPECT_EQ(Round().size(), 600u) << "100 held, 500 just released";
  EXPECT_EQ(Round().size(), 100u);
  large->reset();
  EXPECT_EQ(Round().size(), 100u);
  EXPECT_THAT(Round(), IsEmpty());
}

// libvfio-user lost what mappings that were alive at the start wrote (lesson 29).
TEST_F(DomainDirtyTest, PinsThatWereThereWhenTheLogStartedAreReported) {
  domain_->stop_dirty_log();
  auto pin = Pin(BytesIn(5), BytesIn(2), Access::kWrite);
  auto ended_before = Pin(BytesIn(50), BytesIn(2), Access::kWrite);
  ended_before->reset();
  domain_->start_dirty_log();
  EXPECT_THAT(Round(), ElementsAre(5, 6));
  pin->reset();
  EXPECT_THAT(Round(), ElementsAre(5, 6));
}

TEST_F(DomainDirtyTest, APinThatFailsMarksNothing) {
  pins_->fail_at_call = 1;
  EXPECT_THAT(Pin(BytesIn(5), BytesIn(2), Access::kWrite), FailsWith(ErrorCode::kLimit));
  EXPECT_THAT(Round(), IsEmpty());
}

TEST_F(DomainDirtyTest, EveryContextsPinsAreReported) {
  auto mine = Pin(BytesIn(5), kPageSize, Access::kWrite);
  auto theirs = other_context_->pin(MakeRange(BytesIn(6), kPageSize), Access::kWrite);
  EXPECT_THAT(Round(), ElementsAre(5, 6));
}

TEST_F(DomainDirtyTest, AKeepingReadChangesNothing) {
  ASSERT_THAT(Write(BytesIn(3), 8), IsOk());
  EXPECT_THAT(Round(kPageSize, DirtyLog::Read::kKeep), ElementsAre(3));
  EXPECT_THAT(Round(kPageSize, DirtyLog::Read::kKeep), ElementsAre(3));
  EXPECT_THAT(Round(), ElementsAre(3));
  EXPECT_THAT(Round(kPageSize, DirtyLog::Read::kKeep), IsEmpty());
}

TEST_F(DomainDirtyTest, ABitMayBeLargerThanAPage) {
  ASSERT_THAT(Write(BytesIn(17), 8), IsOk());
  auto pin = Pin(BytesIn(100), BytesIn(200), Access::kWrite);
  EXPECT_THAT(Round(uint64_t{1} << 20, DirtyLog::Read::kKeep), ElementsAre(0, 1));
  EXPECT_THAT(Round(uint64_t{1} << 16, DirtyLog::Read::kKeep),
              ElementsAre(1, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18));
}

// cloud-hypervisor PR 8528.
TEST_F(DomainDirtyTest, AMappingThatComesLaterJoinsALogThatRuns) {
  Map(uint64_t{1} << 40, 0, BytesIn(4));
  ASSERT_THAT(Write((uint64_t{1} << 40) + kPageSize, 8), IsOk());
  std::vector<uint64_t> bitmap(1);
  ASSERT_THAT(domain_->read_dirty(MakeRange(uint64_t{1} << 40, BytesIn(4)), kPageSize,
                                  DirtyLog::Read::kClear, bitmap),
              IsOk());
  EXPECT_THAT(bitmap, ElementsAre(2));
}

TEST_F(DomainDirtyTest, MarksOutliveTheirMapping) {
  ASSERT_THAT(Write(BytesIn(3), 8), IsOk());
  owner_.held = std::move(*Pin(BytesIn(8), kPageSize, Access::kWrite));
  ASSERT_THAT(container_.unmap_all(), IsOk());
  EXPECT_THAT(Round(), ElementsAre(3, 8)) << "also what was pinned until the unmap";
  EXPECT_THAT(Round(), IsEmpty());
}

TEST_F(DomainDirtyTest, AReadWhileNothingIsLoggedIsRefused) {
  domain_->stop_dirty_log();
  std::vector<uint64_t> bitmap(kPages / 64);
  const auto refused = domain_->read_dirty(range_, kPageSize, DirtyLog::Read::kClear, bitmap);
  ASSERT_THAT(refused, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(refused.error().message(), HasSubstr("start the log first"));
}

TEST_F(DomainDirtyTest, ABadBitmapIsRefusedAndClearsNothing) {
  ASSERT_THAT(Write(BytesIn(3), 8), IsOk());
  std::vector<uint64_t> bitmap(kPages / 64 - 1);
  EXPECT_THAT(domain_->read_dirty(range_, kPageSize, DirtyLog::Read::kClear, bitmap),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(domain_->read_dirty(range_, 3 * kPageSize, DirtyLog::Read::kClear, bitmap),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Round(), ElementsAre(3));
}

TEST_F(DomainDirtyTest, APageAtTwoIovasIsDirtyWhereItWasWritten) {
  Map(uint64_t{1} << 40, 0, BytesIn(4));
  ASSERT_THAT(Write(uint64_t{1} << 40, 8), IsOk());
  EXPECT_THAT(Round(), IsEmpty());
}

}  // namespace
}  // namespace mvgpu::domain
