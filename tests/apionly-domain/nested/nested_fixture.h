#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "apionly-domain/nested/guest_tables.h"
#include "apionly-domain/nested/nested_domain.h"
#include "tests/apionly-domain/domain_fixture.h"
#include "tests/apionly-domain/nested/recording_target.h"

namespace mvgpu::domain {

// Guest memory with tables in it and frames elsewhere: 2 MiB from address 0 on, and 2 MiB at
// kFrames.
class NestedTest : public DomainTest {
 protected:
  static constexpr uint64_t kTablesSize = 0x20'0000;
  static constexpr uint64_t kFrames = 0xaa0'0000;
  static constexpr uint64_t kFramesSize = 0x20'0000;

  void SetUp() override {
    DomainTest::SetUp();
    Map(0, 0, kTablesSize);
    Map(kFrames, kTablesSize, kFramesSize);
    tables_ = std::make_unique<DomainTables>(domain_.get());
    target_ = std::make_unique<testing::RecordingTarget>(domain_.get());
  }
  void TearDown() override {
    nested_.reset();
    EXPECT_TRUE(target_->pages.empty());
    EXPECT_EQ(domain_->counters().pinned_pages, 0);
    DomainTest::TearDown();
  }

  static IovaRange RangeAt(uint64_t start, uint64_t size) {
    return testing::MakeRange(start, size);
  }
  NestedDomain& Nest(const TableWalker* walker, uint64_t root, IovaRange aperture,
                     NestedDomain::OnFault on_fault = NestedDomain::OnFault::kStop) {
    nested_ = std::make_unique<NestedDomain>(
        NestedDomain::Options{"nested", root, aperture, on_fault},
        NestedDomain::Parts{domain_.get(), walker, target_.get(), credits_.get()});
    return *nested_;
  }
  void LimitCredits(uint64_t pages) {
    nested_.reset();
    credits_ = std::make_unique<MapCredits>(pages);
  }
  uint64_t PinnedPages() const { return domain_->counters().pinned_pages; }

  std::unique_ptr<DomainTables> tables_;
  std::unique_ptr<testing::RecordingTarget> target_;
  std::unique_ptr<MapCredits> credits_ = std::make_unique<MapCredits>();
  std::unique_ptr<NestedDomain> nested_;
};

}  // namespace mvgpu::domain
