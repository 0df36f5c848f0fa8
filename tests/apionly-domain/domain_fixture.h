#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "apionly-domain/api_only_domain.h"
#include "tests/fakes/fake_pin_backend.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {

// Holds a pin and lets it go when told to (or not).
class HoldingOwner final : public PinOwner {
 public:
  explicit HoldingOwner(std::string name = "holder") : name_(std::move(name)) {}

  std::string_view pin_owner_name() const override { return name_; }
  void on_revoke(IovaRange range) override {
    revoked.push_back(range);
    if (during_revoke) during_revoke();
    if (lets_go) held.reset();
  }
  std::optional<PinnedRange> held;
  std::vector<IovaRange> revoked;
  std::function<void()> during_revoke;
  bool lets_go = true;

 private:
  const std::string name_;
};

// A container with one domain and guest RAM, and two owners with a context each. Every test ends
// with nothing pinned, counted or left in the back end.
class DomainTest : public ::testing::Test {
 protected:
  void SetUp() override { Start({}); }
  void TearDown() override {
    owner_.held.reset();
    other_.held.reset();
    Stop();
    EXPECT_TRUE(pins_->pages.empty());
  }

  void Start(ApiOnlyDomain::Options options) {
    Start(std::move(options), std::make_unique<testing::FakePinBackend>(pins_));
  }
  void Start(ApiOnlyDomain::Options options, std::unique_ptr<PinBackend> backend) {
    Stop();
    auto domain = ApiOnlyDomain::Create(std::move(options), std::move(backend), /*ledger=*/nullptr,
                                        /*observer=*/nullptr);
    ASSERT_THAT(domain, testing::IsOk());
    domain_ = std::move(*domain);
    ASSERT_THAT(container_.attach(domain_.get()), testing::IsOk());
    context_ = domain_->open_context(&owner_);
    other_context_ = domain_->open_context(&other_);
  }
  void Stop() {
    if (domain_ == nullptr) return;
    context_.reset();
    other_context_.reset();
    ASSERT_THAT(container_.detach(domain_.get()), testing::IsOk());
    domain_.reset();
  }
  // Another domain, to be detached by the test.
  static std::unique_ptr<ApiOnlyDomain> AddDomain(Container& container, std::string name) {
    auto domain =
        ApiOnlyDomain::Create({.name = std::move(name)}, MakeNonePinBackend(), nullptr, nullptr);
    EXPECT_THAT(domain, testing::IsOk());
    EXPECT_THAT(container.attach(domain->get()), testing::IsOk());
    return std::move(*domain);
  }
  void Map(uint64_t iova, uint64_t offset, uint64_t size, Access access = Access::kReadWrite) {
    ASSERT_THAT(container_.map(ram_.map_request(iova, offset, size, access)), testing::IsOk());
  }
  void MapWithoutFile(uint64_t iova, uint64_t size, Access access = Access::kReadWrite) {
    ASSERT_THAT(container_.map({Iova(iova), size, access, UniqueFd(), 0}), testing::IsOk());
  }
  Result<PinnedRange> Pin(uint64_t iova, uint64_t size, Access access = Access::kReadWrite) {
    return context_->pin(testing::MakeRange(iova, size), access);
  }
  Result<void> PinPages(std::span<const Iova> pages, Access access = Access::kReadWrite) {
    hosts_.assign(pages.size(), nullptr);
    return context_->pin_pages(pages, access, hosts_);
  }

  uint64_t FilePageOf(const PinnedRun& run) const { return domain_->backing_of(run).pages.first; }
  // Every page that the back end holds, it holds once; returns how many.
  uint64_t PagesPinnedOnce() const {
    for (const auto& [page, count] : pins_->pages) EXPECT_EQ(count, 1) << "page " << page.second;
    return pins_->pages.size();
  }

  testing::GuestRam ram_{1024 * kPageSize};
  std::shared_ptr<testing::FakePinBackend::State> pins_ =
      std::make_shared<testing::FakePinBackend::State>();
  Container container_;
  std::unique_ptr<ApiOnlyDomain> domain_;
  std::unique_ptr<PinContext> context_;        // of owner_
  std::unique_ptr<PinContext> other_context_;  // of other_
  std::vector<std::byte*> hosts_;              // of the last PinPages()
  HoldingOwner owner_;
  HoldingOwner other_{"other holder"};
};

}  // namespace mvgpu::domain
