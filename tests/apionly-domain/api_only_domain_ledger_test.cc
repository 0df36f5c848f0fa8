// The domain with a real ledger and real mlock: what it says, what others read, what the kernel
// counts.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>

#include "apionly-domain/accounting/ledger_lookup.h"
#include "apionly-domain/api_only_domain.h"
#include "tests/apionly-domain/ledger_fixture.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/kernel_counters.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;
using testing::KernelLockedPages;
using testing::MakeRange;

class Owner final : public PinOwner {
 public:
  std::string_view pin_owner_name() const override { return "test"; }
  void on_revoke(IovaRange) override {}
};

class ApiOnlyDomainLedgerTest : public LedgerFixture {
 protected:
  std::unique_ptr<ApiOnlyDomain> MakeDomain(Ledger& ledger, std::string name) {
    auto domain =
        ApiOnlyDomain::Create({.name = std::move(name)}, MakeMlockPinBackend(), &ledger, nullptr);
    EXPECT_THAT(domain, IsOk());
    EXPECT_THAT(container_.attach(domain->get()), IsOk());
    return std::move(*domain);
  }

  GuestRam ram_{512ull << 20};  // sparse
  Container container_;
  Owner owner_;
};

TEST_F(ApiOnlyDomainLedgerTest, TheLedgerListsWhereTheDomainSeesFiles) {
  auto ledger = Open();
  auto domain = MakeDomain(*ledger, "vgpu");
  const auto offset_at = [this](uint64_t iova) -> std::optional<uint64_t> {
    const UniqueFd fd(open(path().c_str(), O_RDONLY | O_CLOEXEC));
    const auto list = ReadMappings(fd.get(), path(), kVm, Iova(iova));
    EXPECT_THAT(list, IsOk());
    if (!list || list->entries.empty()) return std::nullopt;
    const LedgerMapping& mapping = list->entries[0].mapping;
    EXPECT_EQ(mapping.file, GuestFile::IdentityOf(ram_.fd()).value_or(FileIdentity()));
    return mapping.file_offset + (iova - mapping.iova.start().value());
  };
  constexpr uint64_t kMiB = 1 << 20;
  ASSERT_THAT(container_.map(ram_.map_request(16 * kMiB, 4 * kMiB, 8 * kMiB)), IsOk());
  EXPECT_EQ(offset_at(0), std::nullopt);
  EXPECT_EQ(offset_at(16 * kMiB), 4 * kMiB);
  // Refused, so nothing changes.
  ASSERT_THAT(container_.map(ram_.map_request(20 * kMiB, 0, 8 * kMiB)),
              FailsWith(ErrorCode::kOverlap));
  EXPECT_EQ(offset_at(20 * kMiB), 8 * kMiB);
  ASSERT_THAT(container_.unmap(Iova(18 * kMiB), kMiB, Container::Cut::kSplit), IsOk());
  EXPECT_EQ(offset_at(18 * kMiB - 1), 6 * kMiB - 1);
  EXPECT_EQ(offset_at(18 * kMiB), std::nullopt);
  EXPECT_EQ(offset_at(19 * kMiB), 7 * kMiB);
  ASSERT_THAT(container_.unmap_all(), IsOk());
  EXPECT_EQ(offset_at(19 * kMiB), std::nullopt);
  EXPECT_EQ(Look().rows[0].unlisted_mappings, 0u);
  ASSERT_THAT(container_.detach(domain.get()), IsOk());
}

TEST_F(ApiOnlyDomainLedgerTest, TheLedgerAndTheKernelSayWhatTheDomainHolds) {
  const uint64_t before = KernelLockedPages();
  auto ledger = Open();
  auto domain = MakeDomain(*ledger, "vgpu");
  ASSERT_THAT(container_.map(ram_.map_request(0, 0, ram_.size())), IsOk());
  {
    const auto pins = domain->open_context(&owner_);
    auto a = pins->pin(MakeRange(BytesIn(16), BytesIn(4)), Access::kRead);
    auto b = pins->pin(MakeRange(BytesIn(18), BytesIn(4)), Access::kRead);
    ASSERT_THAT(a, IsOk());
    ASSERT_THAT(b, IsOk());
    const LedgerSnapshot seen = Look();
    ASSERT_EQ(seen.rows.size(), 1u);
    EXPECT_EQ(seen.rows[0].mapped_pages, PagesIn(ram_.size()));
    EXPECT_EQ(seen.rows[0].pinned_pages, 8u);
    EXPECT_EQ(seen.rows[0].unique_pages, 6u);
    EXPECT_EQ(seen.rows[0].charged_pages, 6u);
    EXPECT_EQ(seen.rows[0].granule_pages, 1u);
    EXPECT_EQ(seen.rows[0].locked_pages, 6u);
    EXPECT_EQ(seen.rows[0].locked_areas, 1u);
    EXPECT_GT(seen.rows[0].area_budget, 0u);
    EXPECT_EQ(KernelLockedPages() - before, 6u);
    ExpectInOrder();
  }
  EXPECT_EQ(Look().rows[0].unique_pages, 0u);
  EXPECT_EQ(KernelLockedPages(), before);
  ASSERT_THAT(container_.detach(domain.get()), IsOk());
  domain.reset();
  EXPECT_FALSE(ledger_exists()) << "the last domain takes the ledger with it";
}

TEST_F(ApiOnlyDomainLedgerTest, APageThatTwoDomainsHoldIsChargedOnceAndTheChargeMoves) {
  auto ledger = Open();
  auto first = MakeDomain(*ledger, "first");
  auto second = MakeDomain(*ledger, "second");
  ASSERT_THAT(container_.map(ram_.map_request(0, 0, ram_.size())), IsOk());
  auto first_pins = first->open_context(&owner_);
  auto second_pins = second->open_context(&owner_);
  auto a = first_pins->pin(MakeRange(0, BytesIn(10)), Access::kRead);
  auto b = second_pins->pin(MakeRange(BytesIn(5), BytesIn(10)), Access::kRead);
  ASSERT_THAT(a, IsOk());
  ASSERT_THAT(b, IsOk());
  EXPECT_EQ(first->counters().charged_pages, 10u);
  EXPECT_EQ(second->counters().charged_pages, 5u);
  EXPECT_EQ(Look().unique_pages, 15u);
  a->reset();
  EXPECT_EQ(first->counters().charged_pages, 0u);
  EXPECT_EQ(second->counters().charged_pages, 10u) << "the payer left, the holder pays";
  ExpectInOrder();
  b->reset();
  EXPECT_EQ(Look().unique_pages, 0u);
  first_pins.reset();
  second_pins.reset();
  ASSERT_THAT(container_.detach(first.get()), IsOk());
  ASSERT_THAT(container_.detach(second.get()), IsOk());
}

TEST_F(ApiOnlyDomainLedgerTest, AChargeThatIsRefusedIsNoPin) {
  const uint64_t before = KernelLockedPages();
  auto ledger = Open();
  auto domain = MakeDomain(*ledger, "vgpu");
  auto crowd = Join(*ledger);
  for (uint64_t i = 0; i < 256; ++i) ASSERT_THAT(crowd->hold({1, i}, 1, {0, 1}), IsOk());
  ASSERT_THAT(container_.map(ram_.map_request(0, 0, ram_.size())), IsOk());
  {
    const auto pins = domain->open_context(&owner_);
    EXPECT_THAT(pins->pin(MakeRange(0, kPageSize), Access::kRead), FailsWith(ErrorCode::kLimit));
    EXPECT_EQ(KernelLockedPages(), before);
    EXPECT_EQ(domain->counters().unique_pages, 0u);
    EXPECT_EQ(domain->counters().locked_pages, 0u);
    crowd->release({1, 5}, {0, 1});
    EXPECT_THAT(pins->pin(MakeRange(0, kPageSize), Access::kRead), IsOk());
  }
  for (uint64_t i = 0; i < 256; ++i) {
    if (i != 5) crowd->release({1, i}, {0, 1});
  }
  ASSERT_THAT(container_.detach(domain.get()), IsOk());
}

}  // namespace
}  // namespace mvgpu::domain
