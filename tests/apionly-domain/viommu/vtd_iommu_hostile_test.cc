// A guest that writes anything into tables, queue and registers.

#include <array>

#include "tests/apionly-domain/viommu/viommu_fixture.h"

namespace mvgpu::domain {
namespace {

class VtdIommuHostileTest : public VtdIommuTest, public ::testing::WithParamInterface<unsigned> {
 protected:
  static constexpr uint64_t kTables = 0x1000;
  static constexpr uint64_t kTablesEnd = 0x1'0000;  // few, so that they point to each other
  static constexpr IommuObject::Limits kLimits{.mappings = 20, .bindings = 30};

  void SetUp() override {
    TablesTest::SetUp();
    Make({.caches = {.contexts = 4, .pasids = 8, .pages = 16}}, kLimits);
    object_->add(&listener_, {});
  }
  uint64_t SomeTable() { return kTables + random_() % (kTablesEnd - kTables) / 0x1000 * 0x1000; }
  // Mostly a pointer to a table with bits that make it one of some kind.
  uint64_t SomeEntry() {
    switch (random_() % 8) {
      case 0:
        return random_();
      case 1:
        return 0;
      case 2:
        return SomeTable() | (random_() & 0xfff);
      case 3:
        return (random_() & 0x3fff'ffff'f000) | 7 | (random_() & 0x80);
      case 4:
        return SomeTable() | 0xc9 | (random_() & 0x1c0) | 8;  // a PASID entry
      default:
        return SomeTable() | 7;
    }
  }
  void FillTables() {
    for (uint64_t at = kTables; at < kTablesEnd; at += 8) ram_.put(at, SomeEntry());
    // Ways that lead somewhere: contexts, and PASID entries without reserved bits.
    for (uint64_t at = kTables; at < kTables + 0x1000; at += 16) {
      ram_.put(at, uint64_t{0x2001});
      ram_.put(at + 8, uint64_t{0x2001});
    }
    for (uint64_t at = 0x2000; at < 0x3000; at += 32) {
      const std::array<uint64_t, 4> context{0x3e1d & ~(random_() % 8 == 0 ? 0xffful : 0ul),
                                            random_() % 200, 0, 0};
      ram_.put(at, context);
    }
    for (uint64_t at = 0x3000; at < 0x4000; at += 8) {
      if (random_() % 4 != 0) ram_.put(at, uint64_t{0x4001} + random_() % 2 * 0x1000);
    }
    for (uint64_t at = 0x4000; at < 0x6000; at += 64) {
      const std::array<uint64_t, 8> entry{SomeTable() | (1 + random_() % 4) << 6 | 9,
                                          random_() % 4,
                                          SomeTable() | (random_() & 7),
                                          0,
                                          0,
                                          0,
                                          0,
                                          0};
      if (random_() % 4 != 0) ram_.put(at, entry);
    }
  }
  void ExpectBounded() {
    ASSERT_LE(object_->bindings().size(), kLimits.bindings);
    ASSERT_LE(iommu_->cached().contexts, 4);
    ASSERT_LE(iommu_->cached().pasids, 8);
    ASSERT_LE(iommu_->cached().pages, 16);
    listener_.take();
  }
  VtdRequest SomeRequest() {
    VtdRequest request;
    request.source = static_cast<SourceId>(random_() % 4 == 0 ? random_() : 0x3a91);
    if (random_() % 4 != 0)
      request.pasid = static_cast<Pasid>(random_() % 8 == 0 ? random_() : random_() % 256);
    request.address = random_() >> random_() % 64;
    request.wanted = Wanted(static_cast<Rights>(random_() & 7), random_() % 4 == 0);
    request.kind = static_cast<VtdRequest::Kind>(random_() % 2);
    return request;
  }

  std::mt19937_64 random_{GetParam()};
};

TEST_P(VtdIommuHostileTest, TablesAtRandomLeadNowhereElse) {
  int found = 0;
  int refused = 0;
  for (int round = 0; round < 10; ++round) {
    FillTables();
    iommu_->set_root(kTables | 1 << 10);
    for (int i = 0; i < 1500; ++i) {
      const VtdRequest request = SomeRequest();
      const VtdResult result = iommu_->translate(request);
      if (i % 8 == 0) RequestPage(request, static_cast<uint32_t>(i));
      if (!result) {
        ++refused;
        ASSERT_FALSE(VtdReasonName(result.error().reason).empty()) << result.error().ToString();
        continue;
      }
      ++found;
      ASSERT_EQ(result->address >> 46, 0);
      ASSERT_NE(result->address >> 20, 0xfee);
      ASSERT_GE(result->length, 1);
      ASSERT_LE(result->length, kOneGiB);
      ASSERT_EQ(request.wanted.rights & ~result->rights, 0);
    }
    ExpectBounded();
  }
  EXPECT_GT(found, 300);
  EXPECT_GT(refused, 300);
}

TEST_P(VtdIommuHostileTest, DescriptorsAtRandomEndInErrorsAtMost) {
  FillTables();
  iommu_->set_root(kTables | 1 << 10);
  for (const SourceId source : std::array<SourceId, 3>{0x3a91, 0x3a92, 0x0001})
    iommu_->add_device(source);
  uint64_t errors = 0;
  uint64_t done = 0;
  for (int round = 0; round < 400; ++round) {
    if (round % 50 == 0) FillTables();
    const bool is_wide = random_() % 2 == 0;
    const uint64_t base = random_() % 8 == 0 ? random_() & 0x3f'f000 : 0x18'0000;
    for (uint64_t at = 0x18'0000; at < 0x18'0200; at += 8) {
      const uint64_t word =
          random_() % 4 != 0 ? random_() & random_() & 0x000f'ffff'ffff'0ff0 : random_();
      ram_.put(at,
               random_() % 2 == 0 && at % 16 != 0 ? 0 : word | (at % 16 == 0 ? random_() % 10 : 0));
    }
    InvalidationQueue& queue = iommu_->queue();
    queue.disable();
    queue.write_address(base | uint64_t{is_wide} << 11 | random_() % 8);
    queue.enable();
    queue.write_tail(random_() % 4 == 0 ? random_() : random_() % 0x200 & ~uint64_t{0x1f});
    for (int i = 0; i < 16 && queue.has_more(); ++i) {
      const uint64_t head = queue.head();
      iommu_->run_queue(4);
      done += queue.head() != head ? 1 : 0;
      if (queue.error()) {
        ++errors;
        const uint64_t stopped = queue.head();
        ASSERT_NE(iommu_->faults().status() & FaultLog::kQueueError, 0);
        iommu_->run_queue(4);
        ASSERT_EQ(queue.head(), stopped);
        iommu_->write_fault_status(static_cast<uint32_t>(random_()) | FaultLog::kQueueError);
        // Steps over it, as a guest that puts something harmless there.
        if (stopped < 0x200 && base == 0x18'0000) ram_.put(0x18'0000 + stopped, uint64_t{0x11});
      }
    }
    (void)iommu_->translate(SomeRequest());
    ExpectBounded();
  }
  EXPECT_GT(errors, 100);
  EXPECT_GT(done, 100);
}

// The tables change in the middle of look-ups: what was copied is what was checked.
TEST_P(VtdIommuHostileTest, TablesThatChangeUnderneathAreCopiedOnce) {
  FillTables();
  class Changing final : public GuestTables {
   public:
    Changing(const GuestTables* tables, std::function<void(uint64_t)> change)
        : tables_(*tables), change_(std::move(change)) {}
    tl::expected<void, Fault> load(uint64_t address, std::span<uint64_t> words) const override {
      const auto loaded = tables_.load(address, words);
      change_(address);
      ++loads;
      return loaded;
    }
    tl::expected<uint64_t, Fault> compare_exchange(uint64_t address, uint64_t expected,
                                                   uint64_t desired) const override {
      change_(address);
      return tables_.compare_exchange(address, expected, desired);
    }
    mutable uint64_t loads = 0;

   private:
    const GuestTables& tables_;
    const std::function<void(uint64_t)> change_;
  };
  const Changing changing(tables_.get(), [&](uint64_t address) {
    if (address < kTablesEnd && random_() % 4 == 0) ram_.put(address & ~uint64_t{7}, SomeEntry());
  });
  const VtdTables tables({}, &changing);
  const VtdTranslator translator(&tables);
  for (int i = 0; i < 5000; ++i) {
    if (i % 100 == 0) FillTables();
    changing.loads = 0;
    const VtdResult result = translator.translate({kTables | 1 << 10}, SomeRequest());
    // Four for the entries; then at most five levels, each through five of the second stage, twice
    // for a flag of the first one that is set.
    ASSERT_LE(changing.loads, 4 + 5 * (2 * 8 * 5 + 1) + 5);
    if (result) {
      ASSERT_EQ(result->address >> 46, 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, VtdIommuHostileTest, ::testing::Range(1u, 4u));

}  // namespace
}  // namespace mvgpu::domain
