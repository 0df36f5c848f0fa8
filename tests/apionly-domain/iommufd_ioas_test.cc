// The kernel's tests of iommufd address spaces (tools/testing/selftests/iommu/iommufd.c), by their
// names and with their meaning for a domain without hardware.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "tests/apionly-domain/domain_fixture.h"
#include "tests/fakes/fake_remote_memory.h"
#include "tests/fakes/memory_maker.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::FakeRemoteMemory;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;
using testing::MemoryMaker;
using ::testing::SizeIs;

using Bytes = std::vector<std::byte>;

class IommufdIoasTest : public DomainTest {
 protected:
  Result<uint64_t> UnmapPages(uint64_t first, uint64_t count) {
    return container_.unmap(Iova(BytesIn(first)), BytesIn(count));
  }
};

// Whether nobody has the file mapped writable: only then it can be sealed against writing.
bool IsMappedByNobody(int fd) { return fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) == 0; }

TEST_F(IommufdIoasTest, IoasAreaAutoDestroy) {
  const UniqueFd fd(memfd_create("areas", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(fd.get(), BytesIn(16)), 0);
  {
    Container container;
    for (uint64_t i = 0; i < 8; ++i) {
      ASSERT_THAT(container.map({Iova(BytesIn(3 * i)), kPageSize, Access::kReadWrite,
                                 UniqueFd(dup(fd.get())), BytesIn(i)}),
                  IsOk());
    }
    EXPECT_FALSE(IsMappedByNobody(fd.get()));
  }
  EXPECT_TRUE(IsMappedByNobody(fd.get())) << "the areas went with their container";
}

TEST_F(IommufdIoasTest, IoasDestroy) {
  Map(0, 0, BytesIn(4));
  auto pin = Pin(0, BytesIn(4));
  EXPECT_THAT(container_.detach(domain_.get()), FailsWith(ErrorCode::kBusy));
  pin->reset();
  ASSERT_THAT(container_.detach(domain_.get()), IsOk());
  ASSERT_THAT(container_.attach(domain_.get()), IsOk());
}

TEST_F(IommufdIoasTest, Area) {
  for (uint64_t i = 0; i < 10; ++i) Map(BytesIn(100 + 16 * i), 0, BytesIn(1));
  for (uint64_t i = 0; i < 10; ++i) {
    EXPECT_THAT(UnmapPages(100 + 16 * i, 1), IsOkAndHolds(kPageSize));
    EXPECT_THAT(UnmapPages(100 + 16 * i, 1), IsOkAndHolds(0u)) << "nothing is no error here";
  }
  Map(BytesIn(100), 0, BytesIn(10));
  EXPECT_THAT(UnmapPages(100, 5), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(UnmapPages(101, 9), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(UnmapPages(103, 3), FailsWith(ErrorCode::kWouldSplit));
  EXPECT_THAT(UnmapPages(99, 2), FailsWith(ErrorCode::kWouldSplit));
  const auto overlaps = [this](uint64_t first, uint64_t count) {
    return container_.map(ram_.map_request(BytesIn(first), 0, BytesIn(count)));
  };
  EXPECT_THAT(overlaps(100, 1), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(overlaps(109, 2), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(overlaps(99, 12), FailsWith(ErrorCode::kOverlap));
  EXPECT_THAT(container_.unmap_all(), IsOkAndHolds(BytesIn(10)));
  EXPECT_THAT(container_.unmap_all(), IsOkAndHolds(0u));
}

TEST_F(IommufdIoasTest, UnmapFullyContainedAreas) {
  for (uint64_t i = 0; i < 10; ++i) Map(BytesIn(100 + 16 * i), 0, BytesIn(10));
  EXPECT_THAT(UnmapPages(95, 16 * 10 + 10), IsOkAndHolds(BytesIn(100)));
}

TEST_F(IommufdIoasTest, AreaLengths) {
  for (const uint64_t length : {uint64_t{1}, kPageSize - 1, kPageSize + 1, 2 * kPageSize - 1}) {
    EXPECT_THAT(container_.map(ram_.map_request(0, 0, length)), FailsWith(ErrorCode::kInvalid));
  }
  EXPECT_THAT(container_.map(ram_.map_request(0, 0, kPageSize)), IsOk());
  EXPECT_THAT(container_.map(ram_.map_request(BytesIn(4), 0, 2 * kPageSize)), IsOk());
}

TEST_F(IommufdIoasTest, CopyArea) {
  Map(0, 0, BytesIn(8));
  Map(BytesIn(100), 0, BytesIn(8));  // the same pages once more
  Container second;
  const auto other_domain = AddDomain(second, "second");
  ASSERT_THAT(second.map(ram_.map_request(BytesIn(50), 0, BytesIn(8))), IsOk());
  auto first = Pin(0, BytesIn(8));
  auto alias = Pin(BytesIn(100), BytesIn(8));
  EXPECT_EQ(PagesPinnedOnce(), 8u);
  const auto pins = other_domain->open_context(&other_);
  auto there = pins->pin(MakeRange(BytesIn(50), BytesIn(8)), Access::kRead);
  ASSERT_THAT(there, IsOk());
  EXPECT_EQ(other_domain->backing_of(there->runs()[0]).pages, (PageRun{0, 8}));
  there->reset();
  ASSERT_THAT(second.detach(other_domain.get()), IsOk());
}

// Windows of 511 bytes over a mapping and beyond both its ends.
TEST_F(IommufdIoasTest, CopySweep) {
  ram_.fill_pattern();
  constexpr uint64_t kStart = BytesIn(10);
  constexpr uint64_t kSize = BytesIn(8);
  Map(kStart, 0, kSize);
  Bytes window(511);
  for (uint64_t at = kStart - 2 * 511; at < kStart + kSize + 2 * 511; at += 511) {
    const bool inside = at >= kStart && at + 511 <= kStart + kSize;
    const auto copied = domain_->read(Iova(at), window);
    if (!inside) {
      EXPECT_THAT(copied, FailsWith(ErrorCode::kNotMapped)) << at;
      continue;
    }
    EXPECT_THAT(copied, IsOk()) << at;
    EXPECT_EQ(std::memcmp(window.data(), ram_.at(at - kStart), 511), 0) << at;
  }
}

TEST_F(IommufdIoasTest, AccessPin) {
  Map(0, 0, BytesIn(16));
  for (uint64_t pages = 1; pages <= 15; ++pages) {
    SCOPED_TRACE(pages);
    auto once = Pin(0, BytesIn(pages));
    ASSERT_THAT(once, IsOk());
    ASSERT_THAT(once->runs(), SizeIs(1));
    EXPECT_EQ(once->runs()[0].iova_pages().count, pages);
    auto twice = Pin(0, BytesIn(pages));
    EXPECT_EQ(PagesPinnedOnce(), pages);
    {
      const auto other_domain = AddDomain(container_, "comes and goes");
      const auto pins = other_domain->open_context(&other_);
      EXPECT_THAT(pins->pin(MakeRange(0, BytesIn(16)), Access::kRead), IsOk());
      EXPECT_THAT(container_.detach(other_domain.get()), IsOk());
    }
    EXPECT_EQ(PagesPinnedOnce(), pages);
    once->reset();
    EXPECT_EQ(PagesPinnedOnce(), pages) << "pinned twice";
    twice->reset();
    EXPECT_THAT(pins_->pages, IsEmpty());
  }
}

TEST_F(IommufdIoasTest, AccessPinUnmap) {
  Map(0, 0, BytesIn(16));
  const std::vector<Iova> page = {Iova(BytesIn(3))};
  ASSERT_THAT(PinPages(page), IsOk());
  owner_.during_revoke = [&] {
    EXPECT_THAT(context_->unpin_pages(page, Access::kReadWrite), IsOk());
  };
  EXPECT_THAT(UnmapPages(0, 16), IsOk());
  EXPECT_THAT(pins_->pages, IsEmpty());
  EXPECT_THAT(context_->unpin_pages(page, Access::kReadWrite), FailsWith(ErrorCode::kInvalid));
}

TEST_F(IommufdIoasTest, AccessDomainDestroy) {
  Map(0, 0, BytesIn(1024));
  auto other_domain = AddDomain(container_, "goes");
  auto pin = Pin(BytesIn(513), kPageSize);  // one page inside 2 MiB
  ASSERT_THAT(container_.detach(other_domain.get()), IsOk());
  other_domain.reset();
  EXPECT_EQ(PagesPinnedOnce(), 1u);
  EXPECT_THAT(Pin(0, BytesIn(1024)), IsOk());
}

TEST_F(IommufdIoasTest, AccessRw) {
  Map(BytesIn(4), 0, BytesIn(4));
  for (const uint64_t size : {uint64_t{1}, uint64_t{8}, kPageSize, BytesIn(4)}) {
    Bytes out(size);
    for (uint64_t i = 0; i < size; ++i) out[i] = static_cast<std::byte>(size * 5 + i * 3);
    ASSERT_THAT(domain_->write(Iova(BytesIn(4)), out), IsOk());
    EXPECT_EQ(std::memcmp(ram_.at(0), out.data(), size), 0);
    Bytes in(size);
    ASSERT_THAT(domain_->read(Iova(BytesIn(4)), in), IsOk());
    EXPECT_EQ(in, out);
  }
}

// Every start around the edge of a page, every length up to 63: between two mappings that do not
// continue each other, and between memory with a file and without (the kernel's slow path).
TEST_F(IommufdIoasTest, AccessRwUnaligned) {
  constexpr uint64_t kRemote = BytesIn(2);
  FakeRemoteMemory remote(Iova(kRemote), kPageSize);
  Start({.remote = &remote});
  Map(0, BytesIn(7), kPageSize);
  Map(BytesIn(1), BytesIn(3), kPageSize);
  MapWithoutFile(kRemote, kPageSize);
  const auto at = [&](uint64_t iova) -> std::byte& {
    if (iova < BytesIn(1)) return *ram_.at(BytesIn(7) + iova);
    if (iova < kRemote) return *ram_.at(BytesIn(2) + iova);
    return remote.bytes()[iova - kRemote];
  };
  uint8_t seed = 0;
  for (const uint64_t edge : {BytesIn(1), kRemote}) {
    for (uint64_t start = edge - 50; start <= edge + 50; ++start) {
      for (uint64_t length = 1; length <= 63; ++length) {
        Bytes out(length);
        for (uint64_t i = 0; i < length; ++i) out[i] = static_cast<std::byte>(++seed);
        const std::byte before = at(start - 1) = static_cast<std::byte>(++seed);
        const std::byte behind = at(start + length) = static_cast<std::byte>(++seed);
        ASSERT_THAT(domain_->write(Iova(start), out), IsOk());
        for (uint64_t i = 0; i < length; ++i) ASSERT_EQ(at(start + i), out[i]) << start << " " << i;
        ASSERT_EQ(at(start - 1), before);
        ASSERT_EQ(at(start + length), behind);
        Bytes in(length);
        ASSERT_THAT(domain_->read(Iova(start), in), IsOk());
        ASSERT_EQ(in, out);
      }
    }
  }
}

TEST_F(IommufdIoasTest, ForkPresent) {
  MemoryMaker vmm;
  ASSERT_THAT(container_.map({Iova(0), BytesIn(8), Access::kReadWrite, vmm.duplicate(), 0}),
              IsOk());
  auto pin = Pin(0, BytesIn(8), Access::kRead);
  ASSERT_THAT(pin, IsOk());
  for (const char byte : {'a', 'b'}) {
    vmm.Write(byte);
    Bytes seen(1);
    EXPECT_THAT(domain_->read(Iova(0), seen), IsOk());
    EXPECT_EQ(static_cast<char>(seen[0]), byte);
    EXPECT_THAT(domain_->read_pinned(pin->runs()[0], Iova(0), seen), IsOk());
    EXPECT_EQ(static_cast<char>(seen[0]), byte);
  }
}

TEST_F(IommufdIoasTest, ForkGone) {
  MemoryMaker vmm;
  ASSERT_THAT(container_.map({Iova(0), BytesIn(8), Access::kReadWrite, vmm.duplicate(), 0}),
              IsOk());
  vmm.Write('x');
  auto before = Pin(0, kPageSize);
  vmm.Exit();
  auto after = Pin(0, BytesIn(8));
  EXPECT_THAT(after, IsOk()) << "the file is the memory, not the process";
  Bytes seen(1);
  EXPECT_THAT(domain_->read(Iova(0), seen), IsOk());
  EXPECT_EQ(static_cast<char>(seen[0]), 'x');
}

}  // namespace
}  // namespace mvgpu::domain
