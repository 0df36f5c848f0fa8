// A guest that changes its tables at random and says so, as the specification asks for: after an
// invalidation of what has changed, what the unit answers is what a walk of the tables says; before
// it, that or what a walk said before the change.

#include <array>

#include "tests/apionly-domain/viommu/viommu_fixture.h"

namespace mvgpu::domain {
namespace {

struct Answer {
  uint8_t reason = 0xff;  // 0xff: no fault
  uint64_t address = 0;
  Rights rights = 0;
  bool operator==(const Answer&) const = default;
};

Answer AnswerOf(const VtdResult& result) {
  if (result) return {.address = result->address, .rights = result->rights};
  return {.reason = result.error().reason};
}

class VtdIommuModelTest : public VtdIommuTest, public ::testing::WithParamInterface<unsigned> {
 protected:
  static constexpr std::array<SourceId, 2> kSources{0x3a91, 0x3a92};
  static constexpr uint64_t kPasids = 3;
  static constexpr uint64_t kModelContext = 0x6019;  // P, PASIDE, PRE; directory of 2^7 entries
  static constexpr uint64_t kPasidTable = 0x7000;
  // Tables of four levels at these addresses and the pages behind them: 3, 2, 1, two of level 0.
  static constexpr std::array<uint64_t, 2> kFirst{0x1'0000, 0x2'0000};
  static constexpr std::array<uint64_t, 2> kSecond{0x3'0000, 0x4'0000};
  // What they map: two times 2 MiB, of which the first pages.
  static constexpr uint64_t kVirtual = 0x7f12'3440'0000;
  static constexpr uint64_t kPhysical = 0x500'0000;
  static constexpr uint64_t kPages = 3;  // in each 2 MiB

  void SetUp() override {
    TablesTest::SetUp();
    Put(kRootAt, 0x2001);
    for (const SourceId source : kSources) Put(ContextAt(source), kModelContext);
    Put(0x6000, kPasidTable | 1);
    for (const uint64_t root : kFirst) Chain(root, kVirtual, 0x27);
    for (const uint64_t root : kSecond) {
      Chain(root, kPhysical, 0x3);
      Put(root + 0x2000, 0x83);  // where the tables are, the second stage leads to the same place
    }
    for (uint64_t i = 0; i < 60; ++i) ChangeSomething();
    // Few entries, so that they also go by themselves.
    Make({.caches = {.contexts = 4, .pasids = 4, .pages = 64}});
    for (const SourceId source : kSources) iommu_->add_device(source);
  }
  static uint64_t ContextAt(SourceId source) { return 0x2000 + (source & 0x7f) * 32; }
  void Chain(uint64_t root, uint64_t address, uint64_t flags) {
    for (uint64_t level = 3; level > 1; --level) {
      const uint64_t table = root + (3 - level) * 0x1000;
      Put(table + IndexOf(address, level) * 8, (table + 0x1000) | flags);
    }
    for (uint64_t half = 0; half < 2; ++half) PutTable(root, address, half, flags);
  }
  static uint64_t IndexOf(uint64_t address, uint64_t level) {
    return address >> (12 + 9 * level) & 0x1ff;
  }
  static uint64_t MiddleAt(uint64_t root, uint64_t address, uint64_t half) {
    return root + 0x2000 + IndexOf(address + half * kTwoMiB, 1) * 8;
  }
  void PutTable(uint64_t root, uint64_t address, uint64_t half, uint64_t flags) {
    Put(MiddleAt(root, address, half), (root + 0x3000 + half * 0x1000) | flags);
  }

  // Each does one change and says which invalidations it takes.
  using Descriptors = std::vector<std::array<uint64_t, 2>>;
  Descriptors ChangeSomething() {
    switch (random_() % 8) {
      case 0:
        return ChangeContext();
      case 1:
      case 2:
        return ChangePasidEntry();
      case 3:
      case 4:
        return ChangeFirstLeaf();
      case 5:
        return ChangeFirstTable();
      case 6:
        return ChangeSecondLeaf();
      default:
        return ChangeSecondTable();
    }
  }
  Descriptors ChangeContext() {
    const SourceId source = kSources[random_() % kSources.size()];
    const uint64_t flips = random_() % 4 == 0 ? 1 : random_() % 4 == 0 ? 8 : 0;
    Put(ContextAt(source), kModelContext ^ flips);
    Put(ContextAt(source) + 8, random_() % kPasids | (random_() % 2) << 20);
    return {{uint64_t{source} << 32 | 0x31, 0}};
  }
  // The domain goes with the tables of the second stage; 3 if there are none.
  Descriptors ChangePasidEntry() {
    const uint64_t pasid = random_() % kPasids;
    const uint64_t at = kPasidTable + pasid * 64;
    const uint64_t old_domain = Get(at + 8) & 0xffff;
    const uint64_t type = 1 + random_() % 4;
    const uint64_t which = random_() % 2;
    const uint64_t domain = type == 2 || type == 3 ? 1 + which : 3;
    const uint64_t present = random_() % 8 == 0 ? 0 : 1;
    PutEntry(at, kSecond[which] | type << 6 | 2 << 2 | present, domain,
             kFirst[random_() % 2] | random_() % 2);
    Descriptors all;
    for (const uint64_t of : {old_domain, domain}) {
      all.push_back({pasid << 32 | of << 16 | 0x17, 0});
      all.push_back({pasid << 32 | of << 16 | 0x26, 0});
      all.push_back({of << 16 | 0x22, 0});
    }
    return all;
  }
  // Of all PASIDs, as a guest does that does not know who uses a table.
  Descriptors PasidPages(uint64_t address, uint64_t order) {
    Descriptors all;
    for (uint64_t pasid = 0; pasid < kPasids; ++pasid) {
      for (uint64_t domain = 1; domain <= 3; ++domain) {
        const uint64_t tag = pasid << 32 | domain << 16;
        if (random_() % 4 == 0) {
          all.push_back({tag | 0x26, 0});
        } else {
          all.push_back({tag | 0x36, (address & ~kPageMask) | order});
        }
      }
    }
    return all;
  }
  Descriptors SecondPages(uint64_t which, uint64_t address, uint64_t order) {
    const uint64_t tag = (which + 1) << 16;
    if (random_() % 4 == 0) return {{tag | 0x22, 0}};
    return {{tag | 0x32, (address & ~kPageMask) | order}};
  }
  uint64_t SomePage(uint64_t base) {
    return base + random_() % 2 * kTwoMiB + BytesIn(random_() % kPages);
  }
  Descriptors ChangeFirstLeaf() {
    const uint64_t root = kFirst[random_() % 2];
    const uint64_t half = random_() % 2;
    const uint64_t page = random_() % kPages;
    // Mostly present; for users, writable or not.
    const uint64_t flags = random_() % 8 == 0 ? 0 : 1 | (random_() & 6);
    Put(root + 0x3000 + half * 0x1000 + page * 8, SomePage(kPhysical) | flags);
    return PasidPages(kVirtual + half * kTwoMiB + BytesIn(page), 0);
  }
  Descriptors ChangeFirstTable() {
    const uint64_t root = kFirst[random_() % 2];
    const uint64_t half = random_() % 2;
    if (random_() % 2 == 0) {
      Put(MiddleAt(root, kVirtual, half), (kPhysical + random_() % 2 * kTwoMiB) | 0x87);
    } else {
      PutTable(root, kVirtual, half, random_() % 4 == 0 ? 0x25 : 0x27);
    }
    return PasidPages(kVirtual + half * kTwoMiB, 9);
  }
  Descriptors ChangeSecondLeaf() {
    const uint64_t which = random_() % 2;
    const uint64_t half = random_() % 2;
    const uint64_t page = random_() % kPages;
    Put(kSecond[which] + 0x3000 + half * 0x1000 + page * 8,
        0x10'0000'0000 + BytesIn(random_() % 0x1000) + (random_() & 3));
    return SecondPages(which, kPhysical + half * kTwoMiB + BytesIn(page), 0);
  }
  Descriptors ChangeSecondTable() {
    const uint64_t which = random_() % 2;
    const uint64_t root = kSecond[which];
    if (random_() % 4 == 0) {  // of the first stage's tables
      Put(root + 0x2000, std::array{0x83u, 0x83u, 0x81u, 0u}[random_() % 4]);
      return SecondPages(which, 0, 9);
    }
    const uint64_t half = random_() % 2;
    if (random_() % 2 == 0) {
      Put(MiddleAt(root, kPhysical, half), 0x20'0000'0000 + random_() % 8 * kTwoMiB + 0x83);
    } else {
      PutTable(root, kPhysical, half, 1 + random_() % 3);
    }
    return SecondPages(which, kPhysical + half * kTwoMiB, 9);
  }

  std::vector<VtdRequest> Requests() {
    std::vector<VtdRequest> all;
    for (const SourceId source : kSources) {
      for (Pasid pasid = 0; pasid <= kPasids; ++pasid) {
        for (const uint64_t base : {kVirtual, kPhysical}) {
          for (uint64_t i = 0; i < 2 * kPages; ++i) {
            VtdRequest request{.source = source, .wanted = Access::kRead};
            if (pasid < kPasids) request.pasid = pasid;
            request.address = base + i / kPages * kTwoMiB + BytesIn(i % kPages) + 0x123;
            if (random_() % 2 == 0) request.wanted = Access::kWrite;
            if (request.pasid && random_() % 4 == 0) request.wanted.privileged = true;
            all.push_back(request);
          }
        }
      }
    }
    return all;
  }
  std::vector<Answer> Walk(const std::vector<VtdRequest>& requests) {
    std::vector<Answer> answers;
    for (const VtdRequest& request : requests) answers.push_back(AnswerOf(iommu_->walk(request)));
    return answers;
  }
  std::vector<Answer> Ask(const std::vector<VtdRequest>& requests) {
    std::vector<Answer> answers;
    for (const VtdRequest& request : requests) {
      answers.push_back(AnswerOf(iommu_->translate(request)));
    }
    return answers;
  }
  static std::string Describe(const VtdRequest& request) {
    return fmt::format("source {:#x} pasid {} address {:#x}", request.source,
                       request.pasid ? static_cast<int>(*request.pasid) : -1, request.address);
  }
  void Say(const Descriptors& descriptors) {
    for (const auto& [low, high] : descriptors) Invalidate(low, high);
    ASSERT_EQ(iommu_->queue().error(), std::nullopt);
  }

  std::mt19937_64 random_{GetParam()};
};

TEST_P(VtdIommuModelTest, AnswersAreThoseOfTheTablesOnceTheGuestHasSaidSo) {
  int stale = 0;
  int successes = 0;
  for (int step = 0; step < 250; ++step) {
    const auto requests = Requests();
    const auto before = Walk(requests);
    ASSERT_EQ(Ask(requests), before);
    for (const Answer& answer : before) successes += answer.reason == 0xff ? 1 : 0;
    Descriptors pending = ChangeSomething();
    const auto answers = Ask(requests);
    const auto after = Walk(requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      if (before[i] == after[i]) {
        ASSERT_EQ(answers[i], after[i]) << Describe(requests[i]);
        continue;
      }
      ASSERT_TRUE(answers[i] == before[i] || answers[i] == after[i])
          << Describe(requests[i]) << std::hex << " " << int{answers[i].reason} << " "
          << answers[i].address;
      stale += answers[i] == before[i] ? 1 : 0;
    }
    // Sometimes more changes before the guest says anything, and in any order.
    for (uint64_t more = random_() % 3; more > 0; --more) {
      const auto others = ChangeSomething();
      pending.insert(pending.end(), others.begin(), others.end());
      Ask(requests);
    }
    std::shuffle(pending.begin(), pending.end(), random_);
    Say(pending);
    ASSERT_EQ(Ask(requests), Walk(requests)) << "step " << step;
    if (HasFailure()) return;
  }
  EXPECT_GT(stale, 20) << "the caches were never seen";
  EXPECT_GT(successes, 1000);
  EXPECT_GT(iommu_->counters().page_hits, 1000);
}

INSTANTIATE_TEST_SUITE_P(Seeds, VtdIommuModelTest, ::testing::Range(1u, 5u));

}  // namespace
}  // namespace mvgpu::domain
