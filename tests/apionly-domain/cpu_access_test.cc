// Copies of guest memory without a pin: over pieces of every kind, and what refuses them.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "tests/apionly-domain/domain_fixture.h"
#include "tests/fakes/fake_remote_memory.h"

namespace mvgpu::domain {
namespace {

using ::testing::ElementsAre;
using testing::FailsWith;
using testing::FakeRemoteMemory;
using testing::GuestRam;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::MakeRange;

using Bytes = std::vector<std::byte>;

// IOVA pages: 0-3 file (pages 8-11), 4-5 without a file, 6-7 file (pages 2-3), 8 file, read-only.
class CpuAccessTest : public DomainTest {
 protected:
  void SetUp() override {
    Start({.remote = &remote_});
    ram_.fill_pattern();
    for (size_t i = 0; i < remote_.bytes().size(); ++i) {
      remote_.bytes()[i] = static_cast<std::byte>(i * 17 + 5);
    }
    Map(0, BytesIn(8), BytesIn(4));
    MapWithoutFile(kRemote, BytesIn(2));
    Map(BytesIn(6), BytesIn(2), BytesIn(2));
    Map(kReadOnly, BytesIn(4), kPageSize, Access::kRead);
  }
  // What lies at an IOVA of the layout above.
  std::byte At(uint64_t iova) {
    const uint64_t page = iova >> kPageShift;
    if (page < 4) return *ram_.at(iova + BytesIn(8));
    if (page < 6) return remote_.bytes()[iova - kRemote];
    return *ram_.at(iova - BytesIn(4));
  }
  Bytes Expected(uint64_t iova, size_t size) {
    Bytes bytes(size);
    for (size_t i = 0; i < size; ++i) bytes[i] = At(iova + i);
    return bytes;
  }
  Bytes Read(uint64_t iova, size_t size) {
    Bytes bytes(size);
    EXPECT_THAT(domain_->read(Iova(iova), bytes), IsOk());
    return bytes;
  }
  Result<void> TryRead(uint64_t iova, size_t size) {
    Bytes bytes(size);
    return domain_->read(Iova(iova), bytes);
  }
  Result<void> TryWrite(uint64_t iova, size_t size) {
    return domain_->write(Iova(iova), Bytes(size, std::byte{0xee}));
  }

  static constexpr uint64_t kRemote = BytesIn(4);
  static constexpr uint64_t kReadOnly = BytesIn(8);
  static constexpr uint64_t kHole = BytesIn(9);
  FakeRemoteMemory remote_{Iova(kRemote), BytesIn(2)};
};

TEST_F(CpuAccessTest, AReadGoesOverPiecesOfEveryKind) {
  EXPECT_EQ(Read(0, kHole), Expected(0, kHole));
  EXPECT_EQ(remote_.calls(), 1) << "one message for the piece without a file";
  EXPECT_EQ(Read(kRemote - 1, 2), Expected(kRemote - 1, 2));
  EXPECT_EQ(Read(kRemote + 100, 50), Expected(kRemote + 100, 50));
  EXPECT_EQ(Read(BytesIn(6) - 3, 6), Expected(BytesIn(6) - 3, 6));
  EXPECT_EQ(pins_->calls, 0u);
}

TEST_F(CpuAccessTest, AWriteGoesOverPiecesOfEveryKind) {
  Bytes news(BytesIn(3));
  for (size_t i = 0; i < news.size(); ++i) news[i] = static_cast<std::byte>(i * 29 + 1);
  const uint64_t start = kRemote - 100;
  const std::byte before = At(start - 1);
  const std::byte behind = At(start + news.size());
  ASSERT_THAT(domain_->write(Iova(start), news), IsOk());
  EXPECT_EQ(Expected(start, news.size()), news);
  EXPECT_EQ(At(start - 1), before);
  EXPECT_EQ(At(start + news.size()), behind);
}

TEST_F(CpuAccessTest, CopiesGoBetweenAnyPieces) {
  struct Case {
    uint64_t to, from, size;
  };
  for (const Case c : {Case{0x10, 0x2020, 0x1000},                // file to file
                       Case{kRemote + 0x20, 0x123, 0x1500},       // file to remote, in two steps
                       Case{0x321, kRemote + 0x7, 0x1ff0},        // remote to file
                       Case{BytesIn(6) - 0x800, 0x801, 0x1000},   // onto remote and file
                       Case{0x0, BytesIn(4) - 0x10, BytesIn(3)},  // from file, remote and file
                       Case{0x0, kReadOnly, kPageSize}}) {        // from read-only memory
    SCOPED_TRACE(c.to);
    const Bytes expected = Expected(c.from, c.size);
    ASSERT_THAT(domain_->copy(Iova(c.to), Iova(c.from), c.size), IsOk());
    EXPECT_EQ(Expected(c.to, c.size), expected);
  }
}

TEST_F(CpuAccessTest, ACopyOntoItselfIsRefused) {
  const Bytes before = Expected(0, BytesIn(4));
  for (const uint64_t to : {0x1000u, 0x1001u, 0x1fffu, 0xfffu, 0x1u}) {
    EXPECT_THAT(domain_->copy(Iova(to), Iova(0x1000), 0x1000), FailsWith(ErrorCode::kInvalid))
        << to;
  }
  EXPECT_EQ(Expected(0, BytesIn(4)), before);
  EXPECT_THAT(domain_->copy(Iova(0x2000), Iova(0x1000), 0x1000), IsOk()) << "neighbours are fine";
  EXPECT_THAT(domain_->copy(Iova(0), Iova(0x1000), 0x1000), IsOk());
}

TEST_F(CpuAccessTest, NumbersThatWrapOrAreEmptyAreRefused) {
  const uint64_t end = UINT64_MAX - 7;
  EXPECT_THAT(TryRead(end, 9), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(TryWrite(end, 9), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(TryRead(end, 8), FailsWith(ErrorCode::kNotMapped)) << "no wrap, just nothing there";
  EXPECT_THAT(domain_->copy(Iova(end), Iova(0), 9), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(domain_->copy(Iova(0), Iova(end), 9), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(domain_->copy(Iova(0), Iova(0x1000), UINT64_MAX), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(domain_->copy(Iova(0), Iova(0x1000), 0), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(TryRead(0, 0), FailsWith(ErrorCode::kInvalid));
}

TEST_F(CpuAccessTest, ReadOnlyMemoryIsReadButNotWritten) {
  const Bytes before = Expected(kReadOnly, kPageSize);
  EXPECT_THAT(TryRead(kReadOnly, kPageSize), IsOk());
  EXPECT_THAT(TryWrite(kReadOnly, 1), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(TryWrite(kReadOnly - 1, 2), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(domain_->copy(Iova(kReadOnly), Iova(0), 1), FailsWith(ErrorCode::kPermission));
  EXPECT_THAT(domain_->publish(Iova(kReadOnly), before), FailsWith(ErrorCode::kPermission));
  EXPECT_EQ(Expected(kReadOnly, kPageSize), before);
}

// type1 asks for READ even to write.
TEST_F(CpuAccessTest, WriteOnlyMemoryIsWrittenButNotRead) {
  Map(BytesIn(20), BytesIn(20), kPageSize, Access::kWrite);
  EXPECT_THAT(TryWrite(BytesIn(20), 8), IsOk());
  EXPECT_THAT(TryRead(BytesIn(20), 8), FailsWith(ErrorCode::kPermission));
}

TEST_F(CpuAccessTest, NothingIsTouchedUnlessTheWholeRangeAllowsIt) {
  const Bytes before = Expected(0, kHole);
  EXPECT_THAT(TryWrite(0, kHole + 1), FailsWith(ErrorCode::kPermission)) << "read-only comes first";
  EXPECT_THAT(TryWrite(kHole, 1), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(domain_->copy(Iova(0), Iova(kReadOnly), kPageSize + 1),
              FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(domain_->copy(Iova(BytesIn(7)), Iova(0), kPageSize + 1),
              FailsWith(ErrorCode::kPermission));
  EXPECT_EQ(Expected(0, kHole), before);
  EXPECT_EQ(remote_.calls(), 0);
  EXPECT_EQ(domain_->check(MakeRange(0, kHole + 1), Access::kRead).error().code(),
            ErrorCode::kNotReachable);
}

TEST_F(CpuAccessTest, MemoryWithoutAFileNeedsSomebodyToAsk) {
  Start({});  // without a RemoteMemory
  EXPECT_THAT(TryRead(kRemote, 8), FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(TryWrite(kRemote - 4, 8), FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(TryRead(kRemote - 8, 8), IsOk());
}

TEST_F(CpuAccessTest, RightsOfMemoryWithoutAFileHoldToo) {
  MapWithoutFile(BytesIn(30), kPageSize, Access::kRead);
  EXPECT_THAT(TryWrite(BytesIn(30), 1), FailsWith(ErrorCode::kPermission));
  EXPECT_EQ(remote_.calls(), 0) << "the vmm is not asked for what it forbade";
}

TEST_F(CpuAccessTest, ARefusalOfTheVmmIsTheAnswer) {
  remote_.refuse_from_call(1);
  EXPECT_THAT(TryRead(0, BytesIn(6)), FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(TryWrite(0, BytesIn(6)), FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(domain_->copy(Iova(0), Iova(kRemote), 8), FailsWith(ErrorCode::kNotReachable));
  remote_.refuse_from_call(remote_.calls() + 2);
  EXPECT_THAT(domain_->copy(Iova(kRemote), Iova(0), BytesIn(2)),
              FailsWith(ErrorCode::kNotReachable))
      << "in the middle";
}

TEST_F(CpuAccessTest, AfterAnUnmapNothingIsReached) {
  ASSERT_THAT(container_.unmap(Iova(kRemote), BytesIn(2)), IsOk());
  EXPECT_THAT(TryRead(kRemote, 1), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(TryRead(kRemote - 1, 2), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(TryRead(kRemote - 1, 1), IsOk());
}

TEST_F(CpuAccessTest, ASplitOfMemoryWithoutAFileKeepsBothEnds) {
  MapWithoutFile(BytesIn(30), BytesIn(3));
  ASSERT_THAT(container_.unmap(Iova(BytesIn(31)), kPageSize, Container::Cut::kSplit), IsOk());
  remote_.refuse_from_call(1);  // reached is enough
  EXPECT_THAT(TryRead(BytesIn(30), 1), FailsWith(ErrorCode::kNotReachable));
  EXPECT_THAT(TryRead(BytesIn(31), 1), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(TryRead(BytesIn(32), 1), FailsWith(ErrorCode::kNotReachable));
  EXPECT_EQ(remote_.calls(), 2);
}

TEST_F(CpuAccessTest, ATruncatedFileIsAnErrorOfThisGuestOnly) {
  GuestRam unsealed(4 * kPageSize, /*seals=*/0);
  constexpr uint64_t kUnsealed = BytesIn(100);
  ASSERT_THAT(container_.map(unsealed.map_request(kUnsealed, 0, unsealed.size())), IsOk());
  ASSERT_EQ(ftruncate(unsealed.fd(), kPageSize), 0);
  const uint64_t gone = kUnsealed + kPageSize;
  for (int i = 0; i < 2; ++i) {
    const auto refused = TryRead(gone - 8, 16);
    ASSERT_THAT(refused, FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(refused.error().message(), HasSubstr("seal it against shrinking"));
    EXPECT_THAT(TryWrite(gone, 16), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(domain_->copy(Iova(0), Iova(gone), 16), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(domain_->copy(Iova(gone), Iova(0), 16), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(domain_->copy(Iova(kRemote), Iova(gone), 16), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(domain_->copy(Iova(gone), Iova(kRemote), 16), FailsWith(ErrorCode::kTruncated));
  }
  EXPECT_THAT(TryRead(kUnsealed, kPageSize), IsOk()) << "what is left";
  EXPECT_THAT(TryRead(0, BytesIn(4)), IsOk()) << "other files";
  EXPECT_THAT(container_.unmap(Iova(kUnsealed), unsealed.size()), IsOk()) << "no section is left";
}

TEST_F(CpuAccessTest, PinnedPagesAreReadWithoutATranslation) {
  auto pin = Pin(BytesIn(1), BytesIn(2), Access::kRead);
  ASSERT_THAT(pin, IsOk());
  Bytes bytes(100);
  ASSERT_THAT(domain_->read_pinned(pin->runs()[0], Iova(BytesIn(2) - 50), bytes), IsOk());
  EXPECT_EQ(bytes, Expected(BytesIn(2) - 50, 100));
}

struct SeenReads final : AccessObserver {
  void on_guest_read(Iova iova, std::span<const std::byte> bytes) override {
    reads.emplace_back(iova.value(), bytes.size());
  }
  std::vector<std::pair<uint64_t, size_t>> reads;
};

TEST_F(CpuAccessTest, AnObserverSeesWhatLeftGuestMemoryAndNothingElse) {
  SeenReads seen;
  auto domain = ApiOnlyDomain::Create({.name = "observed"}, MakeNonePinBackend(), nullptr, &seen);
  ASSERT_THAT(domain, IsOk());
  ASSERT_THAT(container_.attach(domain->get()), IsOk());
  Bytes bytes(16);
  EXPECT_THAT((*domain)->read(Iova(0x10), bytes), IsOk());
  EXPECT_THAT((*domain)->write(Iova(0x20), bytes), IsOk());
  EXPECT_THAT((*domain)->read(Iova(kHole), bytes), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(seen.reads, ElementsAre(std::pair<uint64_t, size_t>{0x10, 16}));
  EXPECT_THAT(container_.detach(domain->get()), IsOk());
}

}  // namespace
}  // namespace mvgpu::domain
