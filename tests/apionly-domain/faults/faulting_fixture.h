#pragma once

#include <memory>
#include <optional>
#include <set>

#include "apionly-domain/faults/faulting_domain.h"
#include "tests/apionly-domain/domain_fixture.h"
#include "tests/apionly-domain/faults/checked_target.h"

namespace mvgpu::domain {

// A container with an api-only domain, and behind it a domain that pins on faults. Every test ends
// with nothing pinned and nothing mapped.
class FaultingTest : public DomainTest {
 protected:
  using Outcome = FaultingDomain::Outcome;

  void SetUp() override {
    DomainTest::SetUp();
    Fault({});
  }
  void TearDown() override {
    owner_.held.reset();
    StopFaulting();
    target_.reset();
    DomainTest::TearDown();
  }
  void StopFaulting() {
    if (faulting_ == nullptr) return;
    ASSERT_THAT(container_.detach(faulting_.get()), testing::IsOk());
    EXPECT_EQ(faulting_->counters().pinned_pages, 0u);
    faulting_.reset();
  }
  void Fault(FaultingDomain::Options options) {
    StopFaulting();
    target_ = std::make_unique<testing::CheckedTarget>(domain_.get());
    faulting_ = std::make_unique<FaultingDomain>(
        std::move(options), FaultingDomain::Parts{domain_.get(), target_.get(), &times_});
    ASSERT_THAT(container_.attach(faulting_.get()), testing::IsOk());
  }
  // The api-only domain anew, and the other one.
  void Restart(ApiOnlyDomain::Options domain, FaultingDomain::Options options) {
    StopFaulting();
    target_.reset();
    Start(std::move(domain));
    Fault(std::move(options));
  }

  Result<FaultingDomain::Resolved> At(uint64_t page, Access access = Access::kReadWrite) {
    return faulting_->fault(Iova(BytesIn(page) + 0x123), access);
  }
  Outcome OutcomeAt(uint64_t page) {
    const auto resolved = At(page);
    EXPECT_THAT(resolved, testing::IsOk());
    return resolved ? resolved->outcome : Outcome::kRetry;
  }
  static IovaRange Pages(uint64_t first, uint64_t count) { return RangeOf({first, count}); }
  std::set<uint64_t> Shown() const { return target_->page_numbers(); }
  static std::set<uint64_t> Numbers(uint64_t first, uint64_t count) {
    std::set<uint64_t> numbers;
    for (uint64_t i = 0; i < count; ++i) numbers.insert(first + i);
    return numbers;
  }
  // Bits, pins and the device's pages are the same ones.
  void ExpectConsistent() const {
    const auto counters = faulting_->counters();
    EXPECT_EQ(counters.mapped_pages, target_->pages().size());
    EXPECT_EQ(counters.pinned_pages, counters.mapped_pages);
    EXPECT_EQ(domain_->counters().pinned_pages, counters.mapped_pages);
  }

  FaultTimes times_;
  std::unique_ptr<testing::CheckedTarget> target_;
  std::unique_ptr<FaultingDomain> faulting_;
};

}  // namespace mvgpu::domain
