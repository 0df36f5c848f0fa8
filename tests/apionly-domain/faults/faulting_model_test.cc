// Random changes and faults, against a reference that keeps a set of pages.

#include <random>

#include "tests/apionly-domain/faults/faulting_fixture.h"

namespace mvgpu::domain {
namespace {

struct Shape {
  unsigned seed;
  uint64_t around;
  uint64_t limit;
};

class FaultingModelTest : public FaultingTest, public ::testing::WithParamInterface<Shape> {
 protected:
  static constexpr uint64_t kPages = 1400;  // of IOVAs: three blocks
  struct Known {
    uint64_t first, count, file_page;
    Access access;
  };

  uint64_t Random(uint64_t below) { return random_() % below; }
  const Known* At(uint64_t page) const {
    for (const Known& known : mappings_) {
      if (page - known.first < known.count) return &known;
    }
    return nullptr;
  }
  void MapSomething() {
    Known known{Random(kPages), 1 + Random(300), Random(600),
                Random(4) == 0 ? Access::kRead : Access::kReadWrite};
    for (uint64_t i = 0; i < known.count; ++i) {
      if (At(known.first + i) != nullptr) return;
    }
    Map(BytesIn(known.first), BytesIn(known.file_page), BytesIn(known.count), known.access);
    mappings_.push_back(known);
  }
  void UnmapSomething() {
    if (mappings_.empty()) return;
    const size_t i = Random(mappings_.size());
    const Known gone = mappings_[i];
    ASSERT_THAT(container_.unmap(Iova(BytesIn(gone.first)), BytesIn(gone.count)), testing::IsOk());
    mappings_.erase(mappings_.begin() + static_cast<ptrdiff_t>(i));
    Forget(gone.first, gone.count);
  }
  void Forget(uint64_t first, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) shown_.erase(first + i);
  }
  void GiveBackSomething() {
    const uint64_t first = Random(kPages);
    const uint64_t count = 1 + Random(200);
    const uint64_t before = shown_.size();
    Forget(first, count);
    const uint64_t gone = faulting_->invalidate(Pages(first, count));
    if (IsUnlimited()) {
      ASSERT_EQ(gone, before - shown_.size());
    }
  }
  bool IsUnlimited() const { return GetParam().limit == UINT64_MAX; }
  // One page and those beside it in its window that are mapped alike and not there.
  void FaultSomething() {
    const uint64_t page = Random(kPages);
    const Known* known = At(page);
    const auto access = static_cast<Access>(1 + Random(3));
    const auto resolved = FaultingTest::At(page, access);
    if (known == nullptr) {
      ASSERT_THAT(resolved, testing::FailsWith(ErrorCode::kNotMapped));
      return;
    }
    if (known->access == Access::kRead && access != Access::kRead) {
      ASSERT_THAT(resolved, testing::FailsWith(ErrorCode::kPermission));
      return;
    }
    ASSERT_THAT(resolved, testing::IsOk());
    ASSERT_TRUE(faulting_->is_mapped(Iova(BytesIn(page))));
    ASSERT_EQ(target_->pages().at(page).access, known->access);
    if (!shown_.insert(page).second) {
      if (IsUnlimited()) {
        ASSERT_EQ(resolved->outcome, Outcome::kThere);
      }
      return;
    }
    const uint64_t window = page / GetParam().around;
    for (const int64_t step : {-1, 1}) {
      for (uint64_t at = page + static_cast<uint64_t>(step); at / GetParam().around == window;
           at += static_cast<uint64_t>(step)) {
        if (At(at) != known || !shown_.insert(at).second) break;
      }
    }
  }
  void Step() {
    switch (Random(20)) {
      case 0:
        return UnmapSomething();
      case 1:
      case 2:
        return MapSomething();
      case 3:
        return GiveBackSomething();
      default:
        return FaultSomething();
    }
  }

  std::mt19937_64 random_{GetParam().seed};
  std::vector<Known> mappings_;
  std::set<uint64_t> shown_;
};

TEST_P(FaultingModelTest, ItShowsWhatTheReferenceShows) {
  Fault({.around_pages = GetParam().around, .max_pinned_pages = GetParam().limit});
  for (int i = 0; i < 800; ++i) {
    Step();
    if (HasFatalFailure()) return;
    ExpectConsistent();
    const std::set<uint64_t> shown = Shown();
    if (IsUnlimited()) {
      ASSERT_EQ(shown, shown_) << "step " << i;
    } else {
      // Less, by what was dropped; and what was dropped is no longer known to be there.
      ASSERT_TRUE(std::includes(shown_.begin(), shown_.end(), shown.begin(), shown.end()))
          << "step " << i;
      ASSERT_LE(shown.size(), GetParam().limit);
      shown_ = shown;
    }
    for (const auto& [page, what] : target_->pages()) {
      const Known* known = At(page);
      ASSERT_NE(known, nullptr);
      std::byte* host =
          ApiOnlyDomain::Translator(*domain_).translate(Iova(BytesIn(page)), Access::kRead);
      ASSERT_EQ(what.host, host);
    }
  }
  const auto counters = faulting_->counters();
  EXPECT_LE(counters.peak_pinned_pages, GetParam().limit);
  EXPECT_EQ(counters.pages_mapped - counters.evicted_pages - counters.invalidated_pages -
                counters.revoked_pages,
            counters.mapped_pages);
}

INSTANTIATE_TEST_SUITE_P(Shapes, FaultingModelTest,
                         ::testing::Values(Shape{1, 1, UINT64_MAX}, Shape{2, 16, UINT64_MAX},
                                           Shape{3, 512, UINT64_MAX}, Shape{4, 4, 20},
                                           Shape{5, 16, 100}, Shape{6, 1, 3}));

}  // namespace
}  // namespace mvgpu::domain
