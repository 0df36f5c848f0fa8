#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "apionly-domain/viommu/vtd_iommu.h"
#include "tests/apionly-domain/nested/tables_fixture.h"

namespace mvgpu::domain {

// Keeps what it hears.
class RecordingListener final : public IommuListener {
 public:
  void on_iommu_event(const IommuEvent& event) override {
    events.push_back(event);
    if (during) during(event);
  }
  // What was heard since the last call.
  std::vector<IommuEvent> take() { return std::exchange(events, {}); }
  size_t count(IommuEventKind kind) const {
    return static_cast<size_t>(
        std::count_if(events.begin(), events.end(),
                      [&](const IommuEvent& event) { return event.kind() == kind; }));
  }
  std::vector<IommuEvent> events;
  std::function<void(const IommuEvent&)> during;
};

// A device that waits for pages.
class RecordingSource final : public FaultSource {
 public:
  void on_answer(const FaultGroup& group, FaultAnswer answer) override {
    answers.emplace_back(group.id, answer);
  }
  std::vector<std::pair<uint32_t, FaultAnswer>> answers;
};

// The tables of the vectors: device 3a:12.1 with PASID 0x12345 in domain 0x42, nested. The first
// stage leads from kGva to GPA 0x5678000; the second one adds kOffset.
class VtdIommuTest : public TablesTest, public VtdIommu::Owner {
 protected:
  static constexpr SourceId kSource = 0x3a91;
  static constexpr Pasid kPasid = 0x12345;
  static constexpr DomainId kDomain = 0x42;
  static constexpr uint64_t kRoot = 0x1000 | 1 << 10;  // scalable mode
  static constexpr uint64_t kRootAt = 0x13a8;          // upper half of bus 0x3a
  static constexpr uint64_t kContextAt = 0x2220;
  static constexpr uint64_t kDirectoryAt = 0x20'2468;
  static constexpr uint64_t kEntryAt = 0x21'0140;
  static constexpr uint64_t kRidDirectoryAt = 0x20'0000;
  static constexpr uint64_t kRidEntryAt = 0x21'1000;  // PASID 0, in another table

  static constexpr uint64_t kContext = 0x20'0e1d;
  static constexpr uint64_t kNested = 0x30'00c9;
  static constexpr uint64_t kSecondOnly = 0x30'0089;
  static constexpr uint64_t kFirstOnly = 0x49;
  static constexpr uint64_t kPassThrough = 0x109;

  static constexpr uint64_t kGva = 0x7f12'3456'7abc;
  static constexpr uint64_t kGpa = 0x567'8abc;
  static constexpr uint64_t kOffset = 0x10'0000'0000;
  static constexpr uint64_t kFirstLeafAt = 0x40'3b38;
  static constexpr uint64_t kSecondLeafAt = 0x30'3000 + 0x78 * 8;

  static constexpr uint64_t kQueue = 0x5000;
  static constexpr uint64_t kStatus = 0x9000;
  static constexpr uint64_t kPageRequests = 0xa000;

  void SetUp() override {
    TablesTest::SetUp();
    Window(0x20'0000, 2);
    Window(0x21'0000, 3);
    Window(0x30'0000, 1);
    Window(0x40'0000, 0);
    Window(0x40'0000 + kOffset, 0);
    Put(kRootAt, 0x2001);
    Put(kContextAt, kContext);
    Put(kDirectoryAt, 0x21'0001);
    PutEntry(kEntryAt, kNested, 0x180'0042, 0x40'0000);
    Put(kRidDirectoryAt, 0x21'1001);
    PutEntry(kRidEntryAt, kSecondOnly, 0x180'0043, 0);
    Put(0x40'07f0, 0x40'1027);
    Put(0x40'1240, 0x40'2027);
    Put(0x40'2d10, 0x40'3027);
    Put(kFirstLeafAt, 0x8000'0000'0567'8067);
    Put(0x30'0000, 0x30'1003);
    Put(0x30'1000, 0x30'2003);
    Put(0x30'2000 + 2 * 8, 0x10'0040'0083);
    Put(0x30'2000 + 0x2b * 8, 0x30'3003);
    Put(kSecondLeafAt, 0x10'0567'8003);
    Make({});
  }
  void TearDown() override {
    object_->remove(&listener_);
    iommu_.reset();
    object_.reset();
    TablesTest::TearDown();
  }
  void Make(VtdIommu::Options options, IommuObject::Limits limits = {}) {
    if (object_ != nullptr) object_->remove(&listener_);
    iommu_.reset();
    object_ = std::make_unique<IommuObject>(limits);
    iommu_ =
        std::make_unique<VtdIommu>(options, VtdIommu::Parts{domain_.get(), object_.get(), this});
    iommu_->set_root(kRoot);
    iommu_->set_translating(true);
    iommu_->faults().set_masked(false);
    iommu_->queue().write_address(kQueue | 1 << 11);
    iommu_->queue().enable();
    iommu_->page_requests().set_address(kPageRequests);
    tail_ = 0;
  }
  void PutEntry(uint64_t at, uint64_t q0, uint64_t q1, uint64_t q2) {
    Put(at, q0);
    Put(at + 8, q1);
    Put(at + 16, q2);
  }

  static VtdRequest Request(uint64_t address, Wanted wanted = Access::kRead) {
    return {.source = kSource, .pasid = kPasid, .address = address, .wanted = wanted};
  }
  static VtdRequest WithoutPasid(uint64_t address, Wanted wanted = Access::kRead) {
    return {.source = kSource, .pasid = std::nullopt, .address = address, .wanted = wanted};
  }
  void ExpectTarget(const VtdResult& result, uint64_t address) {
    ASSERT_TRUE(result) << result.error().ToString();
    EXPECT_EQ(result->address, address) << std::hex << result->address;
  }
  void ExpectRefused(const VtdResult& result, uint8_t reason, bool is_hidden = false) {
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().reason, reason) << result.error().ToString();
    EXPECT_EQ(result.error().is_hidden, is_hidden);
  }
  VtdResult Translate(Wanted wanted = Access::kRead) {
    return iommu_->translate(Request(kGva, wanted));
  }

  // A group of one page.
  Result<void> RequestPage(const VtdRequest& request, uint32_t group) {
    const FaultRights rights =
        request.wanted.rights | (request.wanted.privileged ? kFaultPrivileged : 0u);
    return iommu_->submit({.device = request.source,
                           .pasid = request.pasid,
                           .id = group,
                           .requests = {{.rights = rights, .address = request.address}}},
                          &asking_);
  }
  // One descriptor after the other, done at once.
  void Invalidate(uint64_t low, uint64_t high = 0) {
    for (const uint64_t word : {low, high, uint64_t{0}, uint64_t{0}}) {
      Put(kQueue + tail_, word);
      tail_ += 8;
    }
    tail_ %= kPageSize;
    iommu_->queue().write_tail(tail_);
    iommu_->run_queue();
  }
  void InvalidatePasidEntry() {
    Invalidate(0x0001'2345'0042'0017);
    Invalidate(0x0001'2345'0042'0026);
  }

  void on_fault_event() override { ++fault_events_; }
  void on_wait_event() override { ++wait_events_; }
  void on_page_request_event() override { ++page_request_events_; }
  void on_interrupt_entries_invalid(const InterruptEntryInvalidation& which) override {
    interrupt_entries_.push_back(which);
  }

  RecordingSource asking_;
  std::unique_ptr<IommuObject> object_;
  std::unique_ptr<VtdIommu> iommu_;
  RecordingListener listener_;
  uint64_t tail_ = 0;
  int fault_events_ = 0;
  int wait_events_ = 0;
  int page_request_events_ = 0;
  std::vector<InterruptEntryInvalidation> interrupt_entries_;
};

}  // namespace mvgpu::domain
