// Random holds and releases compared with a model that is too simple to be wrong: for each page the
// set of its holders and who pays.

#include <array>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "tests/apionly-domain/ledger_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::IsOk;

class Model {
 public:
  explicit Model(size_t rows) : counts_(rows) {}

  bool holds(size_t row, uint64_t inode, uint64_t page) const {
    const auto it = pages_.find({inode, page});
    return it != pages_.end() && it->second.holders.contains(row);
  }
  void hold(size_t row, uint64_t inode, uint64_t page) {
    Page& state = pages_[{inode, page}];
    if (state.holders.empty()) {
      state.payer = row;
      ++counts_[row].charged_pages;
    }
    state.holders.insert(row);
    ++counts_[row].unique_pages;
  }
  void release(size_t row, uint64_t inode, uint64_t page) {
    Page& state = pages_[{inode, page}];
    state.holders.erase(row);
    --counts_[row].unique_pages;
    if (state.payer == row) {
      --counts_[row].charged_pages;
      if (!state.holders.empty()) {
        state.payer = *state.holders.begin();
        ++counts_[state.payer].charged_pages;
      }
    }
    if (state.holders.empty()) pages_.erase({inode, page});
  }
  // The first page from `page` on that the row holds; `end` when there is none before that.
  uint64_t next_held(size_t row, uint64_t inode, uint64_t page, uint64_t end) const {
    for (auto it = pages_.lower_bound({inode, page});
         it != pages_.end() && it->first < std::pair(inode, end); ++it) {
      if (it->second.holders.contains(row)) return it->first.second;
    }
    return end;
  }
  const LedgerRow::Counts& counts(size_t row) const { return counts_[row]; }
  uint64_t unique_pages() const { return pages_.size(); }

 private:
  struct Page {
    std::set<size_t> holders;
    size_t payer = 0;
  };
  std::map<std::pair<uint64_t, uint64_t>, Page> pages_;
  std::vector<LedgerRow::Counts> counts_;
};

// The maximal runs in [first, first + count) whose pages the row holds, or does not.
std::vector<PageRun> RunsOf(const Model& model, size_t row, uint64_t inode, PageRun within,
                            bool held) {
  std::vector<PageRun> runs;
  for (uint64_t page = within.first; page < within.end(); ++page) {
    if (held) page = model.next_held(row, inode, page, within.end());
    if (page == within.end() || model.holds(row, inode, page) != held) continue;
    if (!runs.empty() && runs.back().end() == page) {
      ++runs.back().count;
    } else {
      runs.push_back({page, 1});
    }
  }
  return runs;
}

class LedgerModelTest : public LedgerFixture, public ::testing::WithParamInterface<uint32_t> {};

TEST_P(LedgerModelTest, RandomHoldsAndReleasesAgreeWithTheModel) {
  SCOPED_TRACE(::testing::Message() << "seed " << GetParam());
  std::mt19937 random(GetParam());
  constexpr uint64_t kPages = 70000;  // more than two chunks
  constexpr std::array<uint64_t, 2> kInodes = {100, 101};
  const size_t row_count = 2 + GetParam() % 5;
  auto one = Open();
  auto two = Open();
  Model model(row_count);
  std::vector<std::unique_ptr<LedgerRow>> rows;
  for (size_t i = 0; i < row_count; ++i) rows.push_back(Join(i % 2 == 0 ? *one : *two));

  const auto release_all = [&](size_t row, uint64_t inode, PageRun within) {
    for (const PageRun& run : RunsOf(model, row, inode, within, true)) {
      rows[row]->release({1, inode}, run);
      for (uint64_t p = run.first; p < run.end(); ++p) model.release(row, inode, p);
    }
  };
  for (int step = 0; step < 300; ++step) {
    const size_t row = random() % row_count;
    const uint64_t inode = kInodes[random() % 4 == 0 ? 1 : 0];
    // Around a few places, so that runs meet; mostly short, now and then long.
    const uint64_t base = std::array<uint64_t, 4>{0, 4000, 32700, 65500}[random() % 4];
    const uint64_t first = base + random() % 200;
    const uint64_t longest = std::array<uint64_t, 4>{1, 70, 300, 4000}[random() % 4];
    const PageRun run{first, std::min(1 + random() % longest, kPages - first)};
    if (random() % 20 == 0) {  // leaves, and comes back as somebody else
      for (const uint64_t each : kInodes) release_all(row, each, {0, kPages});
      rows[row].reset();
      rows[row] = Join(random() % 2 == 0 ? *one : *two);
    } else if (random() % 5 < 3) {
      for (const PageRun& fresh : RunsOf(model, row, inode, run, false)) {
        ASSERT_THAT(rows[row]->hold({1, inode}, kPages, fresh), IsOk());
        for (uint64_t p = fresh.first; p < fresh.end(); ++p) model.hold(row, inode, p);
      }
    } else {
      release_all(row, inode, run);
    }
    for (size_t i = 0; i < row_count; ++i) {
      ASSERT_EQ(rows[i]->counts(), model.counts(i)) << "row " << i << ", step " << step;
    }
    if (step % 10 == 0) {
      const LedgerSnapshot snapshot = Look();
      ASSERT_THAT(ProblemsOf(snapshot), ::testing::IsEmpty()) << "step " << step;
      ASSERT_EQ(snapshot.unique_pages, model.unique_pages()) << "step " << step;
    }
  }
  for (size_t i = 0; i < row_count; ++i) {
    for (const uint64_t inode : kInodes) release_all(i, inode, {0, kPages});
  }
  EXPECT_EQ(Look().unique_pages, 0u);
  ExpectInOrder();
  rows.clear();
  EXPECT_FALSE(ledger_exists());
}

INSTANTIATE_TEST_SUITE_P(Seeds, LedgerModelTest, ::testing::Range(1u, 13u));

TEST_F(LedgerModelTest, MillionPageRunsMeetAtOddPlaces) {
  constexpr uint64_t kPages = uint64_t{3} << 20;
  constexpr uint64_t kMillion = uint64_t{1} << 20;
  auto ledger = Open();
  auto a = Join(*ledger);
  auto b = Join(*ledger);
  ASSERT_THAT(b->hold(kRam, kPages, {12345, kMillion}), IsOk());
  ASSERT_THAT(a->hold(kRam, kPages, {777, kMillion}), IsOk());
  const uint64_t shared = 777 + kMillion - 12345;
  EXPECT_EQ(b->counts(), (LedgerRow::Counts{kMillion, kMillion}));
  EXPECT_EQ(a->counts(), (LedgerRow::Counts{kMillion, kMillion - shared}));
  ExpectInOrder();
  b->release(kRam, {12345, kMillion});
  EXPECT_EQ(a->counts(), (LedgerRow::Counts{kMillion, kMillion}));
  a->release(kRam, {777, kMillion});
  ExpectInOrder();
}

}  // namespace
}  // namespace mvgpu::domain
