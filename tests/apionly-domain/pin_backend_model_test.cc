// Both back ends that hold memory against a naive reference, with a kernel that refuses now and
// then: a page that is pinned is held, what is said to be held is, and nothing is left at the end.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <set>
#include <vector>

#include "apionly-domain/pin/io_uring_pin_backend.h"
#include "apionly-domain/pin/mlock_pin_backend.h"
#include "tests/fakes/fake_buffer_table.h"
#include "tests/fakes/fake_memory_locker.h"
#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::FakeBufferTable;
using testing::FakeMemoryLocker;
using testing::GuestRam;
using testing::IsOk;

constexpr uint64_t kFilePages = 1300;

// The guest's view: which pages are pinned.
class PinModel {
 public:
  PinModel(PinBackend& backend, uint64_t seed) : backend_(&backend), random_(seed) {
    auto file = GuestFile::Create(ram_.duplicate());
    MVGPU_CHECK(file.has_value());
    file_ = std::move(*file);
  }

  // Pins the parts of a random run that are not pinned, or unpins those that are, cut at random.
  void step() {
    const bool pins = Below(5) < (filling_ ? 3u : 2u);
    if (Below(200) == 0) filling_ = !filling_;
    const PageRun run = RandomRun();
    for (uint64_t at = run.first; at < run.end();) {
      uint64_t end = at;
      const bool is_pinned = pinned_.contains(at);
      while (end < run.end() && pinned_.contains(end) == is_pinned && (end == at || Below(20) != 0))
        ++end;
      const PageRun part{at, end - at};
      if (pins && !is_pinned && backend_->pin(*file_, part)) {
        for (uint64_t page = at; page < end; ++page) pinned_.insert(page);
      } else if (!pins && is_pinned) {
        backend_->unpin(*file_, part);
        for (uint64_t page = at; page < end; ++page) pinned_.erase(page);
      }
      at = end;
    }
  }
  void unpin_all() {
    for (const uint64_t page : pinned_) backend_->unpin(*file_, {page, 1});
    pinned_.clear();
  }
  template <typename IsHeld>
  uint64_t pinned_but_not_held(IsHeld is_held) const {
    uint64_t lost = 0;
    for (const uint64_t page : pinned_) lost += is_held(file_->host_address(BytesIn(page))) ? 0 : 1;
    return lost;
  }
  uint64_t pinned() const { return pinned_.size(); }
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  const GuestFile& file() const { return *file_; }

 private:
  PageRun RandomRun() {
    const uint64_t first = Below(kFilePages);
    const uint64_t longest = Below(8) == 0 ? 600 : 6;
    return {first, std::min(1 + Below(longest), kFilePages - first)};
  }

  PinBackend* const backend_;  // outlives this
  std::mt19937_64 random_;
  GuestRam ram_{kFilePages * kPageSize};
  std::unique_ptr<GuestFile> file_;
  std::set<uint64_t> pinned_;
  bool filling_ = true;
};

class MlockModelTest : public ::testing::TestWithParam<uint64_t> {};

TEST_P(MlockModelTest, HoldsWhatIsPinnedWithinItsBudget) {
  constexpr uint64_t kBudget = 32;
  auto state = std::make_shared<FakeMemoryLocker::State>();
  MlockPinBackend backend(kBudget, std::make_unique<FakeMemoryLocker>(state));
  PinModel model(backend, GetParam());
  for (int i = 0; i < 3000; ++i) {
    model.step();
    ASSERT_EQ(model.pinned_but_not_held([&](auto* page) { return state->is_held(page); }), 0u) << i;
    ASSERT_EQ(backend.locked_pages(), state->locked.size()) << i;
    ASSERT_LE(state->stretches(), backend.areas()) << i;
    ASSERT_LE(backend.areas(), kBudget * 7 / 8 + 1) << i;
  }
  model.unpin_all();
  EXPECT_TRUE(state->locked.empty());
  EXPECT_EQ(backend.areas(), 0u);
}

TEST_P(MlockModelTest, HoldsWhatIsPinnedWhenTheKernelRefusesNowAndThen) {
  auto state = std::make_shared<FakeMemoryLocker::State>();
  MlockPinBackend backend(32, std::make_unique<FakeMemoryLocker>(state));
  PinModel model(backend, GetParam());
  for (int i = 0; i < 3000; ++i) {
    if (state->fail_at_call == 0) state->fail_at_call = 1 + model.Below(10);
    state->refuses_unlock = model.Below(10) == 0;
    model.step();
    ASSERT_EQ(model.pinned_but_not_held([&](auto* page) { return state->is_held(page); }), 0u) << i;
    ASSERT_GE(backend.locked_pages(), state->locked.size()) << i;
    ASSERT_LE(backend.areas(), 64u) << i;
  }
  state->refuses_unlock = false;
  state->fail_at_call = 0;
  model.unpin_all();
  EXPECT_TRUE(state->locked.empty()) << "what was refused goes with the last pin of the file";
  EXPECT_EQ(backend.locked_pages(), 0u);
  EXPECT_EQ(backend.areas(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, MlockModelTest, ::testing::Range<uint64_t>(1, 6));

class IoUringModelTest : public ::testing::TestWithParam<uint64_t> {
 protected:
  void SetUp() override {
    auto backend = IoUringPinBackend::Create(
        [this]() -> Result<std::unique_ptr<BufferTable>> { return MakeTable(); });
    ASSERT_THAT(backend, IsOk());
    backend_ = std::move(*backend);
  }
  std::unique_ptr<BufferTable> MakeTable() { return std::make_unique<FakeBufferTable>(state_); }

  std::shared_ptr<FakeBufferTable::State> state_ = std::make_shared<FakeBufferTable::State>();
  std::unique_ptr<PinBackend> backend_;
};

TEST_P(IoUringModelTest, HoldsExactlyWhatIsPinned) {
  PinModel model(*backend_, GetParam());
  for (int i = 0; i < 3000; ++i) {
    model.step();
    ASSERT_EQ(model.pinned_but_not_held([&](auto* page) { return state_->is_held(page); }), 0u);
    ASSERT_EQ(backend_->locked_pages(), model.pinned()) << i;
    ASSERT_EQ(state_->pages(), model.pinned()) << i;
  }
  model.unpin_all();
  EXPECT_TRUE(state_->buffers.empty());
}

TEST_P(IoUringModelTest, HoldsWhatIsPinnedWhenTheKernelRefusesNowAndThen) {
  PinModel model(*backend_, GetParam());
  state_->max_pages = kFilePages;  // so that cuts of large buffers fail
  for (int i = 0; i < 3000; ++i) {
    if (state_->fail_at_call == 0) state_->fail_at_call = 1 + model.Below(10);
    state_->refuses_empty = model.Below(10) == 0;
    model.step();
    ASSERT_EQ(model.pinned_but_not_held([&](auto* page) { return state_->is_held(page); }), 0u);
    ASSERT_GE(backend_->locked_pages(), model.pinned()) << i;
    ASSERT_EQ(state_->pages(), backend_->locked_pages()) << i;
  }
  state_->refuses_empty = false;
  state_->fail_at_call = 0;
  model.unpin_all();
  ASSERT_THAT(backend_->pin(model.file(), {0, 1}), IsOk()) << "what was refused is tried again";
  backend_->unpin(model.file(), {0, 1});
  EXPECT_TRUE(state_->buffers.empty());
  EXPECT_EQ(backend_->locked_pages(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, IoUringModelTest, ::testing::Range<uint64_t>(1, 6));

using IoUringTablesTest = IoUringModelTest;

TEST_P(IoUringTablesTest, TablesAreAddedUpToAMost) {
  constexpr uint64_t kMost = IoUringPinBackend::kMaxTables * 2;
  state_->slots = 2;
  SetUp();
  PinModel model(*backend_, 1);
  for (uint64_t i = 0; i < kMost; ++i) {
    ASSERT_THAT(backend_->pin(model.file(), {2 * i, 1}), IsOk());
  }
  EXPECT_THAT(backend_->pin(model.file(), {2 * kMost, 1}), FailsWith(ErrorCode::kLimit));
  backend_->unpin(model.file(), {0, 1});
  EXPECT_THAT(backend_->pin(model.file(), {2 * kMost, 1}), IsOk());
}

INSTANTIATE_TEST_SUITE_P(Once, IoUringTablesTest, ::testing::Values(1));

// The bound of AreaBudget in the orders that are bad for it, over files of many sizes.
class NoOpLocker final : public MemoryLocker {
 public:
  int lock(const std::byte*, uint64_t) override { return 0; }
  int lock_on_fault(const std::byte*, uint64_t) override { return 0; }
  int bring_in(std::byte*, uint64_t) override { return 0; }
  int unlock(const std::byte*, uint64_t) override { return 0; }
};

TEST(AreaBoundTest, ScatteredPinsStayWithinTheBudgetInAnyOrder) {
  constexpr uint64_t kBudget = 256;
  constexpr uint64_t kPins = 4096;
  for (const uint64_t gigabytes : {1u, 16u, 256u}) {
    GuestRam ram(gigabytes << 30);
    auto file = GuestFile::Create(ram.duplicate());
    ASSERT_THAT(file, IsOk());
    const uint64_t stride = (*file)->pages() / kPins;
    for (const uint64_t step : {1ull, 4095ull, 64ull + 1, 1365ull, 2731ull}) {  // odd: all pages
      MlockPinBackend backend(kBudget, std::make_unique<NoOpLocker>());
      std::mt19937_64 random(step);
      std::set<uint64_t> pinned;
      for (uint64_t i = 0; i < 3 * kPins; ++i) {
        const uint64_t page = i * step % kPins * stride;
        if (pinned.insert(page).second) {
          ASSERT_THAT(backend.pin(**file, {page, 1}), IsOk());
        }
        if (random() % 4 == 0) {  // room for fine areas again, where coarse ones were
          const uint64_t gone = random() % kPins * stride;
          if (pinned.erase(gone) != 0) backend.unpin(**file, {gone, 1});
        }
        ASSERT_LE(backend.areas(), kBudget * 7 / 8 + 1) << gigabytes << " GiB, step " << step;
      }
      for (const uint64_t page : pinned) backend.unpin(**file, {page, 1});
      ASSERT_EQ(backend.locked_pages(), 0u);
    }
  }
}

TEST(AreaBoundTest, FilesThatComeLaterFindRoom) {
  MlockPinBackend backend(256, std::make_unique<NoOpLocker>());
  std::vector<std::unique_ptr<GuestRam>> rams;
  std::vector<std::unique_ptr<GuestFile>> files;
  for (int i = 0; i < 5; ++i) {  // each as large as all before
    rams.push_back(std::make_unique<GuestRam>(uint64_t{1} << (30 + std::max(0, i - 1))));
    auto file = GuestFile::Create(rams.back()->duplicate());
    ASSERT_THAT(file, IsOk());
    files.push_back(std::move(*file));
    for (uint64_t page = 0; page < files.back()->pages(); page += 97)
      ASSERT_THAT(backend.pin(*files.back(), {page, 1}), IsOk()) << i << " " << page;
  }
  EXPECT_LE(backend.areas(), 256u);
}

}  // namespace
}  // namespace mvgpu::domain
