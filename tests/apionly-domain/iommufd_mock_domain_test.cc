// The kernel's other tests of iommufd (mock domain, dirty tracking, legacy interface) and those of
// VFIO, by their names and with their meaning for a domain without hardware.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "tests/apionly-domain/domain_fixture.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::MakeRange;

using Bytes = std::vector<std::byte>;

class IommufdMockDomainTest : public DomainTest {
 protected:
  Result<uint64_t> UnmapPages(uint64_t first, uint64_t count) {
    return container_.unmap(Iova(BytesIn(first)), BytesIn(count));
  }
};

// A hole half-way.
TEST_F(IommufdMockDomainTest, Basic) {
  Map(0, 0, BytesIn(4));
  Map(BytesIn(5), BytesIn(5), BytesIn(4));
  EXPECT_THAT(Pin(0, BytesIn(9)), FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(pins_->pages, IsEmpty());
  EXPECT_THAT(container_.map(ram_.map_request(BytesIn(20), ram_.size() - kPageSize, BytesIn(2))),
              FailsWith(ErrorCode::kInvalid))
      << "the second half lies behind the file";
}

// There is no copy on write in a file that is mapped shared: a read pin sees what comes later.
TEST_F(IommufdMockDomainTest, RoUnshare) {
  Map(0, 0, BytesIn(2), Access::kRead);
  auto pin = Pin(0, BytesIn(2), Access::kRead);
  ASSERT_THAT(pin, IsOk());
  Bytes seen(4);
  EXPECT_THAT(domain_->read_pinned(pin->runs()[0], Iova(0), seen), IsOk());
  ram_.put<uint32_t>(0, 0xdecade);
  EXPECT_THAT(domain_->read_pinned(pin->runs()[0], Iova(0), seen), IsOk());
  EXPECT_EQ(std::memcmp(seen.data(), ram_.at(0), 4), 0);
}

// Every start and end in a mapping, at two IOVAs, by two owners: each page exactly once.
TEST_F(IommufdMockDomainTest, AllAlignsCopy) {
  Map(0, 0, BytesIn(8));
  Map(BytesIn(100), 0, BytesIn(8));
  const auto late = AddDomain(container_, "late");
  for (uint64_t start = 0; start < 8; ++start) {
    for (uint64_t end = start + 1; end <= 8; ++end) {
      const uint64_t size = BytesIn(end - start);
      auto pin = Pin(BytesIn(start), size);
      ASSERT_EQ(PagesPinnedOnce(), end - start);
      auto copy = other_context_->pin(MakeRange(BytesIn(100 + start), size), Access::kRead);
      ASSERT_EQ(PagesPinnedOnce(), end - start);
      auto all = Pin(0, BytesIn(8));
      ASSERT_EQ(PagesPinnedOnce(), 8u);
      pin->reset();
      all->reset();
      ASSERT_EQ(PagesPinnedOnce(), end - start);
      copy->reset();
      ASSERT_THAT(pins_->pages, IsEmpty());
    }
  }
  ASSERT_THAT(container_.detach(late.get()), IsOk());
}

TEST_F(IommufdMockDomainTest, UserCopy) {
  Container without_domain;
  ASSERT_THAT(without_domain.map(ram_.map_request(0, 0, BytesIn(8))), IsOk());
  for (const Mapping& mapping : without_domain.mappings()) {
    ASSERT_THAT(container_.map({mapping.iova.start(), mapping.iova.size(), mapping.access,
                                UniqueFd(dup(mapping.file->fd())), mapping.file_offset}),
                IsOk());
  }
  EXPECT_THAT(Pin(0, BytesIn(8)), IsOk());
}

// Another address space under a domain: the old one's pins go first, nothing of it stays.
TEST_F(IommufdMockDomainTest, Replace) {
  GuestRam other_ram(BytesIn(8));
  Container other;
  ASSERT_THAT(other.map(other_ram.map_request(0, BytesIn(4), BytesIn(2))), IsOk());
  Map(0, 0, BytesIn(8));
  owner_.held = std::move(*Pin(0, BytesIn(8)));
  for (int i = 0; i < 2; ++i) {
    ASSERT_THAT(container_.detach(domain_.get()), IsOk());
    EXPECT_THAT(pins_->pages, IsEmpty());
    ASSERT_THAT(other.attach(domain_.get()), IsOk());
    auto pin = Pin(0, BytesIn(2));
    ASSERT_THAT(pin, IsOk());
    EXPECT_EQ(FilePageOf(pin->runs()[0]), 4u);
    EXPECT_THAT(Pin(0, BytesIn(8)), FailsWith(ErrorCode::kNotMapped));
    pin->reset();
    ASSERT_THAT(other.detach(domain_.get()), IsOk());
    ASSERT_THAT(container_.attach(domain_.get()), IsOk());
    EXPECT_THAT(Pin(0, BytesIn(8)), IsOk());
  }
}

TEST_F(IommufdMockDomainTest, GetDirtyBitmap) {
  Map(0, 0, BytesIn(1024));
  domain_->start_dirty_log();
  for (uint64_t page = 0; page < 1024; page += 2) {
    ASSERT_THAT(domain_->write(Iova(BytesIn(page)), Bytes(1)), IsOk());
  }
  // Aligned, from a page in the middle of a word, and a number of pages that is no whole word.
  for (const PageRun run : {PageRun{0, 1024}, PageRun{33, 900}, PageRun{1, 65}}) {
    std::vector<uint64_t> bitmap(17);
    ASSERT_THAT(domain_->read_dirty(RangeOf(run), kPageSize, DirtyLog::Read::kKeep, bitmap),
                IsOk());
    for (uint64_t bit = 0; bit < bitmap.size() * 64; ++bit) {
      const bool dirty = bit < run.count && (run.first + bit) % 2 == 0;
      ASSERT_EQ((bitmap[bit / 64] >> bit % 64 & 1) != 0, dirty) << run.first << " " << bit;
    }
  }
}

TEST_F(IommufdMockDomainTest, SetDirtyTracking) {
  Map(0, 0, BytesIn(64));
  std::vector<uint64_t> bitmap(1);
  const auto read = [&] {
    bitmap = {0};
    return domain_->read_dirty(MakeRange(0, BytesIn(64)), kPageSize, DirtyLog::Read::kClear,
                               bitmap);
  };
  EXPECT_THAT(read(), FailsWith(ErrorCode::kInvalid));
  for (int i = 0; i < 2; ++i) domain_->start_dirty_log();  // also when it is on
  ASSERT_THAT(domain_->write(Iova(0), Bytes(1)), IsOk());
  EXPECT_THAT(read(), IsOk());
  EXPECT_EQ(bitmap[0], 1u);
  for (int i = 0; i < 2; ++i) domain_->stop_dirty_log();
  EXPECT_THAT(read(), FailsWith(ErrorCode::kInvalid));
}

// selftests/vfio and the newer no-IOMMU mode: the address of what is mapped, and only of that.
TEST_F(IommufdMockDomainTest, GetPa) {
  Map(BytesIn(10), BytesIn(3), BytesIn(2));
  Map(BytesIn(20), 0, kPageSize, Access::kRead);
  MapWithoutFile(BytesIn(30), kPageSize);
  auto pin = Pin(BytesIn(10), kPageSize, Access::kRead);
  std::byte* host = pin->runs()[0].host;
  pin->reset();
  const ApiOnlyDomain::Translator translator(*domain_);
  EXPECT_EQ(translator.translate(Iova(BytesIn(10)), Access::kRead), host);
  EXPECT_EQ(translator.translate(Iova(BytesIn(10) + 0x80), Access::kReadWrite), host + 0x80);
  EXPECT_EQ(translator.translate(Iova(BytesIn(12) - 1), Access::kWrite), host + 0x1fff);
  EXPECT_EQ(translator.translate(Iova(BytesIn(12)), Access::kRead), nullptr);
  EXPECT_EQ(translator.translate(Iova(BytesIn(10) - 1), Access::kRead), nullptr);
  EXPECT_NE(translator.translate(Iova(BytesIn(20)), Access::kRead), nullptr);
  EXPECT_EQ(translator.translate(Iova(BytesIn(20)), Access::kWrite), nullptr);
  EXPECT_EQ(translator.translate(Iova(BytesIn(30)), Access::kRead), nullptr);
}

// QEMU's helper looks at the start only (lesson 31).
TEST_F(IommufdMockDomainTest, ARangeWhoseEndIsNotMappedIsNotMapped) {
  Map(BytesIn(10), 0, BytesIn(2));
  EXPECT_THAT(domain_->check(MakeRange(BytesIn(10), BytesIn(2)), Access::kRead), IsOk());
  EXPECT_THAT(domain_->check(MakeRange(BytesIn(10) + 1, BytesIn(2)), Access::kRead),
              FailsWith(ErrorCode::kNotMapped));
  EXPECT_THAT(Pin(BytesIn(11), kPageSize + 1), FailsWith(ErrorCode::kNotMapped));
}

// The legacy interface: mappings of every size, unmapped out of order.
TEST_F(IommufdMockDomainTest, VfioCompatMap) {
  for (uint64_t i = 0; i < 16; ++i) Map(BytesIn(i * 64), BytesIn(i), BytesIn(1 + i));
  for (uint64_t i = 0; i < 16; ++i) {
    const uint64_t k = (i * 7 + 3) % 16;
    EXPECT_THAT(UnmapPages(k * 64, 1 + k), IsOkAndHolds(BytesIn(1 + k)));
  }
  EXPECT_EQ(container_.totals().mappings, 0u);
}

// Version 1 of the legacy interface cut a huge page, version 2 refuses: both can be asked for.
TEST_F(IommufdMockDomainTest, VfioCompatHugeMap) {
  Map(0, 0, BytesIn(1024));
  EXPECT_THAT(UnmapPages(0, 1), FailsWith(ErrorCode::kWouldSplit));
  for (uint64_t page = 0; page < 1024; page += 64) {
    EXPECT_THAT(container_.unmap(Iova(BytesIn(page)), BytesIn(64), Container::Cut::kSplit),
                IsOkAndHolds(BytesIn(64)));
  }
  EXPECT_EQ(container_.totals().mapped_pages, 0u);
}

}  // namespace
}  // namespace mvgpu::domain
