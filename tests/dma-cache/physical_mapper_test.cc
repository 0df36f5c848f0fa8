#include "dma-cache/physical_mapper.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>

#include "apionly-domain/pin/pin_backend.h"
#include "tests/fakes/fake_pagemap.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/page_arrival.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::dma {
namespace {

using domain::GuestFile;
using domain::PinnedRun;
using testing::FailsWith;
using testing::FakePagemap;
using testing::GuestRam;
using testing::IsOk;
using testing::MakeRange;

constexpr uint64_t kIova = 0x40000000;

PinnedRun RunOf(std::byte* host, uint64_t pages, uint64_t iova = kIova) {
  return {MakeRange(iova, BytesIn(pages)), host};
}

// Frames as the test itself reads them, past the code under test.
// 0 for a page that is not there, or is being moved now.
uint64_t FrameOf(const std::byte* host) {
  const UniqueFd fd(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  uint64_t word = 0;
  const auto offset = static_cast<off_t>(std::bit_cast<uint64_t>(host) / 4096 * 8);
  EXPECT_EQ(pread(fd.get(), &word, sizeof(word), offset), 8);
  return (word >> 63) != 0 ? word & 0x7fffffffffffffull : 0;
}

// What the kernel's table says is given to the mapper by the test.
class FakedPagemapTest : public ::testing::Test {
 protected:
  void SetUp() override {
    pagemap_.fill_stack();
    auto mapper = PhysicalMapper::Create(pagemap_.path());
    ASSERT_THAT(mapper, IsOk());
    mapper_ = std::move(*mapper);
  }
  Result<void> Map(std::vector<PinnedRun> runs) {
    return mapper_->map(runs, domain::Access::kReadWrite, &mapped_);
  }
  std::byte* Page(uint64_t page) { return ram_.at(BytesIn(page)); }

  GuestRam ram_{2048 * kPageSize};
  FakePagemap pagemap_;
  std::unique_ptr<PhysicalMapper> mapper_;
  std::vector<MappedRun> mapped_;
};

TEST_F(FakedPagemapTest, NeighboursInPhysicalMemoryAreOneRun) {
  pagemap_.set_present(Page(0), 3, 0x1000);  // three frames in a row
  pagemap_.set_present(Page(3), 1, 0x2000);
  pagemap_.set_present(Page(4), 1, 0x1fff);  // a row, but downwards
  ASSERT_THAT(Map({RunOf(Page(0), 5)}), IsOk());
  EXPECT_THAT(mapped_, ::testing::ElementsAre(
                           MappedRun{MakeRange(kIova, 0x3000), DmaAddr(0x1000000)},
                           MappedRun{MakeRange(kIova + 0x3000, 0x1000), DmaAddr(0x2000000)},
                           MappedRun{MakeRange(kIova + 0x4000, 0x1000), DmaAddr(0x1fff000)}));
}

TEST_F(FakedPagemapTest, RunsOfDifferentHostMemoryAreJoinedWhereTheirFramesGoOn) {
  pagemap_.set_present(Page(0), 2, 0x500);
  pagemap_.set_present(Page(9), 2, 0x502);
  ASSERT_THAT(Map({RunOf(Page(0), 2), RunOf(Page(9), 2, kIova + 0x2000)}), IsOk());
  EXPECT_THAT(mapped_,
              ::testing::ElementsAre(MappedRun{MakeRange(kIova, 0x4000), DmaAddr(0x500000)}));
}

TEST_F(FakedPagemapTest, WhatWasMappedBeforeIsNeitherJoinedNorTakenBack) {
  mapped_.push_back({MakeRange(kIova - 0x1000, 0x1000), DmaAddr(0x4ff000)});
  pagemap_.set_present(Page(0), 1, 0x500);
  ASSERT_THAT(Map({RunOf(Page(0), 1)}), IsOk());
  EXPECT_EQ(mapped_.size(), 2u);
  EXPECT_THAT(Map({RunOf(Page(0), 2)}), FailsWith(ErrorCode::kNotReachable));
  EXPECT_EQ(mapped_.size(), 2u);
}

TEST_F(FakedPagemapTest, RunsOfAnyLengthAreReadInBatches) {
  for (uint64_t page = 0; page < 1500; ++page)
    pagemap_.set_present(Page(page), 1, 0x9000 - 2 * page);
  ASSERT_THAT(Map({RunOf(Page(0), 1500)}), IsOk());
  ASSERT_EQ(mapped_.size(), 1500u);
  for (uint64_t page = 0; page < 1500; ++page) {
    EXPECT_EQ(mapped_[page].address, DmaAddr(BytesIn(0x9000 - 2 * page)));
    EXPECT_EQ(mapped_[page].iova.start(), Iova(kIova + BytesIn(page)));
  }
}

TEST_F(FakedPagemapTest, APageThatIsSwappedOutHasNoAddress) {
  pagemap_.set_present(Page(0), 1, 0x700);
  pagemap_.set_swapped(Page(1));
  auto done = Map({RunOf(Page(0), 2)});
  ASSERT_THAT(done, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(done.error().message(), ::testing::HasSubstr("0x40001000"));
  EXPECT_THAT(done.error().message(), ::testing::HasSubstr("swapped out"));
  EXPECT_TRUE(mapped_.empty());
  EXPECT_THAT(mapper_->figures(), ::testing::Contains(::testing::Pair("mapped_pages", 0u)));
}

TEST_F(FakedPagemapTest, HiddenFramesAreAnErrorWithARemedy) {
  pagemap_.set_present(Page(0), 1, 0);
  auto done = Map({RunOf(Page(0), 1)});
  ASSERT_THAT(done, FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(done.error().message(), ::testing::HasSubstr("CAP_SYS_ADMIN"));
}

TEST_F(FakedPagemapTest, CreateSaysSoWhenFramesAreHidden) {
  FakePagemap hidden;
  hidden.fill_stack(/*frame=*/0);
  auto mapper = PhysicalMapper::Create(hidden.path());
  ASSERT_THAT(mapper, FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(mapper.error().message(), ::testing::HasSubstr("CAP_SYS_ADMIN"));
}

TEST_F(FakedPagemapTest, APagemapThatEndsIsASystemError) {
  FakePagemap empty;
  EXPECT_THAT(PhysicalMapper::Create(empty.path()), FailsWith(ErrorCode::kSystem));
  EXPECT_THAT(PhysicalMapper::Create("/nonexistent/pagemap"), FailsWith(ErrorCode::kSystem));
}

TEST_F(FakedPagemapTest, APageThatMovesIsNotCurrentAndItsNeighboursAre) {
  pagemap_.set_present(Page(0), 600, 0x1000);
  const PinnedRun run = RunOf(Page(0), 600);
  ASSERT_THAT(Map({run}), IsOk());
  EXPECT_TRUE(mapper_->is_current(run, DmaAddr(0x1000000)));
  pagemap_.set_present(Page(599), 1, 0x7777);
  EXPECT_FALSE(mapper_->is_current(run, DmaAddr(0x1000000)));
  EXPECT_TRUE(mapper_->is_current(RunOf(Page(0), 599), DmaAddr(0x1000000)));
  pagemap_.set_swapped(Page(3));
  EXPECT_FALSE(mapper_->is_current(RunOf(Page(3), 1), DmaAddr(0x1003000)));
  EXPECT_THAT(mapper_->figures(), ::testing::Contains(::testing::Pair("moved_pages", 2u)));
}

// What Create() says in a child process that gave these capabilities up, "" where it says nothing.
// The child ends without running what belongs to the test program.
std::string CreateWithout(std::initializer_list<unsigned> capabilities, const std::string& path) {
  std::array<int, 2> ends = {};
  MVGPU_CHECK(pipe2(ends.data(), O_CLOEXEC) == 0);
  UniqueFd from(ends[0]);
  UniqueFd to(ends[1]);
  const pid_t child = fork();
  MVGPU_CHECK(child >= 0);
  if (child == 0) {
    __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    std::array<__user_cap_data_struct, 2> sets = {};
    if (syscall(SYS_capget, &header, sets.data()) != 0) _exit(2);
    for (const unsigned capability : capabilities) {
      const uint32_t bit = 1u << capability % 32;
      sets[capability / 32].effective &= ~bit;
      sets[capability / 32].permitted &= ~bit;
      sets[capability / 32].inheritable &= ~bit;
    }
    if (syscall(SYS_capset, &header, sets.data()) != 0) _exit(3);
    const auto mapper = PhysicalMapper::Create(path);
    const std::string said = mapper ? std::string()
                                    : fmt::format("{}: {}", ErrorCodeName(mapper.error().code()),
                                                  mapper.error().message());
    _exit(write(to.get(), said.data(), said.size()) == static_cast<ssize_t>(said.size()) ? 0 : 4);
  }
  to.reset();
  std::array<char, 1024> said;
  const ssize_t size = read(from.get(), said.data(), said.size());
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  return {said.data(), size > 0 ? static_cast<size_t>(size) : 0};
}

TEST(PhysicalMapperTest, AProcessWithoutCapSysAdminIsToldSo) {
  EXPECT_THAT(CreateWithout({CAP_SYS_ADMIN}, "/proc/self/pagemap"),
              ::testing::AllOf(::testing::StartsWith("permission: "),
                               ::testing::HasSubstr("CAP_SYS_ADMIN")));
}

TEST(PhysicalMapperTest, AProcessThatMayNotOpenItsPagemapIsToldSo) {
  std::string path = ::testing::TempDir() + "pagemap.XXXXXX";
  const UniqueFd file(mkstemp(path.data()));
  ASSERT_TRUE(file.is_valid());
  ASSERT_EQ(fchmod(file.get(), 0), 0);
  EXPECT_THAT(CreateWithout({CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH}, path),
              ::testing::AllOf(::testing::StartsWith("permission: "), ::testing::HasSubstr(path),
                               ::testing::HasSubstr("CAP_SYS_ADMIN")));
  // What is wrong with another file is not a matter of permission.
  EXPECT_THAT(CreateWithout({CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH}, path + "/no"),
              ::testing::StartsWith("system: "));
  EXPECT_EQ(unlink(path.c_str()), 0);
}

// Its second look comes when the page has arrived, and there is one.
class MovingPageTest : public FakedPagemapTest {
 protected:
  void SetUp() override {
    FakedPagemapTest::SetUp();
    pagemap_.set_present(Page(0), 3, 0x700);
    pagemap_.set_moving(Page(1), 0x701);
  }
  // What the kernel's table says of the page by then.
  void ArrivesWith(std::function<void()> entry) {
    arrival_ = testing::PageArrival::Create(Page(1), std::move(entry));
    if (arrival_ == nullptr) GTEST_SKIP() << "no userfaultfd for this process";
  }

  std::unique_ptr<testing::PageArrival> arrival_;
};

TEST_F(MovingPageTest, APageThatIsBeingMovedIsWaitedFor) {
  ASSERT_NO_FATAL_FAILURE(ArrivesWith([this] { pagemap_.set_present(Page(1), 1, 0x900); }));
  if (IsSkipped()) return;
  ASSERT_THAT(Map({RunOf(Page(0), 3)}), IsOk());
  EXPECT_THAT(mapped_, ::testing::ElementsAre(
                           MappedRun{MakeRange(kIova, 0x1000), DmaAddr(0x700000)},
                           MappedRun{MakeRange(kIova + 0x1000, 0x1000), DmaAddr(0x900000)},
                           MappedRun{MakeRange(kIova + 0x2000, 0x1000), DmaAddr(0x702000)}));
  EXPECT_EQ(arrival_->waits(), 1);
}

TEST_F(MovingPageTest, APageThatWasTriedToMoveInVainIsCurrentAndOneThatMovedIsNot) {
  ASSERT_NO_FATAL_FAILURE(ArrivesWith([this] { pagemap_.set_present(Page(1), 1, 0x701); }));
  if (IsSkipped()) return;
  EXPECT_TRUE(mapper_->is_current(RunOf(Page(0), 3), DmaAddr(0x700000)));
  EXPECT_EQ(arrival_->waits(), 1);
  pagemap_.set_present(Page(1), 1, 0x900);
  EXPECT_FALSE(mapper_->is_current(RunOf(Page(0), 3), DmaAddr(0x700000)));
  EXPECT_THAT(mapper_->figures(), ::testing::Contains(::testing::Pair("moved_pages", 1u)));
}

TEST_F(MovingPageTest, APageThatDoesNotComeBackIsAnErrorAfterOneWait) {
  ASSERT_NO_FATAL_FAILURE(ArrivesWith([this] { pagemap_.set_swapped(Page(1)); }));
  if (IsSkipped()) return;
  const auto done = Map({RunOf(Page(0), 3)});
  ASSERT_THAT(done, FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(done.error().message(), ::testing::HasSubstr("swapped out"));
  EXPECT_EQ(arrival_->waits(), 1);
  EXPECT_TRUE(mapped_.empty());
}

// The page is in no file any more: nobody can bring it back, and nobody is killed by the attempt.
TEST_F(MovingPageTest, APageThatWasTruncatedAwayIsAnErrorAtOnce) {
  GuestRam shrinking(4 * kPageSize, /*seals=*/0);
  std::byte* const page = shrinking.at(BytesIn(2));
  pagemap_.set_moving(page, 0x900);
  ASSERT_EQ(ftruncate(shrinking.fd(), kPageSize), 0);
  EXPECT_THAT(Map({RunOf(page, 1)}), FailsWith(ErrorCode::kNotReachable));
}

// The kernel of this machine. Pages scattered over a memfd, held by a pin back end; the kernel is
// asked to compact memory, which moves whatever it may.
class RealPagemapTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kPages = 8192;
  static constexpr uint64_t kStride = 8;

  void SetUp() override {
    auto mapper = PhysicalMapper::Create();
    if (!mapper) GTEST_SKIP() << mapper.error().message();
    mapper_ = std::move(*mapper);
    auto file = GuestFile::Create(ram_.duplicate());
    ASSERT_THAT(file, IsOk());
    file_ = std::move(*file);
  }
  void TearDown() override {
    for (uint64_t i = 0; i < pinned_; ++i) backend_->unpin(*file_, {i * kStride, 1});
  }
  // Holes between the pages that stay are where others may be moved to.
  void HoldScattered(std::unique_ptr<domain::PinBackend> backend) {
    std::memset(ram_.at(0), 0x5a, ram_.size());
    for (uint64_t page = 0; page < kPages; ++page) {
      if (page % kStride == 0) continue;
      ASSERT_EQ(fallocate(ram_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          static_cast<off_t>(BytesIn(page)), kPageSize),
                0);
    }
    backend_ = std::move(backend);
    for (uint64_t page = 0; page < kPages; page += kStride) {
      ASSERT_THAT(backend_->pin(*file_, {page, 1}), IsOk());
      ++pinned_;
      ASSERT_THAT(mapper_->map({{Run(page)}}, domain::Access::kReadWrite, &mapped_), IsOk());
    }
  }
  PinnedRun Run(uint64_t page) {
    return RunOf(file_->host_address(BytesIn(page)), 1, BytesIn(page));
  }
  static bool Compact() {
    const UniqueFd fd(open("/proc/sys/vm/compact_memory", O_WRONLY | O_CLOEXEC));
    return fd.is_valid() && write(fd.get(), "1", 1) == 1;
  }
  // How many pages moved, as the mapper noticed; it must have noticed exactly those. The kernel
  // also compacts by itself and for others: what it moved while this looked is not judged.
  uint64_t MovedPages() {
    uint64_t moved = 0;
    uint64_t judged = 0;
    for (uint64_t i = 0; i < mapped_.size(); ++i) {
      const PinnedRun run = Run(i * kStride);
      const uint64_t before = FrameOf(run.host);
      const bool is_current = mapper_->is_current(run, mapped_[i].address);
      if (before == 0 || FrameOf(run.host) != before) continue;
      EXPECT_EQ(is_current, before == mapped_[i].address.page()) << i;
      if (!is_current) ++moved;
      ++judged;
    }
    EXPECT_GT(judged, mapped_.size() / 2);
    return moved;
  }

  GuestRam ram_{kPages * kPageSize};
  std::unique_ptr<PhysicalMapper> mapper_;
  std::unique_ptr<GuestFile> file_;
  std::unique_ptr<domain::PinBackend> backend_;
  uint64_t pinned_ = 0;
  std::vector<MappedRun> mapped_;
};

TEST_F(RealPagemapTest, PagesThatTheKernelMovesInSpiteOfMlockAreNoticed) {
  HoldScattered(domain::MakeMlockPinBackend());
  if (HasFatalFailure()) return;
  MovedPages();
  if (!Compact()) GTEST_SKIP() << "this kernel has no /proc/sys/vm/compact_memory";
  const uint64_t moved = MovedPages();
  RecordProperty("moved_pages", static_cast<int>(moved));
  if (moved == 0) GTEST_SKIP() << "the kernel found nothing to move";
}

TEST_F(RealPagemapTest, PagesThatIoUringPinsDoNotMove) {
  auto backend = domain::MakeIoUringPinBackend();
  if (!backend) GTEST_SKIP() << backend.error().message();
  HoldScattered(std::move(*backend));
  if (HasFatalFailure()) return;
  EXPECT_EQ(MovedPages(), 0u);
  if (!Compact()) GTEST_SKIP() << "this kernel has no /proc/sys/vm/compact_memory";
  EXPECT_EQ(MovedPages(), 0u);
}

TEST_F(RealPagemapTest, APageThatWasReplacedIsNotCurrent) {
  std::memset(ram_.at(0), 1, kPageSize);
  const PinnedRun run = RunOf(ram_.at(0), 1);
  ASSERT_THAT(mapper_->map({{run}}, domain::Access::kReadWrite, &mapped_), IsOk());
  // The pipe keeps the frame in use, so that the page cannot get it again.
  std::array<int, 2> ends = {};
  ASSERT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
  const UniqueFd from(ends[0]);
  const UniqueFd to(ends[1]);
  const iovec part = {ram_.at(0), kPageSize};
  ASSERT_EQ(vmsplice(to.get(), &part, 1, 0), static_cast<ssize_t>(kPageSize));
  ASSERT_TRUE(mapper_->is_current(run, mapped_.front().address));
  ASSERT_EQ(fallocate(ram_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kPageSize), 0);
  EXPECT_FALSE(mapper_->is_current(run, mapped_.front().address));  // not in memory
  std::memset(ram_.at(0), 2, kPageSize);
  EXPECT_FALSE(mapper_->is_current(run, mapped_.front().address));  // somewhere else
}

TEST_F(RealPagemapTest, APageThatNobodyTouchedHasNoAddress) {
  EXPECT_THAT(mapper_->map({{RunOf(ram_.at(0), 1)}}, domain::Access::kReadWrite, &mapped_),
              FailsWith(ErrorCode::kNotReachable));
}

}  // namespace
}  // namespace mvgpu::dma
