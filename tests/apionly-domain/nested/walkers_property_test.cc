// All formats, over tables at random: what is read page by page and what is read together agree,
// and nothing that a table says leads out of bounds.

#include <array>
#include <functional>
#include <random>
#include <string>

#include "apionly-domain/nested/two_stage.h"
#include "apionly-domain/nested/vmsa_stage1.h"
#include "apionly-domain/nested/vmsa_stage2.h"
#include "apionly-domain/nested/vtd_first_stage.h"
#include "apionly-domain/nested/vtd_second_stage.h"
#include "apionly-domain/nested/zpci_table.h"
#include "tests/apionly-domain/nested/nested_fixture.h"

namespace mvgpu::domain {
namespace {

constexpr uint64_t kTables = 0x10'0000;
constexpr uint64_t kTablesSize = 0x4'0000;
constexpr uint64_t kSecondTables = 0x18'0000;  // of a second stage, see FillTables()
using Random = std::mt19937_64;

// A format, its walker, and what its entries look like: flags beside an address, or anything.
struct Subject {
  std::string name;
  uint64_t root;
  unsigned address_bits;
  std::function<uint64_t(Random&)> flags;
  std::function<std::unique_ptr<TableWalker>(const GuestTables*)> make;
  bool is_big_endian = false;
};

// The stages of a format, one behind the other.
template <typename First, typename Second>
class BothStages final : public TableWalker {
 public:
  explicit BothStages(const GuestTables* memory, uint64_t root2)
      : second_({}, memory),
        through_(&second_, root2, memory),
        first_({}, &through_),
        nested_(&first_, &second_, root2) {}
  WalkResult walk(uint64_t root, uint64_t address, Wanted wanted) const override {
    return nested_.walk(root, address, wanted);
  }
  Stretch walk_pages(uint64_t root, uint64_t address, std::span<PageWord> words) const override {
    return nested_.walk_pages(root, address, words);
  }

 private:
  const Second second_;
  const StageTwoTables through_;
  const First first_;
  const TwoStageWalker nested_;
};

template <typename Walker>
std::function<std::unique_ptr<TableWalker>(const GuestTables*)> Makes() {
  return [](const GuestTables* tables) {
    if constexpr (std::is_same_v<Walker, ZpciTable>) {
      return std::make_unique<ZpciTable>(tables);
    } else {
      return std::make_unique<Walker>(typename Walker::FormatType{}, tables);
    }
  };
}

uint64_t ZpciFlags(Random& random) {
  constexpr std::array<uint64_t, 8> kFlags{0x7, 0x7, 0xb, 0, 0x200, 0x400, 0x20, 0x207};
  return kFlags[random() % kFlags.size()];
}
// Mostly present and with all rights; A and D set or not.
uint64_t X86Flags(Random& random) {
  const uint64_t noise = random() & random() & random() & 0x8000'0000'0000'0fff;
  return (0x67 & ~(random() & random() & random() & 0x67)) ^ noise;
}
uint64_t ArmFlags(Random& random) {
  const uint64_t noise = random() & random() & random() & random() & 0x78f8'0000'0000'0fff;
  return 0x7c3 ^ noise;
}

const Subject kSubjects[] = {
    {"zpci", kTables | 0x804, 42, ZpciFlags, Makes<ZpciTable>(), true},
    {"vtd_first_stage", kTables, 47, X86Flags, Makes<VtdFirstStage>()},
    {"vtd_second_stage", kTables, 48, X86Flags, Makes<VtdSecondStage>()},
    {"vmsa_stage1", kTables, 48, ArmFlags, Makes<VmsaStage1>()},
    {"vmsa_stage2", kTables, 40, ArmFlags, Makes<VmsaStage2>()},
    {"vmsa_both", kTables, 48, ArmFlags,
     [](const GuestTables* memory) {
       return std::make_unique<BothStages<VmsaStage1, VmsaStage2>>(memory, kSecondTables);
     }},
};

class WalkersPropertyTest : public NestedTest,
                            public ::testing::WithParamInterface<std::tuple<Subject, unsigned>> {
 protected:
  const Subject& subject() const { return std::get<0>(GetParam()); }

  void FillTables() {
    for (uint64_t at = kTables; at < kTables + kTablesSize; at += 8) {
      const uint64_t entry = Entry();
      ram_.put(at, subject().is_big_endian ? __builtin_bswap64(entry) : entry);
    }
    // The second stage shows the tables above where they are, and anything elsewhere: two tables of
    // the first level, and one of 2 MiB blocks.
    for (uint64_t at = kSecondTables; at < kSecondTables + 0x3000; at += 8) ram_.put(at, Entry());
    ram_.put(kSecondTables, uint64_t{kSecondTables + 0x2000} | 3);
    ram_.put(kSecondTables + 0x2000, uint64_t{0x7fd});
  }
  uint64_t Entry() {
    const uint64_t flags = subject().flags(random_);
    switch (random_() % 16) {
      case 0:
        return random_();
      case 1:
        return 0;
      case 2:
      case 3:
        return (random_() & 0x3'ffff'f000) | flags;  // mostly not memory
      default:
        return (kTables + random_() % (kTablesSize / 0x1000) * 0x1000) | flags;
    }
  }
  uint64_t RandomPage() {
    const uint64_t address = random_() >> (64 - subject().address_bits) & ~kPageMask;
    return random_() % 8 == 0 ? address & 0xfff'ffff : address;
  }
  // What one page should be by what the walk for its address alone says.
  void ExpectAgreement(const TableWalker& walker, PageWord word, uint64_t address) {
    const WalkResult alone = walker.walk(subject().root, address, {});
    if (alone) {
      EXPECT_EQ(word, MakePageWord(alone->out, alone->rights)) << std::hex << address;
      return;
    }
    EXPECT_EQ(word, 0) << std::hex << address;
    EXPECT_FALSE(alone.error().on_table);
    if (alone.error().code == FaultCode::kNotPresent) return;
    // Something else is wrong in the second stage: what users may not do does not come there.
    for (const Access access : {Access::kRead, Access::kWrite}) {
      const WalkResult as_user = walker.walk(subject().root, address, access);
      ASSERT_FALSE(as_user);
      EXPECT_EQ(as_user.error().stage, 1) << alone.error().ToString();
    }
  }

  Random random_{std::get<1>(GetParam())};
};

TEST_P(WalkersPropertyTest, PagesTogetherAreWhatTheyAreAlone) {
  const auto walker = subject().make(tables_.get());
  uint64_t described = 0;
  uint64_t mapped = 0;
  for (int round = 0; round < 4; ++round) {
    FillTables();
    for (int i = 0; i < 400; ++i) {
      std::array<PageWord, 16> words;
      const uint64_t at = RandomPage();
      const Stretch stretch = walker->walk_pages(subject().root, at, words);
      ASSERT_TRUE(stretch.pages != 0 || stretch.fault);
      ASSERT_TRUE(stretch.is_hole || stretch.pages <= words.size());
      for (uint64_t k = 0; k < std::min<uint64_t>(stretch.pages, words.size()); ++k) {
        const uint64_t address = at + BytesIn(k);
        const PageWord word = stretch.is_hole ? 0 : words[k];
        ExpectAgreement(*walker, word, address);
        ++described;
        mapped += word != 0 ? 1 : 0;
      }
      if (!stretch.fault || stretch.is_hole) continue;
      ASSERT_GE(stretch.fault_pages, 1);
      const auto alone = walker->walk(subject().root, at + BytesIn(stretch.pages), {});
      ASSERT_FALSE(alone);
      EXPECT_EQ(alone.error(), *stretch.fault) << alone.error().ToString();
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(described, 100) << "too many faults to say much";
  EXPECT_GT(mapped, 20);
}

// A walk allows what the leaf's rights say, and nothing else.
TEST_P(WalkersPropertyTest, AWishIsGrantedIffTheRightsAllowIt) {
  const auto walker = subject().make(tables_.get());
  FillTables();
  for (int i = 0; i < 1000; ++i) {
    const uint64_t at = RandomPage() + random_() % kPageSize;
    const auto there = walker->walk(subject().root, at, {});
    for (const Access access : {Access::kRead, Access::kWrite, Access::kReadWrite}) {
      const auto result = walker->walk(subject().root, at, access);
      if (!there) {
        ASSERT_FALSE(result);
        if (result.error() == there.error()) continue;
        // Stage 1 refuses before stage 2 is asked.
        ASSERT_EQ(there.error().stage, 2);
        ASSERT_FALSE(there.error().on_table);
        ASSERT_EQ(result.error().stage, 1);
        continue;
      }
      ASSERT_EQ(result.has_value(), (RightsOf(access) & ~there->rights) == 0)
          << std::hex << at << (result ? "" : result.error().ToString());
      if (result) {
        ASSERT_EQ(*result, *there);
        ASSERT_EQ(result->out % kPageSize, at % kPageSize);
      }
    }
  }
}

TEST_P(WalkersPropertyTest, ADomainThatFollowsThemIsBoundedAndLeavesNothing) {
  const auto walker = subject().make(tables_.get());
  const auto all = IovaRange::FromFirstAndLast(Iova(0), Iova(~uint64_t{0}));
  for (int round = 0; round < 3; ++round) {
    FillTables();
    NestedDomain& nested = Nest(walker.get(), subject().root, all, NestedDomain::OnFault::kSkip);
    for (int i = 0; i < 10; ++i) {
      const auto rest = IovaRange::FromFirstAndLast(Iova(RandomPage()), Iova(~uint64_t{0}));
      const Refreshed refreshed = nested.refresh(rest, /*max_steps=*/50);
      ASSERT_LE(refreshed.steps, 50 + ShadowTable::kChunkPages);
      ASSERT_EQ(PinnedPages(), target_->pages.size());
    }
    nested_.reset();
    ASSERT_EQ(PinnedPages(), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, WalkersPropertyTest,
                         ::testing::Combine(::testing::ValuesIn(kSubjects),
                                            ::testing::Range(1u, 4u)),
                         [](const auto& instance) {
                           return std::get<0>(instance.param).name + "_" +
                                  std::to_string(std::get<1>(instance.param));
                         });

}  // namespace
}  // namespace mvgpu::domain
