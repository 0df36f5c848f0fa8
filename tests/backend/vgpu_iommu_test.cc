// A vGPU whose device addresses go through an IOMMU that holds what it maps: nothing else does.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "apionly-domain/accounting/ledger_view.h"
#include "apionly-domain/accounting/runtime_dir.h"
#include "apionly-domain/assigned/software_iommu.h"
#include "tests/backend/vgpu_fixture.h"
#include "tests/fakes/kernel_counters.h"

namespace mvgpu::backend {
namespace {

using testing::IsOk;

constexpr char kVm[] = "0a1b2c3d-0000-4000-8000-00000000abcd";

// In software, but the kernel would hold and count what it maps.
class HoldingIommu final : public domain::AssignedIommu {
 public:
  explicit HoldingIommu(uint64_t* counted_pages) : counted_pages_(*counted_pages) {}
  std::string_view name() const override { return "iommufd"; }
  Result<void> map(IovaRange iova, std::byte* host, domain::Access access) override {
    MVGPU_RETURN_IF_ERROR(iommu_.map(iova, host, access));
    counted_pages_ += PagesIn(iova.size());
    return {};
  }
  Result<void> unmap(IovaRange iova) override {
    counted_pages_ -= PagesIn(iova.size());
    return iommu_.unmap(iova);
  }
  void flush() override { iommu_.flush(); }
  bool holds_memory() const override { return true; }
  std::span<const IovaRange> usable_ranges() const override { return iommu_.usable_ranges(); }
  uint64_t page_sizes() const override { return iommu_.page_sizes(); }

 private:
  uint64_t& counted_pages_;  // outlives this
  domain::SoftwareIommu iommu_;
};

class VgpuIommuTest : public VgpuTest {
 protected:
  void SetUp() override {
    config_.vm_uuid = kVm;
    config_.runtime_dir = dir_.path();
    config_.dma = DmaMode::kIommu;
    config_.pin = PinMode::kMlock;
  }
  // An IOMMU in software, or the one above.
  void Make(bool holds) {
    auto parts = Vgpu::MakeParts(config_);
    ASSERT_THAT(parts, IsOk());
    if (holds) parts->go_through(std::make_unique<HoldingIommu>(&counted_pages_));
    auto vgpu = Vgpu::Create(config_, std::move(*parts), observer(), this);
    ASSERT_THAT(vgpu, IsOk());
    vgpu_ = std::move(*vgpu);
    guest_ = std::make_unique<testing::GpuGuest>(vgpu_.get(), [this] { return Wait(); });
    StartGuest();
  }
  domain::LedgerSnapshot::Row Row() {
    auto dir = domain::RuntimeDir::OpenForReading(config_.runtime_dir);
    EXPECT_THAT(dir, IsOk());
    auto snapshot = domain::ReadLedger(*dir, kVm);
    EXPECT_THAT(snapshot, IsOk());
    return snapshot->rows.at(0);
  }

  uint64_t counted_pages_ = 0;
  testing::TempDir dir_;
};

TEST_F(VgpuIommuTest, PagesAreHeldByTheMappingsAndCountedOnce) {
  Make(/*holds=*/true);
  ASSERT_TRUE(guest_->draw(1, 1));
  const domain::LedgerSnapshot::Row row = Row();
  EXPECT_GT(counted_pages_, 0u);
  EXPECT_EQ(row.pin_backend, "iommufd");
  EXPECT_EQ(row.locked_pages, counted_pages_);
  EXPECT_EQ(row.unique_pages, counted_pages_);
  EXPECT_EQ(row.charged_pages, counted_pages_);
  EXPECT_EQ(vgpu_->counters().domain.locked_pages, counted_pages_);
  EXPECT_EQ(testing::KernelLockedPages(), 0u) << "nothing is locked beside";
  EndVm();
  EXPECT_EQ(counted_pages_, 0u);
  EXPECT_EQ(Row().locked_pages, 0u);
}

TEST_F(VgpuIommuTest, AnIommuInSoftwareHoldsNothing) {
  Make(/*holds=*/false);
  ASSERT_TRUE(guest_->draw(1, 1));
  const domain::LedgerSnapshot::Row row = Row();
  EXPECT_EQ(row.pin_backend, "mlock");
  EXPECT_GT(row.unique_pages, 0u);
  EXPECT_EQ(row.locked_pages, testing::KernelLockedPages());
}

}  // namespace
}  // namespace mvgpu::backend
